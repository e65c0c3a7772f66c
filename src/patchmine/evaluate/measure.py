"""What all protocols share: features once, scores of every view, baselines, the filed result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from patchmine.data.items import CLIP
from patchmine.errors import Say, UserError
from patchmine.evaluate.evaluated import START, Evaluated, open_evaluated
from patchmine.evaluate.features import FeatureLoop, Features, Reader, Views, device_of
from patchmine.evaluate.labelled import LabelledData, Part, open_labelled
from patchmine.evaluate.paired import accuracy_interval, change_between, ends_in_words
from patchmine.evaluate.settings import EvaluatedSettings, FiledSettings, ProtocolSettings
from patchmine.models.onednn import fast_linear
from patchmine.runs.folder import RunFolder
from patchmine.system.disk import refusal, replacing

Result = dict[str, Any]
Accuracy = dict[str, float]
"""``{"top1": percent, "top5": percent}``."""


@dataclass(frozen=True)
class Learned:
    """What a protocol made of the training features of one reader."""

    # Rows (R, S, D) on any device -> logits (R, C) of each of its classifiers, by name.
    score: Callable[[Tensor], Mapping[str, Tensor]]
    chosen: str  # the classifier that the result's accuracy is of
    told: Result  # what else the result says
    all_under: str | None = None  # the result's key for the accuracies of all of them


@dataclass(frozen=True)
class Scored:
    """Accuracies by (protocol, reader) and classifier, of the chosen one which of the items (N,) it
    got right, and how many items were read.
    """

    accuracies: Mapping[tuple[str, str], Mapping[str, Accuracy]]
    right: Mapping[tuple[str, str], Tensor]
    tested: int


_STAND_IN = {"mean": "the mean of its patches", "pooled": "what it pools itself"}
_WORDS = {"top1": "top-1", "top5": "top-5"}

Learn = Callable[[Reader, Features, int], Learned]
"""(reader, training features, number of classes) -> what was learnt."""


def opened(settings: EvaluatedSettings) -> Evaluated:
    """The model under evaluation, prepared as the settings say."""
    how = {"image_size", "channels", "weights", "seed", "crop_pct", "stride"}
    return open_evaluated(settings.target, **{name: getattr(settings, name) for name in how})


def measure(
    settings: ProtocolSettings,
    protocols: Mapping[str, Learn],
    say: Say,
    readers: Mapping[str, Reader],
    *,
    views: Views | None = None,
    notes: Sequence[str] = (),
    empty: Callable[..., Tensor] = torch.empty,
) -> list[Result]:
    """Results of protocols on the readers of `readers_of`, from the same images; a run's filed."""
    start, evaluated = time.monotonic(), readers[""].evaluated
    noun = evaluated.item.noun
    data = open_labelled(settings.data, settings.test, evaluated.item.keeping(settings.remote_gb))
    for line in filter(None, (evaluated.told, data.how)):
        say(line)
    loop = FeatureLoop(readers, settings, device_of(settings), say, empty=empty)
    learned: dict[tuple[str, str], Learned] = {}
    with fast_linear():
        train = loop.table(data.train, f"train {noun}s")
        learning = time.monotonic()
        for name, reader in readers.items():
            features = train.pop(name)
            for protocol, learn in protocols.items():
                learned[protocol, name] = learn(reader, features, len(data.classes))
        learning = time.monotonic() - learning
        found = score(loop, data.test, learned, f"test {noun}s", views)
    spent = time.monotonic() - start
    if len(data.classes) <= 5:
        few = f"there are only {len(data.classes)} classes"
        notes = [f"top-5 is 100 by definition: {few}", *notes]
    common = {
        "target": target_of(settings, evaluated),
        "images": _images(evaluated, data, found.tested),
        "seconds_spent": {"features": round(spent - learning, 1), "all": round(spent, 1)},
        "notes": [*filter(None, [evaluated.note]), *notes],
    }
    told = {key: _told(each, found, key, views) for key, each in learned.items()}
    results = []
    for protocol in protocols:
        baselines = {name: told[protocol, name] for name in readers if name}
        for name, scores in baselines.items():
            say(f"baseline {name}, {protocol}: top-1 {scores['top1']:.2f}")
        own = told[protocol, ""] | ({"baselines": baselines} if baselines else {})
        last_word = f"-{protocol.rsplit('-', 1)[-1]}" if len(protocols) > 1 else ""
        name = protocol if settings.name is None else f"{settings.name}{last_word}"
        results.append({"name": name, "protocol": protocol, **own, **common})
        results[-1] |= _since_start(results[-1], found.right, noun)
    for result in results:
        file_result(result, evaluated)
    return results


def _since_start(result: Result, right: Mapping[tuple[str, str], Tensor], noun: str) -> Result:
    """What a result says of the training, where the start is among its baselines."""
    protocol = result["protocol"]
    if (protocol, START) not in right:
        return {}
    change = change_between(right[protocol, START], right[protocol, ""])
    before, after = result["baselines"][START]["top1"], result["top1"]
    verdict = change.sentence(protocol, before, after, noun)
    return {"since_start": change.told(), "notes": [verdict, *result["notes"]]}


def readers_of(
    settings: ProtocolSettings, evaluated: Evaluated, blocks: int, say: Say
) -> dict[str, Reader]:
    """The reader of the model under the name "", and those of its baselines where asked for."""
    models = models_of(settings, evaluated, say)
    return {name: Reader(each, blocks) for name, each in models.items()}


def models_of(settings: FiledSettings, evaluated: Evaluated, say: Say) -> dict[str, Evaluated]:
    """The model under the name "", and its baselines where asked for."""
    models = {"": evaluated}
    if settings.baselines and evaluated.encoder is not None:
        # A partner is another network than the one that init names.
        if settings.weights in ("student", "teacher"):
            try:
                start = evaluated.start()
            except UserError as error:
                say(f"the baseline {START} is left out: {error}")
            else:
                models |= {} if start is None else {START: start}
        models["random_init"] = evaluated.random_init(settings.seed)
        models["raw_pixels"] = evaluated.raw_pixels()
    return models


def choose_pooling(readers: Mapping[str, Reader], pooling: str, say: Say) -> None:
    """Say what stands in for a class token; UserError for a pooling that the model has not."""
    readers[""].choose(pooling)  # a mistake is told before images are read
    for reader in readers.values():
        evaluated, chosen = reader.evaluated, reader.choose(pooling)
        if chosen != pooling and evaluated.encoder is not None:
            what = _STAND_IN.get(chosen, chosen)
            say(f"{evaluated.name} has no class token: its features are {what}")


@torch.no_grad()
def score(
    loop: FeatureLoop,
    part: Part,
    learned: Mapping[tuple[str, str], Learned],
    title: str,
    views: Views | None = None,
) -> Scored:
    """What was learned, scored on the items of a part."""
    # Features are scored as they come: memory holds one batch of them.  Of several views of an item
    # the softmax is averaged; then "" is the accuracy of the chosen classifier on the middle one.
    assert part.labels is not None, "labelled data has labels"
    labels = torch.from_numpy(part.labels)

    def own() -> tuple[dict[tuple[str, str, str], Tensor], int]:
        places: dict[tuple[str, str, str], list[Tensor]] = {}
        done = 0
        for index, columns in loop.batches(loop.share(part), title, views):
            truth = labels[index]
            for (protocol, name), each in learned.items():
                for key, scores in _scores(each, columns[name], views).items():
                    right = _right_places(scores, truth).cpu()
                    places.setdefault((protocol, name, key), []).append(right)
            done += len(index)
        return {key: torch.cat(each) for key, each in places.items()}, done

    shares = loop.in_all_processes(own)
    tested = sum(done for _, done in shares)
    loop.judge_broken(part, tested, title)
    accuracies: dict[tuple[str, str], dict[str, Accuracy]] = {key: {} for key in learned}
    right: dict[tuple[str, str], Tensor] = {}
    for protocol, name, key in next(places for places, done in shares if done):
        first = torch.cat([each[protocol, name, key] for each, done in shares if done])  # (N, 5)
        top1, top5 = (100 * _counted(first) / tested).tolist()
        accuracies[protocol, name][key] = {"top1": top1, "top5": top5}
        if key == learned[protocol, name].chosen:
            right[protocol, name] = first[:, 0]
    return Scored(accuracies, right, tested)


def _scores(learned: Learned, rows: Tensor, views: Views | None) -> Mapping[str, Tensor]:
    """Of each item (B, C) by classifier; of several views the mean, and under "" the middle one."""
    found = learned.score(rows)
    if views is None:
        return found
    logits = found[learned.chosen]
    chosen = logits.view(-1, views.count, logits.shape[1])  # (B, views, C)
    means = {key: each.softmax(1).view_as(chosen).mean(1) for key, each in found.items()}
    return {**means, "": chosen[:, views.middle]}


def count_right(scores: Tensor, labels: Tensor) -> Tensor:
    """(2,): of how many rows (B, C) the label (B,) is first, and is among the first five."""
    return _counted(_right_places(scores, labels))


def _counted(right: Tensor) -> Tensor:
    """The same (2,) of which of the first five classes is right (B, 5)."""
    return torch.stack([right[:, 0].sum(), right.any(dim=1).sum()]).double().cpu()


def _right_places(scores: Tensor, labels: Tensor) -> Tensor:
    """(B, 5) bool: which of the first five classes of each row (B, C) is its label (B,)."""
    # Of equal scores the class with the smaller number counts more; rows of NaN are wrong.
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :5]
    return (best == labels[:, None].to(best.device)) & ~scores.isnan().any(1, keepdim=True)


def _told(learned: Learned, found: Scored, key: tuple[str, str], views: Views | None) -> Result:
    accuracies = found.accuracies[key]
    result: Result = {**accuracies[learned.chosen]}
    result["top1_interval"] = accuracy_interval(result["top1"], found.tested)
    protocol, name = key
    if name:  # image by image, which is surer than the two intervals
        change = change_between(found.right[key], found.right[protocol, ""])
        result["change"] = change.told()
    if learned.all_under is not None:
        result[learned.all_under] = {key: each for key, each in accuracies.items() if key}
    settings = learned.told.get("settings", {})
    if views is not None:
        result["one_view"] = accuracies[""]
        settings = views.told | settings
    return {**result, **learned.told, "settings": settings}


def _images(evaluated: Evaluated, data: LabelledData, tested: int) -> Result:
    counts = {"train": len(data.train), "test": len(data.test), "test_read": tested}
    return {"how": data.how, **counts, "classes": len(data.classes), **prepared(evaluated)}


def target_of(settings: EvaluatedSettings, evaluated: Evaluated) -> Result:
    """What a result says about the model under evaluation."""
    return {"name": evaluated.name, "weights": settings.weights, "note": evaluated.note}


def prepared(evaluated: Evaluated) -> Result:
    """What a result says about how items were prepared."""
    settings, clip = evaluated.input, evaluated.input.clip
    found: Result = {
        "image_size": list(settings.image_size),
        "crop_pct": evaluated.crop_pct,
        "mean": settings.mean,
        "std": settings.std,
    }
    if evaluated.item is CLIP:
        found["clip"] = {"frames": clip.frames, "stride": clip.stride, "short": clip.short}
    return found


def file_result(result: Result, evaluated: Evaluated) -> None:
    """Write eval/NAME.json where the model is of a run; UserError tells what was measured."""
    if evaluated.folder is None:
        return
    try:
        write_result(RunFolder(evaluated.folder).eval_dir / f"{result['name']}.json", result)
    except OSError as error:
        told = ", ".join(f"{_WORDS.get(k, k)} {v:.2f}" for k, v in numbers_of(result).items())
        why = refusal(error, "cannot be written")
        raise UserError(f"{why}.  What was measured: {told}") from error


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        new.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def numbers_of(result: Mapping[str, Any]) -> dict[str, float]:
    """What a result found: its accuracies or other measures, by name."""
    return {name: value for name, value in result.items() if isinstance(value, float)}


def show_result(result: Mapping[str, Any], console: Console) -> None:
    """A small table for people: the model first, then its baselines."""
    print_line = partial(console.print, markup=False)  # names may hold brackets
    if "top1" in result:
        _show_accuracies(result, console, print_line)
    else:
        _show_numbers(result, console)
    for note in result["notes"]:
        print_line(note)


def _show_accuracies(
    result: Mapping[str, Any], console: Console, print_line: Callable[[str], None]
) -> None:
    table = Table(title=Text(f"{result['protocol']}: {result['target']['name']}"))
    for column in ("", "top-1", "95 % interval", "top-5"):
        table.add_column(column, justify="right" if column else "left")
    for name, scores in {"this model": result, **result.get("baselines", {})}.items():
        ends = ends_in_words(scores.get("top1_interval", ()))
        table.add_row(
            name.replace("_", " "), f"{scores['top1']:.2f}", ends, f"{scores['top5']:.2f}"
        )
    console.print(table)
    images = result["images"]
    noun = "videos" if "clip" in images else "images"
    counts = f"{images['train']:,} training and {images['test']:,} test {noun}"
    print_line(f"{counts}, {images['classes']} classes")  # which ones was said at the start
    if "one_view" in result:
        used, middle = result["settings"], result["one_view"]["top1"]
        clips = f"{used['segments']} x {used['crops']} clips of each video"
        print_line(f"scores averaged over {clips}; the middle one alone: top-1 {middle:.2f}")
    if "by_k" in result:
        by_k = (f"{k}: {scores['top1']:.2f}" for k, scores in result["by_k"].items())
        print_line(f"top-1 by k: {', '.join(by_k)}")
    if "chosen" in result:
        best = result["chosen"]
        held_out = f"{best['held_out_top1']:.2f} on held-out images"
        print_line(f"chosen: {best['pooling']}, rate {best['rate']:g} ({held_out})")


def _show_numbers(result: Mapping[str, Any], console: Console) -> None:
    """A line for each measure, a column for the model and each baseline."""
    table = Table(title=Text(f"{result['protocol']}: {result['target']['name']}"))
    columns = {"this model": result, **result.get("baselines", {})}
    for column in ("", *columns):
        table.add_column(column.replace("_", " "), justify="right" if column else "left")
    for name in numbers_of(result):
        table.add_row(name.replace("_", " "), *(f"{each[name]:.3f}" for each in columns.values()))
    console.print(table)

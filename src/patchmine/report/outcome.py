"""The verdict on a run in words: whether it learned, and how sure that is.

Every sentence of it stands here; `evidence` computes what they say.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from patchmine.evaluate.evaluated import START
from patchmine.evaluate.paired import ends_in_words
from patchmine.report import words
from patchmine.report.curve_words import does, ends_of
from patchmine.report.evidence import (
    PROTOCOLS,
    Difference,
    Measured,
    Score,
    difference,
    evaluations_of,
    guess_of,
    images_of,
    measured,
    measured_on,
    most_common,
    scores_in_training,
)
from patchmine.report.health import FEWEST_LOOKS, health_of
from patchmine.report.reading import SHARES, RunRecord
from patchmine.report.series import finite_number
from patchmine.report.words import number, percent, span, whole

_NAMES = {START: "its untouched start", "random_init": "random init", "raw_pixels": "raw pixels"}
_TASK_SCORES = ("top1", "miou", "map", "r2")
_MOST_IMAGES = 1e5  # more are not worth naming
_LITTLE = 0.01  # of the loss: no fall
_ONLY_LABELS = "Only labelled images can say whether the features are good; this measures it:"
_NO_NUMBERS = "There are no numbers of training yet."
_NO_TEST = "It is tested when it is trained to its end."
_TROUBLE = {
    "collapse": "the features collapsed",
    "over-fitting": "the run over-fits",
    "mining": "hard masks do not follow the images",
}


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    ``kind``: good, unclear, bad or untold.  ``also``: sentences that go on.  ``command``: what to
    type to know more.
    """

    kind: str
    headline: str
    also: Sequence[str] = ()
    command: str | None = None


@dataclass(frozen=True)
class Judged:
    """What came of each run, by name, and which is better, where that can be asked."""

    each: Mapping[str, Outcome]
    comparison: Outcome | None

    def headlines(self) -> Iterator[str]:
        """The sentences that a page opens with."""
        if self.comparison is not None:
            yield self.comparison.headline
        for name, one in self.each.items():
            yield f"{name}: {one.headline}"


def judge(runs: Sequence[RunRecord]) -> Judged:
    """The verdicts on these runs."""
    each = {run.name: one for run in runs if (one := outcome_of(run)) is not None}
    return Judged(each, compare([run for run in runs if run.name in each]))


def outcome_of(run: RunRecord) -> Outcome | None:
    """The verdict on a run; None of a folder that only compares others."""
    if SHARES in run.evaluations and not run.series:
        return None
    if run.settings.get("kind", "pretrain") != "pretrain":
        return _of_task(run)
    found = evaluations_of(run)
    if found and found[0].baselines:
        return _of_baselines(run, found)
    return _without_baselines(run, found) or _without_labels(run)


# ---- measured beside baselines ----


def _of_baselines(run: RunRecord, found: Sequence[Measured]) -> Outcome:
    first, *others = found
    kind, verdict = _judged(first)
    also = [_difference(each) for each in first.differences]
    also += filter(None, [_too_few(each) for each in first.differences[:1]])
    also += [_other(each) for each in others if each.baselines]
    return Outcome(kind, f"{_numbers(first)}: {verdict}.", [*also, *_troubles(run)])


def _numbers(each: Measured, title: str = "") -> str:
    """kNN 85.4 % (95 % interval 82.9 to 87.6), random init 76.4 %, on 900 test images."""
    text = f"{title or words.title(each.name)} {percent(each.own.top1)}"
    if each.own.interval is not None:
        text += f" (95 % interval {ends_in_words(each.own.interval)})"
    baselines = [f"{_called(name)} {percent(top1)}" for name, top1 in each.baselines.items()]
    on = "" if each.own.images is None else f", on {whole(each.own.images)} test images"
    return ", ".join([text, *baselines]) + on


def _judged(each: Measured) -> tuple[str, str]:
    """The kind of a verdict and its words, from the baseline that counts most."""
    first, *rest = each.differences
    name = _called(first.name)
    if first.sign is None:
        where = "above" if first.points > 0 else "not above"
        return "unclear", f"{where} {name}, but the file does not say on how many images"
    is_start = first.name == START
    if first.sign == 0:
        return "unclear", f"it cannot be told apart from {name}"
    if first.sign < 0:
        told = "training made it worse" if is_start else "it learned nothing that these labels show"
        return "bad", f"worse than {name}, {told}"
    pixels = next((one for one in rest if one.name == "raw_pixels"), None)
    if not is_start and pixels is not None and pixels.sign != 1:
        how = "worse than" if pixels.sign == -1 else "not to be told apart from"
        return "unclear", f"better than {name}, but {how} raw pixels"
    return "good", "training helped" if is_start else "it learned"


def _difference(each: Difference) -> str:
    """9.0 points above random init (95 % interval +6.1 to +11.9, image by image)."""
    where = "above" if each.points >= 0 else "below"
    text = f"{abs(each.points):.1f} points {where} {_called(each.name)}"
    if each.interval is None:
        return f"{text}."
    how = "image by image" if each.is_paired else "from the two accuracies alone, which is too wide"
    return f"{text} (95 % interval {span(each.interval)}, {how})."


def _too_few(each: Difference) -> str | None:
    """What would settle a difference that cannot be told."""
    if each.sign != 0 or each.images is None:
        return None
    return (
        f"{whole(each.images)} test images are too few for so small a difference: {_needed(each)}"
    )


def _needed(each: Difference) -> str:
    enough = each.enough_images
    if enough > _MOST_IMAGES:
        return "the two are alike as far as any test set of usual size would show."
    return f"about {whole(_rounded(enough))} would tell, if it stays as it is."


def _rounded(count: float) -> float:
    """Two digits, upwards."""
    size = 10 ** max(0, len(str(int(count))) - 2)
    return -(-count // size) * size


def _other(each: Measured) -> str:
    return f"{_numbers(each)}: {_judged(each)[1]}."


def _called(name: str) -> str:
    return _NAMES.get(name, words.spoken(name))


# ---- measured without baselines, or by nothing ----


def _without_baselines(run: RunRecord, found: Sequence[Measured]) -> Outcome | None:
    """An accuracy alone, filed or in training, which says little."""
    command = _command(run)
    missing = "What random weights and raw pixels reach is not measured: this does it."
    if found:
        text = f"{_numbers(found[0])}: whether that is much, only baselines can say."
        return Outcome("untold", text, [missing, *_troubles(run)], command)
    name = next(scores_in_training(run, ("top1",)), None)
    if name is None:
        return None
    series = run.series[name]
    what = (
        f"{words.title(name.partition('.')[0])} in training {does(series, percent, is_score=True)}"
    )
    text = _so_far(run, f"{what}: whether that is much, only baselines can say.")
    return Outcome("untold", text, [missing, *_loss(run), *_troubles(run)], command)


def _without_labels(run: RunRecord) -> Outcome:
    """A verdict from the losses and the monitors."""
    command, troubles = _command(run), _troubles(run)
    if "loss" not in run.series:
        return Outcome("untold", _NO_NUMBERS, [_ONLY_LABELS], command)
    faults = [each.kind for each in health_of(run) if each.is_fault]
    said = _loss(run)
    if faults:
        what = " and ".join(_TROUBLE[kind] for kind in faults)
        text = _so_far(run, f"{what[:1].upper()}{what[1:]}.")
        return Outcome("bad", text, [*said, _ONLY_LABELS], command)
    also = [*said[1:], *_monitors(run), *troubles, _ONLY_LABELS]
    kind, text = _of_loss(run, said[0])
    return Outcome(kind, _so_far(run, text), also, command)


def _of_loss(run: RunRecord, told: str) -> tuple[str, str]:
    """The kind of a verdict from the loss alone, and its words."""
    first, last = ends_of(run.series["loss"])
    guess, begun = guess_of(run), told[:1].lower() + told[1:]
    if last >= first - _LITTLE * abs(first) or (guess is not None and not guess.is_beaten):
        return "unclear", f"Nothing shows yet that it learns: {begun}"
    if "method.teacher_temp_start" in run.settings:  # whose teacher moves, too
        return "untold", told
    return "untold", f"It learns its own task: {begun}"


def _loss(run: RunRecord) -> list[str]:
    """Sentences on the loss: its fall, guessing, and images that are not trained on."""
    series = run.series.get("loss")
    if series is None:
        return []
    return [f"The loss {does(series, number)}.", *_guess(run), *_held_out(run)]


def _guess(run: RunRecord) -> Iterator[str]:
    guess = guess_of(run)
    if guess is None:
        if "method.teacher_temp_start" in run.settings:
            yield (
                "Student and teacher both move, so a low loss alone says little: the entropy of "
                "the targets must stay up, too."
            )
    elif guess.kind == "place":
        yield (
            f"It places {percent(guess.own)} of the patches right, where guessing gives "
            f"{percent(guess.value)}."
        )
    elif guess.is_beaten:
        yield (
            f"Its error in reconstruction is {number(guess.own)}, where predicting each patch's "
            "mean gives about 1 (less where patches are of one colour)."
        )
    else:
        yield (
            f"Its error in reconstruction is {number(guess.own)}, no better than predicting each "
            "patch's mean, which gives about 1."
        )


def _held_out(run: RunRecord) -> Iterator[str]:
    series = run.series.get("monitor.held_out_loss")
    if series is not None and len(series.values) > 1:
        yield f"On images that it is not trained on, the loss {does(series, number)}."


def _monitors(run: RunRecord) -> Iterator[str]:
    rank = run.series.get("monitor.rankme")
    if rank is not None and len(rank.values) > 1:
        first, last = float(rank.values[0]), rank.last
        told = f"RankMe {number(first)} at first, {number(last)} now"
        # Fewer looks are no evidence, for which health asks, too.
        seen = len(rank.values) > FEWEST_LOOKS
        yield f"{'No collapse of the features was seen: ' if seen else ''}{told}."


def _troubles(run: RunRecord) -> list[str]:
    """What is wrong beside the verdict, whose sentences stand below it."""
    found = [_TROUBLE[each.kind] for each in health_of(run) if each.is_fault]
    return [f"But {' and '.join(found)}: see below."] if found else []


def _so_far(run: RunRecord, text: str) -> str:
    """What is said, and of a run that goes on after which share of it."""
    if run.is_finished is not False or not run.total_steps:
        return text
    begun = text[:1].lower() + text[1:] if text.startswith(("The ", "It ", "Nothing ")) else text
    return f"After {100 * run.step / run.total_steps:.0f} % of its steps, {begun}"


def _command(run: RunRecord) -> str:
    """What measures the run beside its baselines, to be pasted."""
    settings = {key: run.settings.get(key, "none") for key in ("eval_data", "eval_test")}
    data = settings["eval_data"] if settings["eval_data"] != "none" else "LABELLED"
    parts = ["patchmine", "eval", "knn", str(run.path), f"data={data}"]
    if settings["eval_test"] != "none":
        parts.append(f"test={settings['eval_test']}")
    return shlex.join([*parts, "baselines=true"])


# ---- runs that learned labels ----


def _of_task(run: RunRecord) -> Outcome:
    content = run.evaluations.get("test", {})
    known = ((key, finite_number(content.get(key))) for key in _TASK_SCORES)
    score = next(((key, value) for key, value in known if value is not None), None)
    also = [*_validation(run, is_chosen=content.get("chosen_by") is not None), *_troubles(run)]
    if score is None:
        if not also:
            also = _loss(run) or [_NO_NUMBERS]
        return Outcome("untold", _so_far(run, also[0]), [*also[1:], _NO_TEST])
    tested = measured("test", content)
    if score[0] == "top1" and tested is not None:
        return _of_classes(tested, most_common(content), also)
    images = images_of(content)
    on = "" if images is None else f" on {whole(images)} test images"
    told = f"Test {words.score(score[0])} {words.measure(score[1], score[0])}{on}."
    return Outcome("untold", told, ["No interval is known for such a score.", *also])


def _of_classes(tested: Measured, common: float | None, also: Sequence[str]) -> Outcome:
    text, interval = _numbers(tested, "Test top-1"), tested.own.interval
    if common is None or interval is None:
        return Outcome("untold", f"{text}.", also)
    text += f"; always naming the most common class gives {percent(common)}"
    if interval[0] > common:
        return Outcome("good", f"{text}: it learned.", also)
    if interval[1] < common:
        return Outcome("bad", f"{text}: it does worse than that.", also)
    return Outcome("unclear", f"{text}: it cannot be told apart from that.", also)


def _validation(run: RunRecord, *, is_chosen: bool) -> Iterator[str]:
    name = next(scores_in_training(run, _TASK_SCORES), None)
    if name is None:
        return
    protocol, _, quantity = name.partition(".")
    told = does(run.series[name], lambda value: words.measure(value, quantity), is_score=True)
    kept = ", the checkpoint that was tested" if is_chosen and "; best" in told else ""
    yield f"{words.title(protocol)} {words.score(quantity)} {told}{kept}."


# ---- several runs ----


def compare(runs: Sequence[RunRecord]) -> Outcome | None:
    """Which of several runs is better, by the first evaluation that two of them share."""
    found = {run.name: {each.name: each for each in evaluations_of(run)} for run in runs}
    names = list(dict.fromkeys(name for each in found.values() for name in each))
    for name in sorted(names, key=lambda each: (*PROTOCOLS, "test", each).index(each)):
        shared = {run.name: found[run.name][name] for run in runs if name in found[run.name]}
        if len(shared) < 2:
            continue
        places = {measured_on(run.evaluations[name]) for run in runs if run.name in shared}
        return _compared(words.title(name), shared, is_same=len(places) == 1)
    if len(runs) < 2:
        return None
    for name in scores_in_training(runs[0], ("top1",)):
        last = {run.name: run.series[name].last for run in runs if name in run.series}
        shown = {run: Measured(name, Score(top1, None), {}, []) for run, top1 in last.items()}
        places = {run.settings.get("eval_data", "") for run in runs if run.name in last}
        if len(shown) > 1:
            protocol = f"{words.title(name.partition('.')[0])} in training"
            return _compared(protocol, shown, is_same=len(places) == 1)
    text = "No score is there of two of these runs: they cannot be compared yet."
    return Outcome("untold", text, ["Losses of different methods or settings are no measure."])


def _compared(title: str, shared: dict[str, Measured], *, is_same: bool) -> Outcome:
    ranked = sorted(shared.items(), key=lambda pair: -pair[1].own.top1)
    told = ", ".join(f"{run} {percent(each.own.top1)}" for run, each in ranked)
    (best, first), *others = ranked
    text = f"{title}: {told}"
    if not is_same:
        return Outcome("unclear", f"{text}; measured on different images, so not compared.")
    gaps = [difference(run, first.own, each.own) for run, each in others]
    images = first.own.images
    text += "" if images is None else f", on {whole(images)} test images each"
    also = [f"{_gap(best, gap)}." for gap in gaps]
    once = "Each is one run; another seed moves such numbers, too."
    if gaps[0].sign is None:
        text += "; whether by chance cannot be told, as they do not say on how many images."
        return Outcome("unclear", text, [*also, once])
    if gaps[0].sign == 0:
        level = [gap.name for gap in gaps if gap.sign == 0]
        few = _too_few(gaps[0])
        told = f"{text}: {best} cannot be told apart from {' and '.join(level)}."
        return Outcome("unclear", told, [*also, *([few] if few else []), once])
    return Outcome("good", f"{text}: {best} is better.", [*also, once])


def _gap(best: str, gap: Difference) -> str:
    text = f"{best} is {gap.points:.1f} points above {gap.name}"
    return text if gap.interval is None else f"{text} (95 % interval {span(gap.interval)})"

"""Fine-tuning: a backbone learns labels, is tested, and is exported with its classifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchmine.backbones.family import Encoder, family_of
from patchmine.config.schema import FinetuneConfig
from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import plain_batches
from patchmine.data.sampling import spread_indices
from patchmine.data.sources.selected import Selected
from patchmine.data.sources.source import Spec
from patchmine.data.workers import num_workers
from patchmine.errors import Say, UserError, shown_name, silent
from patchmine.evaluate.evaluated import Evaluated, of_run
from patchmine.evaluate.features import FeatureLoop, Reader, Views, clip_views
from patchmine.evaluate.labelled import Part
from patchmine.evaluate.paired import interval_in_words
from patchmine.evaluate.scores import classification_scores, multilabel_scores, regression_scores
from patchmine.evaluate.settings import ReadingSettings
from patchmine.ops.losses import balanced_weights
from patchmine.runs import preparing
from patchmine.runs.folder import RunFolder, build_classifier, write_export
from patchmine.runs.fresh import new_folder, refuse_used_folder
from patchmine.runs.preparing import NO_SOURCES
from patchmine.tasks.classify import SCORE, Classify
from patchmine.train.checkpoint import Checkpoint
from patchmine.train.engine import Engine
from patchmine.training.labels import Labelled, open_labelled_parts
from patchmine.training.making import make_run
from patchmine.training.place import Place
from patchmine.training.supervised import TEST, file_result, fit_to_parts, teach


def finetune(
    config: FinetuneConfig, *, sources: Mapping[str, Spec] = NO_SOURCES, say: Say = silent
) -> RunFolder:
    """Make a run that learns labels, in the new folder ``config.out``.

    Args:
        config: the settings.
        sources: by ``data``, ``val`` and ``test`` what takes their place: any torch Dataset, say.
        say: hears what happens.

    Returns:
        The run: trained, tested (``eval/test.json``) and exported with its classifier.

    Raises:
        UserError: mistakes in settings, labels or folders.
        Interrupted: a SystemExit with the stated code, when it was asked to stop.
    """
    return make_run(config, partial(open_labels, sources=sources), train_classifier, say)


def check(config: FinetuneConfig, *, say: Say = silent) -> None:
    """Look whether settings, labels and images fit together; nothing is written or trained.

    Raises UserError as `finetune` does.
    """
    folder = new_folder(config)
    refuse_used_folder(folder)
    engine = Engine(config.device, config.devices, config.num_nodes, config.precision, say)
    labelled, config = open_labels(config, Place(folder, engine, say))
    item, part = preparing.item_of(config), labelled.train
    one = config.clip.model_copy(update={"repeats": 1})  # a video is looked at once
    view = item.supervised_view(config.model_copy(update={"clip": one}), 1)
    bad = BadFiles(None, config.max_bad_share, item.noun)
    some = spread_indices(len(part), 32, config.seed)
    read = sum(
        len(batch) for batch in plain_batches(part, view, batch_size=8, indices=some, bad=bad)
    )
    counts = ", ".join(
        f"{len(each):,} to {use}"
        for each, use in ((part, "train on"), (labelled.val, "choose by"), (labelled.test, "test"))
        if each is not None
    )
    say(f"Settings and labels fit: {len(labelled.names)} {labelled.what}; {counts}.")
    say(f"{read} of {len(some)} {item.noun}s that were tried can be read.")


def open_labels(
    config: FinetuneConfig, place: Place, sources: Mapping[str, Spec] = NO_SOURCES
) -> tuple[Labelled, FinetuneConfig]:
    """Labelled images, and the settings that had to wait for them, alike in all processes."""
    labelled = open_labelled_parts(config, preparing.item_of(config), place.say, sources)
    return labelled, fit_to_labels(config, place, labelled)


def fit_to_labels(config: FinetuneConfig, place: Place, labelled: Labelled) -> FinetuneConfig:
    """The settings, with those that had to wait for the labels, alike in all processes."""
    if config.classes and list(config.classes) != labelled.names:
        raise UserError(
            f"classes={config.classes} are not those of the data, {labelled.names}: give data of "
            "these classes, or make a new run by `patchmine finetune` without the setting"
        )
    parts = (labelled.train, labelled.val, labelled.test)
    return fit_to_parts(config, place, parts, labelled.names)


def make_classifier(
    config: FinetuneConfig, images: Selected, init: str | None = None, say: Say = silent
) -> Classify:
    """The classifier that the settings and the labels describe, as the seed draws it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        told = _statistics(config, images)
        return build_classifier(config, **told, start_from=init, say=say)


def train_classifier(
    config: FinetuneConfig, place: Place, labelled: Labelled, start: Checkpoint | None
) -> RunFolder:
    """The run with these settings, trained to its end, tested and exported."""
    init = config.init if start is None else None
    task = make_classifier(config, labelled.train, init, place.say)
    judge = Tester(task, config, place)
    item = preparing.item_of(config)
    bad = teach(
        task,
        config,
        labelled.train,
        labelled.val,
        item.supervised_view(config, preparing.smallest_side(task)),
        place,
        judge,
        name=f"fine-tuning to {len(labelled.names)} {labelled.what}",
        start=start,
    )
    views = None
    if config.test_segments * config.test_crops > 1:
        views = clip_views(config, config.test_segments, config.test_crops)
    found = judge(labelled.test, TEST, place.say, views)
    network = task.network().cpu()

    def export(run: RunFolder) -> None:
        write_export(config, network.encoder, run.export_dir, task.head_of())

    chosen_by = None if labelled.val is None else len(labelled.val)
    file_result(config, place, found, _told(config, labelled, views), chosen_by, export)
    place.say(_last_words(config, place, network.encoder, found, bad))
    place.engine.barrier()
    return RunFolder(place.folder)


def _statistics(config: FinetuneConfig, images: Selected) -> dict[str, Tensor | None]:
    """What the labels to be learnt say of themselves: weights of classes, or mean and spread."""
    targets = torch.from_numpy(np.asarray(images.targets))
    if config.loss == "mse":
        spread = targets.std(0, correction=0)
        return {"scale": torch.stack([targets.mean(0), torch.where(spread > 0, spread, 1)])}
    if config.loss == "ce" and config.balance:
        counts = torch.bincount(targets, minlength=len(images.names))
        return {"weights": balanced_weights(counts)}
    return {}


@dataclass(frozen=True)
class Tester:
    """Scores of images that are not trained on, each process reading its share."""

    task: Classify
    config: FinetuneConfig
    place: Place

    def __call__(
        self, part: Selected, title: str, say: Say, views: Views | None = None
    ) -> dict[str, Any]:
        """What `evaluate.scores` says of a part.  Raises UserError where too much is broken.

        ``views`` are those of each item, whose scores are averaged; None: the middle alone.
        """
        config, engine = self.config, self.place.engine
        workers = num_workers(config.workers, engine.device, engine.local_size)
        reading = ReadingSettings(
            batch_size=config.eval_batch, workers=workers, max_bad_share=config.max_bad_share
        )
        model = of_run(config, config.crop_pct, self.task.encoder, "the classifier")
        reader = _Scores(replace(model, encoder=self.task), 1 if views is None else views.count)
        loop = FeatureLoop({"": reader}, reading, engine.device, say, engine)
        found = loop.table(Part(part, np.arange(len(part)), None), title, views)[""]
        scores, targets = found.x[:, 0], torch.from_numpy(part.targets)[found.index]
        rate = {"ce": classification_scores, "bce": multilabel_scores, "mse": regression_scores}
        result: dict[str, Any] = rate[config.loss](scores, targets, part.names)
        return result


class _Scores(Reader):
    """A classifier's scores in the place of features: one column (B, 1, K), of all views."""

    def __init__(self, evaluated: Evaluated, views: int) -> None:
        super().__init__(evaluated)
        self.views = views

    def __call__(self, images: Tensor) -> Tensor:
        task: Any = self.evaluated.encoder
        scores: Tensor = task.scores(images)
        if self.views > 1:
            scores = task.averaged(scores.view(-1, self.views, scores.shape[1]))
        return scores[:, None]


def _told(config: FinetuneConfig, labelled: Labelled, views: Views | None) -> dict[str, Any]:
    """What a result is of."""
    return {
        "how": labelled.how,
        "train": len(labelled.train),
        "test": len(labelled.test),
        "classes": len(labelled.names),
        # Of several views nothing is cut from the shorter side.
        **({"crop_pct": config.crop_pct} if views is None else views.told),
    }


def _last_words(
    config: FinetuneConfig, place: Place, encoder: Encoder, found: Mapping[str, Any], bad: BadFiles
) -> str:
    folder, metric = place.folder, SCORE[config.loss]
    unit = "" if metric == "r2" else f" %{interval_in_words(found)}"
    broken = f" {len(bad)} broken {bad.item}s were left out, see {bad.path}." if len(bad) else ""
    opened = f'patchmine.Run("{folder}").classifier()'
    if family_of(encoder).timm_opens(encoder):
        opened = f'timm.create_model("local-dir:{folder}/export", pretrained=True)'
    return (
        f"Done: {folder}, test {metric} {found[metric]:.2f}{unit} (eval/{TEST}.json).{broken} "
        f"Next: `patchmine predict {shown_name(folder)} images/ out=predictions.csv`, or {opened}."
    )

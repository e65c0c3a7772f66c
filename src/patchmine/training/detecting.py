"""Detection: a backbone and its heads learn objects, are tested, and are exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from patchmine.config.schema import DetectConfig
from patchmine.data.badfiles import BadFiles
from patchmine.data.sources.coco import CocoSource
from patchmine.data.views.objects import ObjectView, PlainObjectView
from patchmine.errors import Say, UserError, shown_name, silent
from patchmine.evaluate.detection import KeptObjects, detection_scores, kept
from patchmine.evaluate.found import in_image
from patchmine.evaluate.progress import progress
from patchmine.report.object_samples import object_samples
from patchmine.runs import preparing
from patchmine.runs.folder import RunFolder, build_detector, write_export
from patchmine.runs.fresh import new_folder, refuse_used_folder
from patchmine.tasks.detect import Detect
from patchmine.train.checkpoint import Checkpoint
from patchmine.training.cocodata import Annotated, faults_of_data, open_annotated
from patchmine.training.making import make_run
from patchmine.training.place import Place
from patchmine.training.supervised import (
    TEST,
    file_result,
    fit_to_parts,
    judged_batches,
    refuse_faults,
    teach,
)
from patchmine.types import Batch


def detect(config: DetectConfig, *, say: Say = silent) -> RunFolder:
    """Make a run that learns to find objects, in the new folder ``config.out``.

    Args:
        config: the settings.
        say: hears what happens.

    Returns:
        The run: trained, tested (``eval/test.json``) and its encoder exported.

    Raises:
        UserError: mistakes in settings, annotations or folders.
        Interrupted: a SystemExit with the stated code, when it was asked to stop.
    """
    return make_run(config, open_objects, train_detector, say)


def check(config: DetectConfig, *, say: Say = silent) -> None:
    """Look whether settings, images and annotations fit together; nothing is written or trained.

    Raises UserError with everything that is wrong.
    """
    refuse_used_folder(new_folder(config))
    refuse_faults(list(faults_of_data(config)))
    found = open_annotated(config, say)
    parts = found.parts.items()
    counts = (
        f"{len(part):,} with {part.counts().sum():,} objects for {name}" for name, part in parts
    )
    say(f"Settings and annotations fit: {len(found.names)} classes; images: {', '.join(counts)}.")


def open_objects(config: DetectConfig, place: Place) -> tuple[Annotated, DetectConfig]:
    """Annotated images, and the settings that had to wait for them, alike in all processes."""
    annotated = open_annotated(config, place.say)
    config = _with_data(config, annotated)
    return annotated, fit_to_parts(config, place, annotated.parts.values(), annotated.names)


def _with_data(config: DetectConfig, annotated: Annotated) -> DetectConfig:
    """The settings with what the COCO files say of classes and sizes, where they say nothing."""
    ids = config.category_ids or annotated.train.category_ids.tolist()
    if len(set(ids)) < len(ids) or len(ids) != len(annotated.names):
        raise UserError(
            f"category_ids={ids}: give a different one for each of {annotated.names}, or leave it "
            "out"
        )
    size = config.usual_size or annotated.train.median_size()
    return config.model_copy(update={"category_ids": ids, "usual_size": size})


def make_detector(config: DetectConfig, init: str | None = None, say: Say = silent) -> Detect:
    """The network that the settings describe, as the seed draws it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_detector(config, start_from=init, say=say)


def train_detector(
    config: DetectConfig, place: Place, annotated: Annotated, start: Checkpoint | None
) -> RunFolder:
    """The run with these settings, trained to its end, tested and exported."""
    task = make_detector(config, config.init if start is None else None, place.say)
    judge = ObjectJudge(task, config, place)
    shown = annotated.test if annotated.val is None else annotated.val
    samples = object_samples(task, config, shown, place.folder, place.engine)
    bad = teach(
        task,
        config,
        annotated.train,
        annotated.val,
        ObjectView(config, preparing.smallest_side(task)),
        place,
        judge,
        name=f"detecting {len(annotated.names)} classes",
        start=start,
        draw=samples.draw,
    )
    found = judge(annotated.test, TEST, place.say)
    counts = {"how": annotated.how, "train": len(annotated.train), "test": len(annotated.test)}

    def export(run: RunFolder) -> None:
        write_export(config, task.encoders()["student"].cpu(), run.export_dir)

    chosen_by = None if annotated.val is None else len(annotated.val)
    file_result(config, place, found, counts, chosen_by, export)
    place.say(_last_words(place, found, bad))
    place.engine.barrier()
    return RunFolder(place.folder)


@dataclass(frozen=True)
class ObjectJudge:
    """Scores of whole images, each process looking at its share."""

    task: Detect
    config: DetectConfig
    place: Place

    def __call__(self, part: CocoSource, title: str, say: Say) -> dict[str, Any]:
        """What `detection_scores` says of a part.  Raises UserError where too much is broken."""
        config, engine = self.config, self.place.engine
        view = PlainObjectView(config, config.interpolation, preparing.smallest_side(self.task))
        at_once = config.eval_batch
        count, batches = judged_batches(part, view, config, engine, at_once, targets=False)
        self.task.eval()
        found: list[KeptObjects] = []
        true: list[KeptObjects] = []
        with progress(title, count, say) as tick:
            for batch in map(preparing.normaliser(config, engine), batches):
                found += self._found(part, batch)
                true += [kept(part.target(index)) for index in batch.index.tolist()]
                tick(len(batch))
        every = engine.gather((found, true))
        return detection_scores(
            [each for one, _ in every for each in one],
            [each for _, one in every for each in one],
            self.task.names,
            config.masks,
        )

    def _found(self, part: CocoSource, batch: Batch) -> list[KeptObjects]:
        """What the network finds in a batch, in pixels of the images."""
        with self.place.engine.autocast():
            every = self.task.predict(batch)
        images = map(part.image, batch.index.tolist())
        rows = zip(every, batch.views[0], batch.box, images, strict=True)
        return [
            in_image(found, view, box, (image.height, image.width))
            for found, view, box, image in rows
        ]


def _last_words(place: Place, found: Mapping[str, Any], bad: BadFiles) -> str:
    broken = f" {len(bad)} broken {bad.item}s were left out, see {bad.path}." if len(bad) else ""
    masks = f", mask_map {found['mask_map']:.2f} %" if "mask_map" in found else ""
    return (
        f"Done: {shown_name(place.folder)}, test map {found['map']:.2f} %{masks} "
        f"(eval/{TEST}.json).{broken} "
        f"Next: `patchmine predict {shown_name(place.folder)} images/ out=predictions/`."
    )

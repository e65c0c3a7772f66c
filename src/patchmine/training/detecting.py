"""Detection: a backbone and its heads learn objects, are tested, and are exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from patchmine.config.resolve import resolve_size
from patchmine.config.schema import DetectConfig
from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import plain_batches
from patchmine.data.sources.coco import CocoSource
from patchmine.data.views.objects import ObjectView, PlainObjectView
from patchmine.data.workers import num_workers
from patchmine.errors import Say, UserError, shown_name, silent
from patchmine.evaluate.detection import KeptObjects, detection_scores, kept
from patchmine.evaluate.found import in_image
from patchmine.evaluate.progress import progress
from patchmine.runs import preparing
from patchmine.runs.folder import RunFolder, build_detector, write_export
from patchmine.runs.fresh import new_folder, refuse_used_folder
from patchmine.tasks.detect import Detect
from patchmine.train.checkpoint import Checkpoint
from patchmine.training.cocodata import Annotated, faults_of_data, open_annotated
from patchmine.training.place import Place, agree, open_place
from patchmine.training.supervised import TEST, file_result, teach
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
    folder = new_folder(config)
    with open_place(folder, config, say) as place:
        refuse_used_folder(folder)
        annotated, config = open_objects(config, place)
        return train_detector(config, place, annotated, None)


def check(config: DetectConfig, *, say: Say = silent) -> None:
    """Look whether settings, images and annotations fit together; nothing is written or trained.

    Raises UserError with everything that is wrong.
    """
    refuse_used_folder(new_folder(config))
    if faults := list(faults_of_data(config)):
        plural = "s" if len(faults) > 1 else ""
        raise UserError("\n".join([f"{len(faults):,} fault{plural}:", *faults]))
    found = open_annotated(config, say)
    parts = found.parts.items()
    counts = (
        f"{len(part):,} with {part.counts().sum():,} objects for {name}" for name, part in parts
    )
    say(f"Settings and annotations fit: {len(found.names)} classes; images: {', '.join(counts)}.")


def open_objects(config: DetectConfig, place: Place) -> tuple[Annotated, DetectConfig]:
    """Annotated images, and the settings that had to wait for them, alike in all processes."""
    annotated = open_annotated(config, place.say)
    images = annotated.train
    config = config.model_copy(update={"classes": annotated.names})
    config = resolve_size(config, len(images), place.say)
    config = preparing.with_statistics(config, images, place.say)
    config = preparing.fit_to_length(config, len(images), place.say)
    parts = annotated.parts.values()
    found = (f"{len(part):,} of {part.fingerprint} {part.target_digest}" for part in parts)
    agree(config, place, ", ".join(found))
    return annotated, config


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
        mine = np.array_split(np.arange(len(part)), engine.world_size)[engine.rank]
        loaded = plain_batches(
            part,
            PlainObjectView(config, config.interpolation, preparing.smallest_side(self.task)),
            batch_size=config.eval_batch,
            indices=mine,
            workers=num_workers(config.workers, engine.device, engine.local_size),
            read_timeout=config.read_timeout,
            bad=BadFiles(None, config.max_bad_share),
        )
        self.task.eval()
        found: list[KeptObjects] = []
        true: list[KeptObjects] = []
        with progress(title, len(mine), say) as tick:
            for batch in map(preparing.normaliser(config, engine), loaded):
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
        f"(eval/{TEST}.json).{broken}"
    )

"""Segmentation: a backbone and a head learn label maps, are tested, and are exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from patchmine.config.schema import SegmentConfig
from patchmine.data.badfiles import BadFiles
from patchmine.data.sources.pairs import MapSource
from patchmine.data.views.dense import SegmentView, WholeView
from patchmine.errors import Say, shown_name, silent
from patchmine.evaluate.progress import progress
from patchmine.evaluate.segmentation import Boundaries, Confusion, segmentation_scores
from patchmine.evaluate.sliding import ClassMaps
from patchmine.ops.losses import balanced_weights
from patchmine.report.map_samples import map_samples
from patchmine.runs import preparing
from patchmine.runs.folder import RunFolder, build_segmenter, write_export
from patchmine.runs.fresh import new_folder, refuse_used_folder
from patchmine.tasks.segment import Segment
from patchmine.train.checkpoint import Checkpoint
from patchmine.train.engine import Engine
from patchmine.training.labelmaps import Mapped, open_label_maps
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


def segment(config: SegmentConfig, *, say: Say = silent) -> RunFolder:
    """Make a run that learns label maps, in the new folder ``config.out``.

    Args:
        config: the settings.
        say: hears what happens.

    Returns:
        The run: trained, tested (``eval/test.json``) and its encoder exported.

    Raises:
        UserError: mistakes in settings, label maps or folders.
        Interrupted: a SystemExit with the stated code, when it was asked to stop.
    """
    return make_run(config, open_maps, train_segmenter, say)


def check(config: SegmentConfig, *, say: Say = silent) -> None:
    """Look whether settings, images and label maps fit together; nothing is written or trained.

    Raises UserError with everything that is wrong.
    """
    folder = new_folder(config)
    refuse_used_folder(folder)
    engine = Engine(config.device, config.devices, config.num_nodes, config.precision, say)
    faults: list[str] = []
    mapped = open_label_maps(config, engine, say, faults)
    refuse_faults(faults)
    counts = ", ".join(f"{len(part):,} for {name}" for name, part in mapped.parts.items())
    say(f"Settings and label maps fit: {len(mapped.names)} classes; {counts}.")


def open_maps(config: SegmentConfig, place: Place) -> tuple[Mapped, SegmentConfig]:
    """Label maps, and the settings that had to wait for them, alike in all processes."""
    mapped = open_label_maps(config, place.engine, place.say)
    config = fit_to_parts(config, place, mapped.parts.values(), mapped.names)
    place.say(_views_of(config, mapped.size))
    return mapped, config


def _views_of(config: SegmentConfig, size: tuple[int, int]) -> str:
    """What training and tests see of images of ``size``, for people."""
    height, width = config.image_size
    crop, stride = f"{width}x{height}", config.window_stride
    low, high = config.scale
    whole = f"{size[1]}x{size[0]} pixels (the median)"
    if config.short_side is not None:
        whole += f", brought to a shorter side of {config.short_side}"
    return (
        f"Training sees crops of {crop} from images of {whole}, enlarged {low:g} to "
        f"{high:g} times; tests see them whole, in windows of {crop} every {stride} pixels."
    )


def make_segmenter(
    config: SegmentConfig, mapped: Mapped, init: str | None = None, say: Say = silent
) -> Segment:
    """The network that the settings and the label maps describe, as the seed draws it."""
    weights = balanced_weights(mapped.pixels) if config.balance else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_segmenter(config, weights=weights, start_from=init, say=say)


def train_segmenter(
    config: SegmentConfig, place: Place, mapped: Mapped, start: Checkpoint | None
) -> RunFolder:
    """The run with these settings, trained to its end, tested and exported."""
    task = make_segmenter(config, mapped, config.init if start is None else None, place.say)
    judge = MapJudge(task, config, place)
    shown = mapped.test if mapped.val is None else mapped.val
    samples = map_samples(task, config, shown, place.folder, place.engine)
    bad = teach(
        task,
        config,
        mapped.train,
        mapped.val,
        SegmentView(config, config.ignore_index, preparing.smallest_side(task)),
        place,
        judge,
        name=f"segmenting {len(mapped.names)} classes",
        start=start,
        draw=samples.draw,
    )
    found = judge(mapped.test, TEST, place.say)
    counts = {"how": mapped.how, "train": len(mapped.train), "test": len(mapped.test)}

    def export(run: RunFolder) -> None:
        write_export(config, task.network().encoder.cpu(), run.export_dir)

    chosen_by = None if mapped.val is None else len(mapped.val)
    file_result(config, place, found, counts, chosen_by, export)
    place.say(_last_words(place, found, bad))
    place.engine.barrier()
    return RunFolder(place.folder)


@dataclass(frozen=True)
class MapJudge:
    """Scores of whole images, each process reading its share."""

    task: Segment
    config: SegmentConfig
    place: Place

    def __call__(self, part: MapSource, title: str, say: Say) -> dict[str, Any]:
        """What `segmentation_scores` says of a part.  Raises UserError where too much is broken."""
        config, engine = self.config, self.place.engine
        view = WholeView(config, preparing.smallest_side(self.task))
        count, batches = judged_batches(part, view, config, engine, 1, targets=True)
        names = self.task.names
        maps = ClassMaps(self.task.eval().scores, config, engine.device, engine.autocast)
        counts = Confusion(len(names), engine.device), Boundaries(len(names), engine.device)
        with progress(title, count, say) as tick:
            for batch in batches:
                labels = batch.target.to(engine.device)
                found = maps(batch.views[0][0], (labels.shape[-2], labels.shape[-1]))
                for each in counts:
                    each.add(found[None], labels, config.ignore_index)
                tick(1)
        for each in counts:  # over all processes
            each.counts = sum(engine.gather(each.counts.cpu()), torch.zeros_like(each.counts.cpu()))
        return segmentation_scores(counts[0], names, counts[1])


def _last_words(place: Place, found: Mapping[str, Any], bad: BadFiles) -> str:
    folder = place.folder
    broken = f" {len(bad)} broken {bad.item}s were left out, see {bad.path}." if len(bad) else ""
    return (
        f"Done: {folder}, test miou {found['miou']:.2f} % (eval/{TEST}.json).{broken} "
        f"Next: `patchmine predict {shown_name(folder)} images/ out=predictions/`."
    )

"""Pictures made while a run learns label maps: images, their truth and what is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from patchmine.config.schema import SegmentConfig
from patchmine.data.sources.contract import Source
from patchmine.data.views.dense import WholeView
from patchmine.data.views.display import coloured
from patchmine.evaluate.sliding import ClassMaps
from patchmine.report.overlays import Pixels, class_colours
from patchmine.report.panels import hatched
from patchmine.report.samples import SamplePictures, contact_sheet
from patchmine.runs.preparing import smallest_side
from patchmine.tasks.segment import Segment
from patchmine.train.engine import Engine
from patchmine.types import Batch

_LONGER_SIDE = 320  # pixels of a cell


def map_samples(
    task: Segment, config: SegmentConfig, part: Source, folder: Path, engine: Engine
) -> SamplePictures:
    """Pictures of images of ``part`` while ``task`` learns in the run's folder."""
    names = task.names
    colours = class_colours(names, config.palette)

    def sheet(batches: Sequence[Batch]) -> Image.Image:
        maps, rows = ClassMaps(task.eval().scores, config, engine.device, engine.autocast), []
        for each in batches:
            (labels,) = each.target
            found = maps(each.views[0][0], (labels.shape[0], labels.shape[1])).cpu()
            picture = coloured(each.views[0][0]).permute(1, 2, 0).numpy()
            rows.append((picture, labels, found))
        return draw_maps(rows, names, colours, config.ignore_index)

    return SamplePictures(folder, part, WholeView(config, smallest_side(task)), config.seed, sheet)


def draw_maps(
    rows: Sequence[tuple[Pixels, Tensor, Tensor]],
    names: Sequence[str],
    colours: Pixels,
    ignore_index: int,
) -> Image.Image:
    """Rows of image, truth and prediction, what the truth ignores hatched; the classes below.

    Args:
        rows: (picture (h, w, 3), labels (H, W), predicted classes (H, W)) of each image.
        names: of the K classes.
        colours: (K, 3).
        ignore_index: in ``labels``, of pixels that belong to no class.
    """
    titles = "image", "truth (hatched: ignored)", "prediction"
    cells = [_cells(*row, colours, ignore_index) for row in rows]
    return contact_sheet(titles, cells, names, colours)


def _cells(
    picture: Pixels, labels: Tensor, found: Tensor, colours: Pixels, ignore_index: int
) -> list[Image.Image]:
    """The three pictures of a row, of one size."""
    height, width = labels.shape
    factor = _LONGER_SIDE / max(height, width)
    factor = int(factor) if factor >= 1 else factor
    size = max(1, round(height * factor)), max(1, round(width * factor))
    missing = (labels == ignore_index).numpy()
    truth = colours[np.where(missing, 0, labels.numpy())]
    nowhere = np.zeros_like(missing)
    maps = [(truth, missing), (colours[found.numpy()], nowhere)]
    scaled = Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC)
    return [scaled, *(Image.fromarray(hatched(*each, size)) for each in maps)]

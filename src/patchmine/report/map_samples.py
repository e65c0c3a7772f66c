"""Pictures made while a run learns label maps: images, their truth and what is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from patchmine.config.schema import SegmentConfig
from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import plain_batches
from patchmine.data.sampling import spread_indices
from patchmine.data.sources.contract import Source
from patchmine.data.views.dense import WholeView
from patchmine.disk import replacing
from patchmine.errors import Say, UserError, foreign_parser, shown_name
from patchmine.evaluate.sliding import ClassMaps
from patchmine.report.letters import INK, PAPER, Letters
from patchmine.report.monitor import told_failure
from patchmine.report.overlays import Pixels, class_colours
from patchmine.report.panels import hatched
from patchmine.report.thumbnails import coloured
from patchmine.runs.preparing import normaliser, smallest_side
from patchmine.tasks.segment import Segment
from patchmine.train.engine import Engine
from patchmine.types import Batch, Progress

SAMPLE_IMAGES = 4
_LONGER_SIDE = 320  # pixels of a cell
_GAP, _MARGIN, _SWATCH = 10, 16, 12
_TITLE = Letters(14, INK)


class MapSamples:
    """Draws always the same images; whatever fails is said once, and training goes on."""

    def __init__(
        self, task: Segment, config: SegmentConfig, part: Source, folder: Path, engine: Engine
    ) -> None:
        self.task, self.config, self.part = task, config, part
        self.folder, self.engine = folder, engine
        self._batches: list[Batch] | None = None
        self._failed = False

    def draw(self, progress: Progress, batch: Batch, say: Say) -> None:
        """samples/step-N.png, by the first process."""
        try:
            with foreign_parser(UserError, OSError):
                self._draw(progress)
        except (UserError, OSError) as error:
            if not self._failed:
                say(told_failure("the picture", progress, error))
            self._failed = True

    def _draw(self, progress: Progress) -> None:
        config, engine, names = self.config, self.engine, self.task.names
        if self._batches is None:
            view = WholeView(config, smallest_side(self.task))
            chosen = spread_indices(len(self.part), SAMPLE_IMAGES, config.seed)
            bad = BadFiles(None, 1.0)
            self._batches = list(
                plain_batches(self.part, view, batch_size=1, indices=chosen, bad=bad, targets=True)
            )
        maps = ClassMaps(self.task.eval().scores, config, len(names), engine.autocast)
        prepared = normaliser(config, engine)
        colours, rows = class_colours(names, config.palette), []
        for each in self._batches:
            (labels,) = each.target
            found = maps(prepared(each).views[0][0], (labels.shape[0], labels.shape[1])).cpu()
            picture = coloured(each.views[0][0]).permute(1, 2, 0).numpy()
            rows.append((picture, labels, found))
        if not rows:  # all of the chosen ones are broken
            return
        sheet = draw_maps(rows, names, colours, config.ignore_index)
        target = self.folder / "samples" / f"step-{progress.step:08d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as new:
            sheet.save(new)


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
    cells = [_cells(*row, colours, ignore_index) for row in rows]
    width = max(cell.width for row in cells for cell in row)
    heights = [row[0].height for row in cells]
    tops = [_MARGIN + _TITLE.line + 4]
    for height in heights:
        tops.append(tops[-1] + height + _GAP)
    right = _MARGIN + 3 * width + 2 * _GAP
    legend, bottom = _legend(names, right, tops[-1])
    sheet = Image.new("RGB", (right + _MARGIN, bottom + _MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("image", "truth (hatched: ignored)", "prediction")):
        x = _MARGIN + column * (width + _GAP)
        _TITLE.write(draw, (x, _MARGIN), _TITLE.wrap(title, width)[:1])
        for top, row in zip(tops, cells, strict=False):
            sheet.paste(row[column], (x, top))
    for (x, y), name, colour in zip(legend, names, colours.tolist(), strict=True):
        draw.rectangle((x, y + 3, x + _SWATCH, y + 3 + _SWATCH), fill=tuple(colour))
        _TITLE.write(draw, (x + _SWATCH + 5, y), [shown_name(name)])
    return sheet


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


def _legend(names: Sequence[str], right: int, top: int) -> tuple[list[tuple[int, int]], int]:
    """Where each class is written, in lines up to ``right``; and where the last line ends."""
    x, y, places = _MARGIN, top, []
    for name in names:
        wide = _SWATCH + 5 + int(_TITLE.width(shown_name(name))) + 2 * _GAP
        if x > _MARGIN and x + wide > right:
            x, y = _MARGIN, y + _TITLE.line + 4
        places.append((x, y))
        x += wide
    return places, y + _TITLE.line

"""Pictures made while a run with labels learns, always of the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import plain_batches
from patchmine.data.sampling import spread_indices
from patchmine.data.sources.contract import Source
from patchmine.data.views.images import View
from patchmine.errors import Say, UserError, foreign_parser, shown_name
from patchmine.report.letters import INK, PAPER, Letters
from patchmine.report.monitor import told_failure
from patchmine.report.overlays import Pixels
from patchmine.system.disk import replacing
from patchmine.types import Batch, Progress

SAMPLE_IMAGES = 4
_GAP, _MARGIN, _SWATCH = 10, 16, 12
_TITLE = Letters(14, INK)


class SamplePictures:
    """samples/step-N.png of a run; whatever fails is said once, and training goes on.

    Args:
        folder: the run's.
        part: the images are of.
        view: how they are seen, with their targets.
        seed: chooses them.
        sheet: draws them, one in a batch; without random numbers, which a resumed run would lack.
    """

    def __init__(
        self,
        folder: Path,
        part: Source,
        view: View,
        seed: int,
        sheet: Callable[[Sequence[Batch]], Image.Image],
    ) -> None:
        self.folder, self.part, self.view, self.seed = folder, part, view, seed
        self.sheet = sheet
        self._batches: list[Batch] | None = None
        self._failed = False

    def draw(self, progress: Progress, say: Say) -> None:
        """The picture of now, by the first process."""
        try:
            with foreign_parser(UserError, OSError):
                self._draw(progress)
        except (UserError, OSError) as error:
            if not self._failed:
                say(told_failure("the picture", progress, error))
            self._failed = True

    def _draw(self, progress: Progress) -> None:
        if self._batches is None:
            chosen = spread_indices(len(self.part), SAMPLE_IMAGES, self.seed)
            bad = BadFiles(None, 1.0)
            self._batches = list(
                plain_batches(
                    self.part, self.view, batch_size=1, indices=chosen, bad=bad, targets=True
                )
            )
        if not self._batches:  # all of the chosen ones are broken
            return
        sheet = self.sheet(self._batches)
        target = self.folder / "samples" / f"step-{progress.step:08d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as new:
            sheet.save(new)


def contact_sheet(
    titles: Sequence[str],
    rows: Sequence[Sequence[Image.Image]],
    names: Sequence[str],
    colours: Pixels,
) -> Image.Image:
    """Rows of pictures under their titles, and the colours of classes below.

    Args:
        titles: of the columns.
        rows: a picture for each column, of one size in a row.
        names: of the K classes.
        colours: (K, 3).
    """
    width = max(cell.width for row in rows for cell in row)
    tops = [_MARGIN + _TITLE.line + 4]
    for row in rows:
        tops.append(tops[-1] + row[0].height + _GAP)
    right = _MARGIN + len(titles) * (width + _GAP) - _GAP
    legend, bottom = _legend(names, right, tops[-1])
    sheet = Image.new("RGB", (right + _MARGIN, bottom + _MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        x = _MARGIN + column * (width + _GAP)
        _TITLE.write(draw, (x, _MARGIN), _TITLE.wrap(title, width)[:1])
        for top, row in zip(tops, rows, strict=False):
            sheet.paste(row[column], (x, top))
    for (x, y), name, colour in zip(legend, names, colours.tolist(), strict=True):
        draw.rectangle((x, y + 3, x + _SWATCH, y + 3 + _SWATCH), fill=tuple(colour))
        _TITLE.write(draw, (x + _SWATCH + 5, y), [shown_name(name)])
    return sheet


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

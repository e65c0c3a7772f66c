"""Contact sheets: one row per image, one column per panel, everything named and every scale written beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from patchmine.report.words import number
from patchmine.types import Panel

Pixels = npt.NDArray[np.uint8]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

LEAST_SIDE, MOST_SIDE = 150, 512
"""Pixels of a cell's shorter and longer side.  Small images are enlarged by a whole factor: each pixel is a square."""

_GAP, _MARGIN, _LABEL_WIDTH, _BAR = 14, 18, 150, 9
_INK, _SOFT, _PAPER = (27, 29, 32), (99, 103, 110), (255, 255, 255)
_TITLE_SIZE, _NOTE_SIZE = 14, 12
_HATCH_LIGHT, _HATCH_DARK, _HATCH_PERIOD = 236, 176, 8

# Dark blue over green to pale yellow: brightness rises all the way, which any colour vision and a grey printer keep.
_RAMP = np.array(
    [
        (24, 15, 62),
        (46, 51, 112),
        (45, 92, 130),
        (38, 129, 133),
        (60, 166, 118),
        (128, 198, 84),
        (205, 221, 77),
        (253, 247, 178),
    ]
)


@dataclass(frozen=True)
class _Layout:
    """Where everything goes, in pixels: cells of ``height`` and ``width`` from (``left``, ``top``), row by row."""

    height: int
    width: int
    left: int
    top: int
    row_height: int
    titles: Sequence[Sequence[str]]
    labels: Sequence[Sequence[str]]
    legend: Sequence[str]
    title_font: Font
    note_font: Font

    def cell(self, row: int, column: int) -> tuple[int, int]:
        """The upper left corner of a cell, x first."""
        return self.left + column * (self.width + _GAP), self.top + row * self.row_height

    def sheet_size(self, rows: int) -> tuple[int, int]:
        """Width and height of the whole."""
        x, y = self.cell(rows, len(self.titles))
        return x - _GAP + _MARGIN, y + len(self.legend) * _line_height(_NOTE_SIZE)


def draw_panels(
    panels: Sequence[Panel],
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    *,
    labels: Sequence[str] = (),
) -> Image.Image:
    """A labelled contact sheet of the panels of one batch.

    ``mean``, ``std`` (C,): what images were normalised with.  ``labels``: a name for each image.  Of images with more
    than three channels the first three are shown, of two the first.  What is NaN is missing and drawn hatched.  Each
    heat map has its own scale from its smallest to its largest value, both written under it.
    """
    layout = _lay_out(panels, labels)
    rows = len(panels[0].data)
    sheet = Image.new("RGB", layout.sheet_size(rows), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, lines in enumerate(layout.labels[:rows]):
        _write(draw, (_MARGIN, layout.cell(row, 0)[1]), lines, layout.note_font, _NOTE_SIZE, _SOFT)
    for column, panel in enumerate(panels):
        x, y = layout.cell(0, column)
        lines = layout.titles[column]
        above = y - 4 - len(lines) * _line_height(_TITLE_SIZE)
        _write(draw, (x, above), lines, layout.title_font, _TITLE_SIZE, _INK)
        for row in range(rows):
            at, size = layout.cell(row, column), (layout.height, layout.width)
            if panel.kind == "heat":
                _place_heat(sheet, draw, panel.data[row], at, size, layout.note_font)
            else:
                scale, offset = (std, mean) if panel.kind == "image" else ([1.0] * 3, [0.0] * 3)
                sheet.paste(Image.fromarray(image_pixels(panel.data[row], offset, scale, size)), at)
    x, y = layout.cell(rows, 0)
    _write(draw, (x, y - 4), layout.legend, layout.note_font, _NOTE_SIZE, _SOFT)
    return sheet


def _lay_out(panels: Sequence[Panel], labels: Sequence[str]) -> _Layout:
    height, width = _cell_size(panels)
    title_font, note_font = ImageFont.load_default(_TITLE_SIZE), ImageFont.load_default(_NOTE_SIZE)
    titles = [_wrap(panel.title, width, _measure(title_font)) for panel in panels]
    label_width = min(_LABEL_WIDTH, math.ceil(max(map(_measure(note_font), labels), default=0)))
    scales = _BAR + _line_height(_NOTE_SIZE) + 4 if any(panel.kind == "heat" for panel in panels) else 0
    return _Layout(
        height=height,
        width=width,
        left=_MARGIN + (label_width + _GAP if labels else 0),
        top=_MARGIN + max(map(len, titles)) * _line_height(_TITLE_SIZE) + 4,
        row_height=height + scales + _GAP,
        titles=titles,
        labels=[_wrap(label, label_width, _measure(note_font)) for label in labels],
        legend=_wrap(_legend(panels), len(panels) * (width + _GAP) - _GAP, _measure(note_font)),
        title_font=title_font,
        note_font=note_font,
    )


def _legend(panels: Sequence[Panel]) -> str:
    """What the drawing means, as far as it needs saying."""
    missing = "Hatched: nothing there. " if any(bool(panel.data.isnan().any()) for panel in panels) else ""
    maps = "Maps: dark is low, light is high, each on its own scale." if any(p.kind == "heat" for p in panels) else ""
    return missing + maps


def image_pixels(
    image: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, size: tuple[int, int]
) -> Pixels:
    """A normalised image (C, H, W) as RGB pixels (*size, 3), NaN hatched."""
    channels = len(image)
    scale = torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1)
    offset = torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 1, 1)
    colours = image.detach().float().cpu() * scale + offset  # (C, H, W) in [0, 1]
    shown = (colours if channels == 3 else colours[:3] if channels > 3 else colours[:1].expand(3, -1, -1)).permute(
        1, 2, 0
    )
    missing = shown.isnan().any(dim=2).numpy()
    filled = (shown.nan_to_num(0.0).clamp(0, 1) * 255).round().byte().numpy()
    return _hatched(_resized(filled, size), _resized(missing, size))


def heat_pixels(heat: Tensor, size: tuple[int, int]) -> tuple[Pixels, float, float]:
    """A map (rows, columns) as RGB pixels (*size, 3), NaN hatched, with its smallest and largest value (NaN: none)."""
    values = heat.detach().double().cpu().numpy()
    finite = np.isfinite(values)
    low, high = (float(values[finite].min()), float(values[finite].max())) if finite.any() else (math.nan, math.nan)
    spread = high - low
    places = np.where(finite, (values - low) / spread if spread > 0 else 0.5, 0.0)
    return _hatched(_resized(colour(places), size), _resized(~finite, size)), low, high


def colour(places: npt.NDArray[np.floating[Any]]) -> Pixels:
    """Colours (..., 3) of places in [0, 1] on the ramp from dark (0) to light (1)."""
    along = np.linspace(0, 1, len(_RAMP))
    return np.stack([np.interp(places, along, _RAMP[:, i]) for i in range(3)], axis=-1).round().astype(np.uint8)


def _cell_size(panels: Sequence[Panel]) -> tuple[int, int]:
    """Height and width in which every panel is drawn: the images' own, enlarged or shrunk."""
    shape = next((panel.data.shape[-2:] for panel in panels if panel.kind == "image"), panels[0].data.shape[-2:])
    height, width = int(shape[0]), int(shape[1])
    factor = max(1, math.ceil(LEAST_SIDE / min(height, width)))
    shrink = min(1.0, MOST_SIDE / (factor * max(height, width)))
    if shrink < 1.0 and factor > 1:  # a long strip: as much as fits
        factor, shrink = max(1, MOST_SIDE // max(height, width)), 1.0
    return round(height * factor * shrink), round(width * factor * shrink)


def _resized(values: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """Nearest neighbour along the first two axes."""
    rows = np.arange(size[0]) * values.shape[0] // size[0]
    columns = np.arange(size[1]) * values.shape[1] // size[1]
    return values[rows][:, columns]


def _hatched(pixels: Pixels, missing: npt.NDArray[np.bool_]) -> Pixels:
    """The pixels with diagonal lines where something is missing."""
    down, across = np.indices(missing.shape)
    stripes = np.where((down + across) % _HATCH_PERIOD < 2, _HATCH_DARK, _HATCH_LIGHT).astype(np.uint8)
    return np.where(missing[:, :, None], stripes[:, :, None], pixels)


def _place_heat(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, heat: Tensor, at: tuple[int, int], size: tuple[int, int], font: Font
) -> None:
    """A heat map with its colour bar and the two ends of it below."""
    (x, y), (height, width) = at, size
    pixels, low, high = heat_pixels(heat, size)
    sheet.paste(Image.fromarray(pixels), at)
    bar = colour(np.broadcast_to(np.linspace(0, 1, width), (_BAR - 3, width)))
    sheet.paste(Image.fromarray(bar), (x, y + height + 3))
    below = y + height + _BAR + 3
    draw.text((x, below), number(low), fill=_SOFT, font=font)
    draw.text((x + width, below), number(high), fill=_SOFT, font=font, anchor="ra")


def _line_height(size: int) -> int:
    return round(size * 1.25)


def _measure(font: Font) -> Callable[[str], float]:
    return lambda text: float(font.getlength(text))


def _write(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    lines: Sequence[str],
    font: Font,
    size: int,
    ink: tuple[int, int, int],
) -> None:
    for i, line in enumerate(lines):
        draw.text((at[0], at[1] + i * _line_height(size)), line, fill=ink, font=font)


def _wrap(text: str, width: float, measure: Callable[[str], float]) -> list[str]:
    """The whole text in lines of at most ``width``; a word that is too long is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if measure(longer) <= width:
            lines[-1] = longer
            continue
        pieces = _cut(word, width, measure)
        lines += pieces if lines[-1] else []
        if lines == [""]:
            lines = pieces
    return lines


def _cut(word: str, width: float, measure: Callable[[str], float]) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and measure(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces

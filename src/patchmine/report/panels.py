"""Contact sheets of images and of clips: everything named, and every scale written beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
"""Pixels of a cell's shorter and longer side.  Small images are enlarged by a whole factor: each
pixel is a square.
"""
LEAST_FRAME_SIDE, MOST_FRAMES = 100, 8
"""Pixels of a frame's shorter side, and frames of a clip, on the contact sheet of clips."""

_GAP, _MARGIN, _LABEL_WIDTH, _BAR = 14, 18, 150, 9
_INK, _SOFT, _PAPER = (27, 29, 32), (99, 103, 110), (255, 255, 255)
_TITLE_SIZE, _NOTE_SIZE = 14, 12
_HATCH_LIGHT, _HATCH_DARK, _HATCH_PERIOD = 236, 176, 8

# Dark blue over green to pale yellow: brightness rises all the way, which any colour vision and a
# grey printer keep.
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
class _Cell:
    """One picture of a sheet: (C, H, W), or a map (rows, columns).

    ``span``: where the colours of a map begin and end; None: at its own smallest and largest
    value.  ``bar``: whether the scale is drawn below.
    """

    kind: str
    data: Tensor
    span: tuple[float, float] | None = None
    bar: bool = False


@dataclass(frozen=True)
class _Table:
    """What stands on a sheet: rows of cells, a title for each column, a label for each row (or none
    at all).
    """

    rows: Sequence[Sequence[_Cell]]
    titles: Sequence[str]
    labels: Sequence[Sequence[str]]
    size: tuple[int, int]
    legend: str


@dataclass(frozen=True)
class _Layout:
    """Where everything goes, in pixels: cells of ``height`` and ``width``, columns from ``left``,
    rows at ``tops``.
    """

    height: int
    width: int
    left: int
    tops: Sequence[int]
    titles: Sequence[Sequence[str]]
    labels: Sequence[Sequence[str]]
    legend: Sequence[str]
    title_font: Font
    note_font: Font

    def cell(self, row: int, column: int) -> tuple[int, int]:
        """The upper left corner of a cell, x first."""
        return self.left + column * (self.width + _GAP), self.tops[row]

    def sheet_size(self) -> tuple[int, int]:
        """Width and height of the whole."""
        x, y = self.cell(-1, len(self.titles))
        return x - _GAP + _MARGIN, y + len(self.legend) * _line_height(_NOTE_SIZE)


def draw_panels(
    panels: Sequence[Panel],
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    *,
    labels: Sequence[str] = (),
) -> Image.Image:
    """A labelled contact sheet of the panels of one batch.

    Of images, a row for each and a column for each panel.  Of clips, a row for each panel of each
    clip, and columns of up to `MOST_FRAMES` frames.

    ``mean``, ``std`` (C,): what images were normalised with.  ``labels``: a name for each image or
    clip.  Of more than three channels the first three are shown, of two the first.  What is NaN is
    missing and drawn hatched.  Each heat map has its own scale from its smallest to its largest
    value, both written under it; all of a clip's share one.
    """
    if panels[0].data.ndim == 5:
        return _draw(_clip_table(panels, labels), mean, std)
    return _draw(_image_table(panels, labels), mean, std)


def draw_moments(
    panels: Sequence[Panel],
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    *,
    labels: Sequence[str] = (),
) -> Iterator[Image.Image]:
    """One sheet for each frame of clips, all laid out alike: a row for each clip, a column for each
    panel.

    The arguments are those of `draw_panels`.
    """
    moments = panels[0].data.shape[2]
    spans = [_spans(panel) for panel in panels]
    for moment in range(moments):
        still = [replace(panel, data=_frame(panel, moment, moments)) for panel in panels]
        table = _image_table(still, labels)
        rows = [
            [replace(cell, span=spans[column][row]) for column, cell in enumerate(cells)]
            for row, cells in enumerate(table.rows)
        ]
        scale = f"Frame {moment + 1} of {moments}. {_legend(panels, 'one scale for all of a clip')}"
        yield _draw(replace(table, rows=rows, legend=scale), mean, std)


def _image_table(panels: Sequence[Panel], labels: Sequence[str]) -> _Table:
    return _Table(
        rows=[
            [_Cell(p.kind, p.data[row], bar=p.kind == "heat") for p in panels]
            for row in range(len(panels[0].data))
        ],
        titles=[panel.title for panel in panels],
        labels=[[label] for label in labels],
        size=_cell_size(panels, LEAST_SIDE),
        legend=_legend(panels, "each on its own scale"),
    )


def _clip_table(panels: Sequence[Panel], labels: Sequence[str]) -> _Table:
    """A row for each panel of each clip, the frames side by side."""
    clips, moments = len(panels[0].data), panels[0].data.shape[2]
    shown = [k * moments // min(moments, MOST_FRAMES) for k in range(min(moments, MOST_FRAMES))]
    names = labels or [f"clip {k + 1}" for k in range(clips)]
    spans = [_spans(panel) for panel in panels]
    frames = [[_frame(panel, moment, moments) for moment in shown] for panel in panels]
    rows, row_labels = [], []
    for clip in range(clips):
        for i, panel in enumerate(panels):
            is_map = panel.kind == "heat"
            rows.append(
                [
                    _Cell(panel.kind, at[clip], spans[i][clip], is_map and not k)
                    for k, at in enumerate(frames[i])
                ]
            )
            row_labels.append([panel.title] if i else [names[clip], panel.title])
    return _Table(
        rows=rows,
        titles=[f"frame {moment + 1}" for moment in shown],
        labels=row_labels,
        size=_cell_size(panels, LEAST_FRAME_SIDE),
        legend=_legend(panels, "one scale for all of a clip"),
    )


def _frame(panel: Panel, moment: int, moments: int) -> Tensor:
    """What a panel of clips shows at one of ``moments`` frames: (B, C, H, W), or maps (B, rows,
    columns).
    """
    axis = 1 if panel.kind == "heat" else 2
    return panel.data.select(axis, moment * panel.data.shape[axis] // moments)


def _spans(panel: Panel) -> list[tuple[float, float] | None]:
    """The smallest and largest value of each clip's maps; None where a panel holds no maps."""
    return [_ends(clip) if panel.kind == "heat" else None for clip in panel.data]


def _ends(values: Tensor) -> tuple[float, float]:
    """The smallest and the largest number; NaN twice where there is none."""
    there = values.double()[values.isfinite()]
    return (float(there.min()), float(there.max())) if there.numel() else (math.nan, math.nan)


def _draw(
    table: _Table, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor
) -> Image.Image:
    layout = _lay_out(table)
    sheet = Image.new("RGB", layout.sheet_size(), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, lines in enumerate(layout.labels[: len(table.rows)]):
        _write(draw, (_MARGIN, layout.cell(row, 0)[1]), lines, layout.note_font, _NOTE_SIZE, _SOFT)
    for column, lines in enumerate(layout.titles):
        x, y = layout.cell(0, column)
        above = y - 4 - len(lines) * _line_height(_TITLE_SIZE)
        _write(draw, (x, above), lines, layout.title_font, _TITLE_SIZE, _INK)
    for row, cells in enumerate(table.rows):
        for column, cell in enumerate(cells):
            at, size = layout.cell(row, column), (layout.height, layout.width)
            if cell.kind == "heat":
                _place_heat(sheet, draw, cell, at, size, layout.note_font)
            else:
                scale, offset = (std, mean) if cell.kind == "image" else ([1.0] * 3, [0.0] * 3)
                sheet.paste(Image.fromarray(image_pixels(cell.data, offset, scale, size)), at)
    x, y = layout.cell(-1, 0)
    _write(draw, (x, y - 4), layout.legend, layout.note_font, _NOTE_SIZE, _SOFT)
    return sheet


def _lay_out(table: _Table) -> _Layout:
    height, width = table.size
    title_font, note_font = ImageFont.load_default(_TITLE_SIZE), ImageFont.load_default(_NOTE_SIZE)
    titles = [_wrap(title, width, _measure(title_font)) for title in table.titles]
    words = [line for lines in table.labels for line in lines]
    label_width = min(_LABEL_WIDTH, math.ceil(max(map(_measure(note_font), words), default=0)))
    tops = [_MARGIN + max(map(len, titles)) * _line_height(_TITLE_SIZE) + 4]
    for cells in table.rows:  # the last of the tops is where the rows end
        scale = _BAR + _line_height(_NOTE_SIZE) + 4 if any(cell.bar for cell in cells) else 0
        tops.append(tops[-1] + height + scale + _GAP)
    return _Layout(
        height=height,
        width=width,
        left=_MARGIN + (label_width + _GAP if words else 0),
        tops=tops,
        titles=titles,
        labels=[
            [part for line in lines for part in _wrap(line, label_width, _measure(note_font))]
            for lines in table.labels
        ],
        legend=_wrap(table.legend, len(table.titles) * (width + _GAP) - _GAP, _measure(note_font)),
        title_font=title_font,
        note_font=note_font,
    )


def _legend(panels: Sequence[Panel], scales: str) -> str:
    """What the drawing means, as far as it needs saying."""
    missing = (
        "Hatched: nothing there. "
        if any(bool(panel.data.isnan().any()) for panel in panels)
        else ""
    )
    maps = (
        f"Maps: dark is low, light is high, {scales}."
        if any(p.kind == "heat" for p in panels)
        else ""
    )
    return missing + maps


def image_pixels(
    image: Tensor,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    size: tuple[int, int],
) -> Pixels:
    """A normalised image (C, H, W) as RGB pixels (*size, 3), NaN hatched."""
    channels = len(image)
    scale = torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1)
    offset = torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 1, 1)
    colours = image.detach().float().cpu() * scale + offset  # (C, H, W) in [0, 1]
    shown = (
        colours if channels == 3 else colours[:3] if channels > 3 else colours[:1].expand(3, -1, -1)
    ).permute(1, 2, 0)
    missing = shown.isnan().any(dim=2).numpy()
    filled = (shown.nan_to_num(0.0).clamp(0, 1) * 255).round().byte().numpy()
    return _hatched(_resized(filled, size), _resized(missing, size))


def heat_pixels(
    heat: Tensor, size: tuple[int, int], span: tuple[float, float] | None = None
) -> tuple[Pixels, float, float]:
    """A map (rows, columns) as RGB pixels (*size, 3), NaN hatched, with the ends of its scale (NaN:
    none).

    The scale is ``span``, or else goes from the smallest to the largest value.
    """
    values = heat.detach().double().cpu().numpy()
    finite = np.isfinite(values)
    low, high = span or _ends(heat.detach().cpu())
    spread = high - low
    places = np.where(finite, (values - low) / spread if spread > 0 else 0.5, 0.0)
    return _hatched(_resized(colour(places), size), _resized(~finite, size)), low, high


def colour(places: npt.NDArray[np.floating[Any]]) -> Pixels:
    """Colours (..., 3) of places in [0, 1] on the ramp from dark (0) to light (1)."""
    along = np.linspace(0, 1, len(_RAMP))
    return (
        np.stack([np.interp(places, along, _RAMP[:, i]) for i in range(3)], axis=-1)
        .round()
        .astype(np.uint8)
    )


def _cell_size(panels: Sequence[Panel], least: int) -> tuple[int, int]:
    """Height and width in which every panel is drawn: the images' own, enlarged to ``least`` at
    least, or shrunk.
    """
    shape = next(
        (panel.data.shape[-2:] for panel in panels if panel.kind == "image"),
        panels[0].data.shape[-2:],
    )
    height, width = int(shape[0]), int(shape[1])
    factor = max(1, math.ceil(least / min(height, width)))
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
    stripes = np.where((down + across) % _HATCH_PERIOD < 2, _HATCH_DARK, _HATCH_LIGHT).astype(
        np.uint8
    )
    return np.where(missing[:, :, None], stripes[:, :, None], pixels)


def _place_heat(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    cell: _Cell,
    at: tuple[int, int],
    size: tuple[int, int],
    font: Font,
) -> None:
    """A heat map, and if the cell wants it a colour bar with its two ends below."""
    (x, y), (height, width) = at, size
    pixels, low, high = heat_pixels(cell.data, size, cell.span)
    sheet.paste(Image.fromarray(pixels), at)
    if not cell.bar:
        return
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

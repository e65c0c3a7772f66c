"""Contact sheets of images and of clips: everything named, and every scale written beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from patchmine.report.letters import INK, PAPER, SOFT, Letters
from patchmine.report.words import number
from patchmine.types import Panel

Pixels = npt.NDArray[np.uint8]
Numbers = Sequence[float] | Tensor

LEAST_SIDE, MOST_SIDE = 150, 512
"""Pixels of a cell's shorter and longer side; small images are enlarged by a whole factor."""
LEAST_FRAME_SIDE, MOST_FRAMES = 100, 8
"""Pixels of a frame's shorter side, and frames of a clip, on the contact sheet of clips."""

_GAP, _MARGIN, _LABEL_WIDTH, _BAR = 14, 18, 190, 9
_HATCH_LIGHT, _HATCH_DARK, _HATCH_PERIOD = 236, 176, 8

# Dark blue over green to pale yellow: brightness rises all the way, which any colour vision and a
# grey printer keep.
_RAMP = np.array(
    [
        (24, 15, 62), (46, 51, 112), (45, 92, 130), (38, 129, 133),
        (60, 166, 118), (128, 198, 84), (205, 221, 77), (253, 247, 178),
    ]
)  # fmt: skip


def draw_panels(
    panels: Sequence[Panel], mean: Numbers, std: Numbers, *, labels: Sequence[str] = ()
) -> Image.Image:
    """A labelled contact sheet of the panels of one batch.

    Of images, a row for each and a column for each panel.  Of clips, a row for each panel of each
    clip, and columns of up to `MOST_FRAMES` frames.  Of more than three channels the first three
    are shown, of two the first.  What is NaN is hatched.  Each heat map has its own scale from its
    smallest to its largest value, both written under it; the maps of a clip share one.

    Args:
        panels: what a method shows of a batch.
        mean, std: (C,), what the images were normalised with.
        labels: a name for each image or clip.
    """
    table = (_clip_table if panels[0].data.ndim == 5 else _image_table)(panels, labels)
    return _draw(table, mean, std)


def draw_moments(
    panels: Sequence[Panel], mean: Numbers, std: Numbers, *, labels: Sequence[str] = ()
) -> Iterator[Image.Image]:
    """A sheet for each frame of clips: rows of clips, columns of panels; see `draw_panels`."""
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


# ---- what stands on a sheet ----


@dataclass(frozen=True)
class _Cell:
    """A picture (C, H, W), or a map (rows, columns) with the ends of its colours or None."""

    kind: str
    data: Tensor
    span: tuple[float, float] | None = None
    has_bar: bool = False  # the scale is drawn below


@dataclass(frozen=True)
class _Table:
    """Rows of cells of one size, a title above each column and a note below it, lines beside each
    row or none at all.
    """

    rows: Sequence[Sequence[_Cell]]
    titles: Sequence[str]
    notes: Sequence[str]
    labels: Sequence[Sequence[str]]
    size: tuple[int, int]
    legend: str


def _image_table(panels: Sequence[Panel], labels: Sequence[str]) -> _Table:
    return _Table(
        rows=[
            [_Cell(panel.kind, panel.data[row], has_bar=panel.kind == "heat") for panel in panels]
            for row in range(len(panels[0].data))
        ],
        titles=[panel.title for panel in panels],
        notes=[panel.note for panel in panels],
        labels=[[label] for label in labels],
        size=_cell_size(panels, LEAST_SIDE),
        legend=_legend(panels, "each on its own scale"),
    )


def _clip_table(panels: Sequence[Panel], labels: Sequence[str]) -> _Table:
    """A row for each panel of each clip, the frames side by side."""
    clips, moments = len(panels[0].data), panels[0].data.shape[2]
    columns = min(moments, MOST_FRAMES)
    shown = [column * moments // columns for column in range(columns)]
    spans = [_spans(panel) for panel in panels]
    rows, row_labels = [], []
    for clip in range(clips):
        for panel, span in zip(panels, spans, strict=True):
            frames = [_frame(panel, moment, moments)[clip] for moment in shown]
            bars = [panel.kind == "heat" and column == 0 for column in range(columns)]
            pairs = zip(frames, bars, strict=True)
            rows.append([_Cell(panel.kind, frame, span[clip], bar) for frame, bar in pairs])
            name = labels[clip] if labels else f"clip {clip + 1}"
            first = [name] if panel is panels[0] else []
            noted = ["", panel.note] if panel.note else []
            row_labels.append([*first, panel.title, *noted])
    return _Table(
        rows=rows,
        titles=[f"frame {moment + 1}" for moment in shown],
        notes=[],
        labels=row_labels,
        size=_cell_size(panels, LEAST_FRAME_SIDE),
        legend=_legend(panels, "one scale for all of a clip"),
    )


def _frame(panel: Panel, moment: int, moments: int) -> Tensor:
    """Clips at one of their ``moments`` frames: (B, C, H, W), or maps (B, rows, columns)."""
    axis = 1 if panel.kind == "heat" else 2
    return panel.data.select(axis, moment * panel.data.shape[axis] // moments)


def _spans(panel: Panel) -> list[tuple[float, float] | None]:
    """The smallest and largest value of each clip's maps; None where a panel holds no maps."""
    return [_ends(clip) if panel.kind == "heat" else None for clip in panel.data]


def _ends(values: Tensor) -> tuple[float, float]:
    """The smallest and the largest number; NaN twice where there is none."""
    there = values.double()[values.isfinite()]
    return (float(there.min()), float(there.max())) if there.numel() else (math.nan, math.nan)


def _cell_size(panels: Sequence[Panel], least: int) -> tuple[int, int]:
    """Height and width of every cell: the images' own, enlarged to ``least`` or shrunk."""
    images = [panel for panel in panels if panel.kind == "image"] or panels
    height, width = images[0].data.shape[-2:]
    factor = max(1, math.ceil(least / min(height, width)))
    shrink = min(1.0, MOST_SIDE / (factor * max(height, width)))
    if shrink < 1.0 and factor > 1:  # a long strip: as much as fits
        factor, shrink = max(1, MOST_SIDE // max(height, width)), 1.0
    return round(height * factor * shrink), round(width * factor * shrink)


def _legend(panels: Sequence[Panel], scales: str) -> str:
    """What the drawing means, as far as it needs saying."""
    is_partial = any(bool(panel.data.isnan().any()) for panel in panels)
    has_maps = any(panel.kind == "heat" for panel in panels)
    missing = "Hatched: nothing there. " if is_partial else ""
    maps = f"Maps: dark is low, light is high, {scales}; the numbers are its ends."
    return missing + (maps if has_maps else "")


# ---- from tensors to pixels ----


def image_pixels(image: Tensor, mean: Numbers, std: Numbers, size: tuple[int, int]) -> Pixels:
    """A normalised image (C, H, W) as RGB pixels (*size, 3), NaN hatched."""
    scale, offset = (torch.as_tensor(each).float().reshape(-1, 1, 1) for each in (std, mean))
    colours = image.detach().float().cpu() * scale + offset  # (C, H, W) in [0, 1]
    shown = colours[:3] if len(colours) >= 3 else colours[:1].expand(3, -1, -1)
    shown = shown.permute(1, 2, 0)  # (H, W, 3)
    filled = (shown.nan_to_num(0.0).clamp(0, 1) * 255).round().byte().numpy()
    return hatched(filled, shown.isnan().any(dim=2).numpy(), size)


def heat_pixels(
    heat: Tensor, size: tuple[int, int], span: tuple[float, float] | None = None
) -> tuple[Pixels, float, float]:
    """A map as RGB pixels (*size, 3), NaN hatched, with the ends of its scale."""
    values = heat.detach().double().cpu()
    low, high = span or _ends(values)
    spread = high - low
    finite = values.isfinite().numpy()
    places = np.where(finite, (values.numpy() - low) / spread if spread > 0 else 0.5, 0.0)
    return hatched(colour(places), ~finite, size), low, high


def colour(places: npt.NDArray[np.floating[Any]]) -> Pixels:
    """Colours (..., 3) of places in [0, 1] on the ramp from dark (0) to light (1)."""
    along = np.linspace(0, 1, len(_RAMP))
    channels = [np.interp(places, along, _RAMP[:, i]) for i in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def hatched(pixels: Pixels, missing: npt.NDArray[np.bool_], size: tuple[int, int]) -> Pixels:
    """The pixels enlarged to squares, with diagonal lines where something is missing."""
    rows = np.arange(size[0]) * pixels.shape[0] // size[0]
    columns = np.arange(size[1]) * pixels.shape[1] // size[1]
    enlarged = pixels[rows[:, None], columns]
    if missing.any():
        down, across = np.ogrid[: size[0], : size[1]]
        is_dark = (down + across) % _HATCH_PERIOD < 2
        stripes = np.where(is_dark, _HATCH_DARK, _HATCH_LIGHT).astype(np.uint8)
        gaps = missing[rows[:, None], columns]
        enlarged[gaps] = stripes[gaps][:, None]
    return enlarged


# ---- from cells and texts to a sheet ----


_TITLE, _NOTE = Letters(14, INK), Letters(12, SOFT)


def _draw(table: _Table, mean: Numbers, std: Numbers) -> Image.Image:
    height, width = table.size
    titles = [_TITLE.wrap(title, width) for title in table.titles]
    widths = [_NOTE.width(line) for lines in table.labels for line in lines]
    label_width = min(_LABEL_WIDTH, math.ceil(max(widths, default=0)))
    labels = [
        [part for line in lines for part in _NOTE.wrap(line, label_width)] for lines in table.labels
    ]
    left = _MARGIN + (label_width + _GAP if widths else 0)
    lefts = [left + column * (width + _GAP) for column in range(len(titles) + 1)]
    tops = [_MARGIN + max(map(len, titles)) * _TITLE.line + 4]
    for cells, lines in zip_longest(table.rows, labels, fillvalue=()):
        scale = _BAR + _NOTE.line + 4 if any(cell.has_bar for cell in cells) else 0
        tops.append(tops[-1] + max(height + scale, len(lines) * _NOTE.line) + _GAP)
    below = tops.pop() - 4  # where the rows end
    notes = [_NOTE.wrap(note, width) for note in table.notes]
    end = below + max(map(len, notes), default=0) * _NOTE.line + (_GAP if any(table.notes) else 0)
    legend = _NOTE.wrap(table.legend, lefts[-1] - left - _GAP)

    size = (lefts[-1] - _GAP + _MARGIN, end + 4 + len(legend) * _NOTE.line)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for top, lines in zip(tops, labels, strict=False):
        _NOTE.write(draw, (_MARGIN, top), lines)
    for x, lines in zip(lefts, titles, strict=False):
        _TITLE.write(draw, (x, tops[0] - 4 - len(lines) * _TITLE.line), lines)
    for y, cells in zip(tops, table.rows, strict=False):
        for x, cell in zip(lefts, cells, strict=False):
            _place(sheet, draw, cell, (x, y), table.size, mean, std)
    for x, lines in zip(lefts, notes, strict=False):
        _NOTE.write(draw, (x, below), lines)
    _NOTE.write(draw, (left, end), legend)
    return sheet


def _place(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    cell: _Cell,
    at: tuple[int, int],
    size: tuple[int, int],
    mean: Numbers,
    std: Numbers,
) -> None:
    """A picture; or a heat map, and if the cell wants it a colour bar with its two ends below."""
    if cell.kind != "heat":
        scale, offset = (std, mean) if cell.kind == "image" else ([1.0] * 3, [0.0] * 3)
        sheet.paste(Image.fromarray(image_pixels(cell.data, offset, scale, size)), at)
        return
    pixels, low, high = heat_pixels(cell.data, size, cell.span)
    sheet.paste(Image.fromarray(pixels), at)
    if cell.has_bar:
        (x, y), (height, width) = at, size
        bar = colour(np.broadcast_to(np.linspace(0, 1, width), (_BAR - 3, width)))
        sheet.paste(Image.fromarray(bar), (x, y + height + 3))
        below = y + height + _BAR + 3
        draw.text((x, below), number(low), fill=SOFT, font=_NOTE.font)
        draw.text((x + width, below), number(high), fill=SOFT, font=_NOTE.font, anchor="ra")

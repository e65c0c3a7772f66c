"""A contact sheet of what the network will see: images, and crops as training takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from patchmine.data.decoding.bounds import DecodeError, reading_item
from patchmine.data.decoding.decode import decode
from patchmine.data.inspecting.proposal import Proposal
from patchmine.data.items import IMAGE
from patchmine.data.randomness import sample_generator
from patchmine.data.settings import ViewSettings
from patchmine.data.sources.combine import Joined
from patchmine.data.sources.contract import Source
from patchmine.data.sources.folder import FileSource
from patchmine.data.views.display import coloured
from patchmine.data.views.geometry import resize
from patchmine.errors import UserError, shown_name

ROWS, CROPS = 8, 6
CELL, GAP, HEAD = 160, 8, 24
"""Pixels of a picture's square, between them, and of a line of letters above."""

_INK, _PAPER = (27, 29, 32), (255, 255, 255)
_OUTLINES = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf")  # one a crop


def refuse_sheet(source: Source, file: Path, video: bool) -> None:
    """UserError for videos, of which there is no such sheet, and for one among the images."""
    if video:
        raise UserError("sheet: shows images, and video=true reads videos; leave one of them out")
    parts = source.parts if isinstance(source, Joined) else [source]
    for part in parts:
        if not isinstance(part, FileSource) or part.index.stamp["listed"]:
            continue
        if file.resolve().is_relative_to(part.root.resolve()):
            told = f"sheet={shown_name(file)} would be one of the images of data="
            raise UserError(f"{told}{shown_name(part.name)}; name another folder")


def draw_sheet(
    source: Source, kept: Sequence[int], proposal: Proposal | None, path: Path, max_pixels: int
) -> None:
    """Write a row for each of some images: all of it, with outlines of its crops, and these.

    The crops are those of the first epochs of a run with ``seed=0`` and the proposed settings.

    Raises:
        UserError: no image can be shown.
    """
    rows = []
    if proposal is not None and kept:
        # Spread over the source; twice as many as are shown, since some may not fit the channels.
        places = np.unique(np.linspace(0, len(kept) - 1, 2 * ROWS).astype(int)).tolist()
        for index in (kept[place] for place in (*places[::2], *places[1::2])):
            try:
                with reading_item():
                    rows.append((index, _row(source, index, proposal, max_pixels)))
            except (OSError, DecodeError):  # counted by the report
                continue
            if len(rows) == ROWS:
                break
    if proposal is None or not rows:
        raise UserError(f"sheet: no image of data={shown_name(source.name)} can be shown")
    width = (CELL + GAP) * (1 + CROPS) + GAP
    page = Image.new("RGB", (width, (CELL + HEAD + GAP) * len(rows) + HEAD + GAP), _PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    settings = " ".join(proposal.words()) or f"image_size={proposal.image_size}"
    draw.text((GAP, GAP), f"Training crops with {settings}", fill=_INK, font=font)
    for number, (index, pictures) in enumerate(sorted(rows, key=lambda row: row[0])):
        top = HEAD + GAP + number * (CELL + HEAD + GAP)
        name = shown_name(source.key(index))
        draw.text((GAP, top), name[-width // 8 :], fill=_INK, font=font)
        for place, picture in enumerate(pictures):
            page.paste(picture, (GAP + place * (CELL + GAP), top + HEAD))
    page.save(path)


def _row(source: Source, index: int, proposal: Proposal, max_pixels: int) -> list[Image.Image]:
    """The whole image, then its crops, each within a square of CELL pixels."""
    raw, channels = source.read(index), proposal.channels
    side = proposal.image_size
    settings = ViewSettings(image_size=(side, side), channels=channels, max_pixels=max_pixels)
    view = IMAGE.train_view(settings, proposal.smallest_side, False)
    image = decode(raw, channels, max_pixels)
    share = min(CELL / image.shape[1], CELL / image.shape[2])
    height, width = (max(1, round(length * share)) for length in image.shape[1:])
    whole = Image.fromarray(_pixels(resize(image, (height, width))))
    draw, crops = ImageDraw.Draw(whole), []
    for epoch in range(CROPS):
        sample = view(raw, sample_generator(0, epoch, index))
        crop = sample.views[0].flip(-1) if sample.flip else sample.views[0]
        crops.append(Image.fromarray(_pixels(crop)).resize((CELL, CELL), _how(side)))
        top, left, tall, wide = (sample.box.numpy() * [height, width, height, width]).tolist()
        draw.rectangle((left, top, left + wide - 1, top + tall - 1), outline=_OUTLINES[epoch])
        ImageDraw.Draw(crops[-1]).rectangle((0, 0, CELL - 1, CELL - 1), outline=_OUTLINES[epoch])
    return [whole, *crops]


def _pixels(image: Tensor) -> NDArray[np.uint8]:
    """(H, W, 3)."""
    pixels: NDArray[np.uint8] = coloured(image).permute(1, 2, 0).contiguous().numpy()
    return pixels


def _how(side: int) -> Image.Resampling:
    """Pixels of smaller crops stay to be seen."""
    return Image.Resampling.NEAREST if side < CELL else Image.Resampling.BOX

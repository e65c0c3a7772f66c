"""Sheets that follow each other, as a file that moves: GIF by PIL, MP4 by PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from patchmine.errors import UserError

MOVING = (".gif", ".mp4")
"""Endings of the files that `save_animation` writes."""

FRAMES_PER_SECOND = 5
_COLOURS, _SEEN_FOR_COLOURS, _NEARLY_WHITE = 256, 4, 244


def save_animation(sheets: Sequence[Image.Image], out: Path) -> None:
    """Write sheets of equal size to a ``.gif``, or with PyAV (else UserError) to an ``.mp4``."""
    (_save_gif if out.suffix.lower() == ".gif" else _save_mp4)(sheets, out)


def _save_gif(sheets: Sequence[Image.Image], out: Path) -> None:
    # One palette for all, so that what stands still does not flicker and costs nothing in a frame.
    some = sheets[:: max(1, len(sheets) // _SEEN_FOR_COLOURS)]
    palette = Image.fromarray(np.concatenate([np.asarray(sheet) for sheet in some]))
    palette = palette.quantize(_COLOURS)
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    colours[colours.min(axis=1) > _NEARLY_WHITE] = 255  # the paper stays white
    palette.putpalette(colours.flatten().tolist())
    first, *rest = (sheet.quantize(palette=palette) for sheet in sheets)
    duration = 1000 // FRAMES_PER_SECOND
    first.save(out, format="GIF", save_all=True, append_images=rest, duration=duration, loop=0)


def _save_mp4(sheets: Sequence[Image.Image], out: Path) -> None:
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"out={out}: MP4 is written by PyAV, which is not installed: `pip install av`, "
            f"or write out={out.with_suffix('.gif')}"
        ) from error
    try:
        av.codec.Codec("libx264", "w")
        codec = "libx264"  # which browsers play
    except ValueError:
        codec = "mpeg4"  # builds of FFmpeg without H.264 have it
    width, height = (side - side % 2 for side in sheets[0].size)  # colours have half of each side
    with av.open(str(out), "w", format="mp4") as file:
        stream = file.add_stream(codec, rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for sheet in sheets:
            file.mux(stream.encode(av.VideoFrame.from_image(sheet.crop((0, 0, width, height)))))
        file.mux(stream.encode())

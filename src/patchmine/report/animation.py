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
    """Write sheets of equal size to ``out``, a ``.gif`` (which starts again at its end) or an
    ``.mp4``.

    Raises UserError for an MP4 where PyAV is not installed.
    """
    if out.suffix.lower() == ".gif":
        _save_gif(sheets, out)
    else:
        _save_mp4(sheets, out)


def _save_gif(sheets: Sequence[Image.Image], out: Path) -> None:
    # One palette for all, so that what stands still does not flicker and costs nothing from frame
    # to frame.
    some = sheets[:: max(1, len(sheets) // _SEEN_FOR_COLOURS)]
    beneath = Image.fromarray(np.concatenate([np.asarray(sheet) for sheet in some]))
    palette = beneath.quantize(_COLOURS)
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    colours[colours.min(axis=1) > _NEARLY_WHITE] = 255  # the paper stays white
    palette.putpalette(colours.flatten().tolist())
    reduced = [sheet.quantize(palette=palette) for sheet in sheets]
    duration = 1000 // FRAMES_PER_SECOND
    reduced[0].save(
        out, format="GIF", save_all=True, append_images=reduced[1:], duration=duration, loop=0
    )


def _save_mp4(sheets: Sequence[Image.Image], out: Path) -> None:
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"out={out}: MP4 is written by PyAV, which is not installed: `pip install av`, "
            f"or write out={out.with_suffix('.gif')}"
        ) from error
    width, height = (
        side - side % 2 for side in sheets[0].size
    )  # colour is stored at half the resolution
    with av.open(str(out), "w", format="mp4") as file:
        stream = file.add_stream(_codec(), rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for sheet in sheets:
            file.mux(stream.encode(av.VideoFrame.from_image(sheet.crop((0, 0, width, height)))))
        file.mux(stream.encode())


def _codec() -> str:
    """H.264, which browsers play; builds of FFmpeg without it have MPEG-4."""
    import av

    try:
        av.codec.Codec("libx264", "w")
    except ValueError:
        return "mpeg4"
    return "libx264"

"""The folder that `patchmine predict` writes of a run that sees places in images."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from patchmine.errors import UserError, shown_name
from patchmine.evaluate.asked import does
from patchmine.evaluate.settings import PREDICTION_ENDINGS, PredictSettings
from patchmine.system.disk import settle

OVERLAYS = "overlays"
"""Where in it the pictures are on which something is drawn."""
_JPEG_SIDE, _QUALITY = 65_535, 90


def folder_to_write(settings: PredictSettings, kind: str, what: str) -> Path:
    """The folder of ``out``; UserError for a table's name.

    Of a run of this ``kind`` it is a folder that ``what`` goes to.
    """
    out = Path(settings.out or "predictions")
    if out.suffix.lower() in PREDICTION_ENDINGS and not (settings.out or "").endswith("/"):
        raise UserError(
            f"out={shown_name(out)} is a table, and {shown_name(settings.run)} "
            f"{does(kind)}: its {what} go to a folder, as "
            f"out={shown_name(out.with_suffix(''))}/"
        )
    return out


def save_overlay(picture: Image.Image, folder: Path, name: str) -> None:
    """A picture among the overlays in ``folder``: a JPEG, or where no JPEG is as large a PNG.

    ``name``: that of what is beside the overlays, of which the ending changes.
    """
    ending = ".jpg" if max(picture.size) <= _JPEG_SIDE else ".png"
    place = folder / OVERLAYS / f"{name.removesuffix(PurePath(name).suffix)}{ending}"
    save_picture(picture, place, quality=_QUALITY, subsampling=0)


def save_picture(picture: Image.Image, path: Path, **how: Any) -> None:
    """A picture in a folder that is made for it, flushed to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **how)
    settle(path)

"""``patchmine predict`` of a run that segments: a folder of label maps and overlays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchmine.disk import output_folder, settle
from patchmine.errors import Say, UserError, shown_name, silent, whole_name
from patchmine.evaluate.classmaps import Classes, MapQuestion, Seen, open_map_question
from patchmine.evaluate.settings import PREDICTION_ENDINGS, PredictSettings
from patchmine.evaluate.tables import csv_table
from patchmine.report.overlays import class_colours, overlay
from patchmine.report.thumbnails import coloured

TABLE, OVERLAYS = "classes.csv", "overlays"
"""What such a folder holds beside the maps."""
_JPEG_SIDE, _QUALITY = 65_535, 90


def predict_maps(settings: PredictSettings, say: Say = silent) -> Path:
    """Write the class of every pixel: a PNG for each readable image, overlays, a table.

    The folder appears complete or not at all.  One image is in memory at a time.

    Args:
        settings: the run, what is read, and the folder to write.
        say: hears about the progress.

    Returns:
        The folder.

    Raises:
        UserError: nothing can be read, two images have one name, or the folder is in use or cannot
            be written.
    """
    out = Path(settings.out or "predictions")
    if out.suffix.lower() in PREDICTION_ENDINGS and not (settings.out or "").endswith("/"):
        raise UserError(
            f"out={shown_name(out)} is a table, and {shown_name(settings.run)} segments: its maps "
            f"go to a folder, as out={shown_name(out.with_suffix(''))}/"
        )
    question = open_map_question(settings, say)
    names, done = question.map_names(), 0
    classes = question.task.names
    colours = class_colours(classes, question.config.palette)
    with output_folder(out) as new:
        with csv_table(new / TABLE) as add:
            for seen in question.maps():
                name = names[seen.index]
                _save(Image.fromarray(seen.classes), new / name)
                picture = coloured(seen.picture).permute(1, 2, 0).numpy()
                painted = Image.fromarray(overlay(picture, seen.classes, colours))
                ending = ".jpg" if max(painted.size) <= _JPEG_SIDE else ".png"
                place = new / OVERLAYS / f"{name.removesuffix('.png')}{ending}"
                _save(painted, place, quality=_QUALITY, subsampling=0)
                add(_rows(question, seen))
                done += 1
        settle(new / TABLE)
    count = f"{done:,} of {len(question.source):,}"
    say(f"class maps of {count} images in {shown_name(out)}, drawn over them in {OVERLAYS}/")
    return out


def _save(picture: Image.Image, path: Path, **how: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **how)
    settle(path)


def _rows(question: MapQuestion, seen: Seen) -> Mapping[str, Any]:
    """A row for each class, those without a pixel too."""
    names, pixels = question.task.names, _counts(seen.classes, len(question.task.names))
    return {
        "file": [question.file(seen.index)] * len(names),
        "class": [whole_name(name) for name in names],
        "pixels": pixels,
        "share": (pixels / seen.classes.size).astype(np.float32),
    }


def _counts(classes: Classes, count: int) -> Any:
    return np.bincount(classes.ravel(), minlength=count)

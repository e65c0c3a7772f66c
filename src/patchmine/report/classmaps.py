"""``patchmine predict`` of a run that segments: a folder of label maps and overlays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchmine.data.views.display import coloured
from patchmine.errors import Say, shown_name, silent, whole_name
from patchmine.evaluate.classmaps import Classes, MapQuestion, Seen, open_map_question
from patchmine.evaluate.settings import PredictSettings
from patchmine.evaluate.tables import csv_table
from patchmine.report.drawn import OVERLAYS, folder_to_write, save_overlay, save_picture
from patchmine.report.overlays import class_colours, overlay
from patchmine.system.disk import output_folder, settle

TABLE = "classes.csv"


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
    out = folder_to_write(settings, "segment", "maps")
    question = open_map_question(settings, say)
    names, done = question.images.new_names(".png"), 0
    classes = question.task.names
    colours = class_colours(classes, question.config.palette)
    with output_folder(out) as new:
        with csv_table(new / TABLE) as add:
            for seen in question.maps():
                name = names[seen.index]
                save_picture(Image.fromarray(seen.classes), new / name)
                picture = coloured(seen.picture).permute(1, 2, 0).numpy()
                painted = Image.fromarray(overlay(picture, seen.classes, colours))
                save_overlay(painted, new, name)
                add(_rows(question, seen))
                done += 1
        settle(new / TABLE)
    count = f"{done:,} of {len(question.images):,}"
    say(f"class maps of {count} images in {shown_name(out)}, drawn over them in {OVERLAYS}/")
    return out


def _rows(question: MapQuestion, seen: Seen) -> Mapping[str, Any]:
    """A row for each class, those without a pixel too."""
    names, pixels = question.task.names, _counts(seen.classes, len(question.task.names))
    return {
        "file": [question.images.file(seen.index)] * len(names),
        "class": [whole_name(name) for name in names],
        "pixels": pixels,
        "share": (pixels / seen.classes.size).astype(np.float32),
    }


def _counts(classes: Classes, count: int) -> Any:
    """(count,) pixels of each class, row by row: numpy makes 8 bytes of each first."""
    return sum(np.bincount(row, minlength=count) for row in classes)

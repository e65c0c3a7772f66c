"""``patchmine predict`` of a run that detects: a COCO file, a table, and the objects drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchvision.ops import box_convert

from patchmine.data.views.display import coloured
from patchmine.errors import Say, shown_name, silent, whole_name
from patchmine.evaluate.objects import ObjectQuestion, SeenObjects, open_object_question
from patchmine.evaluate.rle import areas
from patchmine.evaluate.settings import PredictSettings
from patchmine.evaluate.tables import csv_table
from patchmine.report.boxes import draw_objects, object_colours
from patchmine.report.drawn import OVERLAYS, folder_to_write, save_overlay
from patchmine.system.disk import output_folder, settle

ANNOTATIONS, TABLE = "annotations.json", "objects.csv"


def predict_objects(settings: PredictSettings, say: Say = silent) -> Path:
    """Write the objects of every readable image: a COCO file, a table, and pictures.

    The folder appears complete or not at all.  Few images are in memory at a time.

    Args:
        settings: the run, what is read, and the folder to write.
        say: hears about the progress.

    Returns:
        The folder.

    Raises:
        UserError: nothing can be read, two images have one name, or the folder is in use or cannot
            be written.
    """
    out = folder_to_write(settings, "detect", "objects")
    question = open_object_question(settings, say)
    names, classes = question.images.new_names(".jpg"), question.task.names
    colours, images, objects = object_colours(classes), 0, 0
    with output_folder(out) as new:
        with csv_table(new / TABLE) as row, _coco_file(new / ANNOTATIONS, question) as add:
            for seen in question.seen():
                picture = coloured(seen.picture).permute(1, 2, 0).numpy()
                drawn = draw_objects(picture, seen.objects, classes, colours)
                save_overlay(drawn, new, names[seen.index])
                row(_rows(question, seen))
                add(seen)
                images, objects = images + 1, objects + len(seen.objects)
        for file in (TABLE, ANNOTATIONS):
            settle(new / file)
    if not objects:
        say(
            f"Nothing was found with a score of score_threshold={settings.score_threshold:g} or "
            "more: lower it to see what the run is less sure of."
        )
    say(
        f"{objects:,} objects in {images:,} of {len(question.images):,} images in "
        f"{shown_name(out)}, drawn over them in {OVERLAYS}/"
    )
    return out


def _rows(question: ObjectQuestion, seen: SeenObjects) -> Mapping[str, Any]:
    """A row for each object."""
    boxes = box_convert(seen.objects.boxes, "xyxy", "xywh").round(decimals=2)
    names = [whole_name(name) for name in question.task.names]
    return {
        "file": [question.images.file(seen.index)] * len(boxes),
        "class": [names[label] for label in seen.objects.labels.tolist()],
        "score": seen.objects.scores.numpy(),
        **dict(zip(("left", "top", "width", "height"), boxes.T.numpy(), strict=True)),
    }


@contextmanager
def _coco_file(path: Path, question: ObjectQuestion) -> Iterator[Callable[[SeenObjects], None]]:
    """A COCO file; each call of what is yielded adds an image and its objects."""
    images: list[str] = []
    known = question.config.category_ids
    ids = known or [1 + label for label in range(len(question.task.names))]
    names = zip(ids, question.task.names, strict=True)
    head = {
        "info": {
            "description": f"objects found by {shown_name(question.settings.run)}",
            "score_threshold": question.settings.score_threshold,
        },
        "categories": [{"id": number, "name": name} for number, name in names],
    }
    count = 0
    with path.open("w", encoding="ascii") as file:
        file.write(json.dumps(head)[:-1] + ',\n"annotations": [')

        def add(seen: SeenObjects) -> None:
            nonlocal count
            height, width = seen.picture.shape[-2:]
            number, name = 1 + seen.index, question.images.name(seen.index)
            entry = {"id": number, "file_name": name, "width": width, "height": height}
            images.append(json.dumps(entry))
            for row in _annotations(seen, ids):
                file.write(",\n" if count else "\n")
                count += 1
                file.write(json.dumps({"id": count, "image_id": number, **row}))

        yield add
        file.write('],\n"images": [\n' + ",\n".join(images) + "]}\n")


def _annotations(seen: SeenObjects, ids: list[int]) -> Iterator[dict[str, Any]]:
    """What the file says of each object of an image."""
    objects = seen.objects
    boxes = box_convert(objects.boxes.double(), "xyxy", "xywh")
    sizes = boxes[:, 2:].prod(1) if objects.masks is None else areas(objects.masks)
    columns = boxes.tolist(), sizes.tolist(), objects.labels.tolist(), objects.scores.tolist()
    for n, (box, size, label, score) in enumerate(zip(*columns, strict=True)):
        row: dict[str, Any] = {
            "category_id": ids[label],
            "bbox": [round(side, 2) for side in box],
            "score": round(score, 5),
            "area": round(size, 2),
            "iscrowd": 0,
        }
        if objects.masks is not None:
            mask = objects.masks[n]
            row["segmentation"] = {"size": mask["size"], "counts": mask["counts"].decode()}
        yield row

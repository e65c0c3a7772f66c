"""Small COCO files with their images, for the tests of detection's data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchmine.data.sources.coco_parts import Part

SIZE = (20, 30)  # height, width
POLYGON = [2, 3, 12.5, 3, 12.5, 9, 2, 9]
CATEGORIES = [{"id": 7, "name": "cell"}, {"id": 3, "name": "blob"}]


def annotation(number: int, image: int = 1, **entries: Any) -> dict[str, Any]:
    """An object, as the tests need it unless they say otherwise."""
    usual = {"bbox": [2, 3, 10.5, 6], "category_id": 7, "segmentation": [POLYGON], "iscrowd": 0}
    return {"id": number, "image_id": image, **usual, **entries}


def coco(annotations: Sequence[dict[str, Any]] | None = None, images: int = 2) -> dict[str, Any]:
    """The content of a COCO file: images 1, 2, ... of `SIZE`, one object in the first."""
    height, width = SIZE
    return {
        "images": [
            {"id": n, "file_name": f"{n}.png", "height": height, "width": width}
            for n in range(1, images + 1)
        ],
        "annotations": [annotation(1)] if annotations is None else [*annotations],
        "categories": [dict(entry) for entry in CATEGORIES],
    }


def write_part(images: Path, file: Path, content: Any = None) -> Part:
    """The images that a COCO file names (random pixels), and the file."""
    content = coco() if content is None else content
    images.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    for entry in content["images"]:
        pixels = np.random.default_rng(entry["id"]).integers(0, 255, (*SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(images / entry["file_name"])
    file.write_text(json.dumps(content), encoding="utf-8")
    return Part(images, file)

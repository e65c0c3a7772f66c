"""Runs that learned label maps and objects, which `predict` writes folders by."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scene import make_images
from tuned import make

_LEARNING = (
    "steps=1 batch_size=4 warmup_epochs=0 checkpoint_every=1 tensorboard=false device=cpu workers=0"
)
SEGMENTS = f"segment ROOM/whole-mae data=ROOM/maps {_LEARNING}"
DETECTS = (
    f"detect ROOM/whole-mae data=ROOM/objects image_size=32 masks=true width=8 proposals=10 "
    f"samples=8 {_LEARNING}"
)


def make_seeing(base: Path) -> None:
    """In the folder ``base`` the runs ``mapped`` and ``found``, and two images to ask about."""
    _make_maps(base.parent / "maps")
    _make_objects(base.parent / "objects")
    make(base, f"{SEGMENTS} out=BASE/mapped")
    make(base, f"{DETECTS} out=BASE/found")
    for file in sorted(make_images(base.parent / "asked").iterdir())[:2]:
        (base / "asked" / "a").mkdir(parents=True, exist_ok=True)
        file.rename(base / "asked" / "a" / file.name)


def _make_maps(folder: Path) -> None:
    """Noise, each half of which is of one class."""
    labels = np.zeros((16, 16), np.uint8)
    labels[8:] = 1
    for file in make_images(folder / "images").iterdir():
        (folder / "labels").mkdir(exist_ok=True)
        Image.fromarray(labels).save(folder / "labels" / file.name)


def _make_objects(folder: Path) -> None:
    """Noise with an object in each image."""
    names = sorted(file.name for file in make_images(folder / "images").iterdir())
    polygon = [2, 2, 12, 2, 12, 10, 2, 10]
    content = {
        "images": [
            {"id": number, "file_name": name, "width": 16, "height": 16}
            for number, name in enumerate(names)
        ],
        "categories": [{"id": 7, "name": "thing"}],
        "annotations": [
            {
                "id": number,
                "image_id": number,
                "category_id": 7,
                "bbox": [2, 2, 10, 8],
                "area": 80,
                "iscrowd": 0,
                "segmentation": [polygon],
            }
            for number in range(len(names))
        ],
    }
    (folder / "annotations.json").write_text(json.dumps(content), encoding="utf-8")

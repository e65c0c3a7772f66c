"""Cuts the cells out of BCCD's microscope pictures, one folder a class, as a domain of few labels.

    python benchmarks/bccd_crops.py bccd/ cells/

``bccd/`` holds ``train``, ``val``, ``test`` and ``annotations/*.json`` in COCO's format.  Out come
``cells/train`` and ``cells/test`` with a folder for each class; boxes under 16 pixels are left out,
and so are cells of a class beyond the first ``--most`` of a part (red ones are ten times as many).
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click
from PIL import Image

SMALLEST = 16  # pixels of a box's shorter side
PARTS = {"train": "train", "val": "train", "test": "test"}


@click.command(help=__doc__)
@click.argument("bccd", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--most", default=100_000, help="cells of a class in a part")
def main(bccd: Path, out: Path, most: int) -> None:
    """All boxes of all pictures."""
    counts: Counter[Path] = Counter()
    for part, target in PARTS.items():
        labelled = json.loads((bccd / "annotations" / f"{part}.json").read_text(encoding="utf-8"))
        files = {image["id"]: image["file_name"] for image in labelled["images"]}
        classes = {each["id"]: each["name"] for each in labelled["categories"]}
        for box in labelled["annotations"]:
            left, top, width, height = box["bbox"]
            if min(width, height) < SMALLEST:
                continue
            place = out / target / classes[box["category_id"]]
            if counts[place] == most:
                continue
            counts[place] += 1
            place.mkdir(parents=True, exist_ok=True)
            with Image.open(bccd / part / files[box["image_id"]]) as picture:
                cell = picture.convert("RGB").crop((left, top, left + width, top + height))
            cell.save(place / f"{part}-{box['id']:05d}.png")
    print("\n".join(f"{place}: {count}" for place, count in sorted(counts.items())))


if __name__ == "__main__":
    main()

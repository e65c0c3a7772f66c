"""Cuts pictures of nuclei into windows, a folder for each number of nuclei: a domain of few labels.

    python benchmarks/nuclei_crops.py nuclei/ windows/

``nuclei/`` holds ``train`` and ``val`` with ``images`` and ``annotations.json`` in COCO's format.
Out come ``windows/train`` and ``windows/test`` with the folders ``none``, ``few`` (1 or 2),
``some`` (3 to 5) and ``many``: how many nuclei have their centre in the window.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import click
from PIL import Image

PARTS = {"train": "train", "val": "test"}
UP_TO = {"none": 0, "few": 2, "some": 5, "many": 10_000}  # nuclei in a window


@click.command(help=__doc__)
@click.argument("nuclei", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--size", default=64, help="pixels of a window's side")
@click.option("--step", default=32, help="pixels from window to window")
def main(nuclei: Path, out: Path, size: int, step: int) -> None:
    """All windows of all pictures."""
    counts: Counter[Path] = Counter()
    for part, target in PARTS.items():
        labelled = json.loads((nuclei / part / "annotations.json").read_text(encoding="utf-8"))
        centres: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for left, top, width, height, image in (
            (*each["bbox"], each["image_id"]) for each in labelled["annotations"]
        ):
            centres[image].append((left + width / 2, top + height / 2))
        for image in labelled["images"]:
            with Image.open(nuclei / part / "images" / image["file_name"]) as opened:
                picture = opened.convert("RGB")
            for top in range(0, picture.height - size + 1, step):
                for left in range(0, picture.width - size + 1, step):
                    inside = sum(
                        left <= x < left + size and top <= y < top + size
                        for x, y in centres[image["id"]]
                    )
                    name = next(name for name, most in UP_TO.items() if inside <= most)
                    place = out / target / name
                    place.mkdir(parents=True, exist_ok=True)
                    window = picture.crop((left, top, left + size, top + size))
                    window.save(place / f"{image['id']:04d}-{left:03d}-{top:03d}.png")
                    counts[place] += 1
    print("\n".join(f"{place}: {count}" for place, count in sorted(counts.items())))


if __name__ == "__main__":
    main()

"""Pictures made while a run learns objects."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import patchmine
from fixtures.boxes import write_boxes
from fixtures.detector import teach_tiny
from patchmine.evaluate.detection import KeptObjects, kept
from patchmine.report.boxes import draw_objects, object_colours
from patchmine.runs.folder import RunFolder
from patchmine.types import Objects


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> patchmine.Run:
    root = tmp_path_factory.mktemp("run")
    data = write_boxes(root / "data", {"train": 8, "test": 4})
    settings: dict[str, Any] = dict(steps=4, sample_every=2, checkpoint_every=2, masks=True)
    return teach_tiny(data, root / "run", keep_checkpoints=9, drop_path=0.2, **settings)


def test_pictures_of_the_same_images_are_drawn(run: patchmine.Run) -> None:
    names = sorted(path.name for path in run.sample_dir.iterdir())
    assert names == ["step-00000002.png", "step-00000004.png"]
    first, last = (pixels_of(run.sample_dir / name) for name in names)
    assert first.shape == last.shape
    half = first.shape[1] // 2
    np.testing.assert_array_equal(first[:, :half], last[:, :half])  # the truth
    colours = Counter(map(tuple, first[:, :half].reshape(-1, 3).tolist()))
    for colour in object_colours(["red", "blue"]).tolist():
        assert colours[tuple(colour)] > 500


def test_pictures_change_no_weights(
    run: patchmine.Run, tmp_path: Path, weights: Callable[[RunFolder], dict[str, Tensor]]
) -> None:
    cut = shutil.copytree(run.path, tmp_path / "cut", symlinks=True)
    for file in (*cut.glob("checkpoints/*4*"), cut / "checkpoints" / "last"):
        file.unlink()
    patchmine.resume(cut, sample_every=1, say=lambda _: None)
    first, second = weights(run), weights(RunFolder(cut))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert (cut / "samples" / "step-00000003.png").is_file()


def objects(*rows: tuple[float, ...], masks: Tensor | None = None) -> KeptObjects:
    """Of (label, score, left, top, right, bottom)."""
    values = torch.tensor(rows).reshape(-1, 6)
    crowd = torch.zeros(len(values), dtype=torch.bool)
    return kept(Objects(values[:, 2:], values[:, 0].long(), crowd, masks), values[:, 1])


GREY = np.full((300, 400, 3), 120, np.uint8)
NAMES = ["cell", "a long name of a class"]


def drawn(found: KeptObjects, picture: np.ndarray = GREY, **how: Any) -> np.ndarray:
    how = {"side": 1, **how}
    return np.asarray(draw_objects(picture, found, NAMES, object_colours(NAMES), **how))


def test_boxes_have_the_colour_of_their_class() -> None:
    sheet = drawn(objects((0, 0.9, 100, 100, 200, 180), (1, 0.8, 250, 50, 390, 150)))
    first, second = object_colours(NAMES)
    for y, x in ((140, 100), (140, 199), (179, 150)):
        assert (sheet[y, x] == first).all()
    for y, x in ((100, 250), (100, 389), (149, 300)):
        assert (sheet[y, x] == second).all()
    assert (sheet[140, 150] == 120).all()
    assert (sheet[92, 104:110] == first).any()  # the label, above its box
    assert (drawn(objects()) == GREY).all()


def test_small_pictures_are_enlarged_and_lines_follow_the_size() -> None:
    found = objects((0, 0.9, 10, 10, 30, 20))
    small = drawn(found, GREY[:30, :40], side=100)
    assert small.shape == (90, 120, 3)
    colour = object_colours(NAMES)[0]
    assert (small[45, 30] == colour).all()
    large = drawn(objects((0, 0.9, 100, 100, 900, 800)), np.full((1600, 2000, 3), 120, np.uint8))
    line = (large[450, 90:130] == colour).all(1).sum()
    assert line == 6
    assert ((large[450, 90:130] == colour).all(1) == [100 <= x < 106 for x in range(90, 130)]).all()


def test_masks_are_translucent_and_have_borders() -> None:
    masks = torch.zeros(1, 300, 400, dtype=torch.bool)
    masks[0, 110:170, 110:190] = True
    sheet = drawn(objects((0, 0.9, 100, 100, 200, 180), masks=masks))
    colour = object_colours(NAMES)[0].astype(float)
    np.testing.assert_allclose(sheet[140, 150], 0.6 * 120 + 0.4 * colour, atol=1)
    assert (sheet[110, 150] == colour).all()
    assert (sheet[105, 150] == 120).all()


def test_a_label_hides_no_other_object() -> None:
    """Where there is no room for name and score it is the score, and else nothing."""
    rows = [(0, 0.9, x, y, x + 18, y + 18) for y in range(20, 260, 20) for x in range(20, 360, 20)]
    crowded = drawn(objects(*rows))
    first = object_colours(NAMES)[0]
    painted = (crowded == first).all(2)
    for _, _, left, top, right, bottom in rows[18:-18]:
        inside = painted[int(top) + 2 : int(bottom) - 2, int(left) + 2 : int(right) - 2]
        assert inside.mean() < 0.45
    alone = (drawn(objects(rows[0])) == first).all(2).sum()
    assert alone > 500  # a label of name and score
    assert painted[:, :].sum() < len(rows) * alone / 2


def test_truth_has_no_scores() -> None:
    found = objects((0, 1.0, 100, 100, 200, 180))
    colour = object_colours(NAMES)[0]
    wide, narrow = (
        (drawn(found, scores=each) == colour).all(2)[90].sum() for each in (True, False)
    )
    assert wide > narrow > 5

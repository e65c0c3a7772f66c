"""Pictures made while a run learns label maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.segmenter import draw_maps, teach_tiny
from patchmine.report.map_samples import draw_maps as draw_sheet
from patchmine.report.overlays import class_colours


def test_pictures_of_the_same_images_are_drawn(tmp_path: Path) -> None:
    run = teach_tiny(draw_maps(tmp_path / "maps"), tmp_path / "run", steps=4, sample_every=2)
    assert sorted(path.name for path in run.sample_dir.iterdir()) == [
        "step-00000002.png",
        "step-00000004.png",
    ]
    first, last = (np.asarray(Image.open(path)) for path in sorted(run.sample_dir.iterdir()))
    assert first.shape == last.shape
    third = first.shape[1] // 3
    np.testing.assert_array_equal(first[:, : 2 * third - 20], last[:, : 2 * third - 20])
    assert not np.array_equal(first, last)


def test_a_picture_that_fails_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no colours")

    monkeypatch.setattr("patchmine.report.map_samples.draw_maps", fail)
    said: list[str] = []
    data = draw_maps(tmp_path / "maps")
    run = teach_tiny(data, tmp_path / "run", steps=4, sample_every=2, say=said.append)
    assert (run.eval_dir / "test.json").is_file()
    assert sum("the picture after step 2 failed (no colours)" in line for line in said) == 1
    assert not any("after step 4 failed" in line for line in said)


def test_a_sheet_shows_truth_prediction_and_what_is_ignored() -> None:
    labels = torch.zeros(8, 10, dtype=torch.int64)
    labels[:4], labels[4:, 5:] = 255, 1
    found = torch.ones(8, 10, dtype=torch.int64)
    colours = class_colours(["ground", "tree"], {})
    picture = np.full((8, 10, 3), 77, np.uint8)
    sheet = np.asarray(draw_sheet([(picture, labels, found)], ["ground", "tree"], colours, 255))
    pixels = [tuple(pixel) for pixel in sheet.reshape(-1, 3).tolist()]
    cell = 320 * 256
    swatch = 13 * 13
    assert pixels.count((77, 77, 77)) == cell
    assert pixels.count(tuple(colours[0].tolist())) == cell // 4 + swatch
    assert pixels.count(tuple(colours[1].tolist())) == cell // 4 + cell + swatch
    assert pixels.count((176, 176, 176)) + pixels.count((236, 236, 236)) >= cell // 2

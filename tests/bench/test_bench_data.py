"""The benchmark of loading compares like with like and says what it compared."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchmine.bench import data as bench
from patchmine.errors import UserError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return tmp_path


def test_it_reports_times_ratios_and_what_is_left_to_the_device(photos: Path) -> None:
    said: list[str] = []
    threads = torch.get_num_threads()
    result = bench.bench_data(photos, image_size=32, repeats=2, say=said.append)
    assert result["images"] == 12
    assert set(result["milliseconds"]) == {"ours", "ours_float", "torchvision"}
    assert all(value > 0 for value in [*result["milliseconds"].values(), result["ratio"], result["ratio_float"]])
    assert "on the device" in said[-1]
    assert torch.get_num_threads() == threads


def test_the_chains_end_with_the_same_kind_of_picture() -> None:
    file = io.BytesIO()
    Image.new("RGB", (80, 60), (200, 100, 50)).save(file, "JPEG", quality=95)
    theirs, ours = (chain(file.getvalue()) for chain in (bench._torchvision(32), bench._ours_float(32)))
    assert theirs.shape == ours.shape == (3, 32, 32)
    assert torch.allclose(theirs, ours, atol=0.02)


def test_what_cannot_be_timed_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the images of"):
        bench.bench_data(tmp_path)

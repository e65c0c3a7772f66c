"""The benchmark of loading compares like with like and says what it compared."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

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


@pytest.fixture
def against(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("data_against_torchvision")


def test_it_reports_times_and_what_is_left_to_the_device(photos: Path) -> None:
    said: list[str] = []
    threads = torch.get_num_threads()
    result = bench.bench_data(photos, image_size=32, repeats=2, say=said.append)
    assert result["images"] == 12
    assert set(result["milliseconds"]) == {"uint8", "scaled", "cached", "float"}
    for name, milliseconds in result["milliseconds"].items():
        assert result["per_second"][name] == pytest.approx(1000 / milliseconds)
    assert all(value > 0 for value in result["milliseconds"].values())
    crops = result["crops"]
    assert (crops["images"], crops["local_size"]) == (12, 14)
    for name, milliseconds in crops["milliseconds"].items():
        assert crops["per_second"][name] == pytest.approx(10_000 / milliseconds)
    assert len([line for line in said if "crops per second and core" in line]) == 2
    assert torch.get_num_threads() == threads


def test_both_sides_are_timed(photos: Path, against: ModuleType) -> None:
    result = against.compare(photos, image_size=32, repeats=2)
    for part, more in (("views", {"scaled", "cached"}), ("crops", set())):
        assert set(result[part]["milliseconds"]) == {"uint8", "float", "torchvision"} | more
        assert set(result[part]["times_as_fast"]) == {"uint8", "float"} | more
        assert all(ratio > 0 for ratio in result[part]["times_as_fast"].values())


def test_the_chains_end_with_the_same_kind_of_picture(against: ModuleType) -> None:
    file = io.BytesIO()
    Image.new("RGB", (80, 60), (200, 100, 50)).save(file, "JPEG", quality=95)
    theirs = against.torchvision_view(32)(file.getvalue())
    (ours,) = bench.view_ways(32)["float"](file.getvalue())
    assert theirs.shape == ours.shape == (3, 32, 32)
    assert torch.allclose(theirs, ours, atol=0.02)


def test_the_chains_of_crops_end_with_the_same_kind_of_pictures(against: ModuleType) -> None:
    """One grey level stays grey through hue and saturation; the other changes of colour are the
    same in the mean.
    """
    torch.manual_seed(0)
    random.seed(0)
    file = io.BytesIO()
    Image.new("RGB", (80, 60), (120, 120, 120)).save(file, "JPEG", quality=95)
    chains = (against.torchvision_crops(32, 16), bench.crop_ways(32, 16)["float"])
    theirs, ours = ([chain(file.getvalue()) for _ in range(200)] for chain in chains)
    shapes = [(3, 32, 32)] * 2 + [(3, 16, 16)] * 8
    assert [view.shape for view in theirs[0]] == [view.shape for view in ours[0]] == shapes
    for place in (0, 1, 2):
        means, spreads = zip(
            *(_level([crops[place] for crops in chain]) for chain in (theirs, ours)), strict=True
        )
        assert means[0] == pytest.approx(means[1], abs=0.12)
        assert spreads[0] == pytest.approx(spreads[1], abs=0.1)


def _level(views: list[torch.Tensor]) -> tuple[float, float]:
    levels = torch.stack([view.mean() for view in views])
    return levels.mean().item(), levels.std().item()


def test_what_cannot_be_timed_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the images of"):
        bench.bench_data(tmp_path)

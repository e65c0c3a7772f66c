"""benchmarks/maps.py: what the maps of a run follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

import patchmine
from fixtures.small_runs import DECODER, SMALL, VIT
from patchmine.backbones.positions import resize_positions
from patchmine.bench.settings import BenchStepSettings
from patchmine.bench.step import build_method
from patchmine.methods.amt import AMT
from patchmine.methods.hpm import HPM
from patchmine.methods.semaim import SemAIM

METHODS: dict[str, dict[str, Any]] = {
    "hpm": {**DECODER, "method.look": "masked", "method.predictor": "head"},
    "amt": DECODER,
    "semaim": {},
    "mae": DECODER,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder, noise = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for number in range(16):
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=noise)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def made(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], patchmine.Run]:
    runs = dict[str, patchmine.Run]()

    def make(method: str) -> patchmine.Run:
        if method not in runs:
            given = {**VIT, **SMALL, **METHODS[method], "steps": 2}
            out = tmp_path_factory.mktemp(method) / "run"
            runs[method] = patchmine.pretrain(data=images, out=out, method=method, **given)
        return runs[method]

    return make


@pytest.mark.parametrize("method", ["hpm", "amt", "semaim"])
def test_the_true_error_is_that_of_the_patches_that_are_hidden(
    method: str, made: Callable[[str], patchmine.Run], script: Callable[[str], ModuleType]
) -> None:
    maps = script("maps")
    trained = made(method).method().eval()
    assert isinstance(trained, HPM | AMT | SemAIM)
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(4, 3, 16, 16, generator=generator)
    error = maps.true_error(trained, views, 12)
    assert error.shape == (4, 16)
    assert torch.isfinite(error).all()  # each patch was hidden once at least
    slow, times = torch.zeros(4, 16), torch.zeros(4, 16)
    for index, found in maps.errors(trained, views, 12):
        for row in range(4):
            for place, value in zip(index[row].tolist(), found[row].tolist(), strict=True):
                slow[row, place] += value
                times[row, place] += 1
    torch.testing.assert_close(error, slow / times)
    for _, found in maps.maps_of(trained, views):
        assert found.shape == (4, 16)


@torch.no_grad()
def test_a_look_at_half_the_size_is_that_of_a_network_for_it(
    script: Callable[[str], ModuleType],
) -> None:
    options = {name.removeprefix("method."): value for name, value in DECODER.items()}
    sizes = {name: VIT[name] for name in ("model", "model_args", "patch_size")}
    whole, small = (
        build_method("hpm", options, BenchStepSettings(**sizes, image_size=size))
        for size in (16, 8)
    )
    assert isinstance(whole, HPM)
    assert isinstance(small, HPM)
    assert whole.teacher is not None
    assert small.teacher is not None
    known = whole.teacher.state_dict()
    places = known["encoder.pos_embed"][0, 1:]
    few = resize_positions(places, (4, 4), (2, 2))
    known["encoder.pos_embed"] = torch.cat([known["encoder.pos_embed"][:, :1], few[None]], dim=1)
    small.teacher.load_state_dict(known)
    table = whole.teacher.decoder_input.pos_embed
    small.teacher.decoder_input.pos_embed = resize_positions(table, (4, 4), (2, 2))

    views = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    _, expected = small.ask_teachers(F.avg_pool2d(views, 2), True)
    found = script("mining_rows").half_size_look(whole, views)
    assert expected is not None
    # Between the middles of the few patches it is interpolated, outside of them constant.
    corners = found.reshape(3, 4, 4)[:, ::3, ::3]
    torch.testing.assert_close(corners.flatten(1), expected)


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        (
            "hpm",
            [
                "the true error",
                "whole image",
                *(f"{n} masked" for n in (1, 4, 16)),
                "half the size",
            ],
        ),
        ("amt", ["the true error", "attention of the class token"]),
        ("semaim", ["the true error", "similarity that orders"]),
    ],
)
def test_its_table_has_a_row_for_each_map(
    method: str,
    rows: list[str],
    images: Path,
    made: Callable[[str], patchmine.Run],
    script: Callable[[str], ModuleType],
) -> None:
    words = [str(made(method).path), str(images), "--masks", "12"]
    said = CliRunner().invoke(script("maps").main, words, catch_exceptions=False)
    assert [line.split("|")[1].strip() for line in said.output.splitlines()[2:]] == rows


def test_odd_grids_are_not_halved(
    images: Path, tmp_path: Path, script: Callable[[str], ModuleType]
) -> None:
    given = {**VIT, **SMALL, **DECODER, "image_size": 12, "method": "hpm", "steps": 1}
    run = patchmine.pretrain(data=images, out=tmp_path / "run", **given)
    words = [str(run.path), str(images), "--masks", "12"]
    said = CliRunner().invoke(script("maps").main, words, catch_exceptions=False)
    assert said.exit_code == 0
    assert "half the size" not in said.output


def test_clips_have_maps_too(tmp_path: Path, script: Callable[[str], ModuleType]) -> None:
    tiny = {"model_args": VIT["model_args"], "patch_size": 16, "clip.frames": 4, "batch_size": 4}
    given = {**SMALL, **DECODER, **tiny, "method": "hpm", "steps": 1, "epochs": None}
    run = patchmine.pretrain(recipe="moving-photos", out=tmp_path / "run", **given)
    words = [str(run.path), "embedded:moving-photos/test", "--images", "4", "--masks", "8"]
    said = CliRunner().invoke(script("maps").main, words, catch_exceptions=False)
    rows = [line.split("|")[1].strip() for line in said.output.splitlines()[2:]]
    assert rows == ["the true error", "whole image", *(f"{n} masked" for n in (1, 4, 16))]


def test_another_method_is_refused(
    images: Path, made: Callable[[str], patchmine.Run], script: Callable[[str], ModuleType]
) -> None:
    said = CliRunner().invoke(script("maps").main, [str(made("mae").path), str(images)])
    assert said.exit_code == 2
    assert "give a run of HPM, AMT or SemAIM" in said.output

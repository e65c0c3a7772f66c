"""What training has added to its start: the interval, the words, and exactly that start."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchmine
from fixtures.small_runs import SMALL, VIT
from patchmine.evaluate.evaluated import open_evaluated
from patchmine.evaluate.paired import (
    Change,
    accuracy_interval,
    change_between,
    images_to_tell,
    unpaired_interval,
)
from patchmine.methods import METHODS
from patchmine.train import loop

WIDER = {"embed_dim": 32, "depth": 2, "num_heads": 2}
TINY: dict[str, Any] = SMALL | VIT | {"model_args": WIDER, "steps": 1}
OF_METHODS: dict[str, Any] = {
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "out_dim": 16,
    "head_hidden": 16,
    "thead_heads": 2,
    "partner_model": "resnet18",
    "partner_args": {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]},
}


def train(data: Path, out: Path, method: str = "mae", **settings: Any) -> patchmine.Run:
    fields = METHODS[method].model_fields
    own = {f"method.{name}": value for name, value in OF_METHODS.items() if name in fields}
    crops = {"crops.num_local": 2, "crops.local_size": 8}
    given = {**TINY, **own, **crops, "method": method, **settings}
    return patchmine.pretrain(data=data, out=out, **given)


@pytest.fixture(scope="module")
def first(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with 4x4 patches, that others start from."""
    out = tmp_path_factory.mktemp("first") / "run"
    return train(image_folder, out, seed=3, blr=0.1, steps=3).path


# ---- the interval ----


def test_of_the_same_images_only_those_count_that_changed() -> None:
    before = torch.tensor([True, True, False, False, False])
    after = torch.tensor([True, False, True, True, False])
    assert change_between(before, after) == Change(gained=2, lost=1, images=5)
    assert Change(2, 1, 5).points == pytest.approx(20)


@pytest.mark.parametrize(("gained", "lost", "images"), [(9, 4, 60), (0, 0, 30), (40, 2, 400)])
def test_the_interval_is_that_of_agresti_and_min(gained: int, lost: int, images: int) -> None:
    """Their formula as they write it, with n12 and n21."""
    n12, n21, n = gained + 0.5, lost + 0.5, images + 2
    width = 1.959964 / n * math.sqrt(n12 + n21 - (n12 - n21) ** 2 / n)
    low, high = Change(gained, lost, images).interval
    assert low == pytest.approx(100 * ((n12 - n21) / n - width))
    assert high == pytest.approx(100 * ((n12 - n21) / n + width))


def test_the_interval_holds_what_it_says() -> None:
    """Of 2,000 draws of 150 images, some 95 % of the intervals hold the true difference."""
    generator = torch.Generator().manual_seed(0)
    chances = torch.tensor([0.5, 0.15, 0.05, 0.3])  # both right, gained, lost, both wrong
    drawn = torch.multinomial(chances, 2_000 * 150, replacement=True, generator=generator)
    counts = torch.stack([(drawn.view(2_000, 150) == cell).sum(1) for cell in (1, 2)], 1)
    held = [low <= 10 <= high for low, high in (Change(*c, 150).interval for c in counts.tolist())]
    assert 0.94 <= sum(held) / len(held) <= 0.97


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (Change(120, 44, 2_000), "Adapting helped: kNN 71.2 before, 75.0 after (+3.8 points; "),
        (Change(44, 120, 2_000), "Adapting made it worse: kNN 71.2 before, 75.0 after (-3.8 poi"),
        (
            Change(9, 7, 2_000),
            "It cannot be told whether adapting helped: kNN 71.2 before, 75.0 aft",
        ),
    ],
)
def test_the_sentence_says_it_plainly(change: Change, words: str) -> None:
    sentence = change.sentence("knn", 71.2, 75.0, "image")
    assert sentence.startswith(words)
    assert "95 % interval" in sentence
    assert sentence.endswith("on 2,000 images).")


# ---- the start ----


@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_what_training_began_from(
    method: str, first: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: dict[str, torch.Tensor] = {}
    train_as_ever = loop.train

    def watched(task: Any, *given: Any, **named: Any) -> Any:
        begun.update({name: t.clone() for name, t in task.encoder.state_dict().items()})
        return train_as_ever(task, *given, **named)

    monkeypatch.setattr("patchmine.training.place.train", watched)
    run = train(image_folder, tmp_path / "run", method, init=str(first), image_size=24, blr=0.1)
    start = open_evaluated(run.path).start()
    assert start is not None
    assert start.encoder is not None
    own = start.encoder.state_dict()
    assert own.keys() == begun.keys()
    assert all(torch.equal(own[name], begun[name]) for name in own)
    trained = run.encoder().state_dict()
    assert any(not torch.equal(own[name], trained[name]) for name in own)


def test_what_began_at_random_has_no_start(first: Path) -> None:
    assert open_evaluated(first).start() is None
    assert open_evaluated(first / "export").start() is None


def test_another_image_size_is_that_of_both(
    first: Path, image_folder: Path, tmp_path: Path
) -> None:
    run = train(image_folder, tmp_path / "run", init=str(first))
    start = open_evaluated(run.path, image_size=(24, 32), crop_pct=0.5).start()
    assert start is not None
    assert (start.input.image_size, start.crop_pct) == ((24, 32), 0.5)
    assert start.encoder is not None
    assert start.encoder.pos_embed.shape[1] == 6 * 8 + 1


def test_an_untrained_run_is_as_good_as_its_start(
    first: Path, image_folder: Path, tmp_path: Path
) -> None:
    run = train(image_folder, tmp_path / "run", init=str(first), blr=1e-30)
    result = run.eval_knn(image_folder, baselines=True, workers=0, say=lambda _: None)
    assert list(result["baselines"]) == ["start", "random_init", "raw_pixels"]
    assert result["baselines"]["start"]["by_k"] == result["by_k"]
    since = result["since_start"]
    assert (since["gained"], since["lost"], since["points"]) == (0, 0, 0)
    assert result["baselines"]["start"]["change"] == since
    others = result["baselines"]["random_init"]
    assert others["change"]["points"] == pytest.approx(result["top1"] - others["top1"])
    assert others["change"]["images"] == result["images"]["test_read"]
    verdict = result["notes"][0]
    assert verdict.startswith("It cannot be told whether adapting helped: kNN ")
    assert json.loads((run.eval_dir / "knn.json").read_text()) == result
    page = patchmine.write_report([run.path], tmp_path / "report.html").read_text()
    assert verdict.split(":")[0] in page
    assert "at the start" in page
    quality = run.eval_quality(image_folder, baselines=True, workers=0, say=lambda _: None)
    assert quality["baselines"]["start"]["rankme"] == pytest.approx(quality["rankme"], rel=1e-5)


def test_a_start_that_is_gone_is_said_and_the_others_are_measured(
    first: Path, image_folder: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(first, moved)
    run = train(image_folder, tmp_path / "run", init=str(moved))
    shutil.rmtree(moved)
    said: list[str] = []
    result = run.eval_knn(image_folder, baselines=True, workers=0, say=said.append)
    assert list(result["baselines"]) == ["random_init", "raw_pixels"]
    (sentence,) = [each for each in said if "start" in each]
    assert sentence == (
        f"the baseline start is left out: init={moved}, which {run.path} began from, is no longer "
        "there (or not from this folder)"
    )


def test_a_partner_has_no_start(first: Path, image_folder: Path, tmp_path: Path) -> None:
    run = train(image_folder, tmp_path / "run", "mokd", init=str(first))
    how: dict[str, Any] = dict(baselines=True, workers=0, say=lambda _: None)
    assert "start" not in run.eval_knn(image_folder, weights="partner", **how)["baselines"]
    assert "start" in run.eval_knn(image_folder, weights="teacher", **how)["baselines"]


@pytest.mark.parametrize(
    ("right", "images", "low", "high"),
    [(0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0), (81, 263, 25.53, 36.62)],
)
def test_the_interval_of_an_accuracy_is_wilsons(
    right: int, images: int, low: float, high: float
) -> None:
    """The last is an example of Newcombe, Statistics in Medicine 17 (1998), table I."""
    found = accuracy_interval(100 * right / images, images)
    assert found == pytest.approx([low, high], abs=0.01)


def test_an_unpaired_interval_is_the_published_one() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table II, example (a), method 10
    low, high = unpaired_interval((100 * 56 / 70, 100 * 48 / 80), (70, 80))
    assert (low, high) == (pytest.approx(5.24, abs=0.01), pytest.approx(33.39, abs=0.01))
    assert unpaired_interval((60.0, 80.0), (80, 70)) == (pytest.approx(-high), pytest.approx(-low))


def test_so_many_images_tell_a_difference_four_times_in_five() -> None:
    draw = np.random.default_rng(0)
    enough = images_to_tell(2.0, unpaired_interval((52.0, 50.0), (1000, 1000)), 1000)
    count = round(enough)
    told = 0
    for _ in range(400):
        shares = [100 * draw.binomial(count, chance) / count for chance in (0.52, 0.50)]
        told += unpaired_interval((shares[0], shares[1]), (count, count))[0] > 0
    assert told / 400 == pytest.approx(0.8, abs=0.06)
    assert images_to_tell(0.0, (-1.0, 1.0), 10) == float("inf")

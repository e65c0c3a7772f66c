"""Runs with parts of the labels from several starts, put together into one verdict."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import draw_images
from PIL import Image

import patchmine
from fixtures.small_runs import DECODER
from patchmine.config.resolve import from_settings, of_kind
from patchmine.config.schema import FinetuneConfig
from patchmine.data.items import IMAGE
from patchmine.errors import UserError
from patchmine.training.labels import divide, open_parts
from spoken import patchmine_says

TUNE: dict[str, Any] = {
    "batch_size": 8,
    "epochs": 1,
    "warmup_epochs": 0,
    "workers": 0,
    "tensorboard": False,
    "sample_every": 1000,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("labelled") / "images", 40, ("cat", "dog"))


@pytest.fixture(scope="module")
def backbone(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("backbone") / "mae"
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    model = dict(model="vit_tiny_patch16_224", model_args=small, image_size=16, patch_size=4)
    settings = TUNE | model | DECODER | {"epochs": None, "steps": 1}
    return patchmine.pretrain(data=labelled, out=out, say=lambda _: None, **settings).path


@pytest.fixture(scope="module")
def verdict(backbone: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison, made by the command: 2 shares, 3 starts, 2 seeds."""
    out = tmp_path_factory.mktemp("verdict") / "verdict"
    words = words_of(backbone, labelled, out)
    said = patchmine_says("finetune", *words, "baselines=true", f"compare={backbone / 'export'}")
    assert "With 25 % of the labels, pre-trained weights reach" in " ".join(said.split())
    return out


def words_of(backbone: Path, labelled: Path, out: Path) -> list[str]:
    settings = TUNE | {"data": labelled, "out": out, "seeds": 2, "shares": "25%,100%"}
    return [str(backbone), *(f"{name}={value}" for name, value in settings.items())]


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "eval/shares.json").read_text())
    return found


def test_every_entry_is_the_mean_of_its_runs(verdict: Path) -> None:
    result = result_of(verdict)
    entries = {(entry["share"], entry["start"]): entry for entry in result["entries"]}
    starts = ("pretrained", "random_init", "export")
    assert set(entries) == {(share, start) for share in (0.25, 1.0) for start in starts}
    for (share, _), entry in entries.items():
        tests = [
            json.loads((verdict / run / "eval/test.json").read_text()) for run in entry["runs"]
        ]
        scores = [test["top1"] for test in tests]
        assert entry["scores"] == scores
        assert entry["top1"] == pytest.approx(statistics.fmean(scores))
        assert entry["std"] == pytest.approx(statistics.stdev(scores))
        assert entry["seeds"] == [0, 1]
        assert {test["images"]["train"] for test in tests} == {entry["images"]}
        assert (entry["images"], entry["steps"]) == ((8, 1) if share < 1 else (32, 4))
        assert {test["images"]["test"] for test in tests} == {8}


def test_all_starts_are_trained_alike_and_differ_in_their_weights(verdict: Path) -> None:
    starts = result_of(verdict)["starts"]
    assert starts["pretrained"]["init"].endswith("mae")
    assert starts["random_init"]["init"] is None
    runs = {run.name: patchmine.Run(run) for run in (verdict / "runs").iterdir()}
    assert len(runs) == 12
    first = runs["pretrained-25pct-seed0"].config.model_dump()
    other = runs["random_init-25pct-seed0"].config.model_dump()
    assert {key for key in first if first[key] != other[key]} == {"init", "out"}
    # The run and its export are the same weights, and all else is drawn alike: so are the results.
    for entry in result_of(verdict)["entries"]:
        if entry["start"] == "export":
            twin = dict(
                entry,
                start="pretrained",
                runs=[r.replace("export", "pretrained") for r in entry["runs"]],
            )
            assert twin in result_of(verdict)["entries"]


def test_the_same_command_goes_on(
    backbone: Path, labelled: Path, verdict: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "verdict"
    shutil.copytree(verdict, copy, symlinks=True)
    whole = result_of(verdict)
    (copy / "eval/shares.json").unlink()
    shutil.rmtree(copy / "runs/random_init-25pct-seed0")  # never begun
    half = patchmine.Run(copy / "runs/pretrained-100pct-seed1")  # killed before its test
    (half.eval_dir / "test.json").unlink()
    for folder in (copy / "runs").iterdir():
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace(str(verdict), str(copy)))
    kept = copy / "runs/pretrained-25pct-seed0/metrics.jsonl"
    before = kept.stat().st_mtime_ns
    words = [
        *words_of(backbone, labelled, copy),
        "baselines=true",
        f"compare={backbone / 'export'}",
    ]
    patchmine_says("finetune", *words)
    assert result_of(copy) == whole
    assert kept.stat().st_mtime_ns == before
    said = patchmine_says("finetune", *words, "blr=0.5", code=2)
    assert "blr (was 0.001, now 0.5)" in said
    said = patchmine_says("finetune", *words, f"test={labelled}", code=2)
    assert "tested on 8, but data and test give 10 and 40 now" in " ".join(said.split())


def test_the_report_opens_with_the_verdict(verdict: Path, backbone: Path, tmp_path: Path) -> None:
    page = patchmine.write_report([verdict], tmp_path / "report.html").read_text()
    assert page.index("pre-trained weights reach") < page.index("<table")
    assert "random init" in page
    both = patchmine.write_report([verdict, backbone], tmp_path / "both.html").read_text()
    assert both.index("pre-trained weights reach") < both.index('id="curves"')
    with Image.open(verdict / "shares.png") as picture:
        assert len(picture.getcolors(2**20) or []) > 100


def test_smaller_shares_are_parts_of_larger_ones(labelled: Path) -> None:
    def drawn(share: float, seed: int) -> set[int]:
        base = {"kind": "classify", "model": "vit_tiny_patch16_224"}
        given = from_settings(None, base=base, data=str(labelled), share=share, seed=seed, out="x")
        config = of_kind(given, FinetuneConfig)
        return set(np.asarray(divide(open_parts(config, IMAGE), config).train.indices).tolist())

    small, middle, whole = (drawn(share, 0) for share in (0.1, 0.5, 1))
    assert small < middle < whole
    assert drawn(0.1, 1) != small


def test_finished_runs_are_taken_for_what_they_are(
    backbone: Path, labelled: Path, verdict: Path, tmp_path: Path
) -> None:
    copy, data = tmp_path / "verdict", tmp_path / "images"
    shutil.copytree(verdict / "runs/pretrained-25pct-seed0", copy / "runs/pretrained-25pct-seed0")
    shutil.copytree(labelled, data)
    config = copy / "runs/pretrained-25pct-seed0/config.yaml"
    text = config.read_text().replace(str(verdict), str(copy)).replace(str(labelled), str(data))
    config.write_text(text)
    words = [*words_of(backbone, data, copy), "shares=25%", "seeds=1", "check=true"]
    assert "Settings and labels fit: 1 run" in patchmine_says("finetune", *words)
    test = copy / "runs/pretrained-25pct-seed0/eval/test.json"
    whole = test.read_text()
    counted = '{"images": {"train": %s, "test": 8}}'
    for damage in ("{", "[]", "{}", "[" * 100_000, "9" * 5_000, counted % '"8"', counted % "NaN"):
        test.write_text(damage)
        assert "test.json is no result" in patchmine_says("finetune", *words, code=2)
    words.remove("check=true")
    score = json.dumps(json.loads(whole)["top1"])
    for damage in ("NaN", "1e400", "1" + "0" * 400, "true", "null", '"high"'):
        test.write_text(whole.replace(f'"top1": {score}', f'"top1": {damage}', 1))
        assert "test.json has no top1" in patchmine_says("finetune", *words, code=2)
    words.append("check=true")
    test.write_text(whole)
    for image in sorted(data.rglob("*.png"))[:4]:
        image.unlink()
    said = patchmine_says("finetune", *words, code=2)
    assert "trained on 8 images and tested on 8, but data and test give" in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["shares=1%,100%"], ["share=1%", "empty", "6.3%"]),
        (["shares=0.5,20"], ["shares", "20"]),
        (["shares=some"], ["shares", "some"]),
        (["shares=10%,50%", "share=0.5"], ["share=50%", "shares"]),
        (["compare=nothing", "shares=50%"], ["nothing"]),
        (["seeds=0"], ["seeds"]),
        (["seeds=2", "devices=2"], ["devices=2"]),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    words: list[str], named: list[str], backbone: Path, labelled: Path, tmp_path: Path
) -> None:
    given = [f"data={labelled}", f"out={tmp_path / 'run'}", "workers=0", *words]
    said = " ".join(patchmine_says("finetune", str(backbone), *given, code=2).split())
    assert all(name in said for name in named), said
    assert not (tmp_path / "run").exists()


def test_numbers_are_compared_by_their_own_score(
    backbone: Path, labelled: Path, tmp_path: Path
) -> None:
    files = sorted(labelled.rglob("*.png"))
    rows = [f"{path.relative_to(labelled)},{number % 7}" for number, path in enumerate(files)]
    (tmp_path / "ages.csv").write_text("\n".join(["file,age", *rows]))
    settings = TUNE | dict(labels=tmp_path / "ages.csv", loss="mse", out=tmp_path / "verdict")
    result = patchmine.compare_shares(
        backbone, data=labelled, shares=["50%"], baselines=False, say=lambda _: None, **settings
    )
    (entry,) = result["entries"]
    run = patchmine.Run(tmp_path / "verdict" / entry["runs"][0])
    assert entry["r2"] == json.loads((run.eval_dir / "test.json").read_text())["r2"]
    assert (result["metric"], entry["std"], entry["images"]) == ("r2", None, 16)
    assert (tmp_path / "verdict/shares.png").is_file()


def test_random_weights_are_no_baseline_of_themselves(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="baselines=true, but vit_tiny_patch16_224"):
        patchmine.compare_shares("vit_tiny_patch16_224", data=labelled, out=tmp_path / "run")


def test_a_check_of_a_comparison_trains_nothing(
    backbone: Path, labelled: Path, tmp_path: Path
) -> None:
    words = [*words_of(backbone, labelled, tmp_path / "run"), "check=true", "baselines=true"]
    assert "8 runs" in patchmine_says("finetune", *words)
    assert not (tmp_path / "run").exists()

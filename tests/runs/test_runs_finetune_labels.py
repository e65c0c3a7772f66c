"""Labels of a fine-tuned run: torch datasets, classes that a part lacks, labels that are rare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import draw_images
from torch.utils.data import Dataset

import patchmine
from patchmine.config.resolve import from_settings, of_kind
from patchmine.config.schema import FinetuneConfig
from patchmine.data.items import IMAGE
from patchmine.errors import UserError
from patchmine.training.labels import Labelled, open_labelled_parts
from spoken import patchmine_says

TUNE: dict[str, Any] = {
    "model_args": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "image_size": 16,
    "patch_size": 8,
    "batch_size": 4,
    "epochs": 1,
    "warmup_epochs": 0,
    "workers": 0,
    "tensorboard": False,
    "sample_every": 1000,
    "device": "cpu",
    "say": lambda _: None,
}
MODEL = "vit_tiny_patch16_224"


class Pairs(Dataset[Any]):
    """Images with the number of a class each."""

    def __init__(self, labels: list[int], classes: list[str] | None = None) -> None:
        self.labels = labels
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, 20, 20), generator=generator, dtype=torch.uint8)
        return image, self.labels[index]


class Bare(Pairs):
    """Images alone."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)[0]


class Endless(Dataset[Any]):
    """Has no length."""

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(3, 20, 20, dtype=torch.uint8), 0


NAMES = ["cat", "dog"]


def parts_of(said: list[str] | None = None, **settings: Any) -> Labelled:
    base = {"kind": "classify", "model": MODEL}
    config = of_kind(from_settings(None, base=base, out="x", **settings), FinetuneConfig)
    return open_labelled_parts(config, IMAGE, ([] if said is None else said).append)


def test_a_torch_dataset_is_learnt_and_resumed(tmp_path: Path) -> None:
    data, test = Pairs([0, 1] * 6, NAMES), Pairs([1, 1, 0], NAMES)
    given = {**TUNE, "data": data, "test": test, "val": Pairs([0, 1], NAMES)}
    run = patchmine.finetune(MODEL, out=tmp_path / "run", **given)
    result = json.loads((run.eval_dir / "test.json").read_text())
    assert (result["classes"], result["images"]["test"]) == (NAMES, 3)
    assert (run.config.data, run.config.test, run.config.val) == ("python:Pairs",) * 3
    (run.eval_dir / "test.json").unlink()
    with pytest.raises(UserError, match=r"patchmine\.resume\(path, data=dataset\)"):
        patchmine.resume(run.path, say=lambda _: None)
    again: dict[str, Any] = {"say": lambda _: None, "test": test, "val": given["val"]}
    with pytest.raises(UserError, match="other"):
        patchmine.resume(run.path, data=Pairs([1, 0] * 6, NAMES), **again)
    patchmine.resume(run.path, data=data, **again)
    assert json.loads((run.eval_dir / "test.json").read_text()) == result


def test_a_dataset_without_a_part_to_test_on_is_divided(tmp_path: Path) -> None:
    result = patchmine.compare_shares(
        MODEL, data=Pairs([0, 1] * 5), baselines=False, shares=["50%"], out=tmp_path, **TUNE
    )
    assert result["entries"][0]["images"] == 4
    run = patchmine.Run(tmp_path / result["entries"][0]["runs"][0])
    assert run.config.classes == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "dataset", "message"),
    [
        ("data", Bare([0, 1]), "data=Bare has no labels.* pair of an image and the number"),
        ("test", Bare([0, 1]), "test=Bare has no labels"),
        ("data", Pairs([0, 2], NAMES), "data=Pairs: the classes are 0 to 2, and there are 2 names"),
        ("data", Pairs([0, 1, -1]), "data=Pairs: the class of an item is -1"),
        ("test", Pairs([0, 5]), "class '5' of test=Pairs"),
        ("val", Endless(), "val=Endless: the dataset must have a length"),
        ("data", Endless(), "data=Endless: the dataset must have a length"),
    ],
)
def test_what_is_wrong_with_a_dataset_is_one_sentence(
    name: str, dataset: Any, message: str, tmp_path: Path
) -> None:
    given = {**TUNE, "data": Pairs([0, 1] * 5), name: dataset}
    with pytest.raises(UserError, match=message):
        patchmine.finetune(MODEL, out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_table_beside_a_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("file,label\n")
    with pytest.raises(UserError, match="which a torch dataset does not have"):
        patchmine.finetune(
            MODEL, data=Pairs([0, 1]), labels=tmp_path / "x.csv", out=tmp_path / "run", **TUNE
        )


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("three") / "images", 30, ("cat", "cow", "dog"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("two") / "images", 8, ("cat", "dog"))


def table_of(place: Path, *folders: Path) -> Path:
    rows = [
        f"{file.relative_to(folder)},{file.parent.name}"
        for folder in folders
        for file in sorted(folder.rglob("*.png"))
    ]
    place.write_text("\n".join(["file,label", *rows]) + "\n")
    return place


def test_a_class_that_is_not_tested_is_a_note(three: Path, two: Path) -> None:
    said: list[str] = []
    parts = parts_of(said, data=str(three), test=str(two), val=str(two))
    assert parts.val is not None
    assert parts.names == parts.val.names == parts.test.names == ["cat", "cow", "dog"]
    assert set(np.asarray(parts.val.targets).tolist()) == {0, 2}
    assert "1 class has no image to be tested on: 'cow'" in said[-1]
    assert "1 class has no image to be chosen by: 'cow'" in said[-1]


def test_its_result_is_null(three: Path, two: Path, tmp_path: Path) -> None:
    run = patchmine.finetune(MODEL, data=three, test=two, out=tmp_path / "run", **TUNE)
    result = json.loads((run.eval_dir / "test.json").read_text())
    assert result["per_class"]["cow"]["top1"] is None
    assert result["per_class"]["cow"]["count"] == 0


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_class_that_is_not_learnt_is_named_with_a_file(
    name: str, three: Path, two: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"class 'cow' of {name}=.*cow/\S+\.png"):
        parts_of(data=str(two), **{name: str(three)})
    moved = tmp_path / "others"
    moved.mkdir()
    for file in sorted(three.rglob("*.png")):
        target = moved / file.parent.name / f"other-{file.name}"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    table = table_of(tmp_path / "x.csv", two, moved)
    given: dict[str, Any] = {"labels": str(table), "data": str(two), name: str(moved)}
    with pytest.raises(UserError, match=r"cow/other-\S+\.png has the label 'cow'"):
        parts_of(**given)
    said: list[str] = []
    parts_of(said, **{**given, "data": str(moved), name: str(two)})
    use = "tested on" if name == "test" else "chosen by"
    assert f"1 class has no image to be {use}: 'cow'" in said[-1]


def test_a_class_of_one_image_is_noted_for_tables_too(two: Path, tmp_path: Path) -> None:
    table = table_of(tmp_path / "x.csv", two)
    rows = table.read_text().splitlines()
    rows[1] = rows[1].split(",")[0] + ",cow"
    table.write_text("\n".join(rows))
    words = [MODEL, f"data={two}", f"labels={table}", f"out={tmp_path / 'run'}", "check=true"]
    said = patchmine_says("finetune", *words, "workers=0", "device=cpu")
    assert "1 class has one image, which is learnt from and never tested: 'cow'" in said
    assert "to be tested on" not in said


@pytest.fixture(scope="module")
def tags(three: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One label that most images have, one that one image has, and one of the last image."""
    files = sorted(three.rglob("*.png"))
    cells = {5: "common|rare", len(files) - 1: "common|late"}
    rows = [f"{f.relative_to(three)},{cells.get(n, 'common')}" for n, f in enumerate(files)]
    table = tmp_path_factory.mktemp("tags") / "tags.csv"
    table.write_text("\n".join(["file,tags", *rows]) + "\n")
    return table


def test_every_label_keeps_an_image_to_learn_from(three: Path, tags: Path) -> None:
    given: dict[str, Any] = {"data": str(three), "labels": str(tags), "loss": "bce"}
    drawn: list[set[int]] = []
    for share in (0.1, 0.3, 1):
        for seed in range(4):
            parts = parts_of(share=share, seed=seed, **given)
            assert (np.asarray(parts.train.targets) > 0).any(0).all()
            if seed == 0:
                drawn.append(set(parts.train.indices.tolist()))
    assert drawn[0] < drawn[1] < drawn[2]
    held = parts_of(share=0.5, val_share=0.4, **given)
    assert held.val is not None
    assert (np.asarray(held.train.targets) > 0).any(0).all()
    assert not set(held.train.indices.tolist()) & set(held.val.indices.tolist())
    with pytest.raises(UserError, match=r"no image with the label '\w+': take 8%"):
        parts_of(share=0.04, **given)


def test_a_check_looks_at_as_many_videos_as_it_says(tmp_path: Path) -> None:
    words = ["video_vit_tiny_patch16", "data=embedded:moving-photos", f"out={tmp_path / 'run'}"]
    small = ["image_size=32", "model_args={depth: 1}", "clip.frames=2", "clip.repeats=3"]
    given = [*words, *small, "batch_size=6", "workers=0", "device=cpu", "check=true"]
    said = patchmine_says("finetune", *given)
    read, tried = said.split(" videos that were tried")[0].split()[-3::2]
    assert read == tried

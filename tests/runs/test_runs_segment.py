"""Segmentation from a backbone to a tested run, as users meet it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import patchmine
from fixtures.label_maps import write_label_maps
from fixtures.small_runs import DECODER, SMALL, assert_near, made_by_two
from patchmine.errors import UserError
from patchmine.runs.folder import RunFolder
from patchmine.train.checkpoint import load
from spoken import patchmine_says

MODEL: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"embed_dim": 32, "depth": 4, "num_heads": 2},
    "image_size": 24,
    "patch_size": 4,
    "blr": 1e-2,
    **SMALL,
}
TEACH: dict[str, Any] = {"batch_size": 4, "steps": 6, "blr": 5e-2, **SMALL}


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_label_maps(tmp_path_factory.mktemp("maps"), {"train": 8, "val": 2, "test": 3})


@pytest.fixture(scope="module")
def backbone(maps: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("backbone") / "mae"
    images = maps / "train" / "images"
    return patchmine.pretrain(data=images, out=out, steps=2, batch_size=4, **MODEL, **DECODER).path


def teach(backbone: Path | str, data: Path, out: Path, **settings: Any) -> patchmine.Run:
    return patchmine.segment(backbone, data=str(data), out=out, **{**TEACH, **settings})


@pytest.fixture(scope="module")
def taught(backbone: Path, maps: Path, tmp_path_factory: pytest.TempPathFactory) -> patchmine.Run:
    return teach(backbone, maps, tmp_path_factory.mktemp("taught") / "run", steps=40)


def test_a_run_is_tested_on_whole_images(taught: patchmine.Run, backbone: Path) -> None:
    result = json.loads((taught.eval_dir / "test.json").read_text())
    assert result["classes"] == ["0", "1", "2"]
    assert set(result["per_class"]) == {"0", "1", "2"}
    assert result["miou"] > 60  # classes differ in colour
    assert result["images"]["test"] == 3
    assert result["chosen_by"] == "validation on 2 images"
    exported = timm.create_model(f"local-dir:{taught.export_dir}", pretrained=True)
    weight = taught.encoder().blocks[0].attn.qkv.weight
    assert torch.equal(exported.blocks[0].attn.qkv.weight, weight)
    assert not torch.equal(RunFolder(backbone).encoder().blocks[0].attn.qkv.weight, weight)
    best = max(line["eval"]["miou"] for line in taught.metrics() if "eval" in line)
    assert load((taught.checkpoint_dir / "best").resolve()).facts["best"]["score"] == best


@pytest.mark.parametrize(
    "settings",
    [
        {"head": "upernet", "head_width": 16, "dice": 1.0},
        {"head": "dpt", "head_width": 16, "focal": 2.0},
        {"head": "eomt", "queries": 6},
        {"head": "eomt", "queries": 6, "query_blocks": 2, "trainable": "none"},
        {"head": "eomt", "queries": 6, "trainable": "lora:2"},
        {"trainable": "none", "balance": True},
        {"trainable": "lora:2"},
    ],
)
def test_heads_and_losses(
    settings: dict[str, Any], backbone: Path, maps: Path, tmp_path: Path
) -> None:
    run = teach(backbone, maps, tmp_path / "run", steps=4, log_every=1, **settings)
    losses = [line for line in run.metrics() if "loss" in line]
    assert all(np.isfinite(line["loss"]) for line in losses)
    of_masks = settings.get("head") == "eomt"
    assert ("dice" in losses[0]) is ("dice" in settings or of_masks)
    assert ("mask" in losses[0]) is of_masks
    assert ("auxiliary" in losses[0]) is (settings.get("head") == "upernet")
    before = RunFolder(backbone).encoder().blocks[0].attn.qkv.weight
    after = run.encoder().blocks[0].attn.qkv.weight
    assert torch.equal(before, after) is (settings.get("trainable") == "none")


def test_a_resnet_segments(maps: Path, tmp_path: Path) -> None:
    run = teach("resnet18", maps, tmp_path / "run", steps=2, image_size=32)
    assert 0 <= json.loads((run.eval_dir / "test.json").read_text())["miou"] <= 100


def test_colours_and_share(maps: Path, backbone: Path, tmp_path: Path) -> None:
    data = shutil.copytree(maps, tmp_path / "maps")
    colours = np.array([[0, 0, 0], [128, 64, 128], [9, 9, 200]], np.uint8)
    for file in data.rglob("*.png"):
        labels = np.asarray(Image.open(file))
        picture = np.where((labels == 255)[..., None], 255, colours[labels % 255])
        Image.fromarray(picture.astype(np.uint8)).save(file)
    palette = {"ground": [0, 0, 0], "road": [128, 64, 128], "sea": [9, 9, 200]}
    palette["ignore"] = [255, 255, 255]
    run = teach(backbone, data, tmp_path / "run", palette=palette, share="50%")
    result = json.loads((run.eval_dir / "test.json").read_text())
    assert result["classes"] == ["ground", "road", "sea"]
    assert result["images"]["train"] == 4
    with pytest.raises(UserError, match=r"colour picture where class numbers .*palette="):
        teach(backbone, data, tmp_path / "other")


@pytest.mark.parametrize(
    "head", [{"head": "upernet", "head_width": 16}, {"head": "eomt", "queries": 6}]
)
def test_resumed_in_mid_epoch_with_workers_it_is_the_same(
    head: dict[str, Any], backbone: Path, maps: Path, tmp_path: Path, weights: Any
) -> None:
    settings = dict(head, steps=5, checkpoint_every=3, drop_path=0.2)
    whole = teach(backbone, maps, tmp_path / "whole", **settings, keep_checkpoints=9)
    cut = shutil.copytree(whole.path, tmp_path / "cut")
    for file in (*cut.glob("checkpoints/*5*"), cut / "eval" / "test.json"):
        file.unlink()
    (cut / "checkpoints" / "last").unlink()
    patchmine.resume(cut, workers=1, say=lambda _: None)
    first, second = weights(whole), weights(cut)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert (cut / "eval" / "test.json").read_text() == (whole.eval_dir / "test.json").read_text()


def test_a_run_is_extended(taught: patchmine.Run, tmp_path: Path) -> None:
    longer = taught.extend(tmp_path / "longer", steps=2, say=lambda _: None)
    assert longer.config.kind == "segment"
    assert longer.metrics()[-1]["step"] == 2


def test_a_check_lists_all_that_is_wrong(backbone: Path, maps: Path, tmp_path: Path) -> None:
    data = shutil.copytree(maps, tmp_path / "maps")
    words = [str(backbone), f"data={data}", f"out={tmp_path / 'run'}", "workers=0"]
    said = patchmine_says("segment", *words, "check=true")
    assert "3 classes; 8 for train, 2 for val, 3 for test" in said
    Image.new("L", (7, 9)).save(data / "train" / "labels" / "000.png")
    Image.new("RGB", (48, 40), (1, 2, 3)).save(data / "train" / "labels" / "001.png")
    (data / "test" / "labels" / "002.png").write_bytes(b"none")
    said = patchmine_says("segment", *words, "check=true", code=2)
    for told in ("3 faults", "000.png is 7x9 pixels", "001.png is a colour picture", "002.png"):
        assert told in said
    assert not (tmp_path / "run").exists()
    assert "000.png is 7x9 pixels" in patchmine_says("segment", *words, code=2)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["classes=[a,b]"], "class 2, but there are 2 classes"),
        (["palette={a: 0, b: 0}"], "palette"),
        (["palette={a: 0, b: [1,2,3]}"], "palette"),
        (["test_stride=99"], "test_stride"),
        (["head=pyramid"], "head"),
        (["head=eomt", "focal=2"], "focal: given 2.0, which is not for head=eomt: leave it out"),
        (["queries=20"], "queries: given 20, which is not for head=linear: leave it out"),
        (["head=eomt", "query_blocks=5"], "query_blocks=5, but"),
        (["image_size=30"], "image_size"),
        (["labels=missing"], "labels"),
        (
            ["val_share=0.5"],
            "has val/, by which the best checkpoint is chosen: leave val_share out",
        ),
        (["share=1%"], "share=1% of 8 images is none"),
        (["ignore_index=0"], "values up to 255"),
        (["model=video_vit_small_patch16"], "reads videos"),
        (["mixup=1"], "mixup"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    words: list[str], named: str, backbone: Path, maps: Path, tmp_path: Path
) -> None:
    given = [f"data={maps}", f"out={tmp_path / 'run'}", "workers=0", *words]
    said = patchmine_says("segment", str(backbone), *given, code=2)
    assert named in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_what_training_and_tests_see_is_told(backbone: Path, maps: Path, tmp_path: Path) -> None:
    said: list[str] = []
    data = shutil.copytree(maps, tmp_path / "maps")
    shutil.rmtree(data / "test")
    run = teach(
        backbone, data, tmp_path / "run", steps=2, test_stride=20, val_share=0.25, say=said.append
    )
    assert any(
        "crops of 24x24 from images of 48x40 pixels (the median), enlarged 0.5 to 2 times" in line
        and "windows of 24x24 every 20 pixels" in line
        for line in said
    )
    result = json.loads((run.eval_dir / "test.json").read_text())  # val/ is what it is tested on
    assert (result["images"]["train"], result["images"]["test"]) == (6, 2)
    assert result["chosen_by"] == "validation on 2 images"
    with pytest.raises(UserError, match=r"patience=3, .* set val_share=0.1"):
        teach(backbone, data, tmp_path / "other", patience=3)


def test_a_turned_image_is_told_from_a_wrong_label_map(
    backbone: Path, maps: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(maps, tmp_path / "maps")
    file = data / "train" / "images" / "000.jpg"
    picture = Image.open(file)
    exif = picture.getexif()
    exif[0x0112] = 6  # a quarter turn
    picture.save(file, exif=exif)
    with pytest.raises(UserError, match=r"image .*000.jpg 40x48: its sides are exchanged.*EXIF"):
        teach(backbone, data, tmp_path / "run")


@pytest.mark.parametrize("kind", ["five channels", "16 bit"])
def test_other_images_than_rgb(kind: str, maps: Path, tmp_path: Path) -> None:
    data = shutil.copytree(maps, tmp_path / "maps")
    for file in data.rglob("*.jpg"):
        pixels = np.asarray(Image.open(file))
        if kind == "16 bit":
            Image.fromarray(200 * pixels[..., 0].astype(np.uint16)).save(file.with_suffix(".png"))
        else:
            np.save(file.with_suffix(".npy"), np.concatenate([pixels, pixels[..., :2]], axis=2))
        file.unlink()
    settings = {**MODEL, "steps": 2, "channels": 1 if kind == "16 bit" else 5}
    run = teach("vit_tiny_patch16_224", data, tmp_path / "run", **settings)
    config = run.config
    assert isinstance(config, patchmine.SegmentConfig)
    assert config.colour_jitter == 0
    assert 0 <= json.loads((run.eval_dir / "test.json").read_text())["miou"] <= 100


def test_masks_of_two_values_are_asked_for(backbone: Path, maps: Path, tmp_path: Path) -> None:
    data = shutil.copytree(maps, tmp_path / "maps")
    for file in data.rglob("*.png"):
        labels = np.asarray(Image.open(file))
        Image.fromarray(np.where(labels == 1, 255, 0).astype(np.uint8)).save(file)
    with pytest.raises(UserError, match=r"palette=\{background: 0, object: 255\}"):
        teach(backbone, data, tmp_path / "run")
    run = teach(backbone, data, tmp_path / "run", palette={"background": 0, "object": 255})
    assert run.config.classes == ["background", "object"]


def test_coco_files_are_label_maps(backbone: Path, maps: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for part in ("train", "val"):
        shutil.copytree(maps / "train" / "images", data / part)
        box = {"bbox": [4, 6, 20, 10], "segmentation": [[4, 6, 24, 6, 24, 16, 4, 16]]}
        content = {
            "images": [
                {"id": n, "file_name": f"{n:03d}.jpg", "height": 40, "width": 48} for n in range(8)
            ],
            "annotations": [
                {"id": n, "image_id": n, "category_id": 5, "area": 200, "iscrowd": 0, **box}
                for n in range(8)
            ],
            "categories": [{"id": 5, "name": "cell"}],
        }
        (data / part / "annotations.json").write_text(json.dumps(content))
    run = teach(backbone, data, tmp_path / "run", val_share=0.25, steps=3)
    result = json.loads((run.eval_dir / "test.json").read_text())
    assert result["classes"] == ["background", "cell"]
    assert result["per_class"]["cell"]["pixels"] == 8 * 20 * 10
    assert (result["images"]["train"], result["images"]["test"]) == (6, 8)
    longer = run.extend(tmp_path / "longer", steps=1, say=lambda _: None)
    assert longer.config.classes == ["background", "cell"]
    with pytest.raises(UserError, match=r"classes: given \['a', 'b'\], but the data name"):
        teach(backbone, data, tmp_path / "other", classes=["a", "b"])


def test_a_run_of_another_kind_says_so(
    taught: patchmine.Run, backbone: Path, maps: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="learned to segment and knows no classes of images"):
        taught.classify()
    with pytest.raises(UserError, match="was pre-trained and knows no classes of pixels"):
        RunFolder(backbone).segmenter()
    with pytest.raises(UserError, match=r"kind=segment.*no pre-training method"):
        taught.method()
    again = teach(taught.path, maps, tmp_path / "again")  # and yet serves as a start
    assert again.config.init == str(taught.path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "atol"),
    [
        ({"head": "upernet", "head_width": 16, "dice": 0.5}, 1e-5),
        # The keys' biases have no gradient but that of rounding, and Adam makes it large: the more
        # so, the larger a loss is.
        ({"head": "eomt", "queries": 6}, 5e-4),
    ],
)
def test_two_processes_give_what_one_gives(
    head: dict[str, Any], atol: float, backbone: Path, maps: Path, tmp_path: Path
) -> None:
    settings = dict(head, steps=4, val_share=0)
    one = teach(backbone, maps, tmp_path / "one", **settings)
    two = made_by_two("segment", backbone, maps, tmp_path / "two", {**TEACH, **settings})
    assert_near(one, two, atol=atol)
    scores = [json.loads((run.eval_dir / "test.json").read_text())["miou"] for run in (one, two)]
    assert scores[0] == pytest.approx(scores[1], abs=0.2)

"""Predictions of fine-tuned runs, as users meet them."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from drawn import draw_clips, draw_images
from PIL import Image
from safetensors.torch import load_file, save_file

import patchmine
from fixtures.small_runs import DECODER
from patchmine.data.decoding.decode import decode
from patchmine.data.items import IMAGE
from patchmine.data.settings import InputSettings
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError
from patchmine.evaluate.predict import predicted
from patchmine.evaluate.settings import PredictSettings
from spoken import patchmine_says

QUIET: dict[str, Any] = {"workers": 0, "device": "cpu", "say": lambda _: None}
MODEL: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "image_size": 16,
    "patch_size": 4,
    "steps": 1,
    "warmup_epochs": 0,
    "tensorboard": False,
    "sample_every": 1000,
    **QUIET,
}
CLASSES = ('a "cat", black', "file")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("labelled") / "images", 20, CLASSES)


@pytest.fixture(scope="module")
def table(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Numbers and several labels of each image."""
    place = tmp_path_factory.mktemp("table") / "labels.csv"
    with place.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["file", "size", "tags"])
        for number, path in enumerate(sorted(labelled.rglob("*.png"))):
            tags = "|".join(["big"] * (number % 2) + ["old"] * (number % 3 == 0))
            writer.writerow([path.relative_to(labelled), 1000 + 3 * number, tags])
    return place


@pytest.fixture(scope="module")
def backbone(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("backbone") / "mae"
    return patchmine.pretrain(data=labelled, out=out, batch_size=8, **MODEL, **DECODER).path


def tune(backbone: Path, data: Path, out: Path, **settings: Any) -> patchmine.Run:
    given = dict(batch_size=8, epochs=2, blr=1e-1, warmup_epochs=0, tensorboard=False, **QUIET)
    return patchmine.finetune(backbone, data=data, out=out, **{**given, **settings})


@pytest.fixture(scope="module")
def tuned(
    backbone: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory
) -> patchmine.Run:
    return tune(backbone, labelled, tmp_path_factory.mktemp("tuned") / "run")


@torch.no_grad()
def scores_one_by_one(run: patchmine.Run, data: Path) -> torch.Tensor:
    """(N, K) of the images in the order of their names, each read, cropped and scored alone."""
    config, network, source = run.config, run.classify(), open_source(data)
    view = IMAGE.plain_view(config, config.crop_pct)
    mean, std = (torch.tensor(each)[:, None, None] for each in (config.mean, config.std))
    rows = []
    for place in range(len(source)):
        image = view(source.read(place), np.random.default_rng(0)).views[0]
        rows.append(network.scores(((image / 255 - mean) / std)[None]))
    return torch.cat(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_a_table_says_file_class_and_probability(
    tuned: patchmine.Run, labelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "predictions.csv"
    said = patchmine_says(
        "predict", str(tuned.path), str(labelled), f"out={out}", "workers=0", "batch_size=7"
    )
    assert "20 of 20 images" in said
    rows = read_csv(out)
    assert list(rows[0]) == ["file", "class", "probability"]
    files = [str(path.relative_to(labelled)) for path in sorted(labelled.rglob("*.png"))]
    assert [row["file"] for row in rows] == files
    wanted = scores_one_by_one(tuned, labelled).softmax(1)
    assert [row["class"] for row in rows] == [CLASSES[k] for k in wanted.argmax(1)]
    found = torch.tensor([float(row["probability"]) for row in rows])
    torch.testing.assert_close(found, wanted.amax(1), rtol=1e-4, atol=1e-5)


def test_more_classes_stand_in_more_columns_and_python_has_the_same(
    tuned: patchmine.Run, labelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.parquet"
    assert tuned.predict(labelled, out, top=2, all=True, **QUIET) == out
    rows = pq.read_table(out).to_pydict()
    names = ["file", "class", "probability", "class_2", "probability_2", CLASSES[0], "file_"]
    assert list(rows) == names
    assert rows == tuned.predict(labelled, top=2, all=True, **QUIET)
    both = np.array([rows[CLASSES[0]], rows["file_"]])
    np.testing.assert_allclose(both.sum(0), 1, rtol=1e-5)
    np.testing.assert_array_equal(both.max(0), rows["probability"])
    np.testing.assert_array_equal(both.min(0), rows["probability_2"])
    assert all(one != two for one, two in zip(rows["class"], rows["class_2"], strict=True))
    single = sorted(labelled.rglob("*.png"))[3:5]
    alone = tuned.predict(single, top=2, all=True, **QUIET)
    assert alone.pop("file") == [str(path) for path in single]
    assert alone["class"] == rows["class"][3:5]
    assert alone["probability"] == pytest.approx(rows["probability"][3:5], rel=1e-5)
    few = tuned.predict([labelled / CLASSES[0], labelled / CLASSES[1]], **QUIET)
    assert few["file"] == [str(path) for path in sorted(labelled.rglob("*.png"))]


def test_a_folder_holds_pictures_too(tuned: patchmine.Run, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictions"
    assert tuned.predict(labelled, out, **QUIET) == out
    assert sorted(path.name for path in out.iterdir()) == ["predictions.csv", "predictions.png"]
    rows = read_csv(out / "predictions.csv")
    with Image.open(out / "predictions.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    # The image of the highest probability of the most frequent class is the first one.
    names = [row["class"] for row in rows]
    first = max(sorted(set(names)), key=names.count)
    best = max(
        (row for row in rows if row["class"] == first), key=lambda r: float(r["probability"])
    )
    image = decode((labelled / best["file"]).read_bytes(), 3, 10**9).permute(1, 2, 0).numpy()
    large = image.repeat(2, axis=0).repeat(2, axis=1)
    height, width = large.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(pixels[:, :400, 0], (height, width))
    hits = np.flatnonzero((windows[:, :, ::9, ::9] == large[::9, ::9, 0]).all((2, 3)))
    assert len(hits) == 1


def test_an_export_predicts_as_its_run_does(
    tuned: patchmine.Run, backbone: Path, labelled: Path, tmp_path: Path
) -> None:
    alone = shutil.copytree(tuned.export_dir, tmp_path / "alone")
    out = tmp_path / "p.csv"
    patchmine_says("predict", str(alone), f"data={labelled}", f"out={out}", "workers=0")
    rows, wanted = read_csv(out), tuned.predict(labelled, **QUIET)
    assert [row["file"] for row in rows] == wanted["file"]
    assert [row["class"] for row in rows] == wanted["class"]
    found = [float(row["probability"]) for row in rows]
    np.testing.assert_allclose(found, wanted["probability"], rtol=1e-5)
    given = [str(backbone / "export"), str(labelled), f"out={out}"]
    assert "without classifier" in patchmine_says("predict", *given, code=2)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("problem_type", ["single_label_classification"], "without classifier"),
        ("problem_type", "sorting", "without classifier"),
        ("label_names", [], "without classifier"),
        ("label_names", ["cat"], "has 1 names"),
        ("label_names", ["cat", "dog", "cow"], "has 3 names"),
        ("label_names", "xy", "no list of texts"),
        ("label_names", 7, "no list of texts"),
        ("label_names", [1, None], "no list of texts"),
        ("label_names", {"cat": 0, "dog": 1}, "no list of texts"),
    ],
)
def test_a_classifier_that_is_told_wrongly_is_refused(
    key: str, value: Any, named: str, tuned: patchmine.Run, labelled: Path, tmp_path: Path
) -> None:
    alone = shutil.copytree(tuned.export_dir, tmp_path / "alone")
    config = json.loads((alone / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps(config | {key: value}))
    given = [str(alone), str(labelled), f"out={tmp_path}/p.csv", "workers=0"]
    said = patchmine_says("predict", *given, code=2)
    assert str(alone) in said
    assert named in said


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda head: head * float("nan"), "classifier of .*weight has 64 of 64"),
        (lambda head: head[:, :-1], "31 features does not fit an encoder that gives 32"),
        (lambda head: head[0], "cannot be read"),
    ],
)
def test_a_damaged_classifier_is_refused(
    damage: Any, named: str, tuned: patchmine.Run, labelled: Path, tmp_path: Path
) -> None:
    alone = shutil.copytree(tuned.export_dir, tmp_path / "alone")
    tensors = load_file(alone / "model.safetensors")
    tensors["head.weight"] = damage(tensors["head.weight"]).contiguous()
    save_file(tensors, alone / "model.safetensors")
    given = [str(alone), str(labelled), f"out={tmp_path}/p.csv", "workers=0"]
    said = patchmine_says("predict", *given, code=2)
    assert re.search(named, " ".join(said.split()))


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("vit_tiny_patch16_224", {"global_pool": "token"}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}),
        ("vit_tiny_patch16_224", {"global_pool": "map"}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("resnet10t", {}),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}),
    ],
)
def test_a_classifier_that_timm_saved_predicts_as_in_timm(
    model: str, arguments: dict[str, Any], labelled: Path, tmp_path: Path
) -> None:
    if "patch" in model:
        arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1} | arguments
        arguments |= {"num_heads": 2}
    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=3, **arguments)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    told = {"label_names": ["cat", "dog", "other"]}
    timm.models.save_for_hf(
        network, tmp_path / "saved", told, model_args=arguments, safe_serialization=True
    )
    said: list[str] = []
    few = sorted(labelled.rglob("*.png"))[:4]
    question = PredictSettings(
        run=str(tmp_path / "saved"), data=list(map(str, few)), all=True, workers=0, device="cpu"
    )
    rows = predicted(question, said.append)
    assert any("each image is taken to be of one of them" in line for line in said)
    opened = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert list(rows) == ["file", "class", "probability", "cat", "dog", "other"]
    prepared = opened.pretrained_cfg
    size = tuple(prepared["input_size"][1:])
    view = IMAGE.plain_view(InputSettings(image_size=size), prepared["crop_pct"])
    mean, std = (torch.tensor(prepared[name])[:, None, None] for name in ("mean", "std"))
    for number, path in enumerate(few):
        image = view(path.read_bytes(), np.random.default_rng(0)).views[0]
        with torch.no_grad():
            (wanted,) = opened(((image / 255 - mean) / std)[None]).softmax(1)
        found = torch.tensor([rows[name][number] for name in told["label_names"]])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert rows["class"][number] == told["label_names"][int(wanted.argmax())]


def test_an_earlier_export_is_of_one_class_an_image(
    tuned: patchmine.Run, labelled: Path, tmp_path: Path
) -> None:
    folder, out = shutil.copytree(tuned.export_dir, tmp_path / "earlier"), tmp_path / "p.csv"
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("problem_type") == "single_label_classification"
    (folder / "config.json").write_text(json.dumps(config))
    said = patchmine_says("predict", str(folder), str(labelled), f"out={out}", "workers=0")
    assert "does not tell how its classes were learned" in said
    rows, wanted = read_csv(out), tuned.predict(labelled, **QUIET)
    assert [row["class"] for row in rows] == wanted["class"]
    found = [float(row["probability"]) for row in rows]
    np.testing.assert_allclose(found, wanted["probability"], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"label_names": None}, "of 2 scores, but nothing names them"),
        ({"label_names": ["a", "b", "c"]}, "num_classes=2 and 3 names"),
        ({"label_names": {"1": "b"}}, ""),
        ({"model_args": {"depth": 10**9}}, "1000000000 blocks"),
        ({"model_args": {"checkpoint_path": "x.pth"}}, "read or download"),
        ({"model_args": {"embed_dim": 16}}, "shape"),
    ],
)
def test_a_classifier_whose_description_is_wrong_is_refused(
    change: dict[str, Any], named: str, tuned: patchmine.Run, labelled: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tuned.export_dir, tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    del config["problem_type"]
    change = {
        name: {**config[name], **value} if name == "model_args" else value
        for name, value in change.items()
    }
    (folder / "config.json").write_text(json.dumps(config | change))
    words = ["predict", str(folder), str(labelled), f"out={tmp_path / 'p.csv'}", "workers=0"]
    if named:
        assert named in patchmine_says(*words, code=2)
        return
    patchmine_says(*words)
    assert {row["class"] for row in read_csv(tmp_path / "p.csv")} <= {"class 0", "b"}


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_labels_and_numbers_have_a_column_each(
    loss: str, backbone: Path, labelled: Path, table: Path, tmp_path: Path
) -> None:
    column = {"bce": "tags", "mse": "size"}[loss]
    run = tune(backbone, labelled, tmp_path / "run", labels=table, column=column, loss=loss)
    rows = run.predict(labelled, **QUIET)
    scores = scores_one_by_one(run, labelled)
    if loss == "mse":
        assert list(rows) == ["file", "size"]
        np.testing.assert_allclose(rows["size"], scores[:, 0], rtol=1e-5)
    else:
        assert list(rows) == ["file", "class", "big", "old"]
        p = scores.sigmoid()
        np.testing.assert_allclose(np.array([rows["big"], rows["old"]]).T, p, atol=1e-5)
        named = [
            "|".join(n for n, v in zip(["big", "old"], row, strict=True) if v > 0.5) for row in p
        ]
        assert rows["class"] == named
    out = tmp_path / "p.parquet"
    patchmine_says("predict", str(run.export_dir), str(labelled), f"out={out}", "workers=0")
    exported = pq.read_table(out).to_pydict()
    assert list(exported) == list(rows)
    np.testing.assert_allclose(exported[list(rows)[-1]], rows[list(rows)[-1]], rtol=1e-5)
    assert (run.predict(labelled, tmp_path / "both", **QUIET) / "predictions.png").is_file()
    with pytest.raises(UserError, match=f"top=2 .*loss={loss}"):
        run.predict(labelled, top=2, **QUIET)


def test_broken_images_are_skipped_up_to_a_share_and_odd_names_are_one_line(
    tuned: patchmine.Run, labelled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    picture = next(labelled.rglob("*.png"))
    for name in (b"caf\xe9.png", b"two\nlines.png", b'z, "quoted".png'):
        shutil.copy(picture, os.fsencode(folder) + b"/" + name)
    (folder / "empty.png").write_bytes(b"")
    out, said = tmp_path / "p.csv", []
    with pytest.raises(UserError, match=r"1 of 4 images .* max_bad_share"):
        tuned.predict(folder, out, **QUIET)
    assert not out.exists()
    tuned.predict(folder, out, **{**QUIET, "say": said.append}, max_bad_share=0.5)
    names = [row["file"] for row in read_csv(out)]
    assert sorted(names) == [r"caf\xe9.png", r"two\nlines.png", 'z, "quoted".png']
    assert any("1 of 4 images" in line for line in said)


def test_a_run_on_videos_predicts_videos(tmp_path: Path) -> None:
    clips = draw_clips(tmp_path / "clips", 8)
    labels = tmp_path / "labels.csv"
    rows = [f"{path.name},{'ab'[i % 2]}\n" for i, path in enumerate(sorted(clips.iterdir()))]
    labels.write_text("file,kind\n" + "".join(rows))
    run = tune(
        Path("video_vit_tiny_patch16"),
        clips,
        tmp_path / "run",
        labels=labels,
        column="kind",
        model_args={"depth": 1, "embed_dim": 24, "num_heads": 2},
        image_size=16,
        patch_size=8,
        epochs=1,
        batch_size=4,
        **{"clip.frames": 2, "clip.stride": 1},
    )
    one = run.predict(clips, all=True, **QUIET)
    assert one["file"] == [path.name for path in sorted(clips.iterdir())]
    exported = tmp_path / "p.csv"
    patchmine_says("predict", str(run.export_dir), str(clips), f"out={exported}", "workers=0")
    found = [float(row["probability"]) for row in read_csv(exported)]
    np.testing.assert_allclose(found, one["probability"], rtol=1e-5)
    several = run.predict(clips, all=True, segments=3, crops=2, **QUIET)
    assert several["file"] == one["file"]
    assert several["a"] != one["a"]
    np.testing.assert_allclose(np.add(several["a"], several["b"]), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["out=p.txt"], "out"),
        (["out=p.npz"], ".parquet"),
        (["top=0"], "top"),
        (["top=3"], "2 classes"),
        (["crops=2"], "crops=2"),
        (["data=nowhere"], "nowhere"),
        (["clases=2"], "clases"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    words: list[str],
    named: str,
    tuned: patchmine.Run,
    labelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = [] if words[0].startswith("data") else [str(labelled)]
    assert named in patchmine_says("predict", str(tuned.path), *data, *words, "workers=0", code=2)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_knows_no_classes_says_so(backbone: Path, labelled: Path) -> None:
    given = ["predict", str(backbone), str(labelled)]
    assert "patchmine finetune" in patchmine_says(*given, code=2)


def test_a_place_that_cannot_be_written_is_one_sentence(
    tuned: patchmine.Run, labelled: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match=r"out=.*file/predictions\.csv cannot be written"):
        tuned.predict(labelled, tmp_path / "file", **QUIET)

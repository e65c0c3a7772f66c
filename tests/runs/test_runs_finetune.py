"""Fine-tuning from a backbone to a tested, exported classifier, as users meet it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import torch
from drawn import draw_images
from safetensors.torch import load_file
from torch import nn

import patchmine
from fixtures.small_runs import DECODER, SMALL, assert_near, made_by_two
from patchmine.config.resolve import from_settings
from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import train_batches
from patchmine.errors import UserError
from patchmine.evaluate.paired import accuracy_interval
from patchmine.runs import preparing
from patchmine.runs.folder import RunFolder, build_classifier
from patchmine.train.checkpoint import load
from patchmine.train.engine import Engine
from patchmine.training.labels import open_labelled_parts
from spoken import patchmine_says

MODEL: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "image_size": 16,
    "patch_size": 4,
    "blr": 1e-2,
    **SMALL,
}
TUNE: dict[str, Any] = {"batch_size": 8, "epochs": 3, "blr": 1e-2, **SMALL}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("labelled") / "images", 40, ("cat", "dog"))


@pytest.fixture(scope="module")
def backbone(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("backbone") / "mae"
    return patchmine.pretrain(
        data=labelled, out=out, steps=2, batch_size=8, **MODEL, **DECODER
    ).path


def tune(backbone: Path | str, data: Path, out: Path, **settings: Any) -> patchmine.Run:
    return patchmine.finetune(backbone, data=data, out=out, **{**TUNE, **settings})


@pytest.fixture(scope="module")
def tuned(
    backbone: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory
) -> patchmine.Run:
    return tune(backbone, labelled, tmp_path_factory.mktemp("tuned") / "run", mixup=0.8, cutmix=1)


def test_a_run_is_tested_and_exported_with_its_classifier(
    tuned: patchmine.Run, backbone: Path
) -> None:
    result = json.loads((tuned.eval_dir / "test.json").read_text())
    assert result["classes"] == ["cat", "dog"]
    assert set(result["per_class"]) == {"cat", "dog"}
    assert 0 <= result["top1"] <= 100
    assert result["images"]["test"] == 8  # the last fifth of each class
    images = torch.randn(3, 3, 16, 16)
    exported = timm.create_model(f"local-dir:{tuned.export_dir}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(images), tuned.classifier()(images))
    config = json.loads((tuned.export_dir / "config.json").read_text())
    assert config["label_names"] == ["cat", "dog"]
    before = RunFolder(backbone).encoder().blocks[0].attn.qkv.weight
    assert not torch.equal(tuned.encoder().blocks[0].attn.qkv.weight, before)
    assert tuned.config.kind == "classify"
    assert tuned.metrics()[-1]["step"] == 12


def test_accuracies_are_told_and_kept_with_their_intervals(
    backbone: Path, labelled: Path, tmp_path: Path
) -> None:
    heard: list[str] = []
    run = tune(backbone, labelled, tmp_path / "run", val_share=0.3, epochs=1, say=heard.append)
    result = json.loads((run.eval_dir / "test.json").read_text())
    assert result["top1_interval"] == accuracy_interval(result["top1"], 8)
    low, high = result["top1_interval"]
    told = f"test top1 {result['top1']:.2f} % (95 % interval {low:.1f} to {high:.1f})"
    assert told in heard[-1]
    (val,) = (line["eval"] for line in run.metrics() if "eval" in line)
    low, high = val["top1_interval"]
    assert low <= val["top1"] <= high
    assert any(f"{val['top1']:.2f} (95 % interval {low:.1f} to" in text for text in heard)


def test_a_classifier_goes_to_onnx_and_transformers(tuned: patchmine.Run, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="`export` is not installed")
    pytest.importorskip("transformers", reason="the extra `export` is not installed")
    said: list[str] = []
    file = tuned.export(tmp_path / "x.onnx", to="onnx", say=said.append)
    folder = tuned.export(tmp_path / "folder", to="transformers", say=said.append)
    assert ["logits in onnxruntime" in said[0], "logits in transformers" in said[1]] == [True, True]
    session, images = onnxruntime.InferenceSession(file), torch.randn(3, 3, 16, 16)
    told = session.get_modelmeta().custom_metadata_map
    assert (told["loss"], json.loads(told["class_names"])) == ("ce", ["cat", "dog"])
    with torch.no_grad():
        wanted = tuned.classifier()(images)
    (found,) = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)
    written = load_file(folder / "model.safetensors")
    of_the_run = load_file(tuned.export_dir / "model.safetensors")
    assert written.keys() == of_the_run.keys()
    assert all(torch.equal(tensor, of_the_run[name]) for name, tensor in written.items())


def test_its_encoder_leaves_alone_where_that_is_asked_for(
    tuned: patchmine.Run, tmp_path: Path
) -> None:
    folder = tuned.export(tmp_path / "alone", what="encoder")
    opened, images = (
        timm.create_model(f"local-dir:{folder}", pretrained=True).eval(),
        torch.rand(2, 3, 16, 16),
    )
    assert opened.num_classes == 0
    with torch.no_grad():
        torch.testing.assert_close(opened(images), tuned.encoder()(images))


def test_the_encoder_of_a_tuned_run_serves_wherever_one_does(
    tuned: patchmine.Run, labelled: Path, tmp_path: Path
) -> None:
    assert "top1" in tuned.eval_knn(labelled, say=lambda _: None, workers=0, neighbours=(1,))
    assert tuned.embed(labelled, tmp_path / "x.npz", say=lambda _: None, workers=0).is_file()
    assert tuned.report(tmp_path / "report.html").is_file()
    with pytest.raises(UserError, match="fine-tuned"):
        tuned.method()
    with pytest.raises(UserError, match=r"what=full .* was fine-tuned: leave the setting out"):
        tuned.export(what="full")
    again = tune(tuned.path, labelled, tmp_path / "again", epochs=1)
    assert again.config.init == str(tuned.path)


@pytest.mark.bitwise
def test_a_run_resumes_to_the_same_bits(backbone: Path, labelled: Path, tmp_path: Path) -> None:
    settings = dict(mixup=0.8, cutmix=1, checkpoint_every=5, keep_checkpoints=9, erase_prob=0.5)
    settings |= dict(ema_decay=0.9, auto_augment="rand-m9-mstd0.5-inc1", val_share=0.25)
    whole = tune(backbone, labelled, tmp_path / "whole", **settings)
    parts = tune(backbone, labelled, tmp_path / "parts", **settings)
    for newest in parts.checkpoints[1:]:
        newest.unlink()
    (parts.checkpoint_dir / "best").unlink()
    (parts.eval_dir / "test.json").unlink()
    patchmine.resume(parts.path, workers=1, say=lambda _: None)
    for one, other in ((whole.checkpoint_dir, parts.checkpoint_dir), (whole.path, parts.path)):
        files = sorted(one.glob("step-*"))[-1:] or [one / "export/model.safetensors"]
        there = other / files[0].relative_to(one)
        first, second = load_file(files[0]), load_file(there)
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert (parts.eval_dir / "test.json").read_text() == (whole.eval_dir / "test.json").read_text()
    assert load(whole.checkpoint_dir / "best").step in (3, 6, 9)


def test_twenty_steps_equal_a_plain_loop_of_torch(
    backbone: Path, labelled: Path, tmp_path: Path
) -> None:
    """AdamW, layer decay, cosine, label smoothing and mean pooling as a timm script has them."""
    settings = dict(epochs=None, steps=20, drop_path=0, layer_decay=0.5, checkpoint_every=20)
    settings |= dict(warmup_epochs=2, clip_grad=1.0, min_lr=1e-4, head_std=0.02)
    run = tune(backbone, labelled, tmp_path / "run", **settings)
    config = run.config

    encoder = RunFolder(backbone).encoder()
    plain = timm.create_model(
        "vit_tiny_patch16_224",
        **{**MODEL["model_args"], "img_size": 16, "patch_size": 4},
        num_classes=2,
        global_pool="avg",
    )
    tensors = {
        name: tensor
        for name, tensor in encoder.state_dict().items()
        if not name.startswith("norm.")
    }
    told = plain.load_state_dict(tensors, strict=False)
    assert {name.split(".")[0] for name in told.missing_keys} == {"fc_norm", "head"}
    torch.manual_seed(config.seed)
    plain.head.load_state_dict(build_classifier(config, start_from=config.init).head.state_dict())
    groups = timm.optim.param_groups_layer_decay(
        plain, config.weight_decay, plain.no_weight_decay(), layer_decay=0.5
    )
    peak = config.blr * config.batch_size / 256
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999))
    loss_of = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    parts = open_labelled_parts(config, preparing.item_of(config), lambda _: None)
    batches = train_batches(
        parts.train,
        preparing.item_of(config).supervised_view(config, 4),
        config,
        config,
        seed=config.seed,
        steps=range(20),
        steps_per_epoch=4,
        bad=BadFiles(None, 0),
        targets=True,
    )
    for step, batch in enumerate(map(preparing.normaliser(config, Engine(device="cpu")), batches)):
        epoch = step / 4
        rate = peak * epoch / 2
        if epoch >= 2:
            wave = 0.5 * (1 + math.cos(math.pi * (epoch - 2) / (5 - 2)))
            rate = 1e-4 + (peak - 1e-4) * wave
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        optimizer.zero_grad()
        loss_of(plain(batch.views[0]), batch.target).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    exported = load_file(run.export_dir / "model.safetensors")
    for name, tensor in plain.state_dict().items():
        if name.endswith("qkv.bias"):  # of keys it moves no score, and Adam enlarges the rounding
            tensor, exported[name] = (
                torch.cat([part.chunk(3)[0], part.chunk(3)[2]]) for part in (tensor, exported[name])
            )
        torch.testing.assert_close(exported[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_the_best_checkpoint_is_kept_and_waiting_has_an_end(
    backbone: Path, labelled: Path, tmp_path: Path
) -> None:
    heard: list[str] = []
    run = tune(
        backbone, labelled, tmp_path / "run", epochs=50, val_share=0.3, patience=2, say=heard.append
    )
    best = load(run.checkpoint_dir / "best")
    newest = load(run.checkpoint_dir / "last")
    scores = {line["step"]: line["eval"]["top1"] for line in run.metrics() if "eval" in line}
    assert scores[best.step] == max(scores.values())
    per_epoch = best.step / round(best.step / 2) if best.step else 2
    assert newest.step - best.step >= 2
    assert newest.step < 100
    assert any("training ends" in text for text in heard), per_epoch
    resumed = patchmine.resume(run.path, say=lambda _: None)
    assert load(resumed.checkpoint_dir / "last").step == newest.step


def test_a_damaged_best_checkpoint_is_told(backbone: Path, labelled: Path, tmp_path: Path) -> None:
    run = tune(backbone, labelled, tmp_path / "run", epochs=1, val_share=0.3)
    best = (run.checkpoint_dir / "best").resolve()
    best.write_bytes(best.read_bytes()[:-100])
    with pytest.raises(UserError, match="best is damaged"):
        run.classifier()
    best.unlink()  # nor is another one taken without a word
    with pytest.raises(UserError, match=r"best is damaged .*missing"):
        run.classifier()


def test_settings_that_build_no_network_are_told_with_their_file(
    tuned: patchmine.Run, tmp_path: Path
) -> None:
    copy = shutil.copytree(tuned.path, tmp_path / "run", symlinks=True)
    text = (copy / "config.yaml").read_text()
    for width, reason in (("14", "a width that 4 divides"), ("33", "divisible")):
        (copy / "config.yaml").write_text(text.replace("embed_dim: 32", f"embed_dim: {width}"))
        with pytest.raises(
            UserError, match=rf"run/config\.yaml: model=.* cannot be built.*{reason}"
        ):
            patchmine.Run(copy).classifier()


def test_a_kill_before_the_best_checkpoint_has_its_name_changes_no_result(
    backbone: Path, labelled: Path, tmp_path: Path
) -> None:
    settings = dict(val_share=0.3, keep_checkpoints=5, checkpoint_every=1)
    run = tune(backbone, labelled, tmp_path / "run", **settings)
    whole, best = json.loads((run.eval_dir / "test.json").read_text()), run.checkpoint_dir / "best"
    chosen = best.resolve()
    best.unlink()
    best.symlink_to(next(path.name for path in run.checkpoints if path.name != chosen.name))
    (run.eval_dir / "test.json").unlink()
    patchmine.resume(run.path, say=lambda _: None)
    assert best.resolve() == chosen
    assert json.loads((run.eval_dir / "test.json").read_text()) == whole


@pytest.mark.parametrize("trainable", ["none", "last:1", "bias", "lora:2"])
def test_parts_of_a_backbone_are_trained(
    trainable: str, backbone: Path, labelled: Path, tmp_path: Path
) -> None:
    run = tune(backbone, labelled, tmp_path / "run", epochs=1, trainable=trainable)
    before, after = RunFolder(backbone).encoder(), run.encoder()
    names = {
        name
        for name, tensor in after.state_dict().items()
        if not torch.equal(tensor, before.state_dict()[name]) and not name.startswith("norm.")
    }
    expected = {
        "none": lambda name: False,
        "last:1": lambda name: name.startswith("blocks.1."),
        "bias": lambda name: name.endswith("bias") or "norm" in name,
        "lora:2": lambda name: name.endswith(("qkv.weight", "attn.proj.weight")),
    }[trainable]
    assert names == {name for name in names if expected(name)}
    assert bool(names) is (trainable != "none")
    images = torch.randn(2, 3, 16, 16)
    exported = timm.create_model(f"local-dir:{run.export_dir}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(images), run.classifier()(images))


@pytest.fixture(scope="module")
def table(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Numbers and several labels of each image."""
    lines = ["file,size,tags"]
    for number, path in enumerate(sorted(labelled.rglob("*.png"))):
        tags = "|".join(["big"] * (number % 2) + ["old"] * (number % 3 == 0))
        lines.append(f"{path.relative_to(labelled)},{100 + 3 * number},{tags}")
    place = tmp_path_factory.mktemp("table") / "labels.csv"
    place.write_text("\n".join(lines) + "\n")
    return place


@pytest.mark.parametrize(
    ("loss", "column", "score"), [("mse", "size", "r2"), ("bce", "tags", "map")]
)
def test_a_column_of_a_table_is_learnt(
    loss: str, column: str, score: str, backbone: Path, labelled: Path, table: Path, tmp_path: Path
) -> None:
    run = tune(backbone, labelled, tmp_path / "run", labels=table, column=column, loss=loss)
    result = json.loads((run.eval_dir / "test.json").read_text())
    assert score in result
    assert run.config.classes == {"mse": ["size"], "bce": ["big", "old"]}[loss]
    images = torch.randn(2, 3, 16, 16)
    exported = timm.create_model(f"local-dir:{run.export_dir}", pretrained=True).eval()
    with torch.no_grad():
        scores = run.classify().scores(images)
        torch.testing.assert_close(exported(images), scores)
    if loss == "bce":
        return
    onnxruntime = pytest.importorskip("onnxruntime", reason="`export` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    session = onnxruntime.InferenceSession(run.export(to="onnx", say=lambda _: None))
    (found,) = session.run(["values"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), scores, rtol=1e-4, atol=1e-5)


def test_a_table_of_divided_images_keeps_them_apart(labelled: Path, tmp_path: Path) -> None:
    lines = ["file,size"]
    for number, path in enumerate(sorted(labelled.rglob("*.png"))):
        place = tmp_path / "images" / ("test" if number % 4 == 0 else "train") / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
        lines.append(f"{place.relative_to(tmp_path / 'images')},{number}")
    table = tmp_path / "sizes.csv"
    table.write_text("\n".join(lines) + "\n")
    config = from_settings(
        base={"kind": "classify"}, data=str(tmp_path / "images"), labels=str(table), loss="mse"
    )
    assert isinstance(config, patchmine.FinetuneConfig)
    parts = open_labelled_parts(config, preparing.item_of(config), lambda _: None)
    assert (len(parts.train), len(parts.test)) == (30, 10)
    assert all(parts.test.key(index).startswith("test/") for index in range(10))


@pytest.mark.parametrize("start", ["export", "resnet18", "vit_tiny_patch16_224"])
def test_other_starts(start: str, backbone: Path, labelled: Path, tmp_path: Path) -> None:
    name = backbone / "export" if start == "export" else start
    more = {} if start == "export" else {"image_size": 32}
    run = tune(
        Path(name) if start == "export" else name, labelled, tmp_path / "run", epochs=1, **more
    )
    assert (run.config.init is None) is (start != "export")
    exported = timm.create_model(f"local-dir:{run.export_dir}", pretrained=True).eval()
    images = torch.randn(2, 3, *run.config.image_size)
    with torch.no_grad():
        torch.testing.assert_close(exported(images), run.classifier()(images))


def test_a_check_trains_nothing(backbone: Path, labelled: Path, tmp_path: Path) -> None:
    words = [str(backbone), f"data={labelled}", f"out={tmp_path / 'run'}", "workers=0"]
    said = patchmine_says("finetune", *words, "check=true")
    assert not (tmp_path / "run").exists()
    assert "2 classes" in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["patience=3"], "val_share"),
        (["trainable=last:9"], "trainable=last:9"),
        (["trainable=none", "layer_decay=0.5"], "layer_decay"),
        (["mixup=0.8", "batch_size=7"], "batch_size"),
        (["loss=mse"], "labels"),
        (["loss=bce", "balance=true"], "balance"),
        (["column=age"], "labels"),
        (["share=0.01"], "share"),
        (["method=hpm"], "method"),
        (["recipe=small-label"], "small-labels"),
        (["labels=missing.csv"], "labels"),
        (["pool=max"], "pool"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    words: list[str], named: str, backbone: Path, labelled: Path, tmp_path: Path
) -> None:
    given = [f"data={labelled}", f"out={tmp_path / 'run'}", "workers=0", *words]
    assert named in patchmine_says("finetune", str(backbone), *given, code=2)
    assert not (tmp_path / "run").exists()


def test_an_average_has_the_statistics_of_its_batch_norms(labelled: Path, tmp_path: Path) -> None:
    run = tune("resnet18", labelled, tmp_path / "run", epochs=1, image_size=32, ema_decay=0.5)
    task = run.classify()
    assert task.average is not None
    average = task.average.get_submodule("encoder")
    assert torch.equal(average.bn1.running_mean, task.encoder.bn1.running_mean)
    assert average.bn1.num_batches_tracked == 4
    assert not torch.equal(average.bn1.weight, task.encoder.bn1.weight)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(backbone: Path, labelled: Path, tmp_path: Path) -> None:
    settings = dict(epochs=2, mixup=0.8, cutmix=1, erase_prob=0.5, val_share=0.2, eval_batch=3)
    one = tune(backbone, labelled, tmp_path / "one", **settings)
    two = made_by_two("finetune", backbone, labelled, tmp_path / "two", {**TUNE, **settings})
    assert_near(one, two)
    results = (json.loads((run.eval_dir / "test.json").read_text()) for run in (one, two))
    assert [result["confusion"] for result in results].count(None) == 0
    assert {run.metrics()[-1]["eval"]["top1"] for run in (one, two)} != set()

"""Exports that other libraries open, and encoders from folders and files."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from patchmine.backbones.export import Preprocessing, export_encoder, is_export
from patchmine.backbones.family import build_encoder
from patchmine.backbones.weights import load_encoder
from patchmine.errors import UserError

SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SHAPES: dict[str, dict[str, Any]] = {
    "square": {"image_size": (32, 32)},
    "rectangle": {"image_size": (32, 48)},
    "five channels": {"image_size": (32, 32), "channels": 5},
    "registers, no class token": {
        "image_size": (32, 32),
        "model_args": {**SMALL, "class_token": False, "reg_tokens": 2},
    },
    "layer scale": {
        "image_size": (32, 32),
        "model_args": {**SMALL, "init_values": 0.1, "mlp_ratio": 2.0},
    },
}


def make_export(
    folder: Path, shape: str = "square", model: str = "vit_tiny_patch16_224"
) -> VisionTransformer:
    settings = {"channels": 3, "model_args": SMALL, **SHAPES[shape]}
    torch.manual_seed(0)
    encoder = build_encoder(model, patch_size=8, **settings)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    mean = [0.5] * settings["channels"]
    export_encoder(encoder, folder, Preprocessing(mean, mean))
    return encoder.eval()


RESNETS: dict[str, dict[str, Any]] = {
    "resnet": {"model": "resnet18", "channels": 3, "model_args": {"channels": (8, 8, 12, 16)}},
    "bottlenecks, two channels": {
        "model": "resnet50",
        "channels": 2,
        "model_args": {"layers": (1, 1, 1, 1)},
    },
    "small stem": {
        "model": "resnet18",
        "channels": 3,
        "model_args": {"channels": (8, 8, 12, 16), "cifar_stem": True},
    },
}


def export_resnet(folder: Path, kind: str) -> Any:
    settings = {"image_size": (32, 48), **RESNETS[kind]}
    torch.manual_seed(0)
    encoder = build_encoder(**settings)
    encoder.train()(
        torch.randn(4, settings["channels"], 32, 48)
    )  # statistics and counters that are not the first
    mean = [0.5] * settings["channels"]
    export_encoder(encoder, folder, Preprocessing(mean, mean))
    return encoder.eval()


@pytest.mark.parametrize("kind", RESNETS)
def test_a_resnets_export_is_read_back_whole(tmp_path: Path, kind: str) -> None:
    encoder = export_resnet(tmp_path / "export", kind)
    again = export_encoder(
        load_encoder(tmp_path / "export"), tmp_path / "again", Preprocessing([0.5], [0.5])
    )
    first, second = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "export", again)
    )
    assert first["model_args"] == second["model_args"]
    assert first["pretrained_cfg"]["input_size"] == second["pretrained_cfg"]["input_size"]
    opened = load_encoder(tmp_path / "export", image_size=(64, 64)).eval()
    assert opened.state_dict().keys() == encoder.state_dict().keys()
    for name, value in encoder.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name
    x = torch.randn(2, encoder.conv1.in_channels, 64, 64)
    assert torch.equal(opened.forward_features(x), encoder.forward_features(x))
    assert torch.equal(opened(x), encoder(x))


@pytest.mark.parametrize("kind", [kind for kind in RESNETS if kind != "small stem"])
def test_timm_opens_a_resnets_export(tmp_path: Path, kind: str) -> None:
    encoder = export_resnet(tmp_path / "export", kind)
    opened = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    x = torch.randn(2, encoder.conv1.in_channels, 32, 48)
    assert torch.equal(opened(x), encoder(x))
    assert torch.equal(opened.forward_features(x), encoder.forward_features(x))
    assert tuple(opened.pretrained_cfg["input_size"]) == x.shape[1:]
    classifier = timm.create_model(
        f"local-dir:{tmp_path / 'export'}", pretrained=True, num_classes=7
    )
    assert classifier.fc.out_features == 7
    assert "timm.create_model" in (tmp_path / "export" / "README.md").read_text()


def test_the_readme_says_that_timm_cannot_build_the_small_stem(tmp_path: Path) -> None:
    export_resnet(tmp_path / "export", "small stem")
    text = (tmp_path / "export" / "README.md").read_text()
    assert 'patchmine.load_encoder("FOLDER")' in text
    assert "timm.create_model" not in text
    assert "(batch, 16, rows, columns)" in text
    with pytest.raises(TypeError, match="cifar_stem"):
        timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)


@pytest.mark.parametrize("stem", [False, True])
def test_a_file_of_a_resnet_needs_no_name(tmp_path: Path, stem: bool) -> None:
    """torchvision's names and classifier, with or without the counters that old files lack."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", model_args={"cifar_stem": stem}).eval()
    classifier = {"fc.weight": torch.ones(10, 512), "fc.bias": torch.ones(10)}
    old = {name: value for name, value in encoder.state_dict().items() if "num_batches" not in name}
    x = torch.randn(1, 3, 32, 32)
    for name, tensors in (("new", encoder.state_dict()), ("old", old)):
        save_file(tensors | classifier, tmp_path / f"{name}.safetensors")
        assert torch.equal(load_encoder(tmp_path / f"{name}.safetensors").eval()(x), encoder(x))
    named = load_encoder(
        tmp_path / "new.safetensors",
        model="resnet18",
        model_args={"cifar_stem": stem},
        image_size=(32, 32),
    )
    assert torch.equal(named.eval()(x), encoder(x))
    if not stem:
        with pytest.raises(UserError, match=r"conv1.weight has shape"):
            load_encoder(
                tmp_path / "new.safetensors", model="resnet18", model_args={"cifar_stem": True}
            )


def images(encoder: VisionTransformer) -> torch.Tensor:
    return torch.randn(2, encoder.patch_embed.proj.in_channels, *encoder.patch_embed.img_size)


@pytest.mark.parametrize("shape", SHAPES)
def test_timm_opens_an_export_and_sees_the_same(tmp_path: Path, shape: str) -> None:
    encoder = make_export(tmp_path / "export", shape)
    opened = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    x = images(encoder)
    assert torch.equal(opened.forward_features(x), encoder.forward_features(x))
    assert torch.equal(opened(x), encoder(x))
    assert torch.equal(opened.pos_embed, encoder.pos_embed)
    assert (
        opened.pretrained_cfg["mean"] == [0.5] * x.shape[1]
        or opened.pretrained_cfg["mean"] == (0.5,) * x.shape[1]
    )
    assert tuple(opened.pretrained_cfg["input_size"]) == x.shape[1:]


@pytest.mark.parametrize("shape", SHAPES)
def test_load_encoder_reads_what_export_wrote(tmp_path: Path, shape: str) -> None:
    encoder = make_export(tmp_path / "run" / "export", shape)
    x = images(encoder)
    for path in (tmp_path / "run", tmp_path / "run" / "export"):
        opened = load_encoder(path).eval()
        assert torch.equal(opened.forward_features(x), encoder.forward_features(x))


TRANSFORMERS = """
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1]).eval()
stored = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    output = model(stored["images"])
for mine, theirs in (("tokens", output.last_hidden_state), ("pooled", output.pooler_output)):
    print(float((theirs - stored[mine]).abs().max()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_transformers_opens_an_export_and_sees_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pytest.importorskip("transformers", reason="the extra `export` is not installed")
    folder = tmp_path / "export"
    encoder = make_export(folder, "rectangle") if kind == "vit" else export_resnet(folder, kind)
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        torch.save(
            {"images": x, "tokens": encoder.forward_features(x), "pooled": encoder(x)},
            tmp_path / "stored.pt",
        )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # In a process of its own: it warns, it is large, and it must not need anything that is imported
    # here.
    command = [
        sys.executable,
        "-c",
        TRANSFORMERS,
        str(tmp_path / "export"),
        str(tmp_path / "stored.pt"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [float(number) for number in done.stdout.split()] == [0.0, 0.0]


def test_the_folder_holds_no_pickle_and_no_class_count_twice(tmp_path: Path) -> None:
    make_export(tmp_path / "export")
    assert {path.name for path in (tmp_path / "export").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert (
        "num_classes"
        not in json.loads((tmp_path / "export" / "config.json").read_text())["model_args"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["export"]  # nothing temporary is left


def test_tags_and_prefixes_of_names_are_no_part_of_the_architecture(tmp_path: Path) -> None:
    make_export(tmp_path / "export", model="timm/vit_base_patch16_224.mae")
    assert (
        json.loads((tmp_path / "export" / "config.json").read_text())["architecture"]
        == "vit_base_patch16_224"
    )
    timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)


def test_an_export_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    make_export(folder)
    encoder = make_export(folder, "rectangle")
    assert tuple(load_encoder(folder).patch_embed.img_size) == (32, 48)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other things than an export \(such as notes.txt\)"):
        make_export(folder)
    assert torch.equal(load_encoder(folder).pos_embed, encoder.pos_embed)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"such as a.jpg"):
        make_export(tmp_path / "photos")
    with pytest.raises(UserError, match="is a file"):
        make_export(tmp_path / "photos" / "a.jpg")


def test_a_failed_export_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    before = make_export(folder)

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("patchmine.backbones.export.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_export(folder, "rectangle")
    assert torch.equal(load_encoder(folder).pos_embed, before.pos_embed)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_wrong_description_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    encoder = build_encoder("vit_tiny_patch16_224", image_size=(32, 32), model_args=SMALL)
    wrong = {**SMALL, "num_heads": 6}  # the tensors have the same shapes
    encoder.built_from = replace(encoder.built_from, model_args=wrong)
    with pytest.raises(ValueError, match="is not the encoder"):
        export_encoder(encoder, tmp_path / "export", Preprocessing([0.5] * 3, [0.5] * 3))
    assert not (tmp_path / "export").exists()


def test_another_image_size_resamples_positions(tmp_path: Path) -> None:
    encoder = make_export(tmp_path / "export")
    larger = load_encoder(tmp_path / "export", image_size=(64, 48))
    assert larger.patch_embed.grid_size == (8, 6)
    assert larger.forward_features(torch.randn(1, 3, 64, 48)).shape == (1, 49, 48)
    assert torch.equal(larger.pos_embed[:, :1], encoder.pos_embed[:, :1])


def test_a_file_needs_no_name_where_the_width_is_usual(tmp_path: Path) -> None:
    encoder = build_encoder(
        "vit_small_patch16_224",
        image_size=(32, 32),
        patch_size=8,
        channels=2,
        model_args={"depth": 2},
    ).eval()
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    x = torch.randn(1, 2, 32, 32)
    opened = load_encoder(tmp_path / "encoder.safetensors").eval()
    assert torch.equal(opened.forward_features(x), encoder.forward_features(x))
    size = {
        "model": "vit_small_patch16_224",
        "model_args": {"depth": 2, "patch_size": 8, "in_chans": 2},
    }
    larger = load_encoder(tmp_path / "encoder.safetensors", image_size=(64, 64), **size)
    assert larger.patch_embed.grid_size == (8, 8)


def test_what_holds_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config.json and model.safetensors"):
        load_encoder(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_encoder(tmp_path / "absent.pth")
    torch.save({"model": {"conv1.weight": torch.ones(3)}}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="holds no plain vision transformer"):
        load_encoder(tmp_path / "resnet.pth")
    make_export(tmp_path / "export")
    config = tmp_path / "export" / "config.json"
    config.write_text(config.read_text().replace("vit_tiny_patch16_224", "vit_of_tomorrow"))
    assert is_export(tmp_path / "export")
    with pytest.raises(UserError, match="knows no architecture 'vit_of_tomorrow'"):
        load_encoder(tmp_path / "export")
    config.write_text("{")
    with pytest.raises(UserError, match="is no configuration of an export"):
        load_encoder(tmp_path / "export")

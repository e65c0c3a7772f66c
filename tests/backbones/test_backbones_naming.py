"""Weights of other people: any prefix, the names of transformers, mmpretrain and torchvision, raw
or EMA.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import patchmine
from patchmine.backbones.foreign import ForeignTeacher
from patchmine.backbones.naming import find_network
from patchmine.backbones.weights import load_encoder
from patchmine.config.resolve import parse
from patchmine.errors import UserError
from patchmine.evaluate.evaluated import open_evaluated
from patchmine.runs.folder import build_method
from patchmine.runs.transfer import import_file
from patchmine.types import Grid

SIZE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 0}


def drawn(seed: int, **extra: Any) -> nn.Module:
    """timm's smallest ViT with weights that are all different from zero and one."""
    torch.manual_seed(seed)
    encoder = timm.create_model("vit_tiny_patch16_224", **{**SIZE, **extra}).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder


@pytest.fixture(scope="module")
def raw() -> nn.Module:
    return drawn(0)


@pytest.fixture(scope="module")
def average() -> nn.Module:
    return drawn(1)


def under(prefix: str, encoder: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in encoder.state_dict().items()}


def same(opened: nn.Module, encoder: nn.Module) -> bool:
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        return torch.allclose(
            opened.forward_features(images), encoder.forward_features(images), rtol=0, atol=1e-5
        )  # type: ignore[operator]


@pytest.mark.parametrize(
    "prefix",
    [
        *(
            "",
            "module.",
            "_orig_mod.module.",
            "module._orig_mod.",
            "model.",
            "model.backbone.",
            "backbone.vit.",
        ),
        *("encoder.", "student.", "teacher.backbone.", "net.0.model.encoder.", "visual.trunk."),
    ],
)
@pytest.mark.parametrize("key", [None, "state_dict", "model", "checkpoint"])
def test_any_stack_of_prefixes_is_taken_off(
    raw: nn.Module, tmp_path: Path, prefix: str, key: str | None
) -> None:
    tensors = under(prefix, raw)
    beside = {
        "epoch": 3,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "criterion": {"t": torch.ones(1)},
    }
    torch.save({key: tensors, **beside} if key else tensors, tmp_path / "a.pth")
    assert same(patchmine.load_encoder(tmp_path / "a.pth"), raw)


def test_wrappers_inside_of_names_are_taken_off(raw: nn.Module, tmp_path: Path) -> None:
    tensors = {
        re.sub(r"^blocks\.(\d)\.", r"blocks.\1._orig_mod.", k): t
        for k, t in raw.state_dict().items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    assert same(patchmine.load_encoder(tmp_path / "a.safetensors"), raw)


def layouts(raw: nn.Module, average: nn.Module) -> dict[str, dict[str, Any]]:
    """Files with a network and its average; of the last two the average is what authors advise."""
    return {
        "timm": {"state_dict": under("", raw), "state_dict_ema": under("module.", average)},
        "deit": {"model": under("", raw), "model_ema": under("", average)},
        "mmpretrain": {
            "state_dict": under("backbone.", raw),
            "ema_state_dict": under("module.backbone.", average),
        },
        "lightning": {"state_dict": under("model.", raw) | under("ema_model.", average)},
        "moco": {
            "state_dict": under("module.base_encoder.", raw)
            | under("module.momentum_encoder.", average)
        },
        "ijepa": {"encoder": under("module.", raw), "target_encoder": under("module.", average)},
        "dino": {"student": under("module.backbone.", raw), "teacher": under("backbone.", average)},
        "lightly": {
            "state_dict": under("student_backbone.vit.", raw)
            | under("teacher_backbone.vit.", average)
        },
    }


@pytest.mark.parametrize("layout", layouts(nn.Identity(), nn.Identity()))
def test_raw_and_ema_weights_are_chosen(
    raw: nn.Module, average: nn.Module, tmp_path: Path, layout: str
) -> None:
    torch.save(layouts(raw, average)[layout], tmp_path / "a.pth")
    for weights, expected in (
        ("raw", raw),
        ("student", raw),
        ("ema", average),
        ("teacher", average),
    ):
        assert same(patchmine.load_encoder(tmp_path / "a.pth", weights=weights), expected)  # type: ignore[arg-type]
    advised = average if layout in ("dino", "lightly") else raw
    assert same(patchmine.load_encoder(tmp_path / "a.pth"), advised)
    said: list[str] = []
    run = import_file(str(tmp_path / "a.pth"), str(tmp_path / "run"), say=said.append)
    taken = (
        "the EMA weights are taken (weights=raw"
        if advised is average
        else "the raw weights are taken (weights=ema"
    )
    assert taken in said[-1]
    assert "names as in timm" in said[-1]
    assert same(run.encoder(), advised)


def test_one_kind_alone_is_taken_and_the_other_is_refused(
    average: nn.Module, tmp_path: Path
) -> None:
    torch.save({"model_ema": under("", average)}, tmp_path / "ema.pth")
    assert same(patchmine.load_encoder(tmp_path / "ema.pth"), average)
    with pytest.raises(
        UserError, match=r"holds EMA weights only, under model_ema\.: use weights=ema"
    ):
        patchmine.load_encoder(tmp_path / "ema.pth", weights="raw")


def test_two_encoders_are_told_apart_by_the_user(
    raw: nn.Module, average: nn.Module, tmp_path: Path
) -> None:
    torch.save({"state_dict": under("image.", raw) | under("depth.", average)}, tmp_path / "a.pth")
    with pytest.raises(
        UserError,
        match=r"2 encoders, state_dict.image., state_dict.depth.: .*prefix=state_dict.image\.",
    ):
        patchmine.load_encoder(tmp_path / "a.pth")
    for prefix in ("state_dict.depth.", "state_dict.depth"):
        assert same(patchmine.load_encoder(tmp_path / "a.pth", prefix=prefix), average)
    run = import_file(str(tmp_path / "a.pth"), str(tmp_path / "run"), prefix="state_dict.image.")
    assert same(run.encoder(), raw)
    with pytest.raises(
        UserError, match=r"no encoder under prefix='sound': there is state_dict\.image"
    ):
        patchmine.load_encoder(tmp_path / "a.pth", prefix="sound")
    torch.save(
        {"state_dict": under("image.", raw) | under("copy.", raw)}, tmp_path / "twice.pth"
    )  # one module, two names
    assert same(patchmine.load_encoder(tmp_path / "twice.pth"), raw)


def to_mmpretrain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to those of mmpretrain's `VisionTransformer`."""
    swaps = {
        "patch_embed.proj.": "patch_embed.projection.",
        "blocks.": "layers.",
        ".norm1.": ".ln1.",
        ".norm2.": ".ln2.",
        ".mlp.fc1.": ".ffn.layers.0.0.",
        ".mlp.fc2.": ".ffn.layers.1.",
        ".ls1.gamma": ".attn.gamma1.weight",
        ".ls2.gamma": ".ffn.gamma2.weight",
    }
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in swaps.items():
            name = name.replace(ours, theirs)
        renamed[f"backbone.{re.sub('^norm[.]', 'ln1.', name)}"] = tensor
    return renamed


@pytest.mark.parametrize("extra", [{}, {"init_values": 0.1}])
def test_mmpretrains_names(tmp_path: Path, extra: dict[str, Any]) -> None:
    encoder = drawn(2, **extra)
    theirs = to_mmpretrain(encoder.state_dict())  # type: ignore[arg-type]
    assert "backbone.layers.1.ffn.layers.0.0.weight" in theirs
    theirs |= {
        "neck.mask_token": torch.ones(1, 1, 8),
        "head.layers.head.weight": torch.ones(5, 192),
    }
    torch.save({"meta": {"epoch": 1}, "state_dict": theirs}, tmp_path / "mm.pth")
    assert same(patchmine.load_encoder(tmp_path / "mm.pth"), encoder)
    said: list[str] = []
    assert same(
        import_file(str(tmp_path / "mm.pth"), str(tmp_path / "run"), say=said.append).encoder(),
        encoder,
    )
    assert "names as in mmpretrain under state_dict.backbone." in said[-1]
    assert same(
        ForeignTeacher("dino", tmp_path / "mm.pth", grid=Grid((4, 4), (8, 8))).tower, encoder
    )


def test_torchvisions_names(tmp_path: Path) -> None:
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(32, 8, num_layers=2, num_heads=3, hidden_dim=192, mlp_dim=384).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    torch.save(model.state_dict(), tmp_path / "tv.pth")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = torch.cat(
            [model.class_token.expand(2, -1, -1), model._process_input(images)], dim=1
        )
        expected = model.encoder(tokens)
        found = patchmine.load_encoder(tmp_path / "tv.pth").forward_features(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def transformers_model(kind: str, **extra: Any) -> Any:
    pytest.importorskip("transformers", reason="the extra `export` is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports warn about things that are not ours
        import transformers

        config = getattr(
            transformers, f"{kind.removesuffix('Model').removesuffix('ForPreTraining')}Config"
        )
        torch.manual_seed(0)
        sizes = dict(hidden_size=192, num_hidden_layers=2, image_size=32, patch_size=8)
        return getattr(transformers, kind)(
            config(**{**sizes, "num_attention_heads": 3, **extra})
        ).eval()


def saved(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(os.environ, "HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", ["folder", "file of the folder", "state dict", "folder of .bin"])
@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("ViTModel", {"intermediate_size": 384}),
        ("ViTModel", {"qkv_bias": False}),
        ("Dinov2Model", {}),
        ("Dinov2WithRegistersModel", {"num_register_tokens": 2}),
        ("Dinov2Model", {"use_swiglu_ffn": True}),
        ("CLIPVisionModel", {"intermediate_size": 384}),
        ("CLIPVisionModel", {"hidden_act": "gelu"}),
        ("SiglipVisionModel", {"intermediate_size": 384}),
    ],
)
def test_transformers_networks(
    kind: str,
    extra: dict[str, Any],
    way: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = transformers_model(kind, **extra)
    path = saved(model, tmp_path / "hf", monkeypatch)
    if way == "file of the folder":
        path = path / "model.safetensors"
    if way == "state dict":
        path = tmp_path / "state.pth"
        torch.save(model.state_dict(), path)
    if way == "folder of .bin":
        (path / "model.safetensors").unlink()
        torch.save(model.state_dict(), path / "pytorch_model.bin")
    images = torch.randn(2, 3, 32, 32)
    encoder = patchmine.load_encoder(path)
    with torch.no_grad():
        expected = model(images).last_hidden_state
        if hasattr(model, "pre_layrnorm"):  # CLIP's last norm is of the class token alone
            expected = model.post_layernorm(expected)
        told = "hidden_act" not in extra or way != "state dict"  # which says no activation
        assert told or "activation is taken as quick_gelu" in caplog.text
        if not told:
            return
        torch.testing.assert_close(encoder.forward_features(images), expected, rtol=0, atol=1e-5)


def test_transformers_non_square_images_and_heads_come_from_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformers_model(
        "ViTModel", image_size=[16, 64], hidden_size=48, intermediate_size=96
    )
    folder = saved(model, tmp_path / "hf", monkeypatch)
    images = torch.randn(1, 3, 16, 64)
    encoder = patchmine.load_encoder(folder)  # width 48 is unusual, 16 patches are a square too
    with torch.no_grad():
        torch.testing.assert_close(
            encoder.forward_features(images), model(images).last_hidden_state, rtol=0, atol=1e-5
        )
    run = import_file(str(folder), str(tmp_path / "run"))
    exported = patchmine.load_encoder(run.export_dir)
    assert torch.equal(
        exported.forward_features(images), encoder.forward_features(images)
    )  # its eps came along
    timms = timm.create_model(f"local-dir:{run.export_dir}", pretrained=True).eval()
    assert timms.state_dict().keys() == exported.state_dict().keys()
    assert "eps=1e-12" in (run.export_dir / "README.md").read_text()


def test_vitmae_becomes_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(decoder_hidden_size=64, decoder_num_hidden_layers=1, decoder_num_attention_heads=4)
    model = transformers_model(
        "ViTMAEForPreTraining",
        intermediate_size=384,
        decoder_intermediate_size=128,
        norm_pix_loss=True,
        **sizes,
    )
    model.decoder.initialize_weights(16)  # transformers 5 leaves both fixed tables at zero
    model.vit.embeddings.initialize_weights()
    for path in (saved(model, tmp_path / "hf", monkeypatch), tmp_path / "state.pth"):
        heads = {}
        if path.suffix:
            torch.save(model.state_dict(), path)
            heads = {"decoder_num_heads": 4}
        run = import_file(str(path), str(tmp_path / f"run-{path.stem}"), **heads)  # type: ignore[arg-type]
        method = run.method().eval()
        images = torch.randn(1, 3, 32, 32)
        noise = torch.rand(1, 16)
        with torch.no_grad():
            expected = model(images, noise=noise)
            visible = noise.argsort(dim=1)[:, :4]
            mask = patchmine_mask(noise, visible)
            found = predicted(method, images, mask)
        taken = expected.mask[0].bool()
        torch.testing.assert_close(found[0], expected.logits[0][taken], rtol=0, atol=1e-5)
        assert run.config.method.model_dump()["decoder_mlp_ratio"] == 2
    assert run.config.method.model_dump()["norm_pix_loss"] is True


def patchmine_mask(noise: Tensor, visible: Tensor) -> Any:
    from patchmine.types import Mask

    masked = noise.argsort(dim=1)[:, visible.shape[1] :].sort(dim=1).values
    return Mask(visible.sort(dim=1).values, masked, noise.shape[1])


def predicted(method: Any, images: Tensor, mask: Any) -> Tensor:
    """Pixels of the masked patches, in the order of the mask."""
    from patchmine.backbones.family import encode

    tokens = method.decoder_input(encode(method.encoder, images, mask.visible), mask)
    hidden = method.decoder.norm(method.decoder.blocks[0](tokens))
    return method.decoder.head(hidden[:, -mask.masked.shape[1] :])


def test_init_prints_the_table(raw: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": under("model.", raw), "epoch": 1}, tmp_path / "a.pth")
    words = [
        "data=x",
        "method=mae",
        "model=vit_tiny_patch16_224",
        "model_args.depth=2",
        "image_size=64",
        "patch_size=8",
    ]
    said: list[str] = []
    method = build_method(parse(None, words), start_from=str(tmp_path / "a.pth"), say=said.append)
    assert torch.equal(method.encoder.state_dict()["norm.weight"], raw.state_dict()["norm.weight"])  # type: ignore[union-attr]
    assert re.search(r"loaded +30 .*\n  resized +1  pos_embed from 4x4 to 8x8 patches", said[0])
    assert "left random" in said[0]
    assert "names as in timm under state_dict.model." in said[0]


def test_files_without_an_encoder_say_what_they_hold(tmp_path: Path) -> None:
    torch.save({"unet.down.weight": torch.ones(2)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"no plain vision transformer .*it holds unet.down.weight"):
        patchmine.load_encoder(tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"file holds no plain vision transformer.*it holds a"):
        find_network({"a": torch.ones(1)}, "file")


def test_sizes_of_the_public_function(raw: nn.Module, tmp_path: Path) -> None:
    torch.save(raw.state_dict(), tmp_path / "a.pth")
    for size, grid in ((64, (8, 8)), ((16, 64), (2, 8)), (None, (4, 4))):
        assert (
            patchmine.load_encoder(tmp_path / "a.pth", image_size=size).patch_embed.grid_size
            == grid
        )
    for wrong in (0, -32, (32,), (32, 32, 32), 2.5, "32", True):
        with pytest.raises(UserError, match=r"image_size=.* is no size"):
            patchmine.load_encoder(tmp_path / "a.pth", image_size=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["blocks.1.mlp.fc1.weight", "pos_embed", "patch_embed.proj.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    raw: nn.Module, tmp_path: Path, part: str, value: float
) -> None:
    tensors = {name: tensor.clone() for name, tensor in raw.state_dict().items()}
    tensors[part].view(-1)[3] = value
    torch.save(tensors, tmp_path / "bad.pth")
    message = rf"bad.pth: {part} has 1 of \d+ numbers that are NaN or infinite"
    if part == "pos_embed":
        message = r"bad.pth: pos_embed has \d+ of \d+ numbers"
    words = [
        "data=x",
        "method=mae",
        "model=vit_tiny_patch16_224",
        "model_args.depth=2",
        "image_size=32",
        "patch_size=8",
    ]
    for opened in (
        lambda: load_encoder(tmp_path / "bad.pth"),
        lambda: import_file(str(tmp_path / "bad.pth"), str(tmp_path / "run"), image_size=64),
        lambda: build_method(parse(None, words), start_from=str(tmp_path / "bad.pth")),
        lambda: ForeignTeacher("dino", tmp_path / "bad.pth", grid=Grid((4, 4), (8, 8))),
    ):
        with pytest.raises(UserError, match=message):
            opened()
    assert not (tmp_path / "run").exists()


def test_a_folder_of_transformers_is_measured_as_it_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(
        transformers_model("ViTModel", image_size=[16, 64]), tmp_path / "hf", monkeypatch
    )
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}'
    )
    shown = open_evaluated(folder).input
    assert shown.image_size == (16, 64)
    assert (shown.mean, shown.std) == ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5])

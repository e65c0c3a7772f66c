"""ConvNeXts and Swin Transformers of timm's: built, drawn, recognised, moved to other sizes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fixtures.stages import MODELS, TINY, changed, encoder_of
from patchmine.backbones.export import Preprocessing, export_encoder
from patchmine.backbones.family import (
    FAMILIES,
    build_encoder,
    family_of,
    infer_blueprint,
    initialise_encoder,
    pooled,
    stage_features,
)
from patchmine.backbones.filling import fill, resize_encoder
from patchmine.backbones.weights import open_weights
from patchmine.errors import UserError
from patchmine.methods import METHODS, method_class


def images(size: tuple[int, int], channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features(encoder: Any, size: tuple[int, int]) -> Tensor:
    found: Tensor = encoder.eval()(images(size))
    return found


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (128, 64), (96, 96)])
@pytest.mark.parametrize("kind", MODELS)
def test_features_and_maps_are_timms_at_any_size(kind: str, size: tuple[int, int]) -> None:
    encoder = changed(encoder_of(kind, image_size=(64, 96), channels=4)).eval()
    sized = {"img_size": (64, 96), "strict_img_size": False} if "swin" in kind else {}
    how: dict[str, Any] = {"num_classes": 0, "in_chans": 4, **TINY[kind], **sized}
    theirs = timm.create_model(MODELS[kind], **how).eval()
    theirs.load_state_dict(encoder.state_dict())
    taken, family = images(size, 4), family_of(encoder)
    found = stage_features(encoder, taken, list(family.stages(encoder)))
    torch.testing.assert_close(found.pooled, theirs(taken), atol=1e-5, rtol=0)
    assert torch.equal(pooled(encoder, taken, "mean"), found.pooled)
    normed = "swin" in kind  # a ConvNeXt's norm is behind the pooling
    expected = theirs.forward_intermediates(taken, norm=normed, intermediates_only=True)
    for one, other, width, step in zip(
        found.maps, expected, family.stages(encoder).values(), (4, 8, 16, 32), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        assert one.shape[1:] == (width, size[0] // step, size[1] // step)
    assert family.map_size(encoder) == (2, 3)


@pytest.mark.parametrize("kind", MODELS)
def test_it_starts_as_published_and_again_when_drawn_anew(kind: str) -> None:
    encoder = encoder_of(kind)
    fresh = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    for again in (False, True):
        if again:
            changed(encoder)
            initialise_encoder(encoder)
        for name, parameter in encoder.named_parameters():
            if name.endswith("gamma"):
                assert (parameter == 1e-6).all()
            elif name == "patch_embed.proj.weight":
                assert parameter.abs().max() <= 48**-0.5 + 1e-6  # as torch draws a convolution
            elif parameter.ndim in (2, 4) and "logit_scale" not in name:
                assert parameter.std().item() == pytest.approx(0.02, rel=0.35), name
            elif parameter.ndim == 1 and "patch_embed" not in name and "cpb_mlp" not in name:
                assert torch.equal(parameter, fresh[name]), name
    assert not any(isinstance(part, timm.layers.DropPath) for part in encoder.modules())


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("swin", {"image_size": (66, 64)}, r"image_size=66x64 is not a multiple of the patch size"),
        ("convnext", {"image_size": (24, 32)}, r"image_size=24x32 is smaller.*32 pixels"),
        ("swin", {"model_args": {"depth": 3}}, "check model_args"),
        (
            "convnext",
            {"model_args": {**TINY["convnext"], "head_hidden_size": 8}},
            "head_hidden_size=null",
        ),
        ("convnext", {"model": "convnext_atto_ols", "patch_size": 2}, r"patch_size=2, but .*overl"),
        ("convnext", {"model": "convnext_tinny"}, "near: convnext_tiny"),
    ],
)
def test_mistakes_are_told(kind: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        build_encoder(**{"model": MODELS[kind], "model_args": TINY[kind], **given})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("kind", "patch", "step"), [("convnext", 1, 8), ("swin", 2, 16)])
def test_smaller_patches_are_for_small_images(kind: str, patch: int, step: int) -> None:
    encoder = encoder_of(kind, image_size=(32, 32), patch_size=patch)
    (last,) = stage_features(encoder, images((32, 48)), list(FAMILIES[kind].stages(encoder))[-1:])[
        1
    ]
    assert last.shape[2:] == (32 // step, 48 // step)
    assert family_of(encoder).map_size(encoder) == (32 // step, 32 // step)


def test_images_that_do_not_fit_are_told() -> None:
    with pytest.raises(UserError, match=r"images of 16x32 pixels are smaller .*crops\.local_size"):
        stage_features(encoder_of("convnext"), images((16, 32)))
    with pytest.raises(UserError, match=r"images of 30x32 pixels are not filled by patches of 4x4"):
        stage_features(encoder_of("swin"), images((30, 32)))


@pytest.mark.parametrize("kind", MODELS)
def test_methods_that_hide_patches_refuse_it(kind: str) -> None:
    why = "Swin Transformer merges" if "swin" in kind else "ConvNeXt mixes"
    family = family_of(encoder_of(kind)).name
    refusing = [name for name, settings in METHODS.items() if family not in settings.families]
    assert len(refusing) == len(METHODS) - 2  # all but MOKD and SCFS
    for name in refusing:
        settings = METHODS[name]
        with pytest.raises(UserError, match=rf"method={name} hides patches, which a {why}"):
            method_class(settings)(settings(), encoder_of(kind))


@pytest.mark.parametrize(
    "model",
    [
        *(
            f"convnext_{size}"
            for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base")
        ),
        *("convnext_large", "convnext_xlarge", "convnextv2_atto", "convnextv2_huge"),
        *("swin_tiny_patch4_window7_224", "swin_base_patch4_window12_384"),
    ],
)
def test_the_name_is_read_off_the_tensors(model: str) -> None:
    bare = timm.create_model(model, in_chans=2, device="meta", num_classes=7)
    found = infer_blueprint(bare.state_dict(), "x.pth")
    side = 384 if "384" in model else 224
    assert (found.model, found.channels, found.image_size) == (model, 2, (side, side))
    built = timm.create_model(model, in_chans=2, device="meta", **found.model_args)
    own = {name: t.shape for name, t in built.state_dict().items() if "head.fc" not in name}
    assert own == {n: t.shape for n, t in bare.state_dict().items() if "head.fc" not in n}


@pytest.mark.parametrize("kind", ["convnext", "convnextv2", "swin"])
def test_an_unusual_one_is_read_off_its_tensors(kind: str, tmp_path: Path) -> None:
    size = (224, 224) if kind == "swin" else (64, 64)  # windows are whole at this size
    encoder = changed(encoder_of(kind, image_size=size)).eval()
    save_file(encoder.state_dict(), tmp_path / "a.safetensors")
    opened, report = open_weights(tmp_path / "a.safetensors")
    assert not report.unexpected
    assert not report.missing
    torch.testing.assert_close(features(opened, (64, 96)), features(encoder, (64, 96)))


def test_what_tensors_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    for kind, said in {"swinv2": "model=swinv2_tiny_window8_256", "swin": "windows differ"}.items():
        encoder = encoder_of(kind)
        save_file(encoder.state_dict(), tmp_path / f"{kind}.safetensors")
        with pytest.raises(UserError, match=said):
            open_weights(tmp_path / f"{kind}.safetensors")
        how: dict[str, Any] = {"model": MODELS[kind], "model_args": TINY[kind]}
        opened, _ = open_weights(tmp_path / f"{kind}.safetensors", image_size=(64, 64), **how)
        assert torch.equal(features(opened, (64, 96)), features(encoder, (64, 96)))


def authors(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The names of facebookresearch/ConvNeXt and ConvNeXt-V2, or microsoft/Swin-Transformer."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if kind == "swin":
            stage = re.match(r"layers\.(\d)\.downsample", name)
            if stage:
                name = name.replace(stage[0], f"layers.{int(stage[1]) - 1}.downsample")
        else:
            name = re.sub(r"^stem\.", "downsample_layers.0.", name)
            name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
            name = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", name)
            name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
            name = name.replace("head.norm", "norm")
            if "mlp.grn" in name:
                name = name.replace("mlp.grn.weight", "grn.gamma").replace(
                    "mlp.grn.bias", "grn.beta"
                )
                tensor = tensor.reshape(1, 1, 1, -1)
        found[name] = tensor
    if kind == "swin":
        found["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
        found["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49).long()
    return found | {"head.weight": torch.ones(5, 32), "head.bias": torch.ones(5)}


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("kind", ["convnext", "convnextv2", "swin"])
def test_files_of_the_authors_open(kind: str, told: bool, tmp_path: Path) -> None:
    size = (224, 224) if kind == "swin" else (64, 64)
    encoder = changed(encoder_of(kind, image_size=size)).eval()
    torch.save({"model": authors(encoder.state_dict(), kind)}, tmp_path / "a.pth")
    # timm's pico has convolutions where the authors have layers
    name = "convnext_pico" if kind == "convnext" else MODELS[kind]
    how = {"model": name, "model_args": TINY[kind], "image_size": size} if told else {}
    opened, report = open_weights(tmp_path / "a.pth", **how)
    assert {"head.weight", "head.bias"} <= {*report.dropped}
    torch.testing.assert_close(features(opened, (64, 96)), features(encoder, (64, 96)))


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_tables_of_other_windows_are_moved_as_timm_moves_them() -> None:
    source = changed(encoder_of("swin", image_size=(224, 224)))
    small = encoder_of("swin", image_size=(64, 64))
    report = fill(small, source, "init=a.pth")
    from timm.models.swin_transformer import checkpoint_filter_fn

    expected = checkpoint_filter_fn(source.state_dict(), small)
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    assert report.resized[0].endswith("from windows of 7x7 to 4x4 patches")


@pytest.mark.parametrize("kind", MODELS)
def test_a_resized_encoder_is_one_built_at_that_size(kind: str, tmp_path: Path) -> None:
    encoder = changed(encoder_of(kind, image_size=(64, 64)))
    folder = export_encoder(encoder, tmp_path / "export", Preprocessing([0.5] * 3, [0.5] * 3))
    opened, _ = open_weights(folder, image_size=(128, 96))
    resize_encoder(encoder, (128, 96))
    assert family_of(encoder).image_size(encoder) == (128, 96)
    assert encoder.built_from.image_size == (128, 96)
    for size in ((128, 96), (64, 64)):
        torch.testing.assert_close(features(opened, size), features(encoder, size))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    again, _ = open_weights(folder)
    torch.testing.assert_close(features(theirs, (64, 64)), features(again, (64, 64)))
    # a second export, of what was resized
    second = export_encoder(encoder, tmp_path / "second", Preprocessing([0.5] * 3, [0.5] * 3))
    theirs = timm.create_model(f"local-dir:{second}", pretrained=True)
    torch.testing.assert_close(features(theirs, (128, 96)), features(encoder, (128, 96)))


@pytest.mark.parametrize("kind", ["swin", "swinv2"])
def test_masks_of_windows_are_made_of_shapes_alone(kind: str) -> None:
    """Tensors without content would stop whoever looks at them, as the host waits for a device."""
    encoder = encoder_of(kind).eval()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        found = stage_features(encoder, fake.from_tensor(images((32, 96))), ["layers.1"])
    assert found.maps[0].shape == (2, 16, 4, 12)

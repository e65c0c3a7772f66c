"""The encoder of clips: its tokens against a convolution, its positions against a slow table,
folders and files.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.official_files import read_official
from patchmine.backbones.export import Preprocessing, export_encoder
from patchmine.backbones.family import build_encoder, encode
from patchmine.backbones.names import VIDEO_MODELS, reads_clips
from patchmine.backbones.positions import interleaved_table
from patchmine.backbones.reference import from_videomae_names, to_videomae_names
from patchmine.backbones.tokens import encoder_grid, project_patches
from patchmine.backbones.video import VideoTransformer
from patchmine.backbones.weights import load_encoder
from patchmine.errors import UserError
from patchmine.types import Grid

SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3}
NAME = "video_vit_tiny_patch16"


def build(**settings: Any) -> VideoTransformer:
    torch.manual_seed(0)
    given = dict(image_size=(16, 24), patch_size=8, model_args=SMALL, clip=(6, 2)) | settings
    encoder = build_encoder(NAME, **given)
    assert isinstance(encoder, VideoTransformer)
    return encoder.eval()


def test_only_video_models_are_called_so() -> None:
    assert all(reads_clips(name) for name in VIDEO_MODELS)
    assert not reads_clips("vit_small_patch16_224")


def test_tokens_are_those_of_a_convolution_in_the_order_time_row_column() -> None:
    encoder = build()
    clips = torch.randn(2, 3, 6, 16, 24)
    expected = encoder.patch_embed.proj(clips).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.patch_embed(clips), expected)
    torch.testing.assert_close(project_patches(encoder, clips), expected)
    some = torch.tensor([[0, 7, 17], [3, 4, 5]])
    wanted = torch.stack([expected[row, index] for row, index in enumerate(some)])
    torch.testing.assert_close(project_patches(encoder, clips, some), wanted)


def test_grid_counts_slots_and_places() -> None:
    grid = encoder_grid(build())
    assert grid == Grid((3, 2, 3), (2, 8, 8))
    assert (grid.num_slots, grid.num_positions, grid.num_patches) == (3, 6, 18)
    image = Grid((2, 3), (8, 8))
    assert (image.num_slots, image.num_positions) == (1, 6)


def test_features_are_those_of_the_methods_encoder() -> None:
    encoder = build()
    clips = torch.randn(2, 3, 6, 16, 24)
    features = encoder.forward_features(clips)
    assert features.shape == (2, 18, 48)
    assert torch.equal(features, encode(encoder, clips))
    torch.testing.assert_close(encoder(clips), features.mean(dim=1))


def test_positions_are_fixed_and_no_part_of_the_state() -> None:
    encoder = build()
    assert "pos_embed" not in encoder.state_dict()
    assert all(not name.startswith("pos") for name, _ in encoder.named_parameters())
    for n, j in [(0, 0), (0, 1), (5, 0), (17, 7), (11, 46)]:
        angle = torch.tensor(n / 10000 ** (2 * (j // 2) / 48), dtype=torch.float64)
        expected = angle.cos() if j % 2 else angle.sin()
        assert encoder.pos_embed[0, n, j].item() == pytest.approx(expected.item(), abs=1e-6)


def test_clips_of_another_size_get_a_table_of_theirs() -> None:
    encoder = build()
    longer = torch.randn(1, 3, 8, 16, 24)
    other = build(clip=(8, 2))
    other.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(encoder.forward_features(longer), other.forward_features(longer))
    encoder.set_input_size((32, 32), num_frames=4)
    assert encoder_grid(encoder).size == (2, 4, 4)
    assert torch.equal(encoder.pos_embed[0], interleaved_table(48, 32))
    with pytest.raises(
        UserError,
        match="clips of 5 frames of 16x24 pixels are not filled by cubes of 2 frames and 8x8",
    ):
        encoder(torch.randn(1, 3, 5, 16, 24))


def test_a_bias_of_keys_has_no_influence() -> None:
    encoder = build()
    clips = torch.randn(1, 3, 6, 16, 24)
    before = encoder.forward_features(clips)
    with torch.no_grad():
        for block in encoder.blocks:
            assert not block.attn.qkv.bias[48:96].any()
            block.attn.qkv.bias[48:96] = torch.randn(48)
    torch.testing.assert_close(encoder.forward_features(clips), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": None}, f"model={NAME} is for clips of videos: choose a model for images"),
        ({"clip": (7, 2)}, "clips of 7 frames .*clip.frames and image_size that clip.tubelet"),
        ({"image_size": (30, 24)}, "image_size=30x24 is not a multiple of the patch size 8"),
        ({"model_args": {"colour": 1}}, "cannot be built .*colour.*check model_args"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**settings)


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(
        UserError, match=r"is no video model; there are .*near: video_vit_small_patch16"
    ):
        build_encoder("video_vit_smal_patch16", clip=(16, 2))


def perturb(encoder: VideoTransformer) -> VideoTransformer:
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
            if name.endswith("qkv.bias"):
                parameter[48:96] = 0  # VideoMAE has none
    return encoder


def test_an_export_is_opened_again_and_says_who_cannot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = perturb(build())
    prepared = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)
    export_encoder(encoder, tmp_path / "export", prepared)
    opened = load_encoder(tmp_path / "export")
    clips = torch.randn(1, 3, 6, 16, 24)
    assert isinstance(opened, VideoTransformer)
    assert torch.equal(opened.eval()(clips), encoder(clips))
    assert json.loads((tmp_path / "export" / "config.json").read_text())["pretrained_cfg"][
        "input_size"
    ] == [3, 6, 16, 24]
    readme = (tmp_path / "export" / "README.md").read_text()
    assert "timm and transformers cannot open this folder" in readme
    assert "library_name" not in readme
    assert encoder_grid(load_encoder(tmp_path / "export", image_size=(32, 32))).size == (3, 4, 4)
    assert "trained at 16x24 pixels: its positions are VideoMAE's fixed table" in caplog.text
    encoder.built_from = replace(encoder.built_from, model_args=SMALL | {"depth": 3})
    with pytest.raises(ValueError, match="is not the encoder to be exported"):
        export_encoder(encoder, tmp_path / "other", prepared)


def videomae_state(encoder: VideoTransformer) -> dict[str, torch.Tensor]:
    return to_videomae_names(encoder.state_dict())


def test_names_go_to_videomae_and_back() -> None:
    state = perturb(build()).state_dict()
    theirs = to_videomae_names(state)
    assert {
        "encoder.patch_embed.proj.weight",
        "encoder.blocks.1.attn.q_bias",
        "encoder.norm.bias",
    } <= theirs.keys()
    assert not any("qkv.bias" in name for name in theirs)
    back = from_videomae_names(theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("key", ["model", "module", None])
def test_a_file_of_videomae_is_opened(tmp_path: Path, key: str | None) -> None:
    encoder = perturb(build(image_size=(24, 24), clip=(16, 2)))
    state = videomae_state(encoder) | {
        "mask_token": torch.zeros(1, 1, 32),
        "decoder.norm.weight": torch.ones(32),
    }
    state["encoder_to_decoder.weight"] = torch.zeros(32, 48)
    torch.save({key: state} if key else state, tmp_path / "pretrain.pth")
    opened = load_encoder(
        tmp_path / "pretrain.pth", image_size=(24, 24), model_args={"num_heads": 3}
    )
    clips = torch.randn(1, 3, 16, 24, 24)
    assert torch.equal(opened.eval().forward_features(clips), encoder.forward_features(clips))


def test_a_fine_tuned_file_of_videomae_pools_before_its_norm(tmp_path: Path) -> None:
    encoder = perturb(build(image_size=(24, 24), clip=(16, 2)))
    state = {
        name.removeprefix("encoder."): tensor for name, tensor in videomae_state(encoder).items()
    }
    state["fc_norm.weight"], state["fc_norm.bias"] = (
        state.pop("norm.weight"),
        state.pop("norm.bias"),
    )
    state |= {"head.weight": torch.zeros(5, 48), "head.bias": torch.zeros(5)}
    torch.save({"module": state}, tmp_path / "tuned.pth")
    opened = load_encoder(
        tmp_path / "tuned.pth", image_size=(24, 24), model_args={"num_heads": 3}
    ).eval()
    clips = torch.randn(2, 3, 16, 24, 24)
    encoder.norm = torch.nn.Identity()
    expected = torch.nn.functional.layer_norm(
        encoder.forward_features(clips).mean(1),
        (48,),
        state["fc_norm.weight"],
        state["fc_norm.bias"],
        1e-6,
    )
    torch.testing.assert_close(opened(clips), expected)


def test_sizes_that_a_file_does_not_tell(tmp_path: Path) -> None:
    torch.save({"model": videomae_state(build())}, tmp_path / "small.pth")
    with pytest.raises(UserError, match="width 48: give num_heads"):
        read_official(tmp_path / "small.pth")
    with pytest.raises(UserError, match="do not fill clips of 16x30x30: give image_size"):
        read_official(tmp_path / "small.pth", num_heads=3, image_size=(30, 30))
    found = read_official(tmp_path / "small.pth", num_heads=3)
    assert (found.architecture.clip, found.architecture.image_size) == ((16, 2), (224, 224))
    assert "16x224x224x3 (video_vit_base_patch16)" in found.summary()
    with pytest.raises(UserError, match="holds no teacher weights"):
        read_official(tmp_path / "small.pth", num_heads=3, weights="teacher")

"""Frozen networks from local files: equal to what their owners compute, and clear words about files
that do not fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from patchmine.backbones.export import Preprocessing, export_encoder
from patchmine.backbones.family import build_encoder
from patchmine.backbones.foreign import ForeignTeacher
from patchmine.errors import UserError
from patchmine.methods.hpm import HPM
from patchmine.types import Batch, Grid, Progress

GRID = Grid((4, 4), (8, 8))
WIDTH, DEPTH, TEXT = 128, 2, 24  # two heads of 64 channels, as OpenAI's towers have


@pytest.fixture(scope="module")
def dino() -> nn.Module:
    """DINO's architecture, made smaller in depth only: the file shows the depth, the width tells
    the heads.
    """
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        depth=DEPTH,
        num_classes=0,
        dynamic_img_size=True,
    ).eval()


def dino_layouts(state: dict[str, Tensor]) -> dict[str, Any]:
    """The published backbone, and the published full checkpoint."""
    heads = {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_g": torch.ones(3, 1)}
    return {
        "backbone": state,
        "full": {
            "student": {f"module.backbone.{name}": t + 1 for name, t in state.items()},
            "teacher": {f"backbone.{name}": t for name, t in state.items()} | heads,
            "epoch": 800,
        },
        "flat": {f"teacher.backbone.{name}": t for name, t in state.items()}
        | {"teacher.head.x": torch.ones(1)},
    }


@pytest.mark.parametrize("layout", ["backbone", "full", "flat"])
def test_dino_features_are_the_patch_tokens_after_the_norm(
    dino: nn.Module, tmp_path: Path, layout: str
) -> None:
    torch.save(dino_layouts(dino.state_dict())[layout], tmp_path / "dino.pth")
    teacher = ForeignTeacher("dino", tmp_path / "dino.pth", grid=GRID)
    images = torch.randn(2, 3, 32, 32)
    assert teacher.width == 192
    torch.testing.assert_close(
        teacher(images), dino.forward_features(images)[:, 1:], rtol=0, atol=0
    )


def test_another_image_size_resamples_the_positions(dino: nn.Module, tmp_path: Path) -> None:
    torch.save(dino.state_dict(), tmp_path / "dino.pth")
    images = torch.randn(2, 3, 48, 32)
    features = ForeignTeacher("dino", tmp_path / "dino.pth", grid=Grid((6, 4), (8, 8)))(images)
    torch.testing.assert_close(
        features, dino.forward_features(images)[:, 1:]
    )  # timm resamples on the fly


def test_an_export_folder_is_a_teacher(tmp_path: Path) -> None:
    args = {"embed_dim": 48, "depth": 1, "num_heads": 3}
    encoder = build_encoder(
        "vit_tiny_patch16_224", image_size=(32, 32), patch_size=8, model_args=args
    ).eval()
    export_encoder(encoder, tmp_path / "export", Preprocessing([0.5] * 3, [0.5] * 3))
    images = torch.randn(1, 3, 32, 32)
    features = ForeignTeacher("dino", tmp_path / "export", grid=GRID)(images)
    assert torch.equal(features, encoder.forward_features(images)[:, 1:])


def openai_state() -> dict[str, Tensor]:
    """CLIP's image tower and a part of the text tower, under OpenAI's names, in half precision as
    published.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).half()

    state = {
        "visual.class_embedding": random(WIDTH),
        "visual.positional_embedding": random(17, WIDTH),
        "visual.proj": random(WIDTH, TEXT),
        "visual.conv1.weight": random(WIDTH, 3, 8, 8),
        "positional_embedding": random(7, WIDTH),
        "text_projection": random(WIDTH, TEXT),
        "transformer.resblocks.0.ln_1.weight": random(WIDTH),
        "logit_scale": random(1),
    }
    for norm in (
        "ln_pre",
        "ln_post",
        *(f"transformer.resblocks.{i}.ln_{k}" for i in range(DEPTH) for k in (1, 2)),
    ):
        state |= {f"visual.{norm}.weight": random(WIDTH) + 1, f"visual.{norm}.bias": random(WIDTH)}
    for i in range(DEPTH):
        block = f"visual.transformer.resblocks.{i}"
        state |= {
            f"{block}.attn.in_proj_weight": random(3 * WIDTH, WIDTH),
            f"{block}.attn.in_proj_bias": random(3 * WIDTH),
        }
        for name, rows, columns in (
            ("attn.out_proj", WIDTH, WIDTH),
            ("mlp.c_fc", 4 * WIDTH, WIDTH),
            ("mlp.c_proj", WIDTH, 4 * WIDTH),
        ):
            state |= {
                f"{block}.{name}.weight": random(rows, columns),
                f"{block}.{name}.bias": random(rows),
            }
    return state


def timm_state(openai: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tower under timm's names, whose ``head`` is the projection."""
    network = timm.create_model(
        "vit_base_patch16_clip_quickgelu_224",
        img_size=32,
        patch_size=8,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=WIDTH // 64,
        num_classes=TEXT,
    )
    theirs = checkpoint_filter_fn({name: t.float() for name, t in openai.items()}, network)
    network.load_state_dict(theirs)
    return {name: tensor.contiguous() for name, tensor in network.state_dict().items()}


def save_clip(folder: Path) -> Path:
    save_file(timm_state(openai_state()), folder / "clip.safetensors")
    return folder / "clip.safetensors"


def slow_clip(images: Tensor) -> Tensor:
    """CLIP's image tower as its paper's code says it, with torch's own attention: (B, L, TEXT)."""
    state = {
        name.removeprefix("visual."): t.float()
        for name, t in openai_state().items()
        if name.startswith("visual.")
    }

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(
            x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5
        )

    x = nn.functional.conv2d(images, state["conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = (
        torch.cat([state["class_embedding"].expand(len(x), 1, WIDTH), x], dim=1)
        + state["positional_embedding"]
    )
    x = norm(x, "ln_pre")
    for i in range(DEPTH):
        block = f"transformer.resblocks.{i}"
        attention = nn.MultiheadAttention(WIDTH, WIDTH // 64, batch_first=True)
        prefix = f"{block}.attn."
        attention.load_state_dict(
            {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
        )
        y = norm(x, f"{block}.ln_1")
        x = x + attention(y, y, y, need_weights=False)[0]
        y = (
            norm(x, f"{block}.ln_2") @ state[f"{block}.mlp.c_fc.weight"].T
            + state[f"{block}.mlp.c_fc.bias"]
        )
        y = y * torch.sigmoid(1.702 * y)
        x = x + y @ state[f"{block}.mlp.c_proj.weight"].T + state[f"{block}.mlp.c_proj.bias"]
    return norm(x, "ln_post")[:, 1:] @ state["proj"]


def test_clip_features_are_projected_patch_tokens(tmp_path: Path) -> None:
    teacher = ForeignTeacher("clip", save_clip(tmp_path), grid=GRID)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = slow_clip(images)
    assert teacher.width == TEXT
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-5)


def test_clip_under_other_names_is_told_where_it_is(tmp_path: Path) -> None:
    torch.save(openai_state(), tmp_path / "clip.pt")
    for kind in ("clip", "dino"):
        with pytest.raises(UserError, match=r"method\.target_file=.*model\.safetensors of timm's"):
            ForeignTeacher(kind, tmp_path / "clip.pt", grid=GRID)  # type: ignore[arg-type]


def test_clip_may_be_given_its_own_normalisation(tmp_path: Path) -> None:
    path = save_clip(tmp_path)
    pixels = torch.rand(1, 3, 32, 32)

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    plain = ForeignTeacher("clip", path, grid=GRID)
    corrected = ForeignTeacher("clip", path, grid=GRID, renormalise=True)
    as_imagenet = normalised(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    as_clip = normalised(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    torch.testing.assert_close(corrected(as_imagenet), plain(as_clip), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(corrected(as_imagenet), plain(as_imagenet), atol=1e-3)


def test_it_is_frozen_and_stays_in_eval_mode(dino: nn.Module, tmp_path: Path) -> None:
    torch.save(dino.state_dict(), tmp_path / "dino.pth")
    teacher = ForeignTeacher("dino", tmp_path / "dino.pth", grid=GRID)
    holder = nn.ModuleList([teacher]).train()
    assert not any(module.training for module in holder[0].modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher(torch.randn(1, 3, 32, 32, requires_grad=True)).requires_grad


@pytest.mark.parametrize("target", ["dino", "clip"])
def test_hpm_learns_from_it(dino: nn.Module, tmp_path: Path, target: str) -> None:
    torch.save(dino.state_dict(), tmp_path / "dino.pth")
    file = tmp_path / "dino.pth" if target == "dino" else save_clip(tmp_path)
    args = {"embed_dim": 48, "depth": 1, "num_heads": 3}
    encoder = build_encoder(
        "vit_tiny_patch16_224", image_size=(32, 32), patch_size=8, model_args=args
    )
    config = HPM.Config(
        target=target,
        target_file=str(file),
        decoder_embed_dim=32,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    method = HPM(config, encoder)
    batch = Batch(
        [torch.randn(2, 3, 32, 32)],
        torch.arange(2),
        torch.zeros(2, 4),
        torch.zeros(2, dtype=torch.bool),
    )
    losses = method(batch, Progress(5, 10, 1))
    assert 0 < losses["reconstruction"].item() <= 4  # 2 - 2 cos
    losses["loss"].backward()
    assert all(p.grad is None for p in method.get_submodule("foreign").parameters())


def test_files_that_do_not_fit_are_named_with_their_setting(
    dino: nn.Module, tmp_path: Path
) -> None:
    torch.save(dino.state_dict(), tmp_path / "dino.pth")
    clip = save_clip(tmp_path)
    state = timm_state(openai_state())
    torch.save(state | {"head.weight": torch.ones(TEXT, 8)}, tmp_path / "patched.pth")
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "other.pth")
    unusual = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=128, num_heads=2
    )
    torch.save(unusual.state_dict(), tmp_path / "unusual.pth")
    torch.save(
        {name: t for name, t in state.items() if not name.startswith("norm.")},
        tmp_path / "half.pth",
    )
    lacking = {name: t for name, t in dino.state_dict().items() if name != "norm.weight"}
    torch.save(lacking, tmp_path / "lacking.pth")
    small = Grid((8, 8), (4, 4))
    cases = [
        ("dino", None, GRID, "is not set"),
        ("dino", tmp_path / "absent.pth", GRID, "does not exist"),
        ("dino", tmp_path / "other.pth", GRID, "no plain vision transformer"),
        ("clip", tmp_path / "other.pth", GRID, "no plain vision transformer"),
        ("clip", tmp_path / "dino.pth", GRID, "no CLIP image tower"),
        ("dino", tmp_path / "dino.pth", small, "patches of 8x8 pixels and the student into 4x4"),
        ("clip", clip, small, "patches of 8x8 pixels and the student into 4x4"),
        ("dino", tmp_path / "lacking.pth", GRID, "1 missing tensor"),
        ("dino", tmp_path, GRID, "is a folder"),
        (
            "dino",
            tmp_path / "unusual.pth",
            GRID,
            "attention heads cannot be read off a model of width 128",
        ),
        ("clip", tmp_path / "half.pth", GRID, "2 missing tensor"),
        (
            "clip",
            tmp_path / "patched.pth",
            GRID,
            f"projects tokens of width 8, but its network gives {WIDTH}",
        ),
    ]
    for kind, file, grid, message in cases:
        with pytest.raises(UserError, match=rf"method\.target_file.*{message}"):
            ForeignTeacher(kind, file, grid=grid)  # type: ignore[arg-type]

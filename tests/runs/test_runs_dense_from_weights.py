"""What segments and detects starts from other people's files: their weights, at its own size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

import patchmine
from fixtures.boxes import write_boxes
from fixtures.label_maps import write_label_maps
from fixtures.small_runs import SMALL
from patchmine.backbones.positions import sincos_table

MODEL, SIZE = "vit_tiny_patch16_224", (48, 80)  # 3 x 5 patches, of a file with 4 x 4
TEACH: dict[str, Any] = {
    "image_size": list(SIZE),
    "steps": 1,
    "batch_size": 2,
    "trainable": "none",  # so that what it started from can be seen afterwards
    **SMALL,
}
DETECT: dict[str, Any] = {"width": 8, "proposals": 20, "samples": 8}


def network(size: int = 64, depth: int = 2, **more: Any) -> Any:
    return timm.create_model(MODEL, img_size=size, depth=depth, **more)


@pytest.fixture(scope="module")
def encoder() -> dict[str, Tensor]:
    """Tensors of an encoder under timm's names, which are MAE's, its positions as MAE has them."""
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(tensor.shape, generator=generator) * 0.1
        for name, tensor in network(num_classes=0).state_dict().items()
    }
    rows = torch.cat([torch.zeros(1, 192), sincos_table(192, (4, 4))])
    return drawn | {"pos_embed": rows[None]}


def mae(encoder: dict[str, Tensor], folder: Path) -> Path:
    """As `mae_pretrain_vit_*.pth`."""
    torch.save({"model": encoder}, folder / "mae_pretrain_vit_tiny.pth")
    return folder / "mae_pretrain_vit_tiny.pth"


def mae_with_decoder(encoder: dict[str, Tensor], folder: Path) -> Path:
    """As MAE's `checkpoint-N.pth`."""
    whole = {
        "mask_token": torch.zeros(1, 1, 512),
        "decoder_pos_embed": torch.cat([torch.zeros(1, 512), sincos_table(512, (4, 4))])[None],
        "decoder_embed.weight": torch.zeros(512, 192),
        "decoder_embed.bias": torch.zeros(512),
        "decoder_norm.weight": torch.ones(512),
        "decoder_norm.bias": torch.zeros(512),
        "decoder_pred.weight": torch.zeros(768, 512),
        "decoder_pred.bias": torch.zeros(768),
    }
    content = {"model": encoder | whole, "optimizer": {}, "epoch": 3, "scaler": {}}
    torch.save(content, folder / "checkpoint-3.pth")
    return folder / "checkpoint-3.pth"


def timms(encoder: dict[str, Tensor], folder: Path) -> Path:
    """A classifier as timm's hub has it."""
    head = {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}
    save_file(encoder | head, folder / "model.safetensors")
    return folder / "model.safetensors"


def an_export(encoder: dict[str, Tensor], folder: Path) -> Path:
    """What `patchmine export` wrote."""
    run = patchmine.import_weights(mae(encoder, folder), folder / "run", say=lambda _: None)
    return run.export(folder / "exported")


def segmented(start: Path, folder: Path) -> patchmine.Run:
    data = write_label_maps(folder / "maps", {"train": 2, "test": 1})
    return patchmine.segment(start, data=data, out=folder / "segment", **TEACH)


def detected(start: Path, folder: Path) -> patchmine.Run:
    data = write_boxes(folder / "boxes", {"train": 2, "val": 1})
    return patchmine.detect(start, data=data, out=folder / "detect", **TEACH, **DETECT)


@pytest.mark.parametrize("made", [mae, mae_with_decoder, timms, an_export])
@pytest.mark.parametrize("teach", [segmented, detected])
def test_weights_are_the_files_and_positions_are_moved_as_timm_moves_them(
    made: Callable[[dict[str, Tensor], Path], Path],
    teach: Callable[[Path, Path], patchmine.Run],
    encoder: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    run = teach(made(encoder, tmp_path), tmp_path)
    found, wanted = run.encoder(), dict(encoder)
    wanted["pos_embed"] = resample_abs_pos_embed(wanted["pos_embed"], [3, 5], [4, 4])
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    plain = network(num_classes=0, dynamic_img_size=True).eval()
    plain.load_state_dict(encoder)
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        expected = plain.forward_features(images)
        torch.testing.assert_close(found.eval().forward_features(images), expected)

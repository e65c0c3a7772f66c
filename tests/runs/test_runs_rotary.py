"""A run on a rotary encoder: exact when resumed, and its encoder opens in timm and at other sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from drawn import draw_images

import patchmine
from patchmine.train.checkpoint import load

pytestmark = pytest.mark.bitwise


def test_a_run_on_dinov3_resumes_exactly_and_leaves_for_timm(tmp_path: Path) -> None:
    data = draw_images(tmp_path / "images", 16, ("cat", "dog"))
    narrow = dict(name="hpm", decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)

    def settings(out: str, **more: Any) -> dict[str, Any]:
        return {
            "model": "vit_small_patch16_dinov3",
            "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2},
            **dict(image_size=16, patch_size=4, batch_size=8, steps=6, blr=1e-2, warmup_epochs=0),
            **dict(
                workers=0,
                tensorboard=False,
                sample_every=1000,
                device="cpu",
                data=str(data),
                method=narrow,
            ),
            **dict(out=str(tmp_path / out), say=lambda _: None),
            **more,
        }

    whole = patchmine.pretrain(**settings("whole"))
    parts = patchmine.pretrain(**settings("parts", checkpoint_every=4, keep_checkpoints=9))
    newest = parts.checkpoints[-1]
    newest.unlink()
    assert load(parts.checkpoints[-1]).step == 4
    patchmine.resume(parts.path, say=lambda _: None)
    first, second = load(whole.checkpoint_dir / "last").model, load(newest).model
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    images = torch.randn(2, 3, 16, 16)
    encoder = timm.create_model(f"local-dir:{whole.export_dir}", pretrained=True).eval()
    with torch.no_grad():
        wanted = whole.encoder().eval().forward_features(images)
        torch.testing.assert_close(encoder.forward_features(images), wanted)

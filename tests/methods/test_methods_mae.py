"""MAE's own promises (docs/methods/mae.md)."""

from __future__ import annotations

import pytest
import torch

from patchmine.backbones.family import build_encoder, encode
from patchmine.errors import UserError
from patchmine.methods.mae import MAE
from patchmine.ops.patches import gather_patches
from patchmine.types import Batch, Mask, Progress

START = Progress(0, 10, 1)


def build(**options: object) -> MAE:
    torch.manual_seed(0)
    args = dict(embed_dim=32, depth=2, num_heads=2)
    encoder = build_encoder(
        "vit_tiny_patch16_224", image_size=(32, 32), patch_size=4, model_args=args
    )
    settings = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2) | options
    return MAE(MAE.Config(**settings), encoder)


def batch_of(images: torch.Tensor) -> Batch:
    rows = len(images)
    return Batch(
        [images], torch.arange(rows), torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.bool)
    )


def replace_masked(images: torch.Tensor, mask: Mask, value: float) -> torch.Tensor:
    pixel_mask = mask.as_bool().reshape(-1, 8, 8).repeat_interleave(4, 1).repeat_interleave(4, 2)
    return torch.where(pixel_mask[:, None], torch.full_like(images, value), images)


def test_masked_pixels_do_not_reach_the_encoder() -> None:
    method = build()
    images = torch.randn(2, 3, 32, 32)
    mask = method.draw_mask(images)
    changed = replace_masked(images, mask, 9.0)
    assert not torch.equal(changed, images)
    assert torch.equal(
        encode(method.encoder, changed, mask.visible), encode(method.encoder, images, mask.visible)
    )


def test_visible_pixels_are_no_target() -> None:
    method = build(norm_pix_loss=False)
    images = torch.randn(2, 3, 32, 32)
    mask = method.draw_mask(images)
    images.requires_grad_()
    painted = torch.zeros(2, mask.masked.shape[1], 48)
    (
        painted - gather_patches(images, mask.masked, (4, 4)).movedim(2, -1).flatten(2)
    ).square().mean().backward()
    assert torch.equal(images.grad, replace_masked(images.grad * 0, mask, 1.0) * images.grad)


def test_position_tables_do_not_learn() -> None:
    method = build()
    method(batch_of(torch.randn(2, 3, 32, 32)), START)["loss"].backward()
    assert method.encoder.pos_embed.grad is None
    assert "decoder_input.pos_embed" not in dict(method.named_parameters())


def test_slopes_are_repainted_after_some_steps() -> None:
    """Images that are linear ramps: the error falls far below that of the best constant guess, the
    pixels' variance.
    """
    method = build(norm_pix_loss=False, decoder_embed_dim=32)
    ramp = torch.linspace(-1, 1, 32)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    for step in range(250):
        slopes = torch.randn(16, 3, 2, 1, 1, generator=generator)
        images = slopes[:, :, 0] * ramp[:, None] + slopes[:, :, 1] * ramp[None]
        method.noise.begin(step)
        loss = method(batch_of(images), START)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.25 * images.var().item()


def test_settings_that_no_network_can_be_built_from() -> None:
    with pytest.raises(UserError, match=r"method\.mask_ratio=0\.99 leaves no patch visible"):
        build(mask_ratio=0.99)
    with pytest.raises(
        UserError, match=r"method\.decoder_embed_dim=18 must be a multiple of 4 .* try .*=24"
    ):
        build(decoder_embed_dim=18, decoder_num_heads=3)

"""MAE against numbers of the reference implementation (spec mae.md, section 10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from patchmine.models.vit import build_encoder, embed_patches, encode, prefix_tokens
from patchmine.ops.losses import squared_error
from patchmine.ops.masks import count_visible, lowest_visible
from patchmine.ops.patches import pixel_targets
from patchmine.types import Progress

pytestmark = pytest.mark.golden
START = Progress(0, 1, 1)


@pytest.fixture(scope="module")
def golden(load_golden: Callable[[str], Any]) -> Any:
    return load_golden("mae")


@pytest.fixture(scope="module")
def raster_rank(golden: Any) -> torch.Tensor:
    """Position in raster order of each visible token, for tensors that are stored in noise order."""
    return golden.tensors["ids_keep"].argsort(dim=1)


def in_raster_order(stored: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """CLS first, then the visible tokens sorted by patch number."""
    patches = stored[:, 1:].gather(1, rank[:, :, None].expand(-1, -1, stored.shape[-1]))
    return torch.cat([stored[:, :1], patches], dim=1)


def test_mask(golden: Any) -> None:
    mask = lowest_visible(golden.tensors["noise"], golden.meta["len_keep"])
    assert golden.meta["len_keep"] == count_visible(golden.meta["num_patches"], golden.config["mask_ratio"])
    assert torch.equal(mask.as_bool(), golden.tensors["mask"].bool())
    assert torch.equal(mask.visible, golden.tensors["ids_keep"].sort(dim=1).values)


def test_fixed_positions(golden: Any) -> None:
    c = golden.config
    encoder = build_encoder(
        "vit_tiny_patch16_224",
        image_size=(c["img_size"],) * 2,
        patch_size=c["patch_size"],
        model_args=dict(embed_dim=c["embed_dim"], depth=1, num_heads=c["num_heads"]),
    )
    torch.testing.assert_close(encoder.pos_embed.data, golden.tensors["state.pos_embed"], atol=1e-6, rtol=0)


def test_tokens(golden: Any, raster_rank: torch.Tensor) -> None:
    method = golden.build()
    images = golden.tensors["imgs"]
    mask = lowest_visible(golden.tensors["noise"], golden.meta["len_keep"])
    patches = embed_patches(method.encoder, images, mask.visible)
    entered = torch.cat([prefix_tokens(method.encoder, len(images)), patches], dim=1)
    expected = in_raster_order(golden.tensors["encoder_input"], raster_rank)
    torch.testing.assert_close(entered, expected, atol=2e-5, rtol=1e-4)
    latent = encode(method.encoder, images, mask.visible)
    torch.testing.assert_close(latent, in_raster_order(golden.tensors["latent"], raster_rank), atol=2e-5, rtol=1e-4)
    tokens = method.decoder_input(latent, mask)  # [CLS | visible | masked]
    order = torch.cat([mask.visible, mask.masked], dim=1)[:, :, None].expand(-1, -1, tokens.shape[-1])
    unshuffled = torch.zeros_like(tokens[:, 1:]).scatter(1, order, tokens[:, 1:])
    torch.testing.assert_close(unshuffled, golden.tensors["decoder_input"][:, 1:], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(tokens[:, 0], golden.tensors["decoder_input"][:, 0], atol=2e-5, rtol=1e-4)


def test_predictions(golden: Any) -> None:
    method = golden.build()
    mask = lowest_visible(golden.tensors["noise"], golden.meta["len_keep"])
    predicted = method.reconstruct(golden.tensors["imgs"], mask)
    expected = golden.tensors["pred"].gather(1, mask.masked[:, :, None].expand(-1, -1, predicted.shape[-1]))
    torch.testing.assert_close(predicted, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "norm_pix_loss"), [("pix", False), ("normpix", True)])
def test_loss_and_gradients(
    golden: Any,
    fed_noise: Callable[[torch.Tensor], Any],
    compare_gradients: Callable[..., None],
    kind: str,
    norm_pix_loss: bool,
) -> None:
    method = golden.build(norm_pix_loss=norm_pix_loss)
    method.noise = fed_noise(golden.tensors["noise"])
    everything = torch.arange(golden.meta["num_patches"]).expand(len(golden.tensors["imgs"]), -1)
    target = pixel_targets(golden.tensors["imgs"], everything, method.grid.patch, norm_pix_loss=norm_pix_loss)
    torch.testing.assert_close(target, golden.tensors[f"{kind}.target"], atol=1e-5, rtol=1e-5)
    per_patch = squared_error(golden.tensors["pred"], target)
    torch.testing.assert_close(per_patch, golden.tensors[f"{kind}.loss_per_patch"], atol=1e-5, rtol=1e-5)

    losses = method(golden.batch(), START)
    assert losses["loss"].item() == pytest.approx(golden.scalar(f"{kind}.loss"), rel=1e-5)
    losses["loss"].backward()
    compare_gradients(method, golden.gradients(kind))
    assert method.encoder.pos_embed.grad is None

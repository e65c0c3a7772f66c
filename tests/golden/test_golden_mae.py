"""MAE against numbers of the reference implementation."""

from __future__ import annotations

import pytest
import torch
from golden_vectors import FedNoise, Golden, batch_of, load_golden, load_weights, stored_names, wide
from torch import Tensor

from patchmine.backbones.family import encode
from patchmine.backbones.reference import from_reference_names
from patchmine.backbones.tokens import embed_patches, prefix_tokens
from patchmine.methods.mae import MAE
from patchmine.ops.losses import squared_error
from patchmine.ops.masks import count_visible, lowest_visible
from patchmine.ops.patches import pixel_targets
from patchmine.types import Mask, Progress

pytestmark = pytest.mark.golden
START = Progress(0, 1, 1)
KINDS = {"pix": False, "normpix": True}  # whether pixels are standardised within each patch
STORED = [kind for kind in KINDS if f"{kind}.loss_per_patch" in stored_names("mae")]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("mae")


@pytest.fixture(scope="module")
def mask(golden: Golden) -> Mask:
    return lowest_visible(golden["noise"], golden["ids_keep"].shape[1])


def build(golden: Golden, kind: str = "pix") -> MAE:
    """The method at the stored sizes with the stored weights."""
    config = MAE.Config(
        mask_ratio=golden.config["mask_ratio"], norm_pix_loss=KINDS[kind], **golden.decoder()
    )
    method = MAE(config, golden.encoder())
    load_weights(method, from_reference_names(golden.under("state.")))
    return method.train()


def own_name(name: str) -> str:
    (own,) = from_reference_names({name: None})
    return own


def in_raster_order(stored: Tensor, golden: Golden) -> Tensor:
    """CLS first, then the visible tokens, which are stored in the order of their noise, sorted by
    patch number.
    """
    rank = golden["ids_keep"].argsort(dim=1)
    return torch.cat([stored[:, :1], stored[:, 1:].gather(1, wide(rank, stored))], dim=1)


def test_mask(golden: Golden, mask: Mask) -> None:
    count = golden["noise"].shape[1]
    assert count == golden.setting("num_patches", count)
    assert mask.visible.shape[1] == golden.setting("len_keep", mask.visible.shape[1])
    assert mask.visible.shape[1] == count_visible(count, golden.config["mask_ratio"])
    assert torch.equal(mask.as_bool(), golden["mask"].bool())
    assert torch.equal(mask.visible, golden["ids_keep"].sort(dim=1).values)
    assert torch.equal(golden["ids_restore"], golden["noise"].argsort(dim=1).argsort(dim=1))


def test_fixed_positions(golden: Golden) -> None:
    method = MAE(MAE.Config(**golden.decoder()), golden.encoder())
    golden.check(method.encoder.pos_embed.data, "state.pos_embed", "table")
    golden.check(method.decoder_input.pos_embed, golden["state.decoder_pos_embed"][0, 1:], "table")


def test_tokens(golden: Golden, mask: Mask) -> None:
    method = build(golden)
    images = golden["imgs"]
    patches = embed_patches(method.encoder, images, mask.visible)
    entered = torch.cat([prefix_tokens(method.encoder, len(images)), patches], dim=1)
    golden.check(entered, in_raster_order(golden["encoder_input"], golden), "tokens")
    latent = encode(method.encoder, images, mask.visible)
    golden.check(latent, in_raster_order(golden["latent"], golden), "tokens")
    tokens = method.decoder_input(latent, mask)  # [CLS | visible | masked]
    order = torch.cat([mask.visible, mask.masked], dim=1)
    unshuffled = torch.zeros_like(tokens[:, 1:]).scatter(1, wide(order, tokens), tokens[:, 1:])
    golden.check(torch.cat([tokens[:, :1], unshuffled], dim=1), "decoder_input", "tokens")


def test_predictions(golden: Golden, mask: Mask) -> None:
    predicted = build(golden).reconstruct(golden["imgs"], mask)
    golden.check(predicted, golden["pred"].gather(1, wide(mask.masked, predicted)), "tokens")


@pytest.mark.parametrize("kind", STORED)
def test_loss_and_gradients(golden: Golden, kind: str) -> None:
    method = build(golden, kind)
    method.noise = FedNoise(golden["noise"])
    images = golden["imgs"]
    everything = torch.arange(method.grid.num_patches).expand(len(images), -1)
    target = pixel_targets(images, everything, method.grid.patch, norm_pix_loss=KINDS[kind])
    golden.check(target, f"{kind}.target", "target")
    golden.check(squared_error(golden["pred"], target), f"{kind}.loss_per_patch", "target")

    losses = method(batch_of(images), START)
    golden.check_number(losses["loss"], golden.scalar(f"{kind}.loss"))
    losses["loss"].backward()
    golden.check_gradients(dict(method.named_parameters()), golden.under(f"{kind}.grad."), own_name)
    assert method.encoder.pos_embed.grad is None

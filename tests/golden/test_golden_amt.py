"""AMT on MAE and on SimMIM against numbers of the reference implementation."""

from __future__ import annotations

import math

import pytest
import torch
from golden_vectors import FedNoise, Golden, batch_of, cut, load_golden, load_weights, pair, wide
from torch import Tensor

from patchmine.backbones.attention import class_attention
from patchmine.backbones.family import encode
from patchmine.backbones.reference import from_reference_names
from patchmine.methods.amt import AMT, probe
from patchmine.ops.alignment import align, attention_map
from patchmine.ops.losses import squared_error
from patchmine.ops.masks import sum_in_units, weighted_order
from patchmine.types import Mask, Progress

pytestmark = pytest.mark.golden
WARM, GUIDED = Progress(0, 400, 1), Progress(41, 400, 1)  # attention decides from epoch 41 on


def uniform_for(exponential: Tensor) -> Tensor:
    """The noise from which a method makes the stored exponential one."""
    return -torch.expm1(-exponential)


def roles(mask: Mask) -> Tensor:
    """1 masked, -1 thrown, 0 visible: (B, L)."""
    thrown = torch.full((len(mask.masked), mask.num_patches), -1.0)
    return thrown.scatter(1, mask.masked, 1.0).scatter(1, mask.visible, 0.0)


def kept(mask: Mask) -> Tensor:
    """What was not thrown, raster order: (B, V + M)."""
    return torch.cat([mask.visible, mask.masked], dim=1).sort(dim=1).values


def of_masked(of_kept: Tensor, mask: Mask) -> Tensor:
    """From values (B, V + M, ...) of what was kept those of what is masked (B, M, ...)."""
    return of_kept.gather(1, wide(torch.searchsorted(kept(mask), mask.masked), of_kept))


def in_patches(pixels: Tensor, patch: tuple[int, ...]) -> Tensor:
    """The sum of a map of pixels (B, 1, H, W) over every patch: (B, L)."""
    return cut(pixels, patch).sum(dim=-1)


# ---- on MAE ----


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("amt")


@pytest.fixture
def method(golden: Golden) -> AMT:
    config = AMT.Config(
        host="mae",
        mask_ratio=golden.config["mask_ratio"],
        throw_ratio=golden.config["throw_ratio"],
        norm_pix_loss=golden.setting("norm_pix_loss"),
        start_epoch=min(golden.config["epoch"], GUIDED.epoch),
        **golden.decoder(),
    )
    method = AMT(config, golden.encoder())
    load_weights(method, from_reference_names(golden.under("sd.")), absent=("maps.values",))
    return method.train()


def own_name(name: str) -> str:
    (own,) = from_reference_names({name: None})
    return own


def test_fixed_positions(golden: Golden, method: AMT) -> None:
    golden.check(method.decoder_input.pos_embed, golden["sd.decoder_pos_embed"][0, 1:], "table")
    golden.check(golden.encoder().pos_embed.data, "sd.pos_embed", "table")


def test_probe(golden: Golden, method: AMT) -> None:
    images, expected = golden["probe.images"], golden["probe.map"].flatten(1)
    attention = class_attention(method.encoder, images)
    golden.check(attention, golden["probe.attn_last"][:, :, 0], "tokens")
    golden.check(attention_map(attention[:, :, 1:]), expected, "map")
    golden.check(probe(method.encoder, images), expected, "map")


def test_alignment(golden: Golden, method: AMT) -> None:
    maps, boxes = golden["probe.map"].flatten(1), golden["align.boxes"].float()
    box, flip = boxes[:, 2:6] / boxes[:, [0, 1, 0, 1]], boxes[:, 6].bool()
    golden.check(align(maps, method.grid, box, flip, "area"), "align.area_token_weights", "map")
    released = align(maps, method.grid, box, flip, "released")  # a mean over pixels, there a sum
    pixels = method.grid.values_per_patch(1)
    golden.check(released, golden["align.released_token_weights"] / pixels, "map")
    golden.check(
        released, in_patches(golden["align.released_pixel_map"], method.grid.patch) / pixels, "map"
    )


def test_draw(golden: Golden, method: AMT) -> None:
    weights, pixels = golden["amt.token_weights"], method.grid.values_per_patch(1)
    golden.check(
        in_patches(golden["amt.pixel_map"], method.grid.patch) / pixels, weights / pixels, "map"
    )
    noise = uniform_for(golden["amt.exp_noise"])
    assert torch.equal(weighted_order(weights, noise), golden["amt.ids_shuffle"])
    assert torch.equal(golden["amt.ids_shuffle"].argsort(dim=1), golden["amt.ids_restore"])
    method.noise = FedNoise(noise)
    mask = method.draw_mask(golden["amt.images"], weights)
    assert torch.equal(roles(mask), golden["amt.mask"])
    counts = dict(masked=method.num_masked, thrown=method.num_thrown, visible=mask.visible.shape[1])
    assert counts.items() <= golden.meta["derived"].items()


def test_forward(golden: Golden, method: AMT) -> None:
    method.noise = FedNoise(uniform_for(golden["amt.exp_noise"]))
    images = golden["amt.images"]
    mask = method.draw_mask(images, golden["amt.token_weights"])
    latent = encode(method.encoder, images, mask.visible)
    draw = golden["amt.ids_shuffle"][
        :, method.num_masked + method.num_thrown :
    ]  # the stored order of visible tokens
    place = torch.searchsorted(mask.visible, draw.contiguous())
    drawn = torch.cat([latent[:, :1], latent[:, 1:].gather(1, wide(place, latent))], dim=1)
    golden.check(drawn, "amt.latent", "tokens")
    predicted, target = method.reconstruct(images, mask), method.target(images, mask)
    golden.check(predicted, of_masked(golden["amt.pred"], mask), "tokens")
    golden.check(target, of_masked(golden["amt.target_kept"], mask), "target")
    error = squared_error(predicted, target)[:, :, None]
    golden.check(error, of_masked(golden["amt.patch_loss_kept"][:, :, None], mask), "target")


def test_guided_loss_and_gradients(golden: Golden, method: AMT) -> None:
    """The whole step, with the stored weights in place of a map."""
    method.noise = FedNoise(uniform_for(golden["amt.exp_noise"]))
    method.attend = lambda batch: golden["amt.token_weights"]
    losses = method(batch_of(golden["amt.images"]), Progress(golden.config["epoch"], 400, 1))
    golden.check_number(losses["loss"], golden.scalar("amt.loss"))
    losses["loss"].backward()
    stored = golden.under("amt.grad.")
    assert set(stored) == set(golden.setting("grads", list(stored)))
    golden.check_gradients(dict(method.named_parameters()), stored, own_name)


def test_random_phase(golden: Golden, method: AMT) -> None:
    method.noise = FedNoise(golden["warm.noise"])
    assert not method.guided(WARM)
    images = golden["amt.images"]
    mask = method.draw_mask(images, None)
    assert torch.equal(mask.as_bool(), golden["warm.mask"].bool())
    predicted = method.reconstruct(images, mask)
    golden.check(predicted, golden["warm.pred"].gather(1, wide(mask.masked, predicted)), "tokens")
    latent = encode(method.encoder, images, mask.visible)
    # Stored in the order of the noise.
    place = golden["warm.ids_restore"].gather(1, mask.visible)
    stored = golden["warm.latent"]
    golden.check(latent[:, 1:], stored[:, 1:].gather(1, wide(place, stored)), "tokens")
    loss = method(batch_of(images), WARM)["loss"]
    golden.check_number(loss, golden.scalar("warm.loss"))
    loss.backward()
    golden.check_gradients(dict(method.named_parameters()), golden.under("warm.grad."), own_name)


# ---- on SimMIM ----


@pytest.fixture(scope="module")
def golden_simmim() -> Golden:
    return load_golden("amt_simmim")


def simmim_name(name: str) -> str:
    """The reference's mask token sits inside the encoder, its head is a 1 x 1 convolution."""
    ours = {
        "encoder.mask_token": "mask_token",
        "decoder.0.weight": "head.weight",
        "decoder.0.bias": "head.bias",
    }
    return ours.get(name, name)


@pytest.fixture
def on_simmim(golden_simmim: Golden) -> AMT:
    c = golden_simmim.config
    # Absolute positions are all that it can have: thrown patches have no place in a relative table.
    encoder = golden_simmim.encoder(
        "beit_base_patch16_224", use_abs_pos_emb=True, use_rel_pos_bias=False
    )
    config = AMT.Config(
        host="simmim",
        mask_ratio=c["mask_ratio"],
        throw_ratio=c["throw_ratio"],
        mask_unit=c["mask_patch"],
    )
    method = AMT(config, encoder)
    stored = {
        simmim_name(name): tensor.flatten(1) if name == "decoder.0.weight" else tensor
        for name, tensor in golden_simmim.under("sd.").items()
    }
    load_weights(method, stored, absent=("maps.values",))
    method.noise = FedNoise(uniform_for(golden_simmim["unit_exp_noise"]))
    return method.train()


@pytest.fixture
def patch_weights(golden_simmim: Golden, on_simmim: AMT) -> Tensor:
    return in_patches(golden_simmim["pixel_map"], on_simmim.grid.patch)


def test_units(golden_simmim: Golden, on_simmim: AMT, patch_weights: Tensor) -> None:
    golden, derived = golden_simmim, golden_simmim.meta["derived"]
    weights = sum_in_units(patch_weights, on_simmim.grid, on_simmim.per_unit)
    pixels = math.prod(on_simmim.per_unit) * on_simmim.grid.values_per_patch(1)
    golden.check(weights / pixels, golden["unit_weights"] / pixels, "map")
    order = weighted_order(golden["unit_weights"], uniform_for(golden["unit_exp_noise"]))
    assert torch.equal(order, golden["unit_order"])
    assert on_simmim.num_units == math.prod(pair(derived["units"]))
    assert (on_simmim.num_masked, on_simmim.num_thrown) == (
        derived["masked_units"],
        derived["thrown_units"],
    )
    mask = on_simmim.draw_mask(golden["images"], patch_weights)
    assert torch.equal(roles(mask), golden["mask"].flatten(1).float())
    assert kept(mask).shape[1] == derived["kept_tokens"]


def test_simmim_loss_and_gradients(
    golden_simmim: Golden, on_simmim: AMT, patch_weights: Tensor
) -> None:
    golden, images = golden_simmim, golden_simmim["images"]
    on_simmim.attend = lambda batch: patch_weights
    entered: list[Tensor] = []
    on_simmim.encoder.norm.register_forward_hook(
        lambda module, inputs, output: entered.append(output)
    )
    losses = on_simmim(batch_of(images), GUIDED)
    mask = on_simmim.draw_mask(images, patch_weights)
    latent = golden["latent_map"].flatten(2).transpose(1, 2)  # (B, V + M, D), raster order
    golden.check(entered[0][:, -mask.masked.shape[1] :], of_masked(latent, mask), "tokens")
    painted = on_simmim.reconstruct(images, mask)
    golden.check(
        painted, of_masked(cut(golden["recon_compact"], on_simmim.grid.patch), mask), "tokens"
    )
    error = (painted - on_simmim.target(images, mask)).abs().mean(dim=-1, keepdim=True)
    golden.check(error, of_masked(golden["patch_l1_kept"][:, :, None], mask), "target")

    golden.check_number(losses["loss"], golden.scalar("loss"))
    losses["loss"].backward()
    golden.check_gradients(dict(on_simmim.named_parameters()), golden.under("grad."), simmim_name)

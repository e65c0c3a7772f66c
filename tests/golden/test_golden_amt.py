"""AMT on MAE and on SimMIM against numbers of the reference implementation (spec amt.md, section 10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from patchmine.methods.amt import AMT, probe
from patchmine.models.attention import class_attention
from patchmine.models.official import from_reference_names
from patchmine.models.vit import build_encoder, encode
from patchmine.ops.alignment import align, attention_map
from patchmine.ops.losses import squared_error
from patchmine.ops.masks import sum_in_units, weighted_order
from patchmine.types import Batch, Mask, Progress

pytestmark = pytest.mark.golden
WARM, GUIDED = Progress(0, 400, 1), Progress(41, 400, 1)


def close(found: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=bound, rtol=0)


def uniform_for(exponential: Tensor) -> Tensor:
    """The noise from which a method makes the stored exponential one."""
    return -torch.expm1(-exponential)


def roles(mask: Mask) -> Tensor:
    """1 masked, -1 thrown, 0 visible: (B, L)."""
    thrown = torch.full((len(mask.masked), mask.num_patches), -1.0)
    return thrown.scatter(1, mask.masked, 1.0).scatter(1, mask.visible, 0.0)


def batch_of(images: Tensor) -> Batch:
    rows = len(images)
    box = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(rows, 4)
    return Batch([images], torch.arange(rows), box, torch.zeros(rows, dtype=torch.bool))


def stored(golden: Any, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in golden.tensors.items() if name.startswith(prefix)}


def kept(mask: Mask) -> Tensor:
    """What was not thrown, raster order: (B, V + M)."""
    return torch.cat([mask.visible, mask.masked], dim=1).sort(dim=1).values


def of_masked(of_kept: Tensor, mask: Mask) -> Tensor:
    """From values (B, V + M, ...) of what was kept those of what is masked (B, M, ...)."""
    place = torch.searchsorted(kept(mask), mask.masked)
    return of_kept.gather(1, place[:, :, None].expand(-1, -1, of_kept.shape[-1]))


def check_gradients(parameters: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected
    for name, gradient in expected.items():
        bound = 1e-5 * gradient.abs().max().item()
        found = parameters[name].grad
        assert found is not None, name
        torch.testing.assert_close(
            found.reshape(gradient.shape), gradient, atol=bound, rtol=0, msg=lambda t, n=name: f"{n}: {t}"
        )


# ---- on MAE ----


@pytest.fixture(scope="module")
def golden(load_golden: Callable[[str], Any]) -> Any:
    return load_golden("amt")


@pytest.fixture
def method(golden: Any) -> AMT:
    c = golden.config
    assert golden.meta["eps_layernorm"] == 1e-6
    encoder = build_encoder(
        "vit_tiny_patch16_224",
        image_size=(c["img"], c["img"]),
        patch_size=c["patch"],
        model_args=dict(embed_dim=c["dim"], depth=c["depth"], num_heads=c["heads"]),
    )
    config = AMT.Config(
        host="mae",
        mask_ratio=c["mask_ratio"],
        throw_ratio=c["throw_ratio"],
        norm_pix_loss=c["norm_pix"],
        decoder_embed_dim=c["ddim"],
        decoder_depth=c["ddepth"],
        decoder_num_heads=c["dheads"],
    )
    method = AMT(config, encoder)
    missing = method.load_state_dict(from_reference_names(stored(golden, "sd.")), strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == ["maps.values"]
    return method.train()


def test_probe(golden: Any, method: AMT) -> None:
    attention = class_attention(method.encoder, golden.tensors["probe.images"])
    close(attention, golden.tensors["probe.attn_last"][:, :, 0])
    close(attention_map(attention[:, :, 1:]), golden.tensors["probe.map"].flatten(1), 1e-6)
    close(probe(method.encoder, golden.tensors["probe.images"]), golden.tensors["probe.map"].flatten(1), 1e-6)


def test_alignment(golden: Any, method: AMT) -> None:
    maps = golden.tensors["probe.map"].flatten(1)
    boxes = golden.tensors["align.boxes"].float()
    box, flip = boxes[:, 2:6] / boxes[:, [0, 1, 0, 1]], boxes[:, 6].bool()
    close(align(maps, method.grid, box, flip, "area"), golden.tensors["align.area_token_weights"], 1e-6)
    released = align(maps, method.grid, box, flip, "released")  # a mean over pixels, there a sum
    close(released, golden.tensors["align.released_token_weights"] / method.grid.values_per_patch(1), 1e-6)


def test_draw(golden: Any, method: AMT, fed_noise: Callable[[Tensor], Any]) -> None:
    t = golden.tensors
    per_patch = t["amt.pixel_map"].unfold(2, *[method.grid.patch[0]] * 2).unfold(3, *[method.grid.patch[1]] * 2)
    close(per_patch.mean(dim=(-1, -2)).flatten(1), t["amt.token_weights"] / method.grid.values_per_patch(1), 1e-6)
    noise = uniform_for(t["amt.exp_noise"])
    assert torch.equal(weighted_order(t["amt.token_weights"], noise), t["amt.ids_shuffle"])
    method.noise = fed_noise(noise)
    mask = method.draw_mask(t["amt.images"], t["amt.token_weights"])
    assert torch.equal(roles(mask), t["amt.mask"])
    counts = dict(masked=method.num_masked, thrown=method.num_thrown, visible=mask.visible.shape[1])
    assert counts.items() <= golden.meta["derived"].items()


def test_forward(golden: Any, method: AMT, fed_noise: Callable[[Tensor], Any]) -> None:
    t = golden.tensors
    method.noise = fed_noise(uniform_for(t["amt.exp_noise"]))
    mask = method.draw_mask(t["amt.images"], t["amt.token_weights"])
    latent = encode(method.encoder, t["amt.images"], mask.visible)
    draw = t["amt.ids_shuffle"][:, method.num_masked + method.num_thrown :]  # the stored order of visible tokens
    place = torch.searchsorted(mask.visible, draw.contiguous())[:, :, None].expand(-1, -1, latent.shape[-1])
    close(torch.cat([latent[:, :1], latent[:, 1:].gather(1, place)], dim=1), t["amt.latent"])
    predicted, target = method.reconstruct(t["amt.images"], mask), method.target(t["amt.images"], mask)
    close(predicted, of_masked(t["amt.pred"], mask))
    close(target, of_masked(t["amt.target_kept"], mask))
    close(squared_error(predicted, target)[:, :, None], of_masked(t["amt.patch_loss_kept"][:, :, None], mask))


def test_guided_loss_and_gradients(golden: Any, method: AMT, fed_noise: Callable[[Tensor], Any]) -> None:
    """The whole step, with the stored weights in place of a map."""
    t = golden.tensors
    method.noise = fed_noise(uniform_for(t["amt.exp_noise"]))
    method.look = lambda batch: t["amt.token_weights"]
    losses = method(batch_of(t["amt.images"]), Progress(golden.config["epoch"], 400, 1))
    assert losses["loss"].item() == pytest.approx(golden.scalar("amt.loss"), rel=1e-6)
    losses["loss"].backward()
    expected = from_reference_names(stored(golden, "amt.grad."))
    assert set(stored(golden, "amt.grad.")) == set(golden.config["grads"])
    check_gradients(dict(method.named_parameters()), expected)


def test_random_phase(golden: Any, method: AMT, fed_noise: Callable[[Tensor], Any]) -> None:
    t = golden.tensors
    method.noise = fed_noise(t["warm.noise"])
    assert not method.guided(WARM)
    images = t["amt.images"]
    mask = method.draw_mask(images, None)
    assert torch.equal(mask.as_bool(), t["warm.mask"].bool())
    wide = mask.masked[:, :, None].expand(-1, -1, t["warm.pred"].shape[-1])
    close(method.reconstruct(images, mask), t["warm.pred"].gather(1, wide))
    loss = method(batch_of(images), WARM)["loss"]
    assert loss.item() == pytest.approx(golden.scalar("warm.loss"), rel=1e-6)
    loss.backward()
    check_gradients(dict(method.named_parameters()), from_reference_names(stored(golden, "warm.grad.")))


# ---- on SimMIM ----


@pytest.fixture(scope="module")
def golden_simmim(load_golden: Callable[[str], Any]) -> Any:
    return load_golden("amt_simmim")


def own_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's names -> ours: its mask token sits inside the encoder, its head is a 1 x 1 convolution."""
    ours = {"encoder.mask_token": "mask_token", "decoder.0.weight": "head.weight", "decoder.0.bias": "head.bias"}
    return {
        ours.get(name, name): tensor.flatten(1) if name == "decoder.0.weight" else tensor
        for name, tensor in tensors.items()
    }


@pytest.fixture
def on_simmim(golden_simmim: Any, fed_noise: Callable[[Tensor], Any]) -> AMT:
    c = golden_simmim.config
    assert golden_simmim.meta["eps_layernorm"] == 1e-6
    encoder = build_encoder(
        "beit_base_patch16_224",
        image_size=(c["img"], c["img"]),
        patch_size=c["patch"],
        model_args=dict(
            embed_dim=c["dim"],
            depth=c["depth"],
            num_heads=c["heads"],
            use_abs_pos_emb=True,
            use_rel_pos_bias=False,
        ),
    )
    config = AMT.Config(
        host="simmim", mask_ratio=c["mask_ratio"], throw_ratio=c["throw_ratio"], mask_unit=c["mask_patch"]
    )
    method = AMT(config, encoder)
    found = method.load_state_dict(own_names(stored(golden_simmim, "sd.")), strict=False)
    assert found.missing_keys == ["maps.values"]
    assert not found.unexpected_keys
    method.noise = fed_noise(uniform_for(golden_simmim.tensors["unit_exp_noise"]))
    return method.train()


@pytest.fixture
def patch_weights(golden_simmim: Any) -> Tensor:
    side = golden_simmim.config["patch"]
    pixels = golden_simmim.tensors["pixel_map"]
    return pixels.unfold(2, side, side).unfold(3, side, side).sum(dim=(-1, -2)).flatten(1)


def test_units(golden_simmim: Any, on_simmim: AMT, patch_weights: Tensor) -> None:
    t, derived = golden_simmim.tensors, golden_simmim.meta["derived"]
    weights = sum_in_units(patch_weights, on_simmim.grid, on_simmim.per_unit)
    pixels = golden_simmim.config["mask_patch"] ** 2
    close(weights / pixels, t["unit_weights"] / pixels, 1e-6)
    order = weighted_order(t["unit_weights"], uniform_for(t["unit_exp_noise"]))
    assert torch.equal(order, t["unit_order"])
    assert (on_simmim.num_units, on_simmim.num_masked) == (derived["units"] ** 2, derived["masked_units"])
    assert on_simmim.num_thrown == derived["thrown_units"]
    mask = on_simmim.draw_mask(t["images"], patch_weights)
    assert torch.equal(roles(mask), t["mask"].flatten(1).float())
    assert kept(mask).shape[1] == derived["kept_tokens"]


def test_simmim_loss_and_gradients(golden_simmim: Any, on_simmim: AMT, patch_weights: Tensor) -> None:
    t = golden_simmim.tensors
    on_simmim.look = lambda batch: patch_weights
    entered: list[Tensor] = []
    on_simmim.encoder.norm.register_forward_hook(lambda module, inputs, output: entered.append(output))
    losses = on_simmim(batch_of(t["images"]), GUIDED)
    mask = on_simmim.draw_mask(t["images"], patch_weights)
    latent = t["latent_map"].flatten(2).transpose(1, 2)  # (B, V + M, D), raster order
    close(entered[0][:, -mask.masked.shape[1] :], of_masked(latent, mask))
    painted = on_simmim.reconstruct(t["images"], mask)
    side = golden_simmim.config["patch"]
    folded = torch.nn.functional.pixel_unshuffle(t["recon_compact"], side).flatten(2).transpose(1, 2)
    close(painted, of_masked(folded, mask))
    error = (painted - on_simmim.target(t["images"], mask)).abs().mean(dim=-1, keepdim=True)
    close(error, of_masked(t["patch_l1_kept"][:, :, None], mask))

    assert losses["loss"].item() == pytest.approx(golden_simmim.scalar("loss"), rel=1e-6)
    losses["loss"].backward()
    check_gradients(dict(on_simmim.named_parameters()), own_names(stored(golden_simmim, "grad.")))

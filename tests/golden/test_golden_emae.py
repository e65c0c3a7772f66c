"""EMAE against a loop over parts and pairs in float64 (no author code exists)."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from golden_vectors import (
    FedNoise,
    Golden,
    batch_of,
    decoder_sizes,
    described,
    encoder_sizes,
    load_golden,
    load_weights,
    pair,
    setting_of,
)
from torch import Tensor

from patchmine.backbones.family import build_encoder
from patchmine.backbones.reference import from_reference_names
from patchmine.methods.emae import EMAE
from patchmine.ops.losses import squared_error
from patchmine.ops.parts import order_by_patch, parts_losses, split_parts, unseen_patches
from patchmine.ops.patches import pixel_targets
from patchmine.types import Progress

pytestmark = pytest.mark.golden
START = Progress(0, 1, 1)
CASES: dict[str, dict[str, Any]] = described("emae").get("cases", {})
MODELS = [name for name, case in CASES.items() if "config" in case]
ALONE = [
    name for name, case in CASES.items() if "config" not in case
]  # the loss on stored predictions
# Settings by the name of the consistency loss that they give; the first is the default.
CONSISTENCY = {
    "sc_l1_all": {},
    "sc_l1_overlap": {"sc_norm": "overlap"},
    "sc_l2_all": {"sc_dist": "l2"},
}


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("emae")


def build(golden: Golden, name: str, **options: Any) -> EMAE:
    """The method of a case with a network, with its weights and noise."""
    c = CASES[name]["config"]
    encoder = build_encoder(
        "vit_tiny_patch16_224",
        image_size=pair(setting_of(c, golden.meta, "image_size")),
        patch_size=setting_of(c, golden.meta, "patch_size"),
        model_args=encoder_sizes(c, golden.meta),
    )
    settings = dict(
        parts=c["K"], norm_pix_loss=c.get("norm_pix_loss", True), **decoder_sizes(c, golden.meta)
    )
    if "parts_used" in c:
        settings["parts_used"] = c["parts_used"]
    method = EMAE(EMAE.Config(**settings, **options), encoder)
    load_weights(method, from_reference_names(golden.under("sd.")))  # a strict MAE checkpoint
    method.noise = FedNoise(golden[f"{name}.noise"])
    return method.train()


def own_name(name: str) -> str:
    (own,) = from_reference_names({name: None})
    return own


def lined_up(pred: Tensor, parts: Tensor, num_used: int) -> Tensor:
    """Stored predictions (N, at least U, L, P) of all patches -> those of unseen patches as the
    loss takes them.
    """
    unseen = unseen_patches(parts, num_used)  # (N, U, M * V)
    values = pred[:, :num_used].gather(2, unseen[..., None].expand(-1, -1, -1, pred.shape[-1]))
    values = values.unflatten(2, (-1, parts.shape[2])).flatten(1, 2)  # (N, U * M, V, P)
    return values.index_select(1, order_by_patch(parts.shape[1], num_used))


def by_part(values: Tensor, parts: Tensor) -> Tensor:
    """(N, L, P) in raster order -> (N, K, V, P)."""
    wide = parts.flatten(1)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, wide).unflatten(1, parts.shape[1:])


@pytest.mark.parametrize("name", CASES)
def test_parts(golden: Golden, name: str) -> None:
    mask, part = golden[f"{name}.mask"], golden[f"{name}.part"]
    num_parts = CASES[name].get("config", CASES[name])["K"]
    assert mask.shape[1] == num_parts
    parts = split_parts(golden[f"{name}.noise"], num_parts)
    stored = golden[f"{name}.ids_shuffle"].unflatten(1, (num_parts, -1))
    assert torch.equal(parts, stored.sort(dim=2).values)
    seen = torch.zeros(mask.shape).scatter_(2, parts, 1.0)
    assert torch.equal(1 - seen, mask)
    numbers = part.gather(1, parts.flatten(1)).unflatten(1, parts.shape[1:])
    assert torch.equal(numbers, torch.arange(num_parts)[:, None].expand_as(numbers))
    unseen = unseen_patches(parts, num_parts)
    assert torch.equal(torch.zeros(mask.shape).scatter_(2, unseen, 1.0), mask)


@pytest.mark.parametrize("name", MODELS)
def test_fixed_positions(golden: Golden, name: str) -> None:
    golden.check(
        build(golden, name).decoder_input.pos_embed, golden["sd.decoder_pos_embed"][0, 1:], "table"
    )


@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_predictions(golden: Golden, name: str) -> None:
    method = build(golden, name)
    images = golden[f"{name}.imgs"]
    parts = method.draw_parts(images)
    latent = method.encode_parts(images, parts).unflatten(0, (len(images), -1))  # (N, U, 1 + V, D)
    used = latent.shape[1]
    stored = golden[f"{name}.latent"][:, :used]
    order = (
        golden[f"{name}.ids_shuffle"].unflatten(1, (method.num_parts, -1)).argsort(dim=2)[:, :used]
    )
    patches = stored[:, :, 1:].gather(2, order[..., None].expand(-1, -1, -1, stored.shape[-1]))
    golden.check(latent, torch.cat([stored[:, :, :1], patches], dim=2), "tokens")
    expected = lined_up(golden[f"{name}.pred"], parts, method.num_used)
    golden.check(method.reconstruct(images, parts), expected, "tokens")
    golden.check(method.targets(images, parts), by_part(golden[f"{name}.target"], parts), "tokens")


@pytest.mark.parametrize("name", MODELS)
def test_loss_of_each_patch(golden: Golden, name: str) -> None:
    method = build(golden, name)
    pred, target = golden[f"{name}.pred"][:, : method.num_used], golden[f"{name}.target"]
    found = squared_error(pred, target[:, None].expand_as(pred).contiguous())
    golden.check(found, f"{name}.loss_patch", "loss")
    everything = torch.arange(target.shape[1]).expand(len(target), -1)
    norm_pix_loss = method.config.norm_pix_loss
    own = pixel_targets(
        golden[f"{name}.imgs"], everything, method.grid.patch, norm_pix_loss=norm_pix_loss
    )
    golden.check(own, target, "tokens")


@pytest.mark.parametrize("name", ALONE)
def test_loss_of_each_stored_patch(golden: Golden, name: str) -> None:
    pred, target = golden[f"{name}.pred"][:, : CASES[name]["parts_used"]], golden[f"{name}.target"]
    golden.check(
        squared_error(pred, target[:, None].expand_as(pred).contiguous()),
        f"{name}.loss_patch",
        "loss",
    )


@pytest.mark.parametrize("kind", CONSISTENCY)
@pytest.mark.parametrize("name", MODELS)
def test_losses(golden: Golden, name: str, kind: str) -> None:
    expected = CASES[name]["losses"]
    method = build(golden, name, **CONSISTENCY[kind])
    losses = method(batch_of(golden[f"{name}.imgs"]), START)
    golden.check_number(losses["loss"], expected["loss_whole"] + expected[kind])
    if "total" in expected:
        golden.check_number(expected["loss_whole"] + expected["sc_l1_all"], expected["total"])
    if method.num_parts == 2 or method.num_used == 1:  # no patch has two predictions
        return
    golden.check_number(losses["reconstruction"], expected["loss_whole"])
    golden.check_number(losses["consistency"], expected[kind])
    golden.check_number(losses["disagreement"], expected["mean_abs_diff"])
    if kind == "sc_l1_all" and f"{name}.pair_loss" in golden:
        pairs = method.num_used * (method.num_used - 1) / 2
        golden.check_number(
            losses["consistency"], golden[f"{name}.pair_loss"].sum(dim=(1, 2)).mean().item() / pairs
        )


@pytest.mark.parametrize("name", MODELS)
def test_gradients(golden: Golden, name: str) -> None:
    method = build(golden, name)
    method(batch_of(golden[f"{name}.imgs"]), START)["loss"].backward()
    golden.check_gradients(dict(method.named_parameters()), golden.under(f"{name}.grad."), own_name)


def losses_alone(
    golden: Golden, name: str, distance: Literal["l1", "l2"]
) -> tuple[list[float], Tensor, Tensor, float]:
    """The three numbers of the loss on stored predictions, the gradients of the first two, and the
    share 1 - 2/K.
    """
    parts = split_parts(golden[f"{name}.noise"], CASES[name]["K"])
    num_used = CASES[name]["parts_used"]
    pred = golden[f"{name}.pred"].clone().requires_grad_()
    target = by_part(golden[f"{name}.target"], parts)
    found = parts_losses(lined_up(pred, parts, num_used), target, num_used, distance)
    grads = [
        torch.autograd.grad(value, pred, retain_graph=True)[0][:, :num_used] for value in found[:2]
    ]
    return [value.item() for value in found], *grads, 1 - 2 / parts.shape[1]


@pytest.mark.parametrize("name", ALONE)
def test_losses_alone(golden: Golden, name: str) -> None:
    expected = CASES[name]["losses"]
    (error, spread, apart), grad_whole, grad_spread, share = losses_alone(golden, name, "l1")
    golden.check_number(error, expected["loss_whole"])
    golden.check_number(2 * share * spread, expected["sc_l1_all"])
    golden.check_number(2 * spread, expected["sc_l1_overlap"])
    golden.check_number(apart, expected["mean_abs_diff"])
    golden.check_number(error + 2 * share * spread, expected["total"])
    golden.check(grad_whole, f"{name}.grad_whole", "gradient")
    golden.check(share * grad_spread, f"{name}.grad_sc_l1_all", "gradient")


@pytest.mark.parametrize("name", ALONE)
def test_squared_consistency_alone(golden: Golden, name: str) -> None:
    expected = CASES[name]["losses"]
    (_, spread, apart), _, grad_spread, share = losses_alone(golden, name, "l2")
    golden.check_number(2 * share * spread, expected["sc_l2_all"])
    golden.check_number(apart, expected["mean_abs_diff"])
    golden.check(share * grad_spread, f"{name}.grad_sc_l2_all", "gradient")

"""EMAE against a loop over parts and pairs in float64 (spec emae.md, section 10; no author code exists)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from patchmine.methods.emae import EMAE
from patchmine.models.vit import build_encoder
from patchmine.ops.losses import squared_error
from patchmine.ops.parts import order_by_patch, parts_losses, split_parts, unseen_patches
from patchmine.ops.patches import pixel_targets
from patchmine.types import Batch, Progress

pytestmark = pytest.mark.golden
START = Progress(0, 1, 1)
LOSS_CASES = ["k2", "k3", "k7", "ties4", "ties7", "used2of4", "used1of4"]


@pytest.fixture(scope="module")
def golden(load_golden: Callable[[str], Any]) -> Any:
    return load_golden("emae")


def case(golden: Any, name: str) -> dict[str, Any]:
    return golden.meta["cases"][name]


def build(golden: Any, fed_noise: Callable[[Tensor], Any], **options: Any) -> EMAE:
    c = case(golden, "full")["config"]
    encoder = build_encoder(
        "vit_tiny_patch16_224",
        image_size=(c["img_size"], c["img_size"]),
        patch_size=c["patch_size"],
        model_args=dict(embed_dim=c["embed_dim"], depth=c["depth"], num_heads=c["num_heads"]),
    )
    decoder = {name: c[name] for name in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")}
    method = EMAE(EMAE.Config(parts=c["K"], **decoder, **options), encoder)
    stored = golden.state("sd.")
    assert set(stored) - {"decoder_input.pos_embed"} == set(method.state_dict())  # a strict MAE checkpoint
    method.load_state_dict(stored, strict=False)
    torch.testing.assert_close(
        method.decoder_input.pos_embed, golden.tensors["sd.decoder_pos_embed"][0, 1:], atol=1e-6, rtol=0
    )
    method.noise = fed_noise(golden.tensors["full.noise"])
    return method.train()


def batch(golden: Any) -> Batch:
    images = golden.tensors["full.imgs"]
    rows = len(images)
    return Batch([images], torch.arange(rows), torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.bool))


def lined_up(pred: Tensor, parts: Tensor, num_used: int) -> Tensor:
    """Stored predictions (N, at least U, L, P) of all patches -> those of unseen patches as the loss takes them."""
    unseen = unseen_patches(parts, num_used)  # (N, U, M * V)
    values = pred[:, :num_used].gather(2, unseen[..., None].expand(-1, -1, -1, pred.shape[-1]))
    values = values.unflatten(2, (-1, parts.shape[2])).flatten(1, 2)  # (N, U * M, V, P)
    return values.index_select(1, order_by_patch(parts.shape[1], num_used))


def by_part(values: Tensor, parts: Tensor) -> Tensor:
    """(N, L, P) in raster order -> (N, K, V, P)."""
    wide = parts.flatten(1)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, wide).unflatten(1, parts.shape[1:])


@pytest.mark.parametrize("name", ["full", *LOSS_CASES])
def test_parts(golden: Any, name: str) -> None:
    mask, part = golden.tensors[f"{name}.mask"], golden.tensors[f"{name}.part"]
    num_parts = mask.shape[1]
    parts = split_parts(golden.tensors[f"{name}.noise"], num_parts)
    stored = golden.tensors[f"{name}.ids_shuffle"].unflatten(1, (num_parts, -1))
    assert torch.equal(parts, stored.sort(dim=2).values)
    seen = torch.zeros(mask.shape).scatter_(2, parts, 1.0)
    assert torch.equal(1 - seen, mask)
    assert torch.equal(part.gather(1, parts.flatten(1)).unflatten(1, parts.shape[1:])[0, :, 0], torch.arange(num_parts))
    unseen = unseen_patches(parts, num_parts)
    assert torch.equal(torch.zeros(mask.shape).scatter_(2, unseen, 1.0), mask)


def test_tokens_and_predictions(golden: Any, fed_noise: Callable[[Tensor], Any]) -> None:
    method = build(golden, fed_noise)
    images = golden.tensors["full.imgs"]
    parts = method.draw_parts(images)
    latent = method.encode_parts(images, parts).unflatten(0, (len(images), -1))  # (N, K, 1 + V, D)
    stored = golden.tensors["full.latent"]
    order = golden.tensors["full.ids_shuffle"].unflatten(1, (stored.shape[1], -1)).argsort(dim=2)
    patches = stored[:, :, 1:].gather(2, order[..., None].expand(-1, -1, -1, stored.shape[-1]))
    torch.testing.assert_close(latent, torch.cat([stored[:, :, :1], patches], dim=2), atol=2e-5, rtol=0)
    expected = lined_up(golden.tensors["full.pred"], parts, method.num_used)
    torch.testing.assert_close(method.reconstruct(images, parts), expected, atol=2e-5, rtol=0)
    expected = by_part(golden.tensors["full.target"], parts)
    torch.testing.assert_close(method.targets(images, parts), expected, atol=2e-5, rtol=0)


def test_loss_of_each_patch(golden: Any) -> None:
    pred, target = golden.tensors["full.pred"], golden.tensors["full.target"]
    found = squared_error(pred, target[:, None].expand_as(pred).contiguous())
    torch.testing.assert_close(found, golden.tensors["full.loss_patch"], rtol=1e-5, atol=0)
    c = case(golden, "full")["config"]
    everything = torch.arange(target.shape[1]).expand(len(target), -1)
    own = pixel_targets(golden.tensors["full.imgs"], everything, (c["patch_size"],) * 2, norm_pix_loss=True)
    torch.testing.assert_close(own, target, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "sc_l1_all"),
        ({"sc_norm": "overlap"}, "sc_l1_overlap"),
        ({"sc_dist": "l2"}, "sc_l2_all"),
    ],
)
def test_losses(golden: Any, fed_noise: Callable[[Tensor], Any], options: dict[str, str], name: str) -> None:
    expected = case(golden, "full")["losses"]
    losses = build(golden, fed_noise, **options)(batch(golden), START)
    assert losses["reconstruction"].item() == pytest.approx(expected["loss_whole"], rel=1e-5)
    assert losses["consistency"].item() == pytest.approx(expected[name], rel=1e-5)
    assert losses["disagreement"].item() == pytest.approx(expected["mean_abs_diff"], rel=1e-5)
    assert losses["loss"].item() == pytest.approx(expected["loss_whole"] + expected[name], rel=1e-5)
    if not options:
        assert losses["loss"].item() == pytest.approx(expected["total"], rel=1e-5)
        pairs = golden.tensors["full.pair_loss"].sum(dim=(1, 2)).mean() / 6
        assert losses["consistency"].item() == pytest.approx(pairs.item(), rel=1e-5)


def test_gradients(golden: Any, fed_noise: Callable[[Tensor], Any], compare_gradients: Callable[..., None]) -> None:
    method = build(golden, fed_noise)
    method(batch(golden), START)["loss"].backward()
    compare_gradients(method, golden.gradients("full"), relative=1e-4)


def losses_alone(golden: Any, name: str, distance: Literal["l1", "l2"]) -> tuple[list[float], Tensor, Tensor, float]:
    """The three numbers of the loss on stored predictions, the gradients of the first two, and the share 1 - 2/K."""
    parts = split_parts(golden.tensors[f"{name}.noise"], case(golden, name)["K"])
    num_used = case(golden, name)["parts_used"]
    pred = golden.tensors[f"{name}.pred"].clone().requires_grad_()
    target = by_part(golden.tensors[f"{name}.target"], parts)
    found = parts_losses(lined_up(pred, parts, num_used), target, num_used, distance)
    grads = [torch.autograd.grad(value, pred, retain_graph=True)[0][:, :num_used] for value in found[:2]]
    return [value.item() for value in found], *grads, 1 - 2 / parts.shape[1]


@pytest.mark.parametrize("name", LOSS_CASES)
def test_losses_alone(golden: Any, name: str) -> None:
    expected = case(golden, name)["losses"]
    (error, spread, apart), grad_whole, grad_spread, share = losses_alone(golden, name, "l1")
    assert error == pytest.approx(expected["loss_whole"], rel=1e-5)
    assert 2 * share * spread == pytest.approx(expected["sc_l1_all"], rel=1e-5)
    assert 2 * spread == pytest.approx(expected["sc_l1_overlap"], rel=1e-5)
    assert apart == pytest.approx(expected["mean_abs_diff"], rel=1e-5)
    assert error + 2 * share * spread == pytest.approx(expected["total"], rel=1e-5)
    close_to(grad_whole, golden.tensors[f"{name}.grad_whole"])
    close_to(share * grad_spread, golden.tensors[f"{name}.grad_sc_l1_all"])


@pytest.mark.parametrize("name", LOSS_CASES)
def test_squared_consistency_alone(golden: Any, name: str) -> None:
    expected = case(golden, name)["losses"]
    (_, spread, apart), _, grad_spread, share = losses_alone(golden, name, "l2")
    assert 2 * share * spread == pytest.approx(expected["sc_l2_all"], rel=1e-5)
    assert apart == pytest.approx(expected["mean_abs_diff"], rel=1e-5)
    close_to(share * grad_spread, golden.tensors[f"{name}.grad_sc_l2_all"])


def close_to(found: Tensor, expected: Tensor) -> None:
    """Within 1e-4 of the largest entry; nothing where all is zero."""
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)

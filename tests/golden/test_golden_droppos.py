"""DropPos against numbers of the reference implementation (spec droppos.md, section 10).

The reference keeps visible tokens in the order of their noise, we in raster order, those without position last: stored
tensors are brought into our order first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.methods.droppos import DropPos, Puzzle, attentive_weights
from patchmine.models.vit import build_encoder, encode
from patchmine.ops.losses import squared_error
from patchmine.ops.patches import pixel_targets
from patchmine.ops.positions import smoothing_map
from patchmine.types import Batch, Progress

pytestmark = pytest.mark.golden

CASES = ["plain", "full", "compat_grid", "multi", "conf", "wrongpos", "zeros"]
NAMES = {
    "mask_pos_token": "position_token",
    "mask_token": "pixel_input.mask_token",
    "decoder_embed.": "decoder_embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.head.",
    "aux_decoder_embed.": "pixel_input.embed.",
    "aux_decoder_blocks.": "pixel_decoder.blocks.",
    "aux_decoder_norm.": "pixel_decoder.norm.",
    "aux_decoder_pred.": "pixel_decoder.head.",
}


def own_name(name: str) -> str:
    theirs = next((start for start in NAMES if name.startswith(start)), None)
    return f"encoder.{name}" if theirs is None else NAMES[theirs] + name.removeprefix(theirs)


class Draws:
    """Stands in for a method's noise and gives what was stored, one after the other."""

    def __init__(self, *stored: Tensor) -> None:
        self.stored = list(stored)

    def uniform(self, rows: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        noise = self.stored.pop(0)
        assert noise.shape == (rows, *shape)
        return noise.to(device)


@pytest.fixture(scope="module")
def golden(load_golden: Callable[[str], Any]) -> Any:
    return load_golden("droppos")


def case(golden: Any, name: str) -> dict[str, Any]:
    return next(entry for entry in golden.meta["cases"] if entry["name"] == name)


def stored_width(golden: Any, name: str) -> float:
    """Width of the smoothed targets of a case."""
    c = golden.config
    at_epoch = c["sigma0"] * (1 - c["epoch"] / c["epochs"])
    return {"zero": 0.0, "sigma0": c["sigma0"], "epoch": at_epoch, "mis": at_epoch}[case(golden, name)["sigma"]]


def noise(golden: Any, name: str) -> Draws:
    """Both stored draws, the second with its numbers at the same patches, and one that repeats the permutation."""
    t = golden.tensors
    raster = t["masking/ids_keep"].argsort(dim=1)
    draws = [t["noise_patch"], t["noise_pos"].gather(1, raster)]
    if case(golden, name)["flags"].get("mask_token_type") == "wrong_pos":
        # Entry k of the permutation is about the k-th token without position in the order of the second noise.
        by_rank = t["noise_pos"].argsort(dim=1)[:, golden.meta["derived"]["kept_pos"] :]
        place = t["masking/ids_keep"].gather(1, by_rank).argsort(dim=1).argsort(dim=1)  # (N, Q) in raster order
        order = torch.zeros_like(place).scatter(1, place, place[:, t["wrongpos/perm_dropped"]])
        ranks = torch.arange(order.shape[1]).expand_as(order).float()
        draws.append(torch.zeros(order.shape).scatter(1, order, ranks))
    return Draws(*draws)


def build(golden: Any, name: str) -> DropPos:
    """The method at the stored sizes, with the stored weights and the options of one case."""
    c, flags = golden.config, dict(case(golden, name)["flags"])
    assert (c["norm_eps"], c["mlp_ratio"]) == (1e-6, 4.0), "decoders are built with these"
    options = dict(
        attentive=flags.pop("attn_guide", False),
        conf_ignore=flags.pop("conf_ignore", False),
        multi_task=flags.pop("multi_task", False),
        mask_token_type=flags.pop("mask_token_type", "param"),
    )
    assert not flags, "options of the reference that we do not know"
    options |= {key: c[key] for key in ("mask_ratio", "pos_mask_ratio", "pos_weight", "norm_pix_loss", "temperature")}
    options |= {key: c[key] for key in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")}
    encoder = build_encoder(
        "vit_tiny_patch16_224",
        image_size=(c["img_size"], c["img_size"]),
        patch_size=c["patch_size"],
        model_args=dict(embed_dim=c["embed_dim"], depth=c["depth"], num_heads=c["num_heads"]),
    )
    width = stored_width(golden, name)
    method = DropPos(DropPos.Config(**options, smoothing=width, smoothing_decay=False), encoder)
    if case(golden, name)["sigma"] == "mis":
        method.smoothing_size = (c["compat_grid"],) * 2
    own = method.state_dict()
    stored = {own_name(key.removeprefix("weights/")): t for key, t in golden.tensors.items() if "weights/" in key}
    torch.testing.assert_close(own["encoder.pos_embed"], stored["encoder.pos_embed"], atol=1e-6, rtol=0)
    method.load_state_dict({key: stored[key] for key in own})
    if f"{name}/decoder_pred.bias" in golden.tensors:
        with torch.no_grad():
            method.decoder.head.bias.copy_(golden.tensors[f"{name}/decoder_pred.bias"])
    method.noise = noise(golden, name)
    return method.train()


def batch(golden: Any) -> Batch:
    images = golden.tensors["images"]
    rows = len(images)
    return Batch([images], torch.arange(rows), torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.bool))


def ours(stored: Tensor, golden: Any, puzzle: Puzzle) -> Tensor:
    """One entry per visible token, (N, V, ...) or (N, 1 + V, ...), in the order of our encoder."""
    prefix, tokens = stored.split([stored.shape[1] - golden.meta["derived"]["visible"], puzzle.visible.shape[1]], dim=1)
    where = (golden.tensors["masking/ids_keep"][:, None] == puzzle.visible[:, :, None]).int().argmax(dim=2)
    where = where.reshape(*where.shape, *(1,) * (tokens.ndim - 2)).expand(-1, -1, *tokens.shape[2:])
    return torch.cat([prefix, tokens.gather(1, where)], dim=1)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_puzzle(golden: Any) -> None:
    t, derived = golden.tensors, golden.meta["derived"]
    method = build(golden, "plain")
    counts = (method.grid.num_patches, method.num_visible, method.num_kept, method.num_dropped)
    assert counts == (derived["L"], derived["visible"], derived["kept_pos"], derived["dropped_pos"])
    puzzle = method.draw_puzzle(t["images"])
    assert torch.equal(puzzle.mask.as_bool(), t["masking/mask"].bool())
    assert torch.equal(puzzle.visible.sort(dim=1).values, t["masking/ids_keep"].sort(dim=1).values)
    assert torch.equal(t["masking/labels"], t["masking/ids_keep"])
    lost = ours(t["masking/mask_pos"], golden, puzzle).bool()
    assert not lost[:, : method.num_kept].any()
    assert lost[:, method.num_kept :].all()


def test_smoothing(golden: Any) -> None:
    t, c = golden.tensors, golden.config
    side = c["img_size"] // c["patch_size"]
    width = golden.scalar("sigma_epoch")
    assert width == pytest.approx(c["sigma0"] * (1 - c["epoch"] / c["epochs"]))
    close(smoothing_map((side, side), c["sigma0"], norm="column"), t["smooth/sigma0"], 2e-7)
    close(smoothing_map((side, side), width, norm="column"), t["smooth/sigma_epoch"], 2e-7)
    close(smoothing_map((c["compat_grid"],) * 2, width, norm="column"), t["smooth/compat_grid"], 2e-7)


def test_smoothing_of_the_published_size(golden: Any) -> None:
    t = golden.tensors
    encoder = build_encoder("vit_tiny_patch16_224", model_args=dict(embed_dim=4, depth=1, num_heads=1))
    start, decoder = Progress(0, 800, 1), dict(decoder_embed_dim=4, decoder_depth=1, decoder_num_heads=1)
    for grid, stored in (("patches", "smooth14"), ("as_run", "smooth14_asrun")):
        method = DropPos(DropPos.Config(smoothing_grid=grid, **decoder), encoder)
        full = method.smoothed_places(start, torch.device("cpu"))
        assert full.shape == (196, 196)
        rows = [key for key in t if key.startswith(f"{stored}/sigma1_row") and key.split("row")[-1].isdigit()]
        assert rows
        for key in rows:
            close(full[int(key.split("row")[-1])], t[key], 2e-7)
        if grid == "patches":
            close(full.sum(dim=1), t["smooth14/sigma1_rowsum"], 1e-6)
            close(full.sum(dim=0), t["smooth14/sigma1_colsum"], 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_forward(golden: Any, name: str) -> None:
    t = golden.tensors
    method = build(golden, name)
    puzzle = method.draw_puzzle(t["images"])
    entered: list[Tensor] = []
    method.encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    latent = method.encode(t["images"], puzzle)
    # A matrix product in place of the convolution: three units in the last place at most, where numbers are above 4.
    torch.testing.assert_close(entered[0], ours(t[f"{name}/enc_in"], golden, puzzle), atol=1e-6, rtol=1e-6)
    close(latent, ours(t[f"{name}/latent"], golden, puzzle), 2e-5)
    narrow = method.decoder_embed(latent)
    close(narrow, ours(t[f"{name}/decoder_embed_out"], golden, puzzle), 2e-5)
    seen = method.decoder(narrow, narrow.shape[1])
    close(seen, ours(t[f"{name}/decoder_norm_out"], golden, puzzle), 2e-5)
    logits = ours(t[f"{name}/logits"], golden, puzzle)
    close(method.locate(latent, method.num_visible), logits, 2e-5)
    close(method.locate(latent, method.num_dropped), logits[:, method.num_kept :], 2e-5)


@pytest.mark.parametrize("name", ["full", "compat_grid", "multi"])
def test_attentive_weights(golden: Any, name: str) -> None:
    t = golden.tensors
    method = build(golden, name)
    features = encode(method.encoder, t["images"])
    close(features, t["full_feat"], 2e-5)
    everywhere = attentive_weights(features[:, 0], features[:, 1:], golden.config["temperature"])
    close(everywhere, t[f"{name}/attn_full"], 1e-6)
    puzzle = method.draw_puzzle(t["images"])
    expected = ours(t[f"{name}/attn_visible"], golden, puzzle)[:, method.num_kept :]
    close(method.weigh(t["images"], puzzle), expected, 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_targets_entropies_and_weights_of_each_token(golden: Any, name: str) -> None:
    """From the stored logits, one token at a time: a batch of one token has its cross-entropy for a loss."""
    t = golden.tensors
    method = build(golden, name)
    at = Progress(0, 1, 1)
    smoothed = method.smoothed_places(at, torch.device("cpu"))
    if f"{name}/labels_smooth" in t:
        close(smoothed[t["masking/ids_keep"]], t[f"{name}/labels_smooth"], 2e-7)
    logits, places = t[f"{name}/logits"], t["masking/ids_keep"]
    if name == "conf":
        certainty = logits.softmax(dim=-1).gather(2, places[:, :, None]).squeeze(2)
        close(certainty, t["conf/conf"], 1e-6)
        close(smoothed.diagonal()[places], t["conf/conf_thresh"], 2e-7)
    counts = t[f"{name}/weight_per_token"]
    for row, slot in ((0, 0), (1, 3), (2, 15)):
        token = (slice(row, row + 1), slice(slot, slot + 1))
        one = method.position_losses(logits[token], places[token], None, at)["loss"]
        ignored = name == "conf" and t["conf/conf"][row, slot] >= t["conf/conf_thresh"][row, slot]
        if not ignored:
            assert one.item() == pytest.approx(t[f"{name}/ce_per_token"][row, slot].item(), rel=1e-5)
    weighted = (counts * t[f"{name}/ce_per_token"]).sum() / counts.sum()
    assert weighted.item() == pytest.approx(golden.scalar(name)["loss"], rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients(golden: Any, name: str) -> None:
    method = build(golden, name)
    expected = golden.scalar(name)
    losses = method(batch(golden), Progress(0, 1, 1))
    position = losses["position"] if "loss_total" in expected else losses["loss"]
    assert position.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert losses["accuracy"].item() == pytest.approx(expected["acc_unweighted"], abs=1e-6)
    reported = losses.get("weighted_accuracy", losses["accuracy"])
    assert reported.item() == pytest.approx(expected["acc_reported"], abs=1e-5)
    if "loss_total" in expected:
        assert losses["pixels"].item() == pytest.approx(expected["loss_mae"], rel=1e-5)
        assert losses["loss"].item() == pytest.approx(expected["loss_total"], rel=1e-5)
    losses["loss"].backward()
    parameters = dict(method.named_parameters())
    stored = {key.split("/grad/")[1]: t for key, t in golden.tensors.items() if key.startswith(f"{name}/grad/")}
    assert set(stored) == set(case(golden, name)["grads"])
    for key, gradient in stored.items():
        found = parameters[own_name(key)].grad
        torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    assert method.encoder.pos_embed.grad is None


def test_row_normalisation(golden: Any) -> None:
    """The other of the two normalisations: its loss is in the specification and not among the vectors."""
    method = build(golden, "full")
    method.config = method.config.model_copy(update={"smoothing_norm": "row"})
    losses = method(batch(golden), Progress(0, 1, 1))
    assert losses["loss"].item() == pytest.approx(4.274886, rel=1e-5)


def test_pixels_of_the_second_task(golden: Any) -> None:
    t = golden.tensors
    method = build(golden, "multi")
    puzzle = method.draw_puzzle(t["images"])
    tokens = method.pixel_input(method.encode(t["images"], puzzle), puzzle.mask)
    painted = method.pixel_decoder.head(method.pixel_decoder(tokens, puzzle.removed.shape[1]))
    wanted = puzzle.removed[:, :, None].expand(-1, -1, painted.shape[-1])
    close(painted, t["multi/mae_pred"].gather(1, wanted), 2e-5)
    target = pixel_targets(t["images"], puzzle.removed, method.grid.patch, norm_pix_loss=method.config.norm_pix_loss)
    expected = t["multi/mae_loss_per_patch"].gather(1, puzzle.removed)
    assert F.l1_loss(squared_error(painted, target), expected).item() < 1e-5

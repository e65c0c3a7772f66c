"""DropPos against numbers of the reference implementation.

The reference keeps visible tokens in the order of their noise, we in raster order, those without
position last: stored tensors are brought into our order first.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_vectors import (
    FedNoise,
    Golden,
    batch_of,
    described,
    load_golden,
    pair,
    repeating,
    stored_names,
    wide,
)
from torch import Tensor

from patchmine.backbones.family import build_encoder, encode
from patchmine.methods.droppos import DropPos, attentive_weights
from patchmine.models.puzzles import Puzzle
from patchmine.ops.losses import squared_error
from patchmine.ops.patches import pixel_targets
from patchmine.ops.position_targets import smoothing_map
from patchmine.types import Progress

pytestmark = pytest.mark.golden

CASES: dict[str, dict[str, Any]] = {
    case["name"]: case for case in described("droppos").get("cases", [])
}
ATTENTIVE = [name for name, case in CASES.items() if case["flags"].get("attn_guide")]
TWO_TASKS = [name for name, case in CASES.items() if case["flags"].get("multi_task")]
# The grid of published runs, and what is ignored, have no meaning with the other normalisation.
BY_ROW = [
    name
    for name, case in CASES.items()
    if case["sigma"] != "mis" and not case["flags"].get("conf_ignore")
]
# Rows of whole maps of a square grid: smooth14/sigma1_row7, and smooth14_asrun/... of the map of
# published runs.
WHOLE = re.compile(r"smooth(\d+)(_asrun)?/sigma([\d.]+)_row(\d+|sum)$")
ROWS = [name for name in stored_names("droppos") if WHOLE.match(name)]
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


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("droppos")


def stored_width(golden: Golden, name: str) -> float:
    """Width of the smoothed targets of a case."""
    c = golden.config
    at_epoch = c["sigma0"] * (1 - c["epoch"] / c["epochs"])
    return {"zero": 0.0, "sigma0": c["sigma0"], "epoch": at_epoch, "mis": at_epoch}[
        CASES[name]["sigma"]
    ]


def noise(golden: Golden, name: str) -> FedNoise:
    """Both stored draws, the second with its numbers at the same patches, and one that repeats the
    permutation.
    """
    keep = golden["masking/ids_keep"]
    draws = [golden["noise_patch"], golden["noise_pos"].gather(1, keep.argsort(dim=1))]
    if f"{name}/perm_dropped" in golden:
        # Entry k of the permutation is about the k-th token without position in the order of the
        # second noise.
        by_rank = golden["noise_pos"].argsort(dim=1)[:, golden.meta["derived"]["kept_pos"] :]
        place = keep.gather(1, by_rank).argsort(dim=1).argsort(dim=1)  # (N, Q) in raster order
        order = torch.zeros_like(place).scatter(1, place, place[:, golden[f"{name}/perm_dropped"]])
        draws.append(repeating(order))
    return FedNoise(*draws)


def build(golden: Golden, name: str) -> DropPos:
    """The method at the stored sizes, with the stored weights and the options of one case."""
    c, flags = golden.config, dict(CASES[name]["flags"])
    flags.pop(
        "shuffle", None
    )  # of the order in which the encoder sees the tokens, which changes rounding alone
    options = dict(
        attentive=flags.pop("attn_guide", False),
        conf_ignore=flags.pop("conf_ignore", False),
        multi_task=flags.pop("multi_task", False),
        mask_token_type=flags.pop("mask_token_type", "param"),
    )
    assert not flags, "options of the reference that we do not know"
    options |= {
        key: c[key]
        for key in ("mask_ratio", "pos_mask_ratio", "pos_weight", "norm_pix_loss", "temperature")
    }
    width = stored_width(golden, name)
    config = DropPos.Config(**options, **golden.decoder(), smoothing=width, smoothing_decay=False)
    method = DropPos(config, golden.encoder())
    if CASES[name]["sigma"] == "mis":
        method.smoothing_size = pair(c["compat_grid"])
    own = method.state_dict()
    stored = {own_name(key): t for key, t in golden.under("weights/").items()}
    golden.check(own["encoder.pos_embed"], stored["encoder.pos_embed"], "table")
    method.load_state_dict({key: stored[key] for key in own})
    if f"{name}/decoder_pred.bias" in golden:
        with torch.no_grad():
            method.decoder.head.bias.copy_(golden[f"{name}/decoder_pred.bias"])
    method.noise = noise(golden, name)
    return method.train()


def seen_order(golden: Golden, name: str) -> Tensor:
    """Numbers of the visible patches (N, V) in the order in which the encoder sees them in a case."""
    keep = golden["masking/ids_keep"]
    return (
        keep.gather(1, golden["noise_shuffle"].argsort(dim=1))
        if CASES[name]["flags"].get("shuffle")
        else keep
    )


def ours(stored: Tensor, keep: Tensor, puzzle: Puzzle) -> Tensor:
    """One entry per visible token in the order of ``keep``, (N, V, ...) or (N, 1 + V, ...), in that
    of our encoder.
    """
    prefix, tokens = stored.split([stored.shape[1] - keep.shape[1], keep.shape[1]], dim=1)
    where = (keep[:, None] == puzzle.visible[:, :, None]).int().argmax(dim=2)
    where = where.reshape(*where.shape, *(1,) * (tokens.ndim - 2)).expand(-1, -1, *tokens.shape[2:])
    return torch.cat([prefix, tokens.gather(1, where)], dim=1)


@pytest.mark.parametrize("name", CASES)
def test_puzzle(golden: Golden, name: str) -> None:
    derived, keep = golden.meta["derived"], golden["masking/ids_keep"]
    method = build(golden, name)
    counts = (method.grid.num_patches, method.num_visible, method.num_kept, method.num_dropped)
    assert counts == (derived["L"], derived["visible"], derived["kept_pos"], derived["dropped_pos"])
    puzzle = method.draw_puzzle(golden["images"])
    assert torch.equal(puzzle.mask.as_bool(), golden["masking/mask"].bool())
    assert torch.equal(puzzle.visible.sort(dim=1).values, keep.sort(dim=1).values)
    assert torch.equal(golden["masking/labels"], keep)
    lost = ours(golden["masking/mask_pos"], keep, puzzle).bool()
    assert not lost[:, : method.num_kept].any()
    assert lost[:, method.num_kept :].all()


def test_smoothing(golden: Golden) -> None:
    c = golden.config
    height, width = (
        side // step for side, step in zip(pair(c["img_size"]), pair(c["patch_size"]), strict=True)
    )
    at_epoch = golden.scalar("sigma_epoch")
    assert at_epoch == pytest.approx(c["sigma0"] * (1 - c["epoch"] / c["epochs"]))
    golden.check(
        smoothing_map((height, width), c["sigma0"], norm="column"), "smooth/sigma0", "smoothing"
    )
    golden.check(
        smoothing_map((height, width), at_epoch, norm="column"), "smooth/sigma_epoch", "smoothing"
    )
    if "smooth/compat_grid" in golden:
        compat = smoothing_map(pair(c["compat_grid"]), at_epoch, norm="column")
        golden.check(compat, "smooth/compat_grid", "smoothing")


@pytest.mark.parametrize("name", ROWS)
def test_smoothing_of_the_published_size(golden: Golden, name: str) -> None:
    """Rows of the whole map of a square grid, as published runs had it or as they meant it; patches
    of 16 pixels.
    """
    side, as_run, sigma, row = WHOLE.match(name).groups()
    encoder = build_encoder(
        "vit_tiny_patch16_224",
        image_size=(16 * int(side),) * 2,
        model_args=dict(embed_dim=4, depth=1, num_heads=1),
    )
    decoder = dict(decoder_embed_dim=4, decoder_depth=1, decoder_num_heads=1)
    grid = "as_run" if as_run else "patches"
    method = DropPos(
        DropPos.Config(smoothing_grid=grid, smoothing=float(sigma), **decoder), encoder
    )
    full = method.smoothed_places(Progress(0, 800, 1), torch.device("cpu"))
    assert full.shape == (int(side) ** 2,) * 2
    if row != "sum":
        golden.check(full[int(row)], name, "smoothing")
        return
    golden.check(full.sum(dim=1), name, "smoothing sums")
    golden.check(full.sum(dim=0), name.replace("rowsum", "colsum"), "smoothing sums")


@pytest.mark.parametrize("name", CASES)
def test_forward(golden: Golden, name: str) -> None:
    method = build(golden, name)
    puzzle = method.draw_puzzle(golden["images"])
    entered: list[Tensor] = []
    method.encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    latent = method.encode(golden["images"], puzzle)
    order = seen_order(golden, name)
    golden.check(entered[0], ours(golden[f"{name}/enc_in"], order, puzzle), "enc_in")
    golden.check(latent, ours(golden[f"{name}/latent"], order, puzzle), "tokens")
    narrow = method.decoder_embed(latent)
    golden.check(narrow, ours(golden[f"{name}/decoder_embed_out"], order, puzzle), "tokens")
    seen = method.decoder(narrow, narrow.shape[1])
    golden.check(seen, ours(golden[f"{name}/decoder_norm_out"], order, puzzle), "tokens")
    logits = ours(golden[f"{name}/logits"], golden["masking/ids_keep"], puzzle)
    golden.check(method.locate(latent, method.num_visible), logits, "tokens")
    golden.check(method.locate(latent, method.num_dropped), logits[:, method.num_kept :], "tokens")


@pytest.mark.parametrize("name", ATTENTIVE)
def test_attentive_weights(golden: Golden, name: str) -> None:
    method = build(golden, name)
    features = encode(method.encoder, golden["images"])
    golden.check(features, "full_feat", "tokens")
    everywhere = attentive_weights(features[:, 0], features[:, 1:], golden.config["temperature"])
    golden.check(everywhere, f"{name}/attn_full", "weights")
    puzzle = method.draw_puzzle(golden["images"])
    expected = ours(golden[f"{name}/attn_visible"], golden["masking/ids_keep"], puzzle)[
        :, method.num_kept :
    ]
    golden.check(method.weigh(golden["images"], puzzle), expected, "weights")


def ignored(golden: Golden, name: str) -> Tensor:
    """Tokens (N, V) that are placed so surely that a case leaves them out."""
    if not CASES[name]["flags"].get("conf_ignore"):
        return torch.zeros_like(golden["masking/ids_keep"], dtype=torch.bool)
    return golden[f"{name}/conf"] >= golden[f"{name}/conf_thresh"]


@pytest.mark.parametrize("name", CASES)
def test_targets_entropies_and_weights_of_each_token(golden: Golden, name: str) -> None:
    """From the stored logits, one token at a time: a batch of one token has its cross-entropy for a
    loss.
    """
    method = build(golden, name)
    at = Progress(0, 1, 1)
    smoothed = method.smoothed_places(at, torch.device("cpu"))
    logits, places = golden[f"{name}/logits"], golden["masking/ids_keep"]
    if f"{name}/labels_smooth" in golden:
        golden.check(smoothed[places], f"{name}/labels_smooth", "smoothing")
    if f"{name}/conf" in golden:
        certainty = logits.softmax(dim=-1).gather(2, places[:, :, None]).squeeze(2)
        golden.check(certainty, f"{name}/conf", "weights")
        golden.check(smoothed.diagonal()[places], f"{name}/conf_thresh", "smoothing")
    counts, entropies = golden[f"{name}/weight_per_token"], golden[f"{name}/ce_per_token"]
    for row, slot in (~ignored(golden, name)).nonzero().tolist():
        token = (slice(row, row + 1), slice(slot, slot + 1))
        one = method.position_losses(logits[token], places[token], None, at)["loss"]
        golden.check_number(one, entropies[row, slot].item())
    weighted = (counts * entropies).sum() / counts.sum()
    golden.check_number(weighted, golden.meta["scalars"][name]["loss"])


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients(golden: Golden, name: str) -> None:
    method = build(golden, name)
    expected = golden.meta["scalars"][name]
    losses = method(batch_of(golden["images"]), Progress(0, 1, 1))
    two_tasks = name in TWO_TASKS
    golden.check_number(losses["position" if two_tasks else "loss"], expected["loss"])
    golden.check_number(losses["accuracy"], expected["acc_unweighted"], "accuracy")
    reported = losses.get("weighted_accuracy", losses["accuracy"])
    golden.check_number(reported, expected["acc_reported"], "weighted accuracy")
    if two_tasks:
        golden.check_number(losses["pixels"], expected["loss_mae"])
        golden.check_number(losses["loss"], expected["loss_total"])
    losses["loss"].backward()
    stored = golden.under(f"{name}/grad/")
    assert set(stored) == set(CASES[name].get("grads", stored))
    golden.check_gradients(dict(method.named_parameters()), stored, own_name)
    assert method.encoder.pos_embed.grad is None


def normalised_by_row(size: tuple[int, int], width: float) -> Tensor:
    """exp(-distance^2 / width^2) for every pair of places, each target's weights divided by their
    sum: (L, L).
    """
    places = [(row, column) for row in range(size[0]) for column in range(size[1])]
    if width == 0:
        return torch.eye(len(places), dtype=torch.float64)
    rows = []
    for row, column in places:
        weights = [math.exp(-((row - r) ** 2 + (column - c) ** 2) / width**2) for r, c in places]
        rows.append([weight / sum(weights) for weight in weights])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("name", BY_ROW)
def test_row_normalisation(golden: Golden, name: str) -> None:
    """The other of the two normalisations, which no file has: its loss follows from the stored
    logits and weights.
    """
    method = build(golden, name)
    method.config = method.config.model_copy(update={"smoothing_norm": "row"})
    losses = method(batch_of(golden["images"]), Progress(0, 1, 1))
    targets = normalised_by_row(method.grid.size, stored_width(golden, name))[
        golden["masking/ids_keep"]
    ]
    entropies = -(targets * golden[f"{name}/logits"].double().log_softmax(dim=-1)).sum(dim=-1)
    counts = golden[f"{name}/weight_per_token"].double()
    expected = (counts * entropies).sum() / counts.sum()
    golden.check_number(losses.get("position", losses["loss"]), expected.item())


@pytest.mark.parametrize("name", TWO_TASKS)
def test_pixels_of_the_second_task(golden: Golden, name: str) -> None:
    method = build(golden, name)
    images, puzzle = golden["images"], method.draw_puzzle(golden["images"])
    golden.check(
        method.pixel_input.pos_embed, golden["weights/aux_decoder_pos_embed"][0, 1:], "table"
    )
    tokens = method.pixel_input(method.encode(images, puzzle), puzzle.mask)
    painted = method.pixel_decoder.head(method.pixel_decoder(tokens, puzzle.removed.shape[1]))
    golden.check(
        painted, golden[f"{name}/mae_pred"].gather(1, wide(puzzle.removed, painted)), "tokens"
    )
    target = pixel_targets(
        images, puzzle.removed, method.grid.patch, norm_pix_loss=method.config.norm_pix_loss
    )
    expected = golden[f"{name}/mae_loss_per_patch"].gather(1, puzzle.removed)
    golden.check_number(F.l1_loss(squared_error(painted, target), expected), 0.0, "mean error")

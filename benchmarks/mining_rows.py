"""The rows of mining.py: ways to mask, and the claims that compare them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.backbones.family import Encoder, transform
from patchmine.backbones.positions import resize_positions
from patchmine.backbones.tokens import embed_images
from patchmine.methods.hpm import HPM
from patchmine.models.decoder import DecoderInput
from patchmine.models.teacher import Teacher
from patchmine.ops.mining import ranks
from patchmine.task import Method


class Row(NamedTuple):
    """One way to mask.

    Args:
        method: its name.
        options: settings of the method.
        scores: what becomes of the scores (B, units) of which the largest are masked, or "half
            size": the teacher looks at images of half the size.
        small_first: share of the steps that a run at half the size takes, whose encoder this one
            goes on from.
    """

    method: str
    options: Mapping[str, Any] = {}
    scores: str = "hardest"
    small_first: float = 0.0


HALF_SIZE = "half size"
MASKED = {"look": "masked"}
HEAD = {"look": "masked", "predictor": "head"}
HEAD_ALONE = {"predictor": "head", "alpha_end": 0.0}
OBSERVED = {"look": "masked", "score": "observed", "predictor": "head"}
ORACLE = {"look": "masked", "score": "observed", "num_looks": 8, "prediction": "none"}
CROSS = {"decoder_attention": "cross", "predicted_share": 1 / 3}
ROWS = {
    "mae": Row("mae"),
    "prediction-alone": Row("hpm", {"alpha_end": 0.0}),
    "clipped": Row("hpm", {"prediction": "none", "alpha_end": 0.0}),
    "prediction-head": Row("hpm", HEAD_ALONE),
    "prediction-head-tenth": Row("hpm", {**HEAD_ALONE, "prediction_weight": 0.1}),
    "hpm": Row("hpm"),
    "hpm-tenth": Row("hpm", {"prediction_weight": 0.1}),
    "masked": Row("hpm", MASKED),
    "masked-head": Row("hpm", HEAD),
    "masked-head-2-blocks": Row("hpm", {**HEAD, "predictor_depth": 2}),
    "masked-head-every-2": Row("hpm", {**HEAD, "every": 2}),
    "observed": Row("hpm", {**ORACLE, "num_looks": 1}),
    "observed-head": Row("hpm", OBSERVED),
    "memory-head": Row("hpm", {"look": "memory", "predictor": "head"}),
    "memory": Row("hpm", {"look": "memory", "prediction": "none"}),
    "oracle": Row("hpm", ORACLE),
    "oracle-no-ramp": Row("hpm", {**ORACLE, "alpha_start": 0.5}),
    "oracle-quarter": Row("hpm", {**ORACLE, "alpha_end": 0.25}),
    "oracle-three-quarters": Row("hpm", {**ORACLE, "alpha_end": 0.75}),
    "easiest": Row("hpm", ORACLE, "easiest"),
    "position": Row("hpm", ORACLE, "position"),
    "blocks-2": Row("mae", {"mask_block": 2}),
    "blocks-4": Row("mae", {"mask_block": 4}),
    "green-noise": Row("mae", {"mask_noise": "green"}),
    "cross": Row("mae", CROSS),
    "cross-all": Row("mae", {"decoder_attention": "cross"}),
    "cross-masked-head": Row("hpm", {**HEAD, **CROSS}),
    "cross-head": Row("hpm", {"predictor": "head", **CROSS}),
    "half-size-first": Row("mae", small_first=0.5),
    "centred": Row("hpm", {}, "centred"),
    "stratified": Row("hpm", {}, "stratified"),
    "half-size-look": Row("hpm", {}, HALF_SIZE),
    "amt": Row("amt"),
    "emae": Row("emae"),
    "semaim": Row("semaim"),
    "droppos": Row("droppos"),
    "dino": Row("scfs", {"stage_weights": 0.0}),
    "scfs": Row("scfs"),
    "mokd": Row("mokd"),
}
# Claim, the row that should be better, than which.
CLAIMS = (
    ("masks that are truly hard are worth more than random ones", "oracle", "mae"),
    ("masks that are easy are worth less", "mae", "easiest"),
    ("predicting losses helps by itself", "prediction-alone", "mae"),
    ("HPM's clipping of gradients by itself", "clipped", "mae"),
    ("predicting losses by a head, at MAE's price", "prediction-head", "mae"),
    ("a tenth of its weight", "prediction-head-tenth", "mae"),
    ("HPM as published", "hpm", "mae"),
    ("a tenth of the weight for predicting", "hpm-tenth", "hpm"),
    ("HPM with that weight", "hpm-tenth", "mae"),
    ("mining adds to predicting", "hpm", "prediction-alone"),
    ("the cheap rung's mining adds to a head's predicting", "masked-head", "prediction-head"),
    ("remembered errors add to it", "memory-head", "prediction-head"),
    ("a masked look is worth the whole image's", "masked", "hpm"),
    ("a look at half the size is worth it", "half-size-look", "hpm"),
    ("hard patches in each quarter of the image", "stratified", "hpm"),
    ("maps without the mean of their place", "centred", "hpm"),
    ("mining by remembered errors, at MAE's price", "memory", "mae"),
    ("predicting by a head, and such mining", "memory-head", "mae"),
    ("mining by the errors of one look", "observed", "mae"),
    ("the cheap rung", "masked-head", "mae"),
    ("a cross-attention decoder is worth MAE's", "cross", "mae"),
    ("the same, with all masked patches predicted", "cross-all", "mae"),
    ("square blocks of 2x2 patches as masks", "blocks-2", "mae"),
    ("square blocks of 4x4 patches as masks", "blocks-4", "mae"),
    ("green noise as masks", "green-noise", "mae"),
    ("half the epochs at half the size", "half-size-first", "mae"),
    ("AMT", "amt", "mae"),
    ("EMAE", "emae", "mae"),
    ("SemAIM", "semaim", "mae"),
    ("DropPos", "droppos", "mae"),
    ("SCFS", "scfs", "dino"),
    ("MOKD", "mokd", "dino"),
)


# ---- the bound: masks that no user wants ----


def easiest(scores: Tensor) -> Tensor:
    """The other end of the order; what has no score stays last."""
    return (-scores).where(scores.isfinite(), -torch.inf)


def by_position(scores: Tensor) -> Tensor:
    """The mean over the batch of the scores of each position, ordered in each image alike."""
    known = scores.isfinite()
    means = scores.where(known, 0.0).sum(dim=0) / known.sum(dim=0).clamp(min=1)
    return means.expand_as(scores)


def centred(scores: Tensor) -> Tensor:
    """Scores without the batch's mean of their position."""
    return scores - by_position(scores).where(scores.isfinite(), 0.0)


def stratified(scores: Tensor) -> Tensor:
    """The hardest of each of four quarters of the image first, then the second ones, and so on."""
    side = math.isqrt(scores.shape[1])
    half = side // 2
    parts = scores.unflatten(1, (2, half, 2, half)).transpose(2, 3)  # (B, 2, 2, half, half)
    places = ranks(parts.reshape(-1, half * half)).reshape(parts.shape)
    spread = places.transpose(2, 3).flatten(1)
    return spread.where(scores.isfinite(), -torch.inf)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "easiest": easiest,
    "position": by_position,
    "centred": centred,
    "stratified": stratified,
}


@torch.no_grad()
def half_size_look(method: HPM, images: Tensor) -> Tensor:
    """Difficulty (B, L) by images of half the size, in between the few predictions by
    interpolation.
    """
    teacher, grid = cast(Teacher, method.teacher), method.grid.size
    encoder = cast(Encoder, teacher.encoder)
    decoder_input = cast(DecoderInput, teacher.decoder_input)
    half = tuple(side // 2 for side in grid)
    latent = transform(encoder, embed_images(encoder, F.avg_pool2d(images, 2)))
    tokens = decoder_input.embed(latent)
    prefix, patches = tokens.tensor_split([decoder_input.num_prefix], dim=1)
    patches = patches + resize_positions(decoder_input.pos_embed, grid, half)
    found = method._expected(torch.cat([prefix, patches], dim=1), math.prod(half))
    few = found.unflatten(1, (1, *half))  # (B, 1, rows, columns)
    return F.interpolate(few, size=grid, mode="bilinear").flatten(1)


def ask_by_half(
    method: HPM, images: Tensor, want_difficulty: bool, *_: Any, **__: Any
) -> tuple[None, Tensor | None]:
    """`half_size_look` in place of `HPM.ask_teachers`."""
    return None, half_size_look(method, images) if want_difficulty else None


def bend(how: str) -> None:
    """Let HPM order its units by something else than their difficulty, or look otherwise."""
    if how == HALF_SIZE:
        HPM.ask_teachers = ask_by_half  # type: ignore[method-assign, assignment]
    if how in SCORES:
        own = HPM._unit_scores

        def bent(method: HPM, difficulty: Tensor) -> Tensor:
            return SCORES[how](own(method, difficulty))

        HPM._unit_scores = bent  # type: ignore[method-assign, assignment]


def bend_look(row: Row, method: Method) -> None:
    """As `bend`, in one method, where it changes the price; another order of units does not."""
    if row.scores == HALF_SIZE:
        method.ask_teachers = partial(ask_by_half, method)  # type: ignore[assignment]

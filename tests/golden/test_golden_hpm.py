"""HPM against numbers of the reference implementation."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_vectors import (
    FedNoise,
    Golden,
    batch_of,
    described,
    load_golden,
    load_weights,
    stored_names,
    wide,
)
from torch import Tensor

from patchmine.backbones.family import encode
from patchmine.backbones.reference import from_reference_names
from patchmine.methods.hpm import HPM, predict_difficulty
from patchmine.ops.losses import absolute_difficulty_loss, direction_error, relative_difficulty_loss
from patchmine.ops.masks import hard_masked, lowest_visible
from patchmine.ops.schedules import ema_decay, hard_count
from patchmine.types import Mask, Progress

pytestmark = pytest.mark.golden
KINDS = {"pix": False, "normpix": True}  # whether pixels are standardised within each patch
OBJECTIVES = {"rel": "relative", "abs": "absolute"}
CASES = described("hpm").get("mask_cases", [])
STORED = [kind for kind in KINDS if f"{kind}.rec_matrix" in stored_names("hpm")]
TOTALS = [
    (kind, name)
    for kind in STORED
    for name in OBJECTIVES
    if f"{kind}.{name}.total" in stored_names("hpm")
]
ALONE = [name for name in OBJECTIVES if f"rank.{name}.grad" in stored_names("hpm")]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("hpm")


def build(golden: Golden, **options: Any) -> HPM:
    """The method with the stored student and teacher."""
    c = golden.config
    method = HPM(
        HPM.Config(mask_ratio=c["mask_ratio"], **golden.decoder(), **options), golden.encoder()
    )
    student = from_reference_names(golden.under("state."))
    # The two fixed position tables are stored with the student only.
    teacher = from_reference_names(golden.under("ema."), teacher=True)
    teacher["teacher.encoder.pos_embed"] = golden["state.pos_embed"]
    own = method.state_dict()
    # The head of the stored decoder predicts pixels, and features have their own width.
    absent = ("decoder.head.",) if options.get("target") == "ema" else ()
    state = {name: tensor for name, tensor in (student | teacher).items() if name in own}
    load_weights(
        method, {name: t for name, t in state.items() if not name.startswith(absent)}, absent=absent
    )
    return method.train()


def own_name(name: str, *, teacher: bool = False) -> str:
    (own,) = from_reference_names({name: None}, teacher=teacher)
    return own


def progress(case: dict[str, Any]) -> Progress:
    return Progress(case["epoch"], case["total_epochs"], 1)


def fed(golden: Golden, case: dict[str, Any]) -> Tensor:
    """Noise that makes our draw repeat the stored one."""
    if case["random"]:
        return golden[f"maskgen.{case['case']}.noise"]
    order = golden[f"maskgen.{case['case']}.perm"]
    ranks = torch.arange(order.shape[1]).expand_as(order) / golden.meta["num_patches"]
    return torch.full(golden["mask"].shape, 1.5).scatter(1, order, ranks)


def split(stored: Tensor, mask: Mask) -> Tensor:
    """The part of a stored [visible, masked] sequence that belongs to masked patches."""
    return stored[:, -mask.masked.shape[1] :]


@pytest.fixture(scope="module")
def step_case(golden: Golden) -> dict[str, Any]:
    return next(case for case in CASES if case["case"] == golden.meta["step_uses_mask_case"])


@pytest.fixture(scope="module")
def step_mask(golden: Golden) -> Mask:
    return lowest_visible(golden["mask"], golden.meta["len_keep"])


def test_fixed_positions(golden: Golden) -> None:
    method = HPM(HPM.Config(**golden.decoder()), golden.encoder())
    golden.check(method.encoder.pos_embed.data, "state.pos_embed", "table")
    golden.check(method.decoder_input.pos_embed, golden["state.decoder_pos_embed"][0, 1:], "table")


def test_teacher(golden: Golden) -> None:
    method = build(golden)
    _, difficulty = method.ask_teachers(golden["imgs"], True)
    golden.check(difficulty, "teacher.loss_pred", "tokens")
    golden.check(encode(method.teacher.encoder, golden["imgs"]), "teacher.features", "tokens")
    features, _ = build(golden, target="ema").ask_teachers(golden["imgs"], False)
    golden.check(features, golden["teacher.features"][:, 1:], "tokens")


def test_counts(golden: Golden) -> None:
    method = build(golden)
    assert method.grid.num_patches == golden.meta["num_patches"]
    assert (method.visible_units, method.num_masked) == (
        golden.meta["len_keep"],
        golden.meta["num_masked"],
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["case"]))
def test_masks(golden: Golden, case: dict[str, Any]) -> None:
    difficulty = golden["teacher.loss_pred"]
    # From none to a half of the masked patches, an epoch ahead: constants of the method.
    hard = hard_count(progress(case), golden.meta["num_masked"], start=0.0, end=0.5, offset=1)
    assert hard == case["len_loss"]
    assert case["len_keep"] == golden.meta["len_keep"]
    mask = hard_masked(fed(golden, case), difficulty, hard, case["len_keep"])
    assert torch.equal(mask.as_bool(), golden[f"maskgen.{case['case']}.mask"].bool())


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case["random"]], ids=lambda case: str(case["case"])
)
def test_hardest_are_masked_with_our_own_noise(golden: Golden, case: dict[str, Any]) -> None:
    difficulty = golden["teacher.loss_pred"]
    noise = torch.rand(difficulty.shape, generator=torch.Generator().manual_seed(CASES.index(case)))
    mask = hard_masked(noise, difficulty, case["len_loss"], case["len_keep"])
    assert mask.as_bool().gather(1, golden[f"maskgen.{case['case']}.top_ids_sorted"]).all()


def test_student(golden: Golden, step_mask: Mask) -> None:
    method = build(golden)
    masked = step_mask.masked.shape[1]
    assert torch.equal(step_mask.as_bool(), golden["mask"].bool())
    latent = encode(method.encoder, golden["imgs"], step_mask.visible)
    golden.check(latent, "student.latent", "tokens")
    tokens = method.decoder_input(latent, step_mask)
    golden.check(tokens, "student.decoder_input", "tokens")
    painted = method.decoder.head(method.decoder(tokens, masked))
    golden.check(painted, split(golden["student.pred"], step_mask), "tokens")
    predicted = predict_difficulty(method.predictor, tokens, masked)
    golden.check(predicted, split(golden["student.loss_pred"], step_mask), "tokens")


@pytest.mark.parametrize(("kind", "objective"), TOTALS)
def test_loss_and_gradients(
    golden: Golden, step_case: dict[str, Any], kind: str, objective: str
) -> None:
    method = build(golden, norm_pix_loss=KINDS[kind], prediction=OBJECTIVES[objective])
    method.noise = FedNoise(fed(golden, step_case))
    losses = method(batch_of(golden["imgs"]), progress(step_case))
    how = "relative loss" if objective == "rel" else "loss"
    golden.check_number(losses["reconstruction"], golden.scalar(f"{kind}.rec_loss"))
    golden.check_number(losses["prediction"], golden.scalar(f"{kind}.{objective}.pred_loss"), how)
    golden.check_number(losses["loss"], golden.scalar(f"{kind}.{objective}.total"), how)
    losses["loss"].backward()
    stored = golden.under(f"{kind}.{objective}.grad.")
    # The JSON says for which of the two targets gradients were kept.
    assert stored or golden.setting("grad_normpix", True) != KINDS[kind]
    if stored:
        golden.check_gradients(dict(method.named_parameters()), stored, own_name)
    assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize("kind", STORED)
def test_error_of_each_patch(golden: Golden, step_mask: Mask, kind: str) -> None:
    method = build(golden, norm_pix_loss=KINDS[kind])
    painted = split(golden["student.pred"], step_mask)
    golden.check(
        method.error(painted, golden["imgs"], None, step_mask), f"{kind}.rec_matrix", "target"
    )


@pytest.mark.parametrize("objective", ALONE)
def test_objective_alone(golden: Golden, objective: str) -> None:
    loss: Callable[..., Tensor] = {
        "rel": relative_difficulty_loss,
        "abs": absolute_difficulty_loss,
    }[objective]
    predicted = golden["rank.pred"].clone().requires_grad_()
    value = loss(predicted, golden["rank.target"])
    golden.check_number(
        value,
        golden.scalar(f"rank.{objective}.loss"),
        "relative loss" if objective == "rel" else "loss",
    )
    value.backward()
    golden.check(predicted.grad, f"rank.{objective}.grad", f"{OBJECTIVES[objective]} objective")
    if objective == "rel" and "rank.rel.half_pairs" in golden.meta.get("scalars", {}):
        golden.check_number(value, golden.scalar("rank.rel.half_pairs"), "half pairs")


def test_feature_targets(golden: Golden, step_mask: Mask) -> None:
    painted = golden["feat.pred"].clone().requires_grad_()
    target = golden["feat.target"]
    error = direction_error(painted, target.gather(1, wide(step_mask.masked, target)))
    golden.check(error, "feat.matrix", "target")
    golden.check_number(error.mean(), golden.scalar("feat.loss"))
    error.mean().backward()
    golden.check(painted.grad, "feat.grad", "gradient")


def test_ema_decay(golden: Golden) -> None:
    """From 0.999 to 0.9999 over 100 epochs: constants of the method."""
    stored = golden.meta.get("scalars", {}).get("ema_decay", {})
    if not stored:
        pytest.skip("the file has no table of decays")
    for epoch, expected in stored.items():
        at = Progress(int(epoch), 10_000, 1)
        golden.check_number(
            ema_decay(at, start=0.999, end=0.9999, ramp_epochs=100), expected, "decay"
        )


@pytest.mark.parametrize(
    "entry", [name for name in stored_names("hpm") if name.startswith("emaupdate.")]
)
def test_ema_update(golden: Golden, entry: str) -> None:
    _, epoch, name = re.split(r"emaupdate\.epoch(\d+)\.", entry)
    method = build(golden)
    method.after_step(Progress(int(epoch), 10_000, 1))
    golden.check(method.get_parameter(own_name(name, teacher=True)), golden[entry], "average")

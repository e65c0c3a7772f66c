"""HPM against numbers of the reference implementation (spec hpm.md, section 10)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from patchmine.methods.hpm import predict_difficulty
from patchmine.models.official import from_reference_names
from patchmine.models.vit import encode
from patchmine.ops.losses import absolute_difficulty_loss, direction_error, relative_difficulty_loss
from patchmine.ops.masks import hard_masked, lowest_visible
from patchmine.ops.schedules import ema_decay, hard_count
from patchmine.types import Mask, Progress

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def golden(load_golden: Callable[[str], Any]) -> Any:
    return load_golden("hpm")


def build(golden: Any, **options: Any) -> Any:
    """The method with the stored student and teacher."""
    method = golden.build(**options)
    own = method.state_dict()
    # The two fixed position tables are stored with the student only.
    state = golden.state("ema.", teacher=True) | {"teacher.encoder.pos_embed": golden.tensors["state.pos_embed"]}
    state = {name: tensor for name, tensor in state.items() if name in own}
    missing = method.load_state_dict(state, strict=False).missing_keys
    assert not [name for name in missing if name.startswith("teacher.")]
    return method


def cases(golden: Any) -> list[dict[str, Any]]:
    return golden.meta["mask_cases"]


def progress(case: dict[str, Any]) -> Progress:
    return Progress(case["epoch"], case["total_epochs"], 1)


def fed(golden: Any, case: dict[str, Any]) -> Tensor:
    """Noise that makes our draw repeat the stored one: the k-th of its permutation gets the k-th lowest number."""
    number = case["case"]
    if case["random"]:
        return golden.tensors[f"maskgen.{number}.noise"]
    order = golden.tensors[f"maskgen.{number}.perm"]
    patches = golden.meta["num_patches"]
    noise = torch.full((len(order), patches), 1.5)
    return noise.scatter(1, order, torch.arange(order.shape[1]).expand(len(order), -1) / patches)


def split(stored: Tensor, golden: Any) -> Tensor:
    """The part of a stored [visible, masked] sequence that belongs to masked patches."""
    return stored[:, -golden.meta["num_masked"] :]


@pytest.fixture(scope="module")
def step_case(golden: Any) -> dict[str, Any]:
    return next(case for case in cases(golden) if case["case"] == golden.meta["step_uses_mask_case"])


@pytest.fixture(scope="module")
def step_mask(golden: Any) -> Mask:
    return lowest_visible(golden.tensors["mask"], golden.meta["len_keep"])


def test_teacher(golden: Any) -> None:
    method = build(golden)
    _, difficulty = method.look(golden.tensors["imgs"], True)
    torch.testing.assert_close(difficulty, golden.tensors["teacher.loss_pred"], atol=2e-5, rtol=0)
    features = encode(method.teacher.encoder, golden.tensors["imgs"])
    torch.testing.assert_close(features, golden.tensors["teacher.features"], atol=2e-5, rtol=0)
    features, _ = build(golden, target="ema").look(golden.tensors["imgs"], False)
    torch.testing.assert_close(features, golden.tensors["teacher.features"][:, 1:], atol=2e-5, rtol=0)


def test_masks(golden: Any) -> None:
    difficulty = golden.tensors["teacher.loss_pred"]
    for case in cases(golden):
        hard = hard_count(progress(case), golden.meta["num_masked"], start=0.0, end=0.5, offset=1)
        assert hard == case["len_loss"]
        mask = hard_masked(fed(golden, case), difficulty, hard, golden.meta["len_keep"])
        assert torch.equal(mask.as_bool(), golden.tensors[f"maskgen.{case['case']}.mask"].bool())


def test_hardest_are_masked_with_our_own_noise(golden: Any) -> None:
    difficulty = golden.tensors["teacher.loss_pred"]
    for case in cases(golden):
        if not case["random"]:
            noise = torch.rand(difficulty.shape, generator=torch.Generator().manual_seed(case["case"]))
            mask = hard_masked(noise, difficulty, case["len_loss"], golden.meta["len_keep"])
            assert mask.as_bool().gather(1, golden.tensors[f"maskgen.{case['case']}.top_ids_sorted"]).all()


def test_student(golden: Any, step_mask: Mask) -> None:
    method = build(golden)
    masked = golden.meta["num_masked"]
    assert torch.equal(step_mask.as_bool(), golden.tensors["mask"].bool())
    latent = encode(method.encoder, golden.tensors["imgs"], step_mask.visible)
    torch.testing.assert_close(latent, golden.tensors["student.latent"], atol=2e-5, rtol=0)
    tokens = method.decoder_input(latent, step_mask)
    torch.testing.assert_close(tokens, golden.tensors["student.decoder_input"], atol=2e-5, rtol=0)
    painted = method.decoder.head(method.decoder(tokens, masked))
    torch.testing.assert_close(painted, split(golden.tensors["student.pred"], golden), atol=2e-5, rtol=0)
    predicted = predict_difficulty(method.predictor, tokens, masked)
    torch.testing.assert_close(predicted, split(golden.tensors["student.loss_pred"], golden), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("kind", "norm_pix_loss"), [("pix", False), ("normpix", True)])
@pytest.mark.parametrize(("objective", "prediction"), [("rel", "relative"), ("abs", "absolute")])
def test_loss_and_gradients(
    golden: Any,
    step_case: dict[str, Any],
    fed_noise: Callable[[Tensor], Any],
    compare_gradients: Callable[..., None],
    kind: str,
    norm_pix_loss: bool,
    objective: str,
    prediction: str,
) -> None:
    method = build(golden, norm_pix_loss=norm_pix_loss, prediction=prediction)
    method.noise = fed_noise(fed(golden, step_case))
    losses = method(golden.batch(), progress(step_case))
    tolerance = 1e-4 if objective == "rel" else 1e-5
    assert losses["reconstruction"].item() == pytest.approx(golden.scalar(f"{kind}.rec_loss"), rel=1e-5)
    assert losses["prediction"].item() == pytest.approx(golden.scalar(f"{kind}.{objective}.pred_loss"), rel=tolerance)
    assert losses["loss"].item() == pytest.approx(golden.scalar(f"{kind}.{objective}.total"), rel=tolerance)
    losses["loss"].backward()
    stored = golden.gradients(f"{kind}.{objective}")
    if stored:  # the JSON says for which of the two targets gradients were kept
        compare_gradients(method, stored)
    else:
        assert golden.config["grad_normpix"] != norm_pix_loss
    assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize(("kind", "norm_pix_loss"), [("pix", False), ("normpix", True)])
def test_error_of_each_patch(golden: Any, step_mask: Mask, kind: str, norm_pix_loss: bool) -> None:
    method = build(golden, norm_pix_loss=norm_pix_loss)
    painted = split(golden.tensors["student.pred"], golden)
    error = method.error(painted, golden.tensors["imgs"], None, step_mask)
    torch.testing.assert_close(error, golden.tensors[f"{kind}.rec_matrix"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("objective", "loss", "loss_tolerance", "gradient_tolerance"),
    # The reference rounds 1 - sigmoid; the half-pair form does not (spec, section 10).
    [("rel", relative_difficulty_loss, 1e-4, 5e-3), ("abs", absolute_difficulty_loss, 1e-5, 1e-3)],
)
def test_objective_alone(
    golden: Any, objective: str, loss: Callable[..., Tensor], loss_tolerance: float, gradient_tolerance: float
) -> None:
    predicted = golden.tensors["rank.pred"].clone().requires_grad_()
    value = loss(predicted, golden.tensors["rank.target"])
    assert value.item() == pytest.approx(golden.scalar(f"rank.{objective}.loss"), rel=loss_tolerance)
    value.backward()
    expected = golden.tensors[f"rank.{objective}.grad"]
    bound = gradient_tolerance * expected.abs().max().item()
    torch.testing.assert_close(predicted.grad, expected, atol=bound, rtol=0)
    if objective == "rel" and "rank.rel.half_pairs" in golden.meta["scalars"]:
        assert value.item() == pytest.approx(golden.scalar("rank.rel.half_pairs"), rel=1e-6)


def test_feature_targets(golden: Any, step_mask: Mask) -> None:
    painted = golden.tensors["feat.pred"].clone().requires_grad_()
    target = golden.tensors["feat.target"]
    target = target.gather(1, step_mask.masked[:, :, None].expand(-1, -1, target.shape[-1]))
    error = direction_error(painted, target)
    torch.testing.assert_close(error, golden.tensors["feat.matrix"], atol=1e-5, rtol=1e-5)
    assert error.mean().item() == pytest.approx(golden.scalar("feat.loss"), rel=1e-5)
    error.mean().backward()
    bound = 1e-3 * golden.tensors["feat.grad"].abs().max().item()
    torch.testing.assert_close(painted.grad, golden.tensors["feat.grad"], atol=bound, rtol=0)


def test_ema_decay(golden: Any) -> None:
    for epoch, expected in golden.meta["scalars"]["ema_decay"].items():
        at = Progress(int(epoch), 10_000, 1)
        assert ema_decay(at, start=0.999, end=0.9999, ramp_epochs=100) == pytest.approx(expected, abs=1e-12)


def test_ema_update(golden: Any) -> None:
    stored = [name for name in golden.tensors if name.startswith("emaupdate.")]
    assert stored
    for entry in stored:
        _, epoch, name = re.split(r"emaupdate\.epoch(\d+)\.", entry)[0:3]
        method = build(golden)
        method.after_step(Progress(int(epoch), 10_000, 1))
        (own,) = from_reference_names({name: golden.tensors[entry]}, teacher=True)
        found = method.get_parameter(own)
        torch.testing.assert_close(found, golden.tensors[entry], atol=1e-7, rtol=1e-6)

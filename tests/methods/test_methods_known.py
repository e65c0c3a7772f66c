"""Methods that predict patches, on images that miss pixels (`Batch.known`)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.tiny_methods import EARLY, LATE, PATCHES, build, images, run, with_holes
from patchmine.methods import METHODS
from patchmine.methods.hpm import HPM
from patchmine.methods.mae import MAE
from patchmine.methods.simmim import SimMIM
from patchmine.task import Method
from patchmine.types import Batch

OTHERWISE: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in PATCHES],
    ("hpm", {"target": "ema"}),
    ("hpm", {"prediction": "absolute", "norm_pix_loss": False}),
    ("hpm", {"look": "masked", "score": "observed"}),
    ("hpm", {"look": "memory"}),
    ("amt", {"host": "simmim", "mask_unit": 4}),
    ("semaim", {"target": "ema"}),
    ("semaim", {"blur_sigma": 1.0, "order": "similarity"}),
    ("emae", {"parts_used": 2}),
]


@pytest.fixture(params=OTHERWISE, ids=[f"{name} {given}" for name, given in OTHERWISE])
def method(request: pytest.FixtureRequest) -> Method:
    name, options = request.param
    made = build(name, **options)
    made.begin_epoch(LATE, [images(made)] * 4)
    return made


def test_all_that_predict_patches_are_tested() -> None:
    found = {name for name, kind in METHODS.items() if kind.predicts_patches}
    assert found == {"amt", "emae", "hpm", "mae", "semaim", "simmim"}


def slopes(method: Method, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {key: p.grad for key, p in method.named_parameters() if p.grad is not None}


def test_where_all_is_known_the_loss_is_the_usual_one(method: Method) -> None:
    batch = images(method)
    everything = torch.ones_like(batch.views[0], dtype=torch.bool)
    plain = run(method, batch, EARLY)
    found = run(method, replace(batch, known=everything), EARLY)
    assert found.pop("counted") == 1
    assert found.keys() == plain.keys()
    for name, loss in plain.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-4, atol=1e-5)


def test_without_any_data_there_is_no_loss_and_no_gradient(method: Method) -> None:
    batch = images(method)
    nothing = torch.zeros_like(batch.views[0], dtype=torch.bool)
    losses = run(method, replace(batch, known=nothing), LATE)
    assert losses["loss"].count_nonzero() == losses["counted"].count_nonzero() == 0
    assert all(loss.isfinite() for loss in losses.values())
    for key, slope in slopes(method, losses["loss"]).items():
        assert slope.count_nonzero() == 0, key


def test_with_some_data_there_is_a_loss_of_it(method: Method) -> None:
    losses = run(method, with_holes(images(method)), LATE)
    assert all(loss.isfinite() and loss.shape == () for loss in losses.values())
    assert 0 < losses["counted"] < 1
    found = slopes(method, losses["loss"])
    assert all(slope.isfinite().all() for slope in found.values())
    assert any(slope.count_nonzero() for slope in found.values())


def test_a_batch_is_the_mean_of_its_halves(method: Method) -> None:
    # Whatever share of an image is missing, so that processes may divide a batch.
    batch = with_holes(images(method))
    batch.known[0] = True
    batch.known[1, :, 4:] = False
    whole = run(copy.deepcopy(method), batch, LATE)["loss"]  # of maps that nobody has moved
    halves = []
    for first in (0, 2):
        rows = slice(first, first + 2)
        known = None if batch.known is None else batch.known[rows]
        half = Batch(
            [batch.views[0][rows]],
            batch.index[rows],
            batch.box[rows],
            batch.flip[rows],
            known=known,
        )
        method.noise.begin(LATE.step, first, 4)
        halves.append(method(half, LATE)["loss"])
    torch.testing.assert_close(torch.stack(halves).mean(), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mae", "simmim", "hpm"])
def test_what_stands_in_missing_pixels_is_not_learned(name: str) -> None:
    # Those of masked patches: what is visible the encoder sees, filled as it is.
    method = build(name)
    batch = with_holes(images(method))
    method.noise.begin(0)
    mask = draw(method, batch)
    hidden = mask.as_bool().reshape(4, 1, 4, 4)
    hidden = hidden.repeat_interleave(4, 2).repeat_interleave(4, 3) & ~batch.known
    assert hidden.any()
    found = []
    for fill in (0.0, 1e4):
        pixels = torch.where(hidden, fill, batch.views[0])
        method.zero_grad()
        losses = run(method, batch.with_views([pixels]), EARLY)
        found.append((losses["loss"].detach(), slopes(method, losses["loss"])))
    (loss, slope), (again, same) = found
    assert torch.equal(loss, again)
    assert all(torch.equal(slope[key], same[key]) for key in slope)
    # And it is where all counts.
    plain = [run(method, replace(batch, views=[torch.where(hidden, fill, batch.views[0])],
                                 known=None), EARLY)["loss"] for fill in (0.0, 1e4)]  # fmt: skip
    assert not torch.equal(*plain)


def draw(method: Method, batch: Batch) -> Any:
    if isinstance(method, HPM):
        return method.draw_mask(batch.views[0], None, EARLY)
    assert isinstance(method, MAE | SimMIM)
    return method.draw_mask(batch.views[0])


def test_hard_patches_are_none_without_data() -> None:
    method = build("hpm")
    batch = with_holes(images(method))
    _, difficulty = method.ask_teachers(batch.views[0], True, known=batch.known)
    empty = torch.arange(16) % 4 == 0
    assert torch.equal(difficulty.isinf(), empty.expand(4, -1))
    drawn = torch.zeros(16)
    for step in range(40):
        method.noise.begin(step)
        drawn += method.draw_mask(batch.views[0], difficulty, LATE).as_bool().float().mean(dim=0)
    # Nor are they the easy ones, which stay visible: they are drawn.
    assert (drawn[empty] > 0).all()
    assert (drawn[empty] < 40).all()


def test_memory_of_difficulty_learns_nothing_of_patches_without_data() -> None:
    method = build("hpm", look="memory")
    batch = with_holes(images(method))
    method.begin_epoch(EARLY, [batch] * 4)
    for step in range(8):
        run(method, batch, EARLY.at(step))
    remembered = method.maps(batch.index)
    empty = torch.arange(16) % 4 == 0
    untouched = torch.full((4, 4), method.maps.start)
    torch.testing.assert_close(remembered[:, empty], untouched, atol=1 / 255, rtol=0)
    assert (remembered[:, ~empty] - method.maps.start).abs().max() > 0.1


def test_attention_to_patches_without_data_is_that_of_a_mean_patch() -> None:
    method = build("amt", maps="online")
    batch = with_holes(images(method))
    attention = method.attend(batch)
    plain = method.attend(replace(batch, known=None))
    empty = torch.arange(16) % 4 == 0
    mean = plain[:, ~empty].mean(dim=1, keepdim=True)
    torch.testing.assert_close(attention[:, empty], mean.expand(-1, 4))
    assert torch.equal(attention[:, ~empty], plain[:, ~empty])


def test_pictures_show_where_data_is_missing(method: Method) -> None:
    batch = with_holes(images(method))
    panels = method.panels(batch, LATE)
    assert torch.equal(panels[0].data.isnan(), ~batch.known)
    (error,) = (panel.data for panel in panels if panel.title == "error")
    assert error[..., 0].isnan().all()
    assert error[..., 1:].isfinite().any()

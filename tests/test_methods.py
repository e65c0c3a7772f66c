"""What every method promises.  No branch on a method's name: a new method is tested by being in
METHODS.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fixtures.tiny_methods import (
    CLIPS,
    EARLY,
    LATE,
    NAMES,
    TINY,
    build,
    encoder_size,
    images,
    kind_of,
    optimise,
    plain_images,
    run,
)
from patchmine.errors import UserError
from patchmine.methods import METHODS
from patchmine.train.checkpoint import refuse_shared
from patchmine.types import Batch, Progress

# What batch norms count in every forward pass.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Every method, and once more on clips and on a rotary encoder if it takes them."""
    return request.param


@pytest.fixture(params=sorted(METHODS))
def image_name(request: pytest.FixtureRequest) -> str:
    """Every method, on images."""
    return request.param


@pytest.fixture(params=[EARLY, LATE], ids=["early", "late"])
def progress(request: pytest.FixtureRequest) -> Progress:
    return request.param


def test_name_is_the_key_and_the_docstring_names_its_source(image_name: str) -> None:
    assert METHODS[image_name]().name == image_name
    assert "arXiv" in (inspect.getdoc(METHODS[image_name]) or "")
    assert "arXiv" in (inspect.getmodule(kind_of(image_name)).__doc__ or "")


def test_a_method_for_images_refuses_clips_by_name(image_name: str) -> None:
    if "video" in METHODS[image_name].families:
        pytest.skip(f"{image_name} trains on clips")
    with pytest.raises(
        UserError, match=f"method={image_name} does not train on videos: choose method="
    ):
        build(image_name + CLIPS)


def test_every_setting_is_explained(image_name: str) -> None:
    fields = METHODS[image_name].model_fields
    assert all(field.description for key, field in fields.items() if key != "name")


def test_losses_are_scalars_with_a_gradient_for_everything_that_learns(
    name: str, progress: Progress
) -> None:
    method = build(name)
    losses = run(method, images(method), progress)
    assert all(value.shape == () and value.dtype == torch.float32 for value in losses.values())
    losses["loss"].backward()
    for group in method.param_groups():
        for key, parameter in group.params:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key


def test_groups_hold_each_trained_parameter_once(name: str) -> None:
    method = build(name)
    grouped = [key for group in method.param_groups() for key, _ in group.params]
    assert sorted(grouped) == sorted(key for key, p in method.named_parameters() if p.requires_grad)


def test_difficulty_is_of_each_image_alone(name: str) -> None:
    method = build(name).eval()
    batch = plain_images(method, 5).views[0]
    found = method.difficulty(batch)
    if found is None:
        pytest.skip(f"{name} predicts no difficulty")
    assert found.shape == (5,)
    assert (found > 0).all()
    alone = torch.cat([cast(Tensor, method.difficulty(image)) for image in batch.flip(0).split(1)])
    torch.testing.assert_close(alone.flip(0), found)


def test_a_step_repeats_itself(name: str, progress: Progress) -> None:
    first, second = (run(method, images(method), progress) for method in (build(name), build(name)))
    assert {key: value.item() for key, value in first.items()} == {
        key: value.item() for key, value in second.items()
    }


def test_another_step_draws_otherwise(name: str) -> None:
    method = build(name)
    method.noise.begin(1)
    first = method(images(method), EARLY)["loss"]
    if not method.noise.draws:
        pytest.skip(f"{name} leaves nothing to chance but its crops")
    method.noise.begin(2)
    assert method(images(method), EARLY)["loss"] != first


def test_rows_of_a_batch_do_not_meet(name: str, progress: Progress) -> None:
    """The loss of two halves, each with its own rows of the noise, averages to that of the whole."""
    method = build(name)
    if not method.averages_rows:
        pytest.skip(f"{name} says that its loss is no mean over rows")
    batch = images(method)
    whole = run(method, batch, progress)["loss"]
    parts = []
    for first in (0, 2):
        rows = slice(first, first + 2)
        half = Batch(
            [view[rows] for view in batch.views],
            batch.index[rows],
            batch.box[rows],
            batch.flip[rows],
        )
        method.noise.begin(progress.step, first, 4)
        parts.append(method(half, progress)["loss"])
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-4, atol=1e-5)


def test_state_dict_holds_everything(name: str) -> None:
    method = build(name, seed=0)
    refuse_shared(method.state_dict())
    for step in range(2):
        optimise(method, images(method, seed=step), Progress(300 + step, 400, 2))
    other = build(name, seed=1)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    assert run(other, images(other), LATE)["loss"] == run(method, images(method), LATE)["loss"]
    for module in (method, other):
        optimise(module, images(module), LATE)
    for key, value in method.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_training_lowers_the_loss_and_leaves_what_is_fixed(name: str) -> None:
    method = build(name)
    fixed = {key: p.clone() for key, p in method.encoder.named_parameters() if not p.requires_grad}
    values = [optimise(method, images(method), Progress(0, 400, 2)) for _ in range(30)]
    assert torch.stack(values[-5:]).mean() < torch.stack(values[:5]).mean()
    for key, value in fixed.items():
        assert torch.equal(method.encoder.get_parameter(key), value)


def test_what_is_frozen_changes_in_after_step_only(name: str) -> None:
    method = build(name)
    trained = {key for group in method.param_groups() for key, _ in group.params}
    frozen = {
        key: value.clone() for key, value in method.state_dict().items() if key not in trained
    }
    frozen = {key: value for key, value in frozen.items() if not key.endswith(STATISTICS)}
    run(method, images(method), LATE)["loss"].backward()
    for key, value in frozen.items():
        assert torch.equal(method.state_dict()[key], value), key


def test_encoder_keeps_timms_names(image_name: str) -> None:
    fresh = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=0, **TINY
    )
    method = build(image_name).eval()
    fresh.load_state_dict(method.encoder.state_dict())
    pixels = plain_images(method, 4).views[0]
    assert torch.equal(
        fresh.eval().forward_features(pixels), method.encoder.forward_features(pixels)
    )


@pytest.mark.parametrize(("size", "channels"), [((16, 32), 3), ((24, 16), 1), ((16, 16), 5)])
def test_rectangles_and_channels(name: str, size: tuple[int, int], channels: int) -> None:
    method = build(name, size=size, channels=channels)
    assert run(method, images(method, size, channels), LATE)["loss"].isfinite()


def test_bfloat16_autocast(name: str, progress: Progress) -> None:
    method = build(name)
    exact = run(method, images(method), progress)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = run(method, images(method), progress)["loss"]
    rough.backward()
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.05)


class NoReading(TorchDispatchMode):
    """Refuses whatever would make the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "item",
            "equal",
            "is_nonzero",
            "unique",
        )
        assert not str(func).removeprefix("aten.").startswith(waiting), (
            f"{func} waits for the device"
        )
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device(name: str, progress: Progress) -> None:
    method = build(name)
    batch = images(method)
    with NoReading():
        run(method, batch, progress)["loss"].backward()
        method.after_step(progress)


def test_panels(name: str, progress: Progress) -> None:
    method = build(name).eval()
    batch = plain_images(method, 2)
    grid = encoder_size(method)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method.noise.begin(0)
    panels = method.panels(batch, progress)
    assert torch.equal(panels[0].data, batch.views[0])
    assert len({panel.title for panel in panels}) == len(panels)
    for panel in panels:
        shape = (2, *grid) if panel.kind == "heat" else batch.views[0].shape
        assert panel.data.shape == shape, panel.title
        assert not panel.data.requires_grad
        assert "hatched: " in panel.note or not panel.data.isnan().any(), panel.title
        assert panel.kind != "heat" or panel.note, f"{panel.title} has no unit"
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def option_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every choice that a method offers by name or by yes and no, one at a time."""
    for name, kind in sorted(METHODS.items()):
        schema = kind.model_json_schema()["properties"]
        for key, field in schema.items():
            choices = [True, False] if field.get("type") == "boolean" else field.get("enum", [])
            names = [name, name + CLIPS] if "video" in kind.families else [name]
            yield from ((each, {key: choice}) for each in names for choice in choices)


@pytest.mark.parametrize(("name", "options"), list(option_cases()), ids=str)
def test_every_choice_trains(name: str, options: dict[str, Any]) -> None:
    """A choice that needs a file says so in a sentence that names the setting."""
    try:
        method = build(name, **options)
    except UserError as error:
        assert "method." in str(error)  # noqa: PT017 - only some choices raise
        return
    losses = run(method, images(method), LATE)
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    assert all(p.grad is not None for group in method.param_groups() for _, p in group.params)

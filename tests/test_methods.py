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
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.cuda.amp import common as amp
from torch.utils._python_dispatch import TorchDispatchMode

from patchmine.backbones.family import build_encoder
from patchmine.errors import UserError
from patchmine.methods import METHODS, method_class
from patchmine.models.noise import Noise
from patchmine.models.settings import MethodSettings
from patchmine.task import Method
from patchmine.train.checkpoint import refuse_shared
from patchmine.types import Batch, Losses, Progress

# Early, when schedules may ask for nothing yet, and late, when they ask for all.
EARLY, LATE = Progress(0, 400, 2), Progress(350, 400, 2)
TINY = dict(embed_dim=32, depth=2, num_heads=2)
NARROW = {
    **dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2),
    **dict(
        out_dim=32,
        head_hidden=16,
        head_bottleneck=8,
        stage_out_dim=12,
        stage_hidden=16,
        stage_bottleneck=8,
    ),
    **dict(thead_depth=1, thead_heads=2, partner_model="resnet18"),
    "partner_args": dict(layers=[1, 1, 1, 1], channels=[8, 8, 12, 12]),
}
# What batch norms count in every forward pass.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


CLIPS = " on clips"  # behind the name of a method that trains on videos too
ROTARY = " on a rotary encoder"  # and of one that trains where attention turns queries and keys
CLIP = (4, 2)  # frames, and frames in a tubelet


def settings_of(name: str) -> type[MethodSettings]:
    return METHODS[name.removesuffix(CLIPS).removesuffix(ROTARY)]


def kind_of(name: str) -> type[Method]:
    return method_class(settings_of(name))


def build(
    name: str, *, size: tuple[int, int] = (16, 16), channels: int = 3, seed: int = 0, **options: Any
) -> Method:
    torch.manual_seed(seed)
    kind = kind_of(name)
    model, arguments = "vit_tiny_patch16_224", TINY
    if name.endswith(CLIPS):
        model = "video_vit_tiny_patch16"
    elif name.endswith(ROTARY):  # no table; layer scale that lets a few steps be seen
        model = "vit_small_patch16_dinov3_qkvb"
        arguments = {**TINY, "num_reg_tokens": 0, "init_values": 0.5}
    encoder = build_encoder(
        model, image_size=size, patch_size=4, channels=channels, model_args=arguments, clip=CLIP
    )
    settings = settings_of(name)
    known = {key: value for key, value in NARROW.items() if key in settings.model_fields}
    method = kind(settings(**known, **options), encoder)
    method.noise.begin(0)
    return method.train()


def images(
    method: Method,
    size: tuple[int, int] = (16, 16),
    channels: int = 3,
    count: int = 4,
    seed: int = 1,
) -> Batch:
    """A training batch as the method is given one: one view of each image, or two global and two
    local crops.
    """
    sizes: list[tuple[int, ...]] = (
        [size, size, (8, 8), (8, 8)] if method.config.multi_crop else [size]
    )
    if len(encoder_size(method)) == 3:
        sizes = [(CLIP[0], *side) for side in sizes]
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(count, channels, *side, generator=generator) for side in sizes]
    crops = (count, len(views)) if method.config.multi_crop else (count,)
    box = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(*crops, 4)
    return Batch(views, torch.arange(count), box, torch.zeros(crops, dtype=torch.bool))


def encoder_size(method: Method) -> tuple[int, ...]:
    """Patches along each axis; of a network that has none, none."""
    embed = getattr(method.encoder, "patch_embed", None)
    return () if embed is None else tuple(embed.grid_size)


def plain_images(method: Method, count: int) -> Batch:
    """One whole view of each image, as pictures are made of whatever the method is trained on."""
    batch = images(method, count=count)
    return Batch(
        batch.views[:1], batch.index, torch.zeros(count, 4), torch.zeros(count, dtype=torch.bool)
    )


def run(method: Method, batch: Batch, progress: Progress) -> Losses:
    method.noise.begin(progress.step)
    return method(batch, progress)


@pytest.fixture(
    params=sorted(METHODS)
    + sorted(name + CLIPS for name, kind in METHODS.items() if "video" in kind.families)
    + sorted(name + ROTARY for name, kind in METHODS.items() if "eva" in kind.families)
)
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


def optimise(method: Method, batch: Batch, progress: Progress) -> Tensor:
    losses = run(method, batch, progress)
    losses["loss"].backward()
    with torch.no_grad():
        for group in method.param_groups():
            for _, parameter in group.params:
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    method.after_step(progress)
    return losses["loss"].detach()


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


def test_a_forward_pass_in_bf16_mixes_no_devices_and_asks_a_gpu_for_nothing(
    name: str, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tensors without values, on a GPU that need not be there.  Not the backward pass, whose engine
    # asks CUDA itself.
    monkeypatch.setattr(amp, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(
        Noise, "uniform", lambda _, *shape, device: torch.rand(shape, device=device)
    )
    method = build(name)
    batch = images(method)
    mode = FakeTensorMode()

    def on_gpu(tensor: Tensor) -> Tensor:
        fake = mode.from_tensor(tensor.detach())
        with mode:
            return fake.to("cuda")

    for module in method.modules():
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                if isinstance(tensor, nn.Parameter):
                    own[key] = nn.Parameter(on_gpu(tensor), tensor.requires_grad)
                elif tensor is not None:
                    own[key] = on_gpu(tensor)
    views, rest = map(on_gpu, batch.views), map(on_gpu, (batch.index, batch.box, batch.flip))
    there = Batch(list(views), *rest)
    with mode:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found = method(there, progress)
        method.after_step(progress)
    assert {(loss.device.type, loss.dtype) for loss in found.values()} == {("cuda", torch.float32)}


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

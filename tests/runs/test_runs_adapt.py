"""Pre-training that goes on from weights: what moves, at which rate, and which weights are meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import patchmine
from patchmine.backbones.family import encode
from patchmine.config.resolve import from_settings
from patchmine.config.schema import PretrainConfig
from patchmine.errors import UserError, silent
from patchmine.methods import METHODS
from patchmine.methods.hpm import HPM
from patchmine.models.adapt import tensors_used
from patchmine.models.lora import merged
from patchmine.report.monitor import Monitor
from patchmine.runs.folder import build_method
from patchmine.task import Method
from patchmine.train.checkpoint import load_newest
from patchmine.train.optim import build_optimizers, clip_gradients
from patchmine.types import Batch, Progress

MODELS: dict[str, dict[str, Any]] = {
    "vit": {"model": "vit_tiny_patch16_224"},
    "beit": {"model": "beit_base_patch16_224"},
    "rotary": {"model": "vit_small_patch16_dinov3_qkvb", "num_reg_tokens": 0},
    "clips": {"model": "video_vit_tiny_patch16", "clip.frames": 4},
}
FAMILY = {"vit": "vit", "beit": "beit", "rotary": "eva", "clips": "video"}
SMALL = {
    "method.decoder_embed_dim": 16,
    "method.decoder_depth": 1,
    "method.decoder_num_heads": 2,
    "method.out_dim": 16,
    "method.head_hidden": 16,
    "method.stage_out_dim": 8,
    "method.stage_hidden": 16,
    "method.thead_heads": 2,
    "method.partner_model": "resnet18",
    "method.partner_args": {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]},
    "crops.num_local": 2,
    "crops.local_size": 8,
}
RUN: dict[str, Any] = {
    "batch_size": 9,
    "steps": 6,
    "blr": 1e-2,
    "warmup_epochs": 0,
    "workers": 0,
    "device": "cpu",
    "tensorboard": False,
    "sample_every": 1000,
    "say": lambda _: None,
}
PAIRS = [
    (method, model)
    for method, kind in sorted(METHODS.items())
    for model, family in FAMILY.items()
    if family in kind.families and (method, model) != ("semaim", "beit")
]


def settings_of(method: str, model: str = "vit", **given: Any) -> dict[str, Any]:
    network = dict(MODELS.get(model, {}))
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    if "num_reg_tokens" in network:
        sizes["num_reg_tokens"] = network.pop("num_reg_tokens")
    if model == "beit":
        sizes |= {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": False}
        network["model_args"] = {**sizes, "use_abs_pos_emb": True}
    known = {
        name: value
        for name, value in SMALL.items()
        if not name.startswith("method.")
        or name.removeprefix("method.") in METHODS[method].model_fields
    }
    if model == "resnet":
        return {**known, "method.name": method, "image_size": 32, "model": "resnet18", **given}
    own = {"model_args": sizes, "image_size": 16, "patch_size": 4, "method.name": method}
    return {**known, **own, **network, **given}


def built(method: str, model: str = "vit", **given: Any) -> Method:
    config = from_settings(data="x", init="y", **settings_of(method, model, **given))
    assert isinstance(config, PretrainConfig)
    torch.manual_seed(0)
    return build_method(config)


def batch_of(method: Method, model: str) -> Batch:
    sizes = [(16, 16), (16, 16), (8, 8), (8, 8)] if method.config.multi_crop else [(16, 16)]
    time = (4,) if model == "clips" else ()
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(4, 3, *time, *size, generator=generator) for size in sizes]
    crops = (4, len(views)) if method.config.multi_crop else (4,)
    box = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(*crops, 4)
    return Batch(views, torch.arange(4), box, torch.zeros(crops, dtype=torch.bool))


def learning_in(method: Method) -> set[str]:
    prefix = "encoder."
    names = [name for group in method.scaled_groups() for name, _ in group.params]
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


@pytest.mark.parametrize(("method", "model"), PAIRS)
def test_every_method_and_family_takes_lora(method: str, model: str) -> None:
    task = built(method, model, trainable="lora:3", layer_decay=0.5, ema_decay=0.9)
    assert learning_in(task)
    assert all(name.endswith((".lora_a", ".lora_b")) for name in learning_in(task))
    late = Progress(350, 400, 2)  # where schedules ask for all
    task.train()
    task.noise.begin(late.step)
    losses = task(batch_of(task, model), late)
    losses["loss"].backward()
    groups = task.scaled_groups()
    missing = [name for group in groups for name, p in group.params if p.grad is None]
    assert not missing
    assert {group.scale for group in groups} >= {0.5, 0.25, 1.0}
    task.after_step(late)
    task.follow(late)
    teacher = task.encoders().get("teacher")
    names = task.encoder.state_dict().keys()
    assert teacher is None or teacher.state_dict().keys() == names
    plain = merged(task.used(task.encoder)).state_dict()
    used = tensors_used(task.state_dict())
    assert not any("lora" in name or name.startswith("average.") for name in used)
    assert all(torch.equal(plain[name], used[f"encoder.{name}"]) for name in plain)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_all_but_the_encoder_learns_as_ever(method: str) -> None:
    def others(task: Method) -> dict[str, tuple[Any, ...]]:
        return {
            name: (group.scale, group.optimizer, group.weight_decay, group.clip_norm, group.curve)
            for group in task.scaled_groups()
            for name, _ in group.params
            if not name.startswith("encoder.")
        }

    usual = built(method)
    assert others(built(method, trainable="last:1", layer_decay=0.5)) == others(usual)
    assert learning_in(built(method, trainable="last:1")) < learning_in(usual)
    assert all(group.frozen_share == 0 for group in usual.scaled_groups())


def test_lora_is_in_the_attention_that_decides_what_is_masked() -> None:
    from patchmine.backbones.attention import class_attention

    for model in ("vit", "beit", "rotary"):
        task: Any = built("mae", model, trainable="lora:3")
        with torch.no_grad():
            for name, parameter in task.encoder.named_parameters():
                if name.endswith("lora_b"):
                    parameter.normal_(std=0.5)
        images = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            found = class_attention(task.encoder, images)
            torch.testing.assert_close(found, class_attention(merged(task.encoder), images))
            torch.testing.assert_close(
                encode(task.encoder, images),
                encode(merged(task.encoder), images),
                rtol=1e-4,
                atol=1e-4,
            )


def test_a_frozen_encoder_has_no_gradient_until_its_share_of_the_run_is_over() -> None:
    task = built("mae", freeze_encoder=0.25)
    task.train()
    optimizers = build_optimizers(
        task.scaled_groups(), weight_decay=0.05, blr=1e-3, betas=(0.9, 0.95)
    )
    for step, moves in ((0, False), (99, False), (100, True)):
        now = Progress(step, 400, 10)
        task.noise.begin(step)
        task(batch_of(task, "vit"), now)["loss"].backward()
        clip_gradients(optimizers, now)
        assert (task.encoder.blocks[0].attn.qkv.weight.grad is not None) is moves
        assert task.get_parameter("decoder.head.weight").grad is not None


def test_what_would_learn_nothing_of_use_is_refused(image_folder: Path, tmp_path: Path) -> None:
    given = {"data": str(image_folder), "out": tmp_path / "run", **RUN}
    with pytest.raises(UserError, match="trainable: given none, but the encoder is what a run"):
        patchmine.pretrain(trainable="none", **given)
    with pytest.raises(UserError, match="what stays frozen would be random"):
        patchmine.pretrain(trainable="lora:2", **given)
    with pytest.raises(UserError, match="trainable=last:1 would freeze batch norms"):
        built("scfs", "resnet", trainable="last:1")
    with pytest.raises(UserError, match="trainable=last:9, but the model has 2 blocks"):
        built("mae", trainable="last:9")


@pytest.fixture(scope="module")
def start(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("start") / "run"
    run = {**settings_of("mae", image_size=[16, 24]), **RUN, "steps": 2, "mean": [0.4, 0.5, 0.6]}
    return patchmine.pretrain(data=image_folder, out=out, std=[0.2, 0.2, 0.3], **run).path


def adapted(start: Path, data: Path, out: Path, **given: Any) -> patchmine.Run:
    small = {"method.decoder_depth": 1, "method.decoder_embed_dim": 16}
    settings = {**RUN, **small, "trainable": "lora:2", "layer_decay": 1.0, **given}
    return patchmine.pretrain(recipe="my-images", data=data, init=start, out=out, **settings)


def test_network_and_images_are_those_of_the_weights(
    start: Path, image_folder: Path, tmp_path: Path
) -> None:
    run = adapted(start, image_folder, tmp_path / "run", steps=1)
    config, of = run.config, patchmine.Run(start).config
    names = ("model", "model_args", "patch_size", "image_size", "mean", "std", "channels")
    assert all(getattr(config, name) == getattr(of, name) for name in names)
    smaller = adapted(start / "export", image_folder, tmp_path / "less", steps=1, image_size=16)
    assert (smaller.config.image_size, smaller.config.patch_size) == ((16, 16), 4)
    assert smaller.config.model_args["embed_dim"] == 32


def test_averages_stand_in_for_both_students_as_long_as_they_are_asked_for() -> None:
    task = built("mokd", ema_decay=0.9)
    average, parts = task.average, dict(task.named_children())
    assert average is not None

    def leave_by_an_error() -> None:
        with task.in_use():
            for name in ("encoder", "partner"):
                assert task.get_submodule(name) is average.get_submodule(name)
            raise KeyError

    with pytest.raises(KeyError):
        leave_by_an_error()
    assert dict(task.named_children()) == parts


@pytest.mark.bitwise
def test_a_run_with_lora_and_an_average_resumes_bit_for_bit_and_all_mean_the_average(
    start: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    found = Monitor.evaluate

    def evaluate(self: Monitor, progress: Progress) -> Any:
        method = self.run.method
        used = method.used(method.encoder)
        seen.append({k: v.clone() for k, v in used.state_dict().items()})
        return found(self, progress)

    drawn: list[dict[str, Tensor]] = []
    panels = HPM.panels

    def draw(self: HPM, batch: Batch, progress: Progress) -> Any:
        drawn.append({k: v.clone() for k, v in self.encoder.state_dict().items()})
        return panels(self, batch, progress)

    monkeypatch.setattr(HPM, "panels", draw)
    monkeypatch.setattr(Monitor, "evaluate", evaluate)
    run = adapted(
        start, image_folder, tmp_path / "run", method="hpm", checkpoint_every=2, ema_decay=0.6
    )
    last = load_newest(run.checkpoint_dir, silent).model
    averages = {k: v for k, v in last.items() if k.startswith("average.encoder.")}
    assert any(k.endswith("lora_b") and bool(v.any()) for k, v in averages.items())
    average = {k.removeprefix("average.encoder."): v for k, v in averages.items()}
    assert_same(average, seen[-1])
    assert_same(average, drawn[-1])
    assert any(not torch.equal(last[f"encoder.{k}"], v) for k, v in average.items())

    exported = load_file(run.export_dir / "model.safetensors")
    asked = patchmine.load_encoder(run.path, weights="ema")
    for encoder in (run.encoder(), run.method().encoder, run.encoder("ema"), asked):
        assert_same(exported, encoder.state_dict())
    with pytest.raises(UserError, match=r"holds no ema: .*use weights=student"):
        patchmine.Run(start).encoder("ema")
    before = patchmine.Run(start).encoder().state_dict()
    moved = {name for name, value in exported.items() if not torch.equal(value, before[name])}
    assert moved == {f"blocks.{n}.attn.{part}.weight" for n in (0, 1) for part in ("qkv", "proj")}

    (run.checkpoint_dir / "step-00000006.safetensors").unlink()
    patchmine.resume(run.path, say=lambda _: None)
    assert_same(load_newest(run.checkpoint_dir, silent).model, last)
    assert_same(load_file(run.export_dir / "model.safetensors"), exported)

    longer = run.extend(steps=2, out=tmp_path / "longer", say=lambda _: None)
    assert (longer.config.ema_decay, longer.config.freeze_encoder) == (0.6, 0)
    assert not torch.equal(
        longer.encoder().blocks[0].attn.qkv.weight, run.encoder().blocks[0].attn.qkv.weight
    )


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() <= other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name

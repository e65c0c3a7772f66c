"""Longer training from a run: what the new run takes over, and that it resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import draw_images
from killing import killed
from torch import Tensor

import patchmine
from patchmine.errors import UserError
from patchmine.train.checkpoint import load
from spoken import patchmine_says

COMMON: dict[str, Any] = {
    "batch_size": 8,
    "warmup_epochs": 0,
    "blr": 1e-2,
    "workers": 0,
    "tensorboard": False,
    "sample_every": 1000,
    "device": "cpu",
    "say": lambda _: None,
}
TINY: dict[str, Any] = COMMON | {
    "model": "vit_tiny_patch16_224",
    "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "image_size": 16,
    "patch_size": 4,
}
DECODER: dict[str, Any] = {
    "method.decoder_embed_dim": 16,
    "method.decoder_depth": 1,
    "method.decoder_num_heads": 2,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images") / "images", 40, ("cat", "dog"))


@pytest.fixture(scope="module")
def hpm(images: Path, tmp_path_factory: pytest.TempPathFactory) -> patchmine.Run:
    out = tmp_path_factory.mktemp("hpm") / "run"
    return patchmine.pretrain(data=images, out=out, method="hpm", steps=6, **TINY, **DECODER)


@pytest.fixture(scope="module")
def tuned(
    hpm: patchmine.Run, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> patchmine.Run:
    out = tmp_path_factory.mktemp("tuned") / "run"
    return patchmine.finetune(hpm.path, data=images, out=out, epochs=1, ema_decay=0.9, **COMMON)


def state(checkpoint: Path) -> dict[str, Tensor]:
    found = load(checkpoint)
    return {**found.model, **{f"optimizer {k}": v for k, v in found.optimizer.items()}}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


@pytest.mark.bitwise
@pytest.mark.parametrize("kind", ["hpm", "tuned"])
def test_an_extended_run_starts_from_all_of_it_and_resumes_to_the_same_bits(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run: patchmine.Run = request.getfixturevalue(kind)
    heard: list[str] = []
    more: dict[str, Any] = dict(steps=5, checkpoint_every=2, keep_checkpoints=9)
    longer = run.extend(tmp_path / "longer", say=heard.append, **more)
    first, *_, last = longer.checkpoints
    assert (load(first).step, load(last).step) == (0, 5)
    assert differing(state(first), state(run.checkpoints[-1])) == []
    trained = len({name.rsplit(".", 1)[0] for name in load(first).optimizer})
    (said,) = (text for text in heard if "taken over" in text)
    assert f"state of {trained} of {trained} that are trained" in said
    done = {name: value for name, value in state(last).items() if name.endswith(".step")}
    before = {name: value for name, value in state(first).items() if name.endswith(".step")}
    assert all(value == before[name] + 5 for name, value in done.items())

    assert longer.config.init == str(run.path)
    kept = ("method",) if kind == "hpm" else ("classes", "ema_decay")
    for name in (*kept, "model", "mean", "batch_size", "blr", "data"):
        assert getattr(longer.config, name) == getattr(run.config, name)
    assert longer.config.seed == run.config.seed + (kind == "hpm")
    rates = [[line["lr"] for line in each.metrics() if "lr" in line] for each in (longer, run)]
    assert rates[0][0] != rates[1][-1]
    assert (longer.eval_dir / "test.json").exists() is (kind == "tuned")

    for killed_after in (0, 2):
        wanted = state(last)
        for newer in longer.checkpoints:
            if load(newer).step > killed_after:
                newer.unlink()
        patchmine.resume(longer.path, say=lambda _: None)
        assert differing(state(longer.checkpoints[-1]), wanted) == []


@pytest.mark.bitwise
def test_the_same_command_again_takes_over_what_a_kill_before_the_settings_left(
    hpm: patchmine.Run, images: Path, tmp_path: Path
) -> None:
    more: dict[str, Any] = dict(steps=2)
    killed("before the settings", "extend", hpm.path, out=tmp_path / "longer", **more)
    left = tmp_path / "longer" / "checkpoints"
    assert (left / "step-00000000.safetensors").is_file()
    assert not (tmp_path / "longer" / "config.yaml").exists()
    (left / ".step-00000000.99999.new.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="holds no run, but checkpoints"):
        patchmine.pretrain(data=images, out=tmp_path / "longer", steps=2, **TINY, **DECODER)
    longer = hpm.extend(tmp_path / "longer", say=lambda _: None, **more)
    whole = hpm.extend(tmp_path / "whole", say=lambda _: None, **more)
    assert differing(state(longer.checkpoints[-1]), state(whole.checkpoints[-1])) == []
    assert not list(left.glob(".*"))

    other = tmp_path / "other" / "checkpoints"
    other.mkdir(parents=True)
    (other / "step-00000004.safetensors").write_bytes(b"of another run")
    with pytest.raises(UserError, match="holds no run, but checkpoints"):
        hpm.extend(other.parent, say=lambda _: None, **more)


def test_a_killed_extension_does_not_go_on_with_other_data(
    hpm: patchmine.Run, tmp_path: Path
) -> None:
    other = draw_images(tmp_path / "other", 24)
    longer = hpm.extend(tmp_path / "longer", data=other, epochs=1, say=lambda _: None)
    assert longer.config.data == str(other)
    for newer in longer.checkpoints[1:]:
        newer.unlink()
    with pytest.raises(UserError, match="other data"):
        patchmine.resume(longer.path, data=hpm.config.data, say=lambda _: None)


def test_other_classes_or_parts_do_not_fit(tuned: patchmine.Run, tmp_path: Path) -> None:
    out: dict[str, Any] = dict(out=tmp_path / "x", epochs=1, say=lambda _: None)
    with pytest.raises(UserError, match=r"lora_a is absent there .* `patchmine finetune \S+`"):
        tuned.extend(trainable="lora:2", **out)
    with pytest.raises(UserError, match=r"classes=\['cat', 'dog'\] are not those of the data"):
        tuned.extend(data=draw_images(tmp_path / "others", 12, ("cat", "cow", "dog")), **out)
    assert not out["out"].exists()


def test_what_is_trained_decides_what_the_optimizer_keeps(
    tuned: patchmine.Run, tmp_path: Path
) -> None:
    heard: list[str] = []
    given: dict[str, Any] = dict(epochs=1, trainable="last:1", balance=True, say=heard.append)
    longer = tuned.extend(tmp_path / "longer", **given)
    first = load(longer.checkpoints[0])
    trained = {name.rsplit(".", 1)[0] for name in first.optimizer}
    assert trained
    assert not any(".blocks.0." in f".{name}" for name in trained)
    assert any(f"state of {len(trained)} of {len(trained)} " in text for text in heard)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["out=NEW"], ["epochs: given null", "epochs=100"]),
        (["epochs=2"], ["out is not set"]),
        (["epochs=2", "out=RUN"], ["already holds a run", "another out"]),
        (["epochs=2", "out=NEW", "method=mae"], ["does not fit", "pretrain init="]),
        (
            ["epochs=2", "out=NEW", "image_size=32"],
            ["does not fit", "encoder.pos_embed is 1x17x32"],
        ),
        (["epochs=2", "out=NEW", "epoch=3"], ["did you mean epochs?"]),
        (["epochs=2", "out=NEW", "kind=classify"], ["method"]),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    words: list[str], parts: list[str], hpm: patchmine.Run, tmp_path: Path
) -> None:
    places = {"out=NEW": f"out={tmp_path / 'new'}", "out=RUN": f"out={hpm.path}"}
    given = [places.get(word, word) for word in words]
    told = patchmine_says("extend", str(hpm.path), *given, code=2)
    assert [part for part in parts if part not in told] == [], told
    assert not (tmp_path / "new").exists()


def test_a_run_without_a_checkpoint_is_refused(hpm: patchmine.Run, tmp_path: Path) -> None:
    place = tmp_path / "imported"
    imported = patchmine.import_weights(hpm.export_dir, place, num_heads=2, say=print)
    with pytest.raises(UserError, match="has no checkpoint to go on from"):
        imported.extend(tmp_path / "longer", epochs=2)


def test_another_optimizer_begins_with_no_state(hpm: patchmine.Run, tmp_path: Path) -> None:
    said: list[str] = []
    hpm.extend(tmp_path / "longer", steps=2, optimizer="nadamw", say=said.append)
    assert any("and the optimizer's state of 0 of" in text for text in said)
    with pytest.raises(UserError, match="optimizer"):
        patchmine.resume(hpm.path, optimizer="nadamw", say=said.append)


def test_the_refusal_of_a_longer_resume_names_extend(hpm: patchmine.Run) -> None:
    with pytest.raises(UserError, match=r"`patchmine extend \S+ epochs=400 out=\.\.\.`"):
        patchmine.resume(hpm.path, epochs=400, say=lambda _: None)


@pytest.mark.parametrize(
    "settings",
    [{"method": "amt", **DECODER}, {"method": "hpm", "method.look": "memory", **DECODER}],
    ids=["amt", "hpm"],
)
def test_maps_of_images_are_taken_over_with_the_same_images_alone(
    settings: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    # Longer than the first epochs, which AMT masks at random.
    run = patchmine.pretrain(data=images, out=tmp_path / "run", steps=15, **TINY, **settings)
    maps = state(run.checkpoints[-1])["maps.values"]
    assert maps.float().std() > 5
    longer = run.extend(tmp_path / "longer", steps=10, keep_checkpoints=9, say=lambda _: None)
    assert torch.equal(state(longer.checkpoints[0])["maps.values"], maps)
    others = draw_images(tmp_path / "others", 24, ("cat", "dog"))
    other = run.extend(
        tmp_path / "other", data=others, steps=10, keep_checkpoints=9, say=lambda _: None
    )
    assert len(state(other.checkpoints[0])["maps.values"]) == 0
    assert state(other.checkpoints[-1])["maps.values"].shape == (24, 16)

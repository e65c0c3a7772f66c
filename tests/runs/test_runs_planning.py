"""plan and config show: what would run, told before it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import SMALL

import patchmine
from patchmine.config.describe import marked
from patchmine.config.resolve import parse
from patchmine.config.schema import PretrainConfig
from patchmine.runs.preparing import length_of
from patchmine.strict import seconds_in
from patchmine.train.engine import Engine
from patchmine.train.log import Log
from patchmine.training import budget, planning, timing
from patchmine.training.first_steps import FirstSteps
from patchmine.training.pace import Pace
from patchmine.training.place import Place
from patchmine.training.pretraining import find_images, make_first
from spoken import call, patchmine_says

WORDS = [
    "model=vit_tiny_patch16_224",
    "model_args={embed_dim: 16, depth: 1, num_heads: 2}",
    "image_size=16",
    "patch_size=4",
    "batch_size=8",
    "method.decoder_embed_dim=16",
    "method.decoder_depth=1",
    "method.decoder_num_heads=2",
    *(f"{name}={value}" for name, value in SMALL.items() if name != "say"),
]
PACE = Pace(
    step=2.0, checkpoint_bytes=2**30, export_bytes=2**29, peak_bytes=3 * 2**29, trained=1_500_000
)


def test_a_plan_says_what_a_run_takes_and_what_fits(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "measure_pace", lambda *_: PACE)
    monkeypatch.setattr(budget, "seconds_left", lambda config, _: seconds_in(config.budget))
    result = call("plan", f"data={image_folder}", *WORDS, "steps=450", "checkpoint_every=200")
    assert result.exit_code == 0, result.output
    lines = {line[:12].strip(): line[12:] for line in result.stdout.splitlines()}
    assert lines["length"].startswith("450 steps (")
    assert lines["time"].startswith("15 min 00 s at 2 s a step")
    assert lines["memory"].startswith("1.50 GiB at most, of this process")
    assert lines["disk"] == "3.50 GiB: 3 checkpoints and the export"
    assert lines["checkpoint"].startswith("the first after 200 steps")
    assert "(1,800 steps): budget=1h" in lines["an hour"]
    assert "(14,400 steps): budget=8h" in lines["a night"]
    assert "1.5 million parameters" in lines["model"]
    within = patchmine_says("plan", f"data={image_folder}", *WORDS, "budget=20m")
    assert " 600 steps (" in within


def test_a_plan_from_python_is_that_of_the_command(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "measure_pace", lambda *_: PACE)
    settings = dict(word.split("=", 1) for word in [*WORDS, "steps=450"])
    told = patchmine.plan(
        data=image_folder,
        say=lambda text: None,
        **{k: yaml.safe_load(v) for k, v in settings.items()},
    )
    assert told == call("plan", f"data={image_folder}", *WORDS, "steps=450").stdout.rstrip("\n")
    with pytest.raises(patchmine.UserError, match="no such file or folder"):
        patchmine.plan(data="nowhere")


def test_a_plan_really_times_and_leaves_nothing(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "TIMED", 0.1)
    said = patchmine_says("plan", f"data={image_folder}", *WORDS, "epochs=2", "out=runs/x")
    assert "s a step" in said
    assert "0.00 GiB at most" not in said
    assert list(tmp_path.iterdir()) == []
    assert "budget" in patchmine_says("plan", "data=nowhere", "budget=3", code=2)


def test_config_show_resolves_what_waits_for_the_images(image_folder: Path) -> None:
    shown = call("config", "show", "my-images", f"data={image_folder}", "device=cpu", "channels=1")
    assert shown.exit_code == 0, shown.output
    settings = yaml.safe_load(shown.stdout)
    assert settings["image_size"] == [128, 128]
    assert settings["epochs"] == 400
    assert len(settings["mean"]) == 1
    assert "by_size" not in settings
    assert "\nepochs: 400  # default: 100\n" in shown.stdout
    waiting = yaml.safe_load(call("config", "show", "my-images").stdout)
    assert waiting["by_size"]


def test_what_is_not_the_default_is_marked_and_still_read_as_it_is(tmp_path: Path) -> None:
    long = "photos of " + " and ".join(f"place {number}" for number in range(30))
    words = [f"data={long}", f"init={long}", "method=hpm", "method.mask_ratio=0.5", "blr=1e-3"]
    config = parse(None, [*words, "model_args={depth: 4}"])
    text = marked(config)
    lines = text.splitlines()
    assert "method:  # default: mae" in lines
    assert "  mask_ratio: 0.5  # default: 0.75" in lines
    assert "blr: 0.001  # default: 0.00015" in lines
    assert sum("# default: " in line for line in lines) == 4
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    assert parse(path, []) == config


def told(tmp_path: Path, **settings: Any) -> list[str]:
    """What a run of these settings says after five steps of two seconds."""
    config = parse(None, ["data=x", *WORDS, "batch_size=8"])
    assert isinstance(config, PretrainConfig)
    config = config.model_copy(update=settings)
    said: list[str] = []
    length = length_of(config, 80)
    with Log(tmp_path, total_steps=length.total_steps, say=said.append, tensorboard=False) as log:
        first = FirstSteps(config, make_first(config), Engine("cpu"), log, 80, 0)
        first.noted("picture", lambda now: None)(length)
        first.tell(length.at(5), 2.0)
    return said


def test_a_run_tells_from_its_own_steps_what_it_will_take(tmp_path: Path) -> None:
    short, long = told(tmp_path, epochs=20), told(tmp_path, epochs=200)
    assert [line.split(" at ")[0] for line in short] == ["The run: about 6 min 40 s"]
    assert "GiB of memory until now" in short[0]
    assert "0.00 GiB of memory" not in short[0]
    assert long[0].startswith("The run: about 1 h 06 min at 2 s a step")
    assert "budget=1h" in long[1]
    assert "patchmine plan" in long[1]
    chosen = told(tmp_path, epochs=None, steps=2_000)  # by a budget, or by hand
    assert len(chosen) == 1
    assert chosen[0] == long[0]


def test_what_a_run_will_take_is_told_once_and_not_by_one_that_goes_on(
    image_folder: Path, tmp_path: Path
) -> None:
    own = [*WORDS, "steps=7", "checkpoint_every=6", f"out={tmp_path / 'run'}"]
    said = patchmine_says("pretrain", f"data={image_folder}", *own)
    assert said.count("The run: about") == 1
    assert "million parameters learn, 7 steps" in said
    (tmp_path / "run/checkpoints/step-00000007.safetensors").unlink()
    assert "The run: about" not in patchmine_says("resume", str(tmp_path / "run"))


def test_what_a_run_leaves_on_the_disk_is_what_was_foreseen(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(None, [f"data={image_folder}", *WORDS, "steps=3", "checkpoint_every=1"])
    assert isinstance(config, PretrainConfig)
    place, kept = Place(tmp_path, Engine("cpu")), tmp_path / "kept"
    monkeypatch.setattr(timing, "FEWEST", 1)
    images, found, _ = find_images(config, place, {})
    pace = timing.measure_pace(found, place.engine, images, make_first, kept, 0.0)
    files = [kept / "checkpoints/step-00000001.safetensors", *(kept / "exports").glob("*/*")]
    assert pace.checkpoint_bytes + pace.export_bytes == sum(each.stat().st_size for each in files)
    assert {"config.json", "model.safetensors"} < {each.name for each in files}
    assert pace.peak_bytes > 2**20
    assert pace.trained > 0
    assert min(pace.step, pace.picture, pace.checkpoint, pace.look, pace.export, pace.start) > 0


def test_divided_weights_are_tried_out_beside_the_run(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def room(*words: str) -> Path | None:
        config = parse(None, [f"data={image_folder}", *WORDS, *words])
        assert isinstance(config, PretrainConfig)
        return planning.shared_room(config)

    out = f"out={tmp_path}/not/there/run"
    assert room(out, "sharding=ddp") is None
    assert room("sharding=fsdp") is None
    assert room(out, "sharding=fsdp") == room(out, "sharding=hybrid") == tmp_path
    monkeypatch.setattr(planning.os, "access", lambda *_: False)
    with pytest.raises(
        patchmine.UserError, match="may not be written to, where a checkpoint would be"
    ):
        room(out, "sharding=fsdp")

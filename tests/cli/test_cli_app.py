"""The command line: help that is true, words that reach the rooms, mistakes told on stderr with
exit code 2.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.exceptions import Exit

from patchmine import __version__
from patchmine.cli.commands import COMMANDS as PROGRAMS
from patchmine.cli.commands import Command, named
from patchmine.cli.program import ended_in_words, last_words, say, say_once
from patchmine.config.recipes import recipe_names
from patchmine.config.schema import PretrainConfig
from patchmine.errors import UserError
from patchmine.methods import METHODS
from patchmine.runs.known import words_known_to_fit
from spoken import call

COMMANDS = [command.name.split() for command in PROGRAMS]

# Where each command does its work: (module, function).
ROOMS = [
    ("training", "pretrain"),
    ("training.planning", "plan"),
    ("training.finetuning", "finetune"),
    ("training.shares", "compare_shares"),
    ("training", "resume"),
    ("training.extending", "extend"),
    ("training.segmenting", "segment"),
    ("training.detecting", "detect"),
    ("evaluate.knn", "evaluate_knn"),
    ("evaluate.linear", "evaluate_linear"),
    ("evaluate.video", "evaluate_video"),
    ("evaluate.attentive", "evaluate_attentive"),
    ("evaluate.fewshot", "evaluate_fewshot"),
    ("evaluate.clustering", "evaluate_cluster"),
    ("evaluate.retrieval", "evaluate_retrieval"),
    ("evaluate.quality", "evaluate_quality"),
    ("evaluate.measure", "show_result"),
    ("report.predictions", "predict"),
    ("evaluate.embed", "embed"),
    ("report.show", "show"),
    ("report.page", "write_report"),
    ("report.explore", "explore"),
    ("runs.exporting", "export_run"),
    ("runs.transfer", "import_file"),
    ("data.sources.source", "open_source"),
    ("data.inspect", "inspect"),
    ("data.inspect", "render"),
    ("data.sharding", "write_shards"),
    ("data.tiling", "tile_images"),
    ("bench.step", "bench_step"),
    ("bench.data", "bench_data"),
    ("bench.video", "bench_video"),
]
TABLES = [command for command in PROGRAMS if command.settings]
Calls = dict[str, tuple[tuple[Any, ...], dict[str, Any]]]


def name_of(command: list[str]) -> str:
    return " ".join(command)


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stands in for the rooms; remembers the last call of each function."""
    calls: Calls = {}
    extended = {"kind": "pretrain", "data": "photos"}
    monkeypatch.setattr(
        "patchmine.runs.checking.CHECKS", ()
    )  # the data of the examples are not there
    for kind in ("PLAN", "CLASSIFIER", "SEGMENTER", "DETECTOR"):
        monkeypatch.setattr(f"patchmine.runs.checking.{kind}_CHECKS", ())
    monkeypatch.setattr(  # nor are their backbones
        "patchmine.training.shares.settings_of_start",
        lambda start: {"kind": "classify", "init": start},
    )
    monkeypatch.setattr(
        "patchmine.training.starting.settings_for",
        lambda kind, start: {"kind": kind, "init": start},
    )
    monkeypatch.setattr("patchmine.cli.teach._print_table", lambda result: None)
    monkeypatch.setattr(  # nor the runs
        "patchmine.training.extending.settings_of_extension", lambda path, timed: extended
    )
    monkeypatch.setattr(
        "patchmine.runs.known.settings_of_run", lambda path: PretrainConfig(data="photos")
    )
    monkeypatch.setattr("patchmine.runs.known.settings_to_resume", lambda path, words, say: None)

    def recorder(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # its parameters say what it takes
        def record(*args: Any, **kwargs: Any) -> Any:
            calls[name] = (args, kwargs)
            return SimpleNamespace(path="the run")

        return record

    for module, function in ROOMS:
        home = importlib.import_module(f"patchmine.{module}")
        monkeypatch.setattr(home, function, recorder(function, getattr(home, function)))
    return calls


# Help


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_help_has_one_line_for_the_list_and_an_example(command: list[str]) -> None:
    text = call(*command, "--help").stdout
    assert text.startswith("Usage: ")
    group = call(*command[:-1], "--help").stdout
    (line,) = re.findall(rf"^  {command[-1]} +(.*)$", group, flags=re.MULTILINE)
    assert line.endswith(".")
    assert not line.endswith("..."), "the first sentence is too long for the list"
    assert f"patchmine {name_of(command)}" in text


def test_the_first_help_shows_the_commands_in_the_order_of_work() -> None:
    result = call("--help")
    order = re.findall(r"^  ([a-z]+)  +[A-Z]", result.stdout, flags=re.MULTILINE)
    first = ["pretrain", "plan", "resume", "extend", "finetune", "segment", "detect"]
    assert order[:7] == first
    assert len(order) == 19
    assert result.exit_code == 0
    assert "patchmine list recipes" in result.stdout
    assert call("--version").stdout == f"patchmine {__version__}\n"


def test_the_package_is_the_program_too() -> None:
    command = [sys.executable, "-m", "patchmine", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"patchmine {__version__}\n"


def examples() -> list[str]:
    pages = [call("--help").stdout, *(call(*command, "--help").stdout for command in COMMANDS)]
    lines = [line.strip() for page in pages for line in page.splitlines()]
    found = [re.split(r" {2,}| > ", line)[0] for line in lines if line.startswith("patchmine ")]
    return sorted({line for line in found if "COMMAND" not in line and line[-1] != "."})


@pytest.mark.parametrize("line", examples())
def test_every_example_in_the_help_is_accepted(
    line: str, rooms: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "config" not in line and "list" not in line:
        (tmp_path / "my.yaml").write_text("data: photos\n", encoding="utf-8")
        monkeypatch.chdir(tmp_path)
    result = call(*shlex.split(line)[1:])
    assert result.exit_code == 0, result.stderr
    assert rooms or line.split()[1] in ("config", "list")


def test_help_imports_nothing_heavy() -> None:
    program = "import sys; from patchmine.cli.app import main\ntry: main()\n"
    program += "finally: print('LOADED', *sys.modules)"
    command = [sys.executable, "-c", program, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "numpy", "timm", "yaml", "rich"} & set(
        done.stdout.split("LOADED")[1].split()
    )


@pytest.mark.parametrize("command", TABLES, ids=lambda command: command.name)
def test_every_setting_stands_on_its_help_page_and_in_its_schema(command: Command) -> None:
    fields = named(command.settings).model_fields
    text = call(*command.name.split(), "--help").stdout
    schema = call("config", "schema", command.name.replace(" ", ".")).stdout
    for name, field in fields.items():
        assert field.description
        assert f"\n{name}=" in f"\n{schema}" or f"\n{name}.*" in schema
        assert f"  {name}=" in text or f"  {name}.*" in text or f"  {name.upper()} " in text
        assert field.description in " ".join(text.split())
        assert field.description in " ".join(schema.split())


def test_every_setting_of_a_run_stands_on_its_help_page_and_in_its_schema() -> None:
    schema = call("config", "schema").stdout
    assert schema == call("config", "schema", "pretrain").stdout
    text = call("pretrain", "--help").stdout
    for name in PretrainConfig.model_fields:
        assert f"\n{name}=" in schema or f"\n{name}.*" in schema
        assert f"\n  {name}=" in text or f"\n  {name}.*" in text
    for method, table in METHODS.items():
        alone, full = (
            call("config", "schema", method).stdout,
            call("list", "methods", method).stdout,
        )
        for name in set(table.model_fields) - {"name"}:
            assert f"method.{name}=" in alone
            assert f"method.{name}=" in full
            assert f"method.{name}=" in schema


@pytest.mark.parametrize(
    ("line", "code", "seconds"),
    [
        ("--help", 0, 0.5),
        ("config schema", 0, 1.0),
        ("list methods", 0, 1.0),
        ("eval knn --help", 0, 1.0),
        ("pretrain data=photos/ epoch=3 out=x", 2, 1.0),
        ("pretrain data=nowhere/ out=x", 2, 1.0),
        ("eval knn runs/x data=y floor=true", 2, 1.0),
    ],
)
def test_what_needs_no_torch_is_answered_at_once(line: str, code: int, seconds: float) -> None:
    program = "import sys; from patchmine.cli.app import main\ntry: main()\n"
    program += "finally: import time; print('LOADED', time.process_time(), *sys.modules)"
    command = [sys.executable, "-c", program, *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    spent, *modules = done.stdout.split("LOADED")[1].split()
    assert not {"torch", "numpy", "timm", "lightning"} & set(modules)
    assert float(spent) < seconds


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What words may name: a run's settings, an export's description, weights, images."""
    place = tmp_path_factory.mktemp("starts")
    model = {"model": "vit_tiny_patch16_224", "patch_size": 4, "image_size": 16}
    config = PretrainConfig(data="photos", mean=[0.5] * 3, std=[0.5] * 3, **model)
    (place / "run").mkdir()
    (place / "run/config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (place / "export").mkdir()
    described = {"model_args": {"patch_size": 4, "in_chans": 1, "img_size": 16}}
    described |= {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}}
    (place / "export/config.json").write_text(json.dumps(described), encoding="utf-8")
    (place / "export/model.safetensors").write_bytes(b"")
    (place / "weights.pth").write_bytes(b"weights")
    (place / "images").mkdir()
    return place


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("finetune run data=images out=x epoch=3", ["epoch: no such setting"]),
        ("finetune run data=images out=x image_size=15", ["image_size: given 15x15", "of 4"]),
        ("finetune run data=nowhere out=x", ["data: given 'nowhere'"]),
        ("finetune run data=images", ["out is not set"]),
        ("finetune run data=images out=run", ["already holds a run"]),
        ("finetune run data=images out=x recipe=small-label", ["small-labels"]),
        ("finetune run out=x epoch=3 blr=abc", ["3 errors", "data: missing", "epoch", "blr"]),
        ("finetune run data=images out=x seeds=0", ["seeds"]),
        ("finetune vit_tiny_patch16_224 data=images out=x epoch=3", ["did you mean epochs"]),
        ("finetune vit_tiny_patch16_224 data=images out=x image_size=30", ["multiple of 16"]),
        ("finetune export data=images out=x image_size=15 epoch=3", ["2 errors", "15x15"]),
        ("finetune weights.pth data=images out=x epoch=3", ["did you mean epochs"]),
        ("extend run epoch=3 out=x", ["did you mean epochs", "epochs=100"]),
        ("extend run epochs=3 out=x data=nowhere blr=-1", ["2 errors", "data:", "blr:"]),
        ("extend run epochs=3", ["out is not set"]),
        ("extend nowhere epochs=3 out=x", ["nowhere does not exist"]),
        ("resume run worker=3", ["did you mean workers"]),
        ("resume run epochs=300", ["patchmine extend run epochs=300"]),
        ("resume images", ["has no config.yaml"]),
        ("pretrain data=images epoch=3", ["epoch: no such setting", "out is not set"]),
    ],
)
def test_words_that_are_wrong_are_told_without_torch(
    line: str, parts: list[str], starts: Path
) -> None:
    program = "import sys; from patchmine.cli.app import main\ntry: main()\n"
    program += "finally: print('LOADED', *sys.modules)"
    command = [sys.executable, "-c", program, *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=starts)
    assert done.returncode == 2, done.stderr
    assert [part for part in parts if part not in done.stderr] == [], done.stderr
    assert not {"torch", "timm"} & set(done.stdout.split("LOADED")[1].split())
    assert not (starts / "x").exists()


def test_what_rests_on_unknown_weights_is_not_judged_early(starts: Path) -> None:
    """A clip of 15 frames fits weights whose tubelet is of one or three."""
    words = ["clip.frames=15", "mean=[0.5]", "std=[0.5]", "image_size=15", "epochs=2"]
    _, sure = words_known_to_fit(str(starts / "weights.pth"), words)
    assert sure == ["epochs=2"]
    base, sure = words_known_to_fit(str(starts / "export"), words)
    assert sure == words[1:]
    assert (base["channels"], base["image_size"], base["patch_size"]) == (1, [16, 16], 4)


def test_notes_are_told_once(starts: Path, rooms: Calls) -> None:
    given = [f"data={starts / 'images'}", "out=x", "accumulate=3", "seed=1", "seed=2"]
    said = call("finetune", str(starts / "run"), *given).stderr
    assert said.count("seed is given twice") == said.count("is changed to") == 1
    said = call("finetune", str(starts / "run"), *given, "epoch=2").stderr
    assert said.count("seed is given twice") == said.count("epoch: no such setting") == 1
    assert rooms


# Words reach the rooms


def test_pretrain_gets_the_settings_of_recipe_and_words(rooms: Calls) -> None:
    result = call(
        "pretrain",
        "cifar10-tiny",
        "data=photos",
        "method=hpm",
        "method.mask_ratio=0.8",
        "out=runs/x",
    )
    assert result.exit_code == 0, result.stderr
    (config,), _ = rooms["pretrain"]
    assert (config.data, config.out, config.image_size) == ("photos", "runs/x", (32, 32))
    assert (config.method.name, config.method.mask_ratio, config.method.decoder_depth) == (
        "hpm",
        0.8,
        1,
    )


def test_notes_go_to_stderr(rooms: Calls) -> None:
    result = call("pretrain", "data=photos", "epochs=2", "seed=1", "seed=2", "out=x")
    assert result.stderr == "seed is given twice: 2 is used, not 1.\n"
    assert result.stdout == ""
    assert rooms


@pytest.mark.parametrize(("rank", "notes"), [("0", 1), ("1", 0)])
def test_of_torchruns_processes_one_tells_the_notes(
    rank: str, notes: int, rooms: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dict(TORCHELASTIC_RUN_ID="x", RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="localhost")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_PORT", "29500")
    result = call("pretrain", "data=photos", "seed=1", "seed=2", "out=x")
    assert result.stderr.count("seed is given twice") == notes
    assert rooms


def test_resume_gets_run_and_words(rooms: Calls) -> None:
    call("resume", "runs/hpm", "workers=4")
    assert rooms["resume"][0] == ("runs/hpm", ["workers=4"])


def test_evaluations_get_typed_settings(rooms: Calls) -> None:
    call("eval", "knn", "runs/hpm", "data=a", "test=b", "baselines=true", "k=10")
    settings = rooms["evaluate_knn"][1]["settings"]
    assert (settings.target, settings.data, settings.test, settings.baselines, settings.k) == (
        "runs/hpm",
        "a",
        "b",
        True,
        10,
    )
    call("eval", "linear", "runs/hpm", "data=a", "protocol=mae")
    assert rooms["evaluate_linear"][1]["settings"].protocol == "mae"
    call("embed", "vit_tiny_patch16_224", "data=a", "out=e.parquet")
    assert rooms["embed"][1]["settings"].target == "vit_tiny_patch16_224"


def test_pictures_and_pages_get_their_words(rooms: Calls) -> None:
    call("show", "runs/hpm", "a.jpg", "b.jpg", "out=panel.png")
    assert rooms["show"] == (("runs/hpm", ["a.jpg", "b.jpg"], "panel.png"), {"seed": 0})
    call("report", "runs/hpm", "runs/mae")
    words = {"runs": ["runs/hpm", "runs/mae"], "out": "report.html", "say": say_once}
    assert rooms["write_report"][1] == words


def test_weights_get_their_words(rooms: Calls) -> None:
    call("export", "runs/hpm", "weights=teacher")
    words = {"what": "auto", "to": "timm", "weights": "teacher", "say": say_once}
    assert rooms["export_run"] == (("runs/hpm", None), words)
    result = call("import", "mae.pth", "out=runs/mae", "num_heads=3")
    given = rooms["import_file"][1]
    assert (given["file"], given["out"], given["num_heads"]) == ("mae.pth", "runs/mae", 3)
    assert result.stdout == "the run\n"


def test_data_and_benchmarks_get_their_words(rooms: Calls) -> None:
    call("data", "shard", "photos", "out=shards", "max_side=512", "shard_mb=1")
    assert rooms["write_shards"][0][1] == Path("shards")
    assert rooms["write_shards"][1]["max_side"] == 512
    assert rooms["write_shards"][1]["shard_size"] == 2**20
    call("data", "inspect", "photos", "full=true")
    assert rooms["inspect"][1].pop("progress")
    assert rooms["inspect"][1] == {
        "sample": 1000,
        "full": True,
        "video": False,
        "max_pixels": 134217728,
        "dedup": None,
        "sheet": None,
    }
    call("bench", "data", "data=photos", "repeats=2")
    assert rooms["bench_data"][1]["repeats"] == 2
    call("bench", "step", "method=mae,hpm", "batch_size=2")
    assert rooms["bench_step"][1]["batch_size"] == 2


# What needs no stand-in


def test_config_show_prints_a_recipe_that_pretrain_accepts(tmp_path: Path, rooms: Calls) -> None:
    result = call("config", "show", "cifar10-tiny", "method=hpm", "data=photos", "blr=2e-3")
    path = tmp_path / "mine.yaml"
    path.write_text(result.stdout, encoding="utf-8")
    assert call("pretrain", str(path), "out=x").exit_code == 0
    config = rooms["pretrain"][0][0]
    assert (config.method.name, config.data, config.blr) == ("hpm", "photos", 2e-3)


def test_config_show_needs_no_data() -> None:
    assert yaml.safe_load(call("config", "show", "mae-vit-b-imagenet").stdout)["data"] == "IMAGES"
    assert (
        yaml.safe_load(call("config", "show", "photos-demo").stdout)["data"]
        == "embedded:photos/train"
    )


def test_lists_name_methods_recipes_and_models() -> None:
    assert {"mae", "hpm"} <= set(
        re.findall(r"^(\w+): ", call("list", "methods").stdout, flags=re.MULTILINE)
    )
    recipes = call("list", "recipes").stdout.splitlines()
    assert [line.split(": ")[0] for line in recipes] == recipe_names()
    assert recipes[0].startswith("my-images: your own images")
    for name in recipe_names():
        told = call("list", "recipes", name).stdout
        assert told.startswith(f"{name}: ")
        assert told.count("\n  hardware ") == told.count("\n  expected ") == 1
    titles, *models = (line.split() for line in call("list", "models", "small").stdout.splitlines())
    assert titles == ["model", "family", "parameters", "image", "patch"]
    names = [row[0] for row in models]
    assert {"vit_small_patch16_224", "video_vit_small_patch16"} <= set(names)
    assert all("small" in name for name in names)


def test_a_short_list_of_models_says_how_large_they_are() -> None:
    rows = call("list", "models", "convnext_tiny").stdout.splitlines()[1:]
    assert rows[0].split() == ["convnext_tiny", "convnext", "27.8", "224", "-"]
    row = call("list", "models", "video_vit_tiny").stdout.splitlines()[1].split()
    assert row[:2] == ["video_vit_tiny_patch16", "video"]
    assert row[3:] == ["224", "16"]


# Mistakes


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("pretrain", "data: missing; give a folder"),
        ("pretrain cifar-tiny data=x", "did you mean cifar10-tiny or cifar10-tiny-samples?"),
        ("pretrain data=x epoch=3", "epoch: no such setting (given 3); did you mean epochs?"),
        ("pretrain data=x --epochs 3", "settings are written without dashes, as in epochs="),
        ("pretrain photos/", "images are given as data=photos/"),
        ("resume", "Name the folder of a run first"),
        ("extend epochs=3 out=x", "Name the folder of a run first"),
        ("extend nowhere epochs=3 out=x", "nowhere does not exist; give the folder"),
        ("resume nowhere", "nowhere does not exist; give the folder"),
        (
            "eval knn nowhere dta=x baselines=perhaps",
            "dta: no such setting (given 'x'); did you mean data?",
        ),
        (
            "eval knn x data=y floors=true",
            "floors: no such setting (given true); it is called baselines",
        ),
        ("eval knn", "target: missing; a run, an export"),
        ("eval linear x data=y iterations=0", "iterations: given 0; must be"),
        ("embed x data=y", "out: missing; parquet file"),
        ("show", "run: missing; name the folder of a run first"),
        ("show nowhere a.jpg", "nowhere does not exist"),
        ("report", "runs: missing; name one run folder"),
        ("report nowhere out=r.html", "nowhere"),
        ("export nowhere", "nowhere does not exist"),
        ("export x what=decoder", "what: given 'decoder'; must be auto, encoder or full"),
        ("import nowhere.pth", "out: missing; name the folder to write"),
        ("import nowhere.pth out=x", "nowhere.pth does not exist"),
        ("data inspect", "data: missing; name the images first"),
        ("data inspect nowhere", "nowhere"),
        ("data inspect a b", "b: one word too many"),
        ("data shard nowhere", "out: missing; name the folder to write"),
        (
            "data shard nowhere out=x max_size=3",
            "max_size: no such setting (given 3); did you mean max_side?",
        ),
        ("bench data", "data: missing; name the images"),
        ("bench step method=mea", "mae"),
        ("list models smll", "did you mean"),
        ("list recipes my-image", "did you mean my-images?"),
        ("config schema hmp", "did you mean hpm?"),
        ("config show cifar10-tiny blr=fast", "blr: given 'fast'; must be a number"),
    ],
)
def test_mistakes_are_told_on_stderr_with_exit_code_2(
    line: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*shlex.split(line))
    assert result.exit_code == 2, result.exception
    assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


def test_a_misspelt_command_is_answered_with_the_nearest() -> None:
    result = call("pretrian")
    assert result.exit_code == 2
    assert "Did you mean 'pretrain'?" in result.stderr


def fail_with(error: BaseException) -> Callable[..., None]:
    def fail(*args: Any, **kwargs: Any) -> None:  # noqa: ARG001
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("The disk is full."), 2), (KeyboardInterrupt(), 130), (SystemExit(75), 75)],
)
def test_exit_codes(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("patchmine.training"), "pretrain", fail_with(error))
    result = call("pretrain", "data=embedded:photos", "out=y")
    assert result.exit_code == code
    assert "Traceback" not in result.stderr
    if code == 2:
        assert result.stderr == "The disk is full.\n"


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ZeroDivisionError("a bug")
    monkeypatch.setattr(importlib.import_module("patchmine.training"), "pretrain", fail_with(error))
    assert call("pretrain", "data=embedded:photos", "out=y").exception is error


# What the system refuses, and who leaves


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (
            OSError(28, "No space left on device", "/data/x.png"),
            ["/data/x.png", "No space left on device", "room"],
        ),
        (
            PermissionError(13, "Permission denied", b"/data/caf\xe9"),
            ["/data/caf\\xe9", "allow writing there"],
        ),
        (
            IsADirectoryError(21, "Is a directory", "out"),
            ["out cannot be read or written", "a folder has that name"],
        ),
        (OSError("no number"), ["no number"]),
        (
            BrokenPipeError(32, "Broken pipe"),
            ["Broken pipe"],
        ),  # of a pipe to another process, not our output
    ],
)
@pytest.mark.parametrize(
    "line", ["resume runs/x", "report runs/x", "eval knn runs/x data=a", "export runs/x"]
)
def test_what_the_system_refuses_is_one_sentence(
    line: str, error: OSError, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    for module, function in ROOMS:
        monkeypatch.setattr(importlib.import_module(f"patchmine.{module}"), function, fail)
    monkeypatch.setattr("patchmine.runs.known.settings_to_resume", lambda *_: None)
    result = call(*line.split())
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize(
    "line", ["pretrain data=embedded:photos out=b", "eval knn runs/x data=a", "export runs/x"]
)
def test_an_interrupt_is_one_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for module, function in ROOMS:
        monkeypatch.setattr(importlib.import_module(f"patchmine.{module}"), function, fail)
    result = call(*line.split())
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")


def program(command_line: str) -> tuple[int, str]:
    """Exit code of the program in a shell line, and all that it says on stderr."""
    line = command_line.replace("patchmine", f"{shlex.quote(sys.executable)} -m patchmine.cli.app")
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, done.stderr


def test_a_reader_that_left_is_no_error() -> None:
    assert program("set -o pipefail; patchmine list recipes | true") == (141, "")
    assert program("set -o pipefail; patchmine --help | true")[1] == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_sentence() -> None:
    code, said = program("patchmine list recipes > /dev/full")
    assert code == 2
    assert said.count("\n") == 1
    assert "No space left on device" in said


def test_a_lost_terminal_silences_what_is_said_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=gone, flush=gone))
    say("step 3")


def test_ctrl_c_while_the_program_begins_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending, last_words():
        raise KeyboardInterrupt
    assert ending.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def _gpu_is_full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 0.\n")


@pytest.mark.parametrize(
    ("exhaust", "asked"),
    [
        (lambda: torch.empty(1 << 58), r" \(\d+ bytes asked for\)"),
        (lambda: np.empty(1 << 50), r" \([\d.]+ PiB asked for\)"),
        (_gpu_is_full, r" \(20.00 GiB asked for\)"),
    ],
)
def test_a_machine_without_room_is_told_in_one_sentence(
    exhaust: Callable[[], object], asked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exit) as ending, ended_in_words():
        exhaust()
    told = capsys.readouterr().err
    assert ending.value.exit_code == 2
    assert re.match(f"The memory ran out{asked}: take a smaller batch_size", told)
    assert told.count("\n") == 1


def test_other_faults_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes"), ended_in_words():
        raise RuntimeError("shapes do not fit")

"""Run folders: what is in one, how it is opened, and what is said about folders that are none."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import patchmine
from patchmine.backbones.export import Preprocessing, export_encoder
from patchmine.config.resolve import parse
from patchmine.config.schema import PretrainConfig
from patchmine.errors import UserError
from patchmine.methods import METHODS
from patchmine.runs.folder import RunFolder, build_method, write_export
from patchmine.runs.known import is_run
from patchmine.runs.opening import load_encoder
from patchmine.task import Method
from patchmine.train import checkpoint

TINY = [
    "data=photos",
    "model=vit_tiny_patch16_224",
    "model_args={depth: 1, embed_dim: 48, num_heads: 2}",
    "image_size=32",
    "patch_size=8",
    "method.decoder_embed_dim=32",
    "method.decoder_depth=1",
    "method.decoder_num_heads=2",
    "method.out_dim=16",
    "method.head_hidden=16",
    "method.thead_depth=1",
    "method.partner_model=resnet18",
    "method.partner_args={layers: [1, 1, 1, 1], channels: [4, 4, 8, 8]}",
]


def settings(method: str = "mae") -> PretrainConfig:
    return parse(None, [*known_to(method, TINY), f"method={method}"])


def known_to(method: str, words: list[str]) -> list[str]:
    """The words without settings that the method does not have."""
    fields = METHODS[method].model_fields
    return [
        w
        for w in words
        if not w.startswith("method.") or w.removeprefix("method.").split("=")[0] in fields
    ]


def make_run(folder: Path, method: str = "mae", step: int = 3) -> tuple[RunFolder, Method]:
    """A run folder with one checkpoint, and the method whose weights are in it."""
    config = settings(method)
    torch.manual_seed(step)
    built = build_method(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    checkpoint.save(folder / "checkpoints", step, built.state_dict(), {}, {}, keep=3)
    return RunFolder(folder), built


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[name], theirs[name]) for name in mine
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_run_gives_back_settings_method_and_encoder(method: str, tmp_path: Path) -> None:
    run, built = make_run(tmp_path / "run", method)
    assert run.config == settings(method)
    assert same(run.method(), built)
    assert same(run.encoder(), built.encoder)
    assert not run.method().training
    assert not run.encoder().training


def test_weights_come_from_the_newest_checkpoint_that_can_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, old = make_run(tmp_path, step=3)
    run, new = make_run(tmp_path, step=5)
    assert same(run.method(), new)
    newest = run.checkpoints[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    assert same(run.method(), old)
    assert newest.name in caplog.text
    assert run.checkpoints[0].name in caplog.text


def test_the_teacher_of_hpm_can_be_asked_for(tmp_path: Path) -> None:
    run, built = make_run(tmp_path, "hpm")
    assert same(run.encoder("teacher"), built.get_submodule("teacher").get_submodule("encoder"))


def test_a_method_without_teacher_says_so(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, "mae")
    with pytest.raises(UserError, match="holds no teacher: method=mae keeps none"):
        run.encoder("teacher")


def test_a_run_without_checkpoints_but_with_an_export_still_has_an_encoder(tmp_path: Path) -> None:
    run, built = make_run(tmp_path)
    config = run.config
    assert config.mean is not None
    assert config.std is not None
    export_encoder(built.encoder, run.export_dir, Preprocessing(config.mean, config.std))
    for path in run.checkpoints:
        path.unlink()
    assert same(run.encoder(), built.encoder)
    with pytest.raises(UserError, match="without a checkpoint in"):
        run.method()


def test_metrics_leave_out_the_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    assert run.metrics() == []
    lines = [
        {"step": 1, "loss": 0.5},
        {"step": 2, "eval": {"name": "knn", "top1": 40.0, "step": 2}},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo'
    run.metrics_file.write_text(text, encoding="utf-8")
    assert run.metrics() == lines


def test_paths_are_those_that_users_rely_on(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    paths = (
        run.config_file,
        run.metrics_file,
        run.checkpoint_dir,
        run.sample_dir,
        run.eval_dir,
        run.export_dir,
    )
    names = ["config.yaml", "metrics.jsonl", "checkpoints", "samples", "eval", "export"]
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == names
    assert run.bad_files == tmp_path / "bad_files.txt"
    assert is_run(tmp_path)


def test_folders_that_are_no_runs_are_named_with_what_they_lack(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="nowhere does not exist; give the folder that `patchmine pretrain` wrote"
    ):
        RunFolder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is no run: it has no config\.yaml"):
        RunFolder(tmp_path)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="is a file, not the folder of a run"):
        RunFolder(tmp_path / "file")


def test_a_damaged_config_is_an_error_of_the_user_and_is_never_executed(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    mark = tmp_path / "executed"
    run.config_file.write_text(
        f"data: !!python/object/apply:pathlib.Path.touch [{mark}]\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match="not valid YAML"):
        _ = RunFolder(tmp_path).config
    assert not mark.exists()


def test_settings_that_do_not_fit_the_checkpoint_are_named(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    text = run.config_file.read_text(encoding="utf-8").replace(
        "decoder_depth: 1", "decoder_depth: 2"
    )
    run.config_file.write_text(text, encoding="utf-8")
    with pytest.raises(
        UserError, match=r"does not fit the settings in config.yaml \(Missing key.*decoder"
    ):
        RunFolder(tmp_path).method()


def test_training_may_start_from_another_runs_encoder(tmp_path: Path) -> None:
    _, built = make_run(tmp_path)
    assert same(build_method(settings("hpm"), start_from=str(tmp_path)).encoder, built.encoder)
    larger = parse(None, [*known_to("mae", TINY), "image_size=64"])
    started = build_method(larger, start_from=str(tmp_path)).encoder
    assert torch.equal(
        started.get_parameter("norm.weight"), built.encoder.get_parameter("norm.weight")
    )
    wider = parse(None, [*known_to("mae", TINY), "model_args.embed_dim=96"])
    with pytest.raises(UserError, match=r"init=.*shape"):
        build_method(wider, start_from=str(tmp_path))


@pytest.mark.parametrize("stem", [False, True])
def test_a_resnets_export_starts_another_run(tmp_path: Path, stem: bool) -> None:
    words = [
        "data=photos",
        "model=resnet18",
        f"model_args={{channels: [8, 8, 12, 16], cifar_stem: {stem}}}",
    ]
    words += ["image_size=32", "method=scfs", "method.out_dim=16", "method.stage_out_dim=16"]
    config = parse(None, words)
    method = build_method(config)
    method.encoder.train()(torch.randn(4, 3, 32, 32))
    write_export(config, method.encoder, tmp_path / "export")
    assert same(load_encoder(tmp_path / "export"), method.encoder)
    assert same(build_method(config, start_from=str(tmp_path / "export")).encoder, method.encoder)
    other = parse(None, [*words, f"model_args.cifar_stem={not stem}"])
    with pytest.raises(UserError, match=r"init=.*conv1.weight has shape"):
        build_method(other, start_from=str(tmp_path / "export"))


def test_the_public_names_open_runs(tmp_path: Path) -> None:
    _, built = make_run(tmp_path)
    assert isinstance(patchmine.Run(tmp_path), RunFolder)
    assert same(patchmine.load_encoder(tmp_path), built.encoder)
    assert same(load_encoder(tmp_path), built.encoder)
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        _ = patchmine.pretrian  # type: ignore[attr-defined]


def test_pretrain_from_python_takes_settings_and_datasets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def pretrain(config: PretrainConfig, **more: Any) -> SimpleNamespace:
        calls.append((config, more))
        return SimpleNamespace(path=tmp_path)

    monkeypatch.setattr("patchmine.training.pretrain", pretrain)
    monkeypatch.setattr("patchmine.api.Run", str)
    dataset = torch.utils.data.TensorDataset(torch.zeros(3, 3, 32, 32))
    patchmine.pretrain(
        data=tmp_path, method="hpm", recipe="cifar10-tiny", out="x", **{"method.mask_ratio": 0.8}
    )
    patchmine.pretrain(data=dataset, out="x")
    (named, with_name), (given, with_dataset) = calls
    assert (named.data, named.method.name, named.method.mask_ratio, named.image_size) == (
        str(tmp_path),
        "hpm",
        0.8,
        (32, 32),
    )
    assert not with_name["sources"]
    assert given.data == "python:TensorDataset"
    assert with_dataset["sources"] == {"data": dataset}
    with pytest.raises(UserError, match="data: missing"):
        patchmine.pretrain(out="x")

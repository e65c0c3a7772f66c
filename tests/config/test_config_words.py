"""What people type and write, right and wrong: words of a command, YAML files, names that other
programs use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from patchmine.cli.commands import read_words
from patchmine.config.explain import OTHER_NAMES, all_settings, nearest, validate
from patchmine.config.overrides import read_settings, read_yaml
from patchmine.config.recipes import load_recipe
from patchmine.config.resolve import RATES, from_settings, parse
from patchmine.config.schema import PretrainConfig
from patchmine.data.settings import ShardSettings
from patchmine.errors import UserError
from patchmine.evaluate.settings import KnnSettings
from patchmine.methods import METHODS
from patchmine.report.settings import ReportSettings, ShowSettings
from patchmine.runs.settings import ExportSettings, ImportSettings


def complaint(*words: str, recipe: str | Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        parse(recipe, words)
    return str(caught.value)


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "mine.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Words


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["epochs", "=", "100"], "epochs: settings are written without spaces, as in epochs=100"),
        (["epochs", "=100"], "epochs: settings are written without spaces, as in epochs=100"),
        (["epochs = 100"], "epochs: settings are written without spaces, as in epochs=100"),
        (["epochs", "="], "epochs: settings are written without spaces, as in epochs=VALUE"),
        (
            ["epochs=", "100"],
            "epochs: nothing stands behind its equals sign: write a value there, as in epochs=100",
        ),
        (
            ["wandb="],
            "wandb: nothing stands behind its equals sign: write a value there, or null for none",
        ),
        (["--epochs", "100"], "--epochs: settings are written without dashes, as in epochs=100"),
        (
            ["--batch-size=8"],
            "--batch-size=8: settings are written without dashes, as in batch_size=8",
        ),
        (["--compile"], "--compile: settings are written without dashes, as in compile=VALUE"),
        (["-e", "100"], "-e: settings are written without dashes, as in e=100"),
        (["x" * 5000], "is no setting; settings are written key=value"),
        (["a\0b"], r"a\x00b: is no setting"),
        (["caf\udce9"], r"caf\xe9: is no setting"),
    ],
)
def test_a_setting_that_is_written_otherwise_is_one_sentence(words: list[str], part: str) -> None:
    text = complaint("data=x", *words)
    assert part in text
    assert len(text.splitlines()) == 1
    assert len(text) < 400


def test_words_of_every_command_are_read_alike() -> None:
    for words, part in (
        (["run", "k", "=", "5", "data=x"], "k: settings are written without spaces, as in k=5"),
        (["run", "data=x", "--k", "5"], "--k: settings are written without dashes, as in k=5"),
        (["run", "data=x", "name="], "name: nothing stands behind its equals sign"),
        (["run", "data=x", "n" * 5000], "one word too many"),
    ):
        with pytest.raises(UserError, match="Error in") as caught:
            read_words(KnnSettings, words, command="eval knn", first=["target"])
        assert part in str(caught.value)


def test_the_last_of_two_values_counts_and_this_is_said() -> None:
    said: list[str] = []
    assert (
        parse(None, ["data=x", "epochs=30", "seed=1", "seed=1", "epochs=40"], said.append).epochs
        == 40
    )
    assert said == ["epochs is given twice: 40 is used, not 30."]
    said.clear()
    read_words(
        ReportSettings,
        ["runs/a", "out=a.html", "out=b.html"],
        command="report",
        rest="runs",
        say=said.append,
    )
    assert said == ["out is given twice: 'b.html' is used, not 'a.html'."]


def test_a_table_does_not_wipe_out_what_stands_before_it() -> None:
    config = parse(
        None, ["data=x", "method.mask_ratio=0.6", "method={name: hpm}", "model_args={depth: 2}"]
    )
    assert (config.method.name, config.method.mask_ratio) == ("hpm", 0.6)
    assert config.model_args == {"depth": 2}


def test_a_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = parse(None, ["data=[~/a, b]", "out=~/runs/x", "init=a~/b"])
    assert (config.data, config.out, config.init) == (
        ["/home/me/a", "b"],
        "/home/me/runs/x",
        "a~/b",
    )
    assert parse(write(tmp_path, "data: ~/photos\nout: ~/x\n"), []).data == "/home/me/photos"
    assert from_settings(data=Path("~/a")).data == "/home/me/a"
    settings = read_words(
        KnnSettings, ["~/run", "data=~/a b/"], command="eval knn", first=["target"]
    )
    assert (settings.target, settings.data) == ("/home/me/run", "/home/me/a b/")


def test_quotes_that_a_shell_has_left_are_no_part_of_a_value() -> None:
    assert read_settings(["data='a b'", 'name="x"'])[0] == [("data", "a b"), ("name", "x")]


# Names of other programs


@pytest.mark.parametrize("name", sorted(OTHER_NAMES))
def test_every_name_of_another_program_leads_to_a_setting(name: str) -> None:
    assert name not in PretrainConfig.model_fields
    ours = OTHER_NAMES[name]
    of_a_run = ours in all_settings(PretrainConfig) or ours.startswith("model_args.")
    assert of_a_run or ours in KnnSettings.model_fields
    model: type[BaseModel] = PretrainConfig if of_a_run else KnnSettings
    with pytest.raises(UserError) as caught:
        validate(model, {"data": "x", name: 3}, where="the settings")
    assert f"{name}: no such setting (given 3); it is called {ours} here" in str(caught.value)


def test_evaluations_know_them_too() -> None:
    with pytest.raises(
        UserError, match=r"bs: no such setting .given 64.; it is called batch_size here"
    ):
        read_words(KnnSettings, ["x", "data=y", "bs=64"], command="eval knn", first=["target"])


@pytest.mark.parametrize("name", RATES)
def test_an_absolute_rate_is_converted_for_the_batch(name: str) -> None:
    text = complaint("data=x", f"{name}=1e-3", "batch_size=64")
    assert text.endswith(
        "it is blr here, the rate for 256 images: with batch_size=64 give blr=0.004"
    )
    assert parse(None, ["data=x", "blr=0.004"]).blr * 64 / 256 == pytest.approx(1e-3)
    assert complaint("data=x", f"{name}=0.5").endswith("with batch_size=256 give blr=0.5")
    for odd in ("fast", "true", "0", ".nan", "1e400"):
        assert "blr = rate * 256 / batch_size" in complaint("data=x", f"{name}={odd}")
    assert "blr = rate * 256 / batch_size" in complaint(
        "data=x", f"{name}=1e-3", recipe="my-images"
    )


def test_a_rate_beside_other_mistakes_is_told_with_them() -> None:
    text = complaint("data=x", "lr=1e-3", "batch_size=many", "epoch=3")
    assert text.startswith("3 errors")


# Hints


@pytest.mark.parametrize("method", METHODS)
def test_no_hint_proposes_the_word_that_was_refused(method: str) -> None:
    for path in all_settings(PretrainConfig):
        if not path.startswith("method."):
            continue
        with pytest.raises(UserError) as caught:
            parse(None, ["data=x", f"method={method}", f"{path}=never", "epochs=0"])
        for line in str(caught.value).splitlines():
            assert f"mean {path}?" not in line
            assert f"mean {path} or" not in line
            assert f"or {path}?" not in line


def test_a_setting_of_another_method_names_that_method() -> None:
    assert complaint("data=x", "method.alpha_end=0.3").endswith(
        "no such setting (given 0.3); it is one of method=hpm"
    )
    assert "it is one of method=hpm and method=semaim" in complaint(
        "data=x", "method.ema_ramp_epochs=3"
    )


def test_the_nearest_names_never_hold_the_name_itself() -> None:
    assert nearest("epochs", ["epochs", "epoch"]) == ["epoch"]


# YAML


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("data: x\na: " + "[" * 100_000, "nested more than 32 deep (line 2)"),
        ("data: x\na: " + "[" * 40 + "]" * 40, "nested more than 32 deep (line 2)"),
        ("".join(f"{' ' * n}a:\n" for n in range(500)), "nested more than 32 deep (line 32)"),
        (LAUGHS, "aliases make this larger than any settings are (line 5)"),
        (MERGED, "aliases make this larger than any settings are (line"),
        ("a: &a [*a]\n", "an alias within what it stands for (line 1)"),
        ("data: x\nepochs: 3\nepochs: 4\n", "'epochs' stands here twice (line 3)"),
        ("data: x\nmethod:\n  name: mae\n  name: hpm\n", "'name' stands here twice (line 4)"),
        ("data: x\nmethod:\n\tname: mae\n", "indent with spaces (line 3)"),
        ("data: [a\nepochs: 3\n", "(line 2)"),
        ("data: *.tar\n", "(line 1)"),
        ("data: x\n---\ndata: y\n", "(line 2)"),
        ("data: !!python/object/apply:os.system ['true']\n", "(line 1)"),
        ("data: !!float x\n", "is not valid YAML"),
        ("data: !!timestamp x\n", "is not valid YAML"),
        ("data: x\0y\n", "is not valid YAML"),
        (b"data: x\nout: caf\xe9\n", "line 2 is no text in UTF-8"),
        ("data: x\n".encode("utf-16"), "line 1 is no text in UTF-8"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "line 1 is no text in UTF-8"),
        (b"a" * 2**21, "has more than 1,048,576 bytes"),
        ("", "holds no settings"),
        ("# nothing\n", "holds no settings"),
        ("text\n", "holds no settings"),
        ("1: 2\n", "holds no settings"),
        ("null\n", "holds no settings"),
        ("? [a, b]\n: c\n", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_settings_is_one_sentence(
    content: str | bytes, part: str, tmp_path: Path
) -> None:
    path = write(tmp_path, content)
    text = complaint(recipe=path)
    assert text.startswith(str(path))
    assert part in text
    assert len(text.splitlines()) == 1
    assert len(text) < 400


def test_what_yaml_1_1_reads_otherwise_is_read_as_it_looks(tmp_path: Path) -> None:
    content = "a: on\nb: 1_000\nc: 1e-3\nd: no\ne: 1E5\nf: 12:30:00\ng: 0o17\nh: 1.5e-4\n"
    content += "i: yes\nj: .5\nk: 2024-01-01\n"
    wanted: dict[str, Any] = dict(
        a="on", b=1000, c=1e-3, d="no", e=1e5, f="12:30:00", g="0o17", h=1.5e-4, i="yes", j=0.5
    )
    found = read_yaml(write(tmp_path, content))
    assert found == wanted | {"k": "2024-01-01"}
    assert read_yaml(write(tmp_path, "﻿data: x\n")) == {"data": "x"}  # a byte order mark
    assert read_yaml(write(tmp_path, "a: " + "9" * 5000)) == {"a": "9" * 5000}


def test_anchors_that_stay_small_are_read(tmp_path: Path) -> None:
    content = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n"
    assert read_yaml(write(tmp_path, content))["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("n" * 5000, "No recipe '"),
        ("a\0b", r"No recipe 'a\x00b'"),
        ("caf\udce9", r"No recipe 'caf\xe9'"),
        ("/dev/null", "/dev/null is no file that holds settings"),
        ("cifar10-tiny.yaml", "did you mean cifar10-tiny?"),
    ],
)
def test_a_recipe_that_cannot_be_is_one_sentence(name: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(name)
    assert part in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a_word_in_the_place_of_a_number_in_a_nested_table_is_named(tmp_path: Path) -> None:
    for method in ("{1: 2}", "[a]", "3", "{name: [mae]}", "{name: {a: b}}", "null", "true"):
        assert "method" in complaint(recipe=write(tmp_path, f"data: x\nmethod: {method}\n")), method
    for key in ("about", "methods", "by_size", "model_args", "crops", "clip", "betas", "mean"):
        for value in ("[1]", "3", "text", "[[1]]", "{a: [b]}"):
            if (key, value[0]) not in (("about", "{"), ("model_args", "{")):
                assert key in complaint(recipe=write(tmp_path, f"data: x\n{key}: {value}\n")), (
                    key,
                    value,
                )
    assert "by_size" in complaint(
        recipe=write(tmp_path, "data: x\nby_size: [{up_to: 3, use: 4}]\n")
    )


def test_show_needs_no_settings_to_take_a_name_with_a_dash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-a.png").touch()
    assert read_words(
        ShowSettings, ["run", "-a.png"], command="show", first=["run"], rest="images"
    ).images == ["-a.png"]


# Names of what is written


@pytest.mark.parametrize(
    ("model", "words", "part"),
    [
        (
            ReportSettings,
            ["r", "out=x.pdf"],
            "out: given 'x.pdf'; must be the name of a file that ends in .html or .htm",
        ),
        (ReportSettings, ["r", "out=x"], "must be the name of a file that ends in .html or .htm"),
        (
            ExportSettings,
            ["r", "out=x.onnx"],
            "must be the name of a folder; to=onnx writes a file that ends in .onnx",
        ),
        (ExportSettings, ["r", "to=onnx", "out=x"], "the name of a file that ends in .onnx"),
        (ExportSettings, ["r", "to=torch", "out=x.onnx"], "to=onnx writes a file that ends in"),
        (ExportSettings, ["r", "out=x.pt2"], "to=torch writes a file that ends in .pt2"),
        (ExportSettings, ["r", "to=transformers", "out=x.onnx"], "must be the name of a folder;"),
        (
            ExportSettings,
            ["r", "to=onnx", "what=full", "out=x.safetensors"],
            "to: given 'onnx'; must be left out with what=full",
        ),
        (
            ExportSettings,
            ["r", "out=x.pth"],
            "must be the name of a folder, which does not end in .pth",
        ),
        (
            ExportSettings,
            ["r", "out=x.safetensors"],
            "must be the name of a folder, which does not end in .safetensors",
        ),
        (
            ExportSettings,
            ["r", "what=full", "out=x"],
            "must be the name of a file that ends in .safetensors",
        ),
        (
            ExportSettings,
            ["r", "out=x.onnx", "what=full"],
            "must be the name of a file that ends in .safetensors",
        ),
        (
            ImportSettings,
            ["f.pth", "out=x.safetensors"],
            "must be the name of a folder, which does not end in .safetensors",
        ),
        (
            ShardSettings,
            ["d", "out=x.tar"],
            "must be the name of a folder, which does not end in .tar",
        ),
    ],
)
def test_an_ending_that_promises_something_else_is_refused(
    model: Any, words: list[str], part: str
) -> None:
    with pytest.raises(UserError) as caught:
        read_words(model, words[1:], command="c")
    assert part in str(caught.value)


def test_folders_with_dots_in_their_names_are_folders() -> None:
    assert (
        read_words(ExportSettings, ["r", "out=runs/v1.2"], command="export", first=["run"]).out
        == "runs/v1.2"
    )
    assert read_words(
        ExportSettings, ["r", "what=full", "out=a.safetensors"], command="export", first=["run"]
    ).out

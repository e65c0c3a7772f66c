"""Numbers that no setting means are refused in every table of settings, quickly and with the
setting's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from patchmine.bench.settings import BenchDataSettings, BenchStepSettings
from patchmine.cli.commands import read_words
from patchmine.config.resolve import from_settings, parse
from patchmine.config.schema import PretrainConfig
from patchmine.data.settings import Clip, Crops, InspectSettings, ShardSettings, TileSettings
from patchmine.errors import UserError
from patchmine.evaluate.settings import (
    AttentiveSettings,
    ClusterSettings,
    EmbedSettings,
    FewshotSettings,
    KnnSettings,
    LinearSettings,
    QualitySettings,
    RetrievalSettings,
    VideoSettings,
)
from patchmine.methods import METHODS
from patchmine.report.settings import ExploreSettings, ReportSettings, ShowSettings
from patchmine.runs.settings import ExportSettings, ImportSettings
from patchmine.strict import Strict, _flat, _leaves

COMMANDS = [
    ShowSettings,
    ReportSettings,
    ExploreSettings,
    ExportSettings,
    ImportSettings,
    InspectSettings,
    ShardSettings,
    TileSettings,
    BenchDataSettings,
]
EVALUATIONS = [
    EmbedSettings,
    KnnSettings,
    LinearSettings,
    VideoSettings,
    AttentiveSettings,
    FewshotSettings,
    ClusterSettings,
    RetrievalSettings,
    QualitySettings,
]
METHOD_CONFIGS = [*METHODS.values()]
TABLES: list[type[BaseModel]] = [
    PretrainConfig,
    Crops,
    Clip,
    BenchStepSettings,
    *COMMANDS,
    *EVALUATIONS,
    *METHOD_CONFIGS,
]


def numeric() -> Iterator[tuple[type[BaseModel], str]]:
    for table in TABLES:
        for name, field in table.model_fields.items():
            if _leaves(field.annotation) & {int, float}:
                yield table, name


NUMERIC = list(numeric())


def ids(value: Any) -> str:
    return getattr(value, "__qualname__", str(value))


@pytest.mark.parametrize("table", TABLES, ids=ids)
def test_every_table_of_settings_is_strict(table: type[BaseModel]) -> None:
    assert issubclass(table, Strict)
    assert table.model_config["extra"] == "forbid"
    assert table.model_config["allow_inf_nan"] is False


def complaint(table: type[BaseModel], name: str, value: Any) -> str:
    """What is said of one setting, among the complaints about all that is missing."""
    with pytest.raises(ValidationError) as caught:
        table(**{name: value})
    found = [
        e
        for e in caught.value.errors()
        if e["loc"] and e["loc"][0] == name and e["type"] != "missing"
    ]
    assert found, f"{table.__qualname__}.{name}={value} is taken"
    return str(found)


@pytest.mark.parametrize(("table", "name"), NUMERIC, ids=ids)
def test_no_number_may_be_nan_infinite_or_of_hundreds_of_digits(
    table: type[BaseModel], name: str
) -> None:
    default = table.model_fields[name].default
    shape = len(default) if isinstance(default, tuple | list) and default else 0
    for bad in (float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), "1e400", "nan"):
        complaint(table, name, [bad] * shape if shape else bad)


@pytest.mark.parametrize(("table", "name"), NUMERIC, ids=ids)
def test_true_is_no_number(table: type[BaseModel], name: str) -> None:
    leaves = _leaves(table.model_fields[name].annotation)
    if not leaves & {bool, str}:
        complaint(table, name, True)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["blr=.nan"], "blr: given nan; must be a finite number"),
        (["blr=nan"], "blr: given 'nan'; must be a finite number"),
        (["blr=inf"], "blr: given 'inf'; must be a finite number"),
        (["blr=1e400"], "blr: given inf; must be a finite number"),
        (["betas=[0.9,.nan]"], "betas[1]: given nan; must be a finite number"),
        (["min_lr=-.inf"], "min_lr: given -inf; must be a finite number"),
        (["method.mask_ratio=.nan"], "method.mask_ratio: given nan; must be a finite number"),
        (
            ["crops.global_scale=[.nan,1]"],
            "crops.global_scale[0]: given nan; must be a finite number",
        ),
        (
            ["model_args.drop_path_rate=.inf"],
            "model_args: given {'drop_path_rate': inf}; must be numbers of at most",
        ),
        (["model_args.depth=1000000"], "numbers of at most 256, which depth is not"),
        (
            ["model_args={embed_dim: [1, .nan]}"],
            "numbers of at most 65,536, which embed_dim is not",
        ),
        (["workers=100000"], "workers: given 100000; must be at least 0 and at most 1024"),
        (["workers=-1"], "workers: given -1; must be at least 0 and at most 1024"),
        (
            [f"batch_size={10**12}"],
            "batch_size: given 1000000000000; must be above 0 and at most 1048576",
        ),
        (
            [f"image_size={10**9}"],
            "image_size: given 1000000000; must be less than or equal to 8192",
        ),
        ([f"image_size=[224,{10**9}]"], "must be less than or equal to 8192"),
        (
            [f"epochs={10**30}"],
            "epochs: given 1000000000000000000000000000000; must be above 0 and at most 1000000000",
        ),
        ([f"seed={10**400}"], "; must be a whole number of at most 18 digits"),
        ([f"epochs={'9' * 5000}"], "; must be a number of at most 18 digits"),
        ([f"blr={10**400}"], "; must be a number of at most 18 digits"),
        (["flip=true"], "flip: given true; must be a number"),
        (["epochs=true"], "epochs: given true; must be a whole number"),
        (
            ["method.decoder_depth=100000"],
            "method.decoder_depth: given 100000; must be above 0 and at most 256",
        ),
    ],
)
def test_what_is_said_of_a_run(words: list[str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(None, ["data=x", *words])
    (line,) = str(caught.value).splitlines()
    assert part in line
    assert len(line) < 250


def test_python_is_told_the_same() -> None:
    for number in (10**400, 1 << 20_000):
        with pytest.raises(UserError, match="18 digits"):
            from_settings(data="x", seed=number)
    with pytest.raises(UserError, match="finite number"):
        from_settings(data="x", blr=float("nan"))


def test_evaluations_are_told_the_same() -> None:
    with pytest.raises(UserError, match="temperature: given 1e-320; must be at least 1e-06"):
        read_words(
            KnnSettings, ["x", "data=y", "temperature=1e-320"], command="eval knn", first=["target"]
        )
    with pytest.raises(UserError, match=r"rates\[1\]: given inf; must be a finite number"):
        read_words(
            LinearSettings,
            ["x", "data=y", "rates=[1,.inf]"],
            command="eval linear",
            first=["target"],
        )
    with pytest.raises(UserError, match="workers: given -1; must be at least 0 and at most 1024"):
        read_words(
            EmbedSettings,
            ["x", "data=y", "out=a.csv", "workers=-1"],
            command="embed",
            first=["target"],
        )


def test_lists_are_searched_and_tables_left_to_their_own_check() -> None:
    assert _flat([1, (2, [3]), {"a": 4}]) == [1, 2, 3, {"a": 4}]

"""Tables of settings as lines to read: every setting with its default and its meaning."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from patchmine.config.explain import did_you_mean
from patchmine.config.schema import (
    KINDS,
    DetectConfig,
    FinetuneConfig,
    PretrainConfig,
    RunConfig,
    SegmentConfig,
    names_of,
)
from patchmine.errors import UserError, shown_name
from patchmine.methods import METHODS
from patchmine.strict import Strict
from patchmine.tasks.settings import CommandOptions, FinetuneOptions

_WIDTH = 36  # columns of a name with its default


def describe(
    model: type[BaseModel], names: Iterable[str] | None = None, prefix: str = ""
) -> list[str]:
    """A line for each setting, those of nested tables included: ``name=default   meaning``."""
    lines = []
    for name in model.model_fields if names is None else names:
        field = model.model_fields[name]
        if isinstance(field.default, Strict):
            lines.append(f"{f'{prefix}{name}.*':<{_WIDTH}} {field.description}")
            lines += describe(type(field.default), prefix=f"{prefix}{name}.")
            continue
        head = f"{prefix}{name}={'' if field.is_required() else as_word(field.default)}"
        if len(head) > _WIDTH:
            lines.append(head)
            head = ""
        lines.append(f"{head:<{_WIDTH}} {meaning(field)}")
    return lines


def meaning(field: FieldInfo) -> str:
    """What a setting means, with its choices where the description names none of them."""
    text = field.description or ""
    is_choice = typing.get_origin(field.annotation) is Literal
    *choices, last = map(str, typing.get_args(field.annotation) if is_choice else [""])
    untold = any(choice not in text for choice in [*choices, last])
    return f"{text} ({', '.join(choices)} or {last})" if choices and untold else text


def as_word(value: Any) -> str:
    """A default as one would type it."""
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def marked(config: RunConfig) -> str:
    """``config.to_yaml()``, with a comment at each setting that is not the default."""
    usual = type(config).model_validate({"data": "x"})
    lines = config.to_yaml().splitlines()
    depths = [len(line) - len(line.lstrip()) for line in lines]
    table: BaseModel | None = None  # whose settings the indented lines are
    told = []
    for line, depth, following in zip(lines, depths, [*depths[1:], 0], strict=True):
        name, _, value = line.strip().partition(":")
        if depth == 0:
            inner = getattr(config, name, None)
            table = inner if isinstance(inner, BaseModel) else None
            mark = _mark(config, usual, name)
        else:
            mark = "" if table is None or depth > 2 else _mark(table, type(table)(), name)
        is_wrapped = value and following > depth
        told.append(line if is_wrapped else line + mark)
    return "\n".join([*told, ""])


def usual_settings(kind: str, method: str | None) -> dict[str, Any]:
    """The defaults of a run of this kind, as config.yaml has settings; none of an unknown one.

    Args:
        kind: as in config.yaml.
        method: of a run that pre-trains.
    """
    if kind not in KINDS or (method is not None and method not in METHODS):
        return {}
    given = {"data": "x"} if method is None else {"data": "x", "method": {"name": method}}
    found = KINDS[kind].model_validate(given).model_dump(mode="json", exclude={"data"})
    return found


def _mark(table: BaseModel, usual: BaseModel, name: str) -> str:
    """Behind a setting: its default, where it has another value."""
    field = type(table).model_fields.get(name)
    if field is None or field.is_required():
        return ""
    value, default = (getattr(each, name) for each in (table, usual))
    if isinstance(value, BaseModel):  # of which only the kind is told here
        value, default = (getattr(each, "name", None) for each in (value, default))
    return "" if value == default else f"  # default: {as_word(default)}"


def describe_run() -> list[str]:
    """Every setting of a pre-training run, and of every method."""
    methods = [[f"# Of method={name}.", *describe_method(name), ""] for name in METHODS]
    return describe_blocks(PretrainConfig, [line for lines in methods for line in lines])


def describe_finetune() -> list[str]:
    """Every setting of a run that fine-tunes."""
    return _with_options(FinetuneOptions, FinetuneConfig)


def describe_segment() -> list[str]:
    """Every setting of a run that segments."""
    return _with_options(CommandOptions, SegmentConfig)


def describe_detect() -> list[str]:
    """Every setting of a run that detects."""
    return _with_options(CommandOptions, DetectConfig)


def _with_options(options: type[Strict], config: type[RunConfig]) -> list[str]:
    title = "# How the command goes about it."
    return [title, *describe(options), "", *describe_blocks(config)]


def describe_blocks(config: type[RunConfig], between: Sequence[str] = ()) -> list[str]:
    """Every setting of a run: first what decides the weights."""
    decide = [*names_of(config, decide_weights=True), "by_size"]
    running = names_of(config, decide_weights=False)
    first = ["# What decides the weights.", *describe(config, decide), ""]
    title = "# Where and how the run is made; may change on resume."
    return [*first, *between, title, *describe(config, running)]


RUNS = {
    "pretrain": describe_run,
    "finetune": describe_finetune,
    "segment": describe_segment,
    "detect": describe_detect,
}
"""What lists every setting of the runs that a command makes."""


def describe_method(name: str) -> list[str]:
    """The settings of one method.  Raises UserError for a name that is none."""
    if name not in METHODS:
        near = did_you_mean(name, METHODS) or f"; there are {', '.join(METHODS)}"
        raise UserError(f"No method '{shown_name(name)}'{near}")
    table = METHODS[name]
    return describe(table, [each for each in table.model_fields if each != "name"], "method.")

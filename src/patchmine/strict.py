"""What every table of settings is built on: types with bounds, and checks across fields."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

from patchmine.errors import shown_name

LARGEST_SIDE = 8_192  # pixels: a position table for patches of 16 then has 262,144 rows
LARGEST_COUNT = 65_536
LARGEST_DEPTH = 256
LARGEST_BATCH = 2**20
LARGEST_RUN = 10**9
MOST_WORKERS = 1_024
_WORD = 2**63  # beyond it no array and no random generator holds a whole number


def _as_share(value: Any) -> Any:
    """Percent as a fraction; what is no number is told by the setting."""
    number = value.removesuffix("%") if isinstance(value, str) else ""
    try:
        return float(number) / (1 if number == value else 100)
    except ValueError:
        return value


Count = Annotated[int, Field(gt=0, le=LARGEST_COUNT)]
"""Of what is held in memory at once or started as a process: widths, frames, devices."""
Depth = Annotated[int, Field(gt=0, le=LARGEST_DEPTH)]
"""Blocks of a network."""
Side = Annotated[int, Field(gt=0, le=LARGEST_SIDE)]
"""Pixels."""
BatchSize = Annotated[int, Field(gt=0, le=LARGEST_BATCH)]
Positive = Annotated[int, Field(gt=0, le=LARGEST_RUN)]
"""Of steps, epochs and what is counted in them."""
Workers = Annotated[int, Field(ge=0, le=MOST_WORKERS)] | Literal["auto"]
"""Processes that read images."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, BeforeValidator(_as_share), Field(gt=0, le=1)]
"""A part of a whole, above 0: 0.1, or 10% as text."""
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class SettingError:
    """``path`` of a setting (``method.mask_ratio``) and what is wrong with it."""

    path: str
    text: str

    def __str__(self) -> str:
        path = shown_name(self.path)  # of a file that may hold any letter
        return f"{path}: {self.text}" if self.path else self.text


class UnfitSettingsError(ValueError):
    """Settings that are right one by one but do not fit together."""

    def __init__(self, errors: Sequence[SettingError]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = list(errors)


class Strict(BaseModel):
    """Settings without unknown names, NaN, infinity, numbers beyond 64 bits, or true as a number.

    A block says in ``setting_errors`` which of its settings do not fit together; a table that
    inherits several blocks gathers what all of them say.
    """

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        coerce_numbers_to_str=True,
        defer_build=True,  # a command uses a few of them only
    )

    def setting_errors(self) -> Iterator[SettingError]:
        """What does not fit together in this block alone."""
        yield from ()

    @model_validator(mode="before")
    @classmethod
    def _keep_truth_from_numbers(cls, values: Any) -> Any:
        """Python counts true as 1, so that flip=true would mirror every image."""
        if not isinstance(values, Mapping):
            return values
        numeric = {
            name for name, field in cls.model_fields.items() if _is_numeric(field.annotation)
        }
        return {
            name: _no_truth(value) if name in numeric else value for name, value in values.items()
        }

    @field_validator("*", mode="after")
    @classmethod
    def _fits_a_word(cls, value: Any) -> Any:
        if any(isinstance(v, int) and abs(v) >= _WORD for v in _flat(value)):
            raise ValueError("a whole number of at most 18 digits")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Strict:
        blocks = [kind for kind in reversed(type(self).__mro__) if "setting_errors" in vars(kind)]
        found = [error for block in blocks for error in vars(block)["setting_errors"](self)]
        if found:
            raise UnfitSettingsError(found)
        return self


def _flat(value: Any) -> list[Any]:
    """A value, or those of a list of any depth; tables check their own."""
    return (
        [v for part in value for v in _flat(part)] if isinstance(value, list | tuple) else [value]
    )


@dataclass(frozen=True)
class _Truth:
    """In the place of true or false, so that a number's check refuses and quotes it as typed."""

    value: bool

    def __str__(self) -> str:
        return "true" if self.value else "false"


def _no_truth(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_no_truth(part) for part in value]
    return _Truth(value) if isinstance(value, bool) else value


def _is_numeric(annotation: Any) -> bool:
    leaves = _leaves(annotation)
    return bool(leaves & {int, float}) and not leaves & {bool, Any}


def _leaves(annotation: Any) -> set[Any]:
    """The plain types that a type is made of."""
    parts = typing.get_args(annotation)
    return {leaf for part in parts for leaf in _leaves(part)} if parts else {annotation}


def _checked_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    for name, value in arguments.items():
        most = LARGEST_DEPTH if name in ("depth", "layers") else LARGEST_COUNT
        for number in _flat(list(value.values()) if isinstance(value, Mapping) else value):
            if isinstance(number, int | float) and not abs(number) <= most:  # nor is NaN
                raise ValueError(f"numbers of at most {most:,}, which {name} is not")
    return arguments


Arguments = Annotated[dict[str, Any], AfterValidator(_checked_arguments)]
"""Arguments for a network of timm's, whose names and types are not known here."""


def expanded(value: Any) -> Any:
    """Text, or a list of it, with ``~/`` written out, which shells do not do behind ``key=``."""
    if isinstance(value, list | tuple):
        return [expanded(part) for part in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value.startswith("~/"):
        return value
    return os.path.expanduser(value)  # noqa: PTH111, Path would drop a slash at the end


def _as_size(value: Any) -> Any:
    """One number means a square."""
    if isinstance(value, list | tuple):
        return value
    if not isinstance(value, int) or isinstance(value, bool):
        wanted = "one whole number or [height, width]"
        raise ValueError(wanted)  # noqa: TRY004 - pydantic wants this type
    return (value, value)


_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def seconds_in(span: str) -> float:
    """Seconds of a span of time; ValueError where it is none."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", span)
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0
    if not 0 < seconds <= LARGEST_RUN:
        raise ValueError("a span of time with its unit, as in 30s, 10m, 2h or 1d")
    return seconds


def _checked_span(span: str) -> str:
    seconds_in(span)
    return span


Span = Annotated[str, AfterValidator(_checked_span)]
"""Of time, as it was written: 30s, 10m, 2h, 1d."""
Text = Annotated[str, BeforeValidator(expanded)]
"""A path or name, also of pathlib."""
Texts = Annotated[str | list[str], BeforeValidator(expanded)]
Size = Annotated[tuple[Side, Side], BeforeValidator(_as_size)]
"""(height, width) in pixels."""

OF_A_MACHINE = "of a machine"
"""Marks a setting, in Annotated, that may differ between the processes of one run."""


@dataclass(frozen=True)
class ByName:
    """Marks a setting, in Annotated, that is one of several tables, told apart by its ``name``.

    The tables are looked up when a value is checked, so that one more may be added by then.
    ``default`` is the name that a table without one has.
    """

    tables: Callable[[], Mapping[str, type[BaseModel]]]
    default: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validate)

    def _validate(self, value: Any) -> BaseModel:
        if isinstance(value, str):
            value = {"name": value}
        elif isinstance(value, BaseModel):
            value = value.model_dump()
        elif not isinstance(value, Mapping):
            wanted = "a method's name, or a table of its settings with its name"
            raise ValueError(wanted)  # noqa: TRY004 - pydantic wants this type
        tables = self.tables()
        name = value.get("name", self.default)
        if not isinstance(name, str) or name not in tables:
            raise PydanticCustomError("unknown_name", "none of these", {"known": sorted(tables)})
        # The errors of the inner table become those of this setting.
        return tables[name].model_validate({"name": name, **value})


def ends_in(*endings: str) -> Callable[[str], str]:
    """A check of the name of a file that is to be written: it says its format."""

    def check(name: str) -> str:
        if PurePath(name).suffix.lower() not in endings:
            raise ValueError(f"the name of a file that ends in {' or '.join(endings)}")
        return name

    return check


_FILES = (
    *(".pt", ".pth", ".ckpt", ".bin", ".h5", ".safetensors", ".npz", ".onnx"),
    *(".zip", ".tar", ".json", ".yaml"),
)


def is_folder_name(name: str) -> str:
    """A check of the name of a folder that is to be written: it does not look like a file's."""
    ending = PurePath(name).suffix.lower()
    if ending in _FILES:
        raise ValueError(f"the name of a folder, which does not end in {ending}")
    return name


FolderName = Annotated[Text, AfterValidator(is_folder_name)]

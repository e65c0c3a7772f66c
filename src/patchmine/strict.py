"""What every table of settings refuses, whatever its fields are: numbers that no setting means."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

LARGEST_SIDE = 8_192  # pixels: a position table for patches of 16 then has 262,144 rows
LARGEST_COUNT = 65_536
LARGEST_DEPTH = 256
LARGEST_BATCH = 2**20
LARGEST_RUN = 10**9
MOST_WORKERS = 1_024
_WORD = 2**63  # beyond it no array and no random generator holds a whole number

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


class Strict(BaseModel):
    """Settings without unknown names, NaN, infinity, numbers beyond 64 bits, or true in the place
    of a number.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

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


def _flat(value: Any) -> list[Any]:
    """A value, or those of a list of any depth; tables check their own."""
    return (
        [v for part in value for v in _flat(part)] if isinstance(value, list | tuple) else [value]
    )


@dataclass(frozen=True)
class _Truth:
    """In the place of true or false, so that what wants a number refuses it and quotes it as it was
    typed.
    """

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


def ends_in(*endings: str) -> Callable[[str], str]:
    """A check of the name of a file that is to be written: it says its format."""

    def check(name: str) -> str:
        if PurePath(name).suffix.lower() not in endings:
            raise ValueError(f"the name of a file that ends in {' or '.join(endings)}")
        return name

    return check


_FILES = (
    ".onnx",
    ".pt",
    ".pth",
    ".ckpt",
    ".bin",
    ".h5",
    ".safetensors",
    ".npz",
    ".zip",
    ".tar",
    ".json",
    ".yaml",
)


def is_folder_name(name: str) -> str:
    """A check of the name of a folder that is to be written: it does not look like that of a file."""
    ending = PurePath(name).suffix.lower()
    if ending == ".onnx":
        raise ValueError(
            "the name of a folder: ONNX is not written yet, but timm and transformers open the folder"
        )
    if ending in _FILES:
        raise ValueError(f"the name of a folder, which does not end in {ending}")
    return name

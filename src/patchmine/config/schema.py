"""The whole of a run as one typed model, composed of the blocks that its parts own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field

from patchmine.backbones.settings import ModelSettings
from patchmine.data.settings import DataSettings, ViewSettings
from patchmine.evaluate.settings import EvalSettings
from patchmine.methods import METHODS
from patchmine.models.settings import MethodSettings
from patchmine.strict import OF_A_MACHINE, ByName, Positive, SettingError, Strict
from patchmine.train.settings import TrainSettings, fitting_counts


class MethodChoice(Strict):
    """What the network learns from."""

    DECIDES_WEIGHTS: ClassVar[bool] = True

    method: Annotated[MethodSettings, ByName(lambda: METHODS, default="mae")] = Field(
        "mae", validate_default=True, description="the method's name and its own settings"
    )


class SizeRow(Strict):
    """Settings that a recipe uses for data sets of at most ``up_to`` images (null: of any size)."""

    up_to: Positive | None
    use: dict[str, Any]


class RunConfig(
    EvalSettings, TrainSettings, MethodChoice, ViewSettings, ModelSettings, DataSettings
):
    """A run, complete and checked.  Its settings are listed from the last block to the first."""

    kind: Literal["pretrain"] = Field("pretrain", description="what the run is for")
    by_size: list[SizeRow] = Field(
        [], description="settings by the number of images; see the recipe my-images"
    )

    def setting_errors(self) -> Iterator[SettingError]:
        """What does not fit together between blocks."""
        if self.method.multi_crop and self.crops.num_local:
            yield from self.unfilled("crops.local_size", [self.crops.local_size])
        counts = {name: getattr(self, name) for name in ("accumulate", "devices", "num_nodes")}
        parts, batch, repeats = math.prod(counts.values()), self.batch_size, self.clip.repeats
        if batch % parts:
            shares = " * ".join(f"{name}={count}" for name, count in counts.items())
            fits = fitting_counts(batch, self.accumulate * self.num_nodes, self.devices)
            near = max(parts, round(batch / parts) * parts)
            remedy = f"try batch_size={near}"
            if self.devices > 1 and fits:  # before the batch size, which a resumed run must keep
                remedy = f"try devices={fits}, or in a new run batch_size={near}"
            must = f"must be a multiple of {parts} ({shares}): {remedy}"
            yield SettingError("batch_size", f"given {batch}; {must}")
        if repeats > 1 and batch % (parts * repeats):
            near = max(1, round(batch / (parts * repeats))) * parts * repeats
            must = (
                f"batch_size={batch} must be a multiple of {parts * repeats}: try batch_size={near}"
            )
            text = f"given {repeats}; the clips of one video stay together, so {must}"
            yield SettingError("clip.repeats", text)

    def to_yaml(self) -> str:
        """The settings, fully resolved, as a file that `patchmine pretrain` accepts."""
        values = self.model_dump(mode="json", exclude=set() if self.by_size else {"by_size"})
        running = {name: values.pop(name) for name in names_of(decide_weights=False)}
        parts = (
            ("What decides the weights.", values),
            ("Where and how the run is made; may change on resume.", running),
        )
        return "\n".join(
            f"# {title}\n{yaml.safe_dump(part, sort_keys=False)}" for title, part in parts
        )


def names_of(*, decide_weights: bool) -> list[str]:
    """The settings that decide the weights, which a resumed run must keep; or all others."""
    blocks = [kind for kind in RunConfig.__mro__ if issubclass(kind, Strict)]
    running = {
        name
        for block in blocks
        if vars(block).get("DECIDES_WEIGHTS") is False
        for name in block.model_fields
    }
    both = [name for name in RunConfig.model_fields if name != "by_size"]
    return [name for name in both if (name not in running) is decide_weights]


def names_of_a_machine() -> set[str]:
    """The settings that may differ between the processes of one run."""
    fields = RunConfig.model_fields.items()
    return {name for name, field in fields if OF_A_MACHINE in field.metadata}

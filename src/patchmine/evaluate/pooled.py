"""What protocols on pooled features share: one feature vector an item, read once, then measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from patchmine.errors import Say
from patchmine.evaluate.evaluated import Evaluated
from patchmine.evaluate.features import FeatureLoop, Features, Reader, device_of
from patchmine.evaluate.labelled import Part
from patchmine.evaluate.measure import (
    Result,
    choose_pooling,
    file_result,
    models_of,
    numbers_of,
    prepared,
    target_of,
)
from patchmine.evaluate.settings import FiledSettings
from patchmine.models.onednn import fast_linear


class PooledSettings(Protocol):
    """Settings that name a pooling."""

    pooling: str


class PooledReader(Reader):
    """A reader of one pooling, (B, D): a table of a million items holds nothing else."""

    def __init__(self, evaluated: Evaluated, pooling: str) -> None:
        super().__init__(evaluated)
        self.pooling = pooling

    def __call__(self, images: Tensor) -> Tensor:
        """(B, D) float32."""
        return self.pooled(super().__call__(images), self.choose(self.pooling))


@dataclass(frozen=True)
class Items:
    """What a protocol reads."""

    parts: Mapping[str, Part]  # by what they are called
    how: str  # where they come from, for people
    classes: int | None = None


def measure_pooled(
    settings: FiledSettings,
    protocol: str,
    evaluated: Evaluated,
    items: Items,
    measured: Callable[..., Result],
    say: Say,
    *,
    pooling: str,
    notes: Sequence[str] = (),
) -> Result:
    """The result of ``measured`` on the features of every part, and on those of the baselines."""
    start, noun = time.monotonic(), evaluated.item.noun
    models = models_of(settings, evaluated, say).items()
    readers = {name: PooledReader(model, pooling) for name, model in models}
    choose_pooling(readers, pooling, say)
    for line in filter(None, (evaluated.told, items.how)):
        say(line)
    loop = FeatureLoop(readers, settings, device_of(settings), say)
    with fast_linear():
        tables = {name: loop.table(part, f"{name} {noun}s") for name, part in items.parts.items()}
        reading = time.monotonic() - start
        found: dict[str, Result] = {}
        for name in readers:
            # Taken out of the tables, so that the features of one model are gone before the next.
            found[name] = measured(*(table.pop(name) for table in tables.values()))
            numbers = (f"{key} {value:.3f}" for key, value in numbers_of(found[name]).items())
            if name:
                say(f"baseline {name}, {protocol}: {', '.join(numbers)}")
    own, baselines = found.pop(""), found
    counts: dict[str, Any] = {name: len(part) for name, part in items.parts.items()}
    if items.classes is not None:
        counts["classes"] = items.classes
    chosen = readers[""].choose(pooling)
    result = {
        "name": settings.name or protocol,
        "protocol": protocol,
        **own,
        **({"baselines": baselines} if baselines else {}),
        "target": target_of(settings, evaluated),
        "images": {"how": items.how, **counts, "pooling": chosen, **prepared(evaluated)},
        "seconds_spent": {"features": round(reading, 1), "all": round(time.monotonic() - start, 1)},
        "notes": [*filter(None, [evaluated.note]), *own.get("notes", ()), *notes],
    }
    file_result(result, evaluated)
    return result


def unit_rows(features: Features) -> Tensor:
    """The features (N, D) scaled to length one where they are: no second table."""
    return F.normalize(features.x, dim=1, out=features.x)

"""What the tests of loaders and views share: batches by a few numbers, views by their size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import Process, train_batches
from patchmine.data.settings import Clip, ViewSettings
from patchmine.data.sources.contract import Source
from patchmine.data.views.images import View
from patchmine.train.settings import MachineSettings, ScheduleSettings
from patchmine.types import Batch


def start(
    source: Source,
    view: View,
    *,
    batch_size: int = 8,
    accumulate: int = 1,
    steps_per_epoch: int = 4,
    start_step: int = 0,
    total_steps: int = 8,
    seed: int = 0,
    workers: int = 0,
    read_timeout: float = 600,
    bad: BadFiles | None = None,
    targets: bool = False,
    **place: Any,
) -> Iterator[Batch]:
    """The batches of two epochs of four steps of eight, or of whatever is asked for."""
    return train_batches(
        source,
        view,
        ScheduleSettings(batch_size=batch_size, accumulate=accumulate),
        MachineSettings(workers=workers, read_timeout=read_timeout),
        Process(**place),
        seed=seed,
        steps=range(start_step, total_steps),
        steps_per_epoch=steps_per_epoch,
        bad=BadFiles(None, 0.05) if bad is None else bad,
        targets=targets,
    )


def seen(height: int, width: int | None = None, **settings: Any) -> ViewSettings:
    """Settings of views of a size."""
    return ViewSettings(image_size=(height, width or height), **settings)


def clips(side: int, frames: int, stride: int, **settings: Any) -> ViewSettings:
    """Settings of clips: never mirrored and resized bilinearly, unless asked otherwise."""
    inner = {
        name: settings.pop(name) for name in ("short", "scales", "repeats") if name in settings
    }
    clip = Clip(frames=frames, stride=stride, tubelet=1, **inner)
    return seen(side, clip=clip, **{"flip": 0, "interpolation": "bilinear", **settings})

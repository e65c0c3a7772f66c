"""The class of every pixel of images without labels, by a run that segments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from patchmine.config.schema import SegmentConfig
from patchmine.data.views.dense import resized_whole
from patchmine.errors import Say, silent
from patchmine.evaluate.asked import AskedImages, asked_run, open_asked_images
from patchmine.evaluate.features import autocast, device_of
from patchmine.evaluate.settings import PredictSettings
from patchmine.evaluate.sliding import ClassMaps
from patchmine.runs.preparing import smallest_side
from patchmine.tasks.segment import Segment

Classes = NDArray[np.integer[Any]]
"""(H, W): uint8, or uint16 where there are more than 256 classes."""


def segmented(settings: PredictSettings, say: Say = silent) -> dict[str, list[Any]]:
    """``file`` and ``classes``, an array (H, W) for each readable image, all of them in memory.

    Raises UserError as `open_map_question` and `MapQuestion.maps` do.
    """
    question = open_map_question(settings, say)
    found: dict[str, list[Any]] = {"file": [], "classes": []}
    for seen in question.maps():
        found["file"].append(question.images.file(seen.index))
        found["classes"].append(seen.classes)
    return found


@dataclass(frozen=True)
class Seen:
    """An image and what was seen in it.

    Args:
        index: its place in the source.
        picture: (C, H, W), as it was read.
        classes: of its pixels.
    """

    index: int
    picture: Tensor
    classes: Classes


@dataclass(frozen=True)
class MapQuestion:
    """A run that segments, and images that it is asked about.

    Args:
        settings: what was asked.
        task: the trained network.
        config: the run's settings.
        images: the images.
    """

    settings: PredictSettings
    task: Segment
    config: SegmentConfig
    images: AskedImages

    def maps(self) -> Iterator[Seen]:
        """Every readable image in order, one in memory at a time.

        Raises UserError where nothing, or too little, can be read.
        """
        device, config = device_of(self.settings), self.config
        task = self.task.to(device).eval()
        tell = ClassMaps(task.scores, config, device, partial(autocast, device))
        kind = np.uint8 if len(task.names) <= 256 else np.uint16
        for batch in self.images.read("class maps"):
            (picture,) = batch.views[0]
            found = tell(resized_whole(picture, config), (picture.shape[-2], picture.shape[-1]))
            yield Seen(int(batch.index), picture, found.cpu().numpy().astype(kind))


def open_map_question(settings: PredictSettings, say: Say = silent) -> MapQuestion:
    """The run and the images that the settings name.

    Raises UserError for a run of another kind, and for settings that do not fit it.
    """
    run, config = asked_run(settings, SegmentConfig)
    task = run.segmenter()
    return MapQuestion(
        settings, task, config, open_asked_images(settings, config, smallest_side(task), say)
    )

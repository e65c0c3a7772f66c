"""The class of every pixel of images without labels, by a run that segments."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchmine.backbones.family import family_of
from patchmine.config.resolve import of_kind
from patchmine.config.schema import SegmentConfig
from patchmine.data.badfiles import BadFiles
from patchmine.data.items import IMAGE
from patchmine.data.loader import plain_batches
from patchmine.data.sources.contract import IMAGE_SUFFIXES, Source
from patchmine.data.sources.source import KINDS
from patchmine.data.views.dense import WholeView, resized_whole
from patchmine.data.views.normalise import normalise
from patchmine.errors import Say, UserError, shown_name, silent, whole_name
from patchmine.evaluate.asked import are_files, judge_broken, open_asked
from patchmine.evaluate.features import autocast, device_of
from patchmine.evaluate.progress import progress
from patchmine.evaluate.settings import PredictSettings
from patchmine.evaluate.sliding import ClassMaps
from patchmine.runs.folder import RunFolder
from patchmine.runs.known import is_run
from patchmine.tasks.segment import Segment

Classes = NDArray[np.integer[Any]]
"""(H, W): uint8, or uint16 where there are more than 256 classes."""


def is_segmenter(path: str) -> bool:
    """Whether a run says the class of pixels rather than of images."""
    return is_run(path) and isinstance(RunFolder(path).config, SegmentConfig)


def segmented(settings: PredictSettings, say: Say = silent) -> dict[str, list[Any]]:
    """``file`` and ``classes``, an array (H, W) for each readable image, all of them in memory.

    Raises UserError as `open_map_question` and `MapQuestion.maps` do.
    """
    question = open_map_question(settings, say)
    found: dict[str, list[Any]] = {"file": [], "classes": []}
    for seen in question.maps():
        found["file"].append(question.file(seen.index))
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
        source: the images.
        by_path: whether they are named by their whole path, not by their place in the source.
        say: hears how far it is, and of what is broken.
    """

    settings: PredictSettings
    task: Segment
    config: SegmentConfig
    source: Source
    by_path: bool
    say: Say

    def maps(self) -> Iterator[Seen]:
        """Every readable image in order, one in memory at a time.

        Raises UserError where nothing, or too little, can be read.
        """
        device, config, done = device_of(self.settings), self.config, 0
        task = self.task.to(device).eval()
        tell = ClassMaps(task.scores, config, len(task.names), partial(autocast, device))
        mean, std = torch.tensor(config.mean), torch.tensor(config.std)
        kind = np.uint8 if len(task.names) <= 256 else np.uint16
        with progress("class maps", len(self.source), self.say) as tick:
            for batch in self._loaded():
                (picture,) = batch.views[0]
                seen = batch.with_views([resized_whole(picture[None], config)])
                (image,) = normalise(seen, mean, std, device).views[0]
                found = tell(image, (picture.shape[-2], picture.shape[-1]))
                yield Seen(int(batch.index), picture, found.cpu().numpy().astype(kind))
                done += 1
                tick(1)
        count, limit = len(self.source), self.settings.max_bad_share
        judge_broken(self.source, count, done, IMAGE.noun, limit, "class maps", self.say)

    def _loaded(self) -> Iterator[Any]:
        """Images at their own size."""
        wanted, spare = self.settings.workers, (os.cpu_count() or 1) - 1  # one core for the network
        return plain_batches(
            self.source,
            WholeView(
                self.config.model_copy(update={"short_side": None}),
                family_of(self.task.encoder).smallest_side(self.task.encoder),
            ),
            batch_size=1,
            workers=min(8, spare) if wanted == "auto" else wanted,
            bad=BadFiles(None, 1.0),  # judged at the end: in order, they may come in a row
        )

    def file(self, place: int) -> str:
        """The name of an image by which a person finds it, as one line."""
        return whole_name(self.source.path(place) if self.by_path else self.source.key(place))

    def map_names(self) -> list[str]:
        """For each image the name of its map: its path below the data, which ends in .png.

        Images that do not lie below one folder are named from the deepest folder that holds all.

        Raises:
            UserError: two images have one name.
        """
        count = range(len(self.source))
        keys = [os.path.normpath(self.source.key(place)) for place in count]
        outside = (key.startswith("..") or os.path.isabs(key) for key in keys)  # noqa: PTH117
        if self.by_path or any(outside) or _are_files(self.settings.data):
            paths = [os.path.abspath(self.source.path(place)) for place in count]  # noqa: PTH100
            root = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
            keys = [os.path.relpath(path, root) for path in paths]
        names: dict[str, int] = {}
        for place, key in enumerate(keys):
            stem, ending = os.path.splitext(key)  # noqa: PTH122
            name = f"{stem if ending.lower() in IMAGE_SUFFIXES else key}.png"
            if name in names:
                both = " and ".join(shown_name(self.file(each)) for each in (names[name], place))
                raise UserError(
                    f"{both} would both become {shown_name(name)}: give one of them another name, "
                    "or ask about them one after the other"
                )
            names[name] = place
        return list(names)


def open_map_question(settings: PredictSettings, say: Say = silent) -> MapQuestion:
    """The run and the images that the settings name.

    Raises UserError for a run of another kind, and for settings that do not fit it.
    """
    run = RunFolder(settings.run)
    name = shown_name(run.path)
    usual = {"top": 1, "all": False, "segments": 1, "crops": 1}
    for asked, value in usual.items():
        if (given := getattr(settings, asked)) not in (None, value):
            raise UserError(
                f"{asked}={str(given).lower()} is for classes of whole images or videos, but "
                f"{name} segments: leave it out"
            )
    config = of_kind(run.whole_config, SegmentConfig)
    if "batch_size" in settings.model_fields_set:
        config = config.model_copy(update={"eval_batch": settings.batch_size})
    source = open_asked(settings.data, IMAGE)
    for note in source.notes:
        say(note)
    several = isinstance(settings.data, list) and len(settings.data) > 1
    return MapQuestion(settings, run.segmenter(), config, source, several, say)


def _are_files(data: str | list[str]) -> bool:
    return are_files([data] if isinstance(data, str) else data, KINDS[IMAGE.noun])

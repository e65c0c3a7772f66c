"""The settings that a data set would take, by its sizes, channels and statistics."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patchmine.data.inspecting.findings import Tally
from patchmine.data.settings import IMAGENET_MEAN, IMAGENET_STD
from patchmine.data.sources.combine import DatasetSource, Joined
from patchmine.data.sources.contract import Source
from patchmine.errors import shown_name

_USUAL_SIZE, _USUAL_PATCH = 224, 16  # of the recipe my-images
# Shorter sides up to so many pixels take patches of so many, that a picture has 64 or more of them.
_SMALL = ((48, 4), (112, 8))
_FEW_COLOURED = 0.05  # share of images in colour up to which all are taken as grey
# Statistics are given where they are so far from ImageNet's: differences of means, quotients of
# deviations.
_FAR, _NARROW, _WIDE = 0.15, 0.6, 1.6


@dataclass(frozen=True)
class Proposal:
    """What differs from the recipe my-images; None or its own value where nothing does.

    ``statistics``: mean and std, one number a channel.
    """

    channels: int
    image_size: int
    patch_size: int | None
    statistics: tuple[list[float], list[float]] | None

    @property
    def smallest_side(self) -> int:
        """Pixels under which an image counts as broken."""
        return self.patch_size or _USUAL_PATCH

    def words(self) -> list[str]:
        """As settings on the command line."""
        words = []
        if self.image_size != _USUAL_SIZE:
            words.append(f"image_size={self.image_size}")
        if self.patch_size is not None:
            words.append(f"patch_size={self.patch_size}")
        if self.channels != 3:
            words.append(f"channels={self.channels}")
        return words + self.statistics_words()

    def statistics_words(self) -> list[str]:
        """Mean and std, where they are given."""
        named = zip(("mean", "std"), self.statistics or (), strict=False)
        return [f"{name}=[{','.join(f'{x:.4g}' for x in values)}]" for name, values in named]


def propose(tally: Tally) -> Proposal:
    """The settings for items that were read."""
    channels = _channels(tally)
    statistics = _statistics(tally) if channels == 3 else None
    if statistics is not None and not _is_far(*statistics):
        statistics = None
    shorter = int(np.median([min(size) for size in tally.sizes.elements()]))
    if shorter >= _USUAL_SIZE:
        return Proposal(channels, _USUAL_SIZE, None, statistics)
    patch = next((patch for most, patch in _SMALL if shorter < most), _USUAL_PATCH)
    size = max(patch * 4, shorter // patch * patch)
    own_patch = None if patch == _USUAL_PATCH else patch
    return Proposal(channels, size, own_patch, statistics)


def _channels(tally: Tally) -> int:
    """1 or 3 where most of the images are read with these, else what most of the others have."""
    if 2 * tally.misfits.total() > len(tally):
        return tally.misfits.most_common(1)[0][0]
    return 1 if tally.in_colour <= _FEW_COLOURED * len(tally) else 3


def _statistics(tally: Tally) -> tuple[list[float], list[float]]:
    """Mean and std of what ``channels=3`` makes of images: grey is repeated, alpha dropped."""
    sums = np.zeros((3, 3))
    for channels, moments in tally.moments.items():
        if not tally.misfits[channels]:
            sums += moments[:, :3] if channels >= 3 else moments[:, :1]
    mean = sums[1] / sums[0]
    std = np.sqrt(np.maximum(sums[2] / sums[0] - np.square(mean), 0))
    return mean.tolist(), np.where(std > 1e-4, std, 1.0).tolist()  # as `data_statistics` does


def _is_far(mean: list[float], std: list[float]) -> bool:
    gap = np.abs(np.subtract(mean, IMAGENET_MEAN))
    ratio = np.divide(std, IMAGENET_STD)
    return bool((gap > _FAR).any() or (ratio < _NARROW).any() or (ratio > _WIDE).any())


def command_for(source: Source, proposal: Proposal, data: str | Path | None) -> str:
    """A command to paste, on ``data`` or the source; "" for data that only Python has."""
    parts = source.parts if isinstance(source, Joined) else [source]
    if any(isinstance(part, DatasetSource) for part in parts):
        return ""
    names = [part.name for part in parts]
    if data is None:
        data = f"[{', '.join(names)}]" if len(names) > 1 else names[0]
    words = [f"data={data}", *proposal.words(), "out=runs/mine"]
    return " ".join(["patchmine pretrain my-images", *map(quoted, words)])


def quoted(word: str) -> str:
    """A word of a command line as a shell takes it."""
    return shlex.quote(shown_name(word))

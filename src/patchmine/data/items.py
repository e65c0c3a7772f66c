"""What an item of the data is, an image or a clip of a video: how it is opened and viewed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from patchmine.data.decoding.decode import decode
from patchmine.data.settings import InputSettings, SupervisedSettings, ViewSettings
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import decoder_of, open_source
from patchmine.data.views.clips import LabelledClips, PlainClips, TrainClips, middle_frame
from patchmine.data.views.images import MultiCropView, PlainView, TrainView, View
from patchmine.data.views.supervised import SupervisedClips, SupervisedView


@dataclass(frozen=True)
class Item:
    """One kind of item, for everything that must not ask which kind it is.

    ``noun``: for messages.  ``open(spec, cache_dir=...)``: a source of such items.
    ``train_view(settings, smallest_side, multi_crop)``, ``supervised_view(settings,
    smallest_side)`` and ``plain_view(settings, crop_pct)``: what becomes of an item in training,
    without and with labels, and where nothing is random (``crop_pct=None``: all of it, squashed).
    ``pixels(raw, channels, max_pixels)``: (C, H, W) that stands for an item in statistics.
    ``samples(settings)``: samples that one item gives in an epoch.  ``describe(settings)``: what
    one item is, before its size, for messages.  ``notes(source)``: what a user should know of a
    source.
    """

    noun: str
    open: Callable[..., Source]
    train_view: Callable[[ViewSettings, int, bool], View]
    supervised_view: Callable[[SupervisedSettings, int], View]
    plain_view: Callable[[InputSettings, float | None], View]
    pixels: Callable[[Any, int, int], Tensor]
    samples: Callable[[InputSettings], int]
    describe: Callable[[InputSettings], str]
    notes: Callable[[Source], list[str]]

    def keeping(self, remote_gb: float) -> Item:
        """The same, which opens with so much room for what is read from addresses."""
        return replace(self, open=partial(self.open, remote_gb=remote_gb))


def _train_image(settings: ViewSettings, smallest_side: int, multi_crop: bool) -> View:
    return (MultiCropView if multi_crop else TrainView)(settings, smallest_side)


def _plain_image(settings: InputSettings, crop_pct: float | None) -> View:
    # Squashed images are those that AMT's maps are made of, which its authors resize bilinearly
    # (torchvision's default, main_pretrain.py).
    return PlainView(settings, crop_pct, "bilinear" if crop_pct is None else "bicubic")


def _notes_of_videos(source: Source) -> list[str]:
    decoder = decoder_of(source)
    found = (
        f"Videos are decoded by {decoder}."
        if decoder
        else "Frames are read as they are: no video to decode."
    )
    return [found, *source.notes]


IMAGE = Item(
    noun="image",
    open=partial(open_source, kind="image"),
    train_view=_train_image,
    supervised_view=lambda settings, side: SupervisedView(settings, TrainView(settings, side)),
    plain_view=_plain_image,
    pixels=decode,
    samples=lambda settings: 1,
    describe=lambda settings: "",
    notes=lambda source: list(source.notes),
)
CLIP = Item(
    noun="video",
    open=partial(open_source, kind="video"),
    train_view=lambda settings, smallest_side, multi_crop: TrainClips(settings, smallest_side),
    supervised_view=lambda settings, side: SupervisedClips(settings, LabelledClips(settings, side)),
    plain_view=PlainClips,
    pixels=middle_frame,
    samples=lambda settings: settings.clip.repeats,
    describe=lambda settings: f"{settings.clip.frames} frames of ",
    notes=_notes_of_videos,
)

"""Settings of what a network is shown: data, sizes and statistics, crops, clips."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from patchmine.strict import (
    LARGEST_COUNT,
    LARGEST_RUN,
    OF_A_MACHINE,
    Count,
    FolderName,
    Fraction,
    Positive,
    SettingError,
    Side,
    Size,
    Strict,
    Text,
    Texts,
    ends_in,
)

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

MAX_PIXELS = 1 << 27
"""Default of ``max_pixels``: 108 megapixels pass, and decoding them stays below a gigabyte."""

# timm.data.auto_augment.rand_augment_transform, which takes no notice of much that it does not know
_RAND_AUGMENT = re.compile(
    r"rand(-(m\d{1,2}|n[1-9]|p(0|1|0\.\d+)|mstd\d+(\.\d+)?|mmax[1-9]\d?|inc[01]|t(weights|3aw?)))+"
)

LIST_SUFFIXES = (".txt", ".csv", ".tsv")
"""Endings of list files."""

READ_TIMEOUT = 600.0
"""Default of ``read_timeout`` in seconds; network disks have been seen to need minutes."""


REMOTE_GB = 50.0
"""Default of ``remote_gb``."""

RemoteGb = Annotated[
    float,
    Field(
        ge=0,
        le=LARGEST_RUN,
        description="most that parts of remote data (s3://...) may take in the user's cache folder",
    ),
]
"""A setting of every command that reads data; the cache is one, and so is the rule."""


class DataSettings(Strict):
    """Where the data are."""

    DECIDES_WEIGHTS: ClassVar[bool] = True

    data: Annotated[Texts, OF_A_MACHINE] = Field(
        description="give a folder, a list file, tar shards, Parquet files or embedded:photos, as "
        "in data=photos/"
    )
    max_bad_share: Fraction = Field(0.05, description="share of broken images that ends the run")


class Clip(Strict):
    """How a clip is taken from a video; of runs whose ``model`` is a video one."""

    frames: Count = Field(default=16, description="frames of a clip; a multiple of clip.tubelet")
    stride: Count = Field(default=4, description="a clip takes every such frame of the video")
    tubelet: Count = Field(default=2, description="frames that one patch spans")
    repeats: Count = Field(default=1, description="clips from one opening of a video, in one batch")
    short: Literal["hold", "loop", "refuse"] = Field(
        default="hold",
        description="shorter videos: hold the last frame, start again, or leave them out",
    )
    scales: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = Field(
        default=[1.0, 0.875, 0.75, 0.66],
        description="sides of a crop in pre-training, shares of the video's shorter side",
    )

    def setting_errors(self) -> Iterator[SettingError]:
        """Frames that tubelets do not fill."""
        frames, tubelet = self.frames, self.tubelet
        if frames % tubelet:
            near = max(tubelet, round(frames / tubelet) * tubelet)
            must = f"must be a multiple of clip.tubelet={tubelet}: try clip.frames={near}"
            yield SettingError("frames", f"given {frames}; {must}")


class InputSettings(Strict):
    """What an image is when the network sees it: its size, channels and statistics."""

    DECIDES_WEIGHTS: ClassVar[bool] = True

    image_size: Size = Field(
        default=(224, 224), description="pixels, one number or [height, width]"
    )
    channels: Count = Field(default=3, description="channels of the images")
    mean: list[float] | None = Field(
        default=None,
        validate_default=True,
        description="one a channel; null: ImageNet's for 3 channels, else the data's",
    )
    std: list[Annotated[float, Field(gt=0)]] | None = Field(
        default=None, validate_default=True, description="one a channel; null: as for mean"
    )
    max_pixels: Positive = Field(
        default=MAX_PIXELS,
        description="pixels of an image or frame above which it counts as broken, undecoded",
    )
    missing: Literal["fill", "mask"] = Field(
        default="fill",
        description="pixels without data: their channel's mean counts as data; or mask: they, NaN "
        "in arrays and transparent parts stay out of the loss of methods that predict patches",
    )
    clip: Clip = Field(default=Clip(), description="of models that take clips of videos")

    @property
    def wants_known(self) -> bool:
        """Whether it matters where in an image there is data."""
        return self.missing == "mask"

    @field_validator("mean", "std")
    @classmethod
    def _imagenet(cls, value: list[float] | None, info: ValidationInfo) -> list[float] | None:
        if value is None and info.data.get("channels") == 3:
            return IMAGENET_MEAN if info.field_name == "mean" else IMAGENET_STD
        return value

    def setting_errors(self) -> Iterator[SettingError]:
        """Statistics of other channels, or half of them."""
        statistics = {"mean": self.mean, "std": self.std}
        if (self.mean is None) != (self.std is None):
            absent, present = ("mean", "std") if self.mean is None else ("std", "mean")
            yield SettingError(absent, f"given null while {present} is set; give both or neither")
            return
        for name, values in statistics.items():
            if values is not None and len(values) != self.channels:
                must = f"must be one for each of channels={self.channels}"
                yield SettingError(name, f"given {len(values)} numbers; {must}")


def _ranges(**ranges: tuple[float, float]) -> Iterator[SettingError]:
    for name, (low, high) in ranges.items():
        if not 0 < low <= high:
            must = "must be [smallest, largest] with 0 < smallest <= largest"
            yield SettingError(name, f"given [{low}, {high}]; {must}")


class Crops(Strict):
    """Crops of each image, for methods that compare several; ``image_size`` is the global ones'."""

    num_global: Literal[2] = Field(default=2, description="large crops of each image; always 2")
    num_local: int = Field(
        default=8, ge=0, le=LARGEST_COUNT, description="small crops of each image"
    )
    local_size: Side = Field(default=96, description="pixels; a multiple of the model's patch")
    global_scale: tuple[Fraction, Fraction] = Field(
        default=(0.25, 1.0), description="smallest and largest share of the image in a large crop"
    )
    local_scale: tuple[Fraction, Fraction] = Field(
        default=(0.05, 0.25), description="of a small crop"
    )

    def setting_errors(self) -> Iterator[SettingError]:
        """Ranges of shares that are none."""
        yield from _ranges(global_scale=self.global_scale, local_scale=self.local_scale)


class ViewSettings(InputSettings):
    """How crops are taken in training."""

    crop_scale: tuple[Fraction, Fraction] = Field(
        default=(0.2, 1.0), description="smallest and largest share of the image in a crop"
    )
    crop_ratio: tuple[float, float] = Field(
        default=(3 / 4, 4 / 3), description="width / height of crops, from and to"
    )
    flip: Fraction = Field(default=0.5, description="probability of a mirrored crop")
    interpolation: Literal["bicubic", "bilinear"] = Field(
        default="bicubic", description="resizing of crops"
    )
    decode: Literal["exact", "scaled"] = Field(
        default="exact",
        description="scaled: JPEGs at 1/2, 1/4 or 1/8 where a crop stays larger than its view",
    )
    crops: Crops = Field(default=Crops(), description="of methods with several crops of each image")

    def setting_errors(self) -> Iterator[SettingError]:
        """Ranges that are none."""
        yield from _ranges(crop_scale=self.crop_scale, crop_ratio=self.crop_ratio)


class DetectViewSettings(InputSettings):
    """How images with objects are seen in training: large-scale jitter."""

    scale: tuple[float, float] = Field(
        default=(0.1, 2.0),
        description="smallest and largest size of an image in training, as a factor of the size "
        "that just fits image_size",
    )
    flip: Fraction = Field(default=0.5, description="probability of a mirrored image")
    interpolation: Literal["bicubic", "bilinear"] = Field(
        default="bilinear", description="resizing of images"
    )

    def setting_errors(self) -> Iterator[SettingError]:
        """A range that is none."""
        yield from _ranges(scale=self.scale)


class AugmentSettings(Strict):
    """How labelled images are changed in training, beyond their crop: as timm changes them."""

    DECIDES_WEIGHTS: ClassVar[bool] = True

    auto_augment: str | None = Field(
        default=None, description="RandAugment in timm's words, as rand-m9-mstd0.5-inc1; null: none"
    )
    erase_prob: Fraction = Field(
        default=0.0, description="probability that noise fills a rectangle of an image"
    )
    mixup: float = Field(
        default=0.0, ge=0, le=1000, description="alpha of blending pairs of images; 0: never"
    )
    cutmix: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="alpha of exchanging a rectangle between pairs of images; 0: never",
    )
    mix_prob: Fraction = Field(default=1.0, description="share of steps with mixup or cutmix")
    mix_switch_prob: Fraction = Field(
        default=0.5, description="share of cutmix in these, with both mixup and cutmix above 0"
    )

    def setting_errors(self) -> Iterator[SettingError]:
        """Words that are none of RandAugment's."""
        policy = self.auto_augment
        if policy is not None and not _RAND_AUGMENT.fullmatch(policy):
            must = (
                "must be rand- with parts such as m9, n2, p0.5, mstd0.5, mmax10, inc1 or tweights: "
                "try auto_augment=rand-m9-mstd0.5-inc1, or null for no RandAugment"
            )
            yield SettingError("auto_augment", f"given {policy}; {must}")


class SupervisedSettings(ViewSettings, AugmentSettings):
    """How labelled images are seen in training."""

    def setting_errors(self) -> Iterator[SettingError]:
        """Channels that RandAugment has no colours for."""
        if self.auto_augment is not None and self.channels not in (1, 3):
            why = f"RandAugment changes grey and RGB images, not channels={self.channels}"
            text = f"given {self.auto_augment}; {why}: set auto_augment=null"
            yield SettingError("auto_augment", text)


class DenseViewSettings(InputSettings):
    """How images with label maps are seen in training."""

    short_side: Side | None = Field(
        default=None,
        description="pixels that the shorter side of every image is brought to; null: as they are",
    )
    scale: tuple[float, float] = Field(
        default=(0.5, 2.0), description="smallest and largest enlargement before the crop"
    )
    crop_max_share: Fraction = Field(
        default=0.75, gt=0, description="share of a crop that one class may have, in ten tries"
    )
    flip: Fraction = Field(default=0.5, description="probability of a mirrored crop")
    colour_jitter: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None,
        validate_default=True,
        description="strength of changes of brightness, contrast and saturation; null: 0.5 for "
        "3 channels, else 0",
    )
    interpolation: Literal["bicubic", "bilinear"] = Field(
        default="bilinear", description="resizing of images"
    )

    @field_validator("colour_jitter")
    @classmethod
    def _of_colours(cls, value: float | None, info: ValidationInfo) -> float:
        return (0.5 if info.data.get("channels") == 3 else 0.0) if value is None else value

    def setting_errors(self) -> Iterator[SettingError]:
        """A range that is none, and colours that are not there."""
        yield from _ranges(scale=self.scale)
        if self.channels != 3 and self.colour_jitter:
            text = f"given {self.colour_jitter:g}, but channels={self.channels} are no colours: 0"
            yield SettingError("colour_jitter", text)


class InspectSettings(Strict):
    """Look at images before you train, and get advice.

    Decodes a sample.  Reports sizes, channels, mean and std, duplicates, and what is broken; tells
    what to do, and a command to train with.  dedup= writes a list of what to keep, sheet= draws
    what the network will see.

    Example:
        patchmine data inspect photos/ full=true sheet=sheet.png
        patchmine data inspect photos/ dedup=kept.txt
        patchmine data inspect clips/ video=true
    """

    data: Texts = Field(description="name the images first, as in `patchmine data inspect photos/`")
    sample: Positive = Field(1000, description="images that are decoded")
    full: bool = Field(False, description="decode all images")
    video: bool = Field(False, description="these are videos; one frame of each is looked at")
    max_pixels: Positive = Field(MAX_PIXELS, description="pixels above which an image is broken")
    remote_gb: RemoteGb = REMOTE_GB
    dedup: Annotated[Text, AfterValidator(ends_in(*LIST_SUFFIXES))] | None = Field(
        None, description="list to write of all that can be read, of near-duplicates one each"
    )
    sheet: Annotated[Text, AfterValidator(ends_in(".png"))] | None = Field(
        None, description="picture to write of some images and their training crops"
    )


class ShardSettings(Strict):
    """Pack images into tar shards, shrunk if wanted.

    The layout is WebDataset's; data=shards/ reads it.

    Example:
        patchmine data shard photos/ out=shards/ max_side=512
    """

    data: Texts = Field(description="name the images first, as in `patchmine data shard photos/`")
    out: FolderName = Field(description="name the folder to write, as in out=shards/")
    max_side: Count | None = Field(
        None, description="pixels; larger images are shrunk to this longest side"
    )
    shard_mb: Count = Field(256, description="size of a shard, in megabytes")
    missing: Literal["fill", "keep"] = Field(
        "fill",
        description="pixels without data of slices and planes: their mean, or keep: NaN, for runs "
        "with missing=mask; images that miss some are then not shrunk",
    )
    remote_gb: RemoteGb = REMOTE_GB


class TileSettings(Strict):
    """Cut huge images (slides, scenes, scans) into tiles, or list these.

    Each image becomes a folder of tiles; tiles that are nearly all background are left out.  The
    same command again goes on where it was stopped.  A list, out=tiles.csv, takes no room: with
    data=tiles.csv its tiles are read out of the images.

    Example:
        patchmine data tile slides/ out=tiles/ size=512 level=1
        patchmine data tile slides/ out=tiles.csv size=512 level=1
        patchmine data tile scene.tif out=tiles/ size=256 overlap=32 max_empty=0.5
    """

    data: Text = Field(description="name the images first, as in `patchmine data tile slides/`")
    out: FolderName = Field(
        description="name the folder to write, as in out=tiles/, or a list, as in out=tiles.csv"
    )
    size: Side = Field(512, description="pixels of a tile's sides")
    overlap: int = Field(
        0, ge=0, le=LARGEST_COUNT, description="pixels that neighbouring tiles have in common"
    )
    level: int = Field(0, ge=0, le=64, description="of a slide's or TIFF's pyramid; 0: the largest")
    max_empty: Fraction = Field(
        0.9, description="share without data, black or white above which a tile is left out"
    )
    missing: Literal["fill", "keep"] = Field(
        "fill",
        description="pixels without data: the tile's mean, or keep: transparent in PNG, NaN in "
        ".npy, for runs with missing=mask",
    )
    max_pixels: Positive = Field(
        MAX_PIXELS, description="pixels of an image, neither slide nor TIFF, above which it fails"
    )

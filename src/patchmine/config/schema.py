"""The whole of a run as one typed model, composed of the blocks that its parts own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import yaml
from pydantic import Field

from patchmine.backbones.names import reads_clips
from patchmine.backbones.settings import ModelSettings
from patchmine.data.settings import (
    DataSettings,
    DenseViewSettings,
    DetectViewSettings,
    SupervisedSettings,
    ViewSettings,
)
from patchmine.evaluate.settings import EvalSettings
from patchmine.methods import METHODS
from patchmine.models.settings import AdaptSettings, MethodSettings
from patchmine.strict import (
    LARGEST_RUN,
    OF_A_MACHINE,
    BatchSize,
    ByName,
    Positive,
    SettingError,
    Span,
    Strict,
)
from patchmine.tasks.settings import DetectSettings, FinetuneSettings, SegmentSettings
from patchmine.train.settings import TrainSettings, fitting_counts


class SizeRow(Strict):
    """Settings that a recipe uses for data sets of at most ``up_to`` images (null: of any size).

    ``device``: only where a run is computed on such a one; null: on any.  ``smaller``: settings
    beside these for a ``budget`` in which each image would be seen in fewer than ``min_epochs``;
    the first that is quick enough is taken, else the quickest.
    """

    up_to: Positive | None
    device: Literal["cpu", "cuda"] | None = None
    use: dict[str, Any]
    min_epochs: Positive | None = None
    smaller: list[dict[str, Any]] = Field([])

    def setting_errors(self) -> Iterator[SettingError]:
        """Smaller settings for no known reason."""
        if self.smaller and self.min_epochs is None:
            text = "not given; smaller needs it, the epochs below which it is tried, as in 100"
            yield SettingError("min_epochs", text)


class RunConfig(TrainSettings, ModelSettings, DataSettings):
    """What the runs of all kinds have.  Settings are listed from the last block to the first."""

    kind: str = Field(description="what the run is for")
    by_size: list[SizeRow] = Field(
        [], description="settings by the number of images; see the recipe my-images"
    )

    def setting_errors(self) -> Iterator[SettingError]:
        """A batch that cannot be shared out, and a cache that keeps nothing."""
        yield from self._cache_errors()
        if self.missing == "mask" and reads_clips(self.model):
            text = f"given mask, but model={self.model} reads videos, which miss no pixels"
            yield SettingError("missing", f"{text}: choose fill")
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

    def _cache_errors(self) -> Iterator[SettingError]:
        """A cache that could keep nothing."""
        if self.cache is None:
            return
        if getattr(self, "decode", "exact") == "scaled":
            what = "it keeps whole images, and decode=scaled makes none: leave one of them out"
            yield SettingError("cache", f"given {self.cache}; {what}")
        if reads_clips(self.model):
            what = f"it keeps images, and model={self.model} reads videos: leave it out"
            yield SettingError("cache", f"given {self.cache}; {what}")

    def to_yaml(self) -> str:
        """The settings, fully resolved, as a file that `patchmine pretrain` accepts."""
        values = self.model_dump(mode="json", exclude=set() if self.by_size else {"by_size"})
        running = {name: values.pop(name) for name in names_of(type(self), decide_weights=False)}
        parts = (
            ("What decides the weights.", values),
            ("Where and how the run is made; may change on resume.", running),
        )
        return "\n".join(
            f"# {title}\n{yaml.safe_dump(part, sort_keys=False)}" for title, part in parts
        )


class PretrainConfig(EvalSettings, AdaptSettings, RunConfig, ViewSettings):
    """A pre-training run, complete and checked."""

    kind: Literal["pretrain"] = Field("pretrain", description="what the run is for")
    method: Annotated[MethodSettings, ByName(lambda: METHODS, default="mae")] = Field(
        "mae", validate_default=True, description="the method's name and its own settings"
    )
    budget: Span | None = Field(
        None,
        description="time that a new run may take, as in 30s, 10m or 2h; chooses steps, and in "
        "my-images on a CPU the size",
    )

    def setting_errors(self) -> Iterator[SettingError]:
        """Local crops that patches do not fill, an encoder of which nothing is learned, and no
        loss that missing pixels could stay out of.
        """
        if self.missing == "mask" and not self.method.predicts_patches:
            text = f"given mask, but method={self.method.name} predicts no patches, out of whose "
            yield SettingError("missing", f"{text}loss they could stay: choose fill")
        if self.method.multi_crop and self.crops.num_local:
            yield from self.unfilled("crops.local_size", [self.crops.local_size])
        if self.trainable == "none":
            text = "given none, but the encoder is what a run is for: choose last:1, lora:8 or all"
            yield SettingError("trainable", text)
        elif self.trainable != "all" and self.init is None:
            text = "but what stays frozen would be random: name weights by init=FILE, or choose all"
            yield SettingError("trainable", f"given {self.trainable}, {text}")


class FinetuneConfig(FinetuneSettings, RunConfig, SupervisedSettings):
    """A run that fine-tunes a classifier, complete and checked."""

    kind: Literal["classify"] = Field("classify", description="what the run is for")
    epochs: Positive | None = Field(50, description="passes over the data")
    batch_size: BatchSize = Field(64, description="images in one optimizer step, over all devices")
    blr: float = Field(1e-3, gt=0, description="learning rate at batch_size=256; follows the batch")
    warmup_epochs: float = Field(5, ge=0, le=LARGEST_RUN, description="epochs of linear warm-up")
    min_lr: float = Field(1e-6, ge=0, description="learning rate at the end of the cosine")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW's"
    )

    def setting_errors(self) -> Iterator[SettingError]:
        """Rows that have no partner to be mixed with, and mixtures of numbers."""
        parts = 2 * self.clip.repeats * self.accumulate * self.devices * self.num_nodes
        if (self.mixup or self.cutmix) and self.batch_size % parts:
            near = max(parts, round(self.batch_size / parts) * parts)
            must = f"mixup and cutmix need pairs of images: try batch_size={near}"
            yield SettingError("batch_size", f"given {self.batch_size}; {must}")
        if (self.mixup or self.cutmix) and self.loss == "mse":
            name = "mixup" if self.mixup else "cutmix"
            yield SettingError(name, f"given {getattr(self, name):g}; of no use with loss=mse: 0")
        if self.balance and self.loss != "ce":
            text = f"given true; loss={self.loss} has no classes to weigh: leave it out"
            yield SettingError("balance", text)


class SegmentConfig(SegmentSettings, RunConfig, DenseViewSettings):
    """A run that learns the class of every pixel, complete and checked."""

    crop_pct: ClassVar[float] = 1.0  # images are seen whole
    kind: Literal["segment"] = Field("segment", description="what the run is for")
    epochs: Positive | None = Field(50, description="passes over the data")
    batch_size: BatchSize = Field(16, description="images in one optimizer step, over all devices")
    blr: float = Field(
        1.6e-3, gt=0, description="learning rate at batch_size=256; follows the batch"
    )
    warmup_epochs: float = Field(2, ge=0, le=LARGEST_RUN, description="epochs of linear warm-up")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW's"
    )

    @property
    def window_stride(self) -> int:
        """Pixels from window to window in tests."""
        return self.test_stride or max(1, 2 * min(self.image_size) // 3)

    def setting_errors(self) -> Iterator[SettingError]:
        """Windows with gaps between them, and a model that reads no images."""
        stride, (height, width) = self.test_stride, self.image_size
        if stride is not None and stride > min(height, width):
            must = f"must not be above image_size={min(height, width)}: pixels would be left out"
            yield SettingError("test_stride", f"given {stride}; {must}")
        if reads_clips(self.model):
            must = "reads videos, and label maps are of images: choose an image model"
            yield SettingError("model", f"given {self.model}, which {must}")


class DetectConfig(DetectSettings, RunConfig, DetectViewSettings):
    """A run that learns to find objects, complete and checked."""

    crop_pct: ClassVar[float] = 1.0  # images are seen whole
    kind: Literal["detect"] = Field("detect", description="what the run is for")
    epochs: Positive | None = Field(50, description="passes over the data")
    batch_size: BatchSize = Field(8, description="images in one optimizer step, over all devices")
    blr: float = Field(
        3.2e-3, gt=0, description="learning rate at batch_size=256; follows the batch"
    )
    warmup_epochs: float = Field(1, ge=0, le=LARGEST_RUN, description="epochs of linear warm-up")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's; biases and norms have none")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW's"
    )

    def setting_errors(self) -> Iterator[SettingError]:
        """A model that reads no images, and several data sets."""
        if reads_clips(self.model):
            must = "reads videos, and boxes are of images: choose an image model"
            yield SettingError("model", f"given {self.model}, which {must}")
        for name in ("data", "val", "test"):
            if isinstance(given := getattr(self, name), list):
                text = f"given {given}; objects are read from one folder or COCO file: name one"
                yield SettingError(name, text)


AnyConfig: TypeAlias = PretrainConfig | FinetuneConfig | SegmentConfig | DetectConfig
KINDS: dict[str, type[AnyConfig]] = {
    "pretrain": PretrainConfig,
    "classify": FinetuneConfig,
    "segment": SegmentConfig,
    "detect": DetectConfig,
}
"""The settings of each kind of run, as ``kind`` in config.yaml says; absent is "pretrain"."""


def names_of(config: type[RunConfig], *, decide_weights: bool) -> list[str]:
    """The settings that decide the weights, which a resumed run must keep; or all others."""
    blocks = [block for block in config.__mro__ if issubclass(block, Strict)]
    running = {
        name
        for block in blocks
        if vars(block).get("DECIDES_WEIGHTS") is False
        for name in block.model_fields
    }
    both = [name for name in config.model_fields if name != "by_size"]
    return [name for name in both if (name not in running) is decide_weights]


def names_of_a_machine() -> set[str]:
    """The settings that may differ between the processes of one run."""
    fields = [each for config in KINDS.values() for each in config.model_fields.items()]
    return {name for name, field in fields if OF_A_MACHINE in field.metadata}

"""The whole of a run as one typed model; `config.py` makes it from what users give.

`Results` holds what decides the weights; `Running` holds what must not (a resumed run may change
it).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from patchmine.config.explain import CrossMistakesError, Mistake
from patchmine.config.words import did_you_mean, expanded
from patchmine.data.decoding.bounds import MAX_PIXELS
from patchmine.data.workers import READ_TIMEOUT
from patchmine.errors import UserError, shown_name
from patchmine.methods import METHODS
from patchmine.strict import (
    LARGEST_COUNT,
    LARGEST_RUN,
    Arguments,
    BatchSize,
    Count,
    Positive,
    Side,
    Strict,
    Workers,
)
from patchmine.train.step import fitting_counts

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

if TYPE_CHECKING:

    class MethodConfig(BaseModel):
        """What every method's settings have in common."""

        name: str
else:
    MethodConfig = Annotated[
        Union[tuple(method.Config for method in METHODS.values())],  # noqa: UP007 - built from the table of methods
        Field(discriminator="name"),
    ]


def _as_text(value: Any) -> Any:
    """Paths as text, one or a list of them, with ``~/`` written out."""
    if isinstance(value, list | tuple):
        return [_as_text(part) for part in value]
    return expanded(os.fspath(value) if isinstance(value, os.PathLike) else value)


def _as_size(value: Any) -> Any:
    """One number means a square."""
    if isinstance(value, list | tuple):
        return value
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("one whole number or [height, width]")  # noqa: TRY004 - pydantic wants this type
    return (value, value)


def _as_method(value: Any) -> Any:
    """``"hpm"`` means HPM as published; a table without a name is MAE's, the default method."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, BaseModel):
        return value.model_dump()
    if not isinstance(value, Mapping):
        raise ValueError("a method's name, or a table of its settings with its name")  # noqa: TRY004 - pydantic wants this type
    return {"name": "mae", **value}


Text = Annotated[str, BeforeValidator(_as_text)]
Size = Annotated[tuple[Side, Side], BeforeValidator(_as_size)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Settings(Strict):
    model_config = ConfigDict(frozen=True, coerce_numbers_to_str=True)


class Crops(_Settings):
    """Crops of each image, for methods that compare several; ``image_size`` is the size of the
    global ones.
    """

    num_global: int = Field(default=2, description="large crops of each image; always 2")
    num_local: int = Field(
        default=8, ge=0, le=LARGEST_COUNT, description="small crops of each image"
    )
    local_size: Side = Field(default=96, description="pixels; a multiple of the model's patch")
    global_scale: tuple[Fraction, Fraction] = Field(
        default=(0.25, 1.0), description="smallest and largest share of the image in a large crop"
    )
    local_scale: tuple[Fraction, Fraction] = Field(
        default=(0.05, 0.25), description="the same of a small crop"
    )


class Clip(_Settings):
    """How a clip is taken from a video; of runs whose ``model`` is a video one."""

    frames: Count = Field(default=16, description="frames of a clip; a multiple of clip.tubelet")
    stride: Count = Field(default=4, description="a clip takes every such frame of the video")
    tubelet: Count = Field(default=2, description="frames that one patch spans")
    repeats: Count = Field(
        default=1, description="clips that one opening of a video gives, all in one batch"
    )
    short: Literal["hold", "loop", "refuse"] = Field(
        default="hold",
        description="a video shorter than the clip: repeat its last frame, start again, or leave it out",
    )
    scales: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = Field(
        default=[1.0, 0.875, 0.75, 0.66],
        description="sides of a crop, shares of the shorter side of the video",
    )


class Results(_Settings):
    """What decides the weights.  A resumed run must keep it."""

    data: Annotated[str | list[str], BeforeValidator(_as_text)] = Field(
        description="give a folder, a list file, tar shards or embedded:photos, as in data=photos/"
    )
    model: str = Field(
        "vit_small_patch16_224",
        description="a plain vision transformer or ResNet of timm's, or a video model",
    )
    model_args: Arguments = Field(
        {}, description="more arguments for timm, such as depth, embed_dim, num_heads"
    )
    method: Annotated[MethodConfig, BeforeValidator(_as_method)] = Field(
        "mae", validate_default=True, description="the method's name and its own settings"
    )
    image_size: Size = Field((224, 224), description="pixels, one number or [height, width]")
    patch_size: Side | None = Field(None, description="pixels; null: the model's own")
    channels: Count = Field(3, description="channels of the images")
    mean: list[float] | None = Field(
        None,
        validate_default=True,
        description="one a channel; null: ImageNet's for 3 channels, else the data's",
    )
    std: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, validate_default=True, description="one a channel; null: as for mean"
    )
    epochs: Positive | None = Field(100, description="passes over the data")
    steps: Positive | None = Field(
        None, description="exact number of optimizer steps; overrules epochs"
    )
    batch_size: BatchSize = Field(256, description="images in one optimizer step, over all devices")
    accumulate: Count = Field(
        1, description="parts that a batch is cut into, one after the other, to save memory"
    )
    blr: float = Field(
        1.5e-4, gt=0, description="learning rate for 256 images; the rate is blr * batch_size / 256"
    )
    warmup_epochs: float = Field(10, ge=0, le=LARGEST_RUN, description="epochs of linear warm-up")
    warmup_lr: float = Field(0, ge=0, description="learning rate at step 0")
    warmup_prefix: bool = Field(
        True,
        description="the cosine begins after the warm-up; false: at step 0, as timm's does, its beginning covered",
    )
    lr_schedule: Literal["cosine", "multi_step", "constant"] = Field(
        "cosine", description="how the learning rate goes on after the warm-up"
    )
    min_lr: float = Field(0, ge=0, description="learning rate at the end of the cosine")
    lr_milestones: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [],
        description="multi_step: shares of the run after which the rate is multiplied by lr_gamma, as in [0.875]",
    )
    lr_gamma: float = Field(0.1, gt=0, le=1, description="multi_step: that factor")
    weight_decay: float = Field(0.05, ge=0, description="AdamW's; biases and norms have none")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="AdamW's"
    )
    seed: int = Field(0, ge=0, description="decides initial weights, order, crops and masks")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 on a GPU that has it, else fp32"
    )
    crop_scale: tuple[Fraction, Fraction] = Field(
        (0.2, 1.0), description="smallest and largest share of the image in a crop"
    )
    crop_ratio: tuple[float, float] = Field(
        (3 / 4, 4 / 3), description="narrowest and widest crop, width / height"
    )
    flip: Fraction = Field(0.5, description="probability of a mirrored crop")
    interpolation: Literal["bicubic", "bilinear"] = Field(
        "bicubic", description="how crops are resized"
    )
    crops: Crops = Field(Crops(), description="of methods with several crops of each image")
    clip: Clip = Field(Clip(), description="of video models, which take clips instead of images")
    max_bad_share: Fraction = Field(
        0.05, description="share of broken images above which the run stops"
    )
    max_pixels: Positive = Field(
        MAX_PIXELS,
        description="pixels of an image or frame above which it counts as broken, undecoded",
    )
    init: Text | None = Field(None, description="checkpoint, run or export to start from")

    @field_validator("mean", "std")
    @classmethod
    def _imagenet(cls, value: list[float] | None, info: ValidationInfo) -> list[float] | None:
        if value is None and info.data.get("channels") == 3:
            return IMAGENET_MEAN if info.field_name == "mean" else IMAGENET_STD
        return value


class Running(_Settings):
    """Where and how a run is made.  None of it changes the weights; any of it may change on resume."""

    out: Text | None = Field(None, description="folder of the run")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda where there is one"
    )
    devices: Count = Field(1, description="processes on each node, one for each GPU")
    num_nodes: Count = Field(1, description="machines")
    workers: Workers = Field("auto", description="processes that read images")
    read_timeout: float = Field(
        READ_TIMEOUT,
        ge=0,
        le=LARGEST_RUN,
        description="seconds after which reading one image is given up; 0: never",
    )
    compile: bool = Field(False, description="compile the model's blocks")
    checkpoint_every: Positive | None = Field(
        None, description="steps; null: once an epoch, 100 steps apart or more"
    )
    keep_checkpoints: Positive = Field(3, description="newest checkpoints that are kept")
    eval_every: int = Field(
        0, ge=0, le=LARGEST_RUN, description="epochs between kNN evaluations; 0: none"
    )
    eval_data: Text | None = Field(None, description="labelled images for that evaluation")
    eval_test: Text | None = Field(
        None, description="labelled images to test on; null: a part of eval_data"
    )
    crop_pct: float = Field(
        0.875, gt=0, le=1, description="centre crop at evaluation, share of the shorter side"
    )
    log_every: Positive = Field(10, description="steps")
    sample_every: Positive | None = Field(
        None, description="steps between pictures; null: ten times in the run"
    )
    tensorboard: bool = Field(True, description="write TensorBoard events too")
    wandb: str | None = Field(None, description="project on Weights & Biases to log to")


class SizeRow(_Settings):
    """Settings that a recipe uses for data sets of at most ``up_to`` images (null: of any size)."""

    up_to: Positive | None
    use: dict[str, Any]


class RunConfig(Running, Results):
    """A run, complete and checked."""

    by_size: list[SizeRow] = Field(
        [], description="settings by the number of images; see the recipe my-images"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        checks = (
            *(_check_length, _check_schedule, _check_statistics, _check_patches, _check_batch),
            *(_check_ranges, _check_crops, _check_clip, _check_evaluation),
        )
        mistakes = [mistake for check in checks for mistake in check(self)]
        if mistakes:
            raise CrossMistakesError(mistakes)
        return self

    def to_yaml(self) -> str:
        """The settings, fully resolved, as a file that `patchmine pretrain` accepts."""
        values = self.model_dump(mode="json", exclude=set() if self.by_size else {"by_size"})
        running = {name: values.pop(name) for name in Running.model_fields}
        parts = (
            ("What decides the weights.", values),
            ("Where and how the run is made; may change on resume.", running),
        )
        return "\n".join(
            f"# {title}\n{yaml.safe_dump(part, sort_keys=False)}" for title, part in parts
        )


def _check_length(config: RunConfig) -> list[Mistake]:
    if config.epochs is None and config.steps is None:
        return [
            Mistake("epochs", "given null, and no steps either; give one of them, as in epochs=100")
        ]
    return []


def _check_schedule(config: RunConfig) -> list[Mistake]:
    """A setting that the chosen schedule does not read would be passed over in silence."""
    kind, milestones = config.lr_schedule, config.lr_milestones
    mistakes = []
    if kind == "multi_step" and not milestones:
        mistakes.append(
            Mistake("lr_milestones", "not given; lr_schedule=multi_step needs it, as in [0.875]")
        )
    if kind != "multi_step" and milestones:
        text = f"given {milestones}; of no use with lr_schedule={kind}: set lr_schedule=multi_step, or leave it out"
        mistakes.append(Mistake("lr_milestones", text))
    if milestones != sorted(set(milestones)):
        text = f"given {milestones}; must rise, as in {sorted(set(milestones))}"
        mistakes.append(Mistake("lr_milestones", text))
    peak = config.blr * config.batch_size / 256
    if config.warmup_lr > peak:
        text = f"given {config.warmup_lr:g}; must not be above the highest rate, blr * batch_size / 256 = {peak:g}"
        mistakes.append(Mistake("warmup_lr", text))
    if kind != "cosine" and config.min_lr:
        text = f"given {config.min_lr:g}; of no use with lr_schedule={kind}: set lr_schedule=cosine, or leave it out"
        mistakes.append(Mistake("min_lr", text))
    return mistakes


def _check_statistics(config: RunConfig) -> list[Mistake]:
    if (config.mean is None) != (config.std is None):
        name = "mean" if config.mean is None else "std"
        return [
            Mistake(
                name,
                f"given null while {'std' if name == 'mean' else 'mean'} is set; give both or neither",
            )
        ]
    return [
        Mistake(
            name, f"given {len(values)} numbers; must be one for each of channels={config.channels}"
        )
        for name, values in (("mean", config.mean), ("std", config.std))
        if values is not None and len(values) != config.channels
    ]


def _check_patches(config: RunConfig) -> list[Mistake]:
    in_name = re.search(r"patch(\d+)", config.model)
    step = config.patch_size or (int(in_name[1]) if in_name else None)
    if step is None or "patch_size" in config.model_args:
        return []
    source = "patch_size" if config.patch_size else f"model {config.model}"
    sides: list[tuple[str, tuple[int, ...]]] = [("image_size", config.image_size)]
    if METHODS[config.method.name].multi_crop and config.crops.num_local:
        sides.append(("crops.local_size", (config.crops.local_size,)))
    mistakes = []
    for name, given in sides:
        if any(side % step for side in given):
            near = [max(step, round(side / step) * step) for side in given]
            size = str(near[0]) if len(set(near)) == 1 else f"[{near[0]},{near[1]}]"
            text = f"given {'x'.join(map(str, given))}; must be a multiple of {step}, the patch of {source}"
            mistakes.append(Mistake(name, f"{text}: try {name}={size}"))
    return mistakes


def _check_batch(config: RunConfig) -> list[Mistake]:
    parts = config.accumulate * config.devices * config.num_nodes
    if config.batch_size % parts == 0:
        return []
    near = max(parts, round(config.batch_size / parts) * parts)
    shares = (
        f"accumulate={config.accumulate} * devices={config.devices} * num_nodes={config.num_nodes}"
    )
    text = f"given {config.batch_size}; must be a multiple of {parts} ({shares}): try batch_size={near}"
    fits = fitting_counts(config.batch_size, config.accumulate * config.num_nodes, config.devices)
    if config.devices > 1 and fits:  # before the batch size, which a resumed run must keep
        text = text.replace("try ", f"try devices={fits}, or in a new run ")
    return [Mistake("batch_size", text)]


def _check_ranges(config: RunConfig) -> list[Mistake]:
    return [
        Mistake(
            name, f"given [{low}, {high}]; must be [smallest, largest] with 0 < smallest <= largest"
        )
        for name, (low, high) in (
            ("crop_scale", config.crop_scale),
            ("crop_ratio", config.crop_ratio),
            ("crops.global_scale", config.crops.global_scale),
            ("crops.local_scale", config.crops.local_scale),
        )
        if not 0 < low <= high
    ]


def _check_crops(config: RunConfig) -> list[Mistake]:
    given = config.crops.num_global
    if given == 2:
        return []
    text = f"given {given}; two global crops are compared with each other, so it must be 2: crops.num_local adds others"
    return [Mistake("crops.num_global", text)]


def _check_clip(config: RunConfig) -> list[Mistake]:
    frames, tubelet, repeats = config.clip.frames, config.clip.tubelet, config.clip.repeats
    mistakes = []
    if frames % tubelet:
        near = max(tubelet, round(frames / tubelet) * tubelet)
        text = (
            f"given {frames}; must be a multiple of clip.tubelet={tubelet}: try clip.frames={near}"
        )
        mistakes.append(Mistake("clip.frames", text))
    parts = config.accumulate * config.devices * config.num_nodes
    if repeats > 1 and config.batch_size % (parts * repeats):
        near = max(1, round(config.batch_size / (parts * repeats))) * parts * repeats
        where = f"the clips of one video stay together, so batch_size={config.batch_size} must be a multiple of"
        text = f"given {repeats}; {where} {parts * repeats}: try batch_size={near}"
        mistakes.append(Mistake("clip.repeats", text))
    return mistakes


def _check_evaluation(config: RunConfig) -> list[Mistake]:
    if config.eval_every and config.eval_data is None:
        text = (
            f"given {config.eval_every}, but eval_data is not set; name a folder of labelled images"
        )
        return [Mistake("eval_every", text)]
    return []


def describe_run() -> list[str]:
    """Every setting of a run, a line each, with its default and its meaning."""
    lines = ["# What decides the weights.", *_describe(Results), ""]
    for name in METHODS:
        lines += [f"# Of method={name}.", *describe_method(name), ""]
    return [*lines, "# Where and how the run is made; may change on resume.", *_describe(Running)]


def describe_method(name: str) -> list[str]:
    """The settings of one method.  Raises UserError for a name that is none."""
    if name not in METHODS:
        near = did_you_mean(name, METHODS) or f"; there are {', '.join(METHODS)}"
        raise UserError(f"No method '{shown_name(name)}'{near}")
    model: type[BaseModel] = getattr(METHODS[name], "Config")  # noqa: B009 - each method has its own
    return [line for line in _describe(model, "method.") if not line.startswith("method.name=")]


def _describe(model: type[BaseModel], prefix: str = "") -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        if isinstance(field.default, _Settings):  # a table, a line for each of its settings
            lines += [
                f"{f'{prefix}{name}.*':<36} {field.description}",
                *_describe(type(field.default), f"{name}."),
            ]
            continue
        default = "" if field.is_required() else _as_word(field.default)
        lines.append(f"{f'{prefix}{name}={default}':<36} {field.description or ''}".rstrip())
    return lines


def _as_word(value: Any) -> str:
    """A default as one would type it."""
    return yaml.safe_dump(
        list(value) if isinstance(value, tuple) else value, default_flow_style=True
    ).split("\n")[0]

"""Settings as keywords of Python functions, for editors that complete them."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal, TypedDict

from pydantic import BaseModel

from patchmine.data.settings import Clip, Crops

Size = int | tuple[int, int]
Name = str | PathLike[str]


class SharedRunningSettings(TypedDict, total=False):
    """Settings of runs of all kinds that change no weights."""

    device: Literal["auto", "cpu", "cuda"]
    devices: int
    num_nodes: int
    workers: int | Literal["auto"]
    read_timeout: float
    cache: Name | None
    cache_gb: float
    remote_gb: float
    compile: bool
    sharding: Literal["ddp", "fsdp", "hybrid"]
    offload: bool
    remat: Literal["none", "blocks"]
    out: Name | None
    resume: Literal["never", "auto"]
    checkpoint_every: int | None
    keep_checkpoints: int
    saving: Literal["blocking", "background"]
    eval_every: int
    log_every: int
    sample_every: int | None
    tensorboard: bool
    wandb: str | None


class SharedRunSettings(SharedRunningSettings, total=False):
    """Settings of runs of all kinds."""

    max_bad_share: float
    image_size: Size
    channels: int
    mean: list[float] | None
    std: list[float] | None
    max_pixels: int
    missing: Literal["fill", "mask"]
    clip: Clip | Mapping[str, Any]
    model: str
    model_args: dict[str, Any]
    patch_size: int | None
    init: Name | None
    flip: float
    interpolation: Literal["bicubic", "bilinear"]
    epochs: int | None
    steps: int | None
    batch_size: int
    accumulate: int
    blr: float
    warmup_epochs: float
    warmup_lr: float
    warmup_prefix: bool
    lr_schedule: Literal["cosine", "linear", "multi_step", "constant"]
    min_lr: float
    lr_milestones: list[float]
    lr_gamma: float
    optimizer: Literal["adamw", "nadamw", "muon"]
    weight_decay: float
    betas: tuple[float, float]
    seed: int
    precision: Literal["auto", "fp32", "bf16"]
    by_size: list[dict[str, Any]]


class CropSettings(TypedDict, total=False):
    """How crops of whole images are taken."""

    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    decode: Literal["exact", "scaled"]
    crops: Crops | Mapping[str, Any]
    crop_pct: float


class HeldOutRunSettings(TypedDict, total=False):
    """Settings of runs that learn labels of any kind."""

    share: float | str
    val: Any  # names of images, or a torch dataset
    val_share: float
    patience: int | None
    test: Any
    eval_batch: int
    classes: list[str]
    trainable: str
    positions: Literal["learned", "frozen"]
    layer_decay: float | None
    drop_path: float
    clip_grad: float | None


class RunningSettings(SharedRunningSettings, total=False):
    """Settings that change no weights, as keywords; `patchmine config schema` explains each."""

    eval_data: Name | None
    eval_test: Name | None
    crop_pct: float
    monitor_images: int
    monitor_data: Name | None
    monitor_every: int | None


class RunSettings(CropSettings, SharedRunSettings, RunningSettings, total=False):
    """The settings of a run, as keywords; `patchmine config schema` explains each."""

    method: str | Mapping[str, Any] | BaseModel
    budget: str | None
    trainable: str
    layer_decay: float | None
    ema_decay: float | None
    freeze_encoder: float


class FinetuneRunSettings(CropSettings, HeldOutRunSettings, SharedRunSettings, total=False):
    """The settings of a run that fine-tunes, as keywords; `patchmine config schema finetune`
    explains each.
    """

    labels: Name | None
    balance: bool
    column: str | None
    loss: Literal["ce", "bce", "mse"]
    test_segments: int
    test_crops: int
    pool: Literal["mean", "cls"]
    head_std: float
    label_smoothing: float
    ema_decay: float | None
    auto_augment: str | None
    erase_prob: float
    mixup: float
    cutmix: float
    mix_prob: float
    mix_switch_prob: float


class SegmentRunSettings(HeldOutRunSettings, SharedRunSettings, total=False):
    """The settings of a run that segments, as keywords; `patchmine config schema segment` explains
    each.
    """

    labels: Name | None
    balance: bool
    ignore_index: int
    skip_bad_objects: bool
    palette: Mapping[str, int | tuple[int, int, int]]
    head: Literal["linear", "upernet", "dpt", "eomt"]
    head_width: int | None
    queries: int | None
    query_blocks: int | None
    aux_weight: float
    dice: float
    focal: float
    short_side: int | None
    scale: tuple[float, float]
    crop_max_share: float
    colour_jitter: float | None
    test_stride: int | None


class DetectRunSettings(HeldOutRunSettings, SharedRunSettings, total=False):
    """The settings of a run that detects, as keywords; `patchmine config schema detect` explains
    each.
    """

    annotations: Name | None
    masks: bool
    skip_bad_objects: bool
    head: Literal["fpn", "vitdet"]
    width: int
    window: int | None
    global_blocks: list[int] | None
    anchor_scale: float
    proposals: int
    samples: int
    scale: tuple[float, float]
    score_threshold: float
    nms: float
    category_ids: list[int]
    usual_size: Size | None

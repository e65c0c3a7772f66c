"""Settings of how something is trained, and of where and how the training runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from patchmine.data.settings import READ_TIMEOUT, REMOTE_GB, RemoteGb
from patchmine.errors import UserError
from patchmine.strict import (
    LARGEST_RUN,
    OF_A_MACHINE,
    BatchSize,
    Count,
    Device,
    Positive,
    SettingError,
    Strict,
    Text,
    Workers,
)

Sharding = Literal["ddp", "fsdp", "hybrid"]
Remat = Literal["none", "blocks"]
OptimizerName = Literal["adamw", "nadamw", "muon"]
Saving = Literal["blocking", "background"]


class ScheduleSettings(Strict):
    """How long, in which batches and at which rates."""

    DECIDES_WEIGHTS: ClassVar[bool] = True

    epochs: Positive | None = Field(100, description="passes over the data")
    steps: Positive | None = Field(None, description="number of optimizer steps; overrules epochs")
    batch_size: BatchSize = Field(256, description="images in one optimizer step, over all devices")
    accumulate: Count = Field(1, description="parts that a batch is cut into to save memory")
    blr: float = Field(
        1.5e-4, gt=0, description="learning rate at batch_size=256; follows the batch"
    )
    warmup_epochs: float = Field(10, ge=0, le=LARGEST_RUN, description="epochs of linear warm-up")
    warmup_lr: float = Field(0, ge=0, description="learning rate at step 0")
    warmup_prefix: bool = Field(
        True, description="cosine or line begins after the warm-up, not at step 0"
    )
    lr_schedule: Literal["cosine", "linear", "multi_step", "constant"] = Field(
        "cosine", description="how the learning rate goes on after the warm-up"
    )
    min_lr: float = Field(0, ge=0, description="learning rate at the end of the cosine or line")
    lr_milestones: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [], description="multi_step: shares of the run after which the rate is cut, as in [0.875]"
    )
    lr_gamma: float = Field(0.1, gt=0, le=1, description="multi_step: factor of the rate there")

    def setting_errors(self) -> Iterator[SettingError]:
        """No length, or a setting that the chosen schedule would pass over in silence."""
        if self.epochs is None and self.steps is None:
            yield SettingError(
                "epochs", "given null, and no steps either; give one, as in epochs=100"
            )
        kind, milestones, rising = (
            self.lr_schedule,
            self.lr_milestones,
            sorted(set(self.lr_milestones)),
        )
        useless = f"of no use with lr_schedule={kind}: set lr_schedule"
        if kind == "multi_step" and not milestones:
            needs = "not given; lr_schedule=multi_step needs it, as in [0.875]"
            yield SettingError("lr_milestones", needs)
        if kind != "multi_step" and milestones:
            text = f"given {milestones}; {useless}=multi_step, or leave it out"
            yield SettingError("lr_milestones", text)
        if milestones != rising:
            yield SettingError("lr_milestones", f"given {milestones}; must rise, as in {rising}")
        if kind not in ("cosine", "linear") and self.min_lr:
            yield SettingError(
                "min_lr", f"given {self.min_lr:g}; {useless}=cosine, or leave it out"
            )
        peak = self.blr * self.batch_size / 256
        if self.warmup_lr > peak:
            must = f"must not be above the highest rate, blr * batch_size / 256 = {peak:g}"
            yield SettingError("warmup_lr", f"given {self.warmup_lr:g}; {must}")


class OptimSettings(Strict):
    """The optimizer, its arithmetic and its random numbers."""

    DECIDES_WEIGHTS: ClassVar[bool] = True

    optimizer: OptimizerName = Field(
        "adamw",
        description="of what a method gives to AdamW; muon: of the matrices in blocks, AdamW of all"
        " others",
    )
    weight_decay: float = Field(0.05, ge=0, description="AdamW's; biases and norms have none")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="AdamW's"
    )
    seed: int = Field(0, ge=0, description="decides initial weights, order, crops and masks")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16 where a GPU has it, else fp32"
    )


class MachineSettings(Strict):
    """On what a run is made."""

    DECIDES_WEIGHTS: ClassVar[bool] = False

    device: Annotated[Device, OF_A_MACHINE] = Field(
        "auto", description="auto: cuda where there is one"
    )
    devices: Annotated[Count, OF_A_MACHINE] = Field(1, description="processes on a node, one a GPU")
    num_nodes: Annotated[Count, OF_A_MACHINE] = Field(1, description="machines")
    workers: Annotated[Workers, OF_A_MACHINE] = Field(
        "auto", description="processes that read images"
    )
    read_timeout: float = Field(
        READ_TIMEOUT,
        ge=0,
        le=LARGEST_RUN,
        description="seconds after which reading one image is given up; 0: never",
    )
    cache: Annotated[Text | None, OF_A_MACHINE] = Field(
        None,
        description="folder that keeps decoded images for later epochs and runs; auto: the user's "
        "cache folder; null: none",
    )
    cache_gb: float = Field(10, gt=0, le=LARGEST_RUN, description="most that cache may take")
    remote_gb: RemoteGb = REMOTE_GB
    compile: bool = Field(False, description="compile the model's blocks")
    sharding: Sharding = Field(
        "ddp",
        description="of weights, gradients and optimizer state every process holds: ddp: all; fsdp:"
        " its part; hybrid: its part of those of its machine",
    )
    offload: bool = Field(
        False,
        description="sharding=fsdp or hybrid: weights, gradients and optimizer state lie in the "
        "host's memory, where the optimizer computes",
    )
    remat: Remat = Field(
        "none",
        description="blocks: compute the blocks again for their gradients, in place of keeping what"
        " they computed",
    )

    def setting_errors(self) -> Iterator[SettingError]:
        """Ways to save memory that compiled blocks do not go with."""
        for name, given, plain in (
            ("sharding", self.sharding, "ddp"),
            ("remat", self.remat, "none"),
        ):
            if self.compile and given != plain:
                text = f"given {given}, which compiled blocks do not go with: set compile=false"
                yield SettingError(name, f"{text}, or {name}={plain}")
        if self.offload and self.sharding == "ddp":
            text = (
                "given true, but it is the parts of divided weights that lie in the host's memory"
            )
            yield SettingError("offload", f"{text}: set sharding=fsdp, or offload=false")


class SavingSettings(Strict):
    """Where a run is kept, and how often."""

    DECIDES_WEIGHTS: ClassVar[bool] = False

    out: Annotated[Text | None, OF_A_MACHINE] = Field(None, description="folder of the run")
    resume: Literal["never", "auto"] = Field(
        "never", description="auto: go on with the run in out, where there is one"
    )
    checkpoint_every: Positive | None = Field(
        None, description="steps; null: 1 epoch, 100 at least"
    )
    keep_checkpoints: Positive = Field(3, description="newest checkpoints that are kept")
    saving: Saving = Field(
        "blocking",
        description="background: a checkpoint is copied in memory and written while training goes "
        "on",
    )


class LoggingSettings(Strict):
    """What is told of a run while it is made."""

    DECIDES_WEIGHTS: ClassVar[bool] = False

    log_every: Positive = Field(10, description="steps")
    sample_every: Positive | None = Field(
        None, description="steps; null: 0, 1, 3, 10, 30, 100, ... and the last"
    )
    tensorboard: bool = Field(True, description="write TensorBoard events too")
    wandb: str | None = Field(None, description="project on Weights & Biases to log to")


class TrainSettings(
    LoggingSettings, SavingSettings, MachineSettings, OptimSettings, ScheduleSettings
):
    """All that the training loop needs of a run's settings."""

    def setting_errors(self) -> Iterator[SettingError]:
        """An optimizer of whole matrices where no process has them."""
        if self.optimizer == "muon" and self.sharding != "ddp":
            text = (
                f"given muon, which turns whole matrices, and sharding={self.sharding} leaves each "
                "process some rows of them: set sharding=ddp, or optimizer=adamw or nadamw"
            )
            yield SettingError("optimizer", text)


def fitting_counts(batch_size: int, accumulate: int, near: int) -> str:
    """Numbers of processes next to ``near`` that a batch can be shared out to: "2 or 4", or ""."""
    fits = [count for count in range(1, 2 * near + 1) if batch_size % (count * accumulate) == 0]
    below = [count for count in fits if count < near][-1:]
    above = [count for count in fits if count > near][:1]
    return " or ".join(map(str, below + above))


def rows_of_part(schedule: ScheduleSettings, processes: int, repeats: int = 1) -> int:
    """Rows of a micro-batch of one process; ``repeats``: how many of one item stand together.

    Raises UserError where a batch cannot be shared out.
    """
    size, cut = schedule.batch_size, schedule.accumulate * repeats
    if size % (processes * cut):
        fits = fitting_counts(size, cut, processes)
        raise UserError(
            f"batch_size={size} cannot be shared out to {processes} processes x "
            f"accumulate={schedule.accumulate}{f' x {repeats} of an item' if repeats > 1 else ''}: "
            f"start {fits or 'fewer'} processes (devices x num_nodes; a resumed run may change "
            f"it), or in a new run use a multiple of {processes * cut}"
        )
    return size // (processes * schedule.accumulate)

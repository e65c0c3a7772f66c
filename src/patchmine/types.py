"""What travels between the rooms: batches, masks, grids, progress, losses, pictures.  Nothing here
computes.

The one convention to remember: patches are numbered in raster order from 0, the class token is no
patch, and every mask says what is in it by name (``visible``, ``masked``) instead of by a 0 or a 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

Losses = dict[str, Tensor]
"""``"loss"`` is minimised, the rest is logged.  0-d tensors that stay on the device until the log
reads them.
"""


@dataclass(frozen=True)
class Objects:
    """The objects of one image, in pixels of that image; there may be none.

    ``boxes`` (N, 4) float32: (left, top, right, bottom).  ``labels`` (N,) int64: classes from 0.
    ``masks`` (N, H, W) bool: their pixels; None where only boxes are known.  ``crowd`` (N,) bool:
    groups, which are neither learned nor counted as missed.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def each(self, change: Callable[[Tensor], Tensor]) -> Objects:
        """The same with every tensor changed."""
        masks = None if self.masks is None else change(self.masks)
        return Objects(change(self.boxes), change(self.labels), change(self.crowd), masks)

    def chosen(self, which: Tensor) -> Objects:
        """Those of an index or a mask (N,)."""
        return self.each(lambda tensor: tensor[which])


@dataclass(frozen=True)
class Sample:
    """One item before collation: what `Batch` says of many, without their axis B.

    ``views``: V tensors (C, H, W) or (C, T, H, W).  ``box`` (4,) and ``flip`` () of one view, (V,
    4) and (V,) of several, with ``photometric`` (V, P).  ``target``: a class, numbers (K,), a
    mask (H, W), `Objects`, or None. ``index`` is the loader's to fill in.  ``known`` (C, H, W).
    """

    views: list[Tensor]
    box: Tensor
    flip: Tensor
    photometric: Tensor | None = None
    target: Any = None
    index: int = -1
    erase: Tensor | None = None
    known: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """One batch of views, with what a method needs to find its way back to the original images.

    ``views``: tensors of shape (B, C, H, W) or (B, C, T, H, W); uint8 as they leave a worker,
    normalised float on the device.  ``index`` (B,) int64: number of the item in its source.
    ``box`` (B, 4) float32: the crop as fractions of the original, (top, left, height, width).
    ``flip`` (B,) bool: mirrored left to right *after* the crop.

    Where a sample gives V crops, ``views`` has V tensors (the two global crops, then the local
    ones), ``box`` is (B, V, 4) and ``flip`` (B, V).  ``photometric`` (B, V, P) float32 then says
    how the colours of each crop change, which the device does together with mirroring
    (`data.views.photometric` names the P numbers); of one view it is (B, P).

    ``target``: what a supervised task learns, in the frame of the finished (mirrored) view: classes
    (B,) int64, numbers (B, K) float32, masks (B, H, W) or a list of B `Objects`; None in
    pre-training.

    ``known`` (B, C, H, W) bool: where there is data in the one view, as the setting
    ``missing=mask`` asks; None: everywhere.
    """

    views: list[Tensor]
    index: Tensor
    box: Tensor
    flip: Tensor
    photometric: Tensor | None = None
    target: Any = None
    erase: Tensor | None = None
    known: Tensor | None = None

    def __len__(self) -> int:
        return self.index.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; torch's loader calls this."""
        return self._each(Tensor.pin_memory)

    def with_views(self, views: list[Tensor]) -> Batch:
        """The same items with other pixels (normalised, say)."""
        return replace(self, views=views)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def changed(value: Any) -> Any:
            if isinstance(value, list):
                return [objects.each(change) for objects in value]
            return None if value is None else change(value)

        rest = (self.index, self.box, self.flip, self.photometric, self.target, self.erase)
        views = [change(view) for view in self.views]
        return Batch(views, *map(changed, (*rest, self.known)))


@dataclass(frozen=True)
class Progress:
    """How far the run is.  Whatever moves with time is a function of this, so a restart restores
    one integer.

    ``step`` counts optimizer steps that are finished; during step k (0-based) it is k.
    """

    step: int
    total_steps: int
    steps_per_epoch: int

    def at(self, step: int) -> Progress:
        """Where the same run is when ``step`` steps are finished."""
        return replace(self, step=step)

    @property
    def epoch(self) -> int:
        """0-based epoch that this step belongs to."""
        return self.step // self.steps_per_epoch

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run; a started one counts."""
        return max(1, math.ceil(self.total_steps / self.steps_per_epoch))

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return self.step / max(1, self.total_steps)


@dataclass(frozen=True)
class Grid:
    """``size`` patches along each axis, each of ``patch`` pixels: (rows, columns) or (time, rows,
    columns).
    """

    size: tuple[int, ...]
    patch: tuple[int, ...]

    @property
    def num_patches(self) -> int:
        """L, the number of patches."""
        return math.prod(self.size)

    @property
    def num_slots(self) -> int:
        """How many times the rows and columns repeat: 1 for images, frames / tubelet for clips."""
        return math.prod(self.size[:-2])

    @property
    def num_positions(self) -> int:
        """Patches of one slot: all of an image's."""
        return math.prod(self.size[-2:])

    def values_per_patch(self, channels: int) -> int:
        """Numbers in one patch of ``channels`` channels."""
        return math.prod(self.patch) * channels


@dataclass(frozen=True)
class Mask:
    """Which patches a model sees and which it must predict, as index tensors with fixed counts.

    ``visible`` (B, V) and ``masked`` (B, M) int64, raster order within each row; ``num_patches`` is
    L.  A patch in neither was thrown away (AMT).
    """

    visible: Tensor
    masked: Tensor
    num_patches: int

    def as_bool(self) -> Tensor:
        """(B, L) bool, True = masked, here as everywhere."""
        full = torch.zeros(
            self.masked.shape[0], self.num_patches, dtype=torch.bool, device=self.masked.device
        )
        return full.scatter(1, self.masked, True)


@dataclass(frozen=True)
class LrSchedule:
    """How a learning rate moves: linearly from ``warmup_lr`` to its peak, then as ``kind`` says.

    Args:
        kind: "cosine": half a cosine to ``min_lr`` at the end (MAE, ``util/lr_sched.py``);
            "linear": straight to ``min_lr`` (mmengine's ``PolyLR`` of power 1);
            "multi_step": times ``gamma`` at each of ``milestones`` (SimMIM, ``lr_scheduler.py``);
            "constant": the peak.
        warmup_epochs: how long the first part takes.
        warmup_lr: a rate, not one per 256 images, as ``min_lr``.
        warmup_prefix: False: the phase of cosine or line counts from step 0, so that the warm-up
            covers its beginning (timm's ``CosineLRScheduler``, as SimMIM and AMT use it).
        min_lr: the rate at the end of a cosine or line.
        milestones: shares of the run.
        gamma: factor at each of them.
    """

    kind: Literal["cosine", "linear", "multi_step", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    warmup_prefix: bool = True
    min_lr: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that are updated alike.  ``None`` means: as the run's settings say.

    Args:
        params: by their names in the task.
        optimizer: "adamw", "sgd" or "lars"; the run's ``optimizer`` may take AdamW's place.
        name: groups of the same one share an optimizer, its clipping and its line in the log; by
            default that of the optimizer, so it keeps apart two of a kind.
        blr: base rate per 256 images.
        scale: times the rate at every step, as layer decay and heads need it.
        curve: how the rate moves.
        min_lr: rate at the end, as it is.
        weight_decay: of parameters of two and more dimensions; ``decay_all``: of all.
        weight_decay_end: where the decay ends, by half a cosine.
        decay_all: biases and norms are decayed too.
        clip_norm: largest gradient norm of all the optimizer's groups that say so together.
        clip_each: of each parameter by itself.
        frozen_until: epochs in which nothing moves the group, weight decay included.
        frozen_share: the same as a share of the run; what ends later counts.
    """

    params: Sequence[tuple[str, nn.Parameter]]
    optimizer: str = "adamw"
    name: str | None = None
    blr: float | None = None
    scale: float = 1.0
    curve: LrSchedule | None = None
    min_lr: float | None = None
    weight_decay: float | None = None
    weight_decay_end: float | None = None
    decay_all: bool = False
    clip_norm: float | None = None
    clip_each: bool = False
    frozen_until: int = 0
    frozen_share: float = 0.0


@dataclass(frozen=True)
class Panel:
    """One named picture per image of a batch, or one per frame of its clips.

    ``kind="image"``: ``data`` (B, C, H, W) or (B, C, T, H, W) in the batch's normalised units.
    ``kind="heat"``: ``data`` (B, rows, columns) or (B, slots, rows, columns), one number per patch,
    drawn as a colour map. ``kind="colour"``: ``data`` (B, 3, H, W) in [0, 1], drawn as it is.  NaN
    is nothing there, and drawn hatched.  ``note``: what one must know to read it, in a few words:
    the unit of a map, what is hatched, what is not the model's own.
    """

    title: str
    data: Tensor
    kind: Literal["image", "heat", "colour"] = "image"
    note: str = ""

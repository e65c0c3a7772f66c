"""Cutting images and clips into patches and putting them together again."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from patchmine.types import Grid

# VideoMAE adds 1e-6 where bytes span [0, 1]; pixels normalised with ImageNet's deviations, .229,
# .224 and .225, span as much more as these are below 1.
CUBE_EPS = 1e-6 / 0.226
PATCH_EPS = 1e-6  # models_mae.py, forward_loss


def gather_patches(
    images: Shaped[Tensor, "B C *size"], index: Int[Tensor, "B V"], patch: tuple[int, ...]
) -> Shaped[Tensor, "B V C *patch"]:
    """The patches in ``index`` (B, V) and no others: (B, C, *size) -> (B, V, C, *patch)."""
    batch, channels, *size = images.shape
    counts = [side // step for side, step in zip(size, patch, strict=True)]
    split = [part for pair in zip(counts, patch, strict=True) for part in pair]
    blocks = images.reshape(batch, channels, *split)  # (B, C, g0, p0, g1, p1, ...)
    axes = len(patch)
    grid_axes = [2 + 2 * axis for axis in range(axes)]
    patch_axes = [3 + 2 * axis for axis in range(axes)]
    blocks = blocks.permute(
        0, *grid_axes, 1, *patch_axes
    )  # (B, g0, g1, ..., C, p0, p1, ...), a view
    # Not torch.unravel_index, which waits for a GPU to be given its divisors.
    coordinates: list[Tensor] = []
    for count in reversed(counts):
        index, coordinate = index // count, index % count
        coordinates.insert(0, coordinate)
    row = torch.arange(batch, device=images.device)[:, None]
    return blocks[(row, *coordinates)]  # (B, V, C, p0, p1, ...)


def all_patches(
    images: Shaped[Tensor, "B C *size"], patch: tuple[int, ...]
) -> Shaped[Tensor, "B L C *patch"]:
    """Every patch in raster order: (B, C, *size) -> (B, L, C, *patch)."""
    batch, channels, *size = images.shape
    counts = [side // step for side, step in zip(size, patch, strict=True)]
    split = [part for pair in zip(counts, patch, strict=True) for part in pair]
    axes = len(patch)
    blocks = images.reshape(batch, channels, *split)
    blocks = blocks.permute(0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2))
    return blocks.reshape(batch, -1, channels, *patch)  # (B, L, C, p0, p1, ...)


def patch_values(patches: Shaped[Tensor, "B V C *patch"]) -> Shaped[Tensor, "B V P"]:
    """Numbers of each patch in MAE's order, channels last: (B, V, C, *patch) -> (B, V, P)."""
    return patches.movedim(2, -1).flatten(2)


def channels_first(values: Float[Tensor, "B M P"], channels: int) -> Float[Tensor, "B M P"]:
    """Numbers of each patch from MAE's order into PixelShuffle's: (B, M, P) -> (B, M, P)."""
    return values.reshape(*values.shape[:-1], -1, channels).transpose(-1, -2).flatten(-2)


def channels_last(values: Float[Tensor, "B M P"], channels: int) -> Float[Tensor, "B M P"]:
    """The inverse of `channels_first`: (B, M, P) -> (B, M, P)."""
    return values.reshape(*values.shape[:-1], channels, -1).transpose(-1, -2).flatten(-2)


def images_from_values(
    values: Float[Tensor, "B L P"], grid: Grid, channels: int
) -> Float[Tensor, "B C *size"]:
    """The inverse of `patch_values` over all patches: (B, L, P) -> (B, C, *size)."""
    axes = len(grid.size)
    blocks = values.reshape(values.shape[0], *grid.size, *grid.patch, channels)
    order = [part for axis in range(axes) for part in (1 + axis, 1 + axes + axis)]
    blocks = blocks.permute(0, 1 + 2 * axes, *order)  # (B, C, g0, p0, g1, p1, ...)
    size = [count * side for count, side in zip(grid.size, grid.patch, strict=True)]
    return blocks.reshape(values.shape[0], channels, *size)


def patch_statistics(values: Tensor, eps: float = PATCH_EPS) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, (B, V, P) -> two of (B, V, 1).

    The variance is unbiased and ``eps`` sits inside the root (``models_mae.py``, forward_loss).
    """
    variance, mean = torch.var_mean(values, dim=-1, keepdim=True, correction=1)
    return mean, (variance + eps).sqrt()


def cube_statistics(values: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of each cube, (B, V, P) -> two of (B, V, 1, C).

    The variance is unbiased; ``CUBE_EPS`` is added to its root (engine_for_pretraining.py).
    """
    variance, mean = torch.var_mean(
        _by_channel(values, channels), dim=-2, keepdim=True, correction=1
    )
    return mean, variance.sqrt() + CUBE_EPS


def target_statistics(
    values: Float[Tensor, "B V P"], patch: tuple[int, ...], channels: int
) -> tuple[Tensor, Tensor]:
    """Mean and deviation by which `pixel_targets` standardises patches, or cubes."""
    return cube_statistics(values, channels) if len(patch) == 3 else patch_statistics(values)


def with_statistics(
    standardised: Float[Tensor, "B V P"], mean: Tensor, deviation: Tensor
) -> Float[Tensor, "B V P"]:
    """Standardised patches (B, V, P) with a mean and deviation as `target_statistics` has them."""
    if mean.ndim == 3:
        return standardised * deviation + mean
    return (_by_channel(standardised, mean.shape[-1]) * deviation + mean).flatten(-2)


def _by_channel(values: Tensor, channels: int) -> Tensor:
    """(B, V, P) -> (B, V, pixels, C), as `patch_values` orders them."""
    return values.reshape(*values.shape[:-1], -1, channels)


def pixel_targets(
    images: Float[Tensor, "B C *size"],
    index: Int[Tensor, "B M"],
    patch: tuple[int, ...],
    *,
    norm_pix_loss: bool,
    counts: Bool[Tensor, "B M P"] | None = None,
) -> Float[Tensor, "B M P"]:
    """Pixels to be predicted, float32 (B, M, P); standardised if ``norm_pix_loss``.

    A patch of an image over all channels together, a cube of a clip within each channel.  By those
    of its values that count; None: by all.
    """
    values = patch_values(gather_patches(images.float(), index, patch))
    if not norm_pix_loss:
        return values
    if counts is not None:
        return standardised_by(values, counts)
    mean, deviation = target_statistics(values, patch, images.shape[1])
    if len(patch) == 3:
        return ((_by_channel(values, images.shape[1]) - mean) / deviation).flatten(-2)
    return (values - mean) / deviation


def standardised_by(
    values: Float[Tensor, "*rows P"], counts: Bool[Tensor, "*rows P"]
) -> Float[Tensor, "*rows P"]:
    """Values less the mean, over the deviation, of those of their row that count."""
    number = counts.sum(dim=-1, keepdim=True)
    mean = torch.where(counts, values, 0.0).sum(dim=-1, keepdim=True) / number.clamp(min=1)
    squares = torch.where(counts, values - mean, 0.0).square().sum(dim=-1, keepdim=True)
    variance = squares / (number - 1).clamp(min=1)
    return (values - mean) / (variance + PATCH_EPS).sqrt()

"""Pictures made from patches: what was masked, the reconstruction, one number per patch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from patchmine.ops.patches import (
    all_patches,
    gather_patches,
    images_from_values,
    patch_statistics,
    patch_values,
    restore_cubes,
)
from patchmine.types import Grid, Mask, Panel


def hide_masked(
    images: Float[Tensor, "B C *size"], mask: Mask, grid: Grid
) -> Float[Tensor, "B C *size"]:
    """The images with every patch that is not visible set to NaN: (B, C, *size)."""
    values = torch.full_like(patch_values(all_patches(images, grid.patch)), float("nan"))
    seen = patch_values(all_patches(images, grid.patch)).gather(1, _wide(mask.visible, values))
    return images_from_values(
        values.scatter(1, _wide(mask.visible, values), seen), grid, images.shape[1]
    )


def fill_masked(
    images: Float[Tensor, "B C *size"], mask: Mask, grid: Grid, predicted: Float[Tensor, "B M P"]
) -> Float[Tensor, "B C *size"]:
    """The images with the masked patches replaced by ``predicted`` (B, M, P): (B, C, *size)."""
    values = patch_values(all_patches(images.float(), grid.patch))
    return images_from_values(
        values.scatter(1, _wide(mask.masked, values), predicted.float()), grid, images.shape[1]
    )


def patch_map(numbers: Tensor, grid: Grid, index: Tensor | None = None) -> Tensor:
    """One number per patch, (B, L) or (B, M) at ``index``, as a map (B, *grid.size) with NaN."""
    numbers = numbers.float()
    if index is not None:
        full = torch.full((len(numbers), grid.num_patches), float("nan"), device=numbers.device)
        numbers = full.scatter(1, index, numbers)
    return numbers.reshape(len(numbers), *grid.size)


def _wide(index: Tensor, values: Tensor) -> Tensor:
    return index[:, :, None].expand(-1, -1, values.shape[-1])


def reconstruction_panel(
    images: Float[Tensor, "B C *size"],
    mask: Mask,
    grid: Grid,
    predicted: Float[Tensor, "B M P"],
    *,
    borrow: bool,
) -> Panel:
    """The input with the masked patches replaced by the prediction ``predicted`` (B, M, P).

    With ``borrow`` the prediction is standardised and gets each patch's true mean and deviation
    back, which the model does not know: the title says so.
    """
    if not borrow:
        return Panel("reconstruction", fill_masked(images, mask, grid, predicted))
    true = patch_values(gather_patches(images.float(), mask.masked, grid.patch))
    if len(grid.patch) == 3:
        restored = restore_cubes(predicted, true, images.shape[1])
    else:
        mean, deviation = patch_statistics(true)
        restored = predicted * deviation + mean
    filled = fill_masked(images, mask, grid, restored)
    return Panel("reconstruction (patch statistics borrowed from the input)", filled)


def masked_panels(
    images: Float[Tensor, "B C *size"],
    mask: Mask,
    grid: Grid,
    reconstruction: Panel | None,
    error: Float[Tensor, "B M"],
) -> list[Panel]:
    """What the encoder saw, the reconstruction, the error (B, M) of each masked patch."""
    visible = Panel("visible", hide_masked(images, mask, grid))
    errors = Panel("error", patch_map(error, grid, mask.masked), kind="heat")
    return [visible, *([] if reconstruction is None else [reconstruction]), errors]


def two_parts(images: Float[Tensor, "B C H W"], step: int = 1) -> dict[str, Tensor]:
    """Two parts of images (B, C, H, W), about half as wide and high, in whole ``step`` pixels."""
    height, width = (max(step, side // 2 // step * step) for side in images.shape[2:])
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return {
        "middle": images[:, :, top : top + height, left : left + width],
        "upper left": images[:, :, :height, :width],
    }


def roles_panel(mask: Mask, grid: Grid, title: str) -> Panel:
    """What became of each patch, in colours that the title explains."""
    masked, thrown, visible = torch.tensor([(0.85, 0.37, 0.0), (0.45, 0.45, 0.45), (1.0, 1.0, 1.0)])
    colours = thrown.to(mask.masked.device).expand(len(mask.masked), grid.num_patches, 3)
    for index, colour in ((mask.masked, masked), (mask.visible, visible)):
        colours = colours.scatter(
            1, _wide(index, colours), colour.to(index.device).expand(*index.shape, 3)
        )
    pictures = images_from_values(colours.repeat(1, 1, grid.values_per_patch(1)), grid, 3)
    return Panel(f"{title}: masked orange, thrown grey, visible white", pictures, kind="colour")

"""Pictures made from patches: what was masked, the reconstruction, one number per patch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchmine.ops.patches import (
    all_patches,
    gather_patches,
    images_from_values,
    patch_values,
    target_statistics,
    with_statistics,
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


def input_panel(
    images: Float[Tensor, "B C *size"], known: Bool[Tensor, "B C *size"] | None
) -> Panel:
    """The input, without what of it is not known (None: all is)."""
    if known is None:
        return Panel("input", images)
    return Panel("input", images.masked_fill(~known, torch.nan), note="hatched: no data")


def reconstruction_panels(
    images: Float[Tensor, "B C *size"],
    mask: Mask,
    grid: Grid,
    predicted: Float[Tensor, "B M P"],
    *,
    standardised: bool,
) -> list[Panel]:
    """What is predicted of the masked patches (B, M, P), alone and then among the visible ones.

    A ``standardised`` prediction says nothing of a patch's mean and contrast.  Alone it gets those
    of the visible patches on average, which are known; among them those of the true patch, which
    are not, and the note says so.
    """
    alone = Mask(mask.masked, mask.visible, mask.num_patches)
    kept = Mask(torch.cat([mask.visible, mask.masked], dim=1), mask.masked, mask.num_patches)
    plain = together = predicted.float()
    throws = kept.visible.shape[1] < mask.num_patches
    unseen = "visible or thrown away" if throws else "visible"
    notes = [
        f"the model's own pixels; hatched: {unseen}, not predicted",
        "prediction among the visible patches of the input",
    ]
    if standardised:
        seen, true = (
            target_statistics(
                patch_values(gather_patches(images.float(), index, grid.patch)),
                grid.patch,
                images.shape[1],
            )
            for index in (mask.visible, mask.masked)
        )
        plain = with_statistics(plain, *(each.mean(dim=1, keepdim=True) for each in seen))
        together = with_statistics(together, *true)
        notes[0] = (
            "all patches with one mean and contrast, the visible ones' average; "
            f"hatched: {unseen}, not predicted"
        )
        notes[1] += (
            "; mean and contrast of each patch borrowed from the input, unknown to the model"
        )
    if throws:
        notes[1] += "; hatched: thrown away"
    pictures = [
        hide_masked(fill_masked(images, mask, grid, values), shown, grid)
        for values, shown in ((plain, alone), (together, kept))
    ]
    borrowed = ", statistics borrowed" if standardised else ""
    titles = ("plain reconstruction", f"reconstruction with visible patches{borrowed}")
    return [
        Panel(title, data, note=note)
        for title, data, note in zip(titles, pictures, notes, strict=True)
    ]


def masked_panels(
    images: Float[Tensor, "B C *size"],
    mask: Mask,
    grid: Grid,
    reconstruction: Sequence[Panel],
    error: Float[Tensor, "B M"],
    unit: str,
) -> list[Panel]:
    """What the encoder saw, the reconstruction, the error (B, M) of each masked patch."""
    return [
        visible_panel(images, mask, grid),
        *reconstruction,
        error_panel(error, grid, mask.masked, unit),
    ]


def visible_panel(
    images: Float[Tensor, "B C *size"], mask: Mask, grid: Grid, title: str = "visible"
) -> Panel:
    """What the encoder saw."""
    note = "all that the encoder sees; hatched: hidden"
    return Panel(title, hide_masked(images, mask, grid), note=note)


def error_panel(error: Float[Tensor, "B M"], grid: Grid, index: Tensor, unit: str) -> Panel:
    """The loss (B, M) of patches at ``index``."""
    heat = patch_map(error, grid, index)
    missing = "; hatched: not predicted" if index.shape[1] < grid.num_patches else ""
    return Panel("error", heat, kind="heat", note=f"{unit}{missing}")


def pixel_unit(*, squared: bool = True, standardised: bool = False) -> str:
    """What a number on a map of errors of pixels means."""
    if standardised and squared:
        return "mean squared error; a patch drawn flat would have 1"
    of = "standardised patches" if standardised else "pixels in standard deviations of the data"
    return f"mean {'squared' if squared else 'absolute'} error, {of}"


DIRECTION_UNIT = "2 - 2 cos to the features that are the target; 0: met, 2: unlike"
"""The same of the errors of `losses.direction_error`."""


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
    note = "masked: predicted; thrown: neither seen nor predicted"
    return Panel(
        f"{title}: masked orange, thrown grey, visible white", pictures, kind="colour", note=note
    )

"""Attention in windows of patches around the stock blocks of a transformer, as ViTDet has it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from patchmine.backbones.family import family_of
from patchmine.backbones.positions import move_positions
from patchmine.backbones.record import Encoder
from patchmine.backbones.tokens import (
    embedded_prefix,
    encoder_grid,
    image_grid,
    prefix_tokens,
    project_patches,
)
from patchmine.errors import UserError


def last_of_quarters(depth: int) -> list[int]:
    """The last block of each quarter, from 0: 2, 5, 8 and 11 of 12 (arXiv 2203.16527)."""
    return sorted({-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)})


def refuse_windows(encoder: Encoder, window: int | None, global_blocks: Collection[int]) -> None:
    """UserError where an encoder's blocks cannot run on windows, or do not exist."""
    family = family_of(encoder)
    if window is None:
        return
    if family.hierarchical:
        raise UserError(
            f"window={window}, but a {type(encoder).__name__} has no attention to be kept in "
            "windows other than its own: leave the setting out"
        )
    if family.relative_positions(encoder):
        raise UserError(
            f"window={window}, but the encoder's relative positions are tables of all its patches, "
            "which a window does not have: set window=null, or choose a model with absolute "
            "positions, such as vit_small_patch16_224"
        )
    if window < 1:
        raise UserError(f"window={window} holds no patch: choose window=14, or null for no windows")
    depth = len(encoder.blocks)
    if unknown := [number for number in global_blocks if not 0 <= number < depth]:
        raise UserError(
            f"global_blocks={unknown[0]}, but the model has blocks 0 to {depth - 1}: choose among "
            "them"
        )


def windowed_map(
    encoder: Encoder, images: Tensor, window: int | None, global_blocks: Collection[int]
) -> Tensor:
    """The last map, normed, with most blocks kept to windows.

    Args:
        encoder: a transformer of images; its own modules are used and not changed.
        images: (B, C, H, W) of any size that patches fill; timm's rule moves absolute positions.
        window: patches along each side of a window; None: every block sees all patches.
        global_blocks: numbers, from 0, of the blocks that see all patches.

    Returns:
        (B, D, rows, columns); where one window holds all patches, exactly what `stage_features`
        gives at the encoder's own size.

    Raises:
        UserError: patches do not fill the images, or positions are relative and the size is not
            the encoder's own.
    """
    size, first = image_grid(encoder, images), encoder.num_prefix_tokens
    enter = family_of(encoder).enter_blocks
    tokens, keywords = enter(encoder, _embedded(encoder, images), None, size)
    for number, block in enumerate(encoder.blocks):
        if window is None or number in global_blocks:
            tokens = block(tokens, **keywords)
        else:
            tokens = run_in_windows(block, tokens, size, window, first, keywords)
    return encoder.norm(tokens)[:, first:].transpose(1, 2).unflatten(2, size)


def _embedded(encoder: Encoder, images: Tensor) -> Tensor:
    """Prefix tokens and patches (B, P + L, D) with positions for this size of images."""
    own, size = encoder_grid(encoder).size, image_grid(encoder, images)
    if family_of(encoder).relative_positions(encoder) and size != own:
        shown = "x".join(str(side) for side in images.shape[2:])
        raise UserError(
            f"images of {shown} pixels do not fit an encoder with relative positions, which takes "
            "one size only: choose a model with absolute positions, such as vit_small_patch16_224"
        )
    patches = project_patches(encoder, images)
    if encoder.pos_embed is not None:
        rows = embedded_prefix(encoder)
        table = move_positions(encoder.pos_embed, (own[0], own[1]), (size[0], size[1]), rows)
        patches = patches + table[:, rows:]
    return torch.cat([prefix_tokens(encoder, images.shape[0]), patches], dim=1)


def run_in_windows(
    block: nn.Module,
    tokens: Tensor,
    size: tuple[int, ...],
    window: int,
    num_prefix: int,
    keywords: dict[str, Any],
) -> Tensor:
    """One block on windows of ``window`` x ``window`` patches.

    Every window sees a copy of the prefix tokens; afterwards each of them is the mean of its
    copies.  Windows at the right and the bottom edge are as small as what is left there, so that
    nothing is padded, and no patch sees padding.  Stochastic depth drops the windows of an image
    together.

    Args:
        block: of timm's; takes (B, N, D) and ``keywords``.
        tokens: (B, P + rows * columns, D).
        size: (rows, columns) of patches.
        window: patches along each side.
        num_prefix: P.
        keywords: of every call of the block; the angles of patches, ``rope`` (rows * columns, A),
            are cut as the patches are.

    Returns:
        The tokens after the block, in their order.
    """
    rows, columns = size
    prefix = tokens[:, :num_prefix]
    # Sizes by shape, not by len: a traced graph takes any number of images.
    whole = (tokens.shape[0], rows, columns, -1)
    patches = tokens[:, num_prefix:].reshape(whole)  # (B, rows, columns, D)
    angles = keywords.get("rope")
    if angles is not None:
        angles = angles.unflatten(0, size).expand(whole)  # (B, rows, columns, A)
    outputs: list[Tensor] = []
    total, count = torch.zeros_like(prefix), 0
    bands, strips = list(_spans(rows, window)), list(_spans(columns, window))
    for (top, high, height), (left, wide, width) in product(bands, strips):
        region = patches[:, top : top + high, left : left + wide]
        batch, down, across = region.shape[0], high // height, wide // width
        inside = _cut(region, height, width)
        copies = prefix.repeat_interleave(down * across, dim=0)
        if angles is not None:
            area = angles[:, top : top + high, left : left + wide]
            keywords = {**keywords, "rope": _cut(area, height, width)[:, None]}
        done = block(torch.cat([copies, inside], dim=1), **keywords)
        total = total + done[:, :num_prefix].reshape(batch, down * across, *prefix.shape[1:]).sum(1)
        count += down * across
        inside = done[:, num_prefix:].reshape(batch, down, across, height, width, -1)
        outputs.append(inside.transpose(2, 3).reshape(batch, high, wide, -1))
    across = len(strips)
    joined = [
        torch.cat(outputs[start : start + across], dim=2)
        for start in range(0, len(outputs), across)
    ]
    return torch.cat([total / count, torch.cat(joined, dim=1).flatten(1, 2)], dim=1)


def _cut(region: Tensor, height: int, width: int) -> Tensor:
    """(B, h, w, D) in windows of ``height`` x ``width``: (B * windows, height * width, D)."""
    batch, high, wide, _ = region.shape
    cut = region.reshape(batch, high // height, height, wide // width, width, -1)
    return cut.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _spans(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(first, how many, side of a window) of what whole windows cover, and of what is left."""
    whole = length // window * window
    if whole:
        yield 0, whole, window
    if whole < length:
        yield whole, length - whole, length - whole

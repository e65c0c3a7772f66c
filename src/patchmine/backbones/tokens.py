"""Patch tokens of a stock vision transformer: functions around its parts, so that what survives
training needs no conversion."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from patchmine.backbones.positions import resize_positions
from patchmine.backbones.record import Encoder, StageFeatures
from patchmine.errors import UserError
from patchmine.ops.patches import all_patches, gather_patches
from patchmine.types import Grid

EnterBlocks: TypeAlias = Callable[..., tuple[Tensor, dict[str, Any]]]
"""See `record.Family`."""


def refuse_unfilled(size: tuple[int, int], patch: Sequence[int], source: str) -> None:
    """UserError for an image size (height, width) that patches do not fill."""
    steps = tuple(patch[-2:])
    if any(side % step for side, step in zip(size, steps, strict=True)):
        near = max(steps[0], round(size[0] / steps[0]) * steps[0])
        step = "x".join(map(str, dict.fromkeys(steps)))
        raise UserError(
            f"image_size={size[0]}x{size[1]} is not a multiple of the patch size {step} of "
            f"{source}: choose image_size={near}, or patch_size=N with N dividing it"
        )


def encoder_grid(encoder: Encoder) -> Grid:
    """The patch grid that the encoder was built for."""
    return Grid(tuple(encoder.patch_embed.grid_size), tuple(encoder.patch_embed.patch_size))


def image_grid(encoder: Encoder, images: Float[Tensor, "N C *S"]) -> tuple[int, ...]:
    """Patches along each side of these images; UserError where they do not fill them."""
    patch, sides = encoder_grid(encoder).patch, images.shape[2:]
    if any(side % step for side, step in zip(sides, patch, strict=True)):
        shown, steps = ("x".join(map(str, each)) for each in (sides, patch))
        raise UserError(
            f"images of {shown} pixels are not filled by patches of {steps}: choose image_size and "
            "crops.local_size among the multiples of the patch"
        )
    return tuple(side // step for side, step in zip(sides, patch, strict=True))


def embedded_prefix(encoder: Encoder) -> int:
    """Rows of the position table that belong to prefix tokens and not to patches."""
    return 0 if getattr(encoder, "no_embed_class", False) else encoder.num_prefix_tokens


def project_patches(
    encoder: Encoder, images: Float[Tensor, "B C *S"], index: Int[Tensor, "B V"] | None = None
) -> Float[Tensor, "B V D"]:
    """Patches without positions, all in raster order or those in ``index``."""
    # The convolution as a matrix product, which only sees the patches that are wanted.
    embed = encoder.patch_embed
    if index is None:
        patches = all_patches(images, embed.patch_size)
    else:
        patches = gather_patches(images, index, embed.patch_size)
    tokens = F.linear(patches.flatten(2), embed.proj.weight.flatten(1), embed.proj.bias)
    return embed.norm(tokens)


def patch_positions(encoder: Encoder) -> Float[Tensor, "L D"]:
    """What is added to say where patches are; zeros where only attention is told."""
    if encoder.pos_embed is None:
        weight = encoder.patch_embed.proj.weight
        return weight.new_zeros(encoder.patch_embed.num_patches, encoder.embed_dim)
    return encoder.pos_embed[0, embedded_prefix(encoder) :]


def embed_patches(
    encoder: Encoder, images: Float[Tensor, "B C *S"], index: Int[Tensor, "B V"] | None = None
) -> Float[Tensor, "B V D"]:
    """Patches with positions, all in raster order or those in ``index``."""
    if encoder.pos_embed is None:
        return project_patches(encoder, images, index)
    positions = patch_positions(encoder)
    if index is not None:
        positions = positions[index]
    return project_patches(encoder, images, index) + positions


def prefix_tokens(encoder: Encoder, batch: int | torch.SymInt) -> Float[Tensor, "B P D"]:
    """Class and register tokens with their positions; P may be 0."""
    named = (encoder.cls_token, getattr(encoder, "reg_token", None))
    parts = [token for token in named if token is not None]
    if not parts:
        return encoder.patch_embed.proj.weight.new_zeros(batch, 0, encoder.embed_dim)
    tokens = torch.cat(parts, dim=1)
    if encoder.pos_embed is not None and embedded_prefix(encoder):
        tokens = tokens + encoder.pos_embed[:, : encoder.num_prefix_tokens]
    return tokens.expand(batch, -1, -1)


def embed_images(encoder: Encoder, images: Float[Tensor, "B C *S"]) -> Float[Tensor, "B N D"]:
    """Prefix tokens, then all patches, with positions for this size of images."""
    own, size = encoder_grid(encoder).size, image_grid(encoder, images)
    positions = resize_positions(patch_positions(encoder), own, size)
    patches = project_patches(encoder, images) + positions
    return torch.cat([prefix_tokens(encoder, images.shape[0]), patches], dim=1)


def angles_at(
    angles: Float[Tensor, "L A"], index: Int[Tensor, "B V"] | None
) -> Float[Tensor, "*B V A"]:
    """Of all patches (L, A), as they are, or of those in ``index`` for all heads: (B, 1, V, A)."""
    return angles if index is None else angles[index][:, None]


def turned(x: Float[Tensor, "B H N D"], angles: Tensor, half: bool) -> Float[Tensor, "B H N D"]:
    """Queries or keys of patches turned by `angles_at`; ``half``: as pairs of halves of a head."""
    how = {"half": True} if half else {}  # which older versions of timm do not know
    return apply_rot_embed_cat(x, angles, **how).type_as(x)


def block_outputs(
    encoder: Encoder,
    tokens: Float[Tensor, "B N D"],
    counts: Collection[int],
    enter_blocks: EnterBlocks,
    index: Int[Tensor, "B V"] | None = None,
    size: tuple[int, ...] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Each of ``counts`` with the tokens (B, N, D) after so many blocks, as they come; no norm.

    ``index``: which patches are behind the prefix; None: all, in raster order.  ``size``: of the
    grid, rows and columns; None: the encoder's own.
    """
    tokens, keywords = enter_blocks(encoder, tokens, index, size)
    if 0 in counts:
        yield 0, tokens
    for number, block in enumerate(encoder.blocks[: max(counts)], start=1):
        tokens = block(tokens, **keywords)
        if number in counts:
            yield number, tokens


def token_features(
    encoder: Encoder,
    images: Float[Tensor, "N C *S"],
    stages: Sequence[str],
    enter_blocks: EnterBlocks,
) -> StageFeatures:
    """Maps are patch tokens after the named blocks, normed after the last one and no other.

    ``pooled`` is the normed class token, or the mean of the normed patches where there is none.
    """
    size = image_grid(encoder, images)
    first, depth = encoder.num_prefix_tokens, len(encoder.blocks)
    tokens = embed_images(encoder, images)
    counts = [int(stage.removeprefix("blocks.")) + 1 for stage in stages]
    maps: dict[int, Tensor] = {}
    after = {*counts, depth}
    for count, output in block_outputs(encoder, tokens, after, enter_blocks, None, size):
        tokens = encoder.norm(output) if count == depth else output  # (N, P + L, D)
        # A view, taken before the next block: gradients of the tokens are summed in this order.
        maps[count] = tokens[:, first:].transpose(1, 2).unflatten(2, size)  # (N, D, rows, columns)
    pooled = tokens[:, first:].mean(dim=1) if encoder.cls_token is None else tokens[:, 0]
    return StageFeatures(pooled, [maps[count] for count in counts])

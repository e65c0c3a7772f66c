"""Segmentation by queries inside of a plain transformer: EoMT (arXiv 2503.19108)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from patchmine.backbones.family import block_outputs, family_of
from patchmine.backbones.record import Encoder
from patchmine.backbones.tokens import embed_images, image_grid
from patchmine.errors import UserError, shown_name
from patchmine.models.matching import refuse_missing_scipy
from patchmine.ops.mask_queries import class_scores

USUAL_QUERIES = 100
_MOST_BLOCKS = 4


class Proposals(NamedTuple):
    """What queries say of B images, perhaps at S depths.

    ``classes`` (B, Q, K + 1) or (S, B, Q, K + 1): scores before softmax, the last of no class at
    all.  ``masks`` (B, Q, h, w) or (S, B, Q, h, w): before sigmoid.
    """

    classes: Tensor
    masks: Tensor


class EomtHead(nn.Module):
    """Queries that go through an encoder's last blocks as tokens; each proposes a class and a mask.

    The encoder stays as it is, and is no part of this: it is given to every call.

    Args:
        encoder: a transformer of images without relative positions.
        num_classes: K.
        queries: how many; None: the published 100.
        blocks: the last blocks of the encoder, which queries go through; None: a quarter of all,
            no more than four (as published: 3 of 12, 4 of 24).

    Raises:
        UserError: an encoder that queries cannot enter; more blocks than it has; no scipy.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        queries: int | None = None,
        blocks: int | None = None,
    ) -> None:
        super().__init__()
        _refuse_unfit(encoder, blocks)
        refuse_missing_scipy()
        depth, width = len(encoder.blocks), int(encoder.embed_dim)
        self.num_blocks = blocks or max(1, min(_MOST_BLOCKS, depth // 4))
        self.queries = nn.Parameter(torch.randn(queries or USUAL_QUERIES, width))
        self.classifier = nn.Linear(width, num_classes + 1)
        self.mask = nn.Sequential(
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
        )
        # Down to four pixels, as published; small patches are halved all the same.
        halvings = max(1, int(math.log2(max(encoder.patch_embed.patch_size))) - 2)
        self.finer = nn.Sequential(*[_twice_as_fine(width) for _ in range(halvings)])

    def forward(self, encoder: Encoder, images: Tensor) -> Proposals:
        """After the last block.  Nothing is masked: that is for training only."""
        tokens, keywords = self._enter(encoder, images), self._keywords(encoder, images)
        for block in encoder.blocks[-self.num_blocks :]:
            tokens = block(tokens, **keywords)
        return self._read(encoder, tokens, image_grid(encoder, images))

    def scores(self, encoder: Encoder, images: Tensor) -> Tensor:
        """(B, K, H, W) before softmax, of images (B, C, H, W)."""
        classes, masks = self(encoder, images)
        size = (images.shape[2], images.shape[3])
        masks = F.interpolate(masks.float(), size, mode="bilinear", align_corners=False)
        with torch.autocast(images.device.type, enabled=False):
            return class_scores(classes.float(), masks)

    def at_all_depths(
        self, encoder: Encoder, images: Tensor, shares: Sequence[float], noise: Tensor
    ) -> Proposals:
        """Before each of the blocks that queries go through, and after the last: S = blocks + 1.

        Args:
            encoder: as at construction.
            images: (B, C, H, W).
            shares: for each block, the share of queries that see only the patches of their own mask
                as it is before that block, beside the other queries and the prefix tokens.
            noise: (B, blocks, Q) uniform numbers, which say what queries these are.
        """
        keyword, size = family_of(encoder).mask_keyword, image_grid(encoder, images)
        tokens, keywords = self._enter(encoder, images), self._keywords(encoder, images)
        said = []
        for number, block in enumerate(encoder.blocks[-self.num_blocks :]):
            said.append(self._read(encoder, tokens, size))
            mask = None
            if shares[number]:  # attention without any mask has faster kernels
                free = noise[:, number] >= shares[number]
                mask = self._own_patches(tokens, said[-1].masks, free, size)
            tokens = block(tokens, **keywords, **{keyword: mask})
        said.append(self._read(encoder, tokens, size))
        return Proposals(*(torch.stack(each) for each in zip(*said, strict=True)))

    def _enter(self, encoder: Encoder, images: Tensor) -> Tensor:
        """(B, P + L + Q, D), where queries join the tokens."""
        before, size = len(encoder.blocks) - self.num_blocks, image_grid(encoder, images)
        embedded = embed_images(encoder, images)
        ((_, tokens),) = block_outputs(encoder, embedded, [before], size=size)
        return torch.cat([tokens, self.queries.expand(tokens.shape[0], -1, -1)], dim=1)

    def _keywords(self, encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
        """What blocks take beside these tokens: queries have no place, and are not turned."""
        angles = family_of(encoder).angles(encoder, image_grid(encoder, images))
        if angles is None:
            return {}
        still = angles.new_zeros(len(self.queries), 2, angles.shape[1] // 2)
        still[:, 1] = 1  # sines 0, cosines 1
        return {"rope": torch.cat([angles, still.flatten(1)])}

    def _read(self, encoder: Encoder, tokens: Tensor, size: tuple[int, ...]) -> Proposals:
        """What the queries among tokens (B, P + L + Q, D) say."""
        count = len(self.queries)
        normed = encoder.norm(tokens)
        queries, patches = normed[:, -count:], normed[:, encoder.num_prefix_tokens : -count]
        maps = self.finer(patches.transpose(1, 2).unflatten(2, size))  # (B, D, h, w)
        masks = torch.einsum("bqd,bdhw->bqhw", self.mask(queries), maps)
        return Proposals(self.classifier(queries), masks)

    def _own_patches(
        self, tokens: Tensor, masks: Tensor, free: Tensor, size: tuple[int, ...]
    ) -> Tensor:
        """(B, 1, N, N), added to attention's scores: -inf where a query is outside of its mask.

        A query whose mask is empty still sees the queries and the prefix tokens, as published.
        """
        count, length = len(self.queries), tokens.shape[1]
        small = F.interpolate(masks, size, mode="bilinear", align_corners=False).flatten(2)
        seen = (small > 0) | free[..., None]  # (B, Q, L)
        bias = tokens.new_zeros(len(tokens), 1, length, length)
        first = length - count - seen.shape[2]
        bias[:, 0, -count:, first:-count].masked_fill_(~seen, -torch.inf)
        return bias


def _twice_as_fine(width: int) -> nn.Sequential:
    """A map (B, D, h, w) twice as fine."""
    return nn.Sequential(
        nn.ConvTranspose2d(width, width, 2, stride=2),
        nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
        LayerNorm2d(width),
    )


def _refuse_unfit(encoder: Encoder, blocks: int | None) -> None:
    """UserError for an encoder that queries cannot go through."""
    family, model = family_of(encoder), shown_name(encoder.built_from.model)
    if family.hierarchical:
        raise UserError(
            f"head=eomt puts queries among the tokens of a transformer, and model={model} has no "
            "tokens: choose head=upernet, dpt or linear"
        )
    if family.relative_positions(encoder):
        raise UserError(
            f"head=eomt puts queries among the tokens, and model={model} has relative positions, "
            "which queries have none of: choose head=upernet, dpt or linear, or set "
            "model_args.use_rel_pos_bias=false model_args.use_abs_pos_emb=true"
        )
    if blocks is not None and blocks > len(encoder.blocks):
        raise UserError(
            f"query_blocks={blocks}, but model={model} has {len(encoder.blocks)} blocks: choose "
            "that or fewer"
        )

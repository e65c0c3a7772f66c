"""Queries inside of an encoder: what they see, what they leave alone, and transformers' own EoMT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.networks import assert_leaves
from patchmine.backbones.family import build_encoder, stage_features
from patchmine.errors import UserError
from patchmine.models.adapt import rate_groups
from patchmine.models.dense import build_head
from patchmine.models.eomt import EomtHead, Proposals
from patchmine.models.mask_loss import num_candidates, query_losses
from patchmine.ops.schedules import masked_share
from patchmine.types import Progress

pytest.importorskip("scipy", reason="the extra `seg` is missing")

SIZE, CLASSES = (64, 96), 3
BEIT = {"use_rel_pos_bias": False, "use_abs_pos_emb": True}


def vit(size: tuple[int, int] = SIZE, patch: int = 16, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 4, "num_heads": 2, **more}
    return build_encoder(
        "vit_small_patch16_224", image_size=size, patch_size=patch, model_args=sizes
    )


def beit(size: tuple[int, int] = SIZE, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 4, "num_heads": 2, **more}
    return build_encoder("beit_base_patch16_224", image_size=size, model_args=sizes)


def dinov3(size: tuple[int, int] = SIZE) -> Any:
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 4, "num_heads": 2, "init_values": 0.5}
    return build_encoder("vit_small_patch16_dinov3", image_size=size, model_args=sizes)


def head_of(encoder: Any, blocks: int | None = 2, queries: int = 5) -> EomtHead:
    torch.manual_seed(1)
    return EomtHead(encoder, CLASSES, queries, blocks)


def pictures(rows: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(rows, 3, *size, generator=torch.Generator().manual_seed(2))


def learned(head: EomtHead, encoder: Any, images: Tensor, *, share: float = 0.5) -> Proposals:
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(len(images), head.num_blocks, len(head.queries), generator=generator)
    return head.at_all_depths(encoder, images, [share] * head.num_blocks, noise)


def truth(rows: int = 2, size: tuple[int, int] = SIZE) -> tuple[Tensor, Tensor]:
    """Labels in large pieces, and what is known of them."""
    generator = torch.Generator().manual_seed(4)
    coarse = torch.randint(0, CLASSES, (rows, size[0] // 16, size[1] // 16), generator=generator)
    labels = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)
    return labels, torch.rand(labels.shape, generator=generator) < 0.9


def points_for(masks: Tensor, rows: int = 2) -> Tensor:
    return torch.rand(rows, num_candidates(masks), 2, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "make", [vit, lambda size=SIZE, **more: beit(size, **BEIT, **more), dinov3]
)
@pytest.mark.parametrize("size", [(64, 96), (32, 48)])
def test_queries_go_through_the_last_blocks_at_any_size(make: Any, size: tuple[int, int]) -> None:
    encoder = make(size)
    head = head_of(encoder)
    images = pictures(2, size)
    proposals = learned(head, encoder, images)
    height, width = size[0] // 4, size[1] // 4  # a map of four pixels a place
    assert proposals.classes.shape == (3, 2, 5, CLASSES + 1)
    assert proposals.masks.shape == (3, 2, 5, height, width)
    assert head.scores(encoder, images).shape == (2, CLASSES, *size)
    (proposals.classes.mean() + proposals.masks.square().mean()).backward()
    assert all(p.grad is not None for p in head.parameters())
    assert all(p.grad is not None for n, p in encoder.named_parameters() if n != "pos_embed")


@pytest.mark.parametrize(
    ("depth", "blocks", "patch", "halvings"), [(12, 3, 16, 2), (24, 4, 8, 1), (2, 1, 4, 1)]
)
def test_it_is_as_published_where_that_is_known(
    depth: int, blocks: int, patch: int, halvings: int
) -> None:
    head = EomtHead(vit((32, 32), patch, depth=depth), CLASSES)
    assert (head.num_blocks, len(head.queries), len(head.finer)) == (blocks, 100, halvings)


@pytest.mark.parametrize("make", [vit, dinov3])
@pytest.mark.parametrize("size", [SIZE, (48, 80)])
def test_before_queries_come_and_without_them_it_is_the_plain_encoder(
    make: Any, size: tuple[int, int]
) -> None:
    encoder, images = make(), pictures(2, size)
    head, first = head_of(encoder), encoder.num_prefix_tokens
    with torch.no_grad():
        entered = head._enter(encoder, images)
        (plain,) = stage_features(encoder, images, ["blocks.1"]).maps
        torch.testing.assert_close(entered[:, first:-5], plain.flatten(2).transpose(1, 2))
        # Patches that cannot see the queries go on as if there were none.
        hidden = torch.zeros(entered.shape[1], entered.shape[1])
        hidden[:-5, -5:] = -torch.inf
        for block in encoder.blocks[2:]:
            entered = block(entered, attn_mask=hidden, **head._keywords(encoder, images))
        (plain,) = stage_features(encoder, images, ["blocks.3"]).maps
        last = encoder.norm(entered)[:, first:-5].transpose(1, 2).unflatten(2, plain.shape[2:])
        torch.testing.assert_close(last, plain)


def test_a_masked_query_sees_its_own_patches_only() -> None:
    encoder, images = vit(), pictures()
    head = head_of(encoder)
    tokens = head._enter(encoder, images).detach()
    masks = torch.full((2, 5, 4, 6), -1.0)
    masks[:, 0, :2] = 1  # the upper half
    masks[:, 2] = 1
    free = torch.zeros(2, 5, dtype=torch.bool)
    free[:, 3] = True
    bias = head._own_patches(tokens, masks, free, (4, 6))
    changed = tokens.clone()
    changed[:, 1 + 12 : 1 + 24] = torch.randn(2, 12, 16)  # the lower half
    block = encoder.blocks[2]
    with torch.no_grad():
        before, after = block(tokens, attn_mask=bias), block(changed, attn_mask=bias)
    moved = (before - after).abs().amax(2)[:, -5:] > 1e-6  # (B, Q)
    assert moved.tolist() == [[False, False, True, True, False]] * 2
    # Of an empty mask (1 and 4) the rest of the tokens is left, as published.
    assert before.isfinite().all()
    assert (bias[:, 0, -4, :1] == 0).all()
    assert (bias[:, 0, -4, 1:-5] == -torch.inf).all()
    assert (bias[:, 0, -4, -5:] == 0).all()
    assert (bias[:, 0, :-5] == 0).all()


def test_masks_are_for_training_and_end_before_it_does() -> None:
    encoder, images = vit(), pictures()
    head = head_of(encoder)
    with torch.no_grad():
        plain = head(encoder, images)
        open_ = learned(head, encoder, images, share=0.0)
        masked = learned(head, encoder, images, share=1.0)
    for one, every, other in zip(plain, open_, masked, strict=True):
        torch.testing.assert_close(one, every[-1])
        torch.testing.assert_close(every[0], other[0])  # what is said before any mask
        assert not torch.allclose(one, other[-1], atol=1e-4)

    def shares(step: int, blocks: int) -> list[float]:
        return [masked_share(Progress(step, 1200, 10), block, blocks) for block in range(blocks)]

    # Of the published 19,902 steps on Cityscapes: from 3,317, 8,292 and 13,268 on, for a sixth.
    assert shares(0, 3) == shares(200, 3) == [1, 1, 1]
    assert shares(300, 3) == pytest.approx([0.5**0.9, 1, 1])
    assert shares(600, 3) == pytest.approx([0, 0.5**0.9, 1])
    assert shares(900, 3) == pytest.approx([0, 0, 0.5**0.9])
    assert shares(1000, 3) == shares(1200, 3) == pytest.approx([0, 0, 0])
    assert shares(500, 4) == pytest.approx([0, 0.5**0.9, 1, 1])  # 6,520 by 6,520 on ADE20K
    assert shares(300, 1) == pytest.approx([0.5**0.9])


def test_a_batch_may_be_divided() -> None:
    encoder, images = vit(), pictures(4)
    head = head_of(encoder)
    labels, known = truth(4)
    known[0] = False
    proposals = learned(head, encoder, images)
    points = points_for(proposals.masks, 4)
    whole = query_losses(proposals, labels, known, points)
    assert all(torch.isfinite(loss) for loss in whole.values())
    rows = [slice(0, 1), slice(1, 3), slice(3, 4)]
    parts = [
        query_losses(
            Proposals(*(each[:, row] for each in proposals)), labels[row], known[row], points[row]
        )
        for row in rows
    ]
    for name, loss in whole.items():
        mean = sum(part[name] * len(labels[row]) for part, row in zip(parts, rows, strict=True)) / 4
        torch.testing.assert_close(mean, loss)


def test_what_is_of_no_class_changes_nothing() -> None:
    encoder, images = vit(), pictures()
    proposals = learned(head_of(encoder), encoder, images)
    labels, known = truth()
    points = points_for(proposals.masks)
    other = torch.where(known, labels, 2)
    one = query_losses(proposals, torch.where(known, labels, 0), known, points)
    assert one == query_losses(proposals, other, known, points)


def test_masks_are_learned() -> None:
    encoder = vit()
    head = head_of(encoder, queries=8)
    labels, known = truth(1)
    images = labels[:, None].float().expand(-1, 3, -1, -1) - 1
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], 3e-3)
    for step in range(80):
        share = masked_share(Progress(step, 80, 80), 0, 1)
        proposals = learned(head, encoder, images, share=share)
        losses = query_losses(proposals, labels, known, points_for(proposals.masks, 1))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    found = head.scores(encoder, images).argmax(1)
    assert (found == labels).float().mean() > 0.9
    assert float(losses["accuracy"]) > 90


def test_all_of_it_learns_at_the_full_rate() -> None:
    encoder = vit()
    head = head_of(encoder)
    scales = {name: g.scale for g in rate_groups(encoder, head, 0.5) for name, _ in g.params}
    own = {name: scale for name, scale in scales.items() if name.startswith("head.")}
    assert own == {f"head.{name}": 1.0 for name, _ in head.named_parameters()}


def test_what_queries_cannot_enter_is_refused() -> None:
    resnet = build_encoder("resnet18", image_size=SIZE)
    with pytest.raises(UserError, match=r"model=resnet18 has no tokens: choose head=upernet"):
        build_head("eomt", resnet, CLASSES, SIZE)
    relative = beit(use_rel_pos_bias=True, use_abs_pos_emb=False)
    with pytest.raises(UserError, match="has relative positions, which queries have none of"):
        build_head("eomt", relative, CLASSES, SIZE)
    with pytest.raises(UserError, match=r"query_blocks=5, but .* has 4 blocks"):
        build_head("eomt", vit(), CLASSES, SIZE, query_blocks=5)


class Segmenter(torch.nn.Module):
    """An encoder and a head, as a task puts them together."""

    def __init__(self, encoder: Any, head: EomtHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head.scores(self.encoder, images)


def test_a_whole_model_leaves_by_export_and_onnx(tmp_path: Path) -> None:
    encoder = vit()
    assert_leaves(Segmenter(encoder, head_of(encoder)), (3, *SIZE), tmp_path)

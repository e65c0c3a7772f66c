"""Our EoMT against that of transformers, which takes square images only: same weights, same noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from patchmine.backbones.family import build_encoder
from patchmine.models.eomt import EomtHead
from patchmine.models.mask_loss import num_candidates, num_points, query_losses

eomt = pytest.importorskip("transformers.models.eomt", reason="the extra `export` is missing")
pytest.importorskip("scipy", reason="the extra `seg` is missing")

SIDE, CLASSES, QUERIES, BLOCKS, WIDTH = 64, 3, 6, 2, 32
NAMES = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "attention.out_proj": "attn.proj",
    "layers.": "blocks.",
    "layernorm.": "norm.",
}
HEAD = {
    "query": "queries",
    "class_predictor": "classifier",
    "mask_head.fc1": "mask.0",
    "mask_head.fc2": "mask.2",
    "mask_head.fc3": "mask.4",
    "upscale_block.block.": "finer.",
    ".conv1": ".0",
    ".conv2": ".2",
    ".layernorm2d": ".3",
}


def theirs() -> Any:
    config = eomt.EomtConfig(
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=16,
        num_blocks=BLOCKS,
        num_queries=QUERIES,
        num_register_tokens=0,
        num_labels=CLASSES,
        train_num_points=(SIDE // 4) ** 2,
    )
    torch.manual_seed(0)
    return eomt.EomtForUniversalSegmentation(config)


def renamed(names: dict[str, str], name: str) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def ours(model: Any) -> tuple[Any, EomtHead]:
    """An encoder and a head with the weights of theirs."""
    encoder = build_encoder(
        "vit_small_patch16_224",
        image_size=(SIDE, SIDE),
        model_args={"embed_dim": WIDTH, "depth": 4, "num_heads": 2},
    )
    head = EomtHead(encoder, CLASSES, QUERIES, BLOCKS)
    given = dict(model.named_parameters())
    own = {renamed(NAMES, name): tensor for name, tensor in given.items()}
    own["cls_token"] = given["embeddings.cls_token"]
    rows = given["embeddings.position_embeddings.weight"][None]
    own["pos_embed"] = torch.cat([torch.zeros(1, 1, WIDTH), rows], dim=1)
    for number in range(4):
        for part in ("weight", "bias"):
            joined = [
                given[f"layers.{number}.attention.{one}_proj.{part}"] for one in ("q", "k", "v")
            ]
            own[f"blocks.{number}.attn.qkv.{part}"] = torch.cat(joined)
    encoder.load_state_dict({name: own[name] for name in encoder.state_dict()})
    own = {renamed(HEAD, name): tensor for name, tensor in given.items()}
    own["queries"] = given["query.weight"]
    head.load_state_dict({name: own[name] for name in head.state_dict()})
    return encoder, head


def pictures(rows: int) -> Tensor:
    return torch.randn(rows, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def test_inference_is_theirs() -> None:
    model, images = theirs().eval(), pictures(2)
    model.attn_mask_probs.zero_()
    encoder, head = ours(model)
    with torch.no_grad():
        expected, found = model(images), head(encoder, images)
    torch.testing.assert_close(found.classes, expected.class_queries_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.masks, expected.masks_queries_logits, atol=1e-5, rtol=1e-5)


def pixel_centres(rows: int, count: int) -> Tensor:
    """Points where bilinear labels are those of a pixel, and no mask needs what is around it."""
    drawn = torch.rand(rows, count, 2, generator=torch.Generator().manual_seed(2))
    return ((4 + drawn * (SIDE - 8)).floor() + 0.5) / SIDE


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_training_is_theirs(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 2
    model, images = theirs().train(), pictures(rows)
    model.attn_mask_probs.fill_(share)
    encoder, head = ours(model)
    noise = torch.rand(rows, BLOCKS, QUERIES, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    coarse = torch.randint(0, CLASSES, (rows, 4, 4), generator=generator)
    labels = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)

    proposals = head.at_all_depths(encoder, images, [share] * BLOCKS, noise)
    points = pixel_centres(rows, num_candidates(proposals.masks))
    known = torch.ones_like(labels, dtype=torch.bool)
    found = query_losses(proposals, labels, known, points)
    found["loss"].backward()

    count = num_points(proposals.masks)
    losses = []
    for row in range(rows):  # theirs are means over all masks of a batch, ours over images
        queue = list(noise[row])

        def drawn(*shape: int, row: int = row, queue: Any = queue, **_device: Any) -> Tensor:
            if shape[1:] == (QUERIES,):
                return queue.pop(0)[None]
            first = 3 * count if shape[1] == count // 4 else 0
            return points[row, first : first + shape[1]].expand(*shape).contiguous()

        shown = labels[row].unique()
        masks = (labels[row] == shown[:, None, None]).float()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", drawn)
            said = model(images[row : row + 1], mask_labels=[masks], class_labels=[shown])
        own = proposals.classes[-1, row], proposals.masks[-1, row]
        torch.testing.assert_close(own[0], said.class_queries_logits[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(own[1], said.masks_queries_logits[0], atol=1e-5, rtol=1e-5)
        losses.append(said.loss)
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(found["loss"], expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    for own, other in (
        (head.queries, model.query.weight),
        (head.finer[0][0].weight, model.upscale_block.block[0].conv1.weight),
        (encoder.blocks[0].mlp.fc1.weight, model.layers[0].mlp.fc1.weight),
    ):
        torch.testing.assert_close(own.grad, other.grad, atol=1e-5, rtol=1e-4)

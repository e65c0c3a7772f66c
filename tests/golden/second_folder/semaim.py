"""Vectors of SemAIM: oblong images, fewer query blocks than blocks, ties by chance, other names and
options.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from second_folder import reference as slow
from second_folder.drawing import SOURCE, Drawing, gradients, learning, named, run_encoder, save
from torch import Tensor

EPS, ROWS, COLUMNS, HEADS = 1e-6, 4, 6, 2
LENGTH = ROWS * COLUMNS


def query_block(
    queries: Tensor, content: Tensor, state: dict[str, Tensor], name: str, seen: Tensor
) -> Tensor:
    own, other = (slow.layer_norm(x, state, f"{name}.norm1", EPS) for x in (queries, content))
    q = slow.linear(own, state, f"{name}.attn.q")
    k, v = (slow.linear(other, state, f"{name}.attn.{part}") for part in "kv")
    mixed, _ = slow.attend(q, k, v, HEADS, seen)
    queries = queries + slow.linear(mixed, state, f"{name}.attn.proj")
    return queries + slow.perceptron(queries, state, name, EPS)


def scores(case: dict[str, Any], similarity: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The centre of every image, and the score of every patch as the reference adds it up in
    float32.
    """
    centre = similarity.argmax(dim=1)
    kind = case["permutation_type"]
    if kind == "stochastic":
        return centre, noise.float()
    if kind == "zigzag":
        return centre, torch.arange(LENGTH).expand(len(noise), -1).contiguous()
    if kind == "attention":
        return centre, 1 - similarity.softmax(dim=1).float()
    score = torch.zeros(len(noise), LENGTH)
    for image, middle in enumerate(centre.tolist()):
        for patch in range(LENGTH):
            down, across = patch // COLUMNS - middle // COLUMNS, patch % COLUMNS - middle % COLUMNS
            distance = torch.tensor(float(down**2 + across**2)).sqrt()
            score[image, patch] = distance + 1e-3 * noise[image, patch].float()
    return centre, score


def blurred(images: Tensor, blur: list[int] | None) -> Tensor:
    if blur is None:
        return images
    window = slow.gaussian(*blur)
    padded = F.pad(images, (blur[0] // 2,) * 4)
    out = torch.zeros_like(images)
    for a in range(blur[0]):
        for b in range(blur[0]):
            out = (
                out + window[a, b] * padded[:, :, a : a + images.shape[2], b : b + images.shape[3]]
            )
    return out


def semaim(folder: Path) -> None:
    draw = Drawing(8)
    c = dict(img_size=[20, 30], patch_size=5, embed_dim=24, depth=4, num_heads=HEADS, query_depth=2)
    c |= dict(prediction_head_type="LINEAR", gaussian_kernel_size=5, gaussian_sigma=2)
    weights = draw.encoder(c)
    for i in range(2):
        own = f"query_blocks.{i}"
        weights |= draw.norm(f"{own}.norm1", 24) | draw.norm(f"{own}.norm2", 24)
        for part in ("q", "k", "v", "proj"):
            weights |= draw.linear(f"{own}.attn.{part}", 24, 24)
        weights |= draw.linear(f"{own}.mlp.fc1", 24, 72) | draw.linear(f"{own}.mlp.fc2", 72, 24)
    weights |= draw.linear("prediction_head", 24, 75)
    head = draw.linear("prediction_head", 24, 10)
    images, noise = draw.normal(2, 3, *c["img_size"]), draw.uniform(2, LENGTH)
    # In the first image the noise is nearly one of four numbers: a thousandth of it, added to a
    # distance in float32, leaves patches of one ring without a difference, as happens by chance on
    # larger grids.
    noise[0] = ((noise[0] * 4).floor() / 4 + 1e-6 * torch.arange(LENGTH)).float().double()
    teacher = draw.normal(2, 1 + LENGTH, 10)
    tensors = named("sd.", weights) | named("sd_foreign.", head) | dict(images=images, noise=noise)
    tensors["sd.gaussian_blur.weight"] = slow.gaussian(5, 2).expand(3, 1, 5, 5)

    pixels = dict(attention_type="cls", target="pixel", loss="L2", norm_pix=True, blur=[5, 2])
    centred = pixels | dict(permutation_type="attention_center")
    cases: dict[str, dict[str, Any]] = {
        "from the mean": centred | dict(attention_type="gap", loss="L1"),
        "by attention": centred | dict(attention_type="self", norm_pix=False),
        "most alike first": pixels | dict(permutation_type="attention", blur=None),
        "at random": pixels | dict(permutation_type="stochastic"),
        "in lines": pixels | dict(permutation_type="zigzag", blur=[3, 1]),
        "whole rings": dict(centred),
        "centre": dict(centred),
        "foreign": dict(
            permutation_type="attention_center", target="feature (clip-type, out_dim 10)"
        ),
    }
    for name, case in cases.items():
        used = torch.zeros_like(noise) if name == "whole rings" else noise
        found, result = one_case(name, case, learning(weights), head, images, teacher, used)
        case["result"] = result
        tensors |= named(f"{name}.", found)
    meta = dict(method="SemAIM", config=c, mlp_ratio=3.0, cases=cases, source=SOURCE)
    save(folder, "semaim", meta, tensors)


def one_case(
    name: str,
    case: dict[str, Any],
    state: dict[str, Tensor],
    head: dict[str, Tensor],
    images: Tensor,
    teacher: Tensor,
    noise: Tensor,
) -> tuple[dict[str, Tensor], list[Any]]:
    """Everything that is stored of one case, and its loss and number of ties."""
    foreign = case["target"] != "pixel"
    if foreign:
        state |= learning(head)
    patches = slow.embed(images, state, 5) + state["pos_embed"][:, 1:]
    start = (state["cls_token"] + state["pos_embed"][:, :1]).expand(2, -1, -1)
    content = torch.cat([start, patches], dim=1)
    similarity, found = looked(
        case, teacher if foreign else run_encoder(patches, state, HEADS).detach(), content, state
    )
    centre, score = scores(case, similarity, noise)
    may, ask = slow.look_earlier(score)
    found |= dict(
        center_index=centre, permutation=score, content_mask=may.byte(), query_mask=ask.byte()
    )
    found |= streams(content, state, may, ask)
    predicted = found["pred"][:, 1:]
    if foreign:
        per_patch = slow.directions_apart(predicted, teacher[:, 1:])
    else:
        found["blurred"] = blurred(images, case["blur"])
        target = slow.channels_last(found["blurred"], 5)
        found["target"] = slow.standardised(target) if case["norm_pix"] else target
        difference = predicted - found["target"]
        per_patch = (difference**2 if case["loss"] == "L2" else difference.abs()).mean(dim=-1)
    loss = per_patch.mean()
    found |= dict(loss=loss, loss_map=per_patch, grad_norm=gradient_norm(loss, state))
    if name != "in lines":
        names = [
            "cls_token",
            "patch_embed.proj.weight",
            "query_blocks.1.attn.v.weight",
            "query_blocks.0.attn.k.weight",
        ]
        found |= gradients(
            loss, state, [*names, "blocks.2.mlp.fc1.bias", "prediction_head.bias"], "grad."
        )
    ties = [int((row.unique(return_counts=True)[1] > 1).sum()) for row in score]
    return found, [loss.item(), ties]


def looked(
    case: dict[str, Any], tokens: Tensor, content: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """How similar every patch is to the image (B, L), and what is stored of that."""
    if case.get("attention_type") == "self":
        _, shares = slow.blocks(content, state, "blocks", HEADS, EPS)
        attention = shares[:, :, 0, 1:].mean(dim=1).detach()
        return attention, dict(self_attention=attention)
    gap = case.get("attention_type") == "gap"
    anchor = tokens[:, 1:].mean(dim=1, keepdim=True) if gap else tokens[:, :1]
    cosine = (anchor * tokens[:, 1:]).sum(dim=-1) / (
        anchor.norm(dim=-1) * tokens[:, 1:].norm(dim=-1)
    )
    if case["target"] != "pixel":
        low, high = cosine.amin(dim=1, keepdim=True), cosine.amax(dim=1, keepdim=True)
        return cosine, dict(
            teacher_tokens=tokens, teacher_similarity=(cosine - low) / (high - low + 1e-6)
        )
    if case["permutation_type"] not in ("attention", "attention_center"):
        return cosine, {}
    return cosine, dict(feature_attention=cosine.softmax(dim=1), enc_tokens=tokens)


def streams(
    content: Tensor, state: dict[str, Tensor], may: Tensor, ask: Tensor
) -> dict[str, Tensor]:
    """What every block makes of content and queries, and the predictions; a query block behind
    every second block.
    """
    found, queries = {}, state["pos_embed"].expand(2, -1, -1)
    for i in range(4):
        content, _ = slow.block(content, state, f"blocks.{i}", HEADS, EPS, seen=may)
        found[f"h.{i}"] = content
        if i % 2:
            queries = query_block(queries, content, state, f"query_blocks.{i // 2}", ask)
            found[f"g.{i // 2}"] = queries
    pred = slow.linear(slow.layer_norm(queries, state, "norm", EPS), state, "prediction_head")
    return found | dict(pred=pred)


def gradient_norm(loss: Tensor, state: dict[str, Tensor]) -> Tensor:
    learned = [t for t in state.values() if t.requires_grad]
    every = torch.autograd.grad(loss, learned, retain_graph=True, allow_unused=True)
    return sum((g**2).sum() for g in every if g is not None) ** 0.5

"""Vectors of EMAE: parts of other numbers and sizes, a network of which not all parts are used."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from second_folder import reference as slow
from second_folder.drawing import (
    RATIO,
    SOURCE,
    Drawing,
    gradients,
    learning,
    named,
    run_decoder,
    run_encoder,
    save,
)
from torch import Tensor


def drawn_parts(noise: Tensor, parts: int) -> dict[str, Tensor]:
    shuffle = noise.argsort(dim=1, stable=True)
    size = noise.shape[1] // parts
    part = torch.zeros_like(shuffle)
    mask = torch.ones(len(noise), parts, noise.shape[1], dtype=torch.float64)
    for image, row in enumerate(shuffle):
        for place, patch in enumerate(row.tolist()):
            part[image, patch] = place // size
            mask[image, place // size, patch] = 0
    return dict(noise=noise, ids_shuffle=shuffle, part=part, mask=mask)


def losses_of(pred: Tensor, target: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The losses by name, for predictions (N, U, L, P) of the first U parts; and the loss of each
    patch (N, U, L).
    """
    images, used, length, _ = pred.shape
    per_patch = ((pred - target[:, None]) ** 2).mean(dim=-1)
    hidden = mask[:, :used]
    losses = {"loss_whole": (per_patch * hidden).sum() / hidden.sum()}
    zero = pred.sum() * 0
    sums = dict(sc_l1_all=zero, sc_l1_overlap=zero, sc_l2_all=zero, mean_abs_diff=zero)
    pairs = list(combinations(range(used), 2))
    for a, b in pairs:
        for image in range(images):
            both = (hidden[image, a] * hidden[image, b]).bool()
            first, second = pred[image, a][both], pred[image, b][both]
            if not both.any():
                continue
            one = (first.detach() - second).abs().mean(dim=-1).sum() + (
                first - second.detach()
            ).abs().mean(dim=-1).sum()
            two = ((first.detach() - second) ** 2).mean(dim=-1).sum() + (
                (first - second.detach()) ** 2
            ).mean(-1).sum()
            share = 1 / (len(pairs) * images)
            sums["sc_l1_all"] = sums["sc_l1_all"] + share * one / length
            sums["sc_l1_overlap"] = sums["sc_l1_overlap"] + share * one / both.sum()
            sums["sc_l2_all"] = sums["sc_l2_all"] + share * two / length
            sums["mean_abs_diff"] = sums["mean_abs_diff"] + share * (first - second).abs().mean()
    losses |= sums
    return losses | {"total": losses["loss_whole"] + losses["sc_l1_all"]}, per_patch


def alone(
    draw: Drawing,
    name: str,
    images: int,
    parts: int,
    length: int,
    width: int,
    used: int,
    ties: bool,
) -> Any:
    """A case of the loss alone."""
    tensors = drawn_parts(draw.uniform(images, length), parts)
    pred, target = draw.normal(images, parts, length, width), draw.normal(images, length, width)
    pred = pred.round() if ties else pred
    pred = pred.requires_grad_()
    losses, per_patch = losses_of(pred[:, :used], target, tensors["mask"])
    tensors |= dict(pred=pred, target=target, loss_patch=per_patch)
    for key in ("loss_whole", "sc_l1_all", "sc_l2_all"):
        (slope,) = torch.autograd.grad(losses[key], pred, retain_graph=True)
        tensors["grad_whole" if key == "loss_whole" else f"grad_{key}"] = slope[:, :used]
    numbers = {key: value.item() for key, value in losses.items()}
    case = dict(N=images, K=parts, L=length, D=width, parts_used=used, ties=ties, losses=numbers)
    return case, named(f"{name}.", tensors)


def model(draw: Drawing, name: str, c: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """A case with a network."""
    images = draw.normal(c["batch"], 3, *c["img_size"])
    tensors = drawn_parts(draw.uniform(c["batch"], 12), c["K"]) | dict(imgs=images)
    patch, size, used = c["patch_size"], 12 // c["K"], c.get("parts_used", c["K"])
    target = slow.standardised(slow.channels_last(images, patch))
    everything = slow.embed(images, state, patch) + state["pos_embed"][:, 1:]
    latents, preds = [], []
    for part in range(used):
        seen = tensors["ids_shuffle"][:, part * size : (part + 1) * size]
        latent = run_encoder(slow.rows_of(everything, seen), state, c["num_heads"])
        narrow = slow.linear(latent, state, "decoder_embed")
        filled = []
        for image in range(c["batch"]):
            row = list(state["mask_token"][0].expand(12, -1))
            for token, place in zip(narrow[image, 1:], seen[image].tolist(), strict=True):
                row[place] = token
            filled.append(torch.stack(row))
        tokens = torch.cat([narrow[:, :1], torch.stack(filled)], dim=1) + state["decoder_pos_embed"]
        latents.append(latent)
        preds.append(run_decoder(tokens, state, c["decoder_num_heads"])[:, 1:])
    pred = torch.stack(preds, dim=1)
    losses, per_patch = losses_of(pred, target, tensors["mask"])
    tensors |= dict(
        latent=torch.stack(latents, dim=1), pred=pred, target=target, loss_patch=per_patch
    )
    names = [
        "cls_token",
        "patch_embed.proj.bias",
        "blocks.0.mlp.fc1.weight",
        "mask_token",
        "decoder_pred.weight",
    ]
    tensors |= gradients(losses["total"], state, names, "grad.")
    numbers = {key: value.item() for key, value in losses.items()}
    return dict(config=c, L=12, V=size, losses=numbers), named(f"{name}.", tensors)


def emae(folder: Path) -> None:
    draw = Drawing(3)
    c = dict(
        img_size=[12, 16],
        patch_size=4,
        embed_dim=32,
        depth=1,
        num_heads=4,
        batch=2,
        K=3,
        mlp_ratio=RATIO,
    )
    c |= dict(decoder_embed_dim=20, decoder_depth=2, decoder_num_heads=5, decoder_mlp_ratio=2)
    weights = draw.encoder(c) | draw.decoder(c, 48)
    for name in [n for n in weights if n.startswith("decoder_blocks.") and ".mlp." in n]:
        del weights[name]
    for block in range(2):
        weights |= draw.linear(f"decoder_blocks.{block}.mlp.fc1", 20, 40)
        weights |= draw.linear(f"decoder_blocks.{block}.mlp.fc2", 40, 20)
    state, cases, tensors = learning(weights), {}, named("sd.", weights)
    for name, more in (("thirds", {}), ("some of four", dict(K=4, parts_used=3))):
        cases[name], stored = model(draw, name, c | more, state)
        tensors |= stored
    alone_cases = [
        ("five", 3, 5, 20, 4, 5, False),
        ("ties6", 2, 6, 12, 3, 6, True),
        ("used3of5", 2, 5, 10, 4, 3, False),
    ]
    for name, *sizes in [*alone_cases, ("halves", 2, 2, 8, 3, 2, False)]:
        cases[name], stored = alone(draw, name, *sizes)
        tensors |= stored
    sentence = "float32 implementation: 1e-5 relative on losses, 2e-5 absolute on pred, 1e-4 relative on gradients"
    save(
        folder, "emae", dict(method="emae", source=SOURCE, cases=cases, tolerance=sentence), tensors
    )

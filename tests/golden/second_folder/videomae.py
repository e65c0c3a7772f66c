"""Vectors of VideoMAE: oblong clips, long tubelets, more of them visible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from second_folder import reference as slow
from second_folder.drawing import RATIO, SOURCE, Drawing, gradients, learning, named, save
from torch import Tensor

MEAN, STD = (
    torch.tensor(numbers).double()[:, None, None]
    for numbers in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
)


def cubes(clips: Tensor, tubelet: int, patch: int) -> list[Tensor]:
    """Every cube (B, C, t, p, p), time first, then row after row."""
    times = range(0, clips.shape[2], tubelet)
    per_time = [clips[:, :, time : time + tubelet] for time in times]
    corners = [
        (y, x) for y in range(0, clips.shape[3], patch) for x in range(0, clips.shape[4], patch)
    ]
    return [each[:, :, :, y : y + patch, x : x + patch] for each in per_time for y, x in corners]


def videomae(folder: Path) -> None:
    draw = Drawing(9)
    c: dict[str, Any] = dict(
        img_size=[12, 18], patch_size=6, num_frames=9, tubelet_size=3, batch=2, mask_ratio=0.6
    )
    c |= dict(
        embed_dim=24,
        depth=2,
        num_heads=4,
        decoder_embed_dim=16,
        decoder_depth=2,
        decoder_num_heads=2,
    )
    width, narrow, values, length = 24, 16, 3 * 3 * 36, 18
    weights = draw.linear("encoder.patch_embed.proj", values, width, shape=(width, 3, 3, 6, 6))
    weights |= draw.blocks("encoder.blocks", width, 2, qkv="qv") | draw.norm("encoder.norm", width)
    weights |= draw.linear("encoder_to_decoder", width, narrow, bias=False)
    weights |= {"mask_token": draw.normal(1, 1, narrow, scale=0.3)}
    weights |= draw.blocks("decoder.blocks", narrow, 2, qkv="qv") | draw.norm(
        "decoder.norm", narrow
    )
    weights |= draw.linear("decoder.head", narrow, values)
    state, pixels = learning(weights), draw.uniform(2, 3, 9, 12, 18)
    clips = ((pixels - MEAN[:, None]) / STD[:, None]).float().double()

    hidden = int(6 * 0.6)  # of six places, at all three times
    mask = torch.zeros(2, 6, dtype=torch.float64)
    for row in mask:
        row[torch.randperm(6, generator=draw.generator)[:hidden]] = 1
    mask = torch.cat([mask] * 3, dim=1)
    visible, masked = (
        torch.stack([(row == value).nonzero()[:, 0] for row in mask]) for value in (0, 1)
    )

    tables = [slow.interleaved(w, length)[None].expand(2, -1, -1) for w in (width, narrow)]
    patches = torch.stack([each.flatten(1) for each in cubes(clips, 3, 6)], dim=1)
    tokens = slow.rows_of(
        slow.linear(patches, state, "encoder.patch_embed.proj") + tables[0], visible
    )
    tokens, _ = slow.blocks(tokens, state, "encoder.blocks", 4, 1e-6)
    latent = slow.layer_norm(tokens, state, "encoder.norm", 1e-6)
    seen = slow.linear(latent, state, "encoder_to_decoder") + slow.rows_of(tables[1], visible)
    entered = torch.cat([seen, state["mask_token"] + slow.rows_of(tables[1], masked)], dim=1)
    tokens, _ = slow.blocks(entered, state, "decoder.blocks", 2, 1e-6)
    pred = slow.linear(slow.layer_norm(tokens, state, "decoder.norm", 1e-6), state, "decoder.head")
    pred = pred[:, visible.shape[1] :]

    targets = []
    for cube in cubes(
        clips * STD[:, None] + MEAN[:, None], 3, 6
    ):  # back in [0, 1], each channel by itself
        mean = cube.mean(dim=(2, 3, 4), keepdim=True)
        deviation = (((cube - mean) ** 2).sum(dim=(2, 3, 4), keepdim=True) / (3 * 36 - 1)) ** 0.5
        targets.append(((cube - mean) / (deviation + 1e-6)).permute(0, 2, 3, 4, 1).flatten(1))
    target = slow.rows_of(torch.stack(targets, dim=1), masked)
    per_cube = ((pred - target) ** 2).mean(dim=-1)
    names = [
        "encoder.blocks.1.attn.v_bias",
        "encoder.patch_embed.proj.weight",
        "mask_token",
        "decoder.head.bias",
    ]
    tensors = named("state.", weights) | dict(
        video=clips, mask=mask, latent=latent, decoder_input=entered, pred=pred
    )
    tensors |= dict(target_masked=target, loss_per_cube=per_cube, loss=per_cube.mean().reshape(1))
    tensors |= dict(encoder_pos_embed=tables[0][:1], decoder_pos_embed=tables[1][:1])
    tensors |= gradients(per_cube.mean(), state, names, "grad.")
    meta = dict(
        method="videomae substrate of hpm-video", config=c, num_cubes=length, num_masked=3 * hidden
    )
    save(folder, "videomae", meta | dict(mlp_ratio=RATIO, source=SOURCE), tensors)

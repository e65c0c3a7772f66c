"""Vectors of AMT on MAE and on SimMIM, and of SimMIM: oblong images, standardised pixels, other
positions.
"""

from __future__ import annotations

import math
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

EPS = 1e-6


def thrown_masks(order: Tensor, masked: int, thrown: int) -> Tensor:
    """1 masked, -1 thrown, 0 visible, from the order of the draw (B, n)."""
    roles = torch.zeros(order.shape, dtype=torch.float64)
    for row, drawn in zip(roles, order, strict=True):
        row[drawn[:masked]] = 1
        row[drawn[masked : masked + thrown]] = -1
    return roles


def numbers_where(roles: Tensor, keep: Any) -> Tensor:
    """Numbers of the patches (B, n) whose role is one of ``keep``, raster order."""
    return torch.stack(
        [torch.tensor([i for i, role in enumerate(row.tolist()) if role in keep]) for row in roles]
    )


def amt(folder: Path) -> None:
    draw = Drawing(4)
    c = dict(img=[20, 30], patch=5, dim=24, depth=3, heads=4, ddim=16, ddepth=2, dheads=2, batch=2)
    c |= dict(
        norm_pix=True, mask_ratio=0.4, throw_ratio=0.3, epoch=77, mlp_ratio=RATIO, eps_layernorm=EPS
    )
    sizes = dict(
        img_size=c["img"],
        patch_size=5,
        embed_dim=24,
        depth=3,
        decoder_embed_dim=16,
        decoder_depth=2,
    )
    patch, length, masked, thrown, images = 5, 24, 9, 7, c["batch"]
    state = learning(draw.encoder(sizes) | draw.decoder(sizes, 3 * patch**2))

    whole = draw.normal(images, 3, *c["img"])
    tokens = slow.embed(whole, state, patch) + state["pos_embed"][:, 1:]
    tokens = torch.cat([state["cls_token"].expand(images, -1, -1), tokens], dim=1)
    _, shares = slow.blocks(tokens, state, "blocks", c["heads"], EPS)
    looked = slow.stretched(shares[:, :, 0, 1:]).detach()
    boxes = [[60, 47, 11, 3, 40, 31, True], [33, 90, 0, 12, 33, 66, False]]
    cells = looked.reshape(images, 4, 6)
    area = [slow.area_weights(own, box).flatten() for own, box in zip(cells, boxes, strict=True)]
    tensors = named("sd.", state) | {
        "probe.images": whole,
        "probe.attn_last": shares,
        "probe.map": cells,
    }
    tensors |= {"align.boxes": torch.tensor(boxes), "align.area_token_weights": torch.stack(area)}

    crops, pixels = draw.normal(images, 3, *c["img"]), draw.uniform(images, 1, *c["img"])
    weights = slow.channels_first(pixels, patch).sum(dim=-1).float().double()
    noise = -torch.log(1 - draw.uniform(images, length)).float().double()
    order = (weights / noise).argsort(dim=1, descending=True)
    roles = thrown_masks(order, masked, thrown)
    everything = slow.embed(crops, state, patch) + state["pos_embed"][:, 1:]
    latent = run_encoder(slow.rows_of(everything, order[:, masked + thrown :]), state, c["heads"])
    kept = numbers_where(roles, (0, 1))
    pred = decode(latent, order[:, masked + thrown :], kept, state, c["dheads"])
    target = slow.rows_of(slow.standardised(slow.channels_last(crops, patch)), kept)
    per_patch = ((pred - target) ** 2).mean(dim=-1)
    hidden = slow.rows_of(roles, kept) == 1
    loss = per_patch[hidden].mean()
    names = [
        "blocks.1.attn.proj.weight",
        "mask_token",
        "decoder_blocks.0.mlp.fc1.bias",
        "norm.weight",
    ]
    tensors |= named(
        "amt.",
        dict(
            images=crops,
            pixel_map=pixels,
            token_weights=weights,
            exp_noise=noise,
            ids_shuffle=order,
        )
        | dict(
            ids_restore=order.argsort(dim=1),
            mask=roles,
            latent=latent,
            pred=pred,
            target_kept=target,
        )
        | dict(patch_loss_kept=per_patch, loss=loss.reshape(1))
        | gradients(loss, state, names, "grad."),
    )

    tensors |= named("warm.", at_random(draw.uniform(images, length), crops, state, c))
    derived = dict(L=length, masked=masked, thrown=thrown, visible=length - masked - thrown)
    save(
        folder,
        "amt",
        dict(method="amt", config=c | dict(grads=names), derived=derived, source=SOURCE),
        tensors,
    )


def at_random(
    noise: Tensor, crops: Tensor, state: dict[str, Tensor], c: dict[str, Any]
) -> dict[str, Tensor]:
    """The random phase, which is MAE's: a quarter of the patches stays visible, as published."""
    order, shown = noise.argsort(dim=1), noise.shape[1] // 4
    everything = slow.embed(crops, state, c["patch"]) + state["pos_embed"][:, 1:]
    latent = run_encoder(slow.rows_of(everything, order[:, :shown]), state, c["heads"])
    all_patches = torch.arange(noise.shape[1]).expand(len(noise), -1)
    pred = decode(latent, order[:, :shown], all_patches, state, c["dheads"])
    mask = (order.argsort(dim=1) >= shown).double()
    target = slow.standardised(slow.channels_last(crops, c["patch"]))
    loss = (((pred - target) ** 2).mean(dim=-1) * mask).sum() / mask.sum()
    found = dict(noise=noise, mask=mask, ids_restore=order.argsort(dim=1), latent=latent, pred=pred)
    return (
        found
        | dict(loss=loss.reshape(1))
        | gradients(loss, state, ["decoder_embed.weight"], "grad.")
    )


def decode(
    latent: Tensor, seen: Tensor, kept: Tensor, state: dict[str, Tensor], heads: int
) -> Tensor:
    """Predictions of the patches in ``kept``, where those that are not ``seen`` are mask tokens."""
    narrow = slow.linear(latent, state, "decoder_embed")
    table, images = state["decoder_pos_embed"], []
    for image in range(len(latent)):
        tokens = {place: narrow[image, 1 + i] for i, place in enumerate(seen[image].tolist())}
        row = [
            tokens.get(place, state["mask_token"][0, 0]) + table[0, 1 + place]
            for place in kept[image].tolist()
        ]
        images.append(torch.stack([narrow[image, 0], *row]))
    return run_decoder(torch.stack(images), state, heads)[:, 1:]


def beit_state(
    draw: Drawing, c: dict[str, Any], *, positions: bool, tables: bool
) -> dict[str, Tensor]:
    """SimMIM's weights: layer scale, and absolute positions, a relative table a block, or both."""
    width, patch = c["dim"], c["patch"]
    rows, columns = (side // patch for side in c["img"])
    state = {
        "cls_token": draw.normal(1, 1, width, scale=0.3),
        "mask_token": draw.normal(1, 1, width, scale=0.3),
    }
    if positions:
        state["pos_embed"] = draw.normal(1, 1 + rows * columns, width, scale=0.3)
    state |= draw.linear("patch_embed.proj", 3 * patch**2, width, shape=(width, 3, patch, patch))
    state |= draw.blocks("blocks", width, c["depth"], qkv="qv") | draw.norm("norm", width)
    for block in range(c["depth"]):
        state |= {f"blocks.{block}.gamma_{i}": draw.normal(width, scale=0.5) for i in (1, 2)}
        if tables:
            size = (2 * rows - 1) * (2 * columns - 1) + 3
            state[f"blocks.{block}.attn.relative_position_bias_table"] = draw.normal(
                size, c["heads"], scale=0.2
            )
    state = named("encoder.", state)
    return state | draw.linear("decoder.0", width, 3 * patch**2, shape=(3 * patch**2, width, 1, 1))


def run_beit(
    patches: Tensor, state: dict[str, Tensor], c: dict[str, Any], index: Tensor | None
) -> Tensor:
    """Patch tokens, positions added, after all blocks and the norm, the class token left out."""
    inner = {
        name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")
    }
    start = inner["cls_token"] + inner.get("pos_embed", torch.zeros(1, 1, 1))[:, :1]
    tokens = torch.cat([start.expand(len(patches), -1, -1), patches], dim=1)
    for block in range(c["depth"]):
        bias = None
        if index is not None:
            bias = inner[f"blocks.{block}.attn.relative_position_bias_table"][index].permute(
                2, 0, 1
            )
        tokens, _ = slow.block(tokens, inner, f"blocks.{block}", c["heads"], EPS, bias=bias)
    return slow.layer_norm(tokens, inner, "norm", EPS)[:, 1:]


def folded(values: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """Patches (B, L, C * p * p) as pictures (B, C, rows * p, columns * p)."""
    blocks = values.reshape(len(values), rows, columns, 3, patch, patch)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(len(values), 3, rows * patch, columns * patch)


def in_units(units: Tensor, columns: int, side: int, unit_columns: int) -> Tensor:
    """The role of every patch from that of its unit, (B, U) -> (B, L); a unit has ``side`` patches
    a side.
    """
    rows = units.shape[1] // unit_columns * side
    places = [
        row // side * unit_columns + column // side
        for row in range(rows)
        for column in range(columns)
    ]
    return units[:, places]


def absolute_loss(pred: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Over the pixels of hidden patches: the sum, divided by their number in one channel and by the
    channels.
    """
    pixels = int(hidden.sum()) * pred.shape[-1] // 3
    return (pred - target).abs()[hidden].sum() / (pixels + 1e-5) / 3


def amt_simmim(folder: Path) -> None:
    draw = Drawing(5)
    c = dict(
        img=[24, 24],
        patch=4,
        mask_patch=8,
        mask_ratio=0.3,
        throw_ratio=0.4,
        dim=20,
        depth=3,
        heads=2,
        batch=3,
    )
    c |= dict(mlp_ratio=RATIO)
    state = learning(beit_state(draw, c, positions=True, tables=False))
    state["encoder.pos_embed"].requires_grad_()
    images, pixels = draw.normal(3, 3, 24, 24), draw.uniform(3, 1, 24, 24)
    unit_weights = slow.channels_first(pixels, 8).sum(dim=-1).float().double()
    noise = -torch.log(1 - draw.uniform(3, 9)).float().double()
    order = (unit_weights / noise).argsort(dim=1, descending=True)
    masked, thrown = math.ceil(9 * 0.3), math.ceil(9 * 0.4)
    roles = in_units(thrown_masks(order, masked, thrown), 6, 2, 3)
    kept = numbers_where(roles, (0, 1))
    tokens = slow.embed(images, state, 4, "encoder.patch_embed.proj")
    tokens = torch.where((roles == 1)[..., None], state["encoder.mask_token"], tokens)
    tokens = slow.rows_of(tokens + state["encoder.pos_embed"][:, 1:], kept)
    latent = run_beit(tokens, state, c, None)
    pred, target = (
        slow.linear(latent, state, "decoder.0"),
        slow.rows_of(slow.channels_first(images, 4), kept),
    )
    loss = absolute_loss(pred, target, slow.rows_of(roles, kept) == 1)
    side = math.isqrt(
        kept.shape[1]
    )  # 9 - 3 - 4 = 2 units of 4 patches are visible, 3 masked: no square, so a line
    rows, columns = (side, side) if side**2 == kept.shape[1] else (kept.shape[1], 1)
    tensors = named("sd.", state) | dict(
        images=images, pixel_map=pixels, unit_weights=unit_weights, unit_order=order
    )
    tensors |= dict(unit_exp_noise=noise, mask=roles.reshape(3, 6, 6).long(), loss=loss.reshape(1))
    tensors["latent_map"] = latent.transpose(1, 2).reshape(3, 20, rows, columns)
    tensors["recon_compact"] = folded(pred, rows, columns, 4)
    tensors["patch_l1_kept"] = (pred - target).abs().mean(dim=-1)
    names = [
        "encoder.mask_token",
        "encoder.blocks.2.attn.v_bias",
        "encoder.blocks.1.gamma_2",
        "decoder.0.weight",
    ]
    tensors |= gradients(loss, state, names, "grad.")
    derived = dict(
        grid=6, units=3, masked_units=masked, thrown_units=thrown, kept_tokens=kept.shape[1]
    )
    meta = dict(
        method="amt", flavour="SimMIM", config=c, derived=derived, eps_layernorm=EPS, source=SOURCE
    )
    save(folder, "amt_simmim", meta, tensors)


def simmim(folder: Path) -> None:
    draw = Drawing(6)
    c = dict(img=[12, 24], patch=3, mask_patch=6, mask_ratio=0.5, dim=24, depth=2, heads=4, batch=2)
    c |= dict(init_values=0.3, ape=True, rpb=True, shared_rpb=False, mlp_ratio=RATIO)
    state = learning(beit_state(draw, c, positions=True, tables=True))
    state["encoder.pos_embed"].requires_grad_()
    images, index = draw.normal(2, 3, 12, 24), slow.relative_index(4, 8)
    drawn = torch.stack([torch.randperm(8, generator=draw.generator) for _ in range(2)])
    mask = in_units(thrown_masks(drawn, 4, 0), 8, 2, 4)
    patches = slow.embed(images, state, 3, "encoder.patch_embed.proj")
    tokens = torch.where((mask == 1)[..., None], state["encoder.mask_token"], patches)
    latent = run_beit(tokens + state["encoder.pos_embed"][:, 1:], state, c, index)
    pred, target = slow.linear(latent, state, "decoder.0"), slow.channels_first(images, 3)
    loss = absolute_loss(pred, target, mask == 1)
    tensors = named("sd.", state) | dict(
        images=images, unit_perm=drawn, mask=mask.reshape(2, 4, 8).long()
    )
    tensors |= dict(patch_tokens=patches, tokens_after_mask=tokens, loss=loss.reshape(1))
    tensors["latent_map"] = latent.transpose(1, 2).reshape(2, 24, 4, 8)
    tensors |= dict(
        recon=folded(pred, 4, 8, 3), patch_l1=(pred - target).abs().mean(dim=-1).reshape(2, 4, 8)
    )
    for block in range(2):
        tensors[f"sd.encoder.blocks.{block}.attn.relative_position_index"] = index
    table = "encoder.blocks.1.attn.relative_position_bias_table"
    names = [
        "encoder.pos_embed",
        table,
        "encoder.blocks.0.gamma_1",
        "decoder.0.bias",
        "encoder.mask_token",
    ]
    tensors |= gradients(loss, state, names, "grad.")
    derived = dict(grid=[4, 8], units=[2, 4], scale=2, masked_units=4, masked_tokens=16)
    meta = dict(
        method="simmim",
        config=c | dict(grads=names),
        derived=derived,
        eps_layernorm=EPS,
        source=SOURCE,
    )
    save(folder, "simmim", meta, tensors)

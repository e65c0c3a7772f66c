"""Vectors of MAE: oblong images, large patches, no biases in attention, another eps."""

from __future__ import annotations

from pathlib import Path

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


def mae(folder: Path) -> None:
    draw = Drawing(1)
    c = dict(
        img_size=[24, 40], patch_size=8, embed_dim=40, depth=3, num_heads=5, batch=3, mask_ratio=0.6
    )
    c |= dict(decoder_embed_dim=24, decoder_depth=2, decoder_num_heads=3)
    eps, patch, heads = 1e-5, c["patch_size"], c["decoder_num_heads"]
    state = learning(draw.encoder(c, qkv="none") | draw.decoder(c, 3 * patch**2, qkv="none"))
    images, noise = draw.normal(c["batch"], 3, *c["img_size"]), draw.uniform(c["batch"], 15)
    shuffle = noise.argsort(dim=1, stable=True)
    restore, keep = shuffle.argsort(dim=1), shuffle[:, :6]
    mask = torch.ones(c["batch"], 15, dtype=torch.float64)
    for row, kept in zip(mask, keep, strict=True):
        row[kept] = 0
    entered = slow.rows_of(slow.embed(images, state, patch) + state["pos_embed"][:, 1:], keep)
    start = (state["cls_token"] + state["pos_embed"][:, :1]).expand(c["batch"], -1, -1)
    latent = run_encoder(entered, state, c["num_heads"], eps)
    narrow = slow.linear(latent, state, "decoder_embed")
    missing = state["mask_token"].expand(c["batch"], 15 - 6, -1)
    seen = slow.rows_of(torch.cat([narrow[:, 1:], missing], dim=1), restore)
    tokens = torch.cat([narrow[:, :1], seen], dim=1) + state["decoder_pos_embed"]
    pred = run_decoder(tokens, state, heads, eps)[:, 1:]
    tensors = named("state.", state) | dict(
        imgs=images, noise=noise, mask=mask, ids_keep=keep, ids_restore=restore
    )
    tensors |= dict(
        encoder_input=torch.cat([start, entered], dim=1),
        latent=latent,
        decoder_input=tokens,
        pred=pred,
    )
    scalars = {}
    for kind in ("pix", "normpix"):
        target = slow.channels_last(images, patch)
        target = slow.standardised(target) if kind == "normpix" else target
        per_patch = ((pred - target) ** 2).mean(dim=-1)
        loss = (per_patch * mask).sum() / mask.sum()
        scalars[f"{kind}.loss"] = loss.item()
        tensors |= {f"{kind}.target": target, f"{kind}.loss_per_patch": per_patch}
        names = [
            "patch_embed.proj.bias",
            "blocks.2.attn.qkv.weight",
            "mask_token",
            "decoder_blocks.1.mlp.fc1.weight",
        ]
        tensors |= gradients(loss, state, names, f"{kind}.grad.")
    meta = dict(
        method="mae",
        config=c,
        num_patches=15,
        len_keep=6,
        mlp_ratio=RATIO,
        norm_eps=eps,
        qkv_bias=False,
    )
    save(folder, "mae", meta | dict(source=SOURCE, scalars=scalars), tensors)

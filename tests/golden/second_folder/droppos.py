"""Vectors of DropPos: oblong images, other temperature and weight, cases that combine options."""

from __future__ import annotations

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
    run_encoder,
    save,
)
from torch import Tensor

EPS, LENGTH, VISIBLE, KEPT = 1e-5, 32, 12, 4  # int(32 * 0.375), int(12 * 0.4)


def run_head(
    tokens: Tensor, state: dict[str, Tensor], prefix: str, heads: int
) -> tuple[Tensor, Tensor]:
    """Blocks and norm, then the linear head behind them."""
    tokens, _ = slow.blocks(tokens, state, f"{prefix}decoder_blocks", heads, EPS)
    seen = slow.layer_norm(tokens, state, f"{prefix}decoder_norm", EPS)
    return seen, slow.linear(seen, state, f"{prefix}decoder_pred")


FLAGS: dict[str, tuple[dict[str, Any], str]] = {
    "bare": ({}, "sigma0"),
    "looking": (dict(attn_guide=True), "epoch"),
    "as run": (dict(attn_guide=True), "mis"),
    "two tasks": (dict(multi_task=True), "zero"),
    "both, sure ones left out": (dict(multi_task=True, attn_guide=True, conf_ignore=True), "epoch"),
    "others' places": (dict(mask_token_type="wrong_pos", attn_guide=True), "sigma0"),
    "nothing instead": (dict(mask_token_type="zeros"), "epoch"),
    "seen in another order": (dict(shuffle=True), "sigma0"),
}


def droppos(folder: Path) -> None:
    """Write the files of DropPos."""
    draw = Drawing(7)
    c = dict(
        img_size=[16, 32],
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=4,
        batch=2,
        mask_ratio=0.625,
    )
    c |= dict(
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=4,
        pos_mask_ratio=0.6,
        sigma0=1.5,
        epoch=2,
    )
    c |= dict(
        epochs=8, pos_weight=0.2, compat_grid=7, norm_eps=EPS, norm_pix_loss=False, temperature=0.25
    )
    c |= dict(mlp_ratio=RATIO)
    weights, images = drawn(draw, c), draw.normal(2, 3, *c["img_size"])
    first, second = draw.uniform(2, LENGTH), draw.uniform(2, VISIBLE)
    shuffle = draw.uniform(2, VISIBLE)
    masking = both_masks(first, second) | dict(seen=shuffle.argsort(dim=1))
    tensors = named("weights/", weights) | named(
        "masking/", {name: t for name, t in masking.items() if name != "seen"}
    )
    tensors |= dict(images=images, noise_patch=first, noise_pos=second, noise_shuffle=shuffle)

    at_epoch = 1.5 * (1 - 2 / 8)
    maps = {"zero": slow.smoothing(4, 8, 0), "sigma0": slow.smoothing(4, 8, 1.5)}
    maps |= {"epoch": slow.smoothing(4, 8, at_epoch), "mis": slow.smoothing(7, 7, at_epoch)}
    tensors |= {
        "smooth/sigma0": maps["sigma0"],
        "smooth/sigma_epoch": maps["epoch"],
        "smooth/compat_grid": maps["mis"],
    }
    whole = slow.smoothing(6, 6, 0.8)
    tensors |= {f"smooth6/sigma0.8_row{row}": whole[row] for row in (0, 20)}
    tensors |= {
        "smooth6/sigma0.8_rowsum": whole.sum(dim=1),
        "smooth6/sigma0.8_colsum": whole.sum(dim=0),
    }

    cases, scalars = [], {"sigma_epoch": at_epoch}
    for name, (options, sigma) in FLAGS.items():
        smoothed = maps[sigma][:LENGTH, :LENGTH]
        found, scalars[name] = Case(draw, options, c, learning(weights), images, masking).run(
            smoothed
        )
        tensors |= named(f"{name}/", {key: t for key, t in found.items() if key != "full_feat"})
        tensors["full_feat"] = found.get("full_feat", tensors.get("full_feat"))
        grads = [key.removeprefix("grad/") for key in found if key.startswith("grad/")]
        cases.append(dict(name=name, flags=options, sigma=sigma, grads=grads))
    derived = dict(L=LENGTH, visible=VISIBLE, kept_pos=KEPT, dropped_pos=VISIBLE - KEPT)
    meta = dict(
        method="DropPos", config=c, derived=derived, cases=cases, scalars=scalars, reference=SOURCE
    )
    save(folder, "droppos", meta, {name: t for name, t in tensors.items() if t is not None})


def drawn(draw: Drawing, c: dict[str, Any]) -> dict[str, Tensor]:
    """Weights for both tasks."""
    weights = draw.encoder(c) | {"mask_pos_token": draw.normal(1, 1, 24, scale=0.3)}
    decoder, pixels = draw.decoder(c, LENGTH), draw.decoder(c, 48)
    weights |= {
        name: t for name, t in decoder.items() if name not in ("mask_token", "decoder_pos_embed")
    }
    weights |= {f"aux_{name}": t for name, t in pixels.items() if name != "mask_token"}
    return weights | {"mask_token": pixels["mask_token"]}


def both_masks(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """Which patches are visible, and which of those keep their position."""
    shuffle, restore_pos = first.argsort(dim=1), second.argsort(dim=1).argsort(dim=1)
    keep = shuffle[:, :VISIBLE]
    return dict(
        ids_keep=keep,
        ids_restore=shuffle.argsort(dim=1),
        ids_keep_pos=second.argsort(dim=1)[:, :KEPT],
        ids_restore_pos=restore_pos,
        mask=(shuffle.argsort(dim=1) >= VISIBLE).double(),
        mask_pos=(restore_pos >= KEPT).double(),
        labels=keep,
    )


class Case:
    """Everything that is stored of one case, worked out step by step."""

    def __init__(
        self,
        draw: Drawing,
        options: dict[str, Any],
        c: dict[str, Any],
        state: dict[str, Tensor],
        images: Tensor,
        masking: dict[str, Tensor],
    ) -> None:
        self.draw, self.options, self.c, self.state, self.images = draw, options, c, state, images
        self.masking, self.keep, self.lost = (
            masking,
            masking["ids_keep"],
            masking["mask_pos"].bool(),
        )
        self.found: dict[str, Tensor] = {}

    def run(self, smoothed: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The tensors and the scalars of the case."""
        names = ["patch_embed.proj.weight", "decoder_embed.weight", "cls_token"]
        names += (
            ["mask_pos_token"] if self.options.get("mask_token_type", "param") == "param" else []
        )
        logits = self.locate()
        targets = smoothed[self.keep]
        entropies = -(targets * logits.log_softmax(dim=-1)).sum(dim=-1)
        counts = self.weigh(logits, smoothed)
        self.found |= dict(labels_smooth=targets, ce_per_token=entropies, weight_per_token=counts)
        total = loss = (counts * entropies).sum() / counts.sum()
        right = (logits.argmax(dim=-1) == self.keep).double()
        weighted = ((counts * right).sum() / counts.sum()).item()
        scalars = dict(
            loss=loss.item(), acc_reported=weighted, acc_unweighted=right[self.lost].mean().item()
        )
        if self.options.get("multi_task"):
            pixels = self.paint()
            total = self.c["pos_weight"] * loss + pixels
            scalars |= dict(loss_mae=pixels.item(), loss_total=total.item())
            names += ["mask_token", "aux_decoder_blocks.0.mlp.fc2.weight"]
        return self.found | gradients(total, self.state, names, "grad/"), scalars

    def locate(self) -> Tensor:
        """Logits over all places for every visible token."""
        table = slow.rows_of(self.state["pos_embed"][:, 1:].expand(2, -1, -1), self.keep)
        own = torch.where(self.lost[..., None], self.instead(table), table)
        tokens = slow.rows_of(slow.embed(self.images, self.state, 4), self.keep) + own
        start = (self.state["cls_token"] + self.state["pos_embed"][:, :1]).expand(2, -1, -1)
        order = (
            self.masking["seen"]
            if self.options.get("shuffle")
            else torch.arange(VISIBLE).expand(2, -1)
        )
        tokens = slow.rows_of(tokens, order)
        latent = run_encoder(tokens, self.state, 4, EPS)
        narrow = slow.linear(latent, self.state, "decoder_embed")
        if self.options.get("conf_ignore"):  # one token is made sure of its place
            bias = self.state["decoder_pred.bias"].detach().clone()
            bias[self.keep[0][self.lost[0]][0]] += 8
            self.found["decoder_pred.bias"] = self.state["decoder_pred.bias"] = (
                bias.float().double()
            )
        seen, logits = run_head(narrow, self.state, "", 4)
        entered = torch.cat([start, tokens], dim=1)
        self.found |= dict(
            enc_in=entered, latent=latent, decoder_embed_out=narrow, decoder_norm_out=seen
        )
        self.found["logits"] = slow.rows_of(logits[:, 1:], order.argsort(dim=1))
        return self.found["logits"]

    def instead(self, table: Tensor) -> Tensor:
        """What tokens get that lose their position."""
        kind, instead = self.options.get("mask_token_type", "param"), torch.zeros_like(table)
        if kind == "param":
            return self.state["mask_pos_token"].expand_as(table)
        if kind == "wrong_pos":
            permutation = torch.randperm(VISIBLE - KEPT, generator=self.draw.generator)
            self.found["perm_dropped"] = permutation
            by_rank = self.masking["ids_restore_pos"].argsort(dim=1)[:, KEPT:]
            for image in range(2):
                for slot, other in zip(by_rank[image], by_rank[image][permutation], strict=True):
                    instead[image, slot] = table[image, other]
        return instead

    def weigh(self, logits: Tensor, smoothed: Tensor) -> Tensor:
        """How much every visible token counts."""
        counts = self.lost.double()
        if self.options.get("attn_guide"):
            patches = slow.embed(self.images, self.state, 4) + self.state["pos_embed"][:, 1:]
            features = run_encoder(patches, self.state, 4, EPS).detach()
            whole, patches = features[:, :1], features[:, 1:]
            cosine = (whole * patches).sum(dim=-1) / (whole.norm(dim=-1) * patches.norm(dim=-1))
            everywhere = (cosine / self.c["temperature"]).softmax(dim=-1)
            attention = slow.rows_of(everywhere, self.keep)
            attention = attention / attention.sum(dim=1, keepdim=True)
            self.found |= dict(full_feat=features, attn_full=everywhere, attn_visible=attention)
            counts = counts * attention
        if self.options.get("conf_ignore"):
            sure = logits.softmax(dim=-1).gather(2, self.keep[..., None])[..., 0].detach()
            least = smoothed.diagonal()[self.keep]
            self.found |= dict(conf=sure, conf_thresh=least)
            counts = counts * (sure < least)
            assert (counts[self.lost] == 0).any()
        return counts

    def paint(self) -> Tensor:
        """The loss of the second task, which is MAE's."""
        narrow = slow.linear(self.found["latent"], self.state, "aux_decoder_embed")
        missing = self.state["mask_token"].expand(2, LENGTH - VISIBLE, -1)
        filled = slow.rows_of(
            torch.cat([narrow[:, 1:], missing], dim=1), self.masking["ids_restore"]
        )
        filled = torch.cat([narrow[:, :1], filled], dim=1) + self.state["aux_decoder_pos_embed"]
        pred = run_head(filled, self.state, "aux_", 4)[1][:, 1:]
        per_patch = ((pred - slow.channels_last(self.images, 4)) ** 2).mean(dim=-1)
        self.found |= dict(mae_pred=pred, mae_loss_per_patch=per_patch)
        mask = self.masking["mask"]
        return (per_patch * mask).sum() / mask.sum()

"""Vectors of HPM: other epochs and counts, gradients of raw pixels."""

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
    run_decoder,
    run_encoder,
    save,
)
from torch import Tensor

LENGTH, SHOWN, PATCH, HEADS, DECODER_HEADS = 24, 7, 5, 2, 4
EPOCHS = {4: (0, 500), 5: (150, 300), 6: (299, 300)}  # number of a case: epoch, epochs
STEP = 5  # the case whose mask the student gets
OBJECTIVES = {"rel": slow.ranking, "abs": slow.absolute_ranking}


def hpm(folder: Path) -> None:
    """Write the files of HPM."""
    draw = Drawing(2)
    c = dict(
        img_size=[30, 20],
        patch_size=PATCH,
        embed_dim=24,
        depth=2,
        num_heads=HEADS,
        batch=3,
        mask_ratio=0.7,
    )
    c |= dict(
        decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=DECODER_HEADS, grad_normpix=False
    )
    student = draw.encoder(c) | draw.decoder(c, 3 * PATCH**2)
    student |= draw.blocks("decoder_blocks_losspred", 16, 2) | draw.norm(
        "decoder_norm_losspred", 16
    )
    student |= draw.linear("decoder_pred_losspred", 16, 3 * PATCH**2)
    learned = {name: t for name, t in student.items() if not name.endswith("pos_embed")}
    teacher = {
        name: (t + draw.normal(*t.shape, scale=0.02)).float().double()
        for name, t in learned.items()
    }
    images = draw.normal(c["batch"], 3, *c["img_size"])

    tensors = named("state.", student) | named("ema.", teacher) | dict(imgs=images)
    tensors |= look(
        images, teacher | {name: student[name] for name in ("pos_embed", "decoder_pos_embed")}
    )
    cases, masks = mask_cases(draw, tensors["teacher.loss_pred"])
    tensors |= masks | dict(mask=masks[f"maskgen.{STEP}.mask"])
    masked = numbers_where(tensors["mask"], 1)
    tensors |= step(images, tensors["mask"], learning(student))

    alone, scalars = objectives(draw, masked)
    decay = 0.999 + 70 / 100 * 0.0009
    for name in ("norm.weight", "decoder_pred_losspred.bias"):
        alone[f"emaupdate.epoch70.{name}"] = decay * teacher[name] + (1 - decay) * student[name]
    scalars["ema_decay"] = {"10": 0.99909, "70": 0.99963, "400": 0.9999}
    meta = dict(
        method="hpm",
        config=c,
        num_patches=LENGTH,
        len_keep=SHOWN,
        num_masked=LENGTH - SHOWN,
        mlp_ratio=RATIO,
    )
    meta |= dict(mask_cases=cases, step_uses_mask_case=STEP, source=SOURCE, scalars=scalars)
    save(folder, "hpm", meta, tensors | alone)


def numbers_where(mask: Tensor, value: int) -> Tensor:
    return torch.stack([(row == value).nonzero()[:, 0] for row in mask])


def look(images: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the teacher makes of the whole image."""
    features = run_encoder(
        slow.embed(images, state, PATCH) + state["pos_embed"][:, 1:], state, HEADS
    )
    tokens = slow.linear(features, state, "decoder_embed") + state["decoder_pos_embed"]
    hardness = run_decoder(tokens, state, DECODER_HEADS, kind="_losspred")[:, 1:].mean(dim=-1)
    return {"teacher.features": features, "teacher.loss_pred": hardness}


def mask_cases(draw: Drawing, hardness: Tensor) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The hardest are masked, more of them epoch by epoch, and the visible ones are drawn among the
    rest.
    """
    cases, tensors = [], {}
    for name, (epoch, epochs) in EPOCHS.items():
        hard = int((LENGTH - SHOWN) * (epoch + 1) / epochs * 0.5)
        order = hardness.argsort(dim=1)
        if hard == 0:
            noise = draw.normal(*hardness.shape)
            tensors[f"maskgen.{name}.noise"] = noise
            visible = noise.argsort(dim=1)[:, :SHOWN]
        else:
            rest = torch.stack(
                [
                    row[torch.randperm(len(row), generator=draw.generator)]
                    for row in order[:, :-hard]
                ]
            )
            tensors |= {f"maskgen.{name}.perm": rest}
            tensors |= {f"maskgen.{name}.top_ids_sorted": order[:, -hard:].sort(dim=1).values}
            visible = rest[:, :SHOWN]
        mask = torch.ones_like(hardness)
        for row, seen in zip(mask, visible, strict=True):
            row[seen] = 0
        tensors[f"maskgen.{name}.mask"] = mask
        cases.append(
            dict(
                case=name,
                epoch=epoch,
                total_epochs=epochs,
                len_loss=hard,
                len_keep=SHOWN,
                random=hard == 0,
            )
        )
    return cases, tensors


def step(images: Tensor, mask: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both decoders of the student, its losses and gradients."""
    visible, masked = numbers_where(mask, 0), numbers_where(mask, 1)
    patches = slow.embed(images, state, PATCH) + state["pos_embed"][:, 1:]
    latent = run_encoder(slow.rows_of(patches, visible), state, HEADS)
    narrow, table = slow.linear(latent, state, "decoder_embed"), state["decoder_pos_embed"][:, 1:]
    table = table.expand(len(images), -1, -1)
    parts = [narrow[:, :1], narrow[:, 1:] + slow.rows_of(table, visible)]
    entered = torch.cat([*parts, state["mask_token"] + slow.rows_of(table, masked)], dim=1)
    pred = run_decoder(entered, state, DECODER_HEADS)[:, 1:]
    guessed = run_decoder(entered, state, DECODER_HEADS, kind="_losspred")[:, 1:].mean(dim=-1)
    found = {"student.latent": latent, "student.decoder_input": entered, "student.pred": pred}
    found["student.loss_pred"] = guessed
    for kind in ("pix", "normpix"):
        target = slow.channels_last(images, PATCH)
        target = slow.rows_of(slow.standardised(target) if kind == "normpix" else target, masked)
        error = ((pred[:, SHOWN:] - target) ** 2).mean(dim=-1)
        found |= {f"{kind}.rec_matrix": error, f"{kind}.rec_loss": error.mean().reshape(1)}
        for objective, loss_of in OBJECTIVES.items():
            loss = loss_of(guessed[:, SHOWN:], error.detach())
            total = error.mean() + loss
            found |= {
                f"{kind}.{objective}.pred_loss": loss.reshape(1),
                f"{kind}.{objective}.total": total.reshape(1),
            }
            if kind == "pix":
                found |= slopes(total, state, f"pix.{objective}.grad.")
    return found


def slopes(total: Tensor, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = ["cls_token", "norm.bias", "decoder_blocks.1.attn.qkv.weight", "decoder_embed.weight"]
    found = gradients(total, state, [*names, "decoder_blocks_losspred.0.mlp.fc2.weight"], prefix)
    (rows,) = torch.autograd.grad(total, [state["decoder_pred_losspred.weight"]], retain_graph=True)
    return found | {f"{prefix}decoder_pred_losspred.weight.row0": rows[0]}


def objectives(draw: Drawing, masked: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The objectives alone, where errors are tied, and features as targets."""
    guessed = draw.normal(2, 13, scale=4).requires_grad_()
    target = draw.uniform(2, 13).mul(6).round()
    tensors, scalars = {"rank.pred": guessed, "rank.target": target}, {}
    for objective, loss_of in OBJECTIVES.items():
        loss = loss_of(guessed, target)
        scalars[f"rank.{objective}.loss"] = loss.item()
        (tensors[f"rank.{objective}.grad"],) = torch.autograd.grad(loss, guessed)
    painted, target = (
        draw.normal(*masked.shape, 11).requires_grad_(),
        draw.normal(len(masked), LENGTH, 11),
    )
    apart = slow.directions_apart(painted, slow.rows_of(target, masked))
    tensors |= {"feat.pred": painted, "feat.target": target, "feat.matrix": apart}
    (tensors["feat.grad"],) = torch.autograd.grad(apart.mean(), painted)
    return tensors, scalars | {"feat.loss": apart.mean().item()}

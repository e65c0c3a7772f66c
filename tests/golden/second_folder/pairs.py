"""Vectors of MOKD and SCFS: other crops, widths, prototypes and weights.

Networks, activations and gradients are patchmine's own, in float32: their purpose is that the tests
read sizes and options from the JSON.  Losses, temperatures, centres, the search and MOKD's step are
worked out by loops from them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from golden_vectors import IMAGENET, tiny_resnet
from second_folder import reference as slow
from second_folder.drawing import Drawing, save
from torch import Tensor, nn

from patchmine.backbones.family import stage_features
from patchmine.methods.mokd import MOKD
from patchmine.methods.scfs import SCFS
from patchmine.models.networks import outputs_of
from patchmine.types import Batch, Progress

SOURCE = (
    "networks, activations and gradients: patchmine, float32; losses, search and step: plain loops"
)


def crops_of(draw: Drawing, c: dict[str, Any]) -> tuple[dict[str, Tensor], Batch]:
    """Stored bytes of every crop, and the batch that a network gets."""
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in IMAGENET)
    stored, views = {}, []
    for number in range(2 + c["n_local"]):
        side = c["global_size"] if number < 2 else c["local_size"]
        pixels = (draw.uniform(c["batch"], 3, side, side) * 256).byte()
        stored[f"in.crop{number}_u8"] = pixels
        views.append((pixels / 255 - mean) / std)
    rows, count = c["batch"], len(views)
    return stored, Batch(
        views, torch.arange(rows), torch.zeros(rows, count, 4), torch.zeros(rows, count).bool()
    )


def perturb(draw: Drawing, method: nn.Module) -> None:
    """Weights of which every one matters, teachers that are not their students, and centres that
    are not 0.
    """
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += draw.normal(*parameter.shape, scale=0.02).float()
        for name, buffer in method.named_buffers():
            if name.endswith(".mean"):
                buffer.copy_(draw.normal(*buffer.shape, scale=0.1))


def warmed(c: dict[str, Any], warmup: int) -> float:
    """A teacher's temperature: linear over the epochs of its warm-up."""
    start, end = c["warmup_teacher_temp"], c["teacher_temp"]
    return end if c["epoch"] >= warmup else start + (end - start) * c["epoch"] / (warmup - 1)


def targets(
    logits: Tensor, centre: Tensor | float, temperature: float, views: int = 2
) -> list[Tensor]:
    return list(((logits.detach().double() - centre) / temperature).softmax(dim=-1).chunk(views))


def rows_apart(student: Tensor, wanted: Tensor) -> float:
    """The mean cross-entropy of every row with the target in the same row."""
    terms = [
        -(t * (s / 0.1).log_softmax(0)).sum()
        for s, t in zip(student.detach().double(), wanted, strict=True)
    ]
    return (sum(terms) / len(terms)).item()


# ---- MOKD ----

ROLES = {
    "partner_teacher.encoder.": "teacher_vit.backbone.",
    "partner_teacher.head.": "teacher_vit.head.",
    "partner_teacher.thead.": "teacher_vit.transhead.",
    "teacher.encoder.": "teacher_cnn.backbone.",
    "teacher.head.": "teacher_cnn.head.",
    "teacher.thead.": "teacher_cnn.transhead.",
    "partner_head.": "student_vit.head.",
    "partner_thead.": "student_vit.transhead.",
    "partner.": "student_vit.backbone.",
    "encoder.": "student_cnn.backbone.",
    "head.": "student_cnn.head.",
    "thead.": "student_cnn.transhead.",
}
STORED = (
    "student_cnn.backbone.conv1.weight",
    "student_cnn.head.last_layer.weight_v",
    "student_cnn.transhead.norm.bias",
)
STORED += (
    "student_vit.backbone.cls_token",
    "student_vit.head.mlp.2.weight",
    "student_vit.transhead.pos_embed",
)


def reference_name(own: str) -> str | None:
    """MOKD's name of one of our tensors."""
    prefix = next((start for start in ROLES if own.startswith(start)), None)
    return None if prefix is None else ROLES[prefix] + own.removeprefix(prefix)


def mokd(folder: Path) -> None:
    draw = Drawing(10)
    torch.manual_seed(10)
    c: dict[str, Any] = dict(
        batch=2, n_local=2, global_size=64, local_size=32, patch=8, cnn_channels=[6, 8, 10, 12]
    )
    c |= dict(
        vit_dim=16,
        vit_depth=1,
        vit_heads=2,
        thead_depth=1,
        thead_heads=4,
        out_dim=20,
        head_hidden=24,
    )
    c |= dict(
        head_bottleneck=12, epoch=2, epochs=50, warm_cnn=20, warm_vit=10, warmup_teacher_temp=0.06
    )
    c |= dict(teacher_temp=0.09, lambda_cnn=0.7, lambda_vit=0.4)
    c["step"] = dict(
        lr_cnn=0.02, wd_cnn=1e-3, lr_vit=1e-3, wd_vit=0.1, clip=0.5, freeze_last_layer=3, ema=0.99
    )
    vit = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    sizes = {
        name: c[name]
        for name in ("out_dim", "head_hidden", "head_bottleneck", "thead_depth", "thead_heads")
    }
    temperatures = dict(teacher_temp_start=0.06, teacher_temp_end=0.09, cnn_temp_warmup_epochs=20)
    config = MOKD.Config(
        partner_model="vit_tiny_patch16_224",
        partner_args=vit,
        cross_weight=0.7,
        partner_cross_weight=0.4,
        vit_temp_warmup_epochs=10,
        drop_path=0,
        **sizes,
        **temperatures,
    )
    method = MOKD(config, tiny_resnet(c["cnn_channels"], 64)).train()
    perturb(draw, method)
    before = {name: t.clone() for name, t in method.state_dict().items()}
    tensors, batch = crops_of(draw, c)
    tensors |= {reference_name(name): t for name, t in before.items() if reference_name(name)}
    seen = activations(method, batch, c)
    tensors |= {f"act.{name}": t for name, t in seen.items()}
    centres = {"cnn_m": "head", "cnn_t": "thead", "vit_m": "partner_head", "vit_t": "partner_thead"}
    old = {name: before[f"centres.{own}.mean"] for name, own in centres.items()}
    new = {name: 0.9 * centre + 0.1 * seen[f"t_{name}"].mean(dim=0) for name, centre in old.items()}
    tensors |= {f"center_before.{name}": centre[None] for name, centre in old.items()}
    tensors |= {f"center_after.{name}": centre[None] for name, centre in new.items()}
    tensors |= {
        "center_after.cnn_cm": new["vit_m"][None],
        "center_after.vit_cm": new["cnn_m"][None],
    }

    method.load_state_dict(before)
    method(batch, Progress(2, 50, 1))["loss"].backward()
    own = {reference_name(name): name for name in before if reference_name(name)}
    slopes = {name: method.get_parameter(own[name]).grad for name in STORED}
    tensors |= {f"grad.{name}": slope for name, slope in slopes.items()}
    tensors |= {f"step.{name}": moved for name, moved in stepped(slopes, tensors, c).items()}
    for name in ("student_cnn.backbone.bn1.running_mean", "teacher_cnn.backbone.bn1.running_var"):
        tensors[f"bn_after.{name}"] = method.state_dict()[own[name]]
    warm = {
        name: warmed(c, 20 if name in ("cnn_m", "cnn_t") else 10)
        for name in (*centres, "cnn_cm", "search")
    }
    meta = dict(
        method="MOKD",
        config=c,
        teacher_temp_at_epoch=warm,
        losses=mokd_losses(seen, old, c),
        source=SOURCE,
    )
    save(folder, "mokd", meta, tensors)


def activations(method: MOKD, batch: Batch, c: dict[str, Any]) -> dict[str, Tensor]:
    large, small = torch.cat(batch.views[:2]), torch.cat(batch.views[2:])
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        networks = list(zip(("cnn", "vit"), method.students(), method.teachers(), strict=True))
        known = {}
        for name, student, teacher in networks:
            mine, local, known[name] = (
                outputs_of(student, large),
                outputs_of(student, small),
                outputs_of(teacher, large),
            )
            seen |= {
                f"s_{name}_m": torch.cat([mine.head, local.head]),
                f"t_{name}_m": known[name].head,
            }
            seen |= {
                f"s_{name}_t": torch.cat([mine.thead, local.thead]),
                f"t_{name}_t": known[name].thead,
            }
            seen[f"s_{name}_query_l"] = student.thead.query(local.pooled)
        for (name, _, teacher), other in zip(networks, ("vit", "cnn"), strict=True):
            queries = seen[f"s_{other}_query_l"].split(
                c["batch"]
            )  # one after the other, of global crop 0 each time
            first = known[name].maps[: c["batch"]]
            seen[f"t_{name}_search_l"] = torch.cat(
                [teacher.thead(first, query) for query in queries]
            )
    return seen


def mokd_losses(
    seen: dict[str, Tensor], centres: dict[str, Tensor], c: dict[str, Any]
) -> dict[str, float]:
    losses, crops = {}, 2 + c["n_local"]
    of_vit = warmed(c, c["warm_vit"])
    for name, other in (("cnn", "vit"), ("vit", "cnn")):
        temperature = warmed(c, c[f"warm_{name}"])
        heads = {part: seen[f"s_{name}_{part}"].double().chunk(crops) for part in "mt"}
        for part in "mt":
            own = targets(seen[f"t_{name}_{part}"], centres[f"{name}_{part}"], temperature)
            losses[f"{name}_s{part}"] = slow.dino(heads[part], own)
        losses[f"{name}_cm"] = slow.dino(
            heads["m"], targets(seen[f"t_{other}_m"], centres[f"{other}_m"], of_vit)
        )
        (found,) = targets(seen[f"t_{other}_search_l"], 0.0, of_vit, views=1)
        losses[f"{name}_ct"] = rows_apart(torch.cat(heads["t"][2:]), found)
        across = losses[f"{name}_cm"] + losses[f"{name}_ct"]
        losses[f"{name}_total"] = (
            losses[f"{name}_sm"] + losses[f"{name}_st"] + c[f"lambda_{name}"] * across
        )
    return losses


def stepped(
    slopes: dict[str, Tensor], state: dict[str, Tensor], c: dict[str, Any]
) -> dict[str, Tensor]:
    """Students after clipping and one step of SGD or AdamW, prototypes frozen, and their teachers
    after it.
    """
    s, moved = c["step"], {}
    for name, slope in slopes.items():
        weight, slope = state[name].double(), slope.double()
        slope = slope * min(1.0, s["clip"] / (slope.norm().item() + 1e-6))
        of_cnn, of_thead = "_cnn." in name, ".transhead." in name
        rate = s["lr_cnn"] if of_cnn and not of_thead else s["lr_vit"]
        decay = s["wd_cnn"] if of_cnn and not of_thead else s["wd_vit"]
        # Biases and norms do not decay, but in the CNN's T-Head, whose optimizer decays everything.
        decay = decay if weight.ndim > 1 or (of_cnn and of_thead) else 0.0
        if "last_layer" in name and c["epoch"] < s["freeze_last_layer"]:
            moved[name] = weight
        elif of_cnn:
            moved[name] = weight - rate * (slope + decay * weight)
        else:
            moved[name] = weight * (1 - rate * decay) - rate * slope / (slope.abs() + 1e-8)
        teacher = name.replace("student", "teacher")
        moved[teacher] = s["ema"] * state[teacher].double() + (1 - s["ema"]) * moved[name]
    return moved


# ---- SCFS ----


def scfs(folder: Path) -> None:
    draw = Drawing(11)
    torch.manual_seed(11)
    c: dict[str, Any] = dict(
        batch=2, n_local=2, global_size=96, local_size=64, channels=[6, 8, 10, 12]
    )
    c |= dict(
        shallow_bottleneck=5,
        shallow_hidden=14,
        shallow_out=9,
        out_dim=30,
        head_hidden=20,
        head_bottleneck=7,
    )
    c |= dict(epoch=3, epochs=40, warm=8, warmup_teacher_temp=0.05, teacher_temp=0.11)
    config = SCFS.Config(
        out_dim=30,
        head_hidden=20,
        head_bottleneck=7,
        stage_out_dim=9,
        stage_hidden=14,
        stage_bottleneck=5,
        teacher_temp_start=0.05,
        teacher_temp_end=0.11,
        teacher_temp_warmup_epochs=8,
    )
    method = SCFS(config, tiny_resnet(c["channels"], 96)).train()
    perturb(draw, method)
    before = {name: t.clone() for name, t in method.state_dict().items()}
    tensors, batch = crops_of(draw, c)
    tensors |= {
        scfs_name(name): t
        for name, t in before.items()
        if not name.endswith("centre.mean") and "centres" not in name
    }
    centres = {"final": before["centre.mean"]} | {
        f"l{i + 2}": before[f"stage_centres.{i}.mean"] for i in range(3)
    }
    tensors |= {f"center_before.{name}": centre[None] for name, centre in centres.items()}
    seen = scfs_activations(method, batch, c)
    after = {
        name: 0.9 * centre
        + 0.1 * seen["act.t_final" if name == "final" else f"oracle.t_{name}_global"].mean(dim=0)
        for name, centre in centres.items()
    }
    tensors |= {f"center_after.{name}": centre[None] for name, centre in after.items()}
    losses = scfs_losses(seen, centres, c)
    tensors |= seen | {
        f"oracle.loss.{name}": torch.tensor(value).double() for name, value in losses.items()
    }
    method.load_state_dict(before)
    method(batch, Progress(3, 40, 1))["loss"].backward()
    for name in (
        "encoder.conv1.weight",
        "head.mlp.0.bias",
        "stage_heads.0.conv2.weight",
        "stage_heads.2.mlp.3.weight",
    ):
        tensors[f"grad.{scfs_name(name).removeprefix('student.')}"] = method.get_parameter(
            name
        ).grad
    meta = dict(
        method="SCFS",
        config=c,
        teacher_temp_at_epoch=warmed(c, 8),
        losses_float64=losses,
        source=SOURCE,
    )
    save(folder, "scfs", meta, tensors)


def scfs_name(own: str) -> str:
    role = "teacher." if own.startswith("teacher.") else "student."
    rest = own.removeprefix("teacher.")
    for start, theirs in {"encoder.": "backbone.model."}.items():
        rest = theirs + rest.removeprefix(start) if rest.startswith(start) else rest
    for stage in range(3):
        rest = rest.replace(f"stage_heads.{stage}.", f"layer{stage + 2}_head.")
    return role + rest


def scfs_activations(method: SCFS, batch: Batch, c: dict[str, Any]) -> dict[str, Tensor]:
    large, small = torch.cat(batch.views[:2]), torch.cat(batch.views[2:])
    stages = ["layer2", "layer3", "layer4"]
    with torch.no_grad():
        known = stage_features(method.teacher.encoder, large, stages)
        mine, local = (
            stage_features(method.encoder, large, stages),
            stage_features(method.encoder, small, stages),
        )
        seen = {"act.t_final": method.teacher.head(known.pooled)}
        seen["act.s_final"] = method.head(torch.cat([mine.pooled, local.pooled]))
        for i, (maps, own, asking) in enumerate(
            zip(known.maps, mine.maps, local.maps, strict=True)
        ):
            stage, head, teacher = f"l{i + 2}", method.stage_heads[i], method.teacher.stage_heads[i]
            seen |= {f"act.fmap_t_{stage}": maps, f"act.fmap_s_local_{stage}": asking}
            seen |= {f"act.s_{stage}_global": head(own), f"act.s_{stage}_local": head(asking)}
            attention = searched(asking.double(), maps.double(), c["batch"])
            found = attention[:, None] * torch.cat([maps[: c["batch"]].double()] * c["n_local"])
            seen |= {f"oracle.att_{stage}": attention, f"oracle.search_fmap_{stage}": found}
            seen |= {
                f"oracle.t_{stage}_global": teacher(maps),
                f"oracle.t_{stage}_search": teacher(found.float()),
            }
    return seen


def searched(asking: Tensor, maps: Tensor, images: int) -> Tensor:
    """The cosine of the mean feature of each local crop with every place of the map of global crop
    0 of its image.
    """
    attention = torch.zeros(len(asking), *maps.shape[2:], dtype=torch.float64)
    for row, crop in enumerate(asking):
        query = crop.mean(dim=(1, 2))
        for y in range(maps.shape[2]):
            for x in range(maps.shape[3]):
                feature = maps[row % images, :, y, x]
                lengths = query.norm() * feature.norm()
                attention[row, y, x] = (query @ feature) / lengths if lengths > 0 else 0.0
    return attention


def scfs_losses(
    seen: dict[str, Tensor], centres: dict[str, Tensor], c: dict[str, Any]
) -> dict[str, float]:
    temperature, crops = warmed(c, c["warm"]), 2 + c["n_local"]
    final = targets(seen["act.t_final"], centres["final"], temperature)
    losses = {"final": slow.dino(seen["act.s_final"].double().chunk(crops), final)}
    total = losses["final"]
    for stage in ("l2", "l3", "l4"):
        own = targets(seen[f"oracle.t_{stage}_global"], centres[stage], temperature)
        losses[f"{stage}_global"] = slow.dino(seen[f"act.s_{stage}_global"].double().chunk(2), own)
        (found,) = targets(seen[f"oracle.t_{stage}_search"], 0.0, temperature, views=1)
        losses[f"{stage}_local"] = rows_apart(seen[f"act.s_{stage}_local"], found)
        total += 0.5 * (losses[f"{stage}_global"] + losses[f"{stage}_local"])
    return losses | {"total": total}

"""MOKD against numbers of the reference implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_vectors import (
    Golden,
    batch_of,
    described,
    load_golden,
    normalised_crops,
    pair,
    stored_names,
    tiny_resnet,
)
from torch import Tensor

from patchmine.backbones.positions import resize_positions
from patchmine.methods.mokd import MOKD
from patchmine.models.networks import outputs_of, search
from patchmine.ops.distill import teacher_temperature
from patchmine.ops.schedules import LrSchedule
from patchmine.train.optim import build_optimizers, clip_gradients, set_rates, update
from patchmine.types import Batch, Progress

pytestmark = pytest.mark.golden

PARTS = {"backbone": "encoder", "head": "head", "transhead": "thead"}
CENTRES = {"cnn_m": "head", "cnn_t": "thead", "vit_m": "partner_head", "vit_t": "partner_thead"}
# The two of the cross terms, which we do not keep, are those of the other network's own terms.
ALL_CENTRES = CENTRES | {"cnn_cm": "partner_head", "vit_cm": "head"}
CNN, VIT = 0, 1
NETWORKS = {"cnn": CNN, "vit": VIT}
TABLES = [
    name
    for name in stored_names("mokd")
    if name.startswith("aux.") and name.endswith("_pos_embed_local")
]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("mokd")


def our_name(reference: str) -> str:
    """``student_vit.transhead.norm.bias`` -> ``partner_thead.norm.bias``: the CNN is the model, the
    ViT its partner.
    """
    role, part, rest = reference.split(".", 2)
    part = PARTS[part]
    prefix = "" if role.endswith("_cnn") else "partner_"
    if role.startswith("teacher"):
        return f"{prefix}teacher.{part}.{rest}"
    return f"partner.{rest}" if prefix and part == "encoder" else f"{prefix}{part}.{rest}"


def build(golden: Golden, **options: Any) -> MOKD:
    """The method at the stored sizes with all four stored networks and the centres before the step."""
    c = golden.config
    cnn = tiny_resnet(c["cnn_channels"], c["global_size"])
    vit = {
        "patch_size": c["patch"],
        "embed_dim": c["vit_dim"],
        "depth": c["vit_depth"],
        "num_heads": c["vit_heads"],
    }
    config = MOKD.Config(
        partner_model="vit_tiny_patch16_224",
        partner_args=vit,
        cross_weight=c["lambda_cnn"],
        partner_cross_weight=c["lambda_vit"],
        out_dim=c["out_dim"],
        head_hidden=c["head_hidden"],
        head_bottleneck=c["head_bottleneck"],
        thead_depth=c["thead_depth"],
        thead_heads=c["thead_heads"],
        teacher_temp_start=c["warmup_teacher_temp"],
        teacher_temp_end=c["teacher_temp"],
        cnn_temp_warmup_epochs=c["warm_cnn"],
        vit_temp_warmup_epochs=c["warm_vit"],
        drop_path=0,
        **options,
    )
    method = MOKD(config, cnn)
    networks = ("student_cnn.", "teacher_cnn.", "student_vit.", "teacher_vit.")
    state = {our_name(name): t for name, t in golden.tensors.items() if name.startswith(networks)}
    for name, own in CENTRES.items():
        state[f"centres.{own}.mean"] = golden[f"center_before.{name}"][0]
    method.load_state_dict(
        state
    )  # strictly: nothing of ours is missing there, and nothing is left over
    return method.train()


@pytest.fixture(scope="module")
def batch(golden: Golden) -> Batch:
    return batch_of(*normalised_crops(golden))


@pytest.fixture(scope="module")
def progress(golden: Golden) -> Progress:
    return Progress(golden.config["epoch"], golden.config["epochs"], 1)


def test_temperatures(golden: Golden, progress: Progress) -> None:
    """Only the CNN's own terms have its warm-up; between the networks it is the ViT's."""
    c = golden.config
    assert golden.meta["teacher_temp_at_epoch"]
    for name, expected in golden.meta["teacher_temp_at_epoch"].items():
        warmup = c["warm_cnn"] if name in ("cnn_m", "cnn_t") else c["warm_vit"]
        found = teacher_temperature(
            progress, start=c["warmup_teacher_temp"], end=c["teacher_temp"], warmup_epochs=warmup
        )
        golden.check_number(found, expected, "temperature")


@pytest.mark.parametrize("name", TABLES)
def test_positions_of_local_crops(golden: Golden, name: str) -> None:
    c, part = golden.config, name.removeprefix("aux.").removesuffix("_pos_embed_local")
    network = "student_cnn" if part.endswith("cnn") else "student_vit"
    module, prefix = ("transhead", 0) if part.startswith("thead") else ("backbone", 1)
    table, expected = golden[f"{network}.{module}.pos_embed"][0], golden[name][0]
    assert torch.equal(expected[:prefix], table[:prefix])
    step = (
        32 if part.endswith("cnn") else c["patch"]
    )  # a ResNet's last map is a 32nd of the image, rounded up
    before, after = (
        tuple(-(-side // step) for side in pair(c[size])) for size in ("global_size", "local_size")
    )
    golden.check(resize_positions(table[prefix:], before, after), expected[prefix:], "table")


def test_activations(golden: Golden, batch: Batch) -> None:
    method = build(golden)
    large, small = torch.cat(batch.views[:2]), torch.cat(batch.views[2:])
    crops = golden.config["n_local"]
    with torch.no_grad():
        seen = [
            (method.study(number, large, crops=2), method.study(number, small, crops=crops))
            for number in (CNN, VIT)
        ]
        known = [outputs_of(teacher, large) for teacher in method.teachers()]
        queries = [
            student.thead.query(local.pooled)
            for student, (_, local) in zip(method.students(), seen, strict=True)
        ]
        for name, number in NETWORKS.items():
            mine, local = seen[number]
            golden.check(torch.cat([mine.head, local.head]), f"act.s_{name}_m", "tokens")
            golden.check(torch.cat([mine.thead, local.thead]), f"act.s_{name}_t", "tokens")
            golden.check(queries[number], f"act.s_{name}_query_l", "tokens")
            golden.check(known[number].head, f"act.t_{name}_m", "tokens")
            golden.check(known[number].thead, f"act.t_{name}_t", "tokens")
            found = search(method.teachers()[number].thead, known[number].maps, queries[1 - number])
            golden.check(found, f"act.t_{name}_search_l", "tokens")


def test_losses_and_gradients(golden: Golden, batch: Batch, progress: Progress) -> None:
    method = build(golden)
    losses, expected = method(batch, progress), golden.meta["losses"]
    terms = {"sm": "self_head", "st": "self_thead", "cm": "cross_head", "ct": "cross_search"}
    for network, prefix in (("cnn", ""), ("vit", "partner_")):
        for theirs, own in terms.items():
            if golden.config[f"lambda_{network}"] or theirs.startswith("s"):
                golden.check_number(losses[prefix + own], expected[f"{network}_{theirs}"])
    golden.check_number(losses["loss"], expected["cnn_total"] + expected["vit_total"])

    losses["loss"].backward()
    golden.check_gradients(dict(method.named_parameters()), golden.under("grad."), our_name)
    state = method.state_dict()
    for name, statistic in golden.under("bn_after.").items():
        golden.check(state[our_name(name)], statistic, "statistics")


def step(golden: Golden, method: MOKD, batch: Batch, progress: Progress) -> dict[str, Tensor]:
    """The stored step with our loop's parts; returns the gradients that the optimizers got, by
    name.
    """
    c = golden.config["step"]
    # Constant rates: half a cosine from a rate to itself.
    optimizers = build_optimizers(
        method.param_groups(), weight_decay=c["wd_vit"], blr=c["lr_vit"], betas=(0.9, 0.999)
    )
    set_rates(
        optimizers,
        Progress(0, 1, 1),
        batch_size=256,
        schedule=LrSchedule(warmup_epochs=0, min_lr=c["lr_vit"]),
    )
    method(batch, progress)["loss"].backward()
    clip_gradients(optimizers, progress)
    gradients = {
        name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None
    }
    update(optimizers, torch.zeros(()))
    method.after_step(Progress(0, 10**9, 1))  # at the start of its ramp the decay is the stored one
    return gradients


@pytest.mark.skipif(
    "step" not in described("mokd").get("config", {}), reason="the file has no step"
)
def test_step(golden: Golden, batch: Batch, progress: Progress) -> None:
    c = golden.config["step"]
    rates = dict(
        sgd_blr=c["lr_cnn"],
        sgd_min_lr=c["lr_cnn"],
        sgd_weight_decay=c["wd_cnn"],
        weight_decay_end=None,
    )
    method = build(
        golden,
        **rates,
        clip_grad=c["clip"],
        ema_start=c["ema"],
        freeze_last_layer=c["freeze_last_layer"],
    )
    gradients = step(golden, method, batch, progress)
    state = method.state_dict()
    for name, expected in golden.under("center_after.").items():
        golden.check(state[f"centres.{ALL_CENTRES[name]}.mean"], expected[0], "statistics")
    stored = golden.under("step.")
    assert stored
    for name, expected in stored.items():
        ours = our_name(name)
        found = state[ours]
        # What is frozen in this epoch has no gradient, and stays.
        gradient = gradients.get(
            ours.replace("partner_teacher.encoder.", "partner.").replace("_teacher.", "_")
        )
        if name.split(".")[0].endswith("_vit") and gradient is not None:
            # AdamW's first step is the sign of the gradient, which rounding decides where that is
            # nearly nothing.
            sure = gradient.abs() >= 1e-6
            assert sure.float().mean() > 0.5, name
            found, expected = found[sure], expected[sure]
        golden.tolerance("parameters").check(found, expected, name)

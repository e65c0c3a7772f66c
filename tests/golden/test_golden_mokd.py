"""MOKD against numbers of the reference implementation (spec mokd.md, section 10)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from patchmine.methods.mokd import MOKD, look, search
from patchmine.models.positions import resize_positions
from patchmine.models.vit import build_encoder
from patchmine.ops.distill import teacher_temperature
from patchmine.ops.schedules import LrSchedule
from patchmine.train.optim import build_optimizers, clip_gradients, set_rates, update
from patchmine.types import Batch, Progress

pytestmark = pytest.mark.golden

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
PARTS = {"backbone": "encoder", "head": "head", "transhead": "thead"}
CNN, VIT = 0, 1


@pytest.fixture(scope="module")
def golden(load_golden: Callable[[str], Any]) -> Any:
    return load_golden("mokd")


def our_name(reference: str) -> str:
    """``student_vit.transhead.norm.bias`` -> ``partner_thead.norm.bias``: the CNN is the model, the ViT its partner."""
    role, part, rest = reference.split(".", 2)
    part = PARTS[part]
    prefix = "" if role.endswith("_cnn") else "partner_"
    if role.startswith("teacher"):
        return f"{prefix}teacher.{part}.{rest}"
    return f"partner.{rest}" if prefix and part == "encoder" else f"{prefix}{part}.{rest}"


def build(golden: Any, **options: Any) -> MOKD:
    """The method at the stored sizes with all four stored networks and the centres before the step."""
    c = golden.config
    sizes = c["cnn_channels"]
    cnn = build_encoder(
        "resnet18", image_size=(c["global_size"],) * 2, model_args={"layers": [1, 1, 1, 1], "channels": sizes}
    )
    # timm's stem has 64 channels whatever the stages have.
    cnn.conv1 = nn.Conv2d(3, sizes[0], 7, stride=2, padding=3, bias=False)
    cnn.bn1, cnn.layer1 = nn.BatchNorm2d(sizes[0]), nn.Sequential(BasicBlock(sizes[0], sizes[0]))
    vit = {"patch_size": c["patch"], "embed_dim": c["vit_dim"], "depth": c["vit_depth"], "num_heads": c["vit_heads"]}
    config = MOKD.Config(
        partner_model="vit_tiny_patch16_224",
        partner_args=vit,
        out_dim=c["out_dim"],
        head_hidden=c["head_hidden"],
        head_bottleneck=c["head_bottleneck"],
        thead_depth=c["thead_depth"],
        thead_heads=c["thead_heads"],
        drop_path=0,
        **options,
    )
    method = MOKD(config, cnn)
    networks = ("student_cnn.", "teacher_cnn.", "student_vit.", "teacher_vit.")
    state = {our_name(name): t for name, t in golden.tensors.items() if name.startswith(networks)}
    for name, key in (("cnn_m", "head"), ("cnn_t", "thead"), ("vit_m", "partner_head"), ("vit_t", "partner_thead")):
        state[f"centres.{key}.mean"] = golden.tensors[f"center_before.{name}"][0]
    method.load_state_dict(state)  # strictly: nothing of ours is missing there, and nothing is left over
    return method.train()


@pytest.fixture(scope="module")
def batch(golden: Any) -> Batch:
    count = 2 + golden.config["n_local"]
    views = [golden.tensors[f"in.crop{i}_u8"].float() / 255 for i in range(count)]
    views = [(view - MEAN[:, None, None]) / STD[:, None, None] for view in views]
    rows = len(views[0])
    return Batch(views, torch.arange(rows), torch.zeros(rows, count, 4), torch.zeros(rows, count, dtype=torch.bool))


@pytest.fixture(scope="module")
def progress(golden: Any) -> Progress:
    return Progress(golden.config["epoch"], golden.config["epochs"], 1)


def close(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def test_temperatures(golden: Any, progress: Progress) -> None:
    c = golden.config
    for name, warmup in (("cnn_m", c["warm_cnn"]), ("vit_m", c["warm_vit"]), ("search", c["warm_vit"])):
        found = teacher_temperature(
            progress, start=c["warmup_teacher_temp"], end=c["teacher_temp"], warmup_epochs=warmup
        )
        assert found == pytest.approx(golden.meta["teacher_temp_at_epoch"][name], rel=1e-12)


def test_positions_of_local_crops(golden: Any) -> None:
    tables = {
        "thead_cnn_pos_embed_local": golden.tensors["student_cnn.transhead.pos_embed"][0],
        "thead_vit_pos_embed_local": golden.tensors["student_vit.transhead.pos_embed"][0],
        "vit_pos_embed_local": golden.tensors["student_vit.backbone.pos_embed"][0, 1:],
    }
    for name, table in tables.items():
        expected = golden.tensors[f"aux.{name}"][0]
        if name == "vit_pos_embed_local":
            assert torch.equal(expected[0], golden.tensors["student_vit.backbone.pos_embed"][0, 0])
            expected = expected[1:]
        before, after = round(len(table) ** 0.5), round(len(expected) ** 0.5)
        close(resize_positions(table, (before, before), (after, after)), expected, 1e-6)


def test_activations(golden: Any, batch: Batch) -> None:
    method = build(golden)
    large, small = torch.cat(batch.views[:2]), torch.cat(batch.views[2:])
    crops, stored = golden.config["n_local"], golden.tensors
    with torch.no_grad():
        seen = [
            (method.study(number, large, crops=2), method.study(number, small, crops=crops)) for number in (CNN, VIT)
        ]
        taught = [look(teacher, large) for teacher in method.teachers()]
        queries = [
            student.thead.query(local.pooled) for student, (_, local) in zip(method.students(), seen, strict=True)
        ]
        for number, name in ((CNN, "cnn"), (VIT, "vit")):
            mine, local = seen[number]
            close(torch.cat([mine.head, local.head]), stored[f"act.s_{name}_m"], 5e-5)
            close(torch.cat([mine.thead, local.thead]), stored[f"act.s_{name}_t"], 5e-5)
            close(queries[number], stored[f"act.s_{name}_query_l"], 5e-5)
            close(taught[number].head, stored[f"act.t_{name}_m"], 5e-5)
            close(taught[number].thead, stored[f"act.t_{name}_t"], 5e-5)
            found = search(method.teachers()[number].thead, taught[number].maps, queries[1 - number])
            close(found, stored[f"act.t_{name}_search_l"], 5e-5)


def test_losses_and_gradients(golden: Any, batch: Batch, progress: Progress) -> None:
    method = build(golden)
    losses = method(batch, progress)
    names = {"self_head": "sm", "self_thead": "st", "cross_head": "cm", "cross_search": "ct"}
    for prefix, network in (("", "cnn"), ("partner_", "vit")):
        for ours, theirs in names.items():
            expected = golden.meta["losses"][f"{network}_{theirs}"]
            assert losses[prefix + ours].item() == pytest.approx(expected, rel=1e-5), (network, theirs)
    total = golden.meta["losses"]["cnn_total"] + golden.meta["losses"]["vit_total"]
    assert losses["loss"].item() == pytest.approx(total, rel=1e-5)

    losses["loss"].backward()
    parameters = dict(method.named_parameters())
    stored = {name.removeprefix("grad."): t for name, t in golden.tensors.items() if name.startswith("grad.")}
    assert len(stored) == 17
    for name, expected in stored.items():
        found = parameters[our_name(name)].grad
        assert found is not None, name
        bound = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(found, expected, atol=bound, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    for name, expected in golden.tensors.items():
        if name.startswith("bn_after."):
            close(method.state_dict()[our_name(name.removeprefix("bn_after."))], expected, 1e-6)


def step(golden: Any, method: MOKD, batch: Batch, progress: Progress) -> dict[str, Tensor]:
    """The stored step with our loop's parts; returns the gradients that the optimizers got, by name."""
    c = golden.config["step"]
    # Constant rates: half a cosine from a rate to itself.
    optimizers = build_optimizers(method.param_groups(), weight_decay=c["wd_vit"], blr=c["lr_vit"], betas=(0.9, 0.999))
    set_rates(optimizers, Progress(0, 1, 1), batch_size=256, schedule=LrSchedule(warmup_epochs=0, min_lr=c["lr_vit"]))
    method(batch, progress)["loss"].backward()
    clip_gradients(optimizers, progress)
    gradients = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    update(optimizers, torch.zeros(()))
    method.after_step(Progress(0, 10**9, 1))  # at the start of its ramp the decay is the stored one
    return gradients


def test_step(golden: Any, batch: Batch, progress: Progress) -> None:
    c = golden.config["step"]
    rates = dict(sgd_blr=c["lr_cnn"], sgd_min_lr=c["lr_cnn"], sgd_weight_decay=c["wd_cnn"], weight_decay_end=None)
    method = build(golden, **rates, clip_grad=c["clip"], ema_start=c["ema"], freeze_last_layer=c["freeze_last_layer"])
    gradients = step(golden, method, batch, progress)
    state = method.state_dict()
    for name, expected in golden.tensors.items():
        if name.startswith("center_after."):
            key = {"cnn_m": "head", "cnn_t": "thead", "vit_m": "partner_head", "vit_t": "partner_thead"}
            # The two of the cross terms, which we do not keep, are those of the other network's own terms.
            key |= {"cnn_cm": "partner_head", "vit_cm": "head"}
            close(state[f"centres.{key[name.removeprefix('center_after.')]}.mean"], expected[0], 1e-6)
        if not name.startswith("step."):
            continue
        ours = our_name(name.removeprefix("step."))
        found = state[ours]
        if re.match(r"step\.(student|teacher)_vit", name):
            # AdamW's first step is the sign of the gradient, which rounding decides where that is nearly nothing.
            student = ours.replace("partner_teacher.encoder.", "partner.").replace("partner_teacher.", "partner_")
            sure = gradients[student].abs() >= 1e-6
            assert sure.float().mean() > 0.5, name
            found, expected = found[sure], expected[sure]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")

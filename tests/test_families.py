"""Every method on every family of encoders: twenty steps with a falling loss, or a refusal by name.

A new family is a row of FAMILIES, and its refusals rows of REFUSED; a new method needs nothing but
its refusals.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from patchmine.config.schema import PretrainConfig
from patchmine.errors import UserError
from patchmine.methods import METHODS
from patchmine.runs.folder import build_method
from patchmine.runs.preparing import train_view
from patchmine.task import Method
from patchmine.train.engine import Engine
from patchmine.train.settings import TrainSettings
from patchmine.train.step import Stepper
from patchmine.types import Batch, Progress

STEPS, COUNT, SIZE, PATCH = 20, 8, 16, 4
CLIP = (4, 2)  # frames, and frames in a tubelet
NARROW: dict[str, Any] = dict(embed_dim=32, depth=2, num_heads=2)
FAMILIES: dict[str, dict[str, Any]] = {
    "ViT": {"model": "vit_tiny_patch16_224"},
    "DINOv2": {"model": "vit_small_patch14_reg4_dinov2"},
    "CLIP": {"model": "vit_base_patch16_clip_224"},
    "SigLIP": {"model": "vit_base_patch16_siglip_224"},
    "SwiGLU giant": {"model": "vit_giant_patch14_dinov2"},
    "DINOv3": {"model": "vit_small_patch16_dinov3"},
    "EVA-02": {"model": "eva02_tiny_patch14_224"},
    "PE": {"model": "vit_pe_core_tiny_patch16_384"},
    "BEiT": {"model": "beit_base_patch16_224"},
    "ResNet": {
        "model": "resnet18",
        "model_args": dict(layers=[1, 1, 1, 1], channels=[8, 8, 12, 12], cifar_stem=True),
        "patch_size": None,
    },
    "video ViT": {"model": "video_vit_tiny_patch16"},
}
SMALL: dict[str, Any] = {
    **dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2),
    **dict(out_dim=32, head_hidden=16, head_bottleneck=8),
    **dict(stage_out_dim=12, stage_hidden=16, stage_bottleneck=8),
    **dict(thead_depth=1, thead_heads=2, partner_model="resnet18"),
    "partner_args": dict(layers=[1, 1, 1, 1], channels=[8, 8, 12, 12]),
}
OWN: dict[str, dict[str, Any]] = {
    "simmim": dict(mask_unit=PATCH),
    # Of a teacher that stands still, so that what is to be learned stays the same.
    "scfs": dict(ema_start=1.0, centre_momentum=0.999, freeze_last_layer=0),
}
CLASS_TOKEN = r"method=semaim starts from one class token, and this model has {} tokens"
RELATIVE = r"method={} leaves patches out, which an encoder with relative positions does not allow"
CROPS = r"method={} compares global with local crops, .* relative positions takes images of one"
ROTARY = r"method=droppos does not train .* Eva, whose rotary positions tell attention where"
PATCHLESS = r"method={} hides patches, which a ResNet does not have"
CLIPS = r"method={} does not train on videos"
HIDING = ("mae", "hpm", "simmim", "amt", "emae", "droppos", "semaim")
REFUSED: dict[tuple[str, str], str] = {
    ("DINOv2", "semaim"): CLASS_TOKEN.format(5),
    ("SigLIP", "amt"): r"method=amt follows the class token's attention, and the model has none",
    ("SigLIP", "droppos"): r"method\.attentive=true compares .* set model_args\.class_token=true",
    ("SigLIP", "semaim"): CLASS_TOKEN.format(0),
    ("DINOv3", "semaim"): CLASS_TOKEN.format(5),
    **{(family, "droppos"): ROTARY for family in ("DINOv3", "EVA-02", "PE")},
    **{("BEiT", each): RELATIVE.format(each) for each in ("mae", "hpm", "amt", "emae", "semaim")},
    ("BEiT", "droppos"): r"method=droppos asks for places, and relative positions tell the encoder",
    **{("BEiT", each): CROPS.format(each) for each in ("scfs", "mokd")},
    **{("ResNet", each): PATCHLESS.format(each) for each in HIDING},
    **{("video ViT", each): CLIPS.format(each) for each in METHODS if each not in ("mae", "hpm")},
}


def build(family: str, name: str) -> Method:
    """The method as a run makes it.  Raises UserError for what a run refuses."""
    fields = METHODS[name].model_fields
    own = {key: value for key, value in SMALL.items() if key in fields} | OWN.get(name, {})
    settings: dict[str, Any] = {
        **dict(data="x", image_size=SIZE, patch_size=PATCH, model_args=NARROW),
        **dict(clip={"frames": CLIP[0], "tubelet": CLIP[1]}),
        **dict(crops={"num_local": 2, "local_size": SIZE // 2}),
        **FAMILIES[family],
    }
    config = PretrainConfig(**settings, method={"name": name, **own})
    torch.manual_seed(0)
    method = build_method(config)
    train_view(config, method)
    method.noise.seed = 0
    return method


def images(method: Method, family: str) -> Batch:
    """Always the same: smooth pictures, whose patches can be told from their neighbours."""
    sides = [SIZE, SIZE, SIZE // 2, SIZE // 2] if method.config.multi_crop else [SIZE]
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(COUNT, 3, 4, 4, generator=generator)
    views = [
        torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic") for side in sides
    ]
    if family == "video ViT":
        views = [view[:, :, None].expand(-1, -1, CLIP[0], -1, -1).contiguous() for view in views]
    crops = (COUNT, len(views)) if method.config.multi_crop else (COUNT,)
    box = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(*crops, 4)
    return Batch(views, torch.arange(COUNT), box, torch.zeros(crops, dtype=torch.bool))


def losses(method: Method, batch: Batch) -> list[float]:
    blr = 0.01 if method.config.multi_crop else 0.1  # a teacher has to keep up
    settings = TrainSettings(
        batch_size=COUNT, blr=blr, warmup_epochs=0, lr_schedule="constant", device="cpu"
    )
    stepper = Stepper(method, Engine("cpu"), settings)
    method.train()
    found = []
    for step in range(STEPS):
        now = Progress(step, STEPS, STEPS)
        if step == 0:
            method.begin_epoch(now, [batch])
        stepper.make(now, iter([batch]))
        found.append(stepper.meter.read(stepper.engine.mean)["loss"])
    return found


def pairs() -> Iterator[Any]:
    for family, name in product(FAMILIES, METHODS):
        slow = name == "mokd" and family != "ViT"  # two networks and four crops
        yield pytest.param(family, name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("family", "name"), list(pairs()))
def test_a_method_trains_a_family_or_refuses_it(family: str, name: str) -> None:
    if words := REFUSED.get((family, name)):
        with pytest.raises(UserError, match=words):
            build(family, name)
        return
    method = build(family, name)
    found = losses(method, images(method, family))
    assert sum(found[-5:]) < sum(found[:5])
    assert found[0] > found[-1]

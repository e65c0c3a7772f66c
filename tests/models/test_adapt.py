"""Rates of fine-tuning against timm's groups and MAE's rule; what each word of trainable= frees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
from pydantic import TypeAdapter, ValidationError
from timm.optim import param_groups_layer_decay
from torch import nn

from fixtures.stages import changed, encoder_of
from patchmine.backbones.family import build_encoder
from patchmine.errors import UserError
from patchmine.models.adapt import hold_statistics, layer_scales, rate_groups, select_trainable
from patchmine.models.lora import merged
from patchmine.models.settings import Trainable, TrainableSpec, parse_trainable
from patchmine.train.optim import build_optimizers
from patchmine.types import ParamGroup

DECAY = 0.65


def vit(**arguments: Any) -> Any:
    sizes = {"embed_dim": 16, "depth": 4, "num_heads": 2, **arguments}
    return build_encoder(
        "vit_small_patch16_224", image_size=(16, 16), patch_size=8, model_args=sizes
    )


def trained(encoder: nn.Module) -> set[str]:
    return {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}


def scale_and_decay(groups: Sequence[ParamGroup]) -> dict[str, tuple[float, float]]:
    """What the optimizer makes of groups, by the parameter's name."""
    optimizers = build_optimizers(groups, weight_decay=0.05, blr=1e-3, betas=(0.9, 0.999))
    found = {
        id(parameter): (group["of"].scale, group["weight_decay"])
        for optimizer in optimizers.by_name.values()
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {name: found[id(parameter)] for name, parameter in optimizers.params.items()}


def timms_scale_and_decay(classifier: Any, head: str) -> dict[str, tuple[float, float]]:
    """What timm makes of the classifier, by the names of an encoder and a head."""
    spared = getattr(classifier, "no_weight_decay", set)()
    groups = param_groups_layer_decay(
        classifier, weight_decay=0.05, no_weight_decay_list=spared, layer_decay=DECAY
    )
    found = {
        id(parameter): (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }

    def ours(name: str) -> str:
        if name.startswith(f"{head}."):
            return name.replace(head, "head", 1)
        return "encoder." + name.replace("fc_norm.", "norm.")

    return {ours(name): found[id(p)] for name, p in classifier.named_parameters()}


MEAN = {"global_pool": "avg", "fc_norm": True}
BARE = {"global_pool": "", "fc_norm": False}


@pytest.mark.parametrize(
    ("model", "pooled", "bare", "head", "rates"),
    [
        ("vit_base_patch16_224", MEAN, BARE, "head", 14),
        ("vit_base_patch14_reg4_dinov2", MEAN, BARE, "head", 14),  # registers, layer scale
        ("vit_base_patch16_clip_224", MEAN, BARE, "head", 14),  # a norm before the blocks
        ("beit_base_patch16_224", {"global_pool": "avg"}, {"global_pool": ""}, "head", 14),
        ("resnet50", {}, {}, "fc", 18),
        ("convnext_tiny", {}, {}, "head.fc", 20),
        ("convnextv2_atto", {}, {}, "head.fc", 14),
        ("swin_tiny_patch4_window7_224", {}, {}, "head.fc", 14),
        ("swinv2_tiny_window8_256", {}, {}, "head.fc", 14),
    ],
)
def test_rates_and_decays_are_timms(
    model: str, pooled: dict[str, Any], bare: dict[str, Any], head: str, rates: int
) -> None:
    with torch.device("meta"):
        classifier = timm.create_model(model, num_classes=1000, **pooled)
        encoder = timm.create_model(model, num_classes=0, **bare)
        fresh = nn.Linear(encoder.num_features, 1000)
    found = scale_and_decay(rate_groups(encoder, fresh, DECAY))
    assert found == timms_scale_and_decay(classifier, head)
    assert len({scale for scale, _ in found.values()}) == rates


def test_rates_and_decays_are_those_of_mae() -> None:
    def expected(name: str, parameter: torch.Tensor, depth: int = 12) -> tuple[float, float]:
        """``util/lr_decay.py``, and ``no_weight_decay`` of timm's model."""
        layer = depth + 1
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
            layer = 0
        elif name.startswith("blocks"):
            layer = int(name.split(".")[1]) + 1
        spared = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
        return DECAY ** (depth + 1 - layer), 0.0 if spared else 0.05

    with torch.device("meta"):
        encoder = timm.create_model("vit_base_patch16_224", num_classes=0, global_pool="token")
        head = nn.Linear(768, 10)
    found = scale_and_decay(rate_groups(encoder, head, DECAY))
    assert len(found) == 152
    for name, parameter in encoder.named_parameters():
        assert found[f"encoder.{name}"] == expected(name, parameter), name
    assert found["head.weight"] == (1.0, 0.05)
    assert found["head.bias"] == (1.0, 0.0)


def test_clips_have_the_layers_of_images() -> None:
    encoder = build_encoder(
        "video_vit_small_patch16",
        image_size=(32, 32),
        clip=(4, 2),
        model_args={"embed_dim": 24, "depth": 2, "num_heads": 2},
    )
    scales = layer_scales(encoder, 0.5)
    assert set(scales) == {name for name, _ in encoder.named_parameters()}
    assert scales["patch_embed.proj.weight"] == 0.125
    assert scales["blocks.0.attn.qkv.bias"] == 0.25
    assert scales["blocks.1.mlp.fc2.weight"] == 0.5
    assert scales["norm.weight"] == 1.0


def test_groups_leave_out_what_is_frozen_and_pass_on_what_else_is_said() -> None:
    encoder, head = vit(), nn.Linear(16, 3)
    select_trainable(encoder, "last:1")
    groups = rate_groups(encoder, head, 0.5, clip_norm=1.0, weight_decay=0.3)
    assert [group.scale for group in groups] == [0.5, 1.0]
    names = [name for group in groups for name, _ in group.params]
    assert set(names) == {f"encoder.{name}" for name in trained(encoder)} | {
        "head.weight",
        "head.bias",
    }
    assert len(names) == len(set(names))
    assert {(group.clip_norm, group.weight_decay) for group in groups} == {(1.0, 0.3)}


def test_a_decay_without_effect_is_refused() -> None:
    encoder, head = vit(), nn.Linear(16, 3)
    select_trainable(encoder, "none")
    with pytest.raises(UserError, match=r"layer_decay=0\.75 .*layer_decay=1.*trainable=all"):
        rate_groups(encoder, head, 0.75)
    (group,) = rate_groups(encoder, head, 1.0)
    assert [name for name, _ in group.params] == ["head.weight", "head.bias"]
    select_trainable(encoder, "all")
    plain = rate_groups(encoder, head, 1.0)
    assert [(group.scale, group.weight_decay) for group in plain] == [(1.0, None), (1.0, 0.0)]
    assert {name for name, _ in plain[1].params} == {"encoder.cls_token", "encoder.pos_embed"}


def test_all_and_none() -> None:
    encoder = vit()
    assert "pos_embed" not in trained(encoder)
    select_trainable(encoder, "all")
    everything = {name for name, _ in encoder.named_parameters()}
    assert trained(encoder) == everything
    select_trainable(encoder, "all", frozen_positions=True)
    assert trained(encoder) == everything - {"pos_embed"}
    select_trainable(encoder, "none")
    assert not trained(encoder)


@pytest.mark.parametrize(
    ("trainable", "whole", "half"),
    [
        ("last:0.5", [], 3),
        ("last:1", [3], None),
        ("last:2.5", [2, 3], 1),
        ("last:4", range(4), None),
        ("last:25%", [3], None),
        ("last:1%", [3], None),
        ("last:60%", [2, 3], None),
    ],
)
def test_last_blocks(trainable: str, whole: Sequence[int], half: int | None) -> None:
    encoder = vit(init_values=0.1)
    select_trainable(encoder, trainable)
    expected = {"norm.weight", "norm.bias"}
    for number in whole:
        expected |= {f"blocks.{number}.{n}" for n, _ in encoder.blocks[number].named_parameters()}
    if half is not None:
        parts = ("norm2", "mlp", "ls2")
        expected |= {
            f"blocks.{half}.{part}.{name}"
            for part in parts
            for name, _ in encoder.blocks[half].get_submodule(part).named_parameters()
        }
    assert trained(encoder) == expected


def test_last_blocks_of_a_resnet() -> None:
    encoder = build_encoder("resnet18")
    select_trainable(encoder, "last:3")
    assert {name.rsplit(".", 2)[0][:8] for name in trained(encoder)} == {
        "layer3.1",
        "layer4.0",
        "layer4.1",
    }
    select_trainable(encoder, "last:8")
    assert {name for name, _ in encoder.named_parameters()} - trained(encoder) == {
        "conv1.weight",
        "bn1.weight",
        "bn1.bias",
    }


@pytest.mark.parametrize(
    ("kind", "trainable", "expected"),
    [
        ("swin", "last:1", {"layers.3", "norm"}),
        ("swin", "last:2", {"layers.3", "layers.2.blocks.1", "norm"}),
        (
            "swin",
            "last:1.5",
            {"layers.3", "layers.2.blocks.1.mlp", "layers.2.blocks.1.norm2", "norm"},
        ),
        ("convnext", "last:2", {"stages.3", "stages.2.blocks.1", "head.norm"}),
        ("convnext", "last:5", {"stages", "head.norm"}),
    ],
)
def test_last_blocks_of_stages(kind: str, trainable: str, expected: set[str]) -> None:
    encoder = encoder_of(kind)
    select_trainable(encoder, trainable)
    chosen = tuple(f"{part}." for part in expected)
    assert trained(encoder) == {n for n, _ in encoder.named_parameters() if n.startswith(chosen)}


def test_lora_adapts_the_attention_of_windows() -> None:
    for kind in ("swin", "swinv2"):
        encoder = changed(encoder_of(kind)).eval()
        images = torch.randn(2, 3, 64, 64)
        before = encoder(images)
        select_trainable(encoder, "lora:2")
        learning = trained(encoder)
        assert len(learning) == 4 * 6  # two products beside two matrices of six blocks
        torch.testing.assert_close(encoder(images), before)
        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                if name in learning:
                    parameter.normal_()
        torch.testing.assert_close(merged(encoder)(images), encoder(images), rtol=1e-3, atol=1e-4)
        assert merged(encoder).state_dict().keys() == encoder_of(kind).state_dict().keys()


def test_bias_frees_biases_and_norms() -> None:
    encoder = vit(depth=1)
    select_trainable(encoder, "bias")
    assert trained(encoder) == {
        "patch_embed.proj.bias",
        *(f"blocks.0.{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")),
        *(f"blocks.0.{name}.bias" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        *("norm.weight", "norm.bias"),
    }


@pytest.mark.parametrize(
    ("model", "trainable", "message"),
    [
        ("vit", "last:20", r"trainable=last:20,.* 4 blocks.*trainable=all"),
        ("vit", "last:4.5", r"trainable=last:4\.5,.* 4 blocks"),
        ("vit", "lora:17", r"trainable=lora:17,.* 16 wide.*smaller rank"),
        ("resnet", "last:9", r"trainable=last:9,.* 8 blocks"),
        ("resnet", "last:1.5", r"trainable=last:1\.5 .*ResNet.*trainable=last:2"),
        ("resnet", "lora:8", r"trainable=lora:8 .*ResNet.*trainable=bias"),
        ("convnext", "last:1.5", r"trainable=last:1\.5 .*ConvNeXt.*trainable=last:2"),
        ("convnext", "lora:8", r"trainable=lora:8 .*ConvNeXt.*trainable=bias"),
        ("swin", "lora:17", r"trainable=lora:17,.* 8 wide.*smaller rank"),
    ],
)
def test_what_the_encoder_does_not_have(model: str, trainable: str, message: str) -> None:
    makers = {"vit": vit, "resnet": lambda: build_encoder("resnet18")}
    encoder = makers.get(model, lambda: encoder_of(model))()
    with pytest.raises(UserError, match=message):
        select_trainable(encoder, trainable)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("all", Trainable("all")),
        ("none", Trainable("none")),
        ("bias", Trainable("bias")),
        ("last:4", Trainable("last", 4)),
        ("last:0.5", Trainable("last", 0.5)),
        ("last:25%", Trainable("last", share=0.25)),
        ("lora", Trainable("lora", 16)),
        ("lora:8", Trainable("lora", 8)),
    ],
)
def test_the_setting_is_read(text: str, meaning: Trainable) -> None:
    assert parse_trainable(text) == meaning
    assert TypeAdapter(TrainableSpec).validate_python(text) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "head", "all:3", "none:", "lora:0", "lora:x", "lora:2.5", "last", "last:", "last:0"),
        *("last:0.0", "last:1.3", "last:-1", "last:4 ", "last:٣", "last:1e3"),
        *("last:0%", "last:100%", "last:2.5%", "lora:25%"),
    ],
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ValidationError, match=r"all, none .*bias, lora:16 .*last:4"):
        TypeAdapter(TrainableSpec).validate_python(text)


def test_frozen_batch_norms_keep_their_statistics() -> None:
    encoder = build_encoder("resnet18")
    select_trainable(encoder, "last:1")
    encoder.train()
    hold_statistics(encoder)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    encoder(torch.rand(2, 3, 32, 32))
    moved = {n for n, tensor in encoder.state_dict().items() if not torch.equal(tensor, before[n])}
    assert moved
    assert all(name.startswith("layer4.1.") for name in moved)

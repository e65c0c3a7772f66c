"""ResNets of timm's: how they are built, drawn and recognised."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import nn

from patchmine.backbones.family import build_encoder, refuse_unfit
from patchmine.backbones.record import Blueprint
from patchmine.backbones.resnet import has_cifar_stem, infer_resnet, is_resnet
from patchmine.errors import UserError
from patchmine.methods import METHODS, method_class

TINY: dict[str, Any] = {"channels": (8, 8, 12, 16)}


def resnet(model: str = "resnet18", **given: Any) -> Any:
    torch.manual_seed(0)
    return build_encoder(model, image_size=(32, 32), **given)


def test_the_usual_stem_is_timms_network_name_by_name() -> None:
    encoder = resnet(channels=5, model_args=TINY).eval()
    theirs = timm.create_model("resnet18", num_classes=0, in_chans=5, **TINY).eval()
    theirs.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 5, 40, 56)  # any size will do
    assert torch.equal(theirs(images), encoder(images))
    assert encoder(images).shape == (2, 16)
    assert encoder.forward_features(images).shape == (2, 16, 2, 2)


def test_it_starts_as_torchvisions_does() -> None:
    encoder = resnet()
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1), (
                name
            )
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name


def test_timms_own_start_may_be_asked_for() -> None:
    encoder = resnet(model_args={**TINY, "zero_init_last": True})
    assert (encoder.layer1[0].bn2.weight == 0).all()
    assert (encoder.layer1[0].bn1.weight == 1).all()


def test_a_stem_for_small_images_keeps_their_pixels() -> None:
    encoder = resnet(model_args={**TINY, "cifar_stem": True})
    assert encoder.forward_features(torch.randn(2, 3, 32, 32)).shape == (2, 16, 4, 4)
    assert [stage["reduction"] for stage in encoder.feature_info] == [1, 1, 2, 4, 8]
    assert encoder.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.1)
    assert has_cifar_stem(encoder)
    assert not has_cifar_stem(resnet(model_args=TINY))


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        ("resnet18", {"patch_size": 8}, "patch_size=8, but model=resnet18 has no patches"),
        ("resnet18", {"model_args": {"depth": 3}}, "check model_args"),
        ("resnet50d", {"model_args": {"cifar_stem": True}}, "begin with one convolution"),
        (
            "vit_tiny_patch16_224",
            {"patch_size": 8, "model_args": {"cifar_stem": True}},
            "cifar_stem",
        ),
        ("resnet17", {}, "near: "),
    ],
)
def test_mistakes_are_told(model: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        resnet(model, **given)


def test_methods_that_hide_patches_refuse_it() -> None:
    with pytest.raises(UserError, match=r"method=some hides patches.*model=vit_small_patch16_224"):
        refuse_unfit(resnet(model_args=TINY), "some", {"vit"}, relative=False)
    for name, settings in METHODS.items():
        if "resnet" not in settings.families:
            with pytest.raises(UserError, match=f"method={name} "):
                method_class(settings)(settings(), resnet(model_args=TINY))


@pytest.mark.parametrize("stem", [False, True])
@pytest.mark.parametrize(
    "model", ["resnet18", "resnet34", "resnet26", "resnet50", "resnet101", "resnet152"]
)
def test_the_name_is_read_off_the_tensors(model: str, stem: bool) -> None:
    bare = timm.create_model(model, in_chans=2, device="meta", num_classes=7)
    tensors = bare.state_dict() | (
        {"conv1.weight": torch.empty(64, 2, 3, 3, device="meta")} if stem else {}
    )
    assert is_resnet(tensors)
    own = {"cifar_stem": True} if stem else {}
    assert infer_resnet(tensors, "x.pth") == Blueprint(model, channels=2, model_args=own)


def test_unusual_depths_are_told() -> None:
    tensors = timm.create_model("resnet18", device="meta").state_dict() | {
        "layer3.2.conv1.weight": torch.empty(1)
    }
    with pytest.raises(UserError, match=r"x.pth holds a ResNet with \(2, 2, 3, 2\) blocks"):
        infer_resnet(tensors, "x.pth")
    assert not is_resnet(timm.create_model("vit_tiny_patch16_224", device="meta").state_dict())

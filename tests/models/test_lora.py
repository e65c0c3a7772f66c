"""Low-rank adaptation: nothing changes at first, only its products learn, merging keeps outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from patchmine.backbones.family import build_encoder, encode
from patchmine.models.adapt import layer_scales, select_trainable
from patchmine.models.lora import merged, merged_state

SIZES = {"embed_dim": 16, "depth": 2, "num_heads": 2}
EXACT = {"atol": 1e-6, "rtol": 0.0}


def vit() -> Any:
    return build_encoder(
        "vit_small_patch16_224", image_size=(16, 16), patch_size=8, model_args=SIZES
    )


def beit() -> Any:
    sizes = {**SIZES, "init_values": 0.1}
    return build_encoder(
        "beit_base_patch16_224", image_size=(16, 16), patch_size=8, model_args=sizes
    )


def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def adapted(make: Callable[[], Any]) -> Any:
    """An encoder whose products are no longer zero."""
    torch.manual_seed(0)
    encoder = make()
    select_trainable(encoder, "lora:4")
    for name, parameter in encoder.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    return encoder


@pytest.mark.parametrize("make", [vit, beit])
def test_at_first_nothing_changes(make: Callable[[], Any]) -> None:
    encoder = make()
    before, names = encode(encoder, images()), set(encoder.state_dict())
    select_trainable(encoder, "lora:4")
    torch.testing.assert_close(encode(encoder, images()), before, **EXACT)
    more = set(encoder.state_dict()) - names
    assert names < set(encoder.state_dict())
    assert more == {
        f"blocks.{block}.attn.{layer}.lora_{side}"
        for block in (0, 1)
        for layer in ("qkv", "proj")
        for side in ("a", "b")
    }
    assert more == {n for n, parameter in encoder.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("make", [vit, beit])
def test_merging_keeps_the_outputs(make: Callable[[], Any]) -> None:
    encoder = adapted(make)
    expected = encode(encoder, images())
    torch.manual_seed(0)
    assert (encode(make(), images()) - expected).abs().max() > 1e-2
    kept = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    plain = merged(encoder)
    torch.testing.assert_close(encode(plain, images()), expected, **EXACT)
    fresh = make()
    assert set(plain.state_dict()) == set(fresh.state_dict())
    fresh.load_state_dict(merged_state(encoder.state_dict()))
    torch.testing.assert_close(encode(fresh, images()), expected, **EXACT)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, kept[name]), name


def test_merged_tensors_of_a_checkpoint() -> None:
    encoder = adapted(vit)
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    plain = merged_state({**tensors, "head.weight": torch.ones(2, 16)})
    expected = {f"encoder.{name}": tensor for name, tensor in merged(encoder).state_dict().items()}
    assert set(plain) == {*expected, "head.weight"}
    for name, tensor in expected.items():
        torch.testing.assert_close(plain[name], tensor, **EXACT)
    assert set(merged_state(plain)) == set(plain)
    del tensors["encoder.blocks.0.attn.qkv.lora_a"]
    assert [name for name in merged_state(tensors) if "lora" in name] == [
        "encoder.blocks.0.attn.qkv.lora_b"
    ]


@pytest.mark.parametrize("make", [vit, beit])
def test_the_gradient_is_that_of_the_merged_weight(make: Callable[[], Any]) -> None:
    encoder = adapted(make)
    weights = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    (encode(encoder, images()) * weights).sum().backward()
    plain = merged(encoder)
    (encode(plain, images()) * weights).sum().backward()
    for number, block in enumerate(encoder.blocks):
        for name in ("qkv", "proj"):
            layer = getattr(block.attn, name)
            slope = getattr(plain.blocks[number].attn, name).weight.grad
            torch.testing.assert_close(
                layer.lora_a.grad, layer.lora_b.T @ slope, atol=1e-4, rtol=1e-4
            )
            torch.testing.assert_close(
                layer.lora_b.grad, slope @ layer.lora_a.T, atol=1e-4, rtol=1e-4
            )
            assert layer.weight.grad is None


def test_products_have_the_rate_of_their_block() -> None:
    scales = layer_scales(adapted(vit), 0.5)
    assert scales["blocks.0.attn.qkv.lora_a"] == scales["blocks.0.attn.qkv.weight"] == 0.25
    assert scales["blocks.1.attn.proj.lora_b"] == 0.5


def test_autocast_computes_in_half_precision_and_keeps_float_gradients() -> None:
    encoder = adapted(vit)
    whole = encode(encoder, images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        qkv = encoder.blocks[0].attn.qkv(torch.ones(2, 16))
        tokens = encode(encoder, images())
    assert qkv.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), whole, atol=0.1, rtol=0.1)
    tokens.float().square().sum().backward()
    assert encoder.blocks[0].attn.qkv.lora_a.grad.dtype == torch.float32


def test_distributed_training_sees_only_what_learns(tmp_path: Path) -> None:
    encoder = adapted(vit)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        DistributedDataParallel(encoder)(images()).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    shared = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    encoder(images()).square().sum().backward()
    assert set(shared) == {n for n, p in encoder.named_parameters() if p.requires_grad}
    for name, gradient in shared.items():
        torch.testing.assert_close(gradient, encoder.get_parameter(name).grad)

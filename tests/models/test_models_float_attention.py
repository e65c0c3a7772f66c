"""Attention in float32 within bf16, against the same in float32 throughout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from patchmine.models.float_attention import FloatAttention


@pytest.mark.parametrize("mask", [None, "bool", "bias"])
def test_only_what_goes_in_and_out_is_rounded(mask: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 9, 8, generator=generator).bfloat16()
    bias = torch.randn(9, 9, generator=generator).bfloat16()
    given = {None: None, "bool": bias > -1, "bias": bias}[mask]
    exact = None if mask is None else given if mask == "bool" else bias.float()
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    floats = [tensor.float().requires_grad_() for tensor in (query, key, value)]
    expected = F.scaled_dot_product_attention(*floats, attn_mask=exact)
    with torch.autocast("cpu", torch.bfloat16), FloatAttention():
        found = F.scaled_dot_product_attention(*inputs, attn_mask=given)
    assert torch.equal(found, expected.bfloat16())
    found.float().square().sum().backward()
    expected.bfloat16().float().square().sum().backward()
    for mine, theirs in zip(inputs, floats, strict=True):
        assert torch.equal(mine.grad, theirs.grad.bfloat16())


def test_without_autocast_nothing_changes() -> None:
    inputs = torch.randn(3, 2, 2, 9, 8).bfloat16()
    with FloatAttention():
        found = F.scaled_dot_product_attention(*inputs)
    assert torch.equal(found, F.scaled_dot_product_attention(*inputs))

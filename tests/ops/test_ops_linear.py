"""The fast product on the processor against torch's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from patchmine.models import onednn
from patchmine.models.onednn import (
    OneDnnLinear,
    measured_product,
    multiplying,
    onednn_linear,
    onednn_usable,
    usual_product,
)

pytestmark = pytest.mark.skipif(
    not onednn_usable(), reason="this build of torch has no oneDNN product"
)


@pytest.mark.parametrize("shape", [(7, 12), (3, 5, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize(("outputs", "with_bias"), [(8, True), (8, False), (20, True)])
def test_equals_linear(shape: tuple[int, ...], outputs: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(outputs, 12, generator=generator)
    bias = torch.randn(outputs, generator=generator) if with_bias else None
    upstream = torch.randn(*shape[:-1], outputs, generator=generator)
    results = []
    for linear in (F.linear, onednn_linear):
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
        out = linear(*inputs)
        out.backward(upstream)
        results.append([out.detach(), *(t.grad for t in inputs)])
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_strided_input_and_frozen_parts() -> None:
    x = torch.randn(6, 10)[:, ::2]
    layer = nn.Linear(5, 3).requires_grad_(False)
    layer.bias.requires_grad_(True)
    with OneDnnLinear():
        out = layer(x)
    out.sum().backward()
    torch.testing.assert_close(out, F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(layer.bias.grad, torch.full((3,), 6.0))
    assert layer.weight.grad is None


def test_mode_takes_over_stock_layers_and_only_those_it_can_do() -> None:
    layer = nn.Linear(4, 4)
    with OneDnnLinear():
        assert type(layer(torch.randn(2, 4)).grad_fn).__name__ == "_LinearBackward"
        by_name = nn.functional.linear(
            torch.randn(2, 4), weight=layer.weight, bias=layer.bias
        )  # as timm's Beit does
        assert type(by_name.grad_fn).__name__ == "_LinearBackward"
        assert layer.double()(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.float()(torch.randn(2, 4)).dtype == torch.bfloat16
    assert type(layer(torch.randn(2, 4)).grad_fn).__name__ == "AddmmBackward0"


@pytest.fixture
def another_maker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor that is not Intel's, measured by nobody yet."""
    monkeypatch.setattr(onednn, "is_intel", lambda: False)
    measured_product.cache_clear()
    yield
    measured_product.cache_clear()


@pytest.mark.usefixtures("another_maker")
@pytest.mark.parametrize(
    ("by_onednn", "chosen"), [(0.5, "onednn"), (0.79, "onednn"), (0.9, "torch"), (1.2, "torch")]
)
def test_the_product_that_is_clearly_faster_is_chosen_once(
    by_onednn: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each round disturbed otherwise, the first one most.
    disturbed = iter([9.0, 9.0, 1.0, 3.0, 3.0, 1.0, 2.0, 2.0])

    def seconds(linear: object) -> float:
        return next(disturbed) * (by_onednn if linear is onednn_linear else 1.0)

    monkeypatch.setattr(onednn, "_seconds_of_mlp", seconds)
    assert measured_product() == measured_product() == chosen
    assert usual_product() == "onednn"  # of what is not measured


@pytest.mark.usefixtures("another_maker")
def test_a_measurement_ends_and_intels_own_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured_product() in ("torch", "onednn")
    measured_product.cache_clear()
    monkeypatch.setattr(onednn, "is_intel", lambda: True)
    monkeypatch.setattr(onednn, "_seconds_of_mlp", None)
    assert measured_product() == usual_product() == "torch"


def test_layers_are_multiplied_by_whom_they_are_told() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    for product, name in (("torch", "AddmmBackward0"), ("onednn", "_LinearBackward")):
        with multiplying(product):
            assert type(layer(x).grad_fn).__name__ == name

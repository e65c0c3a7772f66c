"""Networks of which only the shapes are asked."""

from __future__ import annotations

import pytest
import torch

from patchmine.backbones.family import create_encoder
from patchmine.backbones.shapes import OnlyShapes


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "convnext_atto"])
def test_a_network_without_values_has_the_shapes_of_one_with_them(model: str) -> None:
    whole = create_encoder(model, {}, "a test")
    empty = create_encoder(model, {"device": "meta"}, "a test").state_dict()
    assert all(tensor.is_meta for tensor in empty.values())
    shapes = {name: tensor.shape for name, tensor in whole.state_dict().items()}
    assert {name: tensor.shape for name, tensor in empty.items()} == shapes


def test_tensors_with_values_are_clamped() -> None:
    with OnlyShapes():
        found = torch.tensor([-2.0, 0.5, 2.0]).clamp_(-1, 1)
    assert found.tolist() == [-1.0, 0.5, 1.0]

"""Stochastic depth: timm's law, decided by a step's noise."""

from __future__ import annotations

import copy

import pytest
import timm.layers
import torch

from patchmine.backbones.family import Encoder, build_encoder, encode
from patchmine.models.droppath import DropPath, draw_drop_paths, seed_drop_paths
from patchmine.models.noise import Noise


def build(model: str = "beit_base_patch16_224", rate: float = 0.5) -> Encoder:
    torch.manual_seed(0)
    args = dict(embed_dim=32, depth=3, num_heads=2, drop_path_rate=rate)
    return build_encoder(model, image_size=(16, 16), patch_size=4, model_args=args)


@pytest.mark.parametrize("model", ["beit_base_patch16_224", "vit_tiny_patch16_224"])
def test_rates_and_names_are_timms(model: str) -> None:
    encoder = build(model)
    names = list(encoder.state_dict())
    rates = [part.drop_prob for part in encoder.modules() if isinstance(part, timm.layers.DropPath)]
    paths = seed_drop_paths(encoder)
    assert [path.rate for path in paths] == rates
    assert len(rates) == 4  # two branches of the second and third block; the first is never dropped
    assert not [part for part in encoder.modules() if isinstance(part, timm.layers.DropPath)]
    assert list(encoder.state_dict()) == names


def test_a_branch_is_dropped_or_enlarged_whole() -> None:
    path = DropPath(0.25).train()
    path.noise = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    out = path(torch.ones(4000, 2, 3))
    dropped = out[:, 0, 0] == 0
    assert torch.equal(dropped, path.noise < 0.25)
    assert torch.all(out[~dropped] == 1 / 0.75)
    assert torch.all(out[dropped] == 0)
    assert out.mean().item() == pytest.approx(1.0, abs=0.04)
    assert torch.equal(path.eval()(torch.ones(2, 1, 1)), torch.ones(2, 1, 1))


def test_decisions_belong_to_step_and_row() -> None:
    encoder = build().train()
    paths = seed_drop_paths(encoder)
    images = torch.randn(6, 3, 16, 16)
    noise = Noise(seed=3)

    def look(step: int, first: int, last: int) -> torch.Tensor:
        noise.begin(step, first, 6)
        draw_drop_paths(paths, noise, images[first:last])
        return encode(encoder, images[first:last])

    whole = look(7, 0, 6)
    torch.manual_seed(99)
    assert torch.equal(look(7, 0, 6), whole)
    torch.testing.assert_close(torch.cat([look(7, 0, 3), look(7, 3, 6)]), whole)
    assert not torch.equal(look(8, 0, 6), whole)
    encoder.eval()
    assert torch.equal(look(7, 0, 6), look(8, 0, 6))


def test_a_copy_is_independent_and_nothing_is_drawn_where_nothing_is_dropped() -> None:
    encoder = build().train()
    paths = seed_drop_paths(encoder)
    other = copy.deepcopy(encoder)
    draw_drop_paths(paths, Noise(), torch.zeros(2, 1, 1))
    assert all(part.noise is None for part in other.modules() if isinstance(part, DropPath))

    class Silent(Noise):
        def uniform(
            self, rows: int, *shape: int, device: torch.device | str = "cpu"
        ) -> torch.Tensor:
            raise AssertionError("drawn")

    draw_drop_paths([], Silent(), torch.zeros(2, 1, 1))
    encoder.eval()
    draw_drop_paths(paths, Silent(), torch.zeros(2, 1, 1))

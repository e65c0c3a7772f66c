"""SimMIM against numbers of the reference implementation."""

from __future__ import annotations

import math

import pytest
import torch
from golden_vectors import (
    FedNoise,
    Golden,
    batch_of,
    cut,
    described,
    load_golden,
    pair,
    repeating,
    wide,
)
from torch import Tensor

from patchmine.backbones.tokens import patch_positions, project_patches
from patchmine.methods.simmim import SimMIM
from patchmine.types import Mask, Progress

pytestmark = pytest.mark.golden
START = Progress(0, 1, 1)
FIRST_WEIGHTS = described("simmim").get("init_stats_mean_std_absmax_before_perturbation", {})


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("simmim")


def own_name(name: str) -> str:
    """The reference's mask token sits inside the encoder, its head is a 1 x 1 convolution."""
    ours = {
        "encoder.mask_token": "mask_token",
        "decoder.0.weight": "head.weight",
        "decoder.0.bias": "head.bias",
    }
    return ours.get(name, name)


def make(golden: Golden) -> SimMIM:
    """A small timm Beit of the stored sizes, freshly drawn; every option is the JSON's."""
    c = golden.config
    encoder = golden.encoder(
        "beit_base_patch16_224",
        init_values=c["init_values"],
        use_abs_pos_emb=c["ape"],
        use_rel_pos_bias=c["rpb"],
        use_shared_rel_pos_bias=c["shared_rpb"],
    )
    return SimMIM(
        SimMIM.Config(mask_ratio=c["mask_ratio"], mask_unit=c["mask_patch"]), encoder
    ).train()


@pytest.fixture
def method(golden: Golden) -> SimMIM:
    """With the stored weights, and noise that repeats the stored draw."""
    method = make(golden)
    stored = {
        own_name(name): tensor.flatten(1) if name == "decoder.0.weight" else tensor
        for name, tensor in golden.under("sd.").items()
        if not name.endswith("relative_position_index")  # computed, not stored, by timm
    }
    method.load_state_dict(stored)
    method.noise = FedNoise(repeating(golden["unit_perm"]))
    return method


@pytest.fixture
def mask(golden: Golden, method: SimMIM) -> Mask:
    return method.draw_mask(golden["images"])


def of_masked(stored: Tensor, mask: Mask, method: SimMIM) -> Tensor:
    """The masked patches of whole pictures (B, C, H, W): (B, M, P) in the order (c, ry, rx)."""
    patches = cut(stored, method.grid.patch)
    return patches.gather(1, wide(mask.masked, patches))


def test_mask(golden: Golden, method: SimMIM, mask: Mask) -> None:
    derived = golden.meta["derived"]
    assert method.num_units == math.prod(pair(derived["units"]))
    assert method.num_masked_units == derived["masked_units"]
    assert mask.masked.shape[1] == derived["masked_tokens"]
    assert torch.equal(mask.as_bool(), golden["mask"].flatten(1).bool())
    together = torch.cat([mask.visible, mask.masked], dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(math.prod(pair(derived["grid"]))).expand_as(together))


def test_forward(golden: Golden, method: SimMIM, mask: Mask) -> None:
    images = golden["images"]
    golden.check(project_patches(method.encoder, images), "patch_tokens", "tokens")
    entered = []
    method.encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    latent = method.encode(images, mask)
    # Stored before absolute positions are added, which not every file has.
    golden.check(entered[0][:, 1:] - patch_positions(method.encoder), "tokens_after_mask", "tokens")
    golden.check(
        latent[:, 1:].transpose(1, 2).reshape_as(golden["latent_map"]), "latent_map", "tokens"
    )
    golden.check(
        method.reconstruct(images, mask), of_masked(golden["recon"], mask, method), "tokens"
    )
    assert torch.equal(method.target(images, mask), of_masked(images, mask, method))


def test_relative_positions(golden: Golden, method: SimMIM) -> None:
    expected = golden["rel_pos_bias"]
    golden.check(method.encoder.rel_pos_bias(), expected, "tokens")


def test_error_of_each_patch(golden: Golden, method: SimMIM) -> None:
    panels = method.panels(batch_of(golden["images"]), START)
    error = next(panel.data for panel in panels if panel.title == "error")
    hidden = golden["mask"].bool()
    golden.check(error[hidden], golden["patch_l1"][hidden], "target")
    assert error[~hidden].isnan().all()


def test_loss_and_gradients(golden: Golden, method: SimMIM) -> None:
    losses = method(batch_of(golden["images"]), START)
    golden.check_number(losses["loss"], golden.scalar("loss"))
    losses["loss"].backward()
    stored = golden.under("grad.")
    assert set(stored) == set(golden.setting("grads", list(stored)))
    golden.check_gradients(dict(method.named_parameters()), stored, own_name)


@pytest.mark.parametrize("name", FIRST_WEIGHTS)
def test_start(golden: Golden, name: str) -> None:
    """Mean, deviation and largest value of freshly drawn weights, within what chance allows for
    their number.
    """
    torch.manual_seed(0)
    values = dict(make(golden).named_parameters())[own_name(name)].detach().flatten()
    _, deviation, largest = FIRST_WEIGHTS[name]
    count = len(values)
    assert values.std().item() == pytest.approx(deviation, rel=4 / count**0.5)
    assert abs(values.mean().item()) < 4 * deviation / count**0.5
    # Cut at one deviation, the density at the cut is 0.71: the largest of n falls short of it by
    # 1.4 / n on average.
    assert values.abs().max().item() == pytest.approx(largest, rel=max(0.01, 4.8 / count))

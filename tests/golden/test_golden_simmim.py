"""SimMIM against numbers of the reference implementation (spec simmim.md, section 10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.methods.simmim import SimMIM
from patchmine.models.vit import build_encoder, project_patches
from patchmine.types import Batch, Mask, Progress

pytestmark = pytest.mark.golden
START = Progress(0, 1, 1)


@pytest.fixture(scope="module")
def golden(load_golden: Callable[[str], Any]) -> Any:
    return load_golden("simmim")


def own_names(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's names -> ours: its mask token sits inside the encoder, its head is a 1 x 1 convolution."""
    ours = {"encoder.mask_token": "mask_token", "decoder.0.weight": "head.weight", "decoder.0.bias": "head.bias"}
    return {
        ours.get(name, name): tensor.flatten(1) if name == "decoder.0.weight" else tensor
        for name, tensor in stored.items()
        if not name.endswith("relative_position_index")  # computed, not stored, by timm
    }


def make(golden: Any) -> SimMIM:
    """A small timm Beit with the stored weights; every option is the JSON's."""
    c = golden.config
    assert golden.meta["eps_layernorm"] == 1e-6, "timm's Beit has eps 1e-6"
    encoder = build_encoder(
        "beit_base_patch16_224",
        image_size=(c["img"], c["img"]),
        patch_size=c["patch"],
        model_args=dict(
            embed_dim=c["dim"],
            depth=c["depth"],
            num_heads=c["heads"],
            init_values=c["init_values"],
            use_abs_pos_emb=c["ape"],
            use_rel_pos_bias=c["rpb"],
            use_shared_rel_pos_bias=c["shared_rpb"],
        ),
    )
    return SimMIM(SimMIM.Config(mask_ratio=c["mask_ratio"], mask_unit=c["mask_patch"]), encoder).train()


def build(golden: Any) -> SimMIM:
    method = make(golden)
    stored = {name.removeprefix("sd."): t for name, t in golden.tensors.items() if name.startswith("sd.")}
    method.load_state_dict(own_names(stored))
    return method


@pytest.fixture
def method(golden: Any, fed_noise: Callable[[Tensor], Any]) -> SimMIM:
    """With noise that repeats the stored draw: the k-th unit of the permutation gets the k-th lowest number."""
    method = build(golden)
    order = golden.tensors["unit_perm"]
    ranks = torch.arange(order.shape[1]).expand_as(order).float()
    method.noise = fed_noise(torch.zeros(order.shape).scatter(1, order, ranks))
    return method


@pytest.fixture
def mask(golden: Any, method: SimMIM) -> Mask:
    return method.draw_mask(golden.tensors["images"])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def of_masked(stored: Tensor, mask: Mask, method: SimMIM) -> Tensor:
    """The masked patches of whole pictures (B, C, H, W), by pixel_unshuffle: (B, M, P) in the order (c, ry, rx)."""
    folded = F.pixel_unshuffle(stored, method.grid.patch[0]).flatten(2).transpose(1, 2)  # (B, L, P)
    return folded.gather(1, mask.masked[:, :, None].expand(-1, -1, folded.shape[-1]))


def test_mask(golden: Any, method: SimMIM, mask: Mask) -> None:
    derived = golden.meta["derived"]
    assert (method.num_units, method.num_masked_units) == (derived["units"] ** 2, derived["masked_units"])
    assert mask.masked.shape[1] == derived["masked_tokens"]
    assert torch.equal(mask.as_bool(), golden.tensors["mask"].flatten(1).bool())
    together = torch.cat([mask.visible, mask.masked], dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(derived["grid"] ** 2).expand_as(together))


def test_forward(golden: Any, method: SimMIM, mask: Mask) -> None:
    images = golden.tensors["images"]
    close(project_patches(method.encoder, images), golden.tensors["patch_tokens"])
    entered = []
    block = method.encoder.blocks[0]
    block.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    latent = method.encode(images, mask)
    close(entered[0][:, 1:], golden.tensors["tokens_after_mask"])
    close(latent[:, 1:].transpose(1, 2).reshape_as(golden.tensors["latent_map"]), golden.tensors["latent_map"])
    painted = method.reconstruct(images, mask)
    close(painted, of_masked(golden.tensors["recon"], mask, method))
    assert torch.equal(method.target(images, mask), of_masked(images, mask, method))


def test_relative_positions(golden: Any, method: SimMIM) -> None:
    close(method.encoder.rel_pos_bias(), golden.tensors["rel_pos_bias"])


def test_error_of_each_patch(golden: Any, method: SimMIM) -> None:
    rows = len(golden.tensors["images"])
    batch = Batch([golden.tensors["images"]], torch.arange(rows), torch.zeros(rows, 4), torch.zeros(rows).bool())
    error = next(panel.data for panel in method.panels(batch, START) if panel.title == "error")
    hidden = golden.tensors["mask"].bool()
    close(error[hidden], golden.tensors["patch_l1"][hidden])
    assert error[~hidden].isnan().all()


def test_loss_and_gradients(golden: Any, method: SimMIM) -> None:
    rows = len(golden.tensors["images"])
    batch = Batch([golden.tensors["images"]], torch.arange(rows), torch.zeros(rows, 4), torch.zeros(rows).bool())
    losses = method(batch, START)
    assert losses["loss"].item() == pytest.approx(golden.scalar("loss"), rel=1e-6)
    losses["loss"].backward()
    stored = {name.removeprefix("grad."): t for name, t in golden.tensors.items() if name.startswith("grad.")}
    assert set(stored) == set(golden.config["grads"])
    parameters = dict(method.named_parameters())
    for name, expected in own_names(stored).items():
        bound = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(
            parameters[name].grad, expected, atol=bound, rtol=0, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_start(golden: Any) -> None:
    """Mean, deviation and largest value of freshly drawn weights, within what chance allows for their number."""
    torch.manual_seed(0)
    parameters = dict(make(golden).named_parameters())
    for name, (_, deviation, largest) in golden.meta["init_stats_mean_std_absmax_before_perturbation"].items():
        (own,) = own_names({name: torch.zeros(1, 1)})
        values = parameters[own].detach().flatten()
        count = len(values)
        assert values.std().item() == pytest.approx(deviation, rel=4 / count**0.5), name
        assert abs(values.mean().item()) < 4 * deviation / count**0.5, name
        assert values.abs().max().item() == pytest.approx(largest, rel=0.1 if count < 100 else 0.01), name

"""MAE on clips against numbers of VideoMAE's reference implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_vectors import FedNoise, Golden, batch_of, load_golden, load_weights
from torch import Tensor

from patchmine.backbones.family import encode
from patchmine.backbones.reference import (
    from_reference_names,
    from_videomae_names,
    to_reference_names,
    to_videomae_names,
)
from patchmine.methods.hpm import HPM
from patchmine.methods.mae import MAE
from patchmine.ops.losses import squared_error
from patchmine.ops.masks import count_positions
from patchmine.ops.patches import pixel_targets
from patchmine.types import Mask, Progress

pytestmark = pytest.mark.golden
START = Progress(0, 400, 1)


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("videomae")


def build(golden: Golden, kind: Any = MAE, **options: Any) -> Any:
    c = golden.config
    encoder = golden.encoder("video_vit_tiny_patch16", clip=(c["num_frames"], c["tubelet_size"]))
    # Cubes are standardised in the reference's engine, always.
    settings = dict(mask_ratio=c["mask_ratio"], norm_pix_loss=True, **golden.decoder())
    method = kind(kind.Config(**settings, **options), encoder)
    state = from_reference_names(from_videomae_names(golden.under("state.")))
    load_weights(method, state, absent=("teacher.", "predictor."))
    return method.train()


@pytest.fixture(scope="module")
def mask(golden: Golden) -> Mask:
    stored = golden["mask"]
    order = stored.argsort(dim=1, stable=True)
    count = stored.shape[1]
    masked = golden.setting("num_masked", int(stored[0].sum()))
    assert count == golden.setting("num_cubes", count)
    return Mask(order[:, : count - masked], order[:, count - masked :], count)


def noise_of(golden: Golden) -> FedNoise:
    """Noise of the places that gives the stored tubes: low where a place is visible."""
    slots = golden.config["num_frames"] // golden.config["tubelet_size"]
    return FedNoise(golden["mask"].unflatten(1, (slots, -1))[:, 0])


def test_fixed_positions(golden: Golden) -> None:
    method = build(golden)
    golden.check(method.encoder.pos_embed, "encoder_pos_embed", "table")
    golden.check(method.decoder_input.pos_embed[None], "decoder_pos_embed", "table")


def test_tubes(golden: Golden, mask: Mask) -> None:
    method = build(golden)
    masked_places = mask.masked.shape[1] // method.grid.num_slots
    assert (
        method.grid.num_positions - count_positions(method.grid, golden.config["mask_ratio"])
        == masked_places
    )
    method.noise = noise_of(golden)
    drawn = method.draw_mask(golden["video"])
    assert torch.equal(drawn.as_bool(), golden["mask"].bool())
    assert torch.equal(drawn.visible, mask.visible)
    assert torch.equal(drawn.masked, mask.masked)


def test_tokens_and_predictions(golden: Golden, mask: Mask) -> None:
    method = build(golden)
    clips = golden["video"]
    latent = encode(method.encoder, clips, mask.visible)
    golden.check(latent, "latent", "tokens")
    golden.check(method.decoder_input(latent, mask), "decoder_input", "tokens")
    golden.check(method.reconstruct(clips, mask), "pred", "tokens")


def test_targets(golden: Golden, mask: Mask) -> None:
    target = pixel_targets(
        golden["video"], mask.masked, build(golden).grid.patch, norm_pix_loss=True
    )
    golden.check(target, "target_masked", "target")
    golden.check(squared_error(golden["pred"], target), "loss_per_cube", "target")


def test_loss_and_gradients(golden: Golden) -> None:
    method = build(golden)
    method.noise = noise_of(golden)
    loss = method(batch_of(golden["video"]), START)["loss"]
    golden.check_number(loss, golden.scalar("loss"))
    loss.backward()
    gradients: dict[str, Tensor] = {
        name: p.grad for name, p in method.named_parameters() if p.grad is not None
    }
    theirs = to_videomae_names(to_reference_names(gradients))
    stored = golden.under("grad.")
    assert stored
    for name, expected in stored.items():
        golden.tolerance("gradient").check(theirs[name], expected, f"gradient of {name}")


@pytest.mark.parametrize("prediction", ["none", "relative"])
def test_hpm_without_hard_cubes_is_videomae(golden: Golden, prediction: str) -> None:
    """The same mask and, bit for bit, the same reconstruction loss."""
    batch = batch_of(golden["video"])
    plain = build(golden)
    plain.noise = noise_of(golden)
    mined = build(golden, HPM, prediction=prediction, alpha_end=0.0)
    mined.noise = noise_of(golden)
    losses = mined(batch, Progress(399, 400, 1))
    found = losses["loss"] if prediction == "none" else losses["reconstruction"]
    assert torch.equal(found, plain(batch, START)["loss"])

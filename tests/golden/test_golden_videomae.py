"""MAE on clips against numbers of VideoMAE's reference implementation (spec hpm-video.md, section 10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from patchmine.methods.hpm import HPM
from patchmine.methods.mae import MAE
from patchmine.models.official import from_reference_names, to_reference_names
from patchmine.models.videomae import from_videomae_names, to_videomae_names
from patchmine.models.vit import build_encoder, encode
from patchmine.ops.losses import squared_error
from patchmine.ops.masks import count_positions
from patchmine.ops.patches import pixel_targets
from patchmine.types import Batch, Mask, Progress

pytestmark = pytest.mark.golden
START = Progress(0, 400, 1)


@pytest.fixture(scope="module")
def golden(load_golden: Callable[[str], Any]) -> Any:
    return load_golden("videomae")


def build(golden: Any, kind: Any = MAE, **options: Any) -> Any:
    c = golden.config
    encoder = build_encoder(
        "video_vit_tiny_patch16",
        image_size=(c["img_size"],) * 2,
        patch_size=c["patch_size"],
        clip=(c["num_frames"], c["tubelet_size"]),
        model_args=dict(embed_dim=c["embed_dim"], depth=c["depth"], num_heads=c["num_heads"]),
    )
    decoder = {name: c[name] for name in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")}
    method = kind(kind.Config(mask_ratio=c["mask_ratio"], norm_pix_loss=True, **decoder, **options), encoder)
    stored = {name.removeprefix("state."): t for name, t in golden.tensors.items() if name.startswith("state.")}
    state = from_reference_names(from_videomae_names(stored))
    missing = method.load_state_dict(state, strict=False).missing_keys
    assert all(name.startswith(("teacher.", "predictor.")) for name in missing)
    return method.train()


@pytest.fixture
def mask(golden: Any) -> Mask:
    order = golden.tensors["mask"].argsort(dim=1, stable=True)
    shown = golden.meta["num_cubes"] - golden.meta["num_masked"]
    return Mask(order[:, :shown], order[:, shown:], golden.meta["num_cubes"])


@pytest.fixture
def batch(golden: Any) -> Batch:
    clips = golden.tensors["video"]
    rows = len(clips)
    return Batch([clips], torch.arange(rows), torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.bool))


def noise_of(golden: Any, fed_noise: Any) -> Any:
    """Noise of the places that gives the stored tubes: low where a place is visible."""
    slots = golden.config["num_frames"] // golden.config["tubelet_size"]
    return fed_noise(golden.tensors["mask"].unflatten(1, (slots, -1))[:, 0])


def test_fixed_positions(golden: Any) -> None:
    method = build(golden)
    torch.testing.assert_close(method.encoder.pos_embed, golden.tensors["encoder_pos_embed"], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        method.decoder_input.pos_embed[None], golden.tensors["decoder_pos_embed"], atol=1e-6, rtol=0
    )


def test_tubes(golden: Any, mask: Mask, batch: Batch, fed_noise: Any) -> None:
    method = build(golden)
    masked_places = golden.meta["num_masked"] // method.grid.num_slots
    assert method.grid.num_positions - count_positions(method.grid, golden.config["mask_ratio"]) == masked_places
    method.noise = noise_of(golden, fed_noise)
    drawn = method.draw_mask(batch.views[0])
    assert torch.equal(drawn.as_bool(), golden.tensors["mask"].bool())
    assert torch.equal(drawn.visible, mask.visible)
    assert torch.equal(drawn.masked, mask.masked)


def test_tokens_and_predictions(golden: Any, mask: Mask) -> None:
    method = build(golden)
    clips = golden.tensors["video"]
    latent = encode(method.encoder, clips, mask.visible)
    torch.testing.assert_close(latent, golden.tensors["latent"], atol=2e-5, rtol=1e-4)
    tokens = method.decoder_input(latent, mask)
    torch.testing.assert_close(tokens, golden.tensors["decoder_input"], atol=2e-5, rtol=1e-4)
    predicted = method.reconstruct(clips, mask)
    torch.testing.assert_close(predicted, golden.tensors["pred"], atol=2e-5, rtol=1e-4)


def test_targets(golden: Any, mask: Mask) -> None:
    target = pixel_targets(golden.tensors["video"], mask.masked, (2, 8, 8), norm_pix_loss=True)
    torch.testing.assert_close(target, golden.tensors["target_masked"], atol=1e-5, rtol=1e-5)
    per_cube = squared_error(golden.tensors["pred"], target)
    torch.testing.assert_close(per_cube, golden.tensors["loss_per_cube"], atol=1e-5, rtol=1e-5)


def test_loss_and_gradients(golden: Any, batch: Batch, fed_noise: Any) -> None:
    method = build(golden)
    method.noise = noise_of(golden, fed_noise)
    loss = method(batch, START)["loss"]
    assert loss.item() == pytest.approx(golden.scalar("loss"), rel=1e-5)
    loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters()}
    stored = {name.removeprefix("grad."): t for name, t in golden.tensors.items() if name.startswith("grad.")}
    theirs = to_videomae_names(to_reference_names({name: g for name, g in gradients.items() if g is not None}))
    assert stored
    for name, expected in stored.items():
        bound = 1e-3 * expected.abs().max().item() + 1e-7
        torch.testing.assert_close(theirs[name], expected, atol=bound, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("prediction", ["none", "relative"])
def test_hpm_without_hard_cubes_is_videomae(golden: Any, batch: Batch, fed_noise: Any, prediction: str) -> None:
    """The same mask and, bit for bit, the same reconstruction loss."""
    plain = build(golden)
    plain.noise = noise_of(golden, fed_noise)
    mined = build(golden, HPM, prediction=prediction, alpha_end=0.0)
    mined.noise = noise_of(golden, fed_noise)
    losses = mined(batch, Progress(399, 400, 1))
    found = losses["loss"] if prediction == "none" else losses["reconstruction"]
    assert torch.equal(found, plain(batch, START)["loss"])

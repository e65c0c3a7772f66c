"""MAE and HPM on clips: what is hidden, what is predicted, and that HPM without hard patches is MAE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from patchmine.errors import UserError
from patchmine.methods.hpm import HPM
from patchmine.methods.mae import MAE
from patchmine.models.vit import build_encoder, encode
from patchmine.types import Batch, Progress

EARLY, LATE = Progress(0, 400, 1), Progress(399, 400, 1)
SLOTS, PLACES, CUBES = 4, 16, 64  # of clips of 8 frames of 16x16 pixels
MASKED = 11  # int(0.7 * 16), where MAE's rule for images would leave int(0.3 * 16) = 4 visible and hide 12


def build(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    encoder = build_encoder(
        "video_vit_tiny_patch16",
        image_size=(16, 16),
        patch_size=4,
        clip=(8, 2),
        model_args=dict(embed_dim=32, depth=2, num_heads=2),
    )
    decoder = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, mask_ratio=0.7, norm_pix_loss=True)
    method = kind(kind.Config(**(decoder | options)), encoder).train()
    method.noise.begin(3)
    return method


def batch_of(clips: Tensor) -> Batch:
    rows = len(clips)
    return Batch([clips], torch.arange(rows), torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.bool))


def clips(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("progress", [EARLY, LATE], ids=["early", "late"])
@pytest.mark.parametrize("kind", [MAE, HPM])
def test_a_place_is_hidden_at_all_times_or_at_none(kind: Any, progress: Progress) -> None:
    method = build(kind)
    if kind is MAE:
        mask = method.draw_mask(clips())
    else:
        mask = method.draw_mask(clips(), torch.rand(3, CUBES), progress)
    hidden = mask.as_bool().unflatten(1, (SLOTS, PLACES))
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))
    assert torch.equal(hidden[:, 0].sum(dim=1), torch.full((3,), MASKED))
    assert mask.visible.shape == (3, SLOTS * (PLACES - MASKED))
    assert torch.equal(mask.visible.sort(dim=1).values, mask.visible)
    assert torch.equal(mask.masked.sort(dim=1).values, mask.masked)


@pytest.mark.parametrize(("score", "hardest"), [("mean", [1, 2]), ("max", [0, 1])])
def test_the_hardest_tubes_are_hidden(score: str, hardest: list[int]) -> None:
    method = build(HPM, tube_score=score, alpha_start=2 / MASKED, alpha_end=2 / MASKED)
    difficulty = torch.zeros(1, SLOTS, PLACES)
    difficulty[0, :, 1] = torch.tensor([8.0, 8.0, 8.0, 8.0])
    difficulty[0, :, 2] = torch.tensor([4.0, 4.0, 4.0, 4.0])
    difficulty[0, :, 0] = torch.tensor([0.0, 0.0, 0.0, 9.0])
    shown = torch.zeros(PLACES)
    for step in range(40):
        method.noise.begin(step)
        mask = method.draw_mask(clips(1), difficulty.flatten(1), EARLY)
        shown[mask.visible[0, : PLACES - MASKED]] += 1
    assert not shown[hardest].any()
    assert shown[[place for place in range(PLACES) if place not in hardest]].all()


def test_cubes_are_hidden_one_by_one_in_the_same_number() -> None:
    method = build(HPM, mask_unit="cube", alpha_start=0.5, alpha_end=0.5)
    difficulty = torch.rand(3, CUBES, generator=torch.Generator().manual_seed(1))
    mask = method.draw_mask(clips(), difficulty, EARLY)
    hidden = mask.as_bool()
    assert torch.equal(hidden.sum(dim=1), torch.full((3,), SLOTS * MASKED))
    assert not torch.equal(hidden[:, :PLACES], hidden[:, PLACES : 2 * PLACES])
    hardest = difficulty.argsort(dim=1)[:, -SLOTS * MASKED // 2 :]
    assert hidden.gather(1, hardest).all()
    method(batch_of(clips()), LATE)["loss"].backward()


def test_without_hard_tubes_hpm_is_mae_bit_for_bit() -> None:
    plain, mined = build(MAE), build(HPM, alpha_end=0.0, prediction="none")
    shared = plain.state_dict()
    assert mined.load_state_dict(shared, strict=True)
    ours, theirs = mined(batch_of(clips()), LATE), plain(batch_of(clips()), LATE)
    assert torch.equal(ours["loss"], theirs["loss"])
    for method, losses in ((mined, ours), (plain, theirs)):
        losses["loss"].backward()
        assert method.encoder.patch_embed.proj.weight.grad is not None
    gradients = dict(plain.named_parameters())
    assert all(torch.equal(p.grad, gradients[name].grad) for name, p in mined.named_parameters())


def test_with_a_predictor_the_reconstruction_is_maes_all_the_same() -> None:
    plain, mined = build(MAE), build(HPM, alpha_end=0.0)
    mined.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(mined(batch_of(clips()), LATE)["reconstruction"], plain(batch_of(clips()), LATE)["loss"])


def test_hidden_pixels_do_not_reach_the_encoder() -> None:
    method = build(MAE)
    mask = method.draw_mask(clips())
    hidden = mask.as_bool().reshape(3, SLOTS, 4, 4)
    for axis, times in ((1, 2), (2, 4), (3, 4)):
        hidden = hidden.repeat_interleave(times, axis)
    changed = torch.where(hidden[:, None], torch.full_like(clips(), 9.0), clips())
    assert torch.equal(encode(method.encoder, changed, mask.visible), encode(method.encoder, clips(), mask.visible))


def test_the_decoder_starts_as_videomaes() -> None:
    method = build(MAE)
    assert method.decoder_input.embed.bias is None
    token = method.decoder_input.mask_token
    assert token.abs().max() <= 0.02
    assert token.std() > 0.005
    bound = 1 / 32**0.5  # torch's default for 32 inputs, where Xavier's would be (6 / 48)^0.5
    assert 0.9 * bound < method.decoder_input.embed.weight.abs().max() <= bound


@pytest.mark.parametrize("target", ["dino", "clip"])
def test_networks_for_images_are_no_target(target: str) -> None:
    with pytest.raises(UserError, match=f"method.target={target} is a network for images.*method.target=pixel"):
        build(HPM, target=target, target_file="x.pth")


def test_it_learns_where_clips_move() -> None:
    """A square of noise crosses the second row before a still texture; the teacher then finds that row the hardest."""
    method = build(HPM, ema_start=0.9, ema_end=0.9, decoder_embed_dim=32)
    generator = torch.Generator().manual_seed(0)
    texture = torch.randn(3, 1, 4, 4, generator=generator).repeat(1, 8, 4, 4)

    def moving(count: int) -> Tensor:
        made = texture.repeat(count, 1, 1, 1, 1)
        for time in range(8):
            side = slice(2 * time, 2 * time + 4)
            made[:, :, time, 4:8, side] = torch.randn(made[:, :, time, 4:8, side].shape, generator=generator)
        return made

    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)
    for step in range(200):
        method.noise.begin(step)
        progress = Progress(step, 200, 1)
        loss = method(batch_of(moving(8)), progress)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(progress)
    _, difficulty = method.look(moving(16), True)
    scores = difficulty.unflatten(1, (SLOTS, PLACES)).mean(dim=1)
    path, still = scores[:, 4:8].flatten(), scores[:, [*range(4), *range(8, 16)]].flatten()
    assert (path[:, None] > still).float().mean() > 0.9  # area under the curve of hits over false alarms

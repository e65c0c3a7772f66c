"""MAE and HPM on clips: what is hidden, what is predicted, and that HPM without hard patches is
MAE.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from patchmine.backbones.family import build_encoder, encode
from patchmine.errors import UserError
from patchmine.methods.hpm import HPM
from patchmine.methods.mae import MAE
from patchmine.types import Batch, Progress

EARLY, LATE = Progress(0, 400, 1), Progress(399, 400, 1)
SLOTS, PLACES, CUBES = 4, 16, 64  # of clips of 8 frames of 16x16 pixels
# Int(0.7 * 16), where MAE's rule for images would leave int(0.3 * 16) = 4 visible and hide 12
MASKED = 11


def build(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    encoder = build_encoder(
        "video_vit_tiny_patch16",
        image_size=(16, 16),
        patch_size=4,
        clip=(8, 2),
        model_args=dict(embed_dim=32, depth=2, num_heads=2),
    )
    decoder = dict(
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
        mask_ratio=0.7,
        norm_pix_loss=True,
    )
    method = kind(kind.Config(**(decoder | options)), encoder).train()
    method.noise.begin(3)
    return method


def batch_of(clips: Tensor) -> Batch:
    rows = len(clips)
    return Batch(
        [clips], torch.arange(rows), torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.bool)
    )


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
    assert torch.equal(
        mined(batch_of(clips()), LATE)["reconstruction"], plain(batch_of(clips()), LATE)["loss"]
    )


def test_hidden_pixels_do_not_reach_the_encoder() -> None:
    method = build(MAE)
    mask = method.draw_mask(clips())
    hidden = mask.as_bool().reshape(3, SLOTS, 4, 4)
    for axis, times in ((1, 2), (2, 4), (3, 4)):
        hidden = hidden.repeat_interleave(times, axis)
    changed = torch.where(hidden[:, None], torch.full_like(clips(), 9.0), clips())
    assert torch.equal(
        encode(method.encoder, changed, mask.visible), encode(method.encoder, clips(), mask.visible)
    )


def test_the_decoder_starts_as_videomaes() -> None:
    method = build(MAE)
    assert method.decoder_input.embed.bias is None
    token = method.decoder_input.mask_token
    assert token.abs().max() <= 0.02
    assert token.std() > 0.005
    bound = 1 / 32**0.5  # torch's default for 32 inputs, where Xavier's would be (6 / 48)^0.5
    assert 0.9 * bound < method.decoder_input.embed.weight.abs().max() <= bound


@pytest.mark.parametrize("kind", [MAE, HPM])
def test_the_mask_token_of_clips_is_not_decayed(kind: Any) -> None:
    """MCG-NJU/VideoMAE, modeling_pretrain.py, ``no_weight_decay``."""
    decayed, spared = build(kind).param_groups()
    assert decayed.weight_decay is None
    assert ([name for name, _ in spared.params], spared.weight_decay) == (
        ["decoder_input.mask_token"],
        0.0,
    )


@pytest.mark.parametrize("target", ["dino", "clip"])
def test_networks_for_images_are_no_target(target: str) -> None:
    with pytest.raises(
        UserError, match=f"method.target={target} is a network for images.*method.target=pixel"
    ):
        build(HPM, target=target, target_file="x.pth")


def crossed_by_noise(texture: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, 8, 16, 16): a square of noise crosses a row of places, one for each clip, before a
    still texture.
    """
    made = texture.repeat(len(rows), 1, 8, 1, 1)
    for clip, row in zip(made, rows.tolist(), strict=True):
        for time in range(8):
            left = round(time * 12 / 7)
            clip[:, time, 4 * row : 4 * row + 4, left : left + 4] = torch.randn(
                3, 4, 4, generator=generator
            )
    return made


def train(method: Any, make: Any, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(
        [p for p in method.parameters() if p.requires_grad], betas=(0.9, 0.95)
    )
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 100) * (1 - step / steps)
        method.noise.begin(step)
        progress = Progress(step, steps, 1)
        method(batch_of(make()), progress)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(progress)


def area(scores: Tensor, path: Tensor) -> float:
    """Area under the curve of hits over false alarms: how often a place of the path scores above
    one that is not.
    """
    above = scores[:, :, None] > scores[:, None, :]
    pairs = path[:, :, None] & ~path[:, None, :]
    return above[pairs].float().mean().item()


def test_it_learns_which_places_are_hard() -> None:
    """The square always crosses the second row; the teacher then finds that row the hardest."""
    method = build(HPM, ema_start=0.9, ema_end=0.9, decoder_embed_dim=32)
    generator = torch.Generator().manual_seed(0)
    texture = torch.randn(3, 1, 4, 4, generator=generator).repeat(1, 1, 4, 4)
    train(
        method,
        lambda: crossed_by_noise(texture, torch.ones(8, dtype=torch.int64), generator),
        200,
        3e-3,
    )
    clips = crossed_by_noise(texture, torch.ones(16, dtype=torch.int64), generator)
    scores = method.ask_teachers(clips, True)[1].unflatten(1, (SLOTS, PLACES)).mean(dim=1)
    path = (torch.arange(PLACES) // 4 == 1).expand(16, -1)
    assert area(scores, path) > 0.9


@pytest.mark.slow
def test_it_learns_where_a_clip_moves() -> None:
    """The square crosses another row in every clip, so only the clip can tell which; that row is
    then masked more.
    """
    torch.manual_seed(0)
    sizes = dict(embed_dim=64, depth=3, num_heads=4)
    encoder = build_encoder(
        "video_vit_tiny_patch16", image_size=(16, 16), patch_size=4, clip=(8, 2), model_args=sizes
    )
    settings = dict(
        decoder_embed_dim=64,
        decoder_depth=2,
        decoder_num_heads=4,
        mask_ratio=0.7,
        norm_pix_loss=True,
    )
    settings |= dict(losspred_head="scalar", ema_start=0.99, ema_end=0.995, ema_ramp_epochs=None)
    method = HPM(HPM.Config(**settings), encoder).train()
    generator = torch.Generator().manual_seed(0)
    texture = torch.randn(3, 1, 4, 4, generator=generator).repeat(1, 1, 4, 4)

    def rows(count: int) -> Tensor:
        return torch.randint(4, (count,), generator=generator)

    train(method, lambda: crossed_by_noise(texture, rows(32), generator), 1200, 3e-3)
    crossed = rows(256)
    clips = crossed_by_noise(texture, crossed, generator)
    difficulty = method.ask_teachers(clips, True)[1]
    path = torch.arange(PLACES) // 4 == crossed[:, None]
    assert area(difficulty.unflatten(1, (SLOTS, PLACES)).mean(dim=1), path) > 0.7
    hidden = {
        name: method.draw_mask(clips, scores, LATE).as_bool()[:, :PLACES][path].float().mean()
        for name, scores in (("mined", difficulty), ("random", None))
    }
    assert hidden["mined"] > hidden["random"] + 0.05

"""MAE's masks of blocks and of coloured noise: what is hidden together, how often, how far apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from patchmine.backbones.family import build_encoder
from patchmine.errors import UserError
from patchmine.methods.mae import MAE
from patchmine.models.noise_filter import NoiseFilter
from patchmine.ops.masks import lowest_visible
from patchmine.types import Batch, Grid, Mask, Progress

COLOURS = ("red", "green", "blue", "purple")
SMALL = dict(embed_dim=32, depth=1, num_heads=2)
SIDE = 16


def build(clip: bool = False, **options: Any) -> MAE:
    torch.manual_seed(0)
    model = "video_vit_tiny_patch16" if clip else "vit_tiny_patch16_224"
    sizes = dict(image_size=(64, 64), patch_size=4, model_args=SMALL)
    encoder = build_encoder(model, **sizes, **(dict(clip=(4, 2)) if clip else {}))
    decoder = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    method = MAE(MAE.Config(**(decoder | options)), encoder)
    method.noise.begin(5)
    return method


def drawn(method: MAE, rows: int = 6, frames: tuple[int, ...] = ()) -> Mask:
    return method.draw_mask(torch.zeros(rows, 3, *frames, 64, 64))


def noise(rows: int, places: int = SIDE * SIDE) -> Tensor:
    return torch.rand(rows, places, generator=torch.Generator().manual_seed(1))


# ---- blocks ----


@pytest.mark.parametrize(("block", "ratio"), [(1, 0.75), (2, 0.75), (4, 0.75), (4, 0.6), (8, 0.5)])
def test_a_block_is_hidden_whole_or_not_at_all(block: int, ratio: float) -> None:
    mask = drawn(build(mask_block=block, mask_ratio=ratio))
    hidden = mask.as_bool().reshape(6, SIDE, SIDE)
    total = (SIDE // block) ** 2
    for image in hidden:
        whole = 0
        for top in range(0, SIDE, block):
            for left in range(0, SIDE, block):
                inside = image[top : top + block, left : left + block].flatten().tolist()
                assert len(set(inside)) == 1
                whole += inside[0]
        assert whole == total - int(total * (1 - ratio))
    assert not torch.equal(hidden[0], hidden[1])
    together = torch.cat([mask.visible, mask.masked], dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(SIDE * SIDE).expand(6, -1))


def test_blocks_that_do_not_fill_the_grid_are_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"method\.mask_block=6: blocks of 6x6 patches do not fill 16x16: "
        r"try method\.mask_block=4, or another image_size",
    ):
        build(mask_block=6)
    with pytest.raises(
        UserError,
        match=r"method\.mask_ratio=0\.8 leaves 0 of 4 blocks of method\.mask_block=8 visible: try",
    ):
        build(mask_block=8, mask_ratio=0.8)


# ---- colours ----


def transfer(colour: Any) -> Tensor:
    """Factor of each frequency by its distance from 0: of an impulse, (SIDE, SIDE) -> 1-d."""
    impulse = torch.zeros(1, SIDE * SIDE)
    impulse[0, 0] = 1
    answer = NoiseFilter(Grid((SIDE, SIDE), (4, 4)), colour)(impulse).reshape(SIDE, SIDE)
    spectrum = torch.fft.fft2(answer)
    assert spectrum.imag.abs().max() < 1e-5  # it moves nothing
    return spectrum.real.diagonal()[: SIDE // 2 + 1]


def test_red_keeps_low_frequencies_blue_high_ones_green_those_between() -> None:
    red, green, blue, purple = map(transfer, COLOURS)
    assert red[0] == pytest.approx(1, abs=1e-5)
    assert (red.diff() < 1e-6).all()
    assert red[4:].abs().max() < 0.01
    assert blue[0].abs() < 1e-5
    assert (blue.diff() > 0).all()
    assert blue[-1] > 0.5
    peak = int(green.argmax())
    assert 1 < peak < SIDE // 2
    assert green[0].abs() < 1e-5
    assert (green[: peak + 1].diff() > 0).all()
    assert (green[peak:].diff() < 0).all()
    torch.testing.assert_close(red + green + blue, torch.ones(SIDE // 2 + 1))
    torch.testing.assert_close(green + purple, torch.ones(SIDE // 2 + 1))


@pytest.mark.parametrize("colour", COLOURS)
def test_filtered_noise_has_the_power_of_its_filter(colour: Any) -> None:
    """The mean periodogram of many fields of white noise, whose own is flat, 1/12 a place."""
    found = NoiseFilter(Grid((SIDE, SIDE), (4, 4)), colour)(noise(2000) - 0.5)
    power = torch.fft.fft2(found.reshape(-1, SIDE, SIDE)).abs().square().mean(dim=0)
    power = power.diagonal()[: SIDE // 2 + 1] * 12 / SIDE**2
    # A mean of 2000 has 2.3 % of spread: of an exponential, or at both ends of a square of 1.
    torch.testing.assert_close(power, transfer(colour).square(), rtol=0.16, atol=1e-4)


@pytest.mark.parametrize("colour", COLOURS)
def test_every_place_is_treated_alike(colour: Any) -> None:
    colouring = NoiseFilter(Grid((SIDE, SIDE), (4, 4)), colour)
    white = noise(3).reshape(3, SIDE, SIDE)
    moved = colouring(white.roll((3, -5), (1, 2)).flatten(1)).reshape(3, SIDE, SIDE)
    expected = colouring(white.flatten(1)).reshape(3, SIDE, SIDE).roll((3, -5), (1, 2))
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)


def test_masks_clump_in_the_order_of_the_colours() -> None:
    """How often the right-hand neighbour of a hidden patch is hidden too."""

    def clumping(colour: str) -> float:
        hidden = drawn(build(mask_noise=colour), 200).as_bool().reshape(-1, SIDE, SIDE)
        assert (hidden.flatten(1).sum(dim=1) == 192).all()
        return (hidden[..., 1:] & hidden[..., :-1]).sum().item() / hidden[..., 1:].sum().item()

    by_colour = {colour: clumping(colour) for colour in ("white", *COLOURS)}
    assert by_colour["white"] == pytest.approx(0.75, abs=0.01)
    assert by_colour["red"] > by_colour["green"] > by_colour["white"] > by_colour["blue"]


def test_too_few_places_for_a_colour_are_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"method\.mask_noise=green needs 4 x 4 places that are hidden one by one, there are "
        r"2 x 2: try method\.mask_noise=white",
    ):
        build(mask_noise="green", mask_block=8, mask_ratio=0.5)


# ---- both ----


def test_without_either_masks_are_those_of_plain_noise() -> None:
    method = build()
    mask = drawn(method)
    method.noise.begin(5)
    expected = lowest_visible(method.noise.uniform(6, SIDE * SIDE), 64)
    assert torch.equal(mask.visible, expected.visible)
    assert torch.equal(mask.masked, expected.masked)
    assert "noise_filter" not in str(list(method.state_dict()))


@pytest.mark.parametrize(
    "options", [dict(mask_block=2, mask_noise="green"), dict(mask_noise="red")]
)
def test_masks_are_the_same_for_any_number_of_processes(options: dict[str, Any]) -> None:
    method = build(**options)
    method.noise.begin(5, 0, 8)
    whole = drawn(method, 8)
    for first in (0, 2, 4, 6):
        method.noise.begin(5, first, 8)
        part = drawn(method, 2)
        assert torch.equal(part.visible, whole.visible[first : first + 2])
        assert torch.equal(part.masked, whole.masked[first : first + 2])


@pytest.mark.parametrize("options", [dict(mask_block=4), dict(mask_noise="green")])
def test_of_clips_blocks_and_colours_are_of_places(options: dict[str, Any]) -> None:
    method = build(clip=True, **options)
    hidden = drawn(method, 3, (4,)).as_bool().reshape(3, 2, SIDE, SIDE)
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    assert (hidden[:, 0].flatten(1).sum(dim=1) == 192).all()
    method.noise.begin(5)
    images = drawn(build(**options), 3).as_bool().reshape(3, SIDE, SIDE)
    assert torch.equal(hidden[:, 0], images)  # a quarter of 256 is whole, however it is rounded


@pytest.mark.parametrize("options", [dict(mask_block=4), dict(mask_noise="blue")])
def test_a_step_has_gradients_and_panels(options: dict[str, Any]) -> None:
    method = build(**options)
    rows = torch.arange(2)
    batch = Batch([torch.randn(2, 3, 64, 64)], rows, torch.zeros(2, 4), rows > 5)
    method(batch, Progress(0, 10, 1))["loss"].backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    assert len(method.panels(batch, Progress(0, 10, 1))) == 5

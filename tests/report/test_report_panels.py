import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from patchmine.report.letters import Letters
from patchmine.report.panels import colour, draw_panels, heat_pixels, image_pixels
from patchmine.types import Panel

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def normalised(images: torch.Tensor) -> torch.Tensor:
    return (images - torch.tensor(MEAN).reshape(-1, 1, 1)) / torch.tensor(STD).reshape(-1, 1, 1)


def test_pixels_come_back_from_normalised_units_and_are_enlarged_whole() -> None:
    bytes_in = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8)
    pixels = image_pixels(normalised(bytes_in.float() / 255), MEAN, STD, (12, 18))
    assert pixels.shape == (12, 18, 3)
    assert np.array_equal(pixels[1::3, 1::3], bytes_in.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_any_number_of_channels_becomes_a_picture(channels: int, shown: list[int]) -> None:
    bytes_in = torch.randint(0, 256, (channels, 2, 2), dtype=torch.uint8)
    pixels = image_pixels(bytes_in.float() / 255, [0.0] * channels, [1.0] * channels, (2, 2))
    assert np.array_equal(pixels, bytes_in[shown].permute(1, 2, 0).numpy())


def test_values_outside_of_the_range_are_clipped() -> None:
    pixels = image_pixels(torch.tensor([-1.0, 2.0]).reshape(1, 1, 2), [0.0], [1.0], (1, 2))
    assert pixels[0, :, 0].tolist() == [0, 255]


def test_missing_patches_are_hatched_and_unlike_black_white_or_grey() -> None:
    image = torch.zeros(3, 8, 8)
    image[:, :, 4:] = math.nan
    pixels = image_pixels(image, MEAN, STD, (80, 80))
    assert len(np.unique(pixels[:, :40].reshape(-1, 3), axis=0)) == 1
    assert len(np.unique(pixels[:, 40:].reshape(-1, 3), axis=0)) == 2


def test_heat_goes_from_the_darkest_to_the_lightest_and_says_its_ends() -> None:
    heat = torch.tensor([[2.0, 3.0], [5.0, math.nan]])
    pixels, low, high = heat_pixels(heat, (2, 2))
    assert (low, high) == (2.0, 5.0)
    assert np.array_equal(pixels[0, 0], colour(np.array(0.0)))
    assert np.array_equal(pixels[1, 0], colour(np.array(1.0)))


def test_brightness_rises_along_the_ramp() -> None:
    brightness = colour(np.linspace(0, 1, 100)).astype(float) @ [0.299, 0.587, 0.114]
    assert np.all(np.diff(brightness) >= 0)


@pytest.mark.parametrize("value", [7.0, math.nan])
def test_maps_without_range_are_drawn(value: float) -> None:
    pixels, low, high = heat_pixels(torch.full((2, 2), value), (4, 4))
    assert pixels.shape == (4, 4, 3)
    assert (low == high == 7.0) or (math.isnan(low) and math.isnan(high))


def test_a_sheet_has_room_for_every_title_label_and_row() -> None:
    images = normalised(torch.rand(3, 3, 32, 32))
    long = Panel("reconstruction with visible patches, statistics borrowed", images)
    heat = Panel("error", torch.rand(3, 8, 8).to(torch.bfloat16), kind="heat")
    short = draw_panels([Panel("input", images)], MEAN, STD)
    sheet = draw_panels(
        [Panel("input", images), long, heat], MEAN, STD, labels=["a.jpg", "b.jpg", "c" * 60]
    )
    assert sheet.width > 3 * 160
    assert sheet.height > short.height > 3 * 160


def written(*notes: str) -> np.ndarray:
    """Where letters stand below the pictures of a sheet of panels with these notes: (rows, W)."""
    plain = [Panel(f"title {i}", torch.zeros(1, 3, 32, 32)) for i in range(len(notes))]
    noted = [replace(panel, note=note) for panel, note in zip(plain, notes, strict=True)]
    with_notes, without = (np.asarray(draw_panels(each, MEAN, STD)) for each in (noted, plain))
    assert with_notes.shape[1] == without.shape[1]
    assert with_notes.shape[0] > without.shape[0]
    below = np.flatnonzero((without < 200).any(axis=(1, 2))).max() + 1
    return (with_notes[below:] < 200).any(axis=2)


def test_a_note_stands_below_its_own_column_whole() -> None:
    first, second = written("light is masked first", ""), written("", "light is masked first")
    assert first.any()
    assert second.any()
    assert np.flatnonzero(first.any(axis=0)).max() < np.flatnonzero(second.any(axis=0)).min()
    long = written("all patches with one mean and contrast, the visible ones' average", "")
    assert np.flatnonzero(long.any(axis=1)).max() > np.flatnonzero(first.any(axis=1)).max()
    assert np.flatnonzero(long.any(axis=0)).max() <= 18 + 160


def test_notes_of_clips_never_run_into_the_row_below() -> None:
    clip = torch.zeros(1, 3, 2, 32, 32)
    tall = Panel("one", clip, note="a very long note of many words " * 16)
    heights = [draw_panels([each, each], MEAN, STD).height for each in (tall, Panel("one", clip))]
    assert heights[0] - heights[1] > 60


def test_what_is_drawn_stands_where_it_belongs() -> None:
    red, blue = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    red[:, 0], blue[:, 2] = 1.0, 1.0
    panels = [Panel("one", torch.cat([red, blue])), Panel("two", torch.cat([blue, red]))]
    sheet = np.asarray(draw_panels(panels, [0.0] * 3, [1.0] * 3)).astype(int)
    reds = (sheet == [255, 0, 0]).all(axis=2)
    down, across = np.nonzero(reds)
    assert reds.sum() == 2 * 160 * 160
    half_down, half_across = sheet.shape[0] / 2, sheet.shape[1] / 2
    assert set(zip((down > half_down).tolist(), (across > half_across).tolist(), strict=True)) == {
        (False, False),
        (True, True),
    }


@pytest.mark.parametrize(("shape", "factor"), [((32, 32), 5), ((224, 224), 1), ((96, 160), 2)])
def test_cells_show_each_pixel_as_a_square(shape: tuple[int, int], factor: int) -> None:
    sheet = draw_panels([Panel("x", torch.zeros(1, 3, *shape))], [1.0, 0.0, 0.0], [1.0] * 3)
    reds = (np.asarray(sheet) == [255, 0, 0]).all(axis=2)
    assert reds.sum() == shape[0] * shape[1] * factor**2


def test_huge_images_are_shrunk() -> None:
    assert max(draw_panels([Panel("x", torch.zeros(1, 3, 700, 2000))], MEAN, STD).size) < 600


@pytest.mark.parametrize(
    "text", ["a b c d", "oneverylongwordwithoutanyspace", "short and anotherverylongwordhere x", ""]
)
def test_wrapping_loses_no_letter(text: str) -> None:
    class Typewriter(Letters):
        def width(self, text: str) -> float:
            return len(text)

    lines = Typewriter(12, (0, 0, 0)).wrap(text, 8)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(len(line) <= 8 for line in lines)

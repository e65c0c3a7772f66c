"""Of a JPEG only what its crops need is decoded: the same bytes where nothing is scaled, and nearly
the same at a half, quarter or eighth.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as pictures
from torch import Tensor

from patchmine.data.decoding import headers, opened
from patchmine.data.decoding.decode import DecodeError, decode, jpeg_pixels
from patchmine.data.decoding.opened import MARGIN, Jpeg, open_image
from patchmine.data.decoding.orientation import stored_box, upright, upright_box
from patchmine.data.randomness import sample_generator
from patchmine.data.settings import MAX_PIXELS, Crops, ViewSettings
from patchmine.data.views.geometry import resize
from patchmine.data.views.images import MultiCropView, TrainView, crop_box

SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0", "4:1:1", "4:4:0")
SCALE, RATIO = (0.05, 1.0), (3 / 4, 4 / 3)


def photograph(height: int, width: int) -> Image.Image:
    """A sharp one of any size: the astronaut repeated, mirrored at the seams."""
    picture = pictures.astronaut()
    pair = np.concatenate([picture, picture[:, ::-1]], 1)
    tile = np.concatenate([pair, pair[::-1]], 0)
    repeats = -(-height // tile.shape[0]), -(-width // tile.shape[1]), 1
    return Image.fromarray(np.tile(tile, repeats)[:height, :width])


def jpeg(
    image: Image.Image, subsampling: str = "4:2:0", orientation: int = 1, **settings: Any
) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    chosen = {} if subsampling == "4:4:0" else {"subsampling": subsampling}
    if image.mode != "RGB":
        chosen = {}
    image.save(file, "JPEG", quality=90, exif=exif, **chosen, **settings)
    return file.getvalue()


def reference(data: bytes, box: tuple[int, int, int, int], channels: int = 3) -> Tensor:
    """The slow way: all of the image, then the crop."""
    top, left, height, width = box
    return decode(data, channels)[..., top : top + height, left : left + width]


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_is_that_of_the_whole_image(subsampling: str, orientation: int) -> None:
    rng = np.random.default_rng(orientation)
    for height, width in ((97, 131), (64, 48), (33, 17)):
        data = jpeg(photograph(height, width), subsampling, orientation)
        image = open_image(data, 3, MAX_PIXELS)
        assert isinstance(image, Jpeg)
        assert image.size == tuple(decode(data, 3).shape[-2:])
        for _ in range(4):
            box = crop_box(*image.size, SCALE, RATIO, rng)
            (crop,), (used,) = image.crops([box], [(8, 8)], scaled=False)
            assert used == box
            assert torch.equal(crop, reference(data, box))


@pytest.mark.parametrize("kind", ["progressive", "restarts", "grey", "CMYK", "grey wanted"])
def test_other_jpegs_are_cut_alike(kind: str) -> None:
    picture, channels = photograph(90, 120), 1 if kind == "grey wanted" else 3
    settings: dict[str, Any] = {"progressive": True} if kind == "progressive" else {}
    if kind == "restarts":
        settings["restart_marker_rows"] = 1
    if kind in ("grey", "CMYK"):
        picture = picture.convert("L" if kind == "grey" else "CMYK")
    data = jpeg(picture, **settings)
    box = (3, 20, 41, 60)
    (crop,), _ = open_image(data, channels, MAX_PIXELS).crops([box], [(8, 8)], scaled=False)
    assert torch.equal(crop, reference(data, box, channels))


def test_rows_below_the_crop_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    heights = []

    def noted(*arguments: Any) -> Tensor:
        result = jpeg_pixels(*arguments)
        heights.append(result.shape[-2])
        return result

    monkeypatch.setattr(opened, "jpeg_pixels", noted)
    image = open_image(jpeg(photograph(400, 300)), 3, MAX_PIXELS)
    image.crops([(10, 10, 50, 50), (60, 0, 40, 30)], [(8, 8)] * 2, scaled=False)
    assert heights == [108]


@pytest.mark.parametrize("by_pil", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_damaged_file_says_the_same(
    by_pil: bool, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off or overwritten anywhere: refused where the whole image is, and in its words."""
    if by_pil:
        monkeypatch.setattr("patchmine.data.decoding.decode._torchvision_jpeg", lambda: None)
    sound = jpeg(photograph(300, 200))
    rng = np.random.default_rng(0)
    damaged = [sound[: int(end)] for end in np.linspace(10, len(sound) - 1, 25)]
    damaged += [sound[:-2] + bytes(2000), sound[: len(sound) // 2] + bytes(len(sound) // 2)]
    for _ in range(60):
        file = bytearray(sound)
        for place in rng.integers(2, len(file), 3).tolist():
            file[place] = int(rng.integers(256))
        damaged.append(bytes(file))
    box, refused = (0, 0, 40, 40), 0
    for data in damaged:
        expected = outcome(reference, data, box)
        found = outcome(first_crop, data, box, scaled)
        refused += isinstance(expected, str)
        if isinstance(expected, str) or isinstance(found, str):
            assert found == expected
        elif not scaled:
            assert torch.equal(found, expected)
    assert 20 < refused < len(damaged)


def first_crop(data: bytes, box: tuple[int, int, int, int], scaled: bool) -> Tensor:
    return open_image(data, 3, MAX_PIXELS).crops([box], [(16, 16)], scaled)[0][0]


def outcome(make: Callable[..., Tensor], *arguments: Any) -> Tensor | str:
    """What comes of it, or what is said instead."""
    try:
        return make(*arguments)
    except DecodeError as error:
        return str(error)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_as_pixels_do(orientation: int) -> None:
    stored = np.arange(7 * 11).reshape(1, 7, 11)
    image = upright(stored, orientation)
    height, width = image.shape[-2:]
    box = (1, 2, 4, 3)
    top, left, tall, wide = stored_box(box, height, width, orientation)
    cut = upright(stored[:, top : top + tall, left : left + wide], orientation)
    np.testing.assert_array_equal(cut, image[:, 1:5, 2:5])
    assert upright_box((top, left, tall, wide), height, width, orientation) == box


# At a smaller scale


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 7])
@pytest.mark.parametrize(("sides", "scale"), [((299, 401), 2), ((589, 777), 4), ((1171, 1501), 8)])
def test_a_scaled_crop_is_nearly_the_exact_one(
    subsampling: str, orientation: int, sides: tuple[int, int], scale: int
) -> None:
    """docs/data.md: at most 3 levels of 255 in the mean, boxes moved by half a pixel of theirs."""
    data, size = jpeg(photograph(*sides), subsampling, orientation), (64, 64)
    image, rng = open_image(data, 3, MAX_PIXELS), np.random.default_rng(scale)
    box = crop_box(*image.size, (0.45, 0.5), (0.95, 1.05), rng)
    (crop,), (used,) = image.crops([box], [size], scaled=True)
    assert (used[2], used[3]) == (crop.shape[-2] * scale, crop.shape[-1] * scale)
    assert min(crop.shape[-2:]) >= 64 * MARGIN - 1
    ends = [(b[0], b[1], b[0] + b[2], b[1] + b[3]) for b in (box, used)]
    assert max(abs(drawn - taken) for drawn, taken in zip(*ends, strict=True)) <= scale
    exact = resize(reference(data, used), size).float()
    difference = (resize(crop, size).float() - exact).abs()
    assert difference.mean() <= 3
    assert difference.flatten().quantile(0.99) <= 16


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_scaled_crops_of_other_colours(mode: str, channels: int) -> None:
    data = jpeg(photograph(300, 400).convert(mode))
    (crop,), (used,) = open_image(data, channels, MAX_PIXELS).crops(
        [(20, 40, 250, 250)], [(64, 64)], scaled=True
    )
    assert crop.shape[0] == channels
    assert crop.shape[-1] < 200
    exact = resize(reference(data, used, channels), (64, 64)).float()
    assert (resize(crop, (64, 64)).float() - exact).abs().mean() <= 2


@pytest.mark.parametrize("sides", [(159, 159), (160, 160), (400, 159)])
def test_a_crop_that_would_become_too_small_is_decoded_whole(sides: tuple[int, int]) -> None:
    data = jpeg(photograph(420, 420))
    box = (7, 9, *sides)
    (crop,), (used,) = open_image(data, 3, MAX_PIXELS).crops([box], [(64, 64)], scaled=True)
    if min(sides) < 2 * 64 * MARGIN:
        assert used == box
        assert torch.equal(crop, reference(data, box))
    else:
        assert tuple(crop.shape[-2:]) == (80, 80)


def test_what_is_no_jpeg_is_never_scaled() -> None:
    file = io.BytesIO()
    photograph(300, 300).save(file, "PNG")
    for raw in (file.getvalue(), np.asarray(photograph(300, 300))):
        box = (11, 13, 250, 257)
        (crop,), (used,) = open_image(raw, 3, MAX_PIXELS).crops([box], [(32, 32)], scaled=True)
        assert used == box
        assert torch.equal(crop, decode(raw, 3)[..., 11:261, 13:270])


# In training


def test_the_default_is_exact_and_draws_are_the_same() -> None:
    data = jpeg(photograph(500, 700))
    assert ViewSettings().decode == "exact"
    exact, scaled = (
        TrainView(ViewSettings(image_size=(64, 64), decode=decode_))(
            data, sample_generator(3, 1, 5), torch.arange(500 * 700).reshape(500, 700)
        )
        for decode_ in ("exact", "scaled")
    )
    rng = sample_generator(3, 1, 5)
    box = crop_box(500, 700, (0.2, 1.0), RATIO, rng)
    assert torch.equal(exact.views[0], resize(reference(data, box), (64, 64)))
    assert exact.flip.item() == scaled.flip.item() == (rng.random() < 0.5)
    assert not torch.equal(exact.views[0], scaled.views[0])
    assert (exact.box - scaled.box).abs().max() < 8 / 500
    # A label map is cut where the pixels come from.
    top = int(scaled.target[:, [0, -1]].min()) // 700
    assert abs(top - scaled.box[0].item() * 500) < scaled.box[2].item() * 500 / 64


def test_several_crops_share_one_scale() -> None:
    data = jpeg(photograph(900, 1200))
    crops = Crops(num_local=3, local_size=32, local_scale=(0.1, 0.25))
    settings = ViewSettings(image_size=(64, 64), crops=crops)
    exact = MultiCropView(settings)(data, sample_generator(0, 0, 1))
    scaled = MultiCropView(settings.model_copy(update={"decode": "scaled"}))(
        data, sample_generator(0, 0, 1)
    )
    assert (exact.box - scaled.box).abs().max() < 8 / 900
    assert torch.equal(exact.flip, scaled.flip)
    for one, other in zip(exact.views, scaled.views, strict=True):
        assert 0 < (one.float() - other.float()).abs().mean() < 12  # the box moved by half a pixel


def test_a_file_is_not_believed_before_it_is_opened() -> None:
    data = jpeg(photograph(100, 100))
    header = headers.read_jpeg_header(data)
    huge = bytearray(data)
    huge[header.rows_at : header.rows_at + 2] = (60000).to_bytes(2, "big")
    with pytest.raises(DecodeError, match="max_pixels=10000"):
        open_image(bytes(huge), 3, 10000)

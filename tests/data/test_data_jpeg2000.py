"""JPEG 2000 of the bits and bands that satellites have, which PIL cuts or refuses."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_files import spoiled
from PIL import Image

from patchmine.data.decoding.bounds import DecodeError, install_command
from patchmine.data.decoding.decode import decode, decode_known, probe
from patchmine.data.decoding.jpeg2000 import is_beyond_pil, read_header
from patchmine.data.decoding.scenes import open_scene
from patchmine.data.sources.source import open_source

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 40, 56


def written(file: Path, pixels: np.ndarray, *, alpha: bool = False, **how: Any) -> bytes:
    """Without loss, by GDAL as satellites' are."""
    rasterio = pytest.importorskip("rasterio")
    from rasterio.enums import ColorInterp

    count, height, width = pixels.shape
    how |= dict(driver="JP2OpenJPEG", height=height, width=width, count=count, dtype=pixels.dtype)
    how["transform"] = rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)
    with rasterio.open(file, "w", QUALITY="100", REVERSIBLE="YES", **how) as image:
        if alpha:
            colours = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
            image.colorinterp = (*colours, ColorInterp.alpha)
        image.write(pixels)
    return file.read_bytes()


def noise(bands: int, dtype: str, low: int, high: int) -> np.ndarray:
    return RNG.integers(low, high, (bands, HEIGHT, WIDTH)).astype(dtype)


@pytest.mark.parametrize(
    ("bands", "dtype", "low", "high", "how"),
    [
        (1, "uint8", 0, 256, {}),
        (3, "uint8", 0, 256, {}),  # which GDAL calls grey, as PIL then refuses
        (4, "uint8", 0, 256, {}),
        (7, "uint8", 0, 256, {}),
        (1, "uint16", 0, 65536, {}),
        (1, "uint16", 0, 4096, {"NBITS": 12}),
        (3, "uint16", 0, 4096, {"NBITS": 12}),
        (3, "uint16", 0, 65536, {}),
        (12, "uint16", 0, 10000, {}),
        (1, "int16", -1000, 3000, {}),
        (5, "int16", -1000, 3000, {}),
    ],
)
def test_every_value_is_the_one_that_is_stored(
    bands: int, dtype: str, low: int, high: int, how: dict[str, Any], tmp_path: Path
) -> None:
    pixels = noise(bands, dtype, low, high)
    data = written(tmp_path / "x.jp2", pixels, **how)
    assert probe(data) == (HEIGHT, WIDTH, bands, dtype)
    found = decode(data, bands)
    expected = decode(np.ascontiguousarray(pixels), bands)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, atol=1e-6 if dtype != "uint8" else 0)
    scene = open_scene(str(tmp_path / "x.jp2"), 0, 10**9)
    assert (scene.height, scene.width, scene.channels, scene.dtype) == probe(data)
    np.testing.assert_array_equal(scene.window((0, 0, HEIGHT, WIDTH))[0], pixels)
    scene.close()


def test_what_is_transparent_is_missing(tmp_path: Path) -> None:
    pixels = noise(4, "uint16", 1, 65536)
    pixels[3] = 65535
    pixels[3, :5, 10:] = 0
    data = written(tmp_path / "x.jp2", pixels, alpha=True)
    assert probe(data) == (HEIGHT, WIDTH, 3, "uint16")
    image, known = decode_known(data, 3)
    assert known is not None
    for channel in range(3):
        np.testing.assert_array_equal(known[channel], pixels[3] > 0)
        np.testing.assert_allclose(
            image[channel][known[channel]], (pixels[channel] / 65535)[pixels[3] > 0], atol=1e-6
        )


def test_a_bare_stream_is_read_too(tmp_path: Path) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    pytest.importorskip("rasterio")
    pixels = noise(3, "uint16", 0, 65536)
    stream = imagecodecs.jpeg2k_encode(
        pixels.transpose(1, 2, 0), codecformat="j2k", reversible=True, level=0
    )
    (tmp_path / "x.j2k").write_bytes(stream)
    source = open_source(tmp_path)
    assert probe(source.read(0)) == (HEIGHT, WIDTH, 3, "uint16")
    np.testing.assert_allclose(decode(source.read(0), 3), pixels / 65535, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_what_pil_reads_as_it_is_stored_is_left_to_it(mode: str) -> None:
    image = Image.fromarray(noise(1, "uint16", 0, 65536)[0])
    if mode != "I;16":
        bands = len(Image.new(mode, (1, 1)).getbands())
        image = Image.merge(mode, [Image.fromarray(band) for band in noise(bands, "uint8", 0, 256)])
    out = io.BytesIO()
    image.save(out, "JPEG2000")
    assert not is_beyond_pil(out.getvalue())
    assert read_header(out.getvalue())[:2] == (HEIGHT, WIDTH)
    channels = probe(out.getvalue())[2]
    found = decode(out.getvalue(), channels)
    expected = np.asarray(image, np.float64).reshape(HEIGHT, WIDTH, -1).transpose(2, 0, 1)
    np.testing.assert_allclose(found, expected / (65535 if mode == "I;16" else 1), atol=1e-6)


def test_a_missing_package_and_an_image_too_large_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = written(tmp_path / "x.jp2", noise(3, "uint16", 0, 4096))
    with pytest.raises(DecodeError, match=f"{WIDTH}x{HEIGHT}|{HEIGHT}x{WIDTH}"):
        decode(data, 3, HEIGHT * WIDTH - 1)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(DecodeError, match="many bits or bands that needs the package") as error:
        decode(data, 3)
    assert install_command(str(error.value)) == "pip install 'patchmine[geo]'"


def test_mutants_give_an_image_or_a_decode_error(tmp_path: Path) -> None:
    data = written(tmp_path / "x.jp2", noise(5, "uint16", 0, 4096))
    rng, refused = np.random.default_rng(1), 0
    for _ in range(60):
        mutant = spoiled(data, rng)
        try:
            channels = probe(mutant)[2]
            assert decode(mutant, channels).shape[0] == channels
        except DecodeError:
            refused += 1
    assert refused

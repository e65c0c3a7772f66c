"""OME-Zarr: every z and t of the largest level is an item, with its channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchmine.data.decoding.bounds import DecodeError
from patchmine.data.decoding.decode import decode, probe
from patchmine.data.decoding.domains import Part
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError

zarr = pytest.importorskip("zarr", reason="zarr is missing: pip install 'patchmine[zarr]'")

SIZES = dict(t=2, c=5, z=3, y=24, x=20)


def axes_of(names: str, version: str) -> list[Any]:
    if version == "0.3":
        return list(names)
    kinds = dict(t="time", c="channel")
    return [{"name": name, "type": kinds.get(name, "space")} for name in names]


def made(folder: Path, names: str = "tczyx", version: str = "0.5", **other: Any) -> np.ndarray:
    """Writes two levels, and gives the pixels of the larger one."""
    rng, shape = np.random.default_rng(0), [SIZES.get(name, 2) for name in names]
    array = rng.integers(0, 60_000, shape, dtype=np.uint16)
    group = zarr.open_group(folder, mode="w", zarr_format=3 if version == "0.5" else 2)
    for name, level in (("0", array), ("1", array[..., ::2, ::2])):
        chunks = tuple(1 if axis in "tcz" else 16 for axis in names)
        stored = group.create_array(name, shape=level.shape, dtype=level.dtype, chunks=chunks)
        stored[:] = level
    scales = {"axes": axes_of(names, version), "datasets": [{"path": "0"}, {"path": "1"}]}
    told = {"multiscales": [scales | other]}
    group.attrs.update({"ome": {"version": version} | told} if version == "0.5" else told)
    return array


@pytest.mark.parametrize("version", ["0.3", "0.4", "0.5"])
def test_planes_are_slices_of_the_array(tmp_path: Path, version: str) -> None:
    array = made(tmp_path / "x.ome.zarr", version=version)
    source = open_source(tmp_path)
    assert [source.key(number) for number in (0, 5)] == ["x.ome.zarr#0", "x.ome.zarr#5"]
    assert len(source) == 6
    for number in range(6):
        t, z = divmod(number, 3)
        part = source.read(number)
        np.testing.assert_array_equal(part.read(5, 10**6)[0], array[t, :, z])
        assert probe(part) == (24, 20, 5, "uint16")
        np.testing.assert_allclose(decode(part, 5), array[t, :, z] / 65_535, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "planes", "channels"), [("yx", 1, 1), ("cyx", 1, 5), ("zyx", 3, 1), ("tcyx", 2, 5)]
)
def test_axes_may_be_fewer(tmp_path: Path, names: str, planes: int, channels: int) -> None:
    array = made(tmp_path / "x.zarr", names)
    expected = array.reshape(planes, channels, 24, 20)
    for number in range(planes):
        found, _ = Part(str(tmp_path / "x.zarr"), number).read(channels, 10**6)
        np.testing.assert_array_equal(found, expected[number])
    with pytest.raises(DecodeError, match="has no plane"):
        Part(str(tmp_path / "x.zarr"), planes).read(channels, 10**6)


@pytest.mark.parametrize(
    ("names", "other", "message"),
    [
        ("tczxy", {}, "has the axes tczxy; those read are some of t, c, z, then y, x"),
        ("qyx", {}, "has the axes qyx"),
        ("cyx", {"axes": axes_of("zcyx", "0.5")}, "has the axes zcyx"),
        ("cyx", {"axes": axes_of("tcyx", "0.5")}, r"shape \(5, 24, 20\) .* for the axes tcyx"),
        ("cyx", {"datasets": [{"path": "9"}]}, "name no axes, or no array of pixels"),
        ("cyx", {"datasets": []}, "name no axes, or no array of pixels"),
    ],
)
def test_what_is_not_read_is_told(
    tmp_path: Path, names: str, other: dict[str, Any], message: str
) -> None:
    made(tmp_path / "x.zarr", names, **other)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "x.zarr")


@pytest.mark.parametrize("told", [{"plate": {}}, {"ome": {"well": {}}}])
def test_a_plate_is_told(tmp_path: Path, told: dict[str, Any]) -> None:
    zarr.open_group(tmp_path / "x.zarr", mode="w").attrs.update(told)
    with pytest.raises(UserError, match=r"of several images .*: put each of these into a folder"):
        open_source(tmp_path / "x.zarr")


def test_chunks_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "x.zarr", mode="w")
    shape = (4096, 512, 512)
    group.create_array("0", shape=shape, dtype="u1", chunks=shape)
    scales = {"axes": axes_of("zyx", "0.5"), "datasets": [{"path": "0"}]}
    group.attrs.update({"ome": {"multiscales": [scales]}})
    with pytest.raises(DecodeError, match="MB to decode"):
        decode(Part(str(tmp_path / "x.zarr"), 0), 1)

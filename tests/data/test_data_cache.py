"""Kept images: the same batches with and without, whatever happens to the file."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import seen
from PIL import Image
from pydantic import ValidationError

from patchmine.config.schema import PretrainConfig
from patchmine.data import pixelcache
from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import Process, train_batches
from patchmine.data.pixelcache import PixelCache, cache_of
from patchmine.data.randomness import SampleGenerators, sample_generator
from patchmine.data.settings import Crops, InputSettings, ViewSettings
from patchmine.data.sharding import write_shards
from patchmine.data.sources.combine import Joined
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import open_source
from patchmine.data.views.geometry import resize
from patchmine.data.views.images import MultiCropView, TrainView, View, crop_box
from patchmine.data.views.together import resized_together
from patchmine.train.settings import MachineSettings, ScheduleSettings
from patchmine.types import Batch

pytestmark = pytest.mark.bitwise

NUMBER = 24


def write_images(folder: Path, number: int = NUMBER, side: int = 20, seed: int = 0) -> Path:
    """Noise in PNGs and JPEGs that are old enough to be believed."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        pixels = rng.integers(0, 256, (side, side + 4, 3), dtype=np.uint8)
        file = folder / f"{index:03d}.{'jpg' if index % 3 == 0 else 'png'}"
        Image.fromarray(pixels).save(file)
        age(file)
    return folder


def age(file: Path, seconds: float = 60) -> None:
    """As if it had been written a while ago; the inode's own time of change cannot be set."""
    then = time.time() - seconds
    os.utime(file, (then, then))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of this second count as settled: a test need not wait."""
    monkeypatch.setattr("patchmine.data.sources.index.RECENT", -(10**10))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def batches(
    source: Source, cache: Path | None, view: View | None = None, *, start: int = 0, **machine: Any
) -> list[Batch]:
    """Three epochs of three steps of eight."""
    kept = None if cache is None else str(cache)
    return list(
        train_batches(
            source,
            view or TrainView(seen(12)),
            ScheduleSettings(batch_size=8),
            MachineSettings(cache=kept, **{"workers": 0, **machine}),
            Process(),
            seed=3,
            steps=range(start, 9),
            steps_per_epoch=3,
            bad=BadFiles(None, 0.5),
        )
    )


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        fields = ("index", "box", "flip", "photometric")
        pairs = [(getattr(one, name), getattr(other, name)) for name in fields]
        pairs += list(zip(one.views, other.views, strict=True))
        for a, b in pairs:
            assert (a is None) == (b is None)
            assert a is None or (torch.equal(a, b) and a.dtype == b.dtype)
            assert a is None or a.stride() == b.stride()


def kept_file(cache: Path) -> Path:
    (file,) = cache.glob("*.pixels")
    return file


class Counting:
    """Counts what is decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from patchmine.data import samples

        self.count, decode = 0, samples.whole_image  # type: ignore[attr-defined]

        def counted(*arguments: Any) -> Any:
            self.count += 1
            return decode(*arguments)

        monkeypatch.setattr(samples, "whole_image", counted)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    return Counting(monkeypatch)


# The same with it and without


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "list", "shards", "two"])
def test_batches_are_the_same_bit_for_bit(
    kind: str, workers: int, images: Path, tmp_path: Path
) -> None:
    source = open_source(images)
    if kind == "list":
        listed = tmp_path / "list.txt"
        listed.write_text("\n".join(f"images/{n:03d}.png" for n in range(NUMBER) if n % 3))
        source = Joined([open_source(listed), open_source(images)])
    if kind == "shards":
        write_shards(source, tmp_path / "shards")
        source = open_source(tmp_path / "shards")
    if kind == "two":
        source = Joined([source, open_source(write_images(tmp_path / "more", 4, 31))])
    plain = batches(source, None)
    cache = tmp_path / "cache"
    assert_same(batches(source, cache, workers=workers), plain)
    assert_same(batches(source, cache, workers=workers), plain)
    # A resumed run, in the midst of an epoch
    assert_same(batches(source, cache, workers=workers, start=4), plain[4:])


@pytest.mark.parametrize("channels", [1, 3])
def test_other_views_and_channels(channels: int, images: Path, tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30))
    grey.save(images / "deep.png")
    grey.convert("L").save(images / "grey.png")
    crops = Crops(num_local=2, local_size=8)
    for view in (
        MultiCropView(ViewSettings(image_size=(16, 16), channels=channels, crops=crops)),
        TrainView(seen(16, channels=channels)),
    ):
        source, cache = open_source(images), tmp_path / "cache"
        plain = batches(source, None, view)
        assert_same(batches(source, cache, view), plain)
        assert_same(batches(source, cache, view), plain)


def test_nothing_is_decoded_twice(images: Path, tmp_path: Path, decoded: Counting) -> None:
    batches(open_source(images), tmp_path / "cache")
    assert decoded.count == NUMBER
    batches(open_source(images), tmp_path / "cache")  # another run
    assert decoded.count == NUMBER


def test_a_changed_file_is_decoded_again(images: Path, tmp_path: Path, decoded: Counting) -> None:
    cache = tmp_path / "cache"
    batches(open_source(images), cache)
    write_images(images, 6, seed=1)
    source = open_source(images)
    plain = batches(source, None)
    before = decoded.count
    assert_same(batches(source, cache), plain)
    assert decoded.count == before + 6


def test_a_file_that_was_just_written_is_not_believed(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: Counting
) -> None:
    monkeypatch.setattr("patchmine.data.sources.index.RECENT", 10**12)
    batches(open_source(images), tmp_path / "cache")
    assert decoded.count == 0  # each view decodes what it needs
    assert not any(kept_slots(tmp_path / "cache"))


def kept_slots(cache: Path) -> list[bool]:
    data = kept_file(cache).read_bytes()
    return [any(data[64 * n : 64 * n + 64]) for n in range(1, NUMBER + 1)]


def test_too_many_pixels_are_refused_as_without_it(images: Path, tmp_path: Path) -> None:
    source, cache = open_source(images), tmp_path / "cache"
    batches(source, cache)
    strict = TrainView(seen(12, max_pixels=20 * 24 - 1))
    from patchmine.errors import UserError

    for place in (None, cache):
        with pytest.raises(UserError, match="max_pixels"):
            batches(source, place, strict)


def test_broken_images_are_replaced_as_without_it(images: Path, tmp_path: Path) -> None:
    (images / "001.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (images / "004.png").write_bytes(b"")
    source, cache = open_source(images), tmp_path / "cache"
    plain = batches(source, None)
    for _ in range(2):
        assert_same(batches(source, cache), plain)


# What can happen to the file


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9])
def test_a_file_that_was_cut_off(share: float, images: Path, tmp_path: Path) -> None:
    source, cache = open_source(images), tmp_path / "cache"
    plain = batches(source, None)
    batches(source, cache)
    file = kept_file(cache)
    os.truncate(file, int(file.stat().st_size * share))
    for _ in range(2):
        assert_same(batches(source, cache), plain)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_a_file_with_other_bytes_in_it(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("kept")
    source = open_source(write_images(folder / "images"))
    plain = batches(source, None)
    batches(source, folder / "cache")
    file, rng = kept_file(folder / "cache"), np.random.default_rng(seed)
    data = bytearray(file.read_bytes())
    for place in rng.integers(0, len(data), 200).tolist():
        data[place] = int(rng.integers(256))
    file.write_bytes(data)
    assert_same(batches(source, folder / "cache"), plain)


def test_of_another_version_it_is_made_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: Counting
) -> None:
    source, cache = open_source(images), tmp_path / "cache"
    plain = batches(source, cache)
    monkeypatch.setattr(pixelcache, "VERSION", b"patchmine pixels 2\n")
    assert_same(batches(source, cache), plain)
    assert decoded.count == 2 * NUMBER
    assert kept_file(cache).read_bytes().startswith(b"patchmine pixels 2\n")


def test_another_folder_with_the_same_names_has_its_own(images: Path, tmp_path: Path) -> None:
    other = open_source(write_images(tmp_path / "other", seed=9))
    plain, cache = batches(other, None), tmp_path / "cache"
    batches(open_source(images), cache)
    assert_same(batches(other, cache), plain)
    assert len(list(cache.glob("*.pixels"))) == 2


@pytest.mark.slow
def test_processes_that_are_killed_leave_nothing_half(tmp_path: Path) -> None:
    """Two at a time write to one file until they are killed; whatever is kept then is whole."""
    source, cache = open_source(write_images(tmp_path / "large", 40, 150)), tmp_path / "cache"
    program = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import patchmine.data.sources.index as index
        index.RECENT = -(10**10)
        from pathlib import Path
        from test_data_cache import batches, open_source
        print("ready", flush=True)
        while True:
            batches(open_source({str(tmp_path / "large")!r}), Path({str(cache)!r}))
            Path({str(cache)!r}, "again").touch()
        """
    )
    command = [sys.executable, "-c", program]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    for process in started:
        with process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
    assert_same(batches(source, cache), batches(source, None))


# Where nothing can be kept


def test_a_full_cache_says_so_once_and_goes_on(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, cache = open_source(images), tmp_path / "cache"
    plain = batches(source, None)
    with caplog.at_level(logging.WARNING):
        assert_same(batches(source, cache, cache_gb=2e-5), plain)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"the cache {cache} is full; raise cache_gb or make room on its disk, to keep more: what "
        "it does not hold is decoded"
    ]
    assert kept_file(cache).stat().st_blocks * 512 <= 2e-5 * 1e9 + 4096  # of a last block
    assert_same(batches(source, cache), plain)


def test_the_one_that_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    cache, size = tmp_path / "cache", 1e-4
    names = []
    for place in ("a", "b", "c"):
        batches(open_source(write_images(tmp_path / place)), cache, cache_gb=size)
        new = [file.name for file in cache.glob("*.pixels") if file.name not in names]
        names += new
        for file in cache.glob("*.pixels"):
            age(file, 1000 if file.name == names[0] else 100)
    assert {file.name for file in cache.glob("*.pixels")} == {*names[1:]}


@pytest.mark.parametrize("fault", ["no room", "few left"])
def test_a_full_disk(
    fault: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, cache, write = open_source(images), tmp_path / "cache", os.write
    plain = batches(source, None)
    written = []

    def short(handle: int, data: Any) -> int:
        written.append(len(data))
        return write(handle, data if len(written) < 5 else data[:100])

    if fault == "no room":
        monkeypatch.setattr(os, "write", short)
    else:
        monkeypatch.setattr("shutil.disk_usage", lambda path: (1000, 950, 50))
        monkeypatch.setattr(
            "shutil.disk_usage", lambda path: type("", (), {"free": 5, "total": 100})
        )
    with caplog.at_level(logging.WARNING):
        assert_same(batches(source, cache), plain)
    monkeypatch.undo()
    assert len(caplog.records) == 1
    expected = "cannot be written (No space left on device)" if written else "is full"
    assert expected in caplog.records[0].getMessage()
    assert_same(batches(source, cache), plain)


def test_a_folder_that_cannot_be_made(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    source = open_source(images)
    plain = batches(source, None)
    for workers in (0, 2):
        with caplog.at_level(logging.WARNING):
            assert_same(batches(source, tmp_path / "file" / "cache", workers=workers), plain)
        (record,) = caplog.records
        assert record.getMessage() == (
            f"cache={tmp_path / 'file' / 'cache'} cannot be used (Not a directory); a part of its "
            "path is a file: name another place: images are decoded as without it"
        )
        caplog.clear()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_is_read(images: Path, tmp_path: Path, decoded: Counting) -> None:
    source, cache = open_source(images), tmp_path / "cache"
    batches(source, cache)
    kept_file(cache).chmod(0o444)
    batches(source, cache)
    assert decoded.count == NUMBER


# Settings


def test_it_is_off_by_default_and_needs_files() -> None:
    assert MachineSettings().cache is None
    on = MachineSettings(cache="somewhere")
    arrays = open_source("embedded:photos/test")
    assert cache_of(arrays, InputSettings(), on) is None


def test_auto_is_the_users_cache_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cache = cache_of(open_source(images), InputSettings(), MachineSettings(cache="auto"))
    assert isinstance(cache, PixelCache)
    assert cache.folder == tmp_path / "xdg" / "patchmine" / "pixels"


@pytest.mark.parametrize(
    ("others", "why"),
    [
        ({"decode": "scaled"}, "it keeps whole images, and decode=scaled makes none"),
        ({"model": "video_vit_small_patch16"}, "reads videos: leave it out"),
    ],
)
def test_what_it_does_not_go_with(others: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        PretrainConfig(data="images", cache="kept", **others)


# The quick way of small images, and its parts


@given(
    sides=st.tuples(st.integers(5, 40), st.integers(5, 40)),
    size=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    channels=st.sampled_from([1, 3, 4]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    seed=st.integers(0, 99),
)
def test_resizing_together_is_resizing_alone(
    sides: tuple[int, int], size: tuple[int, int], channels: int, interpolation: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (12, *sides, channels), dtype=np.uint8)
    images[::3] = np.where(images[::3] > 127, 255, 0)
    boxes = [crop_box(*sides, (0.05, 1.0), (0.4, 2.5), rng) for _ in images]
    together = resized_together(list(images), boxes, size, interpolation)
    assert together.is_contiguous()
    for image, (top, left, tall, wide), found in zip(images, boxes, together, strict=True):
        cut = torch.from_numpy(image).permute(2, 0, 1)[:, top : top + tall, left : left + wide]
        assert torch.equal(found, resize(cut, size, interpolation))


@given(
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 2**40),
    indices=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5),
)
def test_generators_are_those_of_numpy(seed: int, epoch: int, indices: list[int]) -> None:
    several = SampleGenerators(seed, epoch, indices)
    for place in [*range(len(indices)), 0]:
        ours, expected = several.at(place), sample_generator(seed, epoch, indices[place])
        assert ours.integers(7, size=3).tolist() == expected.integers(7, size=3).tolist()
        assert ours.random(5).tolist() == expected.random(5).tolist()
        assert ours.normal() == expected.normal()


def test_a_jpeg_in_the_cache_is_as_it_is_decoded(tmp_path: Path) -> None:
    """Turned by EXIF, of one channel where three are asked for."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    ramp = np.arange(30 * 50).reshape(30, 50) % 256
    Image.fromarray(ramp.astype(np.uint8)).save(file, "JPEG", exif=exif)
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(8):
        (folder / f"{index}.jpg").write_bytes(file.getvalue())
    source = open_source(folder)
    view = TrainView(seen(12))
    options: dict[str, Any] = {"seed": 0, "steps": range(3), "steps_per_epoch": 1}
    made = [
        list(
            train_batches(
                source,
                view,
                ScheduleSettings(batch_size=8),
                MachineSettings(workers=0, cache=cache),
                bad=BadFiles(None, 0.5),
                **options,
            )
        )
        for cache in (None, str(tmp_path / "cache"))
    ]
    assert_same(*made)
    cache = cache_of(source, InputSettings(), MachineSettings(cache=str(tmp_path / "cache")))
    assert cache is not None
    kept = cache.read(0)
    assert kept is not None
    assert kept.shape == (50, 30, 3)

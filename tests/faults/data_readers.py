"""How a command reads a data set: each function gets the bytes of a mutant and a folder of its own."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from patchmine.data.decoding.decode import DecodeError, decode, probe
from patchmine.errors import UserError

ITEM_ERRORS = (OSError, DecodeError)  # what loader and inspect take as: this item is broken


def read_image(data: bytes, folder: Path) -> object:  # noqa: ARG001
    errors = [
        _item_error(partial(probe, data)),
        *(_item_error(partial(decode, data, channels)) for channels in (3, 1, 5)),
    ]
    refused = [error for error in errors if error is not None]
    if len(refused) == len(errors):
        raise refused[1]
    return len(refused)


def _item_error(read: Callable[[], object]) -> Exception | None:
    try:
        read()
    except ITEM_ERRORS as error:
        return error
    return None


def items_of(source: Any) -> list[str]:
    """Names, keys, labels and contents of everything in a source, as far as items can be read."""
    found = []
    for index in range(min(len(source), 50)):
        try:
            content = hashlib.sha256(source.read(index)).hexdigest()
        except ITEM_ERRORS as error:
            content = type(error).__name__
        found.append(f"{source.path(index)} {getattr(source, 'key', source.path)(index)} {content}")
    labels = source.labels()
    return [
        *found,
        f"{len(source)}",
        *([] if labels is None else map(str, [*labels.ids.tolist(), *labels.names])),
    ]


def read_tar(data: bytes, folder: Path) -> object:
    from patchmine.data.sources.source import open_source

    path = folder / "x.tar"
    path.write_bytes(data)
    return items_of(open_source(path))


def read_swapped_tar(data: bytes, folder: Path) -> object:
    """Another archive under a name whose index is kept must read as it would without the index."""
    from patchmine.data.sources.source import open_source

    path, cache = folder / "x.tar", folder / "cache"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    fresh = _outcome(lambda: items_of(open_source(path)))
    kept = _outcome(lambda: items_of(open_source(path, cache_dir=cache)))
    if kept != fresh:
        raise AssertionError("what the kept index says differs from what the archive holds")
    if isinstance(fresh, UserError):
        raise fresh
    return fresh


class _RefusalError(UserError):
    """A refusal that equals another with the same words."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UserError) and str(other) == str(self)

    __hash__ = None  # type: ignore[assignment]


def _outcome(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except UserError as error:
        return _RefusalError(str(error))


def kept_index(data: Path) -> tuple[str, bytes]:
    """Name and contents of the index that is kept of a folder or an archive."""

    from patchmine.data.sources.source import open_source

    with tempfile.TemporaryDirectory() as room:
        open_source(data, cache_dir=Path(room))
        (index,) = Path(room).glob("*.index")
        return index.name, index.read_bytes()


def read_index(of: Path, name: str, data: bytes, folder: Path) -> object:
    """Under a damaged index a source reads as it would without: the index is made again."""
    from patchmine.data.sources.source import open_source

    cache = folder / "cache"
    cache.mkdir(exist_ok=True)
    (cache / name).unlink(missing_ok=True)  # its pages may be mapped still
    (cache / name).write_bytes(data)
    return items_of(open_source(of, cache_dir=cache))


def read_list(suffix: str, picture: bytes, data: bytes, folder: Path) -> object:
    from patchmine.data.sources.source import open_source

    for name in ("0.png", "1.jpg", "sub folder/2.png"):
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        if not place.exists():
            place.write_bytes(picture)
    path = folder / f"list{suffix}"
    path.write_bytes(data)
    return items_of(open_source(path))


_ENDINGS = (".jpg", ".png", ".tif", ".npy", ".gif", ".webp", ".bmp", ".ppm")


def inspect_images(data: bytes, folder: Path) -> object:
    from patchmine.data.inspect import inspect, render
    from patchmine.data.sources.source import open_source

    room = folder / "images"
    room.mkdir(exist_ok=True)
    for ending in _ENDINGS[: 1 + len(data) % 2]:
        (room / f"x{ending}").write_bytes(data)
    return render(inspect(open_source(room), full=True))


def load_images(data: bytes, folder: Path) -> object:
    """What training does: statistics, and batches of crops, whose numbers must be finite."""
    from patchmine.data.badfiles import BadFiles
    from patchmine.data.loader import data_statistics, train_batches
    from patchmine.data.settings import InputSettings, ViewSettings
    from patchmine.data.sources.source import open_source
    from patchmine.data.views.images import TrainView
    from patchmine.train.settings import MachineSettings, ScheduleSettings

    room = folder / "images"
    room.mkdir(exist_ok=True)
    for ending in (".jpg", ".tif"):
        (room / f"x{ending}").write_bytes(data)
    source = open_source(room)
    numbers = list(data_statistics(source, InputSettings()))
    settings = ViewSettings(image_size=(16, 16))
    batches = train_batches(
        source,
        TrainView(settings, smallest_side=8),
        ScheduleSettings(batch_size=2),
        MachineSettings(workers=0),
        seed=0,
        steps=range(2),
        steps_per_epoch=1,
        bad=BadFiles(None, 1.0),
    )
    numbers += [batch.views[0].float() for batch in batches]
    if not all(bool(each.isfinite().all()) for each in numbers):
        raise AssertionError("numbers that are not finite come out of the loader")
    return len(numbers)


def read_frames(data: bytes, folder: Path) -> object:
    """A video as a folder of frames, of which one is damaged."""
    from patchmine.data.decoding.video import frames_in, open_video

    room = folder / "frames"
    room.mkdir(exist_ok=True)
    for number in range(3):
        (room / f"{number}.png").write_bytes(data)
    return open_video(frames_in(str(room))).frames([0, 1, 2]).shape


def read_video(suffix: str, data: bytes, folder: Path) -> object:
    from patchmine.data.decoding.video import VideoFile, open_video

    path = folder / f"x{suffix}"
    path.write_bytes(data)
    os.utime(path, ns=(1, zlib.crc32(data)))  # a reader may remember files by size and time
    reader = open_video(VideoFile(str(path)))
    count = reader.num_frames
    return reader.frames(sorted({0, count // 2, count - 1})).shape

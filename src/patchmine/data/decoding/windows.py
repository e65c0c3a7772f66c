"""Windows of huge images, read where they lie; the scenes that were read last stay open."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from patchmine.data.decoding.bounds import DecodeError, check_pixels
from patchmine.data.decoding.orientation import Box
from patchmine.data.decoding.rasters import Scene
from patchmine.data.decoding.reading import Facts, Piece, mark_of
from patchmine.data.decoding.scenes import open_scene
from patchmine.data.settings import MAX_PIXELS
from patchmine.errors import reason_of

_MOST_SCENES = 32  # that a process keeps open
_MOST_HELD = 1 << 28  # bytes of images that were decoded whole, unless a single one has more


@dataclass(frozen=True)
class Window(Piece):
    """A part of the image ``path`` at a level of its pyramid; its pixels are those of a cut tile.

    ``box`` in pixels of that level; ``scene``: height and width that the image should have there,
    if they are known.
    """

    path: str
    level: int
    box: Box
    scene: tuple[int, int] | None = None

    def read(self, channels: int, max_pixels: int) -> tuple[np.ndarray, bool]:
        """As `Piece.read`.  Of four bands the last is taken for alpha, as in an array."""
        with self._opened(max_pixels) as scene:
            pixels, _ = scene.window(self.box)
        return pixels, len(pixels) == 4

    def probe(self) -> Facts:
        with self._opened(MAX_PIXELS) as scene:
            return *self.box[2:], scene.channels, scene.dtype

    @contextmanager
    def _opened(self, max_pixels: int) -> Iterator[Scene]:
        with _kept(os.getpid()).scene(self.path, self.level, max_pixels) as scene:
            size, at_level = (scene.height, scene.width), f"pixels at level {self.level}"
            if self.scene not in (None, size):
                before = "{1}x{0}".format(*self.scene or ())
                now = f"{size[1]}x{size[0]} {at_level}"
                raise DecodeError(f"has changed since it was listed: {now}, where it had {before}")
            top, left, height, width = self.box
            if top + height > size[0] or left + width > size[1]:
                raise DecodeError(f"lies outside of its image of {size[1]}x{size[0]} {at_level}")
            check_pixels(height, width, max_pixels, stored=os.stat(self.path).st_size)  # noqa: PTH116
            yield scene


class _Scenes:
    """Those that are open, the one used last at the end; one thread at a time reads them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._scenes: OrderedDict[tuple[object, ...], Scene] = OrderedDict()

    @contextmanager
    def scene(self, path: str, level: int, max_pixels: int) -> Iterator[Scene]:
        """An open image; DecodeError."""
        try:
            mark = mark_of(os.stat(path))  # noqa: PTH116, once per window
        except OSError as error:
            told = error.strerror or reason_of(error)
            raise DecodeError(f"cannot be read ({told})") from error
        key = (path, level, max_pixels, *mark)  # so that what was written anew is opened anew
        with self._lock:
            scene = self._scenes.pop(key, None) or open_scene(path, level, max_pixels)
            self._scenes[key] = scene
            self._close_others()
            yield scene

    def _close_others(self) -> None:
        """Those beyond what may stay open, but the last."""
        held = sum(scene.held for scene in self._scenes.values())
        while len(self._scenes) > 1 and (len(self._scenes) > _MOST_SCENES or held > _MOST_HELD):
            _, oldest = self._scenes.popitem(last=False)
            held -= oldest.held
            oldest.close()

    def close(self) -> None:
        """All of them."""
        with self._lock:
            while self._scenes:
                self._scenes.popitem()[1].close()


@lru_cache(maxsize=1)
def _kept(process: int) -> _Scenes:
    """Of this process: handles that were open before a fork share their place in the file, and a
    lock may be held by a thread that is not there any more.
    """
    del process
    return _Scenes()


def close_scenes() -> None:
    """Close the images that this process has open; they are opened again when they are read."""
    _kept(os.getpid()).close()

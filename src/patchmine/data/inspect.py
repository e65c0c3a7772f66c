"""``patchmine data inspect``: what is in a source, and what is wrong with it."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from patchmine.data.decoding.bounds import install_command, reading_item
from patchmine.data.decoding.decode import DecodeError, decode, no_image, probe
from patchmine.data.decoding.video import FrameFiles, VideoFile, open_video
from patchmine.data.sampling import spread_indices
from patchmine.data.settings import MAX_PIXELS
from patchmine.data.sources.contract import Labels, Source, open_regular
from patchmine.errors import UserError, reason_of, shown_name

if TYPE_CHECKING:
    from rich.console import RenderableType

_BLOCK = 1 << 20  # pixels that are summed at once

SHOWN = 10
"""Lines of a list that the rendered report shows."""


@dataclass
class InspectReport:
    """What was found.  Everything but ``count`` and ``notes`` is about the ``read`` items that were
    looked at.

    ``sizes``: (height, width) -> items.  ``channels``, ``dtypes``: likewise.  ``frames``: lengths
    of videos, of which one frame each gives the rest.  ``mean``, ``std``: per channel over the
    pixels of the items that have the most frequent number of channels, 8- and 16-bit values scaled
    to [0, 1].  ``duplicates``: groups of paths with equal contents.  ``broken``: (path, reason).
    ``classes``: name -> items, all of the source; None without labels.
    """

    name: str
    count: int
    read: int
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    frames: Counter[int] = field(default_factory=Counter)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    duplicates: list[list[str]] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    classes: dict[str, int] | None = None


def inspect(
    source: Source,
    *,
    sample: int = 1000,
    full: bool = False,
    video: bool = False,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int], None] | None = None,
) -> InspectReport:
    """Read and decode a seeded choice of items, or all of them.

    Args:
        source: opened images or videos (`open_source`).
        sample: how many items are decoded.
        full: all are.
        video: items are videos, of which the middle frame is decoded.
        max_pixels: items of more count as broken.
        progress: told (items done, items to do).

    Returns:
        Counts, sizes, channels, statistics, duplicates and broken items.

    Raises:
        UserError: nothing can be read.
    """
    count = len(source)
    chosen = spread_indices(count, count if full else sample)
    report = InspectReport(source.name, count, len(chosen), notes=source.notes)
    try:
        report.classes = _class_sizes(source.labels())
    except (
        UserError
    ) as error:  # of damaged or missing labels, without which everything else can be told
        report.notes += (str(error),)
    moments: dict[int, _Moments] = {}
    digests = np.zeros(len(chosen), np.uint64)
    readable = np.zeros(len(chosen), bool)
    for number, index in enumerate(chosen.tolist()):
        try:
            with reading_item():
                raw = source.read(index)
                digests[number], readable[number] = _digest(raw), True
                _look(
                    _middle_frame(raw, report, max_pixels) if video else raw,
                    report,
                    moments,
                    max_pixels,
                )
        except (OSError, DecodeError) as error:
            report.broken.append((shown_name(source.path(index)), reason_of(error)))
        if progress is not None:
            progress(number + 1, len(chosen))
    commands = Counter(filter(None, (install_command(reason) for _, reason in report.broken)))
    report.notes += tuple(
        f"{number:,} of them need a package that is not installed: {command}"
        for command, number in commands.items()
    )
    if report.channels:
        common = report.channels.most_common(1)[0][0]
        report.mean, report.std = moments[common].finish()
    report.duplicates = [
        [shown_name(source.path(i)) for i in same]
        for same in _equal(digests[readable], chosen[readable])
    ]
    return report


class _Moments:
    """Sums of pixels and of their squares, per channel."""

    def __init__(self, channels: int) -> None:
        self.pixels = 0
        self.sums = torch.zeros(2, channels, dtype=torch.float64)

    def add(self, image: Tensor) -> None:
        rows = max(1, _BLOCK // image.shape[2])
        for top in range(
            0, image.shape[1], rows
        ):  # as doubles, a large image would take eight times its memory
            values = image[:, top : top + rows].flatten(1).double() / (
                255 if image.dtype == torch.uint8 else 1
            )  # (C, rows * W)
            self.pixels += values.shape[1]
            self.sums += torch.stack([values.sum(1), values.square().sum(1)])

    def finish(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        mean, square = self.sums / self.pixels
        return tuple(mean.tolist()), tuple((square - mean.square()).clamp(min=0).sqrt().tolist())


def _look(raw: Any, report: InspectReport, moments: dict[int, _Moments], max_pixels: int) -> None:
    height, width, channels, dtype = probe(raw)
    image = decode(
        raw, channels, max_pixels
    )  # before anything is counted, because a truncated file has a sound header
    moments.setdefault(channels, _Moments(channels)).add(image)
    report.sizes[height, width] += 1
    report.channels[channels] += 1
    report.dtypes[dtype] += 1


def _middle_frame(raw: Any, report: InspectReport, max_pixels: int) -> Tensor:
    """(C, H, W) uint8; the length is noted when the frame could be decoded."""
    reader = open_video(raw, max_pixels)
    frame = reader.frames([reader.num_frames // 2])[0]
    report.frames[reader.num_frames] += 1
    return frame


def _class_sizes(labels: Labels | None) -> dict[str, int] | None:
    if labels is None:
        return None
    sizes = np.bincount(labels.ids, minlength=len(labels.names)).tolist()
    return dict(zip(labels.names, sizes, strict=True))


def _digest(raw: Any) -> int:
    """64 bits that stand for the contents: of a million items, two agree by chance once in 30
    million sets.
    """
    digest = hashlib.blake2b(digest_size=8)
    for block in _contents(raw):
        digest.update(block)
    return int.from_bytes(digest.digest(), "little")


def _contents(raw: Any) -> Iterator[bytes | memoryview]:
    """A raw item in blocks; files in small ones, since a video may be larger than the memory."""
    if isinstance(raw, VideoFile | FrameFiles):
        for path in [raw.path] if isinstance(raw, VideoFile) else raw.paths:
            with open_regular(path) as handle:
                while block := handle.read(1 << 20):
                    yield block
        return
    if isinstance(raw, list | tuple):  # encoded frames
        yield from raw
    else:
        yield _as_bytes(raw)


def _as_bytes(raw: Any) -> bytes | memoryview:
    if isinstance(raw, Image.Image):
        raw = np.asarray(raw)
    if isinstance(raw, Tensor):
        raw = raw.numpy(force=True)
    if isinstance(raw, np.ndarray):
        content = io.BytesIO()
        np.save(content, raw, allow_pickle=False)
        return content.getbuffer()
    if not isinstance(raw, bytes | bytearray | memoryview):
        raise no_image(raw)
    return memoryview(raw)


def _equal(digests: NDArray[np.uint64], indices: NDArray[np.int64]) -> list[list[int]]:
    """Groups of two and more indices with equal digests, in the order of their first."""
    order = np.argsort(digests, kind="stable")
    borders = np.flatnonzero(np.diff(digests[order])) + 1
    groups = [indices[group].tolist() for group in np.split(order, borders) if len(group) > 1]
    return sorted(groups)


def render(report: InspectReport, *, width: int = 110) -> str:
    """The report as text for a terminal of ``width`` columns."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, highlight=False)
    for part in _parts(report):
        console.print(part)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _parts(report: InspectReport) -> Iterable[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for head, text in _rows(report):
        table.add_row(Text(head, style="bold"), Text(text))
    yield table
    groups = [
        f"{same[0]} = {', '.join(same[1:4])}{' ...' if len(same) > 4 else ''}"
        for same in report.duplicates
    ]
    yield from map(Text, _listed("the same contents", groups))
    yield from map(Text, _listed("broken", [f"{path}: {reason}" for path, reason in report.broken]))
    yield from map(Text, _listed("beware", list(report.notes)))


def _listed(head: str, lines: list[str]) -> Iterable[str]:
    if lines:
        yield f"\n{head}:"
        yield from (f"  {line}" for line in lines[:SHOWN])
    if len(lines) > SHOWN:
        yield f"  and {len(lines) - SHOWN:,} more"


def _rows(report: InspectReport) -> Iterable[tuple[str, str]]:
    looked = "all of them read" if report.read == report.count else f"{report.read:,} of them read"
    item = "video" if report.frames else "image"
    yield f"{item}s", f"{report.count:,} in {shown_name(report.name)}; {looked}"
    if report.classes is not None:
        sizes = sorted(report.classes.values())
        yield "classes", f"{len(sizes):,}, of {sizes[0]:,} to {sizes[-1]:,} {item}s"
    if report.frames:
        yield "frames", _spread([*report.frames.elements()], "frames")
    if report.sizes:
        for head, axis in (("height", 0), ("width", 1)):
            yield head, _spread([size[axis] for size in report.sizes.elements()])
        yield (
            "most frequent",
            _counts({f"{height}x{width}": n for (height, width), n in report.sizes.most_common(5)}),
        )
        yield "channels", _counts(report.channels)
        yield "values", _counts(report.dtypes)
        yield "mean", ", ".join(f"{value:.4f}" for value in report.mean)
        yield "std", ", ".join(f"{value:.4f}" for value in report.std)
    repeats = sum(len(same) - 1 for same in report.duplicates)
    yield "duplicates", f"{repeats:,}" + (" among those read" if report.read < report.count else "")
    yield (
        "broken",
        f"{len(report.broken):,} of {report.read:,} ({len(report.broken) / max(1, report.read):.1%})",
    )


def _spread(values: list[int], unit: str = "pixels") -> str:
    low, middle, high = np.percentile(values, [0, 50, 100]).astype(int)
    return f"{low} to {high} {unit}, median {middle}" if low < high else f"{low} {unit}"


def _counts(counts: dict[Any, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{what} ({number:,})" for what, number in ordered)

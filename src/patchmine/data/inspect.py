"""``patchmine data inspect``: what is in a source, and what is wrong with it."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchmine.data.decoding.bounds import DecodeError, install_command, reading_item
from patchmine.data.decoding.decode import decode, no_image, probe
from patchmine.data.decoding.video import FrameFiles, VideoFile, open_video
from patchmine.data.sampling import spread_indices
from patchmine.data.settings import MAX_PIXELS
from patchmine.data.sources.contract import Source, open_regular
from patchmine.errors import UserError, reason_of, shown_name

_BLOCK = 1 << 20  # pixels that are summed, or bytes that are read, at once

SHOWN = 10
"""Lines of a list that the rendered report shows."""


@dataclass
class InspectReport:
    """What was found; all but ``count``, ``classes`` and ``notes`` is about the items read.

    Attributes:
        name: what the user called the source.
        count: items of the source, of which ``read`` were looked at.
        sizes: (height, width) -> items; ``channels``, ``dtypes`` likewise.
        frames: lengths of videos, of which one frame each gives the rest.
        mean: per channel, over the pixels of the items that have the most frequent number of
            channels, 8- and 16-bit values scaled to [0, 1]; ``std`` likewise.
        duplicates: groups of paths with equal contents.
        broken: (path, reason).
        classes: name -> items, all of the source; None without labels.
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
    chosen = spread_indices(len(source), len(source) if full else sample).tolist()
    report = InspectReport(source.name, len(source), len(chosen), notes=source.notes)
    try:
        labels = source.labels()
        if labels is not None:
            sizes = np.bincount(labels.ids, minlength=len(labels.names)).tolist()
            report.classes = dict(zip(labels.names, sizes, strict=True))
    except UserError as error:  # of damaged labels, without which all else can be told
        report.notes += (str(error),)
    moments: dict[int, Tensor] = {}  # by the number of channels: sums of 1, x and x squared
    seen: dict[int, int] = {}  # by a digest of its contents, the first such item
    same: dict[int, list[int]] = {}  # by the first of them, items of equal contents
    for number, index in enumerate(chosen, 1):
        try:
            with reading_item():
                raw = source.read(index)
                first = seen.setdefault(_digest(raw), index)
                if first != index:
                    same.setdefault(first, [first]).append(index)
                _look(raw, report, moments, video, max_pixels)
        except (OSError, DecodeError) as error:
            report.broken.append((shown_name(source.path(index)), reason_of(error)))
        if progress is not None:
            progress(number, len(chosen))
    commands = Counter(filter(None, (install_command(reason) for _, reason in report.broken)))
    report.notes += tuple(
        f"{number:,} of them need a package that is not installed: {command}"
        for command, number in commands.items()
    )
    if moments:
        pixels, total, squares = moments[report.channels.most_common(1)[0][0]]
        mean = total / pixels
        std = (squares / pixels - mean.square()).clamp(min=0).sqrt()
        report.mean, report.std = tuple(mean.tolist()), tuple(std.tolist())
    groups = sorted(same.values())
    report.duplicates = [[shown_name(source.path(i)) for i in group] for group in groups]
    return report


def _look(
    raw: Any, report: InspectReport, moments: dict[int, Tensor], video: bool, max_pixels: int
) -> None:
    """Decode one item and add it to the counts, none of which a broken one enters."""
    num_frames = 0
    if video:
        reader = open_video(raw, max_pixels)
        num_frames = reader.num_frames
        raw = reader.frames([num_frames // 2])[0]  # (C, H, W) uint8
    height, width, channels, dtype = probe(raw)
    image = decode(raw, channels, max_pixels)  # a truncated file has a sound header
    sums = moments.setdefault(channels, torch.zeros(3, channels, dtype=torch.float64))
    rows = max(1, _BLOCK // image.shape[2])
    # As doubles, the whole of a large image would take eight times its memory.
    for part in image.split(rows, 1):  # type: ignore[no-untyped-call]
        values = part.flatten(1).double() / (255 if image.dtype == torch.uint8 else 1)
        ones = torch.full((channels,), float(values.shape[1]))
        sums += torch.stack([ones, values.sum(1), values.square().sum(1)])
    report.sizes[height, width] += 1
    report.channels[channels] += 1
    report.dtypes[dtype] += 1
    if video:
        report.frames[num_frames] += 1


def _digest(raw: Any) -> int:
    """64 bits that stand for the contents: two of a million agree once in 30 million sets."""
    digest = hashlib.blake2b(digest_size=8)
    for block in _contents(raw):
        digest.update(block)
    return int.from_bytes(digest.digest())


def _contents(raw: Any) -> Iterator[bytes | memoryview]:
    """A raw item in blocks; files in small ones, since a video may be larger than the memory."""
    if isinstance(raw, VideoFile | FrameFiles):
        for path in [raw.path] if isinstance(raw, VideoFile) else raw.paths:
            with open_regular(path) as handle:
                while block := handle.read(_BLOCK):
                    yield block
    elif isinstance(raw, list | tuple):  # encoded frames
        yield from raw
    elif isinstance(raw, bytes | bytearray | memoryview):
        yield memoryview(raw)
    elif isinstance(raw, Image.Image | Tensor | np.ndarray):
        pixels = raw.numpy(force=True) if isinstance(raw, Tensor) else np.asarray(raw)
        content = io.BytesIO()
        np.save(content, pixels, allow_pickle=False)  # with its shape and its type
        yield content.getbuffer()
    else:
        raise no_image(raw)


def render(report: InspectReport, *, width: int = 110) -> str:
    """The report as text for a terminal of ``width`` columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=io.StringIO(), width=width, highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for head, text in _rows(report):
        table.add_row(Text(head, style="bold"), Text(text))
    console.print(table)
    groups = [
        f"{group[0]} = {', '.join(group[1:4])}{' ...' if len(group) > 4 else ''}"
        for group in report.duplicates
    ]
    broken = [f"{path}: {reason}" for path, reason in report.broken]
    lists = {"the same contents": groups, "broken": broken, "beware": report.notes}
    for head, lines in lists.items():
        shown = [f"\n{head}:", *(f"  {line}" for line in lines[:SHOWN])] if lines else []
        if len(lines) > SHOWN:
            shown.append(f"  and {len(lines) - SHOWN:,} more")
        for line in shown:
            console.print(Text(line))
    text_of: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text_of.splitlines())


def _rows(report: InspectReport) -> Iterator[tuple[str, str]]:
    read, item = f"{report.read:,} of them read", "video" if report.frames else "image"
    everything = report.read == report.count
    source = shown_name(report.name)
    yield f"{item}s", f"{report.count:,} in {source}; {'all of them read' if everything else read}"
    if report.classes is not None:
        sizes = sorted(report.classes.values())
        yield "classes", f"{len(sizes):,}, of {sizes[0]:,} to {sizes[-1]:,} {item}s"
    if report.frames:
        yield "frames", _spread([*report.frames.elements()], "frames")
    if report.sizes:
        for axis, head in enumerate(("height", "width")):
            yield head, _spread([size[axis] for size in report.sizes.elements()], "pixels")
        common = {f"{size[0]}x{size[1]}": count for size, count in report.sizes.most_common(5)}
        yield "most frequent", _counts(common)
        yield "channels", _counts(report.channels)
        yield "values", _counts(report.dtypes)
        yield "mean", ", ".join(f"{value:.4f}" for value in report.mean)
        yield "std", ", ".join(f"{value:.4f}" for value in report.std)
    repeats = sum(len(group) - 1 for group in report.duplicates)
    yield "duplicates", f"{repeats:,}" + ("" if everything else " among those read")
    broken = len(report.broken)
    yield "broken", f"{broken:,} of {report.read:,} ({broken / max(1, report.read):.1%})"


def _spread(values: list[int], unit: str) -> str:
    low, middle, high = np.percentile(values, [0, 50, 100]).astype(int)
    return f"{low} to {high} {unit}, median {middle}" if low < high else f"{low} {unit}"


def _counts(counts: dict[Any, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{what} ({number:,})" for what, number in ordered)

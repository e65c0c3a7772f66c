"""``patchmine data inspect``: what is in a source, what is wrong with it, and what to do."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from patchmine.data.decoding.bounds import DecodeError, install_command, reading_item
from patchmine.data.decoding.decode import decode, no_image, probe
from patchmine.data.decoding.reading import Piece, open_regular
from patchmine.data.decoding.video import VIDEOS, FrameFiles, VideoFile
from patchmine.data.inspecting.advice import advise
from patchmine.data.inspecting.alike import keepers
from patchmine.data.inspecting.findings import Findings, decoded
from patchmine.data.inspecting.listing import refuse_unlisted, write_list
from patchmine.data.inspecting.masks import masks_of
from patchmine.data.inspecting.proposal import Proposal, command_for, propose
from patchmine.data.inspecting.report import InspectReport, render
from patchmine.data.inspecting.sheet import draw_sheet, refuse_sheet
from patchmine.data.sampling import spread_indices
from patchmine.data.settings import MAX_PIXELS
from patchmine.data.sources.contract import IMAGES, Source
from patchmine.errors import UserError, reason_of, shown_name
from patchmine.system.disk import output

__all__ = ["InspectReport", "inspect", "render"]

_BLOCK = 1 << 20  # bytes that are read at once


def inspect(
    source: Source,
    *,
    sample: int = 1000,
    full: bool = False,
    video: bool = False,
    max_pixels: int = MAX_PIXELS,
    dedup: str | Path | None = None,
    sheet: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> InspectReport:
    """Read and decode a seeded choice of items, or all of them.

    Args:
        source: opened images or videos (`open_source`).
        sample: how many items are decoded.
        full: all are.
        video: items are videos, of which the middle frame is decoded.
        max_pixels: items of more count as broken.
        dedup: a list file to write, .txt, .csv or .tsv, of all items that can be read, of
            duplicates and near-duplicates one each (of videos: duplicates).  All items are decoded.
        sheet: a picture to write of some images and their training crops.
        progress: told (items done, items to do).

    Returns:
        Counts, sizes, channels, statistics, duplicates, broken items, advice, and a command that
        trains on the source.

    Raises:
        UserError: what is to be written cannot be, or is not to be had of such a source.
    """
    full = full or dedup is not None
    chosen = spread_indices(len(source), len(source) if full else sample).tolist()
    options: dict[str, Any] = dict(
        video=video, max_pixels=max_pixels, dedup=dedup, progress=progress
    )
    with ExitStack() as files:
        if sheet is not None:
            refuse_sheet(source, Path(sheet), video)
            new_sheet = files.enter_context(output(Path(sheet), "sheet"))
            new_sheet.touch()  # a place that cannot be written is told before the work
        if dedup is not None:
            refuse_unlisted(source, Path(dedup))
            new_list = files.enter_context(output(Path(dedup), "dedup"))
            new_list.touch()
        report, kept, proposal = _look_through(source, chosen, **options)
        if dedup is not None:
            kind = VIDEOS if video else IMAGES
            write_list(source, kept, new_list, Path(dedup), kind)
            report.listed = shown_name(dedup), len(kept)
        if sheet is not None:
            draw_sheet(source, kept, proposal, new_sheet, max_pixels)
    return report


def _look_through(
    source: Source,
    chosen: list[int],
    *,
    video: bool,
    max_pixels: int,
    dedup: str | Path | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[InspectReport, list[int], Proposal | None]:
    """The report, the items to keep in their order, and the settings that fit, if any was read."""
    report = InspectReport(source.name, len(source), len(chosen), notes=source.notes)
    _count_classes(source, report)
    findings = Findings()
    seen: dict[int, int] = {}  # by a digest of its contents, the first such item
    same: dict[int, list[int]] = {}  # by the first of them, items of equal contents
    left_out = set[int]()
    for number, index in enumerate(chosen, 1):
        try:
            with reading_item():
                raw = source.read(index)
                first = seen.setdefault(_digest(raw), index)
                if first != index:
                    same.setdefault(first, [first]).append(index)
                item = decoded(raw, video=video, max_pixels=max_pixels)
        except (OSError, DecodeError) as error:
            left_out.add(index)
            report.broken.append((shown_name(source.path(index)), reason_of(error)))
        else:
            findings.add(index, item, max_pixels)
        if progress is not None:
            progress(number, len(chosen))
    _describe(report, findings)
    equal = sorted(same.values())
    left_out.update(index for group in equal for index in group[1:])
    alike = _near_duplicates(findings, left_out)
    left_out.update(index for group in alike for index in group[1:])
    for groups, told in ((equal, report.duplicates), (alike, report.near_duplicates)):
        told += [[shown_name(source.path(index)) for index in group] for group in groups]
    kept = [index for index in chosen if index not in left_out]
    proposal = propose(findings.main) if report.sizes and not video else None
    masks = masks_of(source, chosen, findings)
    report.advice = advise(source, report, findings, masks, proposal, dedup is not None)
    if proposal is not None:
        report.command = command_for(source, proposal, dedup or (masks and masks.data) or None)
    return report, kept, proposal


def _count_classes(source: Source, report: InspectReport) -> None:
    try:
        labels = source.labels()
    except UserError as error:  # of damaged labels, without which all else can be told
        report.notes += (str(error),)
        return
    if labels is not None:
        sizes = np.bincount(labels.ids, minlength=len(labels.names)).tolist()
        report.classes = dict(zip(labels.names, sizes, strict=True))


def _describe(report: InspectReport, findings: Findings) -> None:
    """Fill in what was counted, and a note about packages that are missing."""
    commands = Counter(filter(None, (install_command(reason) for _, reason in report.broken)))
    report.notes += tuple(
        f"{number:,} of them need a package that is not installed: {command}"
        for command, number in commands.items()
    )
    report.frames = findings.frames
    for tally in (findings.pictures, findings.rest):
        report.sizes += tally.sizes
        report.channels += tally.channels
        report.dtypes += tally.dtypes
    if report.sizes:
        channels = report.channels.most_common(1)[0][0]
        tallies = [findings.pictures, findings.rest]
        moments = [each.moments[channels] for each in tallies if channels in each.moments]
        pixels, total, squares = np.sum(moments, axis=0)
        mean = total / pixels
        std = np.sqrt(np.maximum(squares / pixels - np.square(mean), 0))
        report.mean, report.std = tuple(mean.tolist()), tuple(std.tolist())


def _near_duplicates(findings: Findings, copies: set[int]) -> list[list[int]]:
    """Groups of items that look the same, the one with the most pixels first; no ``copies``."""
    index = np.array(findings.hashed, np.int64)
    is_first = ~np.isin(index, np.array(sorted(copies), np.int64))
    order = np.argsort(-np.array(findings.pixels, np.int64)[is_first], kind="stable")
    index = index[is_first][order]
    bits = np.array(findings.bits, np.uint64)[is_first][order]
    colours = np.array(findings.colours, np.float32).reshape(-1, 3)[is_first][order]
    kept, groups = keepers(bits, colours), dict[int, list[int]]()
    for place in np.flatnonzero(kept != np.arange(len(kept))).tolist():
        first = int(index[kept[place]])
        groups.setdefault(first, [first]).append(int(index[place]))
    return sorted(groups.values())


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
    elif isinstance(raw, Piece):
        yield from _contents(decode(raw, probe(raw)[2]))
    elif isinstance(raw, Image.Image | Tensor | np.ndarray):
        pixels = raw.numpy(force=True) if isinstance(raw, Tensor) else np.asarray(raw)
        content = io.BytesIO()
        np.save(content, pixels, allow_pickle=False)  # with its shape and its type
        yield content.getbuffer()
    else:
        raise no_image(raw)

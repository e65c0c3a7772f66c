"""What an inspection found, and the text of it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from patchmine.errors import shown_name

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
        near_duplicates: groups of paths of images that look the same but are not equal, the one to
            keep first; none of videos.
        broken: (path, reason).
        notes: what is wrong with the source although it can be used.
        classes: name -> items, all of the source; None without labels.
        advice: a sentence for each thing that should be known or done before training.
        command: one to paste that pre-trains on the source with the settings that fit; "" where
            nothing could be read.
        listed: the list file that was written, and how many items it names.
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
    near_duplicates: list[list[str]] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    classes: dict[str, int] | None = None
    advice: tuple[str, ...] = ()
    command: str = ""
    listed: tuple[str, int] | None = None

    def __str__(self) -> str:
        """The text that `patchmine data inspect` prints."""
        return render(self)


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
    for line in _lists(report):
        console.print(Text(line))
    text_of: str = console.file.getvalue()  # type: ignore[attr-defined]
    text = "\n".join(line.rstrip() for line in text_of.splitlines())
    if report.advice:  # not broken into lines, so that what is to be pasted stays whole
        text += "\n".join(["\n\nadvice:", *(f"  - {sentence}" for sentence in report.advice)])
    if report.listed:
        text += "\n\n{}: a list of the {:,} items to keep".format(*report.listed)
    if report.command:
        text += f"\n\nto train on these:\n  {report.command}"
    return text


def _lists(report: InspectReport) -> Iterator[str]:
    equal, alike = (
        [f"{group[0]} = {', '.join(group[1:4])}{' ...' * (len(group) > 4)}" for group in groups]
        for groups in (report.duplicates, report.near_duplicates)
    )
    broken = [f"{path}: {reason}" for path, reason in report.broken]
    lists = {"the same contents": equal, "nearly the same": alike, "broken": broken}
    for head, lines in {**lists, "beware": report.notes}.items():
        if lines:
            yield f"\n{head}:"
        yield from (f"  {line}" for line in lines[:SHOWN])
        if len(lines) > SHOWN:
            yield f"  and {len(lines) - SHOWN:,} more"


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
        yield "most frequent", counted(common)
        yield "channels", counted(report.channels)
        yield "values", counted(report.dtypes)
        yield "mean", ", ".join(f"{value:.4f}" for value in report.mean)
        yield "std", ", ".join(f"{value:.4f}" for value in report.std)
    among = "" if everything else " among those read"
    repeats, alike = map(num_repeats, (report.duplicates, report.near_duplicates))
    yield "duplicates", f"{repeats:,}" + (f", and {alike:,} nearly so" if alike else "") + among
    broken = len(report.broken)
    yield "broken", f"{broken:,} of {report.read:,} ({broken / max(1, report.read):.1%})"


def num_repeats(groups: list[list[str]]) -> int:
    """Items of groups that another one stands for."""
    return sum(len(group) - 1 for group in groups)


def _spread(values: list[int], unit: str) -> str:
    low, middle, high = np.percentile(values, [0, 50, 100]).astype(int)
    return f"{low} to {high} {unit}, median {middle}" if low < high else f"{low} {unit}"


def counted(counts: dict[Any, int]) -> str:
    """``a (3), b (1)``, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{what} ({number:,})" for what, number in ordered)

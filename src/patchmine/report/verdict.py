"""The verdict on pre-training: scores over the share of labels, in words and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from patchmine.report import words
from patchmine.report.charts import Axis, linear_axis, log_axis, tick_texts
from patchmine.report.reading import SHARES, RunRecord, flatten
from patchmine.report.series import finite_number

_RANDOM = "random_init"
_GREY = 6  # among the colours of runs: what the others are measured by
_IN_WORDS = {"pretrained": "pre-trained weights", _RANDOM: "random ones"}
_TITLES = {"pretrained": "pre-trained", _RANDOM: "random init"}
_METRICS = {"top1": "top-1", "map": "mAP", "r2": "R\N{SUPERSCRIPT TWO}"}

# The colours of report.css on white, and the sizes of the picture, in pixels.
_COLOURS = ("#0868ac", "#b84a00", "#007a58", "#a83f8a", "#856000", "#6a51a3", "#565b63", "#b3261e")
_INK, _SOFT, _HAIR, _PAPER = "#1b1d20", "#63676e", "#e3e3df", "#ffffff"
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 960, 600, 90, 40, 100, 70
_ASIDE = 0.01  # of the plot's width
_FINE = 2  # drawn larger and reduced, for smooth lines


class Point(NamedTuple):
    """Mean and deviation over seeds at one share of the labels; of one seed there is no ``std``."""

    share: float
    images: int
    steps: int
    mean: float
    std: float | None
    seeds: int

    @property
    def low(self) -> float:
        """The lower end of the spread."""
        return self.mean - (self.std or 0.0)

    @property
    def high(self) -> float:
        """Its upper end."""
        return self.mean + (self.std or 0.0)


@dataclass(frozen=True)
class Line:
    """One start: its points by rising share, and which of the page's colours it has."""

    name: str
    colour: int
    points: Sequence[Point]

    @property
    def title(self) -> str:
        """Its name for people; names of models and files stay as they are."""
        return _TITLES.get(self.name, self.name)

    def at(self, share: float) -> Point | None:
        """The point at a share, if there is one."""
        return next((point for point in self.points if point.share == share), None)


@dataclass(frozen=True)
class Verdict:
    """What eval/shares.json says: at least one line, the given start first.

    ``differing``: by start the settings in which they differ.
    """

    metric: str
    lines: Sequence[Line]
    differing: Mapping[str, Mapping[str, str]]
    about: str
    notes: Sequence[str]

    @property
    def shares(self) -> list[float]:
        """All shares, rising."""
        return sorted({point.share for line in self.lines for point in line.points})

    @property
    def names_differing(self) -> list[str]:
        """The settings in which the starts differ."""
        return list(dict.fromkeys(key for own in self.differing.values() for key in own))

    def value(self, point: Point | None, unit: str = "") -> str:
        """71.2 ± 0.6; R² has two more digits."""
        if point is None:
            return words.NOTHING
        digits = 3 if self.metric == "r2" else 1
        spread = f" \N{PLUS-MINUS SIGN} {point.std:.{digits}f}" if point.std is not None else ""
        return f"{point.mean:.{digits}f}{spread}{unit}"

    @property
    def unit(self) -> str:
        """Behind a number."""
        return "" if self.metric == "r2" else " %"

    @property
    def title(self) -> str:
        """The metric as it is usually written."""
        return _METRICS.get(self.metric, self.metric)


def read_verdict(content: Mapping[str, Any]) -> Verdict:
    """The lines of a result.  Raises ValueError where it holds none."""
    metric = str(content.get("metric", "top1"))
    found: dict[str, list[Point]] = {}
    given = content.get("entries")
    entries = given if isinstance(given, list) else []
    for entry in (each for each in entries if isinstance(each, Mapping)):
        numbers = [finite_number(entry.get(key)) for key in ("share", "images", "steps", metric)]
        known = [number for number in numbers if number is not None]
        if len(known) < len(numbers) or known[0] <= 0:
            continue
        seeds, std = entry.get("seeds"), finite_number(entry.get("std"))
        count = len(seeds) if isinstance(seeds, list) else 1
        point = Point(known[0], round(known[1]), round(known[2]), known[3], std, count)
        found.setdefault(str(entry.get("start")), []).append(point)
    if not found:
        raise ValueError("no entry with a score")
    free = [number for number in range(len(_COLOURS)) if number != _GREY]
    colours = {name: free[n % len(free)] for n, name in enumerate(k for k in found if k != _RANDOM)}
    lines = [
        Line(name, colours.get(name, _GREY), sorted(points, key=lambda point: point.share))
        for name, points in found.items()
    ]
    tables = (content.get(key) for key in ("settings", "images", "starts"))
    settings, images, starts = (each if isinstance(each, Mapping) else {} for each in tables)
    about = [str(text) for text in (settings.get("data"), images.get("how")) if text]
    differing = {
        _TITLES.get(str(name), str(name)): flatten(own)
        for name, own in starts.items()
        if isinstance(own, Mapping)
    }
    notes = content.get("notes")
    told = [str(note) for note in notes] if isinstance(notes, list) else []
    return Verdict(metric, lines, differing, " · ".join(about), told)


def verdict_of(run: RunRecord) -> Verdict | None:
    """The verdict in a folder, where there is one that can be read."""
    try:
        return read_verdict(run.evaluations[SHARES])
    except (KeyError, ValueError):
        return None


# ---- in words ----


def sentences(verdict: Verdict) -> list[str]:
    """Who wins with the fewest labels and with the most, and what that is worth in labels."""
    first = verdict.lines[0]
    other = next((line for line in verdict.lines[1:] if line.name == _RANDOM), None)
    other = other or (verdict.lines[1] if len(verdict.lines) > 1 else None)
    shares = [point.share for point in first.points]
    said = [
        _sentence(verdict, first, other, share)
        for share in dict.fromkeys(shares[:: max(1, len(shares) - 1)])
    ]
    saved = None if other is None else _saved(first, other)
    if saved is not None and other is not None:
        said.append(
            f"{percent_of(saved)} of the labels are enough for {_called(first.name)} to reach what "
            f"{_called(other.name)} reach with {percent_of(other.points[-1].share)}."
        )
    return said


def _sentence(verdict: Verdict, first: Line, other: Line | None, share: float) -> str:
    own, theirs = first.at(share), None if other is None else other.at(share)
    labels = "all labels" if share == 1 else f"{percent_of(share)} of the labels"
    text = f"With {labels}, {_called(first.name)} reach {verdict.value(own, verdict.unit)}"
    if own is None or theirs is None or other is None:
        return f"{text} {verdict.title}."
    text += f" {verdict.title} where {_called(other.name)} reach "
    text += verdict.value(theirs, verdict.unit)
    if own.std is None or theirs.std is None:
        return f"{text} (one seed: the spread is unknown)."
    if own.low <= theirs.high and theirs.low <= own.high:
        return f"{text}, a difference within the spread of the seeds."
    return f"{text}."


def _saved(first: Line, other: Line) -> float | None:
    """The smallest share with which the first is as good as the other with the most labels."""
    goal = other.points[-1]
    enough = [p.share for p in first.points if p.mean >= goal.mean and p.share < goal.share]
    return min(enough, default=None)


def _called(name: str) -> str:
    return _IN_WORDS.get(name, name)


def percent_of(share: float) -> str:
    """10 %."""
    return f"{100 * share:g} %"


def table(verdict: Verdict) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a row for each share, a column for each start."""
    head = ["labels", "images", "steps", *(line.title for line in verdict.lines)]
    rows = []
    for share in verdict.shares:
        here = [line.at(share) for line in verdict.lines]
        known = [point for point in here if point is not None]
        counts = (sorted({getattr(p, name) for p in known}) for name in ("images", "steps"))
        told = [" / ".join(f"{count:,}" for count in each) for each in counts]
        rows.append([percent_of(share), *told, *(verdict.value(point) for point in here)])
    return head, rows


# ---- as a picture ----


@dataclass(frozen=True)
class Plot:
    """Both axes, and where their labels stand in percent."""

    across: Axis
    up: Axis
    share_labels: Sequence[tuple[float, str]]
    labels: Sequence[tuple[float, str]]


def plot(verdict: Verdict) -> Plot:
    """The axes around all that is drawn."""
    points = [point for line in verdict.lines for point in line.points]
    shares = verdict.shares
    across = log_axis(shares[0], shares[-1])
    bounds = (-math.inf, 1.0) if verdict.metric == "r2" else (0.0, 100.0)
    up = linear_axis(min(p.low for p in points), max(p.high for p in points), bounds=bounds)
    across = Axis(across.low, across.high, shares, log=True)
    texts = [percent_of(share) for share in shares]
    return Plot(
        across, up, across.labels(texts), up.labels([t + verdict.unit for t in tick_texts(up)])
    )


class Drawn(NamedTuple):
    """One start in the plot: (x, y, low, high) of its points, as fractions from below."""

    line: Line
    places: Sequence[tuple[float, float, float, float]]

    def svg(self) -> tuple[str, str, str]:
        """Paths of the line, its points and its spread in a square of 1000; y from the top."""
        ends = [(1000 * x, *(1000 * (1 - each) for each in ys)) for x, *ys in self.places]
        dots = [f"{x:.1f} {y:.1f}" for x, y, _, _ in ends]
        bars = "".join(f"M{x:.1f} {low:.1f}V{high:.1f}" for x, _, low, high in ends)
        return "M" + "L".join(dots), "".join(f"M{dot}h0" for dot in dots), bars


def drawn(verdict: Verdict, axes: Plot) -> Iterator[Drawn]:
    """Every start on these axes, each a little beside the others so that no spread hides one."""
    for number, line in enumerate(verdict.lines):
        aside = _ASIDE * (number - (len(verdict.lines) - 1) / 2)
        x = (axes.across.place([point.share for point in line.points]) + aside).tolist()
        heights = (
            axes.up.inside([getattr(point, name) for point in line.points]).tolist()
            for name in ("mean", "low", "high")
        )
        yield Drawn(line, list(zip(x, *heights, strict=True)))


def draw_verdict(verdict: Verdict) -> Image.Image:
    """The picture by itself, on white: scores over the share of labels, a line for each start."""
    k = _FINE
    sheet = Image.new("RGB", (k * _WIDTH, k * _HEIGHT), _PAPER)
    draw, axes = ImageDraw.Draw(sheet), plot(verdict)
    small, large = (ImageFont.load_default(k * size) for size in (17, 22))
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        return k * (_LEFT + x * (right - _LEFT)), k * (bottom - y * (bottom - _TOP))

    draw.text((k * _LEFT, k * 22), f"{verdict.title} on test images", _INK, large)
    for percent, text in axes.labels:
        draw.line([place(0, percent / 100), place(1, percent / 100)], _HAIR, k)
        x, y = place(0, percent / 100)
        draw.text((x - 12 * k, y), text, _SOFT, small, anchor="rm")
    draw.line([place(0, 0), place(1, 0)], _SOFT, k)
    for percent, text in axes.share_labels:
        x, y = place(percent / 100, 0)
        draw.line([(x, y), (x, y + 6 * k)], _SOFT, k)
        draw.text((x, y + 12 * k), text, _SOFT, small, anchor="ma")
    draw.text(
        (k * (_LEFT + right) / 2, k * (_HEIGHT - 12)),
        "share of the labels",
        _SOFT,
        small,
        anchor="mb",
    )
    legend = float(k * _LEFT)
    for each in drawn(verdict, axes):
        colour = _COLOURS[each.line.colour]
        draw.line([place(x, y) for x, y, _, _ in each.places], colour, 3 * k, joint="curve")
        for x, y, low, high in each.places:
            (a, b), (_, top), (_, end) = place(x, y), place(x, high), place(x, low)
            draw.line([(a, top), (a, end)], colour, 2 * k)
            for edge in (top, end) if end - top > 2 * k else ():
                draw.line([(a - 6 * k, edge), (a + 6 * k, edge)], colour, 2 * k)
            draw.ellipse([a - 5 * k, b - 5 * k, a + 5 * k, b + 5 * k], colour)
        draw.line([(legend, k * 72), (legend + 26 * k, k * 72)], colour, 3 * k)
        name = each.line.title
        draw.text((legend + 34 * k, k * 72), name, _INK, small, anchor="lm")
        legend += 34 * k + draw.textlength(name, small) + 30 * k
    spread = [p.seeds for line in verdict.lines for p in line.points if p.std is not None]
    if spread:
        note = f"bars: deviation over {max(spread)} seeds"
        draw.text((k * right, k * 30), note, _SOFT, small, anchor="rt")
    return sheet.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS)

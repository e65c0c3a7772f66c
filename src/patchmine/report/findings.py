"""What is known of a data set as the page of `patchmine explore`: which images, beside which."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain, islice, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchmine.data.sources.contract import Source
from patchmine.errors import shown_name
from patchmine.evaluate.evaluated import Evaluated
from patchmine.evaluate.structure import Structure
from patchmine.report import words
from patchmine.report.page import templates
from patchmine.report.settings import ExploreSettings
from patchmine.report.thumbnails import Thumbnail, thumbnails

_MOST_EXTREME, _MOST_GROUPS, _MOST_MEMBERS = 60, 60, 8  # of a kind, that the page asks for


@dataclass(frozen=True)
class Findings:
    """What is known of the N items of a source that can be read; ``index`` (N,) says which."""

    evaluated: Evaluated
    source: Source
    index: Tensor
    structure: Structure
    difficulty: Tensor | None  # (N,)

    def path(self, row: int) -> str:
        """The name of one of the N for people, wherever they are."""
        return self.source.path(int(self.index[row]))

    def name(self, row: int) -> str:
        """Its name inside the source, as a page shows it."""
        return shown_name(self.source.key(int(self.index[row])))


@dataclass(frozen=True)
class Strip:
    """Images that stand together: ``tiles`` are rows, each with what is written under it."""

    title: str
    tiles: Sequence[tuple[int, str]]


@dataclass(frozen=True)
class Section:
    """A part of the page; ``compares``: a strip of a single image would say nothing."""

    key: str
    title: str
    note: str
    strips: Sequence[Strip]
    compares: bool = False

    def rows(self) -> list[int]:
        """All its images: the first of each strip first, or strip by strip where it compares."""
        strips = [[row for row, _ in strip.tiles] for strip in self.strips]
        turns = strips if self.compares else zip_longest(*strips)
        return [row for row in chain.from_iterable(turns) if row is not None]

    def only(self, rows: Mapping[int, int]) -> Section:
        """The same with the images in ``rows``."""
        fewest = 2 if self.compares else 1
        kept = [replace(s, tiles=[t for t in s.tiles if t[0] in rows]) for s in self.strips]
        return replace(self, strips=[strip for strip in kept if len(strip.tiles) >= fewest])


def _sections(findings: Findings) -> list[Section]:
    """What the page would like to show, most telling first."""
    return [_duplicates(findings), _outliers(findings), *_extremes(findings), _clusters(findings)]


def _duplicates(findings: Findings) -> Section:
    found, noun = findings.structure, findings.evaluated.item.noun
    groups = found.members(found.group, -found.similarity[:, 0])
    strips = [
        Strip(
            f"Group {number}: {words.whole(len(group))} {noun}s",
            [(row, f"{float(found.similarity[row, 0]):.4f}") for row in _first(group)],
        )
        for number, group in enumerate(groups[:_MOST_GROUPS], 1)
    ]
    note = (
        f"Joined by cosines of {found.threshold:.4f} or more; under each {noun} stands that with "
    )
    note += "its nearest. Keep one of each group."
    return Section("duplicates", "Near-duplicates", note, strips, compares=True)


def _outliers(findings: Findings) -> Section:
    outlier, noun = findings.structure.outlier, findings.evaluated.item.noun
    rows = _first((-outlier).argsort(stable=True), _MOST_EXTREME)
    tiles = [(row, _times(float(outlier[row]))) for row in rows]
    note = f"So many times as far from their nearest neighbours as is usual among these {noun}s. "
    note += "Faults and strangers are among them."
    return Section("outliers", "Outliers", note, [Strip("", tiles)])


def _extremes(findings: Findings) -> Iterator[Section]:
    hard, noun = findings.difficulty, findings.evaluated.item.noun
    if hard is None:
        return
    notes = {
        "Hardest": "The largest error on the patches that the run's teacher expects to be hard: "
        "what the model has learnt least of.",
        "Easiest": f"The smallest such error: {noun}s with little left to learn from.",
    }
    for (name, note), order in zip(notes.items(), ((-hard).argsort(), hard.argsort()), strict=True):
        tiles = [(row, words.number(float(hard[row]))) for row in _first(order, _MOST_EXTREME)]
        yield Section(name.lower(), f"{name} {noun}s", note, [Strip("", tiles)])


def _clusters(findings: Findings) -> Section:
    found, noun = findings.structure, findings.evaluated.item.noun
    strips = [
        Strip(
            f"Cluster {number}: {words.whole(len(rows))} {noun}{'s' * (len(rows) != 1)}",
            [(row, f"{float(found.centrality[row]):.3f}") for row in _first(rows)],
        )
        for number, rows in enumerate(found.members(found.cluster, -found.centrality), 1)
    ]
    note = f"By k-means, the largest first; of each the most typical {noun}s, with the cosine to "
    return Section("clusters", "Clusters", f"{note}the centre.", strips)


def _first(rows: Tensor, most: int = _MOST_MEMBERS) -> list[int]:
    found: list[int] = rows[:most].tolist()
    return found


def _times(value: float) -> str:
    return f"{value:.1f}\N{MULTIPLICATION SIGN}"


def choose(sections: Iterable[Sequence[int]], neighbours: Tensor, most: int) -> dict[int, int]:
    """Which of N rows are shown, at most ``most``: row -> its number on the page, rising.

    Sections take turns, so that each has its first rows in; then come the nearest neighbours
    (N, k) of all these, then the second ones, ...; what room is left is for an even choice of all.
    """
    turns = chain.from_iterable(zip_longest(*sections))
    wanted = dict.fromkeys(islice(dict.fromkeys(row for row in turns if row is not None), most))
    seeds = torch.tensor(list(wanted), dtype=torch.int64)
    even = np.linspace(0, len(neighbours) - 1, min(most, len(neighbours))).round().astype(int)
    for row in chain(neighbours[seeds].T.flatten().tolist(), even.tolist()):
        if len(wanted) >= most:
            break
        wanted[row] = None
    return {row: number for number, row in enumerate(sorted(wanted))}


def render(findings: Findings, settings: ExploreSettings, table: str) -> str:
    """The page as text."""
    found, evaluated = findings.structure, findings.evaluated
    wanted = _sections(findings)
    rows = choose([section.rows() for section in wanted], found.neighbours, settings.shown)
    pictures = _thumbnails(findings, list(rows), settings)
    items, others = _items(findings, rows)
    many = len(findings.index)
    noun = evaluated.item.noun
    figures = {
        f"{noun}s": words.whole(many),
        "in near-duplicate groups": words.whole(int((found.group >= 0).sum())),
        "outliers, over 2\N{MULTIPLICATION SIGN}": words.whole(int((found.outlier > 2).sum())),
        "clusters": words.whole(int(found.cluster.max()) + 1),
        "on this page": words.whole(len(rows)),
    }
    return (
        templates()
        .get_template("explore.html")
        .render(
            title=shown_name(findings.source.name),
            model=shown_name(evaluated.name),
            written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            noun=noun,
            table=table,
            figures=figures,
            sections=[section.only(rows) for section in wanted],
            rows=rows,
            names=[item["name"] for item in items],
            pictures=pictures,
            data={"items": items, "others": others},
        )
    )


def _thumbnails(
    findings: Findings, rows: Sequence[int], settings: ExploreSettings
) -> list[Thumbnail | None]:
    evaluated, places = findings.evaluated, findings.index[list(rows)].tolist()
    few = min(4, len(places) // 100)  # workers take longer to start than to read a handful
    workers = few if settings.workers == "auto" else settings.workers
    by_place = thumbnails(findings.source, places, evaluated.item, evaluated.input, workers)
    return [by_place.get(place) for place in places]


def _items(findings: Findings, rows: Mapping[int, int]) -> tuple[list[dict[str, Any]], list[str]]:
    """What the page tells of each image that it shows, and names of neighbours that it does not."""
    found = findings.structure
    others: dict[int, int] = {}
    items, facts = [], _Facts(findings)
    for row in rows:
        near = []
        cosines = found.similarity[row].tolist()
        for other, cosine in zip(found.neighbours[row].tolist(), cosines, strict=True):
            number = rows.get(other)
            if number is None:  # named only, numbered behind the images
                number = len(rows) + others.setdefault(other, len(others))
            near.append([number, f"{cosine:.4f}"])
        items.append({"name": findings.name(row), "facts": facts.of(row), "near": near})
    return items, [findings.name(row) for row in others]


class _Facts:
    """What is written about one image, from numbers of all of them."""

    def __init__(self, findings: Findings) -> None:
        self.structure, self.difficulty = findings.structure, findings.difficulty
        self.sizes = self.structure.cluster.bincount().tolist()
        self.ranked = None if self.difficulty is None else self.difficulty.sort().values

    def of(self, row: int) -> list[tuple[str, str]]:
        """(label, text) pairs."""
        found = self.structure
        cluster, group = int(found.cluster[row]), int(found.group[row])
        facts = [
            ("cluster", f"{cluster + 1}, one of {words.whole(self.sizes[cluster])}"),
            ("distance to neighbours", f"{_times(float(found.outlier[row]))} the usual"),
        ]
        if group >= 0:
            facts.append(("near-duplicates", f"group {group + 1}"))
        if self.difficulty is not None and self.ranked is not None:
            hard = self.difficulty[row]
            share = 100 * int(torch.searchsorted(self.ranked, hard)) / len(self.ranked)
            text = f"{words.number(float(hard))}, more than {share:.0f} % of all"
            facts.append(("difficulty", text))
        return facts

"""What an evaluation says of each class: a table, and which classes are taken for which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from patchmine.report import words
from patchmine.report.series import finite_number

MOST_IN_MATRIX = 40  # classes; a larger matrix is told by the pairs that are mixed up most
_KEYS = ("classes", "per_class", "confused", "confusion", "balanced")


@dataclass(frozen=True)
class ByClass:
    """The classes of one result.

    ``columns`` and ``rows`` (name, a text for each column) are a table.  ``matrix``: of every class
    the items that were taken for each, as (count, share of the row); ``pairs`` (true, predicted,
    count) where there is none.
    """

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    matrix: Sequence[Sequence[tuple[int, float]]]
    pairs: Sequence[tuple[str, str, str]]
    balanced: float | None


def take_classes(content: dict[str, object]) -> ByClass | None:
    """What a result says of its classes, taken out of it; None where it says nothing."""
    _, per_class, confused, confusion, balanced = (content.pop(key, None) for key in _KEYS)
    if not isinstance(per_class, Mapping) or not per_class:
        return None
    scores = {str(k): each for k, each in per_class.items() if isinstance(each, Mapping)}
    columns = list(dict.fromkeys(str(key) for each in scores.values() for key in each))
    rows = [(name, [_text(key, each.get(key)) for key in columns]) for name, each in scores.items()]
    matrix = _matrix(confusion, len(rows))
    return ByClass(columns, rows, matrix, _pairs(confused), finite_number(balanced))


def _text(key: str, value: object) -> str:
    known = finite_number(value)
    if known is None:
        return words.NOTHING
    return words.measure(known, key)


def _matrix(found: object, size: int) -> list[list[tuple[int, float]]]:
    """Counts with their shares of a row; nothing where these are no counts of so many classes."""
    if not isinstance(found, list) or len(found) != size or size > MOST_IN_MATRIX:
        return []
    matrix = []
    for row in found:
        counts = [finite_number(count) for count in row] if isinstance(row, list) else []
        known = [round(count) for count in counts if count is not None and count >= 0]
        if len(known) != size:
            return []
        matrix.append([(count, count / max(1, sum(known))) for count in known])
    return matrix


def _pairs(found: object) -> list[tuple[str, str, str]]:
    pairs = found if isinstance(found, list) else []
    return [
        (str(pair.get("true")), str(pair.get("predicted")), _text("count", pair.get("count")))
        for pair in pairs
        if isinstance(pair, Mapping)
    ]

"""The quarantine list: which items could not be used, and whether that is too many."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from patchmine.data.decoding.bounds import install_command
from patchmine.data.sources.contract import Source
from patchmine.errors import UserError, shown_name, whole_name

_log = logging.getLogger(__name__)

Failure = tuple[int, str]
"""Number of an item in its source, and why it could not be used."""

# Below the full count a share is an estimate.  It stops a run when it is this many standard
# deviations above the limit.
_SIGMAS = 3.0


class BadFiles:
    """Counts broken items once each, writes them to ``path`` (``name<TAB>reason``), and stops a run
    that has too many.

    Lives in the main process.  ``path=None`` only counts.  ``max_share``: the share of the data set
    that may be broken. ``item``: what the data set is of, for messages.
    """

    def __init__(self, path: Path | None, max_share: float, item: str = "image") -> None:
        self.path = path
        self.max_share = max_share
        self.item = item
        self._bad: set[int] = set()
        self._tried = 0
        self._missing: Counter[str] = (
            Counter()
        )  # commands that would install what broken items lack
        self._listed = _names_in(path)

    def __len__(self) -> int:
        return len(self._bad)

    def note(self, source: Source, tried: int, failures: Sequence[Failure]) -> None:
        """Take in that ``tried`` items of ``source`` were read and which failed; UserError when
        these are too many.
        """
        self._tried += tried
        fresh = [
            (index, reason) for index, reason in dict(failures).items() if index not in self._bad
        ]
        for index, reason in fresh:
            if not self._bad:
                where = f", listed in {shown_name(self.path)}" if self.path else ""
                first = shown_name(source.path(index))
                _log.warning(
                    "broken %ss are skipped%s; the first is %s: %s", self.item, where, first, reason
                )
            self._bad.add(index)
            command = install_command(reason)
            if command is not None:
                self._missing[command] += 1
            self._write(source.path(index), reason)
        if fresh and self._too_many(len(source)):
            raise UserError(self._verdict(source, *fresh[-1]))

    def _verdict(self, source: Source, index: int, reason: str) -> str:
        seen = max(1, min(self._tried, len(source)))
        share = len(self._bad) / seen
        where = f"see {shown_name(self.path)}" if self.path else "no list was kept"
        command, number = self._missing.most_common(1)[0] if self._missing else ("", 0)
        name, last = shown_name(source.name), shown_name(source.path(index))
        if 2 * number > len(
            self._bad
        ):  # these files are sound: it is the installation that is to be mended
            return (
                f"{number} of the {seen} {self.item}s of {name} tried so far need a package that is not installed "
                f"({where}): {command}"
            )
        return (
            f"{len(self._bad)} of the {seen} {self.item}s of {name} tried so far ({share:.1%}) cannot be used, "
            f"more than max_bad_share={self.max_share} allows ({where}); the last is {last}, which "
            f"{reason}. Mend or remove them, or raise max_bad_share"
        )

    def _too_many(self, total: int) -> bool:
        """Whether the limit is passed for certain, or almost: items seen so far are a sample of
        all.
        """
        bad, seen = len(self._bad), min(self._tried, total)
        expected = self.max_share * seen
        spread = math.sqrt(max(0.0, expected * (1 - self.max_share)))
        return bad > self.max_share * total or bad > expected + _SIGMAS * spread + _SIGMAS

    def _write(self, name: str, reason: str) -> None:
        name = whole_name(name)
        if self.path is None or name in self._listed:
            return
        self._listed.add(name)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"{name}\t{reason}\n")
        except OSError as error:  # a list is not worth a run
            _log.warning(
                "%s could not be written (%s): %s is not in it", self.path, error.strerror, name
            )


def _names_in(path: Path | None) -> set[str]:
    """What an earlier part of the run has listed."""
    if path is None or not path.is_file():
        return set()
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    return {line.split("\t")[0] for line in text.split("\n") if line}

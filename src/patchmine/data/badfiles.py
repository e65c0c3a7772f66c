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

_SIGMAS = 3.0  # by which an estimated share must be above the limit to stop a run


class BadFiles:
    """Counts broken items once each, lists them in a file, and stops a run that has too many."""

    def __init__(self, path: Path | None, max_share: float, item: str = "image") -> None:
        self.path, self.max_share, self.item = path, max_share, item
        self._bad: set[int] = set()
        self._tried = 0
        self._missing: Counter[str] = Counter()  # commands that install what broken items lack
        self._listed: set[str] = set()  # also what an earlier part of the run has listed
        if path is not None and path.is_file():
            text = path.read_text(encoding="utf-8", errors="surrogateescape")
            self._listed = {line.split("\t")[0] for line in text.split("\n") if line}

    def __len__(self) -> int:
        return len(self._bad)

    def note(self, source: Source, tried: int, failures: Sequence[Failure]) -> None:
        """``tried`` items of ``source`` were read, some of which failed; UserError if too many."""
        self._tried += tried
        fresh = [failure for failure in dict(failures).items() if failure[0] not in self._bad]
        for index, reason in fresh:
            if not self._bad:
                where = f", listed in {shown_name(self.path)}" if self.path else ""
                first = f"{shown_name(source.path(index))}: {reason}"
                _log.warning("broken %ss are skipped%s; the first is %s", self.item, where, first)
            self._bad.add(index)
            self._missing.update(filter(None, [install_command(reason)]))
            self._write(whole_name(source.path(index)), reason)
        if fresh and self._too_many(len(source)):
            raise UserError(self._verdict(source, *fresh[-1]))

    def _too_many(self, total: int) -> bool:
        """Whether the limit is passed, or will be: items seen so far are a sample of all."""
        bad, seen = len(self._bad), min(self._tried, total)
        expected = self.max_share * seen
        spread = math.sqrt(max(0.0, expected * (1 - self.max_share)))
        return bad > self.max_share * total or bad > expected + _SIGMAS * spread + _SIGMAS

    def _verdict(self, source: Source, index: int, reason: str) -> str:
        bad, seen = len(self._bad), max(1, min(self._tried, len(source)))
        where = f"see {shown_name(self.path)}" if self.path else "no list was kept"
        tried = f"of the {seen} {self.item}s of {shown_name(source.name)} tried so far"
        for command, number in self._missing.most_common(1):
            if 2 * number > bad:  # the files are sound, the installation is not
                what = f"{number} {tried} need a package that is not installed"
                return f"{what} ({where}): {command}"
        limit = f"more than max_bad_share={self.max_share} allows ({where})"
        last = f"the last is {shown_name(source.path(index))}, which {reason}"
        share = f"({bad / seen:.1%}) cannot be used"
        return (
            f"{bad} {tried} {share}, {limit}; {last}. Mend or remove them, or raise max_bad_share"
        )

    def _write(self, name: str, reason: str) -> None:
        if self.path is None or name in self._listed:
            return
        self._listed.add(name)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"{name}\t{reason}\n")
        except OSError as error:  # a list is not worth a run
            told = "%s could not be written (%s): %s is not in it"
            _log.warning(told, self.path, error.strerror, name)

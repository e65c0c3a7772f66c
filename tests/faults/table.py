"""One table of all campaigns, for the terminal and for the documentation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from spread import Outcome

SHOWN = 60  # faults that are printed


@dataclass(frozen=True)
class Row:
    """``wrong``: how many of the ``tried`` did what they may not; ``faults``: in words, equal ones
    together.
    """

    name: str
    tried: int
    wrong: int
    faults: list[str] = field(default_factory=list)
    left: int = 0
    remark: str = ""

    @property
    def notes(self) -> str:
        """The remark, and what time did not allow."""
        return "; ".join(
            filter(None, (self.remark, f"{self.left:,} not reached in time" if self.left else ""))
        )


def row(name: str, outcome: Outcome) -> Row:
    """A group's outcome as a row."""
    return Row(
        name, outcome.tried, len(outcome.faults), outcome.faults, outcome.left, outcome.remark
    )


def _total(rows: Sequence[Row]) -> Row:
    return Row(
        "all", sum(r.tried for r in rows), sum(r.wrong for r in rows), [], sum(r.left for r in rows)
    )


def as_text(rows: Sequence[Row], faults: Sequence[str], sizes: Any, seconds: float) -> str:
    """For a terminal: the table, and below it every fault in a line."""
    width = max(len(r.name) for r in rows) + 2
    lines = [f"{'':<{width}}{'tried':>8}{'survived':>10}{'faults':>8}"]
    lines += [
        f"{each.name:<{width}}{each.tried:>8,}{each.tried - each.wrong:>10,}{each.wrong:>8,}  {each.notes}".rstrip()
        for each in (*rows, _total(rows))
    ]
    lines += [
        "",
        f"seed {sizes.seed}, {seconds / 60:.1f} minutes on {len(os.sched_getaffinity(0))} cores",
    ]
    lines += [f"  {fault}" for fault in faults[:SHOWN]]
    if len(faults) > SHOWN:
        lines.append(f"  and {len(faults) - SHOWN} more kinds")
    return "\n".join(lines)


def as_markdown(rows: Sequence[Row], sizes: Any, seconds: float) -> str:
    """For docs/faults.md."""
    words = f"make faults MUTANTS={sizes.mutants} KILLS={sizes.kills} SEED={sizes.seed} MINUTES={sizes.minutes:g}"
    lines = [
        f"`{words}`, {len(os.sched_getaffinity(0))} cores, {seconds / 60:.0f} minutes, "
        f"{datetime.now(UTC):%Y-%m-%d}:",
        "",
        "| | tried | survived | faults | |",
        "|---|---:|---:|---:|---|",
    ]
    lines += [
        f"| {each.name} | {each.tried:,} | {each.tried - each.wrong:,} | {each.wrong:,} | "
        f"{each.notes} |"
        for each in (*rows, _total(rows))
    ]
    return "\n".join(lines) + "\n"

"""A process that is slower than the others is named, and what it is slow at."""

from __future__ import annotations

from typing import Any

from patchmine.train.log import Interval
from patchmine.train.slowest import Slowest


class Together:
    """Stands for an engine with these intervals of its processes."""

    def __init__(self, *every: Interval) -> None:
        self.every, self.world_size = list(every), len(every)

    def gather(self, own: Interval) -> list[Interval]:
        return self.every


def compared(slowest: Slowest, *every: Interval) -> tuple[dict[str, Any], list[str]]:
    said = list[str]()
    found = slowest.of(every[0], Together(*every), said.append)  # type: ignore[arg-type]
    return found, said


QUICK = Interval(steps=10, seconds=8.0, waited=0.4, computed=1.6)


def test_a_process_that_waits_for_data_is_named_once() -> None:
    slowest, late = Slowest(), Interval(10, 8.0, 5.0, 1.6)
    found, said = compared(slowest, QUICK, QUICK, late, QUICK)
    assert found == {
        "slowest_rank": 2,
        "slowest_over_others": 3.3,
        "data_wait_by_rank": [0.05, 0.05, 0.625, 0.05],
    }
    assert len(said) == 1
    assert "rank 2 takes 3.3 times as long" in said[0]
    assert "reading its data" in said[0]
    assert compared(slowest, QUICK, QUICK, late, QUICK)[1] == []


def test_a_slow_processor_is_told_from_slow_data() -> None:
    _, said = compared(Slowest(), Interval(10, 8.0, 0.4, 6.0), QUICK)
    assert "rank 0" in said[0]
    assert "computing" in said[0]


def test_equal_processes_and_one_alone_are_not_complained_of() -> None:
    found, said = compared(Slowest(), QUICK, QUICK._replace(computed=1.8))
    assert found["slowest_rank"] == 1
    assert said == []
    assert compared(Slowest(), QUICK) == ({}, [])

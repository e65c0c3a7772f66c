"""Which of the processes of a run the others wait for."""

from __future__ import annotations

from statistics import median
from typing import Any

from patchmine.errors import Say
from patchmine.train.engine import Engine
from patchmine.train.log import Interval

_BEHIND = 1.5  # times as long as the others take: worth a sentence


class Slowest:
    """Compares what the processes of a run take for their own part of a step: the wait for data and
    the losses.  In the rest of it they may wait for each other, so that it is as long for all.
    """

    def __init__(self) -> None:
        self._told = False

    def of(self, spent: Interval, engine: Engine, say: Say) -> dict[str, Any]:
        """For a line of the log; to be called in all processes.

        Returns:
            ``slowest_rank``, ``slowest_over_others`` (times as long as the median of the others
            takes), and ``data_wait_by_rank``, shares of the interval; nothing where one is alone.
        """
        if engine.world_size == 1:
            return {}
        every = engine.gather(spent)
        own = [each.waited + each.computed for each in every]
        rank = own.index(max(own))
        ratio = own[rank] / max(median([*own[:rank], *own[rank + 1 :]]), 1e-9)
        waits = [round(each.waited / each.seconds, 4) for each in every]
        if ratio > _BEHIND and not self._told:
            self._told = True
            cause = "reading its data" if every[rank].waited > own[rank] / 2 else "computing"
            say(
                f"rank {rank} takes {ratio:.1f} times as long as the others for its own part, "
                f"mostly {cause}, and they wait for it: slowest_rank and data_wait_by_rank in "
                "metrics.jsonl say whether it stays so"
            )
        return {
            "slowest_rank": rank,
            "slowest_over_others": round(ratio, 3),
            "data_wait_by_rank": waits,
        }

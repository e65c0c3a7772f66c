"""Where the processes of a run meet: each signs in under its rank, and who is missing is said by
name.

torch's own rendezvous waits half an hour and does not say for whom.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from patchmine.errors import Say, UserError, reason_of
from patchmine.train.launch import Launch

WAIT_SETTING = "PATCHMINE_JOIN_TIMEOUT"
WAIT_SECONDS = 60.0
_FIRST_WORD_SECONDS = 5.0
_OWN_FACTOR = (
    4  # for processes that we started ourselves: they are watched, and busy importing torch
)
_LOOK_SECONDS = 0.2


def wait_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """How long processes wait for each other at the start, in seconds."""
    text = environment.get(WAIT_SETTING, "")
    if not text:
        return WAIT_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(
            f"{WAIT_SETTING}={text} must be a number of seconds above 0, as in {WAIT_SETTING}=300"
        )
    return seconds


class Meeting:
    """The store of a run, shared by its processes, and the time they have to reach it.

    Args:
        launch: this process; with ``port`` 0 a free one is taken.
        seconds: after which a missing process ends the others.
        say: hears for whom we wait.
        lives: raises UserError when a process that we started has ended.
    """

    def __init__(self, launch: Launch, seconds: float, say: Say) -> None:
        own = (
            _OWN_FACTOR
            if launch.by == "patchmine" and launch.world_size == launch.local_size
            else 1
        )
        self.launch, self.seconds, self._say = launch, seconds * own, say
        self._quiet = _FIRST_WORD_SECONDS * own
        self._began = time.monotonic()
        self._spoke = False
        if launch.rank == 0 and not launch.agent:
            server = _listen(launch, self.seconds)
            self.port = server.port
        else:
            server = self._reach()
            self.port = launch.port
        self._server = server
        self.store = PrefixStore(f"patchmine/{launch.attempt}", server)

    def sign_in(
        self, facts: Mapping[str, Any], lives: Callable[[], None] = lambda: None
    ) -> list[dict[str, Any]]:
        """Leave ``facts`` under this rank and wait for everyone's, by rank.

        Raises:
            UserError: naming the ranks that did not come in time, or two processes that took one
            place.
        """
        own = json.dumps(
            {
                "host": socket.gethostname(),
                "process": os.getpid(),
                "local_rank": self.launch.local_rank,
            }
            | dict(facts)
        )
        keys = [f"rank/{rank}" for rank in range(self.launch.world_size)]
        try:
            held = self.store.compare_set(keys[self.launch.rank], "", own).decode()
            if held != own:
                raise UserError(self._taken(json.loads(held)))
            while not self.store.check(keys):
                lives()
                self._wait(partial(self._missing, keys))
            everyone = [json.loads(text) for text in self.store.multi_get(keys)]
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the process of rank 0 at {self._place()} went away while processes met "
                f"({reason_of(error)}): see what it said"
            ) from error
        _refuse_doubles(everyone)
        return everyone

    def _reach(self) -> TCPStore:
        """Connect to the process of rank 0, which may be starting still."""
        while True:
            try:
                # A plain connection first: torch's would fill the terminal while nobody listens.
                with socket.create_connection(
                    (self.launch.address, self.launch.port), timeout=self._left()
                ):
                    pass
                return TCPStore(
                    self.launch.address,
                    self.launch.port,
                    is_master=False,
                    timeout=timedelta(seconds=self._left()),
                )
            except (OSError, RuntimeError) as error:
                self._wait(partial("rank 0 at {} ({})".format, self._place(), reason_of(error)))

    def _left(self) -> float:
        return max(1.0, self.seconds - (time.monotonic() - self._began))

    def _wait(self, missing: Callable[[], str]) -> None:
        """A short pause; says after some seconds who is ``missing``, and raises when the time is
        over.
        """
        waited = time.monotonic() - self._began
        if waited > self.seconds:
            raise UserError(
                f"{missing()} of {self.launch.world_size} did not come within {self.seconds:g} "
                f"seconds: see what they said, that every machine can reach {self._place()}, or "
                f"set {WAIT_SETTING} to more seconds"
            )
        if waited > self._quiet and not self._spoke:
            self._spoke = True
            self._say(
                f"waiting for {missing()} of {self.launch.world_size}, {self.seconds:g} seconds "
                "at most ..."
            )
        time.sleep(_LOOK_SECONDS)

    def _missing(self, keys: list[str]) -> str:
        absent = [str(rank) for rank, key in enumerate(keys) if not self.store.check([key])]
        return f"{'rank' if len(absent) == 1 else 'ranks'} {', '.join(absent)}"

    def _taken(self, other: dict[str, Any]) -> str:
        return (
            f"rank {self.launch.rank} was taken already, by process {other['process']} on "
            f"{other['host']}: either RANK is set alike for two processes, or two runs meet at "
            f"{self._place()}, so that one needs another MASTER_PORT"
        )

    def _place(self) -> str:
        return f"{self.launch.address}:{self.launch.port}"


def _listen(launch: Launch, seconds: float) -> TCPStore:
    try:
        return TCPStore(
            launch.address,
            launch.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(1.0, seconds)),
        )
    except (RuntimeError, ValueError, OverflowError) as error:
        raise UserError(
            f"port {launch.port} of this machine cannot be listened at ({reason_of(error)}): "
            "another run may use it; set MASTER_PORT to a free port, the same for all processes"
        ) from error


def _refuse_doubles(everyone: list[dict[str, Any]]) -> None:
    """Raise UserError for two processes in one place, which would compute on one GPU."""
    places: dict[tuple[str, int], int] = {}
    for rank, facts in enumerate(everyone):
        first = places.setdefault((facts["host"], facts["local_rank"]), rank)
        if first != rank:
            raise UserError(
                f"ranks {first} and {rank} are both LOCAL_RANK {facts['local_rank']} on "
                f"{facts['host']}: number the processes of a machine from 0 in LOCAL_RANK"
            )

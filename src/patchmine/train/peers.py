"""Knowing within seconds that another process of the run has ended, and why.

Every process keeps a connection to the first one.  The system closes it when a process ends,
however it does, and when its machine no longer answers.  A process that ends on purpose says its
sentence before.  So nothing depends on how long a step, a checkpoint or a look at the data takes,
as it would with a limit on collectives, and a process that is stuck in one (NCCL's never return) is
ended.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from patchmine.errors import UserError, reason_of
from patchmine.train.launch import Launch

USER_ERROR = 2  # exit code, as of the command line
GRACE_SECONDS = 5.0  # between the news that a process ended and the end of one that is stuck


class EndedElsewhereError(SystemExit):
    """Another process says, or said, why the run ended; this one ends with the same code and says
    nothing.
    """


@dataclass(frozen=True)
class Lost:
    """A process that ended.  ``sentence``: why, where it said so."""

    rank: int
    host: str
    sentence: str | None

    def tell(self, advice: str) -> str:
        """For the user."""
        who = f"rank {self.rank} on {self.host}"
        if self.sentence is not None:
            return f"{who}: {self.sentence}"
        return (
            f"{who} ended without a word (killed, out of memory, or its machine is gone); {advice}"
        )


class Door:
    """Where the first process waits for the others' connections, opened before they know."""

    def __init__(self) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self.socket = socket.create_server(
            ("", 0), family=family, dualstack_ipv6=dual, backlog=1024
        )
        self.token = secrets.token_hex(8)

    @property
    def facts(self) -> dict[str, Any]:
        """What a process needs to connect."""
        return {"door": self.socket.getsockname()[1], "token": self.token}


class Peers:
    """The other processes of a run, as seen from this one.

    ``advice`` follows the news of a process that ended without a word.  While `busy` is held
    nothing ends this process.
    """

    def __init__(
        self, launch: Launch, everyone: list[dict[str, Any]], door: Door | None, seconds: float
    ) -> None:
        self.launch = launch
        self.advice = "start the run again"
        self.busy = threading.Lock()
        self._hosts = [facts["host"] for facts in everyone]
        self._lost: Lost | None = None
        self._news = threading.Event()
        self._ending = False
        self._sockets = (
            _accept(door, everyone, seconds)
            if door is not None
            else _connect(launch, everyone[0], seconds)
        )
        if hasattr(os, "register_at_fork"):
            # A forked data worker would keep the connection open beyond the end of its parent.
            os.register_at_fork(after_in_child=self._close)
        for rank, connection in self._sockets.items():
            threading.Thread(
                target=self._listen, args=(rank, connection), daemon=True, name=f"rank {rank}"
            ).start()

    def lost(self, seconds: float = 0.0) -> Lost | None:
        """The first process that is known to have ended, after waiting for such news for at most
        ``seconds``.
        """
        return self._lost if self._news.wait(seconds) else None

    def leave(self, sentence: str | None = None) -> None:
        """Say that this process ends: in order, or for the reason that ``sentence`` gives."""
        self._ending = True
        self._tell({"rank": self.launch.rank, "sentence": sentence})

    def close(self) -> None:
        """Say that this process ends in order, if it has said nothing yet, and close the
        connections.
        """
        if not self._ending:
            self.leave()
        for connection in self._sockets.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def ending(self, error: BaseException) -> BaseException:
        """What to raise in the place of ``error``, after the others were told: one process on each
        machine speaks.
        """
        mistake = isinstance(error, UserError)
        torn = isinstance(
            error, RuntimeError | OSError
        )  # a collective without one of its processes may raise this
        lost = self.lost(GRACE_SECONDS if torn else 0.0)
        self.leave(None if lost is not None else _reason(error))
        if isinstance(error, SystemExit):
            return error
        if lost is not None and not mistake:
            error = UserError(lost.tell(self.advice))
        elif not mistake and not isinstance(error, KeyboardInterrupt):
            return error  # a mistake of ours: with its traceback, wherever it happened
        if self._speaks(lost):
            return error
        return EndedElsewhereError(USER_ERROR if isinstance(error, UserError) else 130)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Around the writing of files that must not be cut off."""
        with self.busy:
            yield

    def _speaks(self, lost: Lost | None) -> bool:
        speaker_is_gone = (
            lost is not None and lost.rank == self.launch.rank - self.launch.local_rank
        )
        return self.launch.speaks or (
            speaker_is_gone and lost is not None and lost.sentence is None
        )

    def _listen(self, rank: int, connection: socket.socket) -> None:
        with suppress(OSError, ValueError), connection.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                news = json.loads(line)
                if news["sentence"] is None and not news.get("torn"):
                    return  # it ended in order
                self._note(Lost(news["rank"], self._hosts[news["rank"]], news["sentence"]))
                return
        self._note(Lost(rank, self._hosts[rank], None))

    def _note(self, lost: Lost) -> None:
        if self._lost is not None or self._ending:
            return
        self._lost = lost
        if self.launch.rank == 0:  # before this process can leave by itself
            self._tell({"rank": lost.rank, "sentence": lost.sentence, "torn": True})
        self._news.set()
        timer = threading.Timer(GRACE_SECONDS, self._end)
        timer.daemon = True
        timer.start()

    def _end(self) -> None:
        """End a process that did not end by itself after another one did."""
        with self.busy:
            if self._ending or self._lost is None:
                return
            if self._speaks(self._lost):
                sys.stderr.write(self._lost.tell(self.advice) + "\n")
                sys.stderr.flush()
            os._exit(USER_ERROR)

    def _tell(self, news: dict[str, Any]) -> None:
        line = json.dumps(news).encode() + b"\n"
        for connection in self._sockets.values():
            with suppress(OSError):
                connection.sendall(line)

    def _close(self) -> None:
        for connection in self._sockets.values():
            os.close(connection.detach())


def _reason(error: BaseException) -> str | None:
    if isinstance(error, SystemExit):
        return None
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"failed ({type(error).__name__}: {reason_of(error)}); its own output says where"


def _accept(door: Door, everyone: list[dict[str, Any]], seconds: float) -> dict[int, socket.socket]:
    """The others' connections, by rank.  A stranger's, without the token, is closed."""
    found: dict[int, socket.socket] = {}
    door.socket.settimeout(seconds)
    while len(found) < len(everyone) - 1:
        try:
            connection, _ = door.socket.accept()
        except OSError as error:
            missing = [str(rank) for rank in range(1, len(everyone)) if rank not in found]
            raise UserError(
                f"ranks {', '.join(missing)} signed in, but did not reach port "
                f"{door.facts['door']} of this machine within {seconds:g} seconds: open the ports "
                "between the machines of a run"
            ) from error
        connection.settimeout(seconds)
        rank = _greeting(connection, door.token)
        if rank is None:
            connection.close()
            continue
        found[rank] = _watched(connection)
    door.socket.close()
    return found


def _greeting(connection: socket.socket, token: str) -> int | None:
    with suppress(OSError, ValueError):
        given, _, rank = connection.recv(64, socket.MSG_WAITALL).decode().strip().partition(" ")
        return int(rank) if given == token else None
    return None


def _connect(launch: Launch, first: dict[str, Any], seconds: float) -> dict[int, socket.socket]:
    try:
        connection = socket.create_connection((launch.address, first["door"]), timeout=seconds)
        connection.sendall(f"{first['token']} {launch.rank}".ljust(64).encode())
    except OSError as error:
        raise UserError(
            f"port {first['door']} of {launch.address}, where rank 0 is, cannot be reached "
            f"({reason_of(error)}): open the ports between the machines of a run"
        ) from error
    return {0: _watched(connection)}


def _watched(connection: socket.socket) -> socket.socket:
    """A connection that also ends when the other machine has not answered for half a minute."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection

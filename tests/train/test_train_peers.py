"""A process that ends tells the others, or the system does.  Connections within one process stand
for several.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from patchmine.errors import UserError
from patchmine.train import peers as module
from patchmine.train.launch import Launch
from patchmine.train.peers import Door, EndedElsewhereError, Peers
from patchmine.train.signals import Interrupted

HOSTS = ("a", "a", "b", "b")  # local ranks 0, 1, 0, 1


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Codes with which a stuck process was ended."""
    found: list[int] = []
    monkeypatch.setattr(module.os, "_exit", found.append)
    return found


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch, exits: list[int]) -> Iterator[list[Peers]]:  # noqa: ARG001 - nobody exits here
    monkeypatch.setattr(module, "GRACE_SECONDS", 30.0)
    monkeypatch.setattr(module.os, "register_at_fork", lambda **functions: None)
    door = Door()
    everyone: list[dict[str, Any]] = [{"host": host} for host in HOSTS]
    everyone[0] |= door.facts
    launches = [Launch(rank=rank, world_size=4, local_rank=rank % 2) for rank in range(4)]
    with (
        socket.create_connection(("127.0.0.1", door.facts["door"])) as stranger,
        ThreadPoolExecutor() as pool,
    ):
        stranger.sendall(b"GET / HTTP/1.1".ljust(64))
        others = [pool.submit(Peers, launch, everyone, None, 10.0) for launch in launches[1:]]
        made = [Peers(launches[0], everyone, door, 10.0), *(other.result() for other in others)]
    yield made
    for each in made:
        each.close()


def die(peers: Peers) -> None:
    """As the system closes what a killed process held; the process itself does nothing any more."""
    peers._ending = True
    for connection in peers._sockets.values():
        connection.shutdown(socket.SHUT_RDWR)


def test_a_killed_process_is_named_everywhere(four: list[Peers], exits: list[int]) -> None:
    four[0].advice = four[2].advice = "go on with `patchmine resume r`"
    die(four[3])
    for peers in four[:3]:
        lost = peers.lost(5.0)
        assert lost is not None
        assert (lost.rank, lost.host, lost.sentence) == (3, "b", None)
    torn = RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    said = [peers.ending(torn) for peers in four[:3]]
    for error in (said[0], said[2]):  # one on each machine
        assert isinstance(error, UserError)
        assert str(error) == (
            "rank 3 on b ended without a word (killed, out of memory, or its machine is gone); "
            "go on with `patchmine"
            " resume r`"
        )
    assert isinstance(said[1], EndedElsewhereError)
    assert said[1].code == 2
    assert not exits


def test_the_first_process_may_be_the_killed_one(four: list[Peers]) -> None:
    die(four[0])
    said = [peers.ending(RuntimeError("Connection reset")) for peers in four[1:]]
    assert [isinstance(error, UserError) for error in said] == [
        True,
        True,
        False,
    ]  # rank 1 speaks for its machine
    assert "rank 0 on a ended without a word" in str(said[0])


def test_a_mistake_of_one_process_is_the_sentence_of_all(four: list[Peers]) -> None:
    mistake = UserError("data=photos does not exist")
    assert isinstance(four[1].ending(mistake), EndedElsewhereError)
    lost = four[0].lost(5.0)
    assert lost is not None
    said = four[0].ending(RuntimeError("Connection closed by peer"))
    assert str(said) == "rank 1 on a: data=photos does not exist"
    assert str(four[2].ending(RuntimeError("Connection closed by peer"))) == str(said)


def test_a_mistake_of_all_processes_is_said_once_on_each_machine(four: list[Peers]) -> None:
    said = [peers.ending(UserError("data=photos does not exist")) for peers in four]
    assert [isinstance(error, UserError) for error in said] == [True, False, True, False]
    assert {str(said[0]), str(said[2])} == {"data=photos does not exist"}


def test_an_error_of_ours_keeps_its_traceback_and_is_told(four: list[Peers]) -> None:
    error = ValueError("no such key")
    assert four[2].ending(error) is error
    said = four[0].ending(RuntimeError("Connection closed by peer"))
    assert "rank 2 on b: failed (ValueError: no such key); its own output says where" in str(said)


def test_processes_that_were_asked_to_stop_do_so_in_order(
    four: list[Peers], exits: list[int]
) -> None:
    for peers in reversed(four):
        stop = Interrupted(15, 7, is_main=peers.launch.rank == 0)
        assert peers.ending(stop) is stop
    assert all(peers.lost(0.05) is None for peers in four)
    assert not exits


def test_a_process_that_is_stuck_is_ended(
    four: list[Peers],
    exits: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.05)
    with four[0].busy:  # a checkpoint is being written
        die(four[1])
        four[0].lost(5.0)
        assert four[2].lost(5.0) is not None
        while len(exits) < 2:  # ranks 2 and 3, of which nobody hears any more
            module.threading.Event().wait(0.01)
    while len(exits) < 3:
        module.threading.Event().wait(0.01)
    assert exits == [2, 2, 2]
    assert (
        capsys.readouterr().err.count("rank 1 on a ended without a word") == 2
    )  # one on each machine

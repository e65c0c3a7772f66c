"""Processes meet, or the ones that are missing are named in bounded time.  Threads stand for
processes here.
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from patchmine.errors import UserError
from patchmine.train import rendezvous
from patchmine.train.launch import Launch
from patchmine.train.rendezvous import Meeting, wait_seconds


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_FIRST_WORD_SECONDS", 0.05)
    monkeypatch.setattr(rendezvous, "_LOOK_SECONDS", 0.02)


def silent(text: str) -> None:
    pass


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def launch(rank: int, world_size: int, port: int, **more: int) -> Launch:
    return Launch(
        by="test",
        rank=rank,
        world_size=world_size,
        local_rank=more.get("local_rank", rank),
        port=port,
    )


def test_everyone_learns_of_everyone() -> None:
    first = Meeting(Launch(world_size=2), 20.0, silent)
    with ThreadPoolExecutor() as pool:
        other = pool.submit(
            lambda: Meeting(launch(1, 2, first.port), 20.0, silent).sign_in({"door": 1})
        )
        mine = first.sign_in({"door": 0})
        assert mine == other.result()
    assert [facts["door"] for facts in mine] == [0, 1]
    assert mine[0]["host"] == socket.gethostname()


def test_missing_ranks_are_said_and_then_named() -> None:
    said: list[str] = []
    first = Meeting(launch(0, 4, 0), 0.4, said.append)
    with ThreadPoolExecutor() as pool:
        other = pool.submit(lambda: Meeting(launch(2, 4, first.port), 0.4, silent).sign_in({}))
        with pytest.raises(
            UserError,
            match=r"ranks 1, 3 of 4 did not come within 0.4 seconds: .*PATCHMINE_JOIN_TIMEOUT",
        ):
            first.sign_in({})
        with pytest.raises(UserError, match=r"ranks 1, 3 of 4 did not come"):
            other.result()
    assert len(said) == 1  # once
    assert said[0].startswith("waiting for rank")
    assert "0.4 seconds at most" in said[0]


def test_the_first_process_may_be_the_missing_one() -> None:
    said: list[str] = []
    port = free_port()
    with pytest.raises(
        UserError, match=rf"rank 0 at 127.0.0.1:{port} \(.*\) of 2 did not come within 0.3 seconds"
    ):
        Meeting(launch(1, 2, port), 0.3, said.append)
    assert len(said) == 1


def test_a_first_process_that_starts_late_is_waited_for() -> None:
    port = free_port()
    with ThreadPoolExecutor() as pool:
        other = pool.submit(lambda: Meeting(launch(1, 2, port), 20.0, silent).sign_in({}))
        assert not other.done()
        first = Meeting(
            launch(0, 2, port), 20.0, silent
        )  # whose store serves the other until it has read all
        assert first.sign_in({}) == other.result()


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"port {port} of this machine .*set MASTER_PORT to a free port"
        ):
            Meeting(launch(0, 2, port), 5.0, silent)


def test_two_processes_of_one_rank_are_refused() -> None:
    first = Meeting(Launch(world_size=2), 20.0, silent)
    first.store.set("rank/1", '{"host": "node7", "process": 99, "local_rank": 0}')
    second = Meeting(launch(1, 2, first.port), 20.0, silent)
    with pytest.raises(
        UserError, match=r"rank 1 was taken already, by process 99 on node7.*another MASTER_PORT"
    ):
        second.sign_in({})


def test_two_processes_in_one_place_are_refused() -> None:
    first = Meeting(Launch(world_size=2), 20.0, silent)
    with ThreadPoolExecutor() as pool:
        second = Meeting(launch(1, 2, first.port, local_rank=0), 20.0, silent)
        other = pool.submit(second.sign_in, {})
        for sign_in in (lambda: first.sign_in({}), other.result):
            with pytest.raises(UserError, match="ranks 0 and 1 are both LOCAL_RANK 0 on"):
                sign_in()


def test_a_process_that_ends_before_it_begins_is_not_waited_for() -> None:
    def lives() -> None:
        raise UserError("it ended")

    with pytest.raises(UserError, match="it ended"):
        Meeting(Launch(world_size=2), 60.0, silent).sign_in({}, lives)


def test_how_long_processes_wait_is_set_in_the_environment() -> None:
    assert wait_seconds({}) == 60.0
    assert wait_seconds({"PATCHMINE_JOIN_TIMEOUT": "300"}) == 300.0
    for text in ("0", "-1", "soon", "nan", "inf"):
        with pytest.raises(
            UserError, match=f"PATCHMINE_JOIN_TIMEOUT={text} must be a number of seconds"
        ):
            wait_seconds({"PATCHMINE_JOIN_TIMEOUT": text})

"""Shards and Parquet on a local S3 server: the same data as on a disk, and what goes wrong."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from loading import seen, start

from object_server import CUT, FORBIDDEN, SLOW_DOWN, ObjectServer, object_server
from patchmine.data.sharding import write_shards
from patchmine.data.sources import remote
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import open_source
from patchmine.data.views.images import TrainView
from patchmine.errors import UserError

FIRST = "set/shard-000000.tar"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    """A server, small blocks, no waiting, and a cache folder of the test's own."""
    monkeypatch.setattr(remote, "BLOCK", 8192)
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with object_server(monkeypatch) as made:
        yield made


@pytest.fixture
def local(served: ObjectServer, image_folder: Path, tmp_path: Path) -> Path:
    """Shards of 36 images in three classes, which lie on the server as well."""
    write_shards(open_source(image_folder), tmp_path / "shards", shard_size=30_000)
    for file in (tmp_path / "shards").iterdir():
        served.put(f"set/{file.name}", file.read_bytes())
    return tmp_path / "shards"


def contents(source: Source) -> list[Any]:
    return [source.read(index) for index in range(len(source))]


def unkept() -> Source:
    """The shards, of which nothing is kept but their index."""
    return open_source("s3://bucket/set", remote_gb=0)


def kept(tmp_path: Path) -> list[Path]:
    return [file for file in (tmp_path / "cache/patchmine/remote").glob("*/*") if file.is_file()]


def test_shards_are_those_of_the_disk_by_folder_and_by_pattern(local: Path) -> None:
    here, last = open_source(local), len(list(local.iterdir())) - 1
    assert last > 1
    ranged = f"s3://bucket/set/shard-{{000000..{last:06d}}}.tar"
    for name in ("s3://bucket/set", "s3://bucket", "s3://bucket/set/*.tar", ranged):
        there = open_source(name)
        assert contents(there) == contents(here), name
        assert there.fingerprint == here.fingerprint
        labels, expected = there.labels(), here.labels()
        assert labels is not None
        assert expected is not None
        assert labels.ids.tolist() == expected.ids.tolist()


def test_parquet_is_that_of_the_disk(served: ObjectServer, local: Path, tmp_path: Path) -> None:
    images = contents(open_source(local))
    table = pa.table({"image": [{"bytes": image} for image in images], "label": range(36)})
    pq.write_table(table, tmp_path / "train-0.parquet", row_group_size=5)
    served.put("rows/train-0.parquet", (tmp_path / "train-0.parquet").read_bytes())
    for name in ("s3://bucket/rows", "s3://bucket/rows/train-*.parquet::image,label"):
        there = open_source(name)
        assert contents(there) == images
        assert there.fingerprint == open_source(tmp_path / "train-0.parquet").fingerprint


def test_order_and_resume_are_those_of_the_disk(served: ObjectServer, local: Path) -> None:
    view = TrainView(seen(16), 4)
    expected = list(start(open_source(local), view))
    there = open_source("s3://bucket/set")
    for first_step, workers in ((0, 2), (3, 0), (5, 1)):
        batches = start(there, view, workers=workers, start_step=first_step)
        for one, other in zip(batches, expected[first_step:], strict=True):
            assert torch.equal(one.views[0], other.views[0])
            assert torch.equal(one.index, other.index)
    served.asked.clear()
    assert contents(open_source("s3://bucket/set")) == contents(open_source(local))
    assert served.asked == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s3://none/set", "there is nothing at this address; give tar shards or Parquet"),
        ("s3://none/x-0.tar", r"there is nothing at s3://none/x-0\.tar"),
        ("s3://none/*.tar", "nothing there has such a name"),
        ("s3://bucket/set/x-{0..2}.tar", r"there is nothing at s3://bucket/set/x-0\.tar"),
        ("s3://bucket/else", "there is nothing at this address"),
        ("s3://bucket/other", "there are none of them in this folder"),
    ],
)
def test_what_is_missing_is_told(served: ObjectServer, name: str, message: str) -> None:
    served.put("other/x.jpg", b"x")
    with pytest.raises(UserError, match=message):
        open_source(name)


@pytest.mark.usefixtures("local")
def test_credentials_that_are_missing_or_refused_are_told_at_once(
    served: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    source = unkept()
    served.faults[:] = [FORBIDDEN]
    with pytest.raises(UserError, match=r"000000\.tar cannot be opened .*; credentials and"):
        source.read(0)
    assert served.faults == []
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(remote, "WAITS", (600.0,))  # which would run into the limit of time
    for name in ("s3://bucket/set", "s3://bucket/set/*.tar", f"s3://bucket/{FIRST}"):
        with pytest.raises(UserError, match=r"cannot be opened \(Unable to locate credentials\)"):
            open_source(name)


@pytest.mark.parametrize(("fault", "why"), [(CUT, "received"), (SLOW_DOWN, "Reduce it")])
def test_a_lost_connection_and_a_throttled_answer_are_tried_again_then_told(
    served: ObjectServer, local: Path, fault: tuple[str, bytes], why: str
) -> None:
    source, images = unkept(), contents(open_source(local))
    served.asked.clear()
    served.faults[:] = [fault, fault]
    assert source.read(0) == images[0]
    assert served.asked == [FIRST] * 3
    served.faults[:] = [fault] * 100
    once = r"s3://bucket/set/shard-000000\.tar cannot be read \(3 tries within \d+ seconds failed"
    with pytest.raises(UserError, match=rf"{once}, the last with: .*{why}.*; see to the connec"):
        source.read(0)
    with pytest.raises(UserError, match=r"^s3://bucket/set/shard-\d+\.tar cannot be read \(3 t"):
        next(start(source, TrainView(seen(16), 4), workers=1))
    served.faults.clear()
    assert contents(source) == images


@pytest.mark.usefixtures("local")
def test_a_store_that_answers_nothing_is_told_when_it_is_opened(served: ObjectServer) -> None:
    served.down = True
    for name in ("s3://bucket/set", "s3://bucket/set/*.tar", f"s3://bucket/{FIRST}"):
        with pytest.raises(UserError, match=r"^s3://bucket/set\S* cannot be read \(3 tries"):
            open_source(name)


def test_an_object_that_is_replaced_or_vanishes_ends_a_run_in_a_sentence(
    served: ObjectServer, local: Path
) -> None:
    source, view = unkept(), TrainView(seen(16), 4)
    data = (local / "shard-000000.tar").read_bytes()
    for other, how in ((data[:-1] + b"x", "same size"), (data + b"x", "it had [0-9,]+ bytes")):
        served.put(FIRST, other)
        for workers in (0, 1):
            with pytest.raises(UserError, match=rf"^s3://bucket/{FIRST} was changed .*{how}"):
                list(start(source, view, workers=workers))
        assert contents(open_source("s3://bucket/set")) == contents(open_source(local))
    served.client.delete_object(Bucket="bucket", Key=FIRST)
    with pytest.raises(UserError, match=rf"^s3://bucket/{FIRST} is gone: .*put it back"):
        list(start(source, view))
    served.put(FIRST, data)
    assert contents(source) == contents(open_source(local))


def forked(work: Callable[[], None]) -> Any:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_a_process_killed_while_it_keeps_a_block_leaves_nothing_that_is_read(
    served: ObjectServer, local: Path, tmp_path: Path
) -> None:
    def killed() -> None:
        number, replace, alone = [0], Path.replace, threading.Lock()

        def third_dies(self: Path, target: Path) -> Path:
            with alone:  # blocks are fetched in threads: none is kept behind the third
                number[0] += 1
                if number[0] == 3:
                    os.truncate(self, self.stat().st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                return replace(self, target)

        Path.replace = third_dies  # type: ignore[method-assign,assignment]
        contents(open_source("s3://bucket/set"))

    process = forked(killed)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [file for file in kept(tmp_path) if file.name.startswith(".")]
    assert len(kept(tmp_path)) >= 3
    served.asked.clear()
    assert contents(open_source("s3://bucket/set")) == contents(open_source(local))
    total = sum(-(-file.stat().st_size // remote.BLOCK) for file in local.iterdir())
    assert len(served.asked) == total - 2


def test_processes_share_the_cache(served: ObjectServer, local: Path, tmp_path: Path) -> None:
    images = contents(open_source(local))

    def reading(order: list[int]) -> None:
        source = open_source("s3://bucket/set")
        if [source.read(index) for index in order] != [images[index] for index in order]:
            os._exit(1)

    forwards = list(range(len(images)))
    both = [forked(lambda order=order: reading(order)) for order in (forwards, forwards[::-1])]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert not [file for file in kept(tmp_path) if file.name.startswith(".")]
    served.asked.clear()
    assert contents(open_source("s3://bucket/set")) == images
    assert served.asked == []

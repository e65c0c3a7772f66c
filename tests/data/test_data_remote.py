"""Shards and Parquet behind addresses: the same data, read again from a disk, and what goes wrong."""

from __future__ import annotations

import hashlib
import http.server
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.spec import AbstractFileSystem
from loading import seen, start

from patchmine.data.sharding import write_shards
from patchmine.data.sources import addresses, blocks, remote
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import open_source
from patchmine.data.views.images import TrainView
from patchmine.errors import UserError

BLOCK = 4096


class Store(AbstractFileSystem):  # type: ignore[misc]
    """An object store in memory that fails as it is told to: the next calls, one after another."""

    protocol = "store"
    objects: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[tuple[str, int, int]]] = []
    faults: ClassVar[list[Exception | int]] = []

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        names = sorted(name for name in self.objects if name.startswith(f"{path}/"))
        if not names and path not in self.objects:
            raise FileNotFoundError(path)
        found = [self.info(name) for name in names or [path]]
        return found if detail else [each["name"] for each in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path not in self.objects:
            if any(name.startswith(f"{path}/") for name in self.objects):
                return {"name": path, "size": 0, "type": "directory"}
            raise FileNotFoundError(path)
        data = self.objects[path]
        state = hashlib.md5(data).hexdigest()
        return {"name": path, "size": len(data), "type": "file", "ETag": state}

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        path = self._strip_protocol(path)
        self.asked.append((path, start, end))
        fault = self.faults.pop(0) if self.faults else 0
        if isinstance(fault, Exception):
            raise fault
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path][start : end - fault]


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, no waiting, and a cache folder of the test's own."""
    monkeypatch.setattr(remote, "BLOCK", BLOCK)
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Store, "faults", [])
    monkeypatch.setattr(Store, "asked", [])
    fsspec.register_implementation("store", Store, clobber=True)


@pytest.fixture
def local(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards of 36 images in three classes, which lie in the store as well."""
    write_shards(open_source(image_folder), tmp_path / "shards", shard_size=30_000)
    objects = {f"set/{file.name}": file.read_bytes() for file in (tmp_path / "shards").iterdir()}
    assert len(objects) > 2
    monkeypatch.setattr(Store, "objects", objects)
    return tmp_path / "shards"


def contents(source: Source) -> list[Any]:
    return [source.read(index) for index in range(len(source))]


def kept(tmp_path: Path) -> list[Path]:
    """The files of blocks."""
    return [file for file in (tmp_path / "cache/patchmine/remote").glob("*/*") if file.is_file()]


def test_shards_are_those_of_the_disk(local: Path) -> None:
    here, count = open_source(local), len(list(local.iterdir()))
    names = [
        "store://set",
        "store://set/",
        "store://set/*.tar",
        f"store://set/shard-{{000000..{count - 1:06d}}}.tar",
        f"file://{local}",
        f"file://{local}/*.tar",
    ]
    for name in names:
        there = open_source(name)
        assert contents(there) == contents(here), name
        assert there.fingerprint == here.fingerprint
        assert there.target_digest == here.target_digest
    there = open_source("store://set")
    assert there.path(0) == here.path(0).replace(str(local), "store://set")
    assert contents(pickle.loads(pickle.dumps(there))) == contents(here)
    jpegs = open_source("store://set/*.tar::jpg")
    assert len(jpegs) == 18


def test_parquet_is_that_of_the_disk(local: Path, tmp_path: Path) -> None:
    images = contents(open_source(local))
    table = pa.table({"image": [{"bytes": image} for image in images], "label": range(36)})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=5)
    Store.objects["parquet/a/x.parquet"] = (tmp_path / "x.parquet").read_bytes()
    here = open_source(tmp_path / "x.parquet")
    for name in ("store://parquet", "store://parquet/a/*.parquet::image,label"):
        there = open_source(name)
        assert contents(there) == images
        assert there.fingerprint == here.fingerprint
        assert there.target_digest == here.target_digest
    with pytest.raises(UserError, match="lable is no column of images"):
        open_source("store://parquet/a/x.parquet::lable")


@pytest.mark.usefixtures("local")
def test_everything_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_source("store://set")
    images = contents(first)
    total = sum(map(len, Store.objects.values()))
    assert sum(end - start for _, start, end in Store.asked) == total
    Store.asked.clear()
    monkeypatch.setattr(addresses, "index_shards", None)  # its index is kept as well
    again = open_source("store://set")
    assert contents(again) == images
    assert again.labels() is not None
    assert Store.asked == []


@pytest.mark.usefixtures("local")
def test_what_is_not_whole_is_fetched_again(tmp_path: Path) -> None:
    images = contents(open_source("store://set"))
    Store.asked.clear()
    first, second, third, *_ = files = sorted(kept(tmp_path))
    first.write_bytes(first.read_bytes()[:-1])
    data = bytearray(second.read_bytes())
    data[100] ^= 1
    second.write_bytes(data)
    third.unlink()
    (third.parent / ".0.1-1.new").write_bytes(b"left by a process that was killed")
    assert contents(open_source("store://set")) == images
    assert len(Store.asked) == 3
    assert files == sorted(file for file in kept(tmp_path) if not file.name.startswith("."))


@pytest.mark.usefixtures("local")
def test_what_has_no_room_is_read_by_its_own_bytes(tmp_path: Path) -> None:
    images = contents(open_source("store://set"))
    for file in kept(tmp_path):
        file.unlink()
    Store.asked.clear()
    limit = 20_000
    source = open_source("store://set", remote_gb=limit / 1e9)
    assert contents(source) == images
    assert 2 * BLOCK < sum(file.stat().st_size for file in kept(tmp_path)) <= limit + BLOCK
    assert source.notes[-1].endswith("has room for less: the rest is fetched in every epoch")
    assert any(end - start < BLOCK - 500 for _, start, end in Store.asked)
    nothing = open_source("store://set", remote_gb=0)
    assert contents(nothing) == images


@pytest.mark.usefixtures("local")
def test_what_nobody_used_for_a_day_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents(open_source("store://set"))
    before = {file.parent for file in kept(tmp_path)}
    Store.objects.update(
        {f"other/{name}": data + bytes(10_240) for name, data in Store.objects.items()}
    )
    size = sum(len(data) for name, data in Store.objects.items() if name.startswith("other"))
    limit = (size + 2 * BLOCK) / 1e9
    contents(open_source("store://other", remote_gb=limit))
    assert before <= {file.parent for file in kept(tmp_path)}
    monkeypatch.setattr(blocks, "UNUSED", -10.0)
    contents(open_source("store://other", remote_gb=limit))
    assert not before <= {file.parent for file in kept(tmp_path)}


@pytest.mark.usefixtures("local")
def test_a_lost_connection_is_tried_again() -> None:
    images = contents(open_source("store://set", remote_gb=0))
    Store.faults[:] = [ConnectionError("reset"), TimeoutError(), 100, OSError("no route")][:3]
    source = open_source("store://set", remote_gb=0)
    assert source.read(0) == images[0]
    Store.faults[:] = [ConnectionError("reset by peer")] * 4
    with pytest.raises(
        UserError,
        match=r"store://set/shard-000000\.tar cannot be read \(4 tries .* reset by peer\); see to the connection",
    ):
        source.read(0)
    assert source.read(0) == images[0]


def test_what_is_gone_changed_or_forbidden_ends_in_a_sentence(local: Path) -> None:
    source = open_source("store://set", remote_gb=0)
    name = "set/shard-000000.tar"
    data = Store.objects.pop(name)
    with pytest.raises(UserError, match=r"store://set/shard-000000\.tar is gone: .*put it back"):
        source.read(0)
    Store.objects[name] = data[:-1] + b"x"
    with pytest.raises(
        UserError, match=r"shard-000000\.tar was changed since .*\(same size\); put"
    ):
        source.read(0)
    Store.objects[name] = data + b"x"
    with pytest.raises(UserError, match=rf"it had {len(data):,} bytes and has {len(data) + 1:,}"):
        source.read(0)
    Store.objects[name] = data
    before = len(Store.asked)
    Store.faults[:] = [PermissionError("Forbidden")]
    with pytest.raises(UserError, match=r"cannot be opened \(Forbidden\); credentials"):
        source.read(0)
    assert len(Store.asked) == before + 1
    assert source.read(0) == open_source(local).read(0)


class HttpError(Exception):
    """An answer of HTTP as gcsfs tells it."""

    def __init__(self, code: int) -> None:
        super().__init__(f"answer {code}")
        self.code = code


class CutError(Exception):
    """An answer that ends too early as aiohttp tells it, which calls that 400."""

    code = 400


@pytest.mark.parametrize(
    ("fault", "tries"),
    [
        (OSError("Forbidden: set/shard-000000.tar"), 1),
        (HttpError(401), 1),
        (HttpError(503), 4),
        (CutError("not enough data"), 4),
    ],
)
@pytest.mark.usefixtures("local")
def test_access_that_is_refused_is_told_at_once_by_whatever_package(
    fault: Exception, tries: int
) -> None:
    source = open_source("store://set", remote_gb=0)
    Store.asked.clear()
    Store.faults[:] = [fault] * tries
    why = "cannot be opened" if tries == 1 else "cannot be read"
    with pytest.raises(UserError, match=rf"shard-000000\.tar {why} \("):
        source.read(0)
    assert len(Store.asked) == tries


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("store://nothing", "there is nothing at this address; give tar shards or Parquet"),
        ("store://set/x-{0..2}.tar", r"there is nothing at store://set/x-0\.tar"),
        ("store://set/*.parquet", "nothing there has such a name; give tar shards"),
        ("store://other", "there are none of them in this folder"),
        ("store://other/x.jpg", "this is a file of another kind"),
        ("store://other/x.tar.gz", "a packed file can only be read as a whole"),
        ("store://{set/shard-000000.tar,other/x.jpg}", r"x\.jpg is not of the kind that is meant"),
        ("nowhere://set/x.tar", r"nowhere://set/x\.tar cannot be opened \(Protocol not known"),
        ("store://set/*.tar::jgp", r"\.jgp is no ending of images"),
    ],
)
@pytest.mark.usefixtures("local")
def test_what_cannot_be_read_is_told(name: str, message: str) -> None:
    Store.objects["other/x.jpg"] = b"x"
    with pytest.raises(UserError, match=message):
        open_source(name)


def test_batches_are_those_of_the_disk_with_any_number_of_workers(local: Path) -> None:
    view = TrainView(seen(16), 4)
    expected = list(start(open_source(local), view))
    for first_step, workers in ((0, 2), (3, 0)):
        batches = start(open_source("store://set"), view, workers=workers, start_step=first_step)
        for one, other in zip(batches, expected[first_step:], strict=True):
            assert torch.equal(one.views[0], other.views[0])
            assert torch.equal(one.index, other.index)


@pytest.mark.usefixtures("local")
def test_trouble_in_a_worker_ends_the_run_in_a_sentence() -> None:
    source = open_source("store://set", remote_gb=0)
    Store.faults[:] = [ConnectionError("reset")] * 1000
    with pytest.raises(UserError, match=r"^store://set/shard-\d+\.tar cannot be read \(4 tries"):
        next(start(source, TrainView(seen(16), 4), workers=1))


class Handler(http.server.BaseHTTPRequestHandler):
    """Gives parts of the store's objects, as servers of files do."""

    faults: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        data = Store.objects.get(self.path.removeprefix("/"))
        self._answer(data, 200, b"")

    def do_GET(self) -> None:
        data = Store.objects.get(self.path.removeprefix("/"))
        first, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
        part = b"" if data is None else data[int(first) : int(last) + 1 if last else None]
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "busy":
            self.send_error(503)
        else:
            self._answer(data, 206, part, len(part) // 2 if fault == "cut" else None)

    def _answer(self, data: bytes | None, code: int, part: bytes, until: int | None = None) -> None:
        self.send_response(404 if data is None else code)
        self.send_header("Content-Length", str(len(part or data or b"")))
        self.send_header("ETag", hashlib.md5(data or b"").hexdigest())
        self.end_headers()
        self.wfile.write(part[:until])

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a server of the store's objects."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


def test_a_server_of_files(local: Path, server: str) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http:// with aiohttp")
    source = open_source(f"{server}/set/shard-{{000000..000001}}.tar")
    here = open_source(local)
    assert contents(source) == contents(here)[: len(source)]
    with pytest.raises(UserError, match=r"there is nothing at http.*shard-000009\.tar"):
        open_source(f"{server}/set/shard-000009.tar")


@pytest.mark.usefixtures("local")
def test_a_server_of_files_that_fails(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http:// with aiohttp")
    address = f"{server}/set/shard-000000.tar"
    image = open_source(address).read(0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    source = open_source(address, remote_gb=0)
    Handler.faults[:] = ["cut", "busy"]
    assert source.read(0) == image
    assert Handler.faults == []
    Handler.faults[:] = ["busy"] * 4
    with pytest.raises(UserError, match=r"cannot be read \(4 tries .*503.*see to the connection"):
        source.read(0)
    data = Store.objects.pop("set/shard-000000.tar")
    with pytest.raises(UserError, match=r"shard-000000\.tar is gone: it was there"):
        source.read(0)
    Store.objects["set/shard-000000.tar"] = data[:-1] + b"x"
    with pytest.raises(UserError, match="was changed since this source was opened"):
        source.read(0)

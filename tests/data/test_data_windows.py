"""Lists of tiles as data: their items are the tiles that would be cut, read where they lie."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import seen, start
from made_scenes import BIG, COLOURS, listed, scene, table
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from patchmine.data import tiling
from patchmine.data.decoding import windows
from patchmine.data.decoding.bounds import DecodeError
from patchmine.data.decoding.decode import decode, probe
from patchmine.data.inspect import inspect
from patchmine.data.pixelcache import PixelCache
from patchmine.data.sharding import write_shards
from patchmine.data.sources import index
from patchmine.data.sources import windows as lists
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import open_source
from patchmine.data.sources.table import Table
from patchmine.data.tiling import Cut, cut_tiles, list_tiles, open_scenes, tile_images
from patchmine.data.views.images import TrainView
from patchmine.errors import UserError


def deep() -> np.ndarray:
    """16 bits, with gaps and a black corner."""
    pixels = COLOURS.astype(np.uint16) * 100
    pixels[:, :64, :64], pixels[:, 70:, 100:], pixels[:, 10, 70] = 7, 0, 7
    return pixels


def _slide(folder: Path, **options: Any) -> None:
    pytest.importorskip("openslide")
    scene(folder / "x.tif", BIG, levels=3, photometric="RGB", **options).rename(folder / "x.svs")


def _floats(folder: Path) -> None:
    pixels = COLOURS.astype(np.float32)
    pixels[:, 5:9, 5:9] = np.nan
    scene(folder / "x.tif", pixels)


MADE: dict[str, Callable[[Path], object]] = {
    "colours": lambda folder: scene(folder / "x.tif", BIG, levels=3),
    "16 bits with gaps": lambda folder: scene(folder / "x.tif", deep(), levels=3, nodata=7),
    "floats": _floats,
    "grey": lambda folder: scene(folder / "x.tif", COLOURS[:1]),
    "four bands": lambda folder: scene(folder / "x.tif", np.concatenate([BIG, BIG[:1]])),
    "thirteen bands": lambda folder: scene(folder / "x.tif", np.tile(COLOURS, (5, 1, 1))[:13]),
    "slide": _slide,
    "png": lambda folder: Image.fromarray(COLOURS.transpose(1, 2, 0)).save(folder / "x.png"),
    "png of 16 bits": lambda folder: Image.fromarray(deep()[0]).save(folder / "x.png"),
    "npy of four bands": lambda folder: np.save(folder / "x.npy", np.tile(COLOURS, (2, 1, 1))[:4]),
}


LEVELS = [(made, 0) for made in MADE]
LEVELS += [(made, 1) for made in ("colours", "16 bits with gaps", "slide")]


@pytest.mark.parametrize(("made", "level"), LEVELS)
def test_items_are_the_tiles_that_would_be_cut(tmp_path: Path, made: str, level: int) -> None:
    (tmp_path / "in").mkdir()
    MADE[made](tmp_path / "in")
    cut = Cut(48, overlap=8, level=level)
    done = cut_tiles(open_scenes(str(tmp_path / "in")), tmp_path / "out", cut)
    tiles, items = open_source(tmp_path / "out"), open_source(listed(tmp_path, cut))
    assert len(items) == len(tiles) == done.tiles > 1
    for number in range(len(tiles)):
        tile, item = tiles.read(number), items.read(number)
        name = Path(tiles.key(number)).stem
        assert items.key(number).endswith(f"#level{level}_{name}_48x48")
        assert probe(item) == probe(tile)
        for channels in {1, 3, probe(tile)[2]}:
            try:
                expected = decode(tile, channels)
            except DecodeError as error:
                with pytest.raises(DecodeError, match=str(error).split(" where")[0]):
                    decode(item, channels)
                continue
            found = decode(item, channels)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


def test_the_list_counts_as_the_cut_does(tmp_path: Path) -> None:
    scene(tmp_path / "in/a/x.tif", deep(), nodata=7)
    scene(tmp_path / "in/b/y.tif", COLOURS)
    (tmp_path / "in/b/z.tif").write_bytes(b"II*\0 no more")
    told, steps = list[str](), list[tuple[int, int]]()
    out = tmp_path / "out" / "tiles.tsv"
    files = open_scenes(str(tmp_path / "in"))
    done = list_tiles(
        files, out, Cut(64), say=told.append, progress=lambda *step: steps.append(step)
    )
    cut = cut_tiles(files, tmp_path / "cut", Cut(64))
    assert (done.tiles, done.empty, done.failed) == (cut.tiles, cut.empty, 1)
    assert done.empty > 0
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert "z.tif is left out: it is no readable TIFF" in told[0]
    first = out.read_text().splitlines()[1].split("\t")
    assert first == [f"{tmp_path}/in/a/x.tif", *["0", "64", "0", "64", "64", "130", "100", "a"]]
    source = open_source(out)
    assert f"{done.tiles} windows of 2 images are read where they lie" in source.notes[0]
    labels = source.labels()
    assert labels is not None
    order = [*range(len(source))][::-1]
    named = tmp_path / "labels.csv"
    named.write_text("".join(["image,size\n", *(f"{source.key(i)},{i}\n" for i in order)]))
    rows = Table(named, source, None)
    assert [cells for _, cells in rows.cells([1])] == [[str(i)] for i in order]
    assert rows.items.tolist() == order
    assert (labels.names, labels.ids.tolist()) == (["a", "b"], [0] * (done.tiles - 6) + [1] * 6)


def test_a_listing_that_is_stopped_leaves_the_list_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene(tmp_path / "in/x.tif", COLOURS)
    before = listed(tmp_path, Cut(64)).read_bytes()
    calls, open_scene = 0, tiling.open_scene

    def stop(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return open_scene(*given)

    scene(tmp_path / "in/y.tif", COLOURS)
    monkeypatch.setattr(tiling, "open_scene", stop)
    with pytest.raises(KeyboardInterrupt):
        listed(tmp_path, Cut(64))
    assert (tmp_path / "tiles.csv").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "tiles.csv"]


def test_places_where_no_list_belongs(tmp_path: Path) -> None:
    scene(tmp_path / "in/x.tif", COLOURS)
    scene(tmp_path / ".hidden/x.tif", COLOURS)
    own = tmp_path / "list.csv"
    own.write_text("path\nin/x.tif\n")
    files = open_scenes(str(own))
    with pytest.raises(UserError, match="there is something else already"):
        list_tiles(files, own, Cut(64))
    assert own.read_text() == "path\nin/x.tif\n"
    with pytest.raises(UserError, match="a folder has that name"):
        list_tiles(files, tmp_path / "in", Cut(64))
    hidden = open_scenes(str(tmp_path / ".hidden"))
    with pytest.raises(UserError, match=r"would not count in a list there .*another folder"):
        list_tiles(hidden, tmp_path / "tiles.csv", Cut(64))
    listed(tmp_path, Cut(64))
    with pytest.raises(UserError, match="this lists tiles already"):
        open_scenes(str(tmp_path / "tiles.csv"))
    with pytest.raises(UserError, match=r"a list of tiles ends in \.csv or \.tsv"):
        tile_images(str(own), tmp_path / "t.txt", Cut(64), 1, lambda *_: None, lambda _: None)


# A source as any other


def test_order_and_fingerprint_are_the_list_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene(tmp_path / "in/x.tif", BIG)
    file = listed(tmp_path, Cut(64))
    source = open_source(file)
    rows = file.read_text().splitlines()
    other = open_source(table(tmp_path / "other.csv", *rows[:0:-1]))
    assert [other.key(i) for i in range(len(other))][::-1] == [source.key(i) for i in range(35)]
    assert other.fingerprint != source.fingerprint
    moved = pickle.loads(pickle.dumps(source))
    assert moved.fingerprint == source.fingerprint
    assert torch.equal(decode(moved.read(3), 3), decode(source.read(3), 3))
    with pytest.raises(IndexError):
        source.read(35)
    monkeypatch.setattr(index, "RECENT", -(10**18))
    cache = tmp_path / "cache"
    first = open_source(file, cache_dir=cache)
    with monkeypatch.context() as patch:
        patch.setattr(lists, "_index", None)
        second = open_source(file, cache_dir=cache)
    assert second.fingerprint == first.fingerprint == source.fingerprint
    assert second.read(7) == first.read(7)
    file.write_text("\n".join(rows[:5]))
    assert len(open_source(file, cache_dir=cache)) == 4


def test_plain_lists_with_sizes_stay_plain(tmp_path: Path) -> None:
    Image.fromarray(COLOURS.transpose(1, 2, 0)).save(tmp_path / "x.png")
    row = "x.png,5,5,130,100,cat"
    source = open_source(table(tmp_path / "l.csv", row, head="path,x,y,width,height,label"))
    assert source.key(0) == "x.png"
    assert decode(source.read(0), 3).shape == (3, 100, 130)


def test_runs_resume_and_workers_read_the_same(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        scene(tmp_path / f"in/{name}.tif", BIG)
    source, view = open_source(listed(tmp_path, Cut(64))), TrainView(seen(32), 32)
    decode(source.read(0), 3)  # handles are open before workers are forked
    batches = list(start(source, view, workers=0))
    assert len(batches) == 8
    forked = list(start(source, view, workers=2))
    resumed = list(start(source, view, workers=1, start_step=5))
    for one, other in zip([*batches, *batches[5:]], [*forked, *resumed], strict=True):
        assert torch.equal(one.views[0], other.views[0])
        assert torch.equal(one.index, other.index)


def test_spawned_processes_read_windows(tmp_path: Path) -> None:
    scene(tmp_path / "in/x.tif", BIG)
    source = open_source(listed(tmp_path, Cut(64)))
    decode(source.read(0), 3)
    loader = DataLoader(
        Decoded(source), batch_size=35, num_workers=1, multiprocessing_context="spawn"
    )
    assert torch.equal(
        next(iter(loader)), torch.stack([*map(Decoded(source).__getitem__, range(35))])
    )


class Decoded(Dataset[torch.Tensor]):
    """Of a source."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> torch.Tensor:
        return decode(self.source.read(number), 3)


def test_scenes_stay_open_but_not_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in range(4):
        scene(tmp_path / f"in/{name}.tif", BIG)
    source = open_source(listed(tmp_path, Cut(64)))
    opened, closed, open_scene = list[str](), list[str](), windows.open_scene

    def counted(path: str, *rest: int) -> Any:
        opened.append(path)
        found = open_scene(path, *rest)
        close = found.close
        object.__setattr__(found, "close", lambda: (closed.append(path), close()))
        return found

    monkeypatch.setattr(windows, "open_scene", counted)
    monkeypatch.setattr(windows, "_MOST_SCENES", 3)
    windows.close_scenes()
    for number in range(len(source)):
        decode(source.read(number), 3)
    assert len(opened) == 4
    assert closed == opened[:1]
    first = tmp_path / "in/3.tif"
    scene(tmp_path / "new.tif", BIG[:, ::-1]).replace(first)  # while it is open
    assert torch.equal(
        decode(source.read(105), 3), torch.from_numpy(BIG[:, ::-1][:, :64, :64].copy())
    )
    windows.close_scenes()


def test_images_that_are_decoded_whole_are_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        Image.fromarray(COLOURS.transpose(1, 2, 0)).save(tmp_path / f"in/{name}.png")
    source = open_source(listed(tmp_path, Cut(64)))
    monkeypatch.setattr(windows, "_MOST_HELD", COLOURS.nbytes)
    windows.close_scenes()
    kept = windows._kept(os.getpid())
    for number in (0, 6, 1):
        decode(source.read(number), 3)[:] = 0  # which must not reach what is kept
        assert sum(scene.held for scene in kept._scenes.values()) == COLOURS.nbytes
    assert decode(source.read(1), 3).any()


def test_windows_are_cached_inspected_and_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene(tmp_path / "in/x.tif", BIG)
    source = open_source(listed(tmp_path, Cut(64)))
    monkeypatch.setattr(index, "RECENT", -(10**18))
    cache = PixelCache(tmp_path / "kept", 1 << 20, source, 3, 1 << 20)
    state = source.identity(5)
    assert state is not None
    assert state != source.identity(6)
    assert cache.read(5) is None
    cache.keep(5, state, decode(source.read(5), 3))
    kept = cache.read(5)
    assert kept is not None
    np.testing.assert_array_equal(kept, decode(source.read(5), 3).permute(1, 2, 0))
    scene(tmp_path / "in/x.tif", BIG[:, ::-1])
    assert source.identity(5) != state
    assert open_source(table(tmp_path / "m.csv", "in/x.tif,0,0,0,9,9,0,0")).identity(0) is not None
    (tmp_path / "in/x.mrxs").write_bytes(b"")
    assert open_source(table(tmp_path / "m.csv", "in/x.mrxs,0,0,0,9,9,0,0")).identity(0) is None

    report = inspect(source, full=True)
    assert dict(report.sizes) == {(64, 64): 35}
    assert not report.broken
    with pytest.raises(UserError, match=r"a list of tiles ends in \.csv or \.tsv"):
        inspect(source, dedup=tmp_path / "kept.txt")
    inspect(source, dedup=tmp_path / "kept.csv")  # BIG repeats itself, but not in steps of tiles
    again = open_source(tmp_path / "kept.csv")
    assert again.fingerprint == source.fingerprint
    half = open_source(table(tmp_path / "twice.csv", *["in/x.tif,0,0,0,64,64,0,0"] * 2))
    inspect(half, dedup=tmp_path / "kept.tsv")
    assert [Path(half.path(0)).name] == [Path(open_source(tmp_path / "kept.tsv").path(0)).name]
    assert len(open_source(tmp_path / "kept.tsv")) == 1
    write_shards(source, tmp_path / "shards")
    packed = open_source(tmp_path / "shards")
    assert len(packed) == 35
    for number in (0, 34):
        assert torch.equal(decode(packed.read(number), 3), decode(source.read(number), 3))

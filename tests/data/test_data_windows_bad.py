"""Lists of tiles with something wrong: the list, a row, or the image that a window is of."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from loading import seen, start
from made_scenes import BIG, COLOURS, HEAD, listed, scene, table

from patchmine.data.badfiles import BadFiles
from patchmine.data.decoding import windows
from patchmine.data.decoding.bounds import DecodeError, install_command
from patchmine.data.decoding.decode import decode
from patchmine.data.sources.source import open_source
from patchmine.data.tiling import Cut
from patchmine.data.views.images import TrainView
from patchmine.errors import UserError


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("in/x.tif,0,0,0,64", "line 3 has 5 cells, the head 8"),
        ("in/x.tif,0,0,0,64,64,130,100,more", "line 3 has 9 cells, the head 8"),
        (
            "in/x.tif,0,-1,0,64,64,130,100",
            "line 3 says x='-1', which must be a whole number from 0",
        ),
        ("in/x.tif,0,0,0,0,64,130,100", "line 3 says width='0', which must be .* from 1 on"),
        ("in/x.tif,0,0,0.5,64,64,130,100", "line 3 says y='0.5'"),
        ("in/x.tif,0,0,99999999999,64,64,0,0", "line 3 says y='99999999999'"),
        ("in/x.tif,,0,0,64,64,130,100", "line 3 says level=''"),
        (",0,0,0,64,64,130,100", "line 3 has no path"),
        ("in/x.tif,0,70,0,64,64,130,100", "line 3 names a window outside of its image of 130x100"),
        ("in/y.tif,0,0,0,64,64,130,100", r"line 3 names 'in/y.tif', which does not exist \(1 such"),
        ('in/x.tif,0,0,0,64,64,130,"100', "the list cannot be read"),
    ],
)
def test_damaged_rows_are_told_with_their_line(tmp_path: Path, row: str, message: str) -> None:
    scene(tmp_path / "in/x.tif", COLOURS)
    file = table(tmp_path / "t.csv", "in/x.tif,0,0,0,64,64,130,100", row)
    with pytest.raises(UserError, match=message):
        open_source(file)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("path,level,x,y,width", "the head has no column height"),
        ("level,x,y,width,height", "the head has no column path"),
        ("path,level,x,y,width,height,x", "the head has two columns 'x'"),
    ],
)
def test_heads_that_lack_something(tmp_path: Path, head: str, message: str) -> None:
    with pytest.raises(UserError, match=f"{message}; a list of windows has path, level, x, y"):
        open_source(table(tmp_path / "t.csv", head=head))


def test_lists_that_are_odd(tmp_path: Path) -> None:
    scene(tmp_path / "in/x.tif", COLOURS)
    row = "in/x.tif,0,0,0,64,64,0,0"
    with pytest.raises(UserError, match="the list names no window; `patchmine data tile` writes"):
        open_source(table(tmp_path / "t.csv"))
    twice = open_source(table(tmp_path / "t.csv", row, row, "in/x.tif,0,1,0,64,64,0,0"))
    assert len(twice) == 3
    assert "1 line names a window that another line names already" in " ".join(twice.notes)
    with pytest.raises(UserError, match="line 3 has no label, the lines before it have one"):
        open_source(table(tmp_path / "t.csv", f"{row},cat", f"{row},", head=f"{HEAD},label"))
    with pytest.raises(UserError, match="this lists windows of images, no videos"):
        open_source(tmp_path / "t.csv", "video")
    odd = table(tmp_path / "t.csv", row, "in/text.md,0,0,0,64,64,0,0")
    (tmp_path / "in/text.md").write_text("words")
    assert len(open_source(odd)) == 1
    assert dict(open_source(odd).passed_over)


def test_what_does_not_fit_the_image_is_an_item_that_cannot_be_read(tmp_path: Path) -> None:
    scene(tmp_path / "in/x.tif", COLOURS, levels=2)

    def reason(row: str, max_pixels: int = 1 << 20) -> str:
        item = open_source(table(tmp_path / "t.csv", f"in/x.tif,{row}")).read(0)
        with pytest.raises(DecodeError) as told:
            decode(item, 3, max_pixels)
        return str(told.value)

    assert reason("0,100,0,64,64,0,0") == ("lies outside of its image of 130x100 pixels at level 0")
    assert reason("1,10,0,64,64,0,0") == "lies outside of its image of 65x50 pixels at level 1"
    assert reason("2,0,0,9,9,0,0") == "has no level 2, but 2 from 0 on"
    changed = "has changed since it was listed: 130x100 pixels at level 0, where it had 140x100"
    assert reason("0,0,0,64,64,140,100") == changed
    assert "more than max_pixels=100 allows" in reason("0,0,0,64,64,0,0", 100)
    gone = open_source(table(tmp_path / "t.csv", "in/x.tif,0,0,0,64,64,0,0"))
    decode(gone.read(0), 3)
    shutil.rmtree(tmp_path / "in")
    with pytest.raises(DecodeError, match=r"^cannot be read \(No such file or directory\)$"):
        decode(gone.read(0), 3)


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("x.tif", "rasterio", "geo"), ("x.svs", "openslide", "slides")]
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str
) -> None:
    scene(tmp_path / "in/x.tif", COLOURS, photometric="RGB").rename(tmp_path / "in" / name)
    source = open_source(table(tmp_path / "t.csv", f"in/{name},0,0,0,64,64,0,0"))
    windows.close_scenes()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DecodeError) as told:
        decode(source.read(0), 3)
    assert install_command(str(told.value)) == f"pip install 'patchmine[{extra}]'"


def test_a_run_goes_on_beside_broken_windows(tmp_path: Path) -> None:
    scene(tmp_path / "in/x.tif", BIG)
    scene(tmp_path / "in/y.tif", BIG[:, :64, :64])
    source = open_source(listed(tmp_path, Cut(64)))
    scene(tmp_path / "in/y.tif", BIG[:, :70, :64])
    bad = BadFiles(tmp_path / "bad.tsv", 0.5)
    steps = start(source, TrainView(seen(32), 32), bad=bad)
    assert len(list(steps)) == 8
    name, why = (tmp_path / "bad.tsv").read_text().strip().split("\t")
    assert name.endswith("in/y.tif#level0_y000000_x000000_64x64")
    assert why.startswith("has changed since it was listed: 64x70 pixels")

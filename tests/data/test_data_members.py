"""Which names count: one rule for folders, lists, tar shards and folders of frames."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from made_files import JPEG, PNG, write_files, write_tar

from patchmine.data.decoding.video import VIDEOS, frames_in
from patchmine.data.inspect import inspect, render
from patchmine.data.sources import members
from patchmine.data.sources.contract import IMAGES, Source
from patchmine.data.sources.members import ending_of, ending_told_by, is_hidden, reason_against
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError

COUNT = (
    *(
        "a/scan.0001.jpg",
        "a/scan.0002.jpg",
        "b/IMG_2024.06.01.JPG",
        "b/x.jfif",
        "b/x.jpe",
        "b/x.Jpeg",
        "c/y.webp",
    ),
    *(
        "c/y.avif",
        "c/y.bmp",
        "c/y.gif",
        "c/y.jp2",
        "c/y.pgm",
        "c/y.ppm",
        "c/y.tif",
        "c/y.tiff",
        "c/y.npy",
        "c/y.png",
    ),
    *(
        "c/with blank.png",
        'c/it\'s "odd".png',
        "c/tab\there.png",
        "c/line\nbreak.png",
        "c/caf\udce9.png",
        "c/noending",
    ),
    *("c/k.left.jpg", "c/k.right.jpg", "c/0a3f", "c/2024.06.01", "c/" + "n" * 200 + ".png"),
)
HIDDEN = (
    *(
        ".DS_Store",
        "a/._scan.0001.jpg",
        "a/.ipynb_checkpoints/scan-checkpoint.jpg",
        "__MACOSX/a/._x.jpg",
        ".git/x.jpg",
    ),
    *(
        "@eaDir/x.jpg/SYNOPHOTO_THUMB_M.jpg",
        "b/Thumbs.db",
        "b/.hidden.jpg",
        "lost+found/x.jpg",
        "__MACOSX/x.jpg",
    ),
)
OTHERS = ("a/notes.txt", "a/labels.csv", "b/x.jpg.part", "b/x.xml")


def names(source: Source) -> list[str]:
    return sorted(source.key(index) for index in range(len(source)))


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    """A folder of images among what systems and people leave beside them."""
    return write_files(tmp_path / "in", *COUNT, *HIDDEN, *OTHERS)


def test_a_folder_a_list_and_a_tar_give_the_same_items(everything: Path, tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", *COUNT, *HIDDEN, *OTHERS)
    listed = [
        name
        for name in (*COUNT, *HIDDEN, *OTHERS)
        if "\n" not in name and name != "c/tab\there.png"
    ]
    list_file = everything / "list.txt"
    list_file.write_text("\n".join(listed), encoding="utf-8", errors="surrogateescape")
    assert names(open_source(everything)) == sorted(COUNT)
    assert names(open_source(archive)) == sorted(COUNT)
    assert names(open_source(list_file)) == sorted(
        [*(set(COUNT) & set(listed)), "b/x.jpg.part", "b/x.xml", *OTHERS[:2]]
    )


def test_what_a_list_names_counts_by_its_contents_where_its_ending_says_nothing(
    tmp_path: Path,
) -> None:
    write_files(tmp_path, "a.dat", "b.0001", "c")
    write_files(tmp_path, "text.dat", "none", data=b"words ")
    (tmp_path / "list.txt").write_text("a.dat\nb.0001\nc\ntext.dat\nnone\n")
    source = open_source(tmp_path / "list.txt")
    assert names(source) == ["a.dat", "b.0001", "c"]
    assert "ending .dat, and no image inside: 1, as text.dat" in source.notes[0]
    assert "no ending, and no image inside: 1, as none" in source.notes[0]


def test_what_is_passed_over_is_told_by_reason(everything: Path, tmp_path: Path) -> None:
    (everything / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (everything / "self").symlink_to(everything / "self")
    os.mkfifo(everything / "pipe.jpg")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(everything / "s.png"))
    write_files(everything, "words", data=b"no image ")
    source = open_source(everything)
    server.close()
    (note,) = source.notes
    assert note.startswith(f"data={everything}: ")
    for part in (
        "hidden or of the system: 9, as ",
        "ending .txt: 1, as a/notes.txt",
        "ending .part: 1, as b/x.jpg.part",
        "link that leads nowhere: 2, as ",
        "no regular file (pipe, socket or device): 2, as ",
        "no ending, and no image inside: 1, as words",
    ):
        assert part in note
    assert "passed over" in render(inspect(source, sample=1))


def test_reasons_stay_a_line_however_many(tmp_path: Path) -> None:
    write_files(tmp_path, "x.jpg", *(f"x.e{number}x" for number in range(50)))
    (note,) = open_source(tmp_path).notes
    assert "and 42 more reasons" in note
    assert len(note) < 700


def test_clean_data_have_no_note(tmp_path: Path) -> None:
    write_files(tmp_path / "in", "a/1.jpg", "b/2.png")
    assert open_source(tmp_path / "in").notes == ()
    assert open_source(write_tar(tmp_path / "x.tar", "1.jpg", "2.jpg")).notes == ()


@pytest.mark.parametrize("ending", [".heic", ".HEIF", ".hif"])
def test_heic_counts_where_it_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    write_files(tmp_path / "in", "x.jpg", f"y{ending}")
    write_files(tmp_path / "in", "phone", data=b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    monkeypatch.setattr(members, "has_heif", lambda: True)
    assert len(open_source(tmp_path / "in", cache_dir=tmp_path / "cache")) == 3
    monkeypatch.setattr(members, "has_heif", lambda: False)
    source = open_source(
        tmp_path / "in", cache_dir=tmp_path / "cache"
    )  # a listing of other means is not used
    assert len(source) == 1
    assert "pip install pillow-heif" in source.notes[0]


def test_chosen_endings_are_those_that_count(tmp_path: Path) -> None:
    files = ("1.jpg", "1.mask.png", "1.left.png", "2.JPG", "raw")
    folder = write_files(tmp_path / "in", *files)
    archive = write_tar(tmp_path / "x.tar", *files)
    for place in (folder, archive):
        assert names(open_source(f"{place}::jpg")) == ["1.jpg", "2.JPG"]
        assert names(open_source(f"{place}::.jpg, left.png")) == ["1.jpg", "1.left.png", "2.JPG"]
        assert "ending .png: 2" in open_source(f"{place}::jpg").notes[0]
    with pytest.raises(
        UserError, match=r"\.txt is no ending of images; behind :: stand the endings that count"
    ):
        open_source(f"{folder}::txt")
    odd = write_files(tmp_path / "odd::png", "1.jpg")
    assert len(open_source(odd)) == 1  # a folder may be called so


def test_nothing_left_is_explained_by_what_there_was(tmp_path: Path) -> None:
    write_files(tmp_path, "a.tar.gz", "._x.jpg", "c.czi")
    with pytest.raises(
        UserError, match=r"no image and no tar shard .*ending \.czi: 1, as c\.czi"
    ) as told:
        open_source(tmp_path)
    assert "hidden or of the system: 1, as ._x.jpg" in str(told.value)


def test_frames_are_chosen_by_the_same_rule(tmp_path: Path) -> None:
    write_files(
        tmp_path / "run" / "a",
        "1.jpg",
        "2.JFIF",
        "._1.jpg",
        "10",
        ".ipynb_checkpoints/1.jpg",
        "about.txt",
    )
    os.mkfifo(tmp_path / "run" / "a" / "3.jpg")
    assert [Path(path).name for path in frames_in(f"{tmp_path}/run/a").paths] == [
        "1.jpg",
        "2.JFIF",
        "10",
    ]
    source = open_source(tmp_path, "video")
    assert [source.key(index) for index in range(len(source))] == ["run/a"]
    assert [Path(path).name for path in source.read(0).paths] == ["1.jpg", "2.JFIF", "10"]
    assert "no regular file (pipe, socket or device): 1, as run/a/3.jpg" in source.notes[0]


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        *((name, True) for name in HIDDEN),
        *((name, False) for name in COUNT),
        *((name, True) for name in ("a.jpg~", "b/#a.jpg#", "~$a.jpg", "x~/a.jpg")),
        *((name, False) for name in ("a~1.jpg", "#1.jpg", "x.jpg.1", "x (1).jpg", "x.tar.jpg")),
        ("./a.jpg", False),
        ("../a.jpg", False),
        ("/abs/a.jpg", False),
    ],
)
def test_hidden_names(name: str, hidden: bool) -> None:
    assert is_hidden(name) == hidden


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("a/x.JPG", ".jpg"),
        ("scan.0001", ""),
        ("2024.06.01", ""),
        ("x.jp2", ".jp2"),
        ("x.3gp", ".3gp"),
        ("Mr. Smith", ""),
        ("a.b/c", ""),
        ("x.", ""),
        ("x.tar.gz", ".gz"),
        (".hidden", ""),
        ("", ""),
    ],
)
def test_endings(name: str, ending: str) -> None:
    assert ending_of(name) == ending


@pytest.mark.parametrize(
    ("head", "ending", "kinds"),
    [
        (JPEG, ".jpg", "image"),
        (PNG, ".png", "image"),
        (b"GIF89a", ".gif", "both"),
        (b"RIFF\0\0\0\0WEBPVP8 ", ".webp", "image"),
        (b"RIFF\0\0\0\0AVI LIST", ".avi", "video"),
        (b"RIFF\0\0\0\0WAVEfmt ", "", "none"),
        (b"12345678WEBP", "", "none"),
        (b"II*\0", ".tif", "image"),
        (b"\x93NUMPY\1\0", ".npy", "image"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0avifmif1", ".avif", "image"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", ".mp4", "video"),
        (b"\x1a\x45\xdf\xa3", ".mkv", "video"),
        (b"P5\n2 2\n255\n", ".ppm", "image"),
        (b"P5x", "", "none"),
        (b"BM" + bytes(12) + b"\x28\0\0\0", ".bmp", "image"),
        (b"BMW is no bitmap", "", "none"),
        (b"", "", "none"),
        (b"words", "", "none"),
    ],
)
def test_first_bytes_tell_what_a_file_without_an_ending_is(
    head: bytes, ending: str, kinds: str
) -> None:
    assert ending_told_by(head) == ending
    assert (reason_against("x", IMAGES, lambda: head) is None) == (kinds in ("image", "both"))
    assert (reason_against("x", VIDEOS, lambda: head) is None) == (kinds in ("video", "both"))


def test_no_file_is_opened_whose_name_tells() -> None:
    def head() -> bytes:
        raise AssertionError("opened")

    assert reason_against("x.jpg", IMAGES, head) is None
    assert reason_against("x.txt", IMAGES, head) == "ending .txt"
    assert reason_against("._x", IMAGES, head) == members.HIDDEN


def test_a_file_without_an_ending_that_may_not_be_read_is_told() -> None:
    def refuse() -> bytes:
        raise PermissionError(13, "Permission denied")

    assert reason_against("x", IMAGES, refuse) == members.NOT_OPENED

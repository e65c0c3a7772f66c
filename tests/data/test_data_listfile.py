from __future__ import annotations

import os
from pathlib import Path

import pytest

from patchmine.data.sources import index, listfile
from patchmine.data.sources.listfile import open_list
from patchmine.errors import UserError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a b.jpg", "sub/c.png", "odd"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "odd").write_bytes(b"\xff\xd8\xff odd")
    return tmp_path


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "# a remark\nb.jpg 7\n\na b.jpg 10\nsub/c.png 7\n"),
        ("tabs.txt", "b.jpg\t7\na b.jpg\t10\nsub/c.png\t7"),
        ("mark.txt", "\ufeffb.jpg 7\r\na b.jpg 10\r\nsub/c.png 7\r\n"),
        ("bare.csv", "b.jpg,7\na b.jpg,10\nsub/c.png,7\n"),
        ("head.csv", 'label,Path\n7,b.jpg\n10,"a b.jpg"\n7,sub/c.png\n'),
        ("list.tsv", "image\tclass\nb.jpg\t7\na b.jpg\t10\nsub/c.png\t7\n"),
    ],
)
def test_paths_and_labels_in_the_order_of_the_list(images: Path, name: str, text: str) -> None:
    source = open_list(write(images, name, text), "x", None)
    assert [source.key(index) for index in range(3)] == ["b.jpg", "a b.jpg", "sub/c.png"]
    assert source.read(1) == b"a b.jpg"
    labels = source.labels()
    assert labels is not None
    assert labels.names == ["7", "10"]
    assert labels.ids.tolist() == [0, 1, 0]


def test_a_list_without_labels(images: Path) -> None:
    source = open_list(
        write(images, "list.txt", f"a b.jpg\n{images / 'sub/c.png'}\nodd\n"), "x", None
    )
    assert source.labels() is None
    assert source.read(1) == b"sub/c.png"
    assert source.path(1) == str(images / "sub/c.png")
    assert source.read(2) == b"\xff\xd8\xff odd"  # an image by its first bytes


def test_the_index_is_used_again_until_the_list_changes(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = images / "cache"
    monkeypatch.setattr(index, "RECENT", -(10**18))
    list_file = write(images, "list.txt", "b.jpg cat\nsub/c.png dog\n")
    first = open_list(list_file, "x", cache)
    with monkeypatch.context() as patch:
        patch.setattr(listfile, "_index", None)
        second = open_list(list_file, "x", cache)
    assert second.fingerprint == first.fingerprint
    labels = second.labels()
    assert labels is not None
    assert labels.names == ["cat", "dog"]
    write(images, "list.txt", "b.jpg cat\n")
    assert len(open_list(list_file, "x", cache)) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "l.txt",
            "b.jpg\nno.jpg\nnone.jpg\n",
            r"line 2 names 'no.jpg', which does not exist \(2 such lines\)",
        ),
        (
            "l.csv",
            "path\nb.jpg\nno.jpg\n",
            r"line 3 names 'no.jpg', which does not exist \(1 such line\)",
        ),
        ("l.txt", "b.jpg 1\nsub/c.png\n", r"line 2 has no label, the lines before it have one"),
        ("l.txt", "b.jpg\nsub/c.png 1\n", r"line 2 has a label, the lines before it have none"),
        ("l.txt", "# nothing\n", r"the list names no image"),
        ("l.csv", "path,label\n", r"the list names no image"),
    ],
)
def test_a_wrong_list_is_explained(images: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_list(write(images, name, text), "x", None)


def test_a_list_that_is_no_text_is_explained(images: Path) -> None:
    (images / "l.txt").write_bytes(b"\x89PNG\0\0\0\rIHDR")
    with pytest.raises(UserError, match="holds a NUL"):
        open_list(images / "l.txt", "x", None)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("plain.txt", b"b.jpg 1\na b.jpg 2\n"),
        ("windows.txt", "b.jpg 1\r\na b.jpg 2\r\n".encode("utf-8-sig")),
        ("powershell.txt", "b.jpg 1\r\na b.jpg 2\r\n".encode("utf-16")),
        ("big.txt", b"\xfe\xff" + "b.jpg 1\na b.jpg 2".encode("utf-16-be")),
        ("old_mac.txt", b"b.jpg 1\ra b.jpg 2\r"),
        ("excel.csv", "path,label\r\nb.jpg,1\r\na b.jpg,2\r\n".encode("utf-8-sig")),
        ("unicode.csv", "path,label\r\nb.jpg,1\r\na b.jpg,2\r\n".encode("utf-16")),
        ("tabs.tsv", b"b.jpg\t1\na b.jpg\t2\n"),
    ],
)
def test_lists_as_other_systems_write_them(images: Path, name: str, data: bytes) -> None:
    (images / name).write_bytes(data)
    source = open_list(images / name, "x", None)
    assert [source.key(index) for index in range(len(source))] == ["b.jpg", "a b.jpg"]
    labels = source.labels()
    assert labels is not None
    assert labels.names == ["1", "2"]


def test_names_and_classes_that_are_no_text_keep_their_bytes(images: Path) -> None:
    odd = os.fsencode(images) + b"/caf\xe9.jpg"
    with open(odd, "wb") as file:  # noqa: PTH123
        file.write(b"odd name")
    for name, line in (("l.txt", b"caf\xe9.jpg cr\xe8me\n"), ("l.csv", b"caf\xe9.jpg,cr\xe8me\n")):
        (images / name).write_bytes(line)
        source = open_list(images / name, "x", images / "cache")
        assert source.read(0) == b"odd name"
        labels = source.labels()
        assert labels is not None
        assert labels.names == ["cr\udce8me"]
    (images / "l.txt").write_bytes(b"gon\xe9.jpg\n")
    with pytest.raises(
        UserError, match=r"line 1 names 'gon\\xe9\.jpg', which does not exist"
    ) as told:
        open_list(images / "l.txt", "x", None)
    str(told.value).encode()


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("a b.jpg", "a b.jpg", None),
        ("a b.jpg my", "a b.jpg", "my"),
        ('it\'s "x".jpg', 'it\'s "x".jpg', None),
        ("tab\there.jpg", "tab\there.jpg", None),
        ("tab\there.jpg\tcat", "tab\there.jpg", "cat"),
        ("two words", "two words", None),  # a file without an ending, as the disk tells
        ("odd cat", "odd", "cat"),
        ('"a b.jpg"', "a b.jpg", None),
        ('"a b.jpg" black cat', "a b.jpg", "black cat"),
    ],
)
def test_blanks_quotes_and_tabs(images: Path, line: str, path: str, label: str | None) -> None:
    for name in ('it\'s "x".jpg', "tab\there.jpg"):
        (images / name).write_bytes(b"x")
    (images / "two words").write_bytes(b"\xff\xd8\xff")
    source = open_list(write(images, "l.txt", line), "x", None)
    assert source.key(0) == path
    labels = source.labels()
    assert (labels.names if labels else None) == ([label] if label else None)


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv"])
@pytest.mark.parametrize(
    "data",
    [
        b"x" * 200_000,
        b"b.jpg\n" + b"y" * 70_000 + b"\n",
        b"b.jpg\nb\0.jpg\n",
        b"b\0.\0j\0p\0g\0\n\0",
        b'"b.jpg\n' * 30_000,
        bytes(1000),
        b"\xff\xfeb",
        b"\xff\xfe\0\xd8",
    ],
)
def test_what_is_no_list_is_one_sentence(images: Path, suffix: str, data: bytes) -> None:
    (images / f"l{suffix}").write_bytes(data)
    with pytest.raises(UserError, match="data=x: ") as told:
        open_list(images / f"l{suffix}", "x", None)
    assert len(str(told.value)) < 1_000
    str(told.value).encode()


def test_a_list_that_names_itself_a_pipe_and_the_systems_files(images: Path) -> None:
    os.mkfifo(images / "pipe.jpg")
    for name in ("._b.jpg", ".ipynb_checkpoints/b-checkpoint.jpg"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_bytes(b"x")
    listed = [
        "l.txt",
        "b.jpg",
        "pipe.jpg",
        "._b.jpg",
        "./.ipynb_checkpoints/b-checkpoint.jpg",
        str(images / "._b.jpg"),
    ]
    source = open_list(write(images, "l.txt", "\n".join(listed)), "x", None)
    assert [source.key(index) for index in range(len(source))] == ["b.jpg"]
    assert "hidden or of the system: 3, as ._b.jpg" in source.notes[0]
    assert "no regular file (pipe, socket or device): 1, as pipe.jpg" in source.notes[0]
    assert "ending .txt, and no image inside: 1, as l.txt" in source.notes[0]
    with pytest.raises(
        UserError, match=r"the list names no image \(no regular file .*: 1, as pipe\.jpg\)"
    ):
        open_list(write(images, "l.txt", "pipe.jpg\n"), "x", None)


def test_a_hidden_folder_that_a_list_names_from_outside_is_the_users_own(images: Path) -> None:
    (images / ".cache" / "lists").mkdir(parents=True)
    (images / ".cache" / "x.jpg").write_bytes(b"x")
    listed = f"{images}/.cache/x.jpg\n../x.jpg\n"
    source = open_list(write(images / ".cache" / "lists", "l.txt", listed), "x", None)
    assert len(source) == 2
    assert source.read(0) == source.read(1) == b"x"


def test_lines_that_repeat_are_told_and_count(images: Path) -> None:
    source = open_list(write(images, "l.txt", "b.jpg\na b.jpg\nb.jpg\nb.jpg\n"), "x", None)
    assert len(source) == 4
    assert source.notes == (
        "data=x: 2 lines name what another image's line names already; it counts each time.",
    )


@pytest.mark.parametrize("head", ["image_path,class", "label_id,file_name", "n,filepath,category"])
def test_heads_that_tables_have(images: Path, head: str) -> None:
    columns = head.split(",")
    row = ["b.jpg" if "path" in name or "file" in name else "7" for name in columns]
    source = open_list(
        write(images, "l.csv", f"# made by hand\n{head}\n{','.join(row)}\n"), "x", None
    )
    assert [source.key(index) for index in range(len(source))] == ["b.jpg"]
    labels = source.labels()
    assert labels is not None
    assert labels.names == ["7"]


def test_an_unknown_head_is_told_what_heads_there_are(images: Path) -> None:
    with pytest.raises(
        UserError, match=r"line 1 names 'where', .*a head line names its columns path and label"
    ):
        open_list(write(images, "l.csv", "where,species\nb.jpg,cat\n"), "x", None)

from __future__ import annotations

from pathlib import Path

import pytest

from patchmine.data import index, listfile
from patchmine.data.listfile import open_list
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
    source = open_list(write(images, "list.txt", f"a b.jpg\n{images / 'sub/c.png'}\nodd\n"), "x", None)
    assert source.labels() is None
    assert source.read(1) == b"sub/c.png"
    assert source.path(1) == str(images / "sub/c.png")
    assert source.read(2) == b"\xff\xd8\xff odd"  # an image by its first bytes


def test_the_index_is_used_again_until_the_list_changes(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        ("l.txt", "b.jpg\nno.jpg\nnone.jpg\n", r"line 2 names 'no.jpg', which does not exist \(2 such lines\)"),
        ("l.csv", "path\nb.jpg\nno.jpg\n", r"line 3 names 'no.jpg', which does not exist \(1 such line\)"),
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

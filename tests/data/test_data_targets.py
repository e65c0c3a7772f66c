"""Labels from a table: what may stand in it, and what each fault is called."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from made_files import write_files

from patchmine.data.sources.combine import Joined
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import open_source
from patchmine.data.sources.targets import Targets, read_targets
from patchmine.errors import UserError

NAMES = ("a/1.jpg", "a/2.jpg", "b/1.jpg")


class Given:
    """A folder of three images and a table about them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = write_files(root / "images", *NAMES)
        self.source: Source = open_source(self.images)
        self.file = root / "labels.csv"

    def read(
        self, text: str | bytes, column: str | None = None, loss: str = "ce", **more: str
    ) -> Targets:
        self.file.write_bytes(text.encode() if isinstance(text, str) else text)
        return read_targets(self.file, self.source, column=column, loss=loss, **more)

    def refused(
        self, text: str | bytes, column: str | None = None, loss: str = "ce", **more: str
    ) -> str:
        with pytest.raises(UserError) as error:
            self.read(text, column, loss, **more)
        message = str(error.value)
        assert message.startswith(f"labels={self.file}: ")
        assert "\n" not in message
        return message.split(": ", 1)[1]


@pytest.fixture
def given(tmp_path: Path) -> Given:
    return Given(tmp_path)


def rows(*labels: str, head: str = "file,label", names: tuple[str, ...] = NAMES) -> str:
    lines = (f"{name},{label}" for name, label in zip(names, labels, strict=True))
    return "\n".join([head, *lines, ""])


def test_text_is_classes_in_the_order_of_the_source(given: Given) -> None:
    found = given.read("file,label\nb/1.jpg,cat\na/2.jpg,dog\na/1.jpg,cat\n")
    assert found.names == ["cat", "dog"]
    assert found.values.tolist() == [0, 1, 0]
    assert found.values.dtype == found.indices.dtype == np.int64
    assert found.indices.tolist() == [0, 1, 2]


def test_numbers_as_classes_are_in_their_own_order(given: Given) -> None:
    found = given.read(rows("10", "9", "10"))
    assert (found.names, found.values.tolist()) == (["9", "10"], [1, 0, 1])


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_forms_of_a_table(given: Given, delimiter: str, encoding: str, end: str) -> None:
    text = rows("größe", '"a, b; c"', "größe").replace("\n", end)
    text = text.replace("jpg,", f"jpg{delimiter}").replace("file,", f"file{delimiter}")
    found = given.read(text.encode(encoding))
    assert found.names == ["a, b; c", "größe"]
    assert found.values.tolist() == [1, 0, 1]


def test_columns_are_found_by_their_names(given: Given) -> None:
    text = "id,Image_Path,class,split\n" + "".join(f"7,{name},{name[0]},x\n" for name in NAMES)
    assert given.read(text).names == ["a", "b"]
    assert given.read(text, "class").names == ["a", "b"]
    other = "who,label\n" + "".join(f"{name},{name[2]}\n" for name in NAMES)
    assert given.read(other).names == ["1", "2"]  # the first column names the files
    last = "label,where\n" + "".join(f"{name[2]},{name}\n" for name in NAMES)
    assert given.read(last, file_column="where").names == ["1", "2"]


@pytest.mark.parametrize(
    "form",
    [
        lambda given, name: name,
        lambda given, name: str(given.images / name),
        lambda given, name: f"images/{name}",
        lambda given, name: f"./{name}",
        lambda given, name: "images\\" + name.replace("/", "\\"),
        lambda given, name: name.removesuffix(".jpg"),
    ],
    ids=["key", "path", "with a folder", "dot", "Windows", "without ending"],
)
def test_names_of_an_item(given: Given, form) -> None:
    names = tuple(form(given, name) for name in NAMES)
    assert given.read(rows("x", "y", "x", names=names)).values.tolist() == [0, 1, 0]


def test_a_name_without_its_folder_counts_where_it_is_one(given: Given) -> None:
    text = rows("x", "y", "x", names=("a/1.jpg", "2.jpg", "b/1.jpg"))
    assert given.read(text).values.tolist() == [0, 1, 0]
    said = given.refused(rows("x", "y", "x", names=("1.jpg", "2.jpg", "b/1.jpg")))
    assert said.startswith("row 2: '1.jpg' may be several items of")


def test_items_of_two_folders_are_told_apart_by_path(given: Given, tmp_path: Path) -> None:
    more = write_files(tmp_path / "more", "a/1.jpg")
    given.source = Joined([given.source, open_source(more)])
    names = ("images/a/1.jpg", "a/2.jpg", "b/1.jpg", "more/a/1.jpg")
    paths = tuple(str(tmp_path / name) for name in names[:1] + names[-1:])
    text = rows("x", "y", "z", "w", names=(paths[0], *NAMES[1:], paths[1]))
    found = given.read(text)
    assert [found.names[i] for i in found.values] == ["x", "y", "z", "w"]
    said = given.refused(rows("x", "y", "z", "w", names=("a/1.jpg", *NAMES[1:], paths[1])))
    assert "'a/1.jpg' may be several items" in said


def test_labels_of_one_cell(given: Given) -> None:
    for mark in "|;":
        found = given.read(rows(f"cat{mark} dog", "", "dog"), loss="bce")
        assert found.names == ["cat", "dog"]
        assert found.values.tolist() == [[1, 1], [0, 0], [0, 1]]
        assert found.values.dtype == np.float32


def test_columns_of_zeros_and_ones(given: Given) -> None:
    found = given.read(rows("1,0", "0,1", "True,False", head="file,cat,dog"), "cat,dog", "bce")
    assert (found.names, found.values.tolist()) == (["cat", "dog"], [[1, 0], [0, 1], [1, 0]])
    one = given.read(rows("1", "0", "1", head="file,cat"), "cat", "bce")
    assert (one.names, one.values.tolist()) == (["cat"], [[1], [0], [1]])


def test_numbers(given: Given) -> None:
    found = given.read(rows("1.5", "-2e3", " 7"), loss="mse")
    assert (found.names, found.values.tolist()) == (["label"], [[1.5], [-2000], [7]])
    assert found.values.dtype == np.float32
    two = given.read(rows("1,2", "3,4", "5,6", head='file,x,"y, z"'), "y, z", "mse")
    assert (two.names, two.values.tolist()) == (["y, z"], [[2], [4], [6]])
    both = given.read(rows("1,2", "3,4", "5,6", head="file,x,y"), "y, x", "mse")
    assert (both.names, both.values.tolist()) == (["y", "x"], [[2, 1], [4, 3], [6, 5]])


def test_a_file_may_be_listed_again_with_the_same_label(given: Given) -> None:
    found = given.read(rows("x", "y", "x") + "a/1.jpg,x\n\n,\n")
    assert found.values.tolist() == [0, 1, 0]


def test_a_shuffled_table_is_put_in_order(tmp_path: Path) -> None:
    """Against a dictionary."""
    generator = np.random.default_rng(0)
    names = [f"{i:03d}.jpg" for i in range(300)]
    given = Given(tmp_path / "x")
    given.source = open_source(write_files(tmp_path / "many", *names))
    wanted = {name: float(generator.integers(99)) for name in names}
    listed = generator.permutation(names + names[::7])
    text = "".join(f"{name},{wanted[name]}\n" for name in listed)
    found = given.read(f"file,y\n{text}", loss="mse")
    assert found.values[:, 0].tolist() == list(wanted.values())


# ---- faults ----


def test_items_without_label_and_rows_without_item(given: Given) -> None:
    said = given.refused("file,label\na/2.jpg,x\n")
    assert "no row for 2 of the 3 items" in said
    assert "a/1.jpg" in said
    said = given.refused(rows("x", "y", "z") + "c/9.jpg,x\nc/10.jpg,y\n")
    assert said.startswith("row 5: 'c/9.jpg' is no item of data=")
    assert "2 such rows" in said
    assert "'a/1.jpg'" in said  # how one looks


@pytest.mark.parametrize("cell", ["", " ", "NaN", "nan", "#N/A"])
@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_a_missing_label(given: Given, cell: str, loss: str) -> None:
    said = given.refused(rows("1", cell, "2"), loss=loss)
    assert said.startswith("row 3: ")
    assert cell.strip() in said
    assert given.refused("file,label\na/1.jpg,3\na/2.jpg\n", loss=loss).startswith("row 3: ")


@pytest.mark.parametrize("cell", ["abc", "inf", "-Infinity", "1e39", '"1,5"', "1.2.3"])
def test_what_is_no_number(given: Given, cell: str) -> None:
    said = given.refused(rows("1", "2", cell, head="file,age"), loss="mse")
    assert said.startswith("row 4: age='")
    assert cell.strip('"') in said
    assert ("decimal point" in said) == ("," in cell)


def test_what_is_neither_zero_nor_one(given: Given) -> None:
    said = given.refused(rows("1,0", "0,2", "1,1", head="file,cat,dog"), "cat,dog", "bce")
    assert said.startswith("row 3: dog='2' is neither 0 nor 1")
    said = given.refused(rows("1", "", "0", head="file,cat"), "cat", "bce")
    assert said.startswith("row 3: cat is neither 0 nor 1")


@pytest.mark.parametrize(
    "other", ["cat ", " cat", "CAT", "Cat ", "\N{FULLWIDTH LATIN SMALL LETTER C}at"]
)
def test_a_class_in_two_spellings(given: Given, other: str) -> None:
    text = rows("cat", "dog", f'"{other}"')
    assert f"row 4: the label '{other}' differs from 'cat' in row 2 only" in given.refused(text)
    if other.strip() == "cat":  # blanks may stand around the labels of one cell
        assert given.read(text, loss="bce").names == ["cat", "dog"]
    else:
        assert "row 4: the label " in given.refused(text, loss="bce")


def test_a_class_in_two_unicode_forms(given: Given) -> None:
    forms = (unicodedata.normalize(form, "Käfer") for form in ("NFC", "NFD"))
    assert "in row 2 only in case, blanks or Unicode form" in given.refused(rows(*forms, "x"))


def test_letters_may_differ_in_case_alone(given: Given) -> None:
    assert given.read(rows("a", "A", "b")).names == ["A", "a", "b"]


def test_a_file_with_two_labels(given: Given) -> None:
    said = given.refused(rows("x", "y", "x") + "a/1.jpg,y\n")
    assert said.startswith("row 5: a/1.jpg has the label 'y' here and the label 'x' in row 2")
    said = given.refused(rows("1", "2", "3") + "images/a/1.jpg,4\n", loss="mse")
    assert said.startswith("row 5: a/1.jpg has label=4 here and label=1 in row 2")


def test_columns_that_cannot_be_chosen(given: Given) -> None:
    text = rows("1,2", "1,2", "1,2", head="file,breed,age")
    assert "choose one with column=" in given.refused(text)
    assert "no column 'bred'; near: breed" in given.refused(text, "bred")
    assert "no column 'weight'; the columns file, breed, age" in given.refused(text, "weight")
    assert "no column 'who'" in given.refused(text, "age", file_column="who")
    assert "column=file: 'file' names the files" in given.refused(text, "file")
    assert "column=breed,age names 2 columns" in given.refused(text, "breed,age")
    assert "two columns 'age'" in given.refused(text.replace("breed", "age"), "age")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no rows"),
        ("\n\n", "has no rows"),
        ("file,label\n", "has a head and no rows"),
        ("file\na/1.jpg\n", "has one column, 'file'"),
        ("a/1.jpg,x\na/2.jpg,y\nb/1.jpg,x\n", "row 1: 'a/1.jpg' is an item, not"),
        (rows("x", "x", "x"), "all rows have the label 'x'"),
        ("file,label\na/1.jpg,red, round\n", "row 2: has 3 cells, the head 2"),
        (b"file,label\na/1.jpg,x\0\n", "NUL"),
        (b"file,label\na/1.jpg,caf\xe9\n", r"row 2: the label 'caf\xe9' is not in UTF-8"),
        ('file,label\na/1.jpg,"x\n', "row 2: cannot be read (unexpected end of data)"),
        (f"file,label\na/1.jpg,{'x' * 99_999}\n", "row 2: cannot be read (line 2 has"),
    ],
)
def test_tables_that_are_none(given: Given, text: str | bytes, said: str) -> None:
    assert said in given.refused(text)


def test_no_label_in_any_cell(given: Given) -> None:
    assert "holds a label" in given.refused(rows("", "", ""), loss="bce")


def test_files_that_are_none(given: Given, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_targets(tmp_path / "none.csv", given.source, column=None, loss="ce")
    with pytest.raises(UserError, match="is no file"):
        read_targets(tmp_path, given.source, column=None, loss="ce")


def test_names_that_are_no_utf8_keep_their_bytes(given: Given) -> None:
    name = b"caf\xe9.jpg"
    given.source = open_source(
        write_files(given.root / "odd", name.decode(errors="surrogateescape"), "b.jpg")
    )
    assert given.read(b"file,label\n" + name + b",x\nb.jpg,y\n").names == ["x", "y"]

"""A tar archive gives what it holds: repeated names, links, sparse members, notes, and damage that
is told.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
from made_files import JPEG, add, write_files, write_tar

from patchmine.data.sources.shards import ShardSource, open_shards
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError


def opened(file: Path) -> ShardSource:
    return open_shards([file], "x", None)


def keys(source: ShardSource) -> list[str]:
    return [source.key(index) for index in range(len(source))]


def classes(source: ShardSource) -> list[str] | None:
    labels = source.labels()
    return None if labels is None else [labels.names[number] for number in labels.ids]


@pytest.mark.parametrize(
    "names",
    [
        [f"scan.{number:04d}.jpg" for number in range(1, 11)],
        [f"IMG_2024.06.{number:02d}.jpg" for number in range(1, 11)],
        [f"{number}.{side}.jpg" for number in range(5) for side in ("left", "right")],
        ["same.jpg"] * 3,
        ["a/same.jpg", "b/same.jpg", "a/same.jpg"],
        ["x.jpg", "x.png", "x.JPG"],
        ["same.left.jpg"] * 4,
    ],
    ids=lambda names: names[0],
)
def test_every_image_is_an_item(tmp_path: Path, names: list[str]) -> None:
    source = opened(write_tar(tmp_path / "x.tar", *names))
    assert keys(source) == names
    assert [source.read(index) for index in range(len(source))] == [
        JPEG + name.encode() for name in names
    ]


def test_repeated_names_are_told(tmp_path: Path) -> None:
    source = opened(write_tar(tmp_path / "x.tar", "a.jpg", "b.jpg", "a.jpg", "a.jpg"))
    assert source.notes == ("data=x: 2 images are of a name that stood before; each counts.",)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_form(tmp_path: Path, form: int) -> None:
    names = [
        "plain.jpg",
        "d" * 90 + "/" + "n" * 90 + ".jpg",
        "ü.jpg",
        "line\nbreak.jpg",
        'it\'s "x"\t.jpg',
        "caf\udce9.jpg",
    ]
    if form != tarfile.USTAR_FORMAT:
        names.append("/".join(["long" * 20] * 5) + ".jpg")
    source = opened(write_tar(tmp_path / "x.tar", *names, format=form))
    assert keys(source) == names


class TestNotes:
    def test_a_note_belongs_to_the_image_of_its_name(self, tmp_path: Path) -> None:
        file = tmp_path / "x.tar"
        with tarfile.open(file, "w") as archive:
            for stem in ("scan.0001", "scan.0002", "plain"):
                add(archive, f"{stem}.jpg", JPEG)
                add(archive, f"{stem}.cls", stem.encode())
            add(archive, "pair.left.jpg", JPEG)
            add(archive, "pair.right.jpg", JPEG)
            add(archive, "pair.cls", b"both")
            add(archive, "own.left.jpg", JPEG)
            add(archive, "own.right.jpg", JPEG)
            add(archive, "own.json", b'{"label": "rest"}')
            add(archive, "own.left.json", b'{"label": "left"}')
            add(archive, "whole.jpg", JPEG)
            add(archive, "whole.jpg.json", b'\xef\xbb\xbf{"label": "whole"}')
        found = classes(opened(file))
        assert found == ["scan.0001", "scan.0002", "plain", "both", "both", "left", "rest", "whole"]

    def test_notes_may_stand_behind_all_images_or_before_them(self, tmp_path: Path) -> None:
        for order in ((0, 1), (1, 0)):
            with tarfile.open(tmp_path / "x.tar", "w") as archive:
                for part in order:
                    for number in range(5):
                        ending, data = (("jpg", JPEG), ("cls", b"class%d" % (number % 2)))[part]
                        add(archive, f"{number}.{ending}", data)
            source = opened(tmp_path / "x.tar")
            assert classes(source) == ["class0", "class1", "class0", "class1", "class0"]
            assert source.notes == ()

    def test_repeated_samples_keep_their_own_notes(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            for label in (b"one", b"two"):
                add(archive, "x.jpg", JPEG)
                add(archive, "x.cls", label)
        assert classes(opened(tmp_path / "x.tar")) == ["one", "two"]

    def test_a_note_of_no_image_is_told(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            add(archive, "meta.json", b"{}")
            add(archive, "1.jpg", JPEG)
        assert (
            "note (.cls or .json) of no item: 1, as meta.json"
            in opened(tmp_path / "x.tar").notes[0]
        )

    @pytest.mark.parametrize(
        "note", [b"{", b"[" * 100_000, b'{"label": ' + b"9" * 5_000 + b"}", b"\xff\xfe\0"]
    )
    def test_a_note_that_is_no_json_is_one_sentence(self, tmp_path: Path, note: bytes) -> None:
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            add(archive, "1.jpg", JPEG)
            add(archive, "1.json", note)
        with pytest.raises(UserError, match=r"the \.json member of .*1\.jpg cannot be read"):
            opened(tmp_path / "x.tar").labels()

    def test_class_folders_are_classes_where_no_note_says_otherwise(self, tmp_path: Path) -> None:
        assert classes(opened(write_tar(tmp_path / "x.tar", "./cat/1.jpg", "dog/1.jpg"))) == [
            "cat",
            "dog",
        ]
        assert classes(opened(write_tar(tmp_path / "x.tar", "cat/1.jpg", "1.jpg"))) is None


class TestLinks:
    def test_links_stand_for_what_they_lead_to(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            add(archive, "./all/1.jpg", JPEG + b"1")
            add(archive, "cat/hard.jpg", kind=tarfile.LNKTYPE, link="all/1.jpg")
            add(archive, "cat/dotted.jpg", kind=tarfile.LNKTYPE, link="./all/1.jpg")
            add(archive, "cat/soft.jpg", kind=tarfile.SYMTYPE, link="../all/1.jpg")
            add(archive, "cat/chain.jpg", kind=tarfile.SYMTYPE, link="soft.jpg")
            add(archive, "cat/later.jpg", kind=tarfile.SYMTYPE, link="../all/2.jpg")
            add(archive, "cat/bare", kind=tarfile.SYMTYPE, link="../all/1.jpg")
            add(archive, "all/2.jpg", JPEG + b"2")
        source = opened(tmp_path / "x.tar")
        assert [source.read(i)[-1:] for i in range(len(source))] == [
            b"1",
            b"1",
            b"1",
            b"1",
            b"1",
            b"2",
            b"1",
            b"2",
        ]
        assert source.notes == ()

    def test_links_to_nothing_are_told(self, tmp_path: Path) -> None:
        (tmp_path / "secret.jpg").write_bytes(JPEG)
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            add(archive, "1.jpg", JPEG)
            add(archive, "out.jpg", kind=tarfile.SYMTYPE, link="../secret.jpg")
            add(archive, "absolute.jpg", kind=tarfile.SYMTYPE, link=str(tmp_path / "secret.jpg"))
            add(archive, "gone.jpg", kind=tarfile.LNKTYPE, link="nothing.jpg")
            add(archive, "a.jpg", kind=tarfile.SYMTYPE, link="b.jpg")
            add(archive, "b.jpg", kind=tarfile.SYMTYPE, link="a.jpg")
            add(archive, "self.jpg", kind=tarfile.LNKTYPE, link="self.jpg")
        source = opened(tmp_path / "x.tar")
        assert keys(source) == ["1.jpg"]
        assert "link to what is not in the archive: 6, as out.jpg" in source.notes[0]

    def test_what_tar_makes_of_hard_links(self, tmp_path: Path) -> None:
        write_files(tmp_path / "in", "1.jpg")
        os.link(tmp_path / "in/1.jpg", tmp_path / "in/2.jpg")
        (tmp_path / "in/3.jpg").symlink_to("1.jpg")
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            archive.add(tmp_path / "in", "in")
        source = opened(tmp_path / "x.tar")
        assert {source.read(index) for index in range(3)} == {JPEG + b"1.jpg"}


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "folder", kind=tarfile.DIRTYPE)
        add(archive, "pipe.jpg", kind=tarfile.FIFOTYPE)
        add(archive, "device.jpg", kind=tarfile.CHRTYPE)
        add(archive, "1.jpg", JPEG)
    assert opened(tmp_path / "x.tar").notes == (
        "data=x: 2 names are passed over (no regular file (pipe, socket or device): 2, as "
        "pipe.jpg).",
    )


@pytest.mark.parametrize("version", ["0.0", "1.0"])
def test_sparse_members_have_their_holes(tmp_path: Path, version: str) -> None:
    data = JPEG.ljust(512, b"a") + bytes(4096) + b"end".ljust(512, b"b")
    pieces = [(0, 512), (4608, 512)]
    stored = b"".join(data[place : place + size] for place, size in pieces)
    info = tarfile.TarInfo("x.jpg")
    if version == "1.0":
        listed = b"2\n0\n512\n4608\n512\n"
        stored = listed.ljust(512, b"\0") + stored
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    else:
        info.pax_headers = {"GNU.sparse.map": "0,512,4608,512"}
    info.pax_headers |= {
        "GNU.sparse.name": "x.jpg",
        "GNU.sparse.realsize": "5120",
        "GNU.sparse.size": "5120",
    }
    if version == "1.0":
        del info.pax_headers["GNU.sparse.size"]
    info.size = len(stored)
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(stored))
        add(archive, "y.jpg", JPEG)
    source = open_shards([tmp_path / "x.tar"], "x", tmp_path / "cache")
    assert keys(source) == ["x.jpg", "y.jpg"]
    assert source.read(0) == data
    assert source.read(1) == JPEG


class TestDamage:
    def test_archives_one_behind_the_other_are_one(self, tmp_path: Path) -> None:
        first, second = (write_tar(tmp_path / f"{n}.tar", f"{n}1.jpg", f"{n}2.jpg") for n in "ab")
        (tmp_path / "x.tar").write_bytes(first.read_bytes() + second.read_bytes())
        source = opened(tmp_path / "x.tar")
        assert keys(source) == ["a1.jpg", "a2.jpg", "b1.jpg", "b2.jpg"]
        assert source.read(3) == JPEG + b"b2.jpg"
        assert source.notes == ()

    @pytest.mark.parametrize(
        "size",
        [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"-0000000001\0", b"\0" * 12],
    )
    def test_false_sizes_end_in_a_sentence(self, tmp_path: Path, size: bytes) -> None:
        file = write_tar(tmp_path / "x.tar", "1.jpg", "2.jpg", "3.jpg")
        data = bytearray(file.read_bytes())
        header = data[1024:1536]
        header[124:136], header[148:156] = size, b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[1024:1536] = header
        file.write_bytes(data)
        source = opened(file)
        assert keys(source)[0] == "1.jpg"
        assert len(source) < 3
        assert (
            "its 1 whole images are used" in source.notes[0]
            or "its 2 whole images are used" in source.notes[0]
        )

    def test_a_false_checksum_in_the_middle_is_told(self, tmp_path: Path) -> None:
        file = write_tar(tmp_path / "x.tar", "1.jpg", "2.jpg", "3.jpg")
        data = bytearray(file.read_bytes())
        data[1024 + 150] ^= 1
        file.write_bytes(data)
        source = opened(file)
        assert keys(source) == ["1.jpg"]
        assert "was damaged at byte 1,024" in source.notes[0]

    def test_damage_behind_a_long_name_is_told(self, tmp_path: Path) -> None:
        file = write_tar(tmp_path / "x.tar", "1.jpg", "l" * 300 + ".jpg", format=tarfile.PAX_FORMAT)
        data = bytearray(file.read_bytes())
        data[1024 + 1024 + 3] ^= 1  # the header that follows the long name
        file.write_bytes(data)
        source = opened(file)
        assert keys(source) == ["1.jpg"]
        assert "was damaged at byte 1,024" in source.notes[0]

    @pytest.mark.parametrize("step", [97])
    def test_no_cut_and_no_flipped_byte_ends_in_anything_but_a_sentence(
        self, tmp_path: Path, step: int
    ) -> None:
        with tarfile.open(tmp_path / "whole.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            add(archive, "1.jpg", JPEG)
            add(archive, "caf\udce9" * 50 + ".jpg", JPEG)
            add(archive, "2.jpg", kind=tarfile.SYMTYPE, link="1.jpg")
            add(archive, "1.cls", b"x")
        data = (tmp_path / "whole.tar").read_bytes().rstrip(b"\0") + bytes(1024)
        for place in range(0, len(data), step):
            flipped = bytearray(data)
            flipped[place] ^= 0x41
            for mutant in (data[:place], bytes(flipped)):
                (tmp_path / "x.tar").write_bytes(mutant)
                try:
                    source = opened(tmp_path / "x.tar")
                    [source.read(index) for index in range(len(source))]
                    source.labels()
                except UserError:
                    pass


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("x.tar", gzip.compress),
        ("x.tar.gz", gzip.compress),
        ("x.tgz", gzip.compress),
        ("x.zip", lambda _: b"PK\x03\x04"),
    ],
)
def test_packed_archives_are_one_sentence(tmp_path: Path, name: str, pack: object) -> None:
    whole = write_tar(tmp_path / "whole.tar", "1.jpg").read_bytes()
    (tmp_path / name).write_bytes(pack(whole).ljust(1024, b"\0"))  # type: ignore[operator]
    with pytest.raises(
        UserError, match=r"is packed with (gzip|zip), .*unpack it with (gunzip|unzip)"
    ):
        open_source(tmp_path / name)


def test_a_shard_that_is_swapped_in_use_is_a_read_error(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "x.tar", "1.jpg", "2.jpg")
    source = opened(file)
    info = file.stat()
    write_tar(tmp_path / "new.tar", "8.jpg", "9.jpg").replace(file)
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert file.stat().st_size == info.st_size
    with pytest.raises(OSError, match="the shard was changed meanwhile"):
        source.read(0)


def test_a_folder_of_shards_passes_over_what_systems_leave_there(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / "s" / f"shard-{number}.tar", f"{number}.jpg")
    write_files(
        tmp_path / "s", "._shard-0.tar", "__MACOSX/._shard-1.tar", "_index.json", data=b"\0\5\x16\7"
    )
    os.mkfifo(tmp_path / "s" / "pipe.tar")
    source = open_source(tmp_path / "s")
    assert len(source) == 2
    assert "hidden or of the system: 2, as " in source.notes[0]  # type: ignore[attr-defined]
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(UserError, match="this is a pipe, a socket or a device"):
        open_source(tmp_path / "x.tar")
    with pytest.raises(UserError, match=r"the shard .*pipe\.tar cannot be read \(it is a pipe"):
        open_source(f"{tmp_path}/s/p*.tar")


def test_a_hard_link_keeps_what_stood_under_its_name_before(tmp_path: Path) -> None:
    with tarfile.open(
        tmp_path / "x.tar", "w"
    ) as archive:  # as tar -r appends a file that has changed
        add(archive, "a.jpg", JPEG + b"old")
        add(archive, "hard.jpg", kind=tarfile.LNKTYPE, link="a.jpg")
        add(archive, "symbolic.jpg", kind=tarfile.SYMTYPE, link="a.jpg")
        add(
            archive, "a.jpg", kind=tarfile.LNKTYPE, link="a.jpg"
        )  # as GNU tar writes a file that is named twice
        add(archive, "a.jpg", JPEG + b"new")
        add(archive, "later.jpg", kind=tarfile.LNKTYPE, link="a.jpg")
        add(archive, "itself.jpg", kind=tarfile.LNKTYPE, link="itself.jpg")
    source = opened(tmp_path / "x.tar")
    contents = [
        (source.key(index), source.read(index).removeprefix(JPEG)) for index in range(len(source))
    ]
    assert contents == [
        ("a.jpg", b"old"),
        ("hard.jpg", b"old"),
        ("symbolic.jpg", b"new"),
        ("a.jpg", b"old"),
        ("a.jpg", b"new"),
        ("later.jpg", b"new"),
    ]

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import seen, start
from made_files import JPEG, add, write_files
from PIL import Image
from torch.utils.data import Dataset

from patchmine.data import sharding
from patchmine.data.decoding.decode import decode
from patchmine.data.sharding import write_shards
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import open_source
from patchmine.data.views.images import TrainView
from patchmine.errors import UserError
from patchmine.types import Batch

pytestmark = pytest.mark.bitwise


def test_shards_hold_what_the_folder_holds(image_folder: Path, tmp_path: Path) -> None:
    source = open_source(image_folder)
    said: list[str] = []
    done = write_shards(source, tmp_path / "out", shard_size=60_000, say=said.append)
    again = open_source(tmp_path / "out")
    assert done.items == len(again) == len(source)
    assert done.shards == len(list((tmp_path / "out").iterdir())) > 2
    for index in range(len(source)):
        assert again.read(index) == source.read(index)
        assert again.key(index) == source.key(index)
    ours, theirs = source.labels(), again.labels()
    assert ours is not None
    assert theirs is not None
    assert ours.names == theirs.names
    assert (ours.ids == theirs.ids).all()
    assert said[0].startswith(f"{len(source)} images")


def test_the_same_images_make_the_same_bytes(image_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_shards(open_source(image_folder), tmp_path / name)
    first, second = ((tmp_path / name / "shard-000000.tar").read_bytes() for name in ("one", "two"))
    assert first == second


def test_names_that_tar_readers_would_confuse_stay_apart(
    image_folder: Path, tmp_path: Path
) -> None:
    jpeg, png = (image_folder / "circle" / name for name in ("0000.jpg", "0001.png"))
    (tmp_path / "in").mkdir()
    for number, name in enumerate(("a.jpg", "a.png", "a.v1.jpg", "a.v2.jpg", "b.c/d.png", "ü.png")):
        file = tmp_path / "in" / name
        file.parent.mkdir(exist_ok=True)
        shutil.copy(jpeg if name.endswith("jpg") else png, file)
        with file.open("ab") as out:
            out.write(bytes([number]))
    source = open_source(tmp_path / "in")
    write_shards(source, tmp_path / "out")
    again = open_source(tmp_path / "out")
    assert [again.key(i) for i in range(len(again))] == [source.key(i) for i in range(len(source))]
    assert [again.read(i) for i in range(len(again))] == [
        source.read(i) for i in range(len(source))
    ]
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as archive:
        stems = [Path(name).name.split(".")[0] for name in archive.getnames()]
    assert len(set(stems)) == len(source)


def encode(array: np.ndarray, suffix: str, **settings: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, suffix, **settings)
    return out.getvalue()


def test_shrinking_touches_only_what_is_too_large(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 120 * 80 * 3).reshape(120, 80, 3).astype(np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "a_large.jpg": encode(ramp, "JPEG", quality=90, exif=turned),
        "b_small.jpg": encode(ramp[:40, :40], "JPEG"),
        "c_large.png": encode(ramp, "PNG"),
        "d_grey.png": encode(ramp[:, :, 0].copy(), "PNG"),
        "e_deep.png": encode(ramp[:, :, 0].astype(np.uint16) * 257, "PNG"),
        "f_broken.jpg": b"no image",
        "g_truncated.jpg": encode(ramp, "JPEG")[:1000],
    }
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    said: list[str] = []
    source = open_source(tmp_path / "in")
    done = write_shards(source, tmp_path / "out", max_side=60, say=said.append)
    again = open_source(tmp_path / "out")
    kept = [again.read(i) == data for i, data in enumerate(files.values())]
    assert kept == [False, True, False, False, True, True, True]
    assert [decode(again.read(i), c).shape for i, c in ((0, 3), (2, 3), (3, 1))] == [
        (3, 40, 60),
        (3, 60, 40),
        (1, 60, 40),
    ]
    assert again.read(0).startswith(b"\xff\xd8")
    assert again.read(2).startswith(b"\x89PNG")
    whole = decode(files["a_large.jpg"], 3)[None].float()
    small = torch.nn.functional.interpolate(whole, (40, 60), mode="bicubic", antialias=True)[0]
    assert (decode(again.read(0), 3) - small).abs().mean() < 3
    assert (done.shrunk, done.too_large, done.skipped) == (3, 2, 0)
    assert any("JPEG of quality 95" in line for line in said)
    assert any("2 larger ones stay as they are" in line for line in said)


class Numbers(Dataset[Any]):
    classes = ("zero", "one")

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Any, int]:
        array = np.full((8, 10, 3), index, np.uint8)
        kinds = [
            array,
            torch.from_numpy(array).permute(2, 0, 1),
            Image.fromarray(array),
            array[:, :, 0] / 4,
        ]
        return kinds[index], index % 2


def test_pixels_are_written_without_loss(tmp_path: Path) -> None:
    write_shards(open_source(Numbers()), tmp_path / "out")
    again = open_source(tmp_path / "out")
    for index, channels in enumerate((3, 3, 3, 1)):
        assert torch.equal(
            decode(again.read(index), channels), decode(Numbers()[index][0], channels)
        )
    labels = again.labels()
    assert labels is not None
    assert [labels.names[i] for i in labels.ids] == ["zero", "one", "zero", "one"]


def test_what_cannot_be_read_is_left_out_and_named(image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder, tmp_path / "in")
    source = open_source(tmp_path / "in")
    Path(source.path(3)).unlink()
    said: list[str] = []
    done = write_shards(source, tmp_path / "out", say=said.append)
    assert done.skipped == 1
    assert source.path(3) in said[0]
    assert len(open_source(tmp_path / "out")) == len(source) - 1


def test_earlier_work_stays_and_half_work_never_appears(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(image_folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(UserError, match="there is something already"):
        write_shards(source, tmp_path / "full")
    with pytest.raises(UserError, match="max_side=0"):
        write_shards(source, tmp_path / "out", max_side=0)

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharding.os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        write_shards(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "full"]


def test_training_sees_the_same_batches_from_shards_as_from_the_folder(
    image_folder: Path, tmp_path: Path
) -> None:
    write_shards(open_source(image_folder), tmp_path / "out", shard_size=40_000)

    def batches(spec: Path) -> list[Batch]:
        return list(
            start(
                open_source(spec),
                TrainView(seen(16)),
                seed=3,
                batch_size=12,
                steps_per_epoch=3,
                start_step=1,
                total_steps=5,
            )
        )

    for ours, theirs in zip(batches(image_folder), batches(tmp_path / "out"), strict=True):
        assert torch.equal(ours.views[0], theirs.views[0])
        assert torch.equal(ours.index, theirs.index)


AWKWARD = (
    *(
        "a.jpg",
        "a.png",
        "a.JPG",
        "scan.0001.jpg",
        "scan.0002.jpg",
        "b/k.left.jpg",
        "b/k.right.jpg",
        "b/k_left.jpg",
    ),
    *(
        "caf\udce9.jpg",
        "line\nbreak.png",
        'it\'s "x"\t.png',
        "bare",
        "n" * 240 + ".jpg",
        "d/" * 150 + "deep.jpg",
        "scan_0001.png",
    ),
)


def names_and_contents(source: Source) -> list[tuple[str, bytes]]:
    return sorted((source.key(index), source.read(index)) for index in range(len(source)))


def test_a_round_trip_keeps_every_item_name_and_class(tmp_path: Path) -> None:
    folder = write_files(
        tmp_path / "in", *(f"{part}/{name}" for part in ("cr\udce8me", "tea") for name in AWKWARD)
    )
    source = open_source(folder)
    done = write_shards(source, tmp_path / "out", shard_size=20_000)
    again = open_source(tmp_path / "out")
    assert done.items == len(source) == 2 * len(AWKWARD)
    assert names_and_contents(again) == names_and_contents(source)
    assert again.labels().names == source.labels().names == ["cr\udce8me", "tea"]
    assert (again.labels().ids == source.labels().ids).all()
    assert again.notes == ()
    members = []
    for shard in (tmp_path / "out").iterdir():
        with tarfile.open(shard) as archive:
            members += archive.getnames()
    assert len(set(members)) == len(members)  # which other programs unpack without overwriting
    assert not any(part.startswith(".") for name in members for part in name.split("/"))


def test_repeated_hidden_and_outside_names_survive_too(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere/.cache", "x.jpg", "y.jpg")
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for number in range(3):
            add(archive, "same.jpg", JPEG + b"%d" % number)
    listed = [
        f"{tmp_path}/elsewhere/.cache/x.jpg",
        "../elsewhere/.cache/y.jpg",
        "../elsewhere/.cache/y.jpg",
    ]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "l.txt").write_text("\n".join(listed))
    source = open_source([tmp_path / "lists" / "l.txt", tmp_path / "twice.tar"])
    write_shards(source, tmp_path / "out")
    again = open_source(tmp_path / "out")
    assert names_and_contents(again) == names_and_contents(source)
    assert len(again) == 6


class Odd(Dataset[Any]):
    """Images that PNG cannot hold, and what is none."""

    items = (
        Image.new("F", (4, 4), 0.5),
        Image.new("CMYK", (4, 4), (1, 2, 3, 4)),
        torch.full((3, 4, 4), 0.5, dtype=torch.bfloat16),
        np.array([object()]),
    )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def test_what_no_image_file_can_hold_is_left_out_and_named(tmp_path: Path) -> None:
    said: list[str] = []
    done = write_shards(open_source(Odd()), tmp_path / "out", say=said.append)
    assert (done.items, done.skipped) == (3, 1)
    assert said[0].startswith("Odd[3] is left out: it cannot be read (")
    again = open_source(tmp_path / "out")
    for index, channels in enumerate((1, 3, 3)):
        item = Odd()[index].float() if index == 2 else Odd()[index]
        assert torch.equal(decode(again.read(index), channels), decode(item, channels))


def test_a_folder_that_stands_beside_is_never_removed(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    write_shards(open_source(image_folder), tmp_path / "out")
    assert (tmp_path / "out.partial" / "mine").exists()
    assert sorted(place.name for place in tmp_path.iterdir()) == ["out", "out.partial"]


@pytest.mark.parametrize("name", ["file", "file/below", "link"])
def test_a_place_that_cannot_take_shards_is_explained(
    image_folder: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"out=.*(there is something already|cannot be written .*)"):
        write_shards(open_source(image_folder), tmp_path / name)


def test_labels_that_cannot_be_read_are_not_blamed_on_the_disk(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "1.jpg", JPEG)
        add(archive, "1.json", b"{")
    with pytest.raises(UserError, match=r"the \.json member of .*1\.jpg cannot be read"):
        write_shards(open_source(tmp_path / "x.tar"), tmp_path / "out")
    assert not (tmp_path / "out").exists()

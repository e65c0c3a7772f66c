"""The order of samples, their randomness, broken ones, and what reaches the device."""

from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import seen, start
from PIL import Image

from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import data_statistics, plain_batches
from patchmine.data.randomness import epoch_order
from patchmine.data.settings import InputSettings
from patchmine.data.sources.contract import Labels
from patchmine.data.views.images import PlainView, TrainView
from patchmine.data.views.normalise import normalise
from patchmine.errors import UserError
from patchmine.types import Batch

pytestmark = pytest.mark.bitwise

VIEW = TrainView(seen(8))
PLAIN = PlainView(seen(8), None, "bicubic")


class Images:
    """Images of one grey level each: item number n is n everywhere, so pixels tell which item they
    came from.
    """

    name = "images"
    fingerprint = "images"

    def __init__(self, length: int = 32, broken: tuple[int, ...] = (), channels: int = 3) -> None:
        self.length, self.broken, self.channels = length, frozenset(broken), channels

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> Any:
        if index in self.broken:
            raise OSError(f"input/output error {index}")
        return np.full((16, 20, self.channels), index % 256, np.uint8)

    def path(self, index: int) -> str:
        return f"folder/{index}.png"

    def labels(self) -> Labels | None:
        return None


class Noise(Images):
    """Images whose crops all differ."""

    def read(self, index: int) -> Any:
        super().read(index)
        return np.random.default_rng(index).integers(0, 256, (16, 20, 3), dtype=np.uint8)


def train(source: Images, view: TrainView = VIEW, **settings: Any) -> list[Batch]:
    return list(start(source, view, **settings))


def same(left: Batch, right: Batch) -> bool:
    sides = [(batch.views[0], batch.index, batch.box, batch.flip) for batch in (left, right)]
    return all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(*sides, strict=True))


def test_every_item_is_seen_once_in_an_epoch_and_in_another_order_in_the_next() -> None:
    batches = train(Images())
    epochs = [torch.cat([batch.index for batch in batches[start : start + 4]]) for start in (0, 4)]
    for order in epochs:
        assert sorted(order.tolist()) == list(range(32))
    assert not torch.equal(*epochs)
    assert epochs[0].tolist() == epoch_order(0, 0, 32).tolist()
    for batch in batches:
        assert torch.equal(batch.views[0][:, 0, 0, 0].long(), batch.index)
        assert batch.views[0].shape == (8, 3, 8, 8)
        assert batch.views[0].is_contiguous()
        assert batch.box.shape == (8, 4)
        assert batch.flip.dtype == torch.bool


def test_the_last_partial_batch_is_dropped() -> None:
    batches = train(Images(35))
    assert [len(batch) for batch in batches] == [8] * 8
    assert len(set(torch.cat([batch.index for batch in batches[:4]]).tolist())) == 32


@pytest.mark.parametrize("start", [1, 3, 4, 7])
def test_a_resumed_run_repeats_itself(start: int) -> None:
    whole, rest = train(Noise()), train(Noise(), start_step=start)
    assert len(rest) == 8 - start
    assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


@pytest.mark.parametrize("broken", [(), (3, 17)])
def test_workers_change_nothing(broken: tuple[int, ...]) -> None:
    alone, bad_alone = BadFiles(None, 0.5), BadFiles(None, 0.5)
    source = Noise(broken=broken)
    assert all(
        same(a, b)
        for a, b in zip(
            train(source, bad=alone), train(source, workers=2, bad=bad_alone), strict=True
        )
    )
    assert len(alone) == len(bad_alone) == len(broken)


def test_seeds_and_epochs_give_other_crops_of_the_same_item() -> None:
    def boxes(seed: int) -> dict[tuple[int, int], list[float]]:
        found = {}
        for step, batch in enumerate(train(Noise(), seed=seed)):
            found |= {
                (step // 4, int(i)): box.tolist()
                for i, box in zip(batch.index, batch.box, strict=True)
            }
        return found

    first, second = boxes(0), boxes(1)
    assert len(first) == 64
    assert all(first[key] != second[key] for key in first)
    assert all(first[0, item] != first[1, item] for item in range(32))


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 4), (2, 2)])
def test_processes_and_micro_batches_share_the_rows_of_one_batch(
    world: int, accumulate: int
) -> None:
    whole = train(Noise())
    ranks = [
        train(Noise(), rank=rank, world_size=world, accumulate=accumulate) for rank in range(world)
    ]
    assert all(len(batches) == 8 * accumulate for batches in ranks)
    for step, batch in enumerate(whole):
        parts = [
            ranks[rank][step * accumulate + micro]
            for micro in range(accumulate)
            for rank in range(world)
        ]
        assert torch.equal(torch.cat([part.index for part in parts]), batch.index)
        assert torch.equal(torch.cat([part.views[0] for part in parts]), batch.views[0])


def test_starting_a_loader_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train(Images())
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(
        UserError, match=r"batch_size=64 is more than the 32 images of images; set batch_size=32 or"
    ):
        start(Images(), VIEW, batch_size=64, steps_per_epoch=1, total_steps=1)
    with pytest.raises(
        UserError,
        match=r"batch_size=8 cannot .* 3 processes x accumulate=1: start 2 or 4 .* multiple of 3$",
    ):
        train(Images(), world_size=3)
    with pytest.raises(ValueError, match="5 steps of 8 images"):
        train(Images(), steps_per_epoch=5)


# Broken items
# ---------------------------------------------------------------------------------------------------------


def test_broken_items_are_replaced_the_same_way_every_time(tmp_path: Path) -> None:
    source, bad = Images(broken=(3, 17)), BadFiles(tmp_path / "bad_files.txt", 0.5)
    batches = train(source, bad=bad)
    again = train(source, bad=BadFiles(None, 0.5))
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))
    seen = torch.cat([batch.index for batch in batches])
    assert not set(seen.tolist()) & {3, 17}
    assert len(seen) == 64
    healthy = train(Images())
    kept = torch.cat([batch.index for batch in healthy]) == seen
    assert kept.sum() == 60  # the other rows are what they were
    lines = (
        (tmp_path / "bad_files.txt").read_text().splitlines()
    )  # once each, although they are met in two epochs
    assert sorted(lines) == [
        f"folder/{n}.png\tcannot be read (input/output error {n})" for n in (17, 3)
    ]


def test_a_resumed_run_lists_no_file_twice(tmp_path: Path) -> None:
    path = tmp_path / "bad_files.txt"
    for first in (0, 4):
        train(Images(broken=(3,)), bad=BadFiles(path, 0.5), start_step=first)
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_items_stop_the_run(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "bad_files.txt"
    source = Images(200, broken=tuple(range(0, 200, 2)))
    with pytest.raises(UserError, match=r"max_bad_share=0\.05") as caught:
        train(source, bad=BadFiles(path, 0.05), steps_per_epoch=25, workers=workers)
    message = str(caught.value)
    assert str(path) in message
    assert "cannot be read (input/output error" in message
    assert "Traceback" not in message
    assert len(path.read_text().splitlines()) < 40  # long before the end of the epoch


@pytest.mark.parametrize("workers", [0, 1])
def test_what_libjpeg_warns_of_is_not_shown(workers: int, capfd: Any) -> None:
    """It names no file; a data set's own words are its own."""
    stored = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stored, "JPEG")
    damaged = bytearray(stored.getvalue())
    middle = len(damaged) // 2
    damaged[middle : middle + 8] = b"\xff\xd9\x00\x11\x22\x33\x44\x55"

    class Damaged(Images):
        def read(self, index: int) -> Any:
            sys.stderr.write("a user's own words")
            return bytes(damaged)

    bad = BadFiles(None, 0.5)
    train(Damaged(), workers=workers, bad=bad)
    said = capfd.readouterr().err
    assert len(bad) == 0
    assert "a user's own words" in said
    assert "Corrupt JPEG data" not in said


def test_a_share_below_the_limit_never_stops_a_run() -> None:
    generator = np.random.default_rng(0)
    for seed in range(20):
        broken = tuple(int(n) for n in generator.permutation(400)[:20])  # 5 % precisely
        bad = BadFiles(None, 0.05)
        train(Images(400, broken), seed=seed, steps_per_epoch=50, total_steps=50, bad=bad)
        assert len(bad) == 20


def test_the_limit_is_strict_in_the_end() -> None:
    with pytest.raises(UserError, match=r"21 of the \d+ images of images tried so far"):
        train(
            Images(400, tuple(range(21))),
            steps_per_epoch=50,
            total_steps=50,
            bad=BadFiles(None, 0.05),
        )
    with pytest.raises(UserError, match=r"max_bad_share=0\.0 "):
        train(Images(400, (7,)), steps_per_epoch=50, total_steps=50, bad=BadFiles(None, 0.0))


@pytest.mark.parametrize("share", [0.05, 1.0])
@pytest.mark.parametrize("workers", [0, 1])
def test_when_everything_is_broken_it_stops_at_once(share: float, workers: int) -> None:
    with pytest.raises(
        UserError, match=r"folder/\d+\.png, which cannot be read \(input/output error"
    ):
        train(Images(broken=tuple(range(32))), bad=BadFiles(None, share), workers=workers)


def test_wrong_channels_end_with_the_remedy() -> None:
    with pytest.raises(UserError, match="has 13 channels where the run expects 3; set channels=13"):
        train(Images(channels=13))


class Mistaken(Images):
    def read(self, index: int) -> Any:
        raise UserError("the shard a.tar is gone")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_mistake_in_a_worker_stays_one_sentence(workers: int) -> None:
    with pytest.raises(UserError, match=r"^the shard a\.tar is gone$"):
        train(Mistaken(), workers=workers)
    with pytest.raises(UserError, match=r"^the shard a\.tar is gone$"):
        list(plain_batches(Mistaken(), PLAIN, batch_size=8, workers=workers))


def test_names_with_odd_characters_keep_one_line_each(tmp_path: Path) -> None:
    class Odd(Images):
        def path(self, index: int) -> str:
            return f"a\nb\t{index}\udcff.png"  # as Path gives out a name that is no UTF-8

    bad = BadFiles(tmp_path / "bad.txt", 1.0)
    for _ in range(2):
        BadFiles(tmp_path / "bad.txt", 1.0).note(Odd(), 8, [(1, "is broken")])
    bad.note(Odd(), 8, [(1, "is broken")])
    assert (tmp_path / "bad.txt").read_bytes().count(
        b"\n"
    ) == 2  # `bad` had read the list before it was written


# Evaluation
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_plain_batches_come_in_order(workers: int) -> None:
    batches = list(plain_batches(Images(20), PLAIN, batch_size=8, workers=workers))
    assert [batch.index.tolist() for batch in batches] == [
        [*range(8)],
        [*range(8, 16)],
        [*range(16, 20)],
    ]
    chosen = list(
        plain_batches(Images(20), PLAIN, batch_size=2, indices=[7, 3, 3], workers=workers)
    )
    assert [batch.index.tolist() for batch in chosen] == [[7, 3], [3]]
    assert torch.equal(chosen[0].views[0][:, 0, 0, 0], torch.tensor([7, 3], dtype=torch.uint8))
    assert not list(plain_batches(Images(20), PLAIN, batch_size=2, indices=[], workers=workers))


def test_plain_batches_leave_broken_items_out_or_name_them() -> None:
    source, bad = Images(20, broken=(0, 1, 2, 3, 9)), BadFiles(None, 0.5)
    batches = list(plain_batches(source, PLAIN, batch_size=4, bad=bad))
    assert torch.cat([batch.index for batch in batches]).tolist() == [4, 5, 6, 7, 8, *range(10, 20)]
    assert len(bad) == 5
    with pytest.raises(UserError, match=r"^folder/0\.png cannot be read \(input/output error 0\)$"):
        list(plain_batches(source, PLAIN, batch_size=4))


def test_bytes_and_deeper_images_share_a_batch() -> None:
    class Mixed(Images):
        def read(self, index: int) -> Any:
            return (
                np.full((8, 8), 65535, np.uint16) if index % 2 else np.full((8, 8, 3), 51, np.uint8)
            )

    (batch,) = plain_batches(Mixed(4), PLAIN, batch_size=4)
    assert batch.views[0][:, 0, 0, 0].tolist() == pytest.approx([0.2, 1, 0.2, 1])


# The device's part
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 3, 2, 5, 6)], ids=["images", "clips"])
def test_normalise_mirrors_and_scales(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    views = pixels if dtype == torch.uint8 else pixels.float() / 255
    kept = views.clone()
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    flip = torch.tensor([True, False, False, True])
    batch = Batch([views], torch.arange(4), torch.zeros(4, 4), flip)
    got = normalise(batch, mean, std, "cpu").views[0]
    for row in range(4):
        for channel in range(3):
            plane = pixels[row, channel].double() / 255
            expected = ((plane.flip(-1) if flip[row] else plane) - mean[channel]) / std[channel]
            assert torch.allclose(got[row, channel].double(), expected, atol=1e-6)
    assert torch.equal(views, kept)


def test_statistics_are_those_of_the_pixels() -> None:
    source = Noise(30, broken=(4,))
    mean, std = data_statistics(source, InputSettings())
    pixels = np.stack([source.read(n) for n in range(30) if n != 4]).reshape(-1, 3) / 255
    assert torch.allclose(mean.double(), torch.from_numpy(pixels.mean(0)), atol=1e-6)
    assert torch.allclose(std.double(), torch.from_numpy(pixels.std(0)), atol=1e-6)
    assert (
        data_statistics(Images(5, channels=13), InputSettings(channels=13), sample=1)[1].tolist()
        == [1.0] * 13
    )  # constant
    with pytest.raises(UserError, match=r"none of the 5 items .* set channels=13"):
        data_statistics(Images(5, channels=13), InputSettings())


# Processes
# ------------------------------------------------------------------------------------------------------------


def test_abandoned_workers_end() -> None:
    before = set(child_processes(os.getpid()))  # a test before may have left some of torch's
    batches = start(Images(), VIEW, total_steps=10**9, workers=2, bad=BadFiles(None, 0))
    next(batches)
    children = set(child_processes(os.getpid())) - before
    assert len(children) >= 2
    del batches
    gc.collect()
    assert not children & set(child_processes(os.getpid()))


def test_workers_end_when_a_run_is_stopped_although_its_error_lives_on() -> None:
    before = set(child_processes(os.getpid()))
    with pytest.raises(UserError) as caught:
        train(Mistaken(), workers=2)
    assert set(child_processes(os.getpid())) <= before
    assert caught.value.__traceback__ is not None


def child_processes(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(entry.name))
    return found


PROGRAM = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from test_data_loader import VIEW, BadFiles, Images, start

stop = []
number = getattr(signal, sys.argv[2])
signal.signal(number, lambda *_: stop.append(1))
batches = start(Images(), VIEW, total_steps=10**9, workers=2, bad=BadFiles(None, 0))
after = 0
for step, batch in enumerate(batches):
    if step == 3:
        os.killpg(0, number)  # what a terminal does at Ctrl-C: every process of the group gets it
    after += bool(stop)
    if after == 50:
        break
del batches
print("finished cleanly")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_to_the_group_reaches_the_main_process_only(number: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), number],
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
        check=False,
    )
    assert done.stdout == "finished cleanly\n", done.stderr
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.gpu
def test_batches_are_pinned_and_workers_start_beside_cuda() -> None:
    torch.zeros(1, device="cuda")
    batches = train(Noise(), workers=2, device=torch.device("cuda"))
    assert all(batch.views[0].is_pinned() and batch.box.is_pinned() for batch in batches)
    mean, std = torch.full((3,), 0.5, device="cuda"), torch.full((3,), 0.2, device="cuda")
    for ours, plain in zip(batches, train(Noise()), strict=True):
        on_device = normalise(ours, mean, std, "cuda").views[0]
        assert torch.allclose(
            on_device.cpu(), normalise(plain, mean.cpu(), std.cpu(), "cpu").views[0], atol=1e-5
        )


def test_memory_does_not_grow_with_the_length_of_a_run() -> None:
    """Of a run of a thousand million steps nothing but the next few exists."""
    batches = start(Images(), VIEW, start_step=10**8, total_steps=10**9, bad=BadFiles(None, 0))
    sizes = []
    for _ in range(2):
        counted = Counter(len(batch) for batch in islice(batches, 50))
        assert counted == {8: 50}
        gc.collect()
        sizes.append(len(gc.get_objects()))
    assert sizes[1] - sizes[0] < 100

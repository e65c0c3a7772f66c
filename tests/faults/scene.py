"""The smallest run that has everything: what the campaigns damage, kill and interrupt."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tarfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

STEPS = 8
SETTINGS = (
    *(
        "model=vit_tiny_patch16_224",
        "model_args={depth: 1, embed_dim: 16, num_heads: 2}",
        "image_size=16",
    ),
    *(
        "patch_size=8",
        "method.decoder_embed_dim=16",
        "method.decoder_depth=1",
        "method.decoder_num_heads=2",
    ),
    *(
        "batch_size=4",
        f"steps={STEPS}",
        "warmup_epochs=0",
        "checkpoint_every=2",
        "log_every=1",
        "tensorboard=false",
    ),
    *("device=cpu", "sample_every=4"),
)
IMAGES = 12
WAIT = 120.0  # seconds for a command that takes one


PIPES: list[int] = []
"""Handles that a child must not keep: who reads from a pipe waits until all who could write to it
have ended.
"""


def preload() -> None:
    """Import, before anything is forked, what every child would import by itself; no threads are
    started.
    """
    torch.set_num_threads(1)
    import timm
    import torchvision

    import patchmine.cli.app
    import patchmine.evaluate.evaluated
    import patchmine.report.page
    import patchmine.runs.exporting
    import patchmine.runs.transfer
    import patchmine.training

    Image.init()
    with suppress(ImportError):
        import av  # noqa: F401
    del timm, torchvision, patchmine


def make_images(folder: Path) -> Path:
    """Noise as PNG files; noise tells weights of one order of images from those of another."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code (negative: by which signal) and what it printed; None: it
    had to be ended.
    """

    code: int | None
    output: str


class Child:
    """A forked process that runs one `patchmine` command, in a session of its own and with its
    output in a file.
    """

    def __init__(
        self, words: Sequence[str], log: Path, *, prepare: Callable[[], None] = lambda: None
    ) -> None:
        self.log = log
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of a fork beside threads, which torch holds idle
            self.pid = os.fork()
        if self.pid == 0:
            os._exit(_run(words, log, prepare))

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; a child that has ended already is left alone."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> Ended:
        """How it ended; after ``seconds`` it is killed and the code is None."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return Ended(os.waitstatus_to_exitcode(status), self.said())
            time.sleep(0.01)
        self.kill()
        os.waitpid(self.pid, 0)
        return Ended(None, self.said())

    def running(self) -> bool:
        """Whether it has not ended; its exit code is still there for `wait`."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def _run(words: Sequence[str], log: Path, prepare: Callable[[], None]) -> int:
    """The child: the command line as `patchmine` would run it; returns the exit code."""
    code = 70
    try:
        os.setsid()
        for number in PIPES:
            os.close(number)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for number, target in ((null, 0), (handle, 1), (handle, 2)):
            os.dup2(number, target)
        sys.stdout = sys.stderr = open(  # noqa: SIM115
            handle, "w", encoding="utf-8", errors="backslashreplace", closefd=False
        )
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(
                number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            )
        prepare()
        from patchmine.cli.app import app

        app(list(words), prog_name="patchmine")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001, printed as the interpreter would
        traceback.print_exc()
        code = 1
    finally:
        with suppress(Exception):
            sys.stdout.flush()
    return code


@dataclass(frozen=True)
class Scene:
    """A run that is to be interrupted and what it is compared with.

    ``words``: data and settings; ``whole``: the folder of the uninterrupted run; ``seconds``: how
    long that took; ``scratch``: where others are made.
    """

    name: str
    words: tuple[str, ...]
    whole: Path
    seconds: float
    scratch: Path
    seed: int

    def pretrain(self, out: Path, *more: str) -> list[str]:
        """The command that makes the run in another folder."""
        return ["pretrain", *self.words, f"out={out}", *more]

    def go_on(self, out: Path, log: Path, *more: str) -> Child:
        """What a person types after an interruption: resume, or the first command where no run was
        made yet.
        """
        if (out / "config.yaml").exists():
            return Child(["resume", str(out), *more], log)
        return Child(self.pretrain(out, *more), log)


def make_scene(name: str, words: Sequence[str], room: Path, seed: int) -> Scene:
    """Make the uninterrupted run, twice, so that its time is that of a machine which has read
    everything once.
    """
    whole, log, seconds = room / f"whole-{name}", room / f"whole-{name}.log", 0.0
    for _ in range(2):
        shutil.rmtree(whole, ignore_errors=True)
        log.unlink(missing_ok=True)
        began = time.monotonic()
        ended = Child(["pretrain", *words, f"out={whole}", "workers=0"], log).wait(WAIT)
        seconds = time.monotonic() - began
        if ended.code != 0:
            raise RuntimeError(f"the uninterrupted run {name} failed: {last_lines(ended.output)}")
    return Scene(name, tuple(words), whole, seconds, room, seed)


def scenes_of(room: Path, seed: int) -> list[Scene]:
    """Runs of different kinds; the first is the simplest."""
    images = make_images(room / "images")
    shards = make_shards(images, room / "shards")
    video = (
        "model=video_vit_tiny_patch16",
        "clip.frames=4",
        "clip.stride=1",
        "clip.tubelet=2",
        "clip.repeats=2",
    )
    crops = ("crops.num_local=2", "crops.local_size=8")
    heads = (
        *(
            "method.out_dim=16",
            "method.head_hidden=16",
            "method.head_bottleneck=8",
            "method.stage_out_dim=8",
        ),
        *("method.stage_hidden=16", "method.stage_bottleneck=8"),
    )
    kinds = {
        "mae": (f"data={images}", *SETTINGS),
        "hpm-on-shards": (f"data={shards}", "method=hpm", "accumulate=2", *SETTINGS),
        "scfs": (
            f"data={images}",
            "method=scfs",
            *crops,
            *heads,
            *(w for w in SETTINGS if "decoder" not in w),
        ),
        "clips": (f"data={make_frames(room / 'frames')}", *SETTINGS, *video),
    }
    return [make_scene(name, words, room, seed) for name, words in kinds.items()]


def make_shards(images: Path, folder: Path) -> Path:
    """The same images in a tar archive."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "shard-000000.tar", "w") as archive:
        for path in sorted(images.iterdir()):
            archive.add(path, path.name)
    return folder


def make_frames(folder: Path) -> Path:
    """Videos as folders of frames."""
    for number in range(IMAGES):
        make_images(folder / f"{number:02d}")
    return folder


def last_lines(text: str, count: int = 3) -> str:
    """The end of what a child said, in one line."""
    return " | ".join(line.strip() for line in text.strip().splitlines()[-count:])[-300:]

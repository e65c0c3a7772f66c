"""How commands speak and how they end: messages and exit codes."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from click.exceptions import Exit

from patchmine.errors import UserError
from patchmine.system.disk import refusal

USER_ERROR, INTERRUPTED, NO_READER = 2, 130, 141


def say(text: str) -> None:
    """For a person, apart from what a command gives; nobody need be there to hear it any more."""
    if "PATCHMINE_STARTED_BY" in os.environ:
        return  # the process that started this one says it
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def say_once(text: str) -> None:
    """The same, where a launcher started several of this program, from one on each machine."""
    from patchmine.train.launch import read_launch

    try:
        speaks = read_launch(os.environ).speaks
    except UserError:  # which the work tells
        speaks = True
    if speaks:
        say(text)


@contextmanager
def ended_in_words() -> Iterator[None]:
    """Around a command: what the user can mend ends it with one sentence and exit code 2.

    Ctrl-C ends it with one line, and a reader that left (``patchmine list models | head -1``) in
    silence.
    """
    try:
        yield
    except UserError as error:
        say(str(error))
        raise Exit(USER_ERROR) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            raise Exit(NO_READER) from None
        say(refusal(error))
        raise Exit(USER_ERROR) from None
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        say(_memory_sentence(error))
        raise Exit(USER_ERROR) from None
    except KeyboardInterrupt:
        say("Interrupted.")
        raise Exit(INTERRUPTED) from None


def _out_of_memory(error: Exception) -> bool:
    """Whether a GPU or this machine had no room for a tensor; torch is not imported to ask."""
    of_gpu = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    return isinstance(error, MemoryError | of_gpu) or "DefaultCPUAllocator" in str(error)


def _memory_sentence(error: Exception) -> str:
    """What ran out and what needs less; of torch's own lines the first says how much."""
    first, *_ = str(error).splitlines() or [""]
    wanted = re.search(r"(?:[Tt]ried to|Unable to) allocate ([\d.]+ ?\w+)", first)
    amount = f" ({wanted[1]} asked for)" if wanted else ""
    return (
        f"The memory ran out{amount}: take a smaller batch_size, image_size or model; in training "
        "accumulate=2 makes a step in two parts. Checkpoints that were written are whole."
    )


@contextmanager
def last_words() -> Iterator[None]:
    """Around the program: the rest is written now, not by a dying interpreter that complains."""
    try:
        yield
    except SystemExit as ending:
        if ending.code == INTERRUPTED:  # an impatient third Ctrl-C leaves no traceback
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise
    except KeyboardInterrupt:  # while the commands were still being made
        say("Interrupted.")
        raise SystemExit(INTERRUPTED) from None
    finally:
        _flush()


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # else Python tries, and complains, again
        if isinstance(error, BrokenPipeError):
            raise SystemExit(NO_READER) from None
        error.filename = "standard output"
        say(refusal(error))
        raise SystemExit(USER_ERROR) from None


def _reader_left() -> bool:
    """Whether it was our own output that broke, and not a pipe to some other process."""
    try:
        watch = select.poll()
        watch.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in watch.poll(0))
    except (OSError, ValueError):
        return False

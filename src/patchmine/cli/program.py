"""How commands are made and how they end: a group, one that takes its words as they are, messages,
exit codes.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer

from patchmine.disk import refusal
from patchmine.errors import UserError

USER_ERROR, INTERRUPTED, NO_READER = 2, 130, 141


def typer_group(help_text: str, **more: Any) -> typer.Typer:
    """A group of commands in plain text."""
    return typer.Typer(
        help=help_text,
        options_metavar="",
        no_args_is_help=True,
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
        **more,
    )


def command(
    group: typer.Typer, name: str, usage: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that gets its words as they are, "--epochs 3" too, so that it can say how that is
    written here.
    """
    take_all = {
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": ["--help", "-h"],
    }
    return group.command(name, options_metavar=usage, context_settings=take_all)


def say(text: str) -> None:
    """For a person, apart from what a command gives.  A run goes on when nobody is there to hear it
    any more.
    """
    if "PATCHMINE_STARTED_BY" in os.environ:
        return  # the process that started this one says it
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


@contextmanager
def ended_in_words() -> Iterator[None]:
    """Around a command: what the user can mend ends it with one sentence and exit code 2, Ctrl-C
    with one line.

    A reader that left (``patchmine list models | head -1``) ends it in silence.
    """
    try:
        yield
    except UserError as error:
        say(str(error))
        raise typer.Exit(USER_ERROR) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            raise typer.Exit(NO_READER) from None
        say(refusal(error))
        raise typer.Exit(USER_ERROR) from None
    except KeyboardInterrupt:
        say("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def last_words() -> Iterator[None]:
    """Around the program: what is still to be written is written now, and not by a dying
    interpreter that complains.
    """
    try:
        yield
    except SystemExit as ending:
        if ending.code == INTERRUPTED:
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # an impatient third Ctrl-C leaves no traceback
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
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # else Python tries, and complains, again
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

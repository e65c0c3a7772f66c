"""The one exception that means: the user can mend this.  The command line prints its sentence and exits with 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

REASON_LENGTH = 160  # characters of a foreign message that one of our sentences quotes


class UserError(Exception):
    """A mistake in settings, files or folders.  The message names the setting or file and the remedy."""


def reason_of(error: BaseException) -> str:
    """What an exception of another library says, as one printable line for use inside a sentence."""
    text = " ".join(str(error).split(" <_io.BytesIO")[0].split())  # PIL adds the address of its buffer
    text = "".join(letter if letter.isprintable() else "?" for letter in text) or type(error).__name__
    return text if len(text) <= REASON_LENGTH else text[: REASON_LENGTH - 3] + "..."


@contextmanager
def foreign_parser(refuse: Callable[[str], Exception], *own: type[Exception]) -> Iterator[None]:
    """The boundary around a parser of another library: whatever it raises becomes the one error of the caller's room.

    A parser that is fed a damaged file raises what it likes (struct.error, AssertionError, RecursionError,
    ModuleNotFoundError for a codec), so no list of exceptions is ever complete.  This is the one place where a broad
    ``except`` is right.

    Args:
        refuse: makes that error from the reason, a line of text.
        own: exceptions that already are sentences of the caller's, and pass as they are; UserError always does.

    Raises:
        Exception: what ``refuse`` makes, chained to the parser's own.
    """
    passing: tuple[type[Exception], ...] = (UserError, *own)
    try:
        yield
    except passing:
        raise
    except Exception as error:
        raise refuse(reason_of(error)) from error

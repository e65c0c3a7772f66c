"""What reaches the user: the one exception, names as text, and who hears what happens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

REASON_LENGTH = 160  # characters of a foreign message that one of our sentences quotes
NAME_LENGTH = 200  # characters; a longer name keeps its beginning and its end

Say = Callable[[str], None]
"""Hears, in sentences, what a person should know."""


def silent(_: str) -> None:
    """Hears and says nothing: the default of library functions."""


class UserError(Exception):
    """An error in settings, files or folders; the message names it, its value and the remedy."""


def reason_of(error: BaseException) -> str:
    """What an exception of another library says, as one printable line inside a sentence."""
    text = str(error).split(" <_io.BytesIO")[0]  # PIL adds the address of its buffer
    text = " ".join(text.split())
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    text = text or type(error).__name__
    return text if len(text) <= REASON_LENGTH else text[: REASON_LENGTH - 3] + "..."


@contextmanager
def foreign_parser(refuse: Callable[[str], Exception], *own: type[Exception]) -> Iterator[None]:
    """Around a parser of another library: whatever it raises becomes one error of the caller's.

    A parser that is fed a damaged file raises what it likes (struct.error, AssertionError,
    RecursionError, ModuleNotFoundError for a codec), so no list of exceptions is ever complete.
    This is the one place where a broad ``except`` is right.

    Args:
        refuse: makes that error from the reason, a line of text.
        own: exceptions that already are sentences of the caller's and pass, as UserError does.

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


@contextmanager
def settings_of(file: str | os.PathLike[str]) -> Iterator[None]:
    """Around what is built of the settings in a file: a UserError begins with the file's name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{shown_name(file)}: {error}") from error


def shown_name(name: str | os.PathLike[str]) -> str:
    r"""A file's name as one line that any terminal, file and page can hold.

    Bytes that are no UTF-8 (which Python keeps as lone surrogates) and control characters are
    written as ``\xe9`` and ``\n``; a name beyond ``NAME_LENGTH`` characters loses its middle.
    """
    text = whole_name(name)
    if len(text) > NAME_LENGTH:
        end = (NAME_LENGTH - 3) // 2
        text = text[: NAME_LENGTH - 3 - end] + "..." + text[-end:]
    return text


def whole_name(name: str | os.PathLike[str]) -> str:
    """The same at any length, for tables that other programs read."""

    def escaped(letter: str) -> str:
        code = ord(letter)
        if 0xDC80 <= code <= 0xDCFF:  # a byte that os.fsdecode could not read
            return f"\\x{code - 0xDC00:02x}"
        return letter.encode("unicode_escape", "backslashreplace").decode("ascii")

    return "".join(
        letter if letter.isprintable() else escaped(letter) for letter in os.fspath(name)
    )

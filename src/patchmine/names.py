"""How names of files and archive members leave the program: in messages, lists, tables, reports."""

from __future__ import annotations

import os

NAME_LENGTH = 200  # characters; a longer name keeps its beginning and its end


def shown_name(name: str | os.PathLike[str]) -> str:
    r"""A file's name as text that any terminal, file and page can hold, in one line.

    Bytes that are no UTF-8 (which Python keeps as lone surrogates) and control characters are written as ``\xe9`` and
    ``\n``; a name beyond ``NAME_LENGTH`` characters loses its middle.  Names without such letters stay as they are.
    """
    text = whole_name(name)
    if len(text) > NAME_LENGTH:
        end = (NAME_LENGTH - 3) // 2
        text = text[: NAME_LENGTH - 3 - end] + "..." + text[-end:]
    return text


def whole_name(name: str | os.PathLike[str]) -> str:
    """The same at any length, for tables that other programs read."""
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in os.fspath(name))


def _escaped(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that os.fsdecode could not read
        return f"\\x{code - 0xDC00:02x}"
    return letter.encode("unicode_escape", "backslashreplace").decode("ascii")

"""Names and foreign messages as they leave the program."""

from __future__ import annotations

import os
import struct

import pytest

from patchmine.errors import NAME_LENGTH, UserError, foreign_parser, reason_of, shown_name


@pytest.mark.parametrize("name", ["photos/a b.png", "été.jpg", "图像/猫.png"])
def test_ordinary_names_stay(name: str) -> None:
    assert shown_name(name) == name


def test_bytes_that_are_no_text_and_control_letters_are_escaped() -> None:
    assert shown_name(os.fsdecode(b"caf\xe9.png")) == "caf\\xe9.png"
    assert shown_name("a\nb\x00\x1b[31m.png") == "a\\nb\\x00\\x1b[31m.png"
    shown_name("lone \ud800 surrogate").encode()


def test_a_long_name_keeps_its_ends() -> None:
    shown = shown_name("begin" + "x" * 300 + "end.png")
    assert len(shown) == NAME_LENGTH
    assert shown.startswith("begin")
    assert shown.endswith("end.png")


def test_whatever_a_parser_raises_becomes_one_error() -> None:
    for error in (
        struct.error("bad\nheader"),
        RecursionError(),
        ModuleNotFoundError("no codec"),
        AssertionError(),
    ):
        with (
            pytest.raises(UserError, match="cannot be read"),
            foreign_parser(lambda r: UserError(f"cannot be read ({r})")),
        ):
            raise error
    with pytest.raises(UserError, match="own"), foreign_parser(UserError):
        raise UserError("own")
    with pytest.raises(KeyError), foreign_parser(UserError, KeyError):
        raise KeyError("passes")
    with pytest.raises(KeyboardInterrupt), foreign_parser(UserError):
        raise KeyboardInterrupt


def test_a_reason_is_one_short_line() -> None:
    assert reason_of(ValueError("two\nlines")) == "two lines"
    assert reason_of(AssertionError()) == "AssertionError"
    assert len(reason_of(ValueError("x" * 1000))) == 160
    assert (
        reason_of(OSError("cannot identify image file <_io.BytesIO object at 0x7f>"))
        == "cannot identify image file"
    )

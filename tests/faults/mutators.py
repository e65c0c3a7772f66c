"""Ways to damage a file: each takes its bytes and a random generator and returns others.

A mutator knows nothing of a format; those that keep a format's checksums right, so that the damage
reaches further than the first comparison, are in `containers`.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable

Mutator = Callable[[bytes, random.Random], bytes]

EXTREMES = (
    0,
    -1,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
HEAD = 512  # bytes at the start of a file, where most formats keep their sizes
DEEP = 100_000

# What a grammar allows and a reader may not expect, in the place of a number, a word or a text.
WORDS = (
    *(
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e400",
        b"-1e400",
        b"9" * 400,
        b"1" + b"0" * 5000,
        b"-0",
        b"0x10",
        b"1_000",
    ),
    *(
        b"9223372036854775807",
        b"9223372036854775808",
        b"4294967296",
        b"-1",
        b"0",
        b"1e-400",
        b"1e308",
        b"0.1e999999999",
    ),
    *(
        b"null",
        b"true",
        b"[]",
        b"{}",
        b"[[]]",
        b'""',
        b'"\\ud800"',
        b'"\\u0000"',
        b"''",
        b"~",
        b"2001-01-01",
        b"1:30:00",
    ),
    *(
        b"\x00",
        b"\xff\xfe",
        b"\xc3\x28",
        b"\xed\xa0\x80",
        b"\xf0\x9f\x98\x80",
        b"\xef\xbb\xbf",
        b"\t",
        b"\r\n",
        b"\x1b[31m",
    ),
    *(
        b"../../../../etc/passwd",
        b"/dev/zero",
        b"/dev/stdin",
        b"x" * 10_000,
        b"a/" * 3_000,
        b"%s%n",
        b"*x",
        b"&x [*x]",
    ),
    *(
        b"!!python/object/apply:os.system [touch CANARY]",
        b"!!python/name:os.system",
        b"!!binary AAAA",
        b"!!set {a, b}",
    ),
    *(
        b"<<: *x",
        b"? [a]",
        b"--- a",
        b"%YAML 9.9",
        b"!include x",
        b"| 9",
        b"{a: {b: {c: 1}}}",
        b"[1, [2, [3]]]",
        b"@",
        b"`",
    ),
)
NESTS = ((b"[", b"]"), (b'{"a":', b"}"), (b"{a: ", b"}"), (b"- ", b""), (b"(", b")"))


def flip_bits(data: bytes, chance: random.Random) -> bytes:
    """A few bits anywhere, more often near the start."""
    changed = bytearray(data or b"\0")
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        changed[_place(changed, chance)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, chance: random.Random) -> bytes:
    """A run of bytes by noise, zeros or ones."""
    start, length = _place(data, chance), chance.choice((1, 2, 4, 16, 64, 512))
    kind = chance.randrange(3)
    run = chance.randbytes(length) if kind == 0 else (b"\0", b"\xff")[kind - 1] * length
    return data[:start] + run[: len(data) - start] + data[start + length :]


def truncate(data: bytes, chance: random.Random) -> bytes:
    """The beginning of the file, now and then nothing."""
    return data[
        : chance.choice(
            (0, 1, _place(data, chance), chance.randrange(len(data) + 1), max(0, len(data) - 1))
        )
    ]


def extend(data: bytes, chance: random.Random) -> bytes:
    """More bytes than belong there."""
    length = chance.choice((1, 3, 100, 5_000))
    tail = chance.choice((bytes(length), chance.randbytes(length), data[:length], data))
    return data + tail if chance.random() < 0.8 else tail + data


def duplicate(data: bytes, chance: random.Random) -> bytes:
    """A chunk that occurs twice, in place or elsewhere."""
    start, end = _chunk(data, chance)
    place = end if chance.random() < 0.5 else _place(data, chance)
    return data[:place] + data[start:end] + data[place:]


def delete(data: bytes, chance: random.Random) -> bytes:
    """A chunk that is gone."""
    start, end = _chunk(data, chance)
    return data[:start] + data[end:]


def extreme_integer(data: bytes, chance: random.Random) -> bytes:
    """One to eight bytes by the least, the greatest and the neighbouring integers, in either order
    of bytes.
    """
    width = chance.choice((1, 2, 4, 4, 8))
    start = min(_place(data, chance), max(0, len(data) - width))
    if chance.random() < 0.5:
        start -= start % width
    value = chance.choice(EXTREMES) % 2 ** (8 * width)
    return (
        data[:start]
        + value.to_bytes(width, chance.choice(("little", "big")))
        + data[start + width :]
    )


def nearby_integer(data: bytes, chance: random.Random) -> bytes:
    """An integer of four bytes by its double, its half or its neighbour."""
    order = chance.choice("<>")
    start = min(_place(data, chance), max(0, len(data) - 4))
    if len(data) < 4:
        return data
    (value,) = struct.unpack_from(order + "I", data, start)
    value = chance.choice((value * 2, value // 2, value + 1, value - 1, value * 256)) % 2**32
    return data[:start] + struct.pack(order + "I", value) + data[start + 4 :]


def splice(other: bytes) -> Mutator:
    """The beginning of one file and the end of another."""

    def mutate(data: bytes, chance: random.Random) -> bytes:
        start = _place(data, chance)
        return data[:start] + other[(start if chance.random() < 0.5 else _place(other, chance)) :]

    return mutate


def replace_token(data: bytes, chance: random.Random) -> bytes:
    """One number, word or quoted text by something that the grammar, or only its reader's author,
    does not expect.
    """
    tokens = [*re.finditer(rb'"(?:[^"\\]|\\.)*"|[-+.\w]+', data)]
    if not tokens:
        return chance.choice(WORDS)
    token = chance.choice(tokens)
    return data[: token.start()] + chance.choice(WORDS) + data[token.end() :]


def insert_token(data: bytes, chance: random.Random) -> bytes:
    """Such a thing beside what is there."""
    place = chance.randrange(len(data) + 1)
    return data[:place] + chance.choice(WORDS) + data[place:]


def swap_letter(data: bytes, chance: random.Random) -> bytes:
    """One digit by another digit, or one letter by another letter: still a word of the grammar."""
    letters = [*re.finditer(rb"[0-9a-z]", data)]
    if not letters:
        return flip_bits(data, chance)
    place = chance.choice(letters).start()
    others = b"0123456789" if data[place : place + 1].isdigit() else b"abcdefghijklmnopqrstuvwxyz"
    return data[:place] + bytes([chance.choice(others)]) + data[place + 1 :]


def nest(data: bytes, chance: random.Random) -> bytes:
    """Brackets within brackets, closed or not, in the place of a token or of everything."""
    left, right = chance.choice(NESTS)
    depth = chance.choice((20, 1_000, DEEP))
    deep = left * depth + b"1" + (right * depth if chance.random() < 0.7 else b"")
    tokens = [*re.finditer(rb"[-+.\w]+", data)]
    if not tokens or chance.random() < 0.3:
        return deep
    token = chance.choice(tokens)
    return data[: token.start()] + deep + data[token.end() :]


def move_line(data: bytes, chance: random.Random) -> bytes:
    """One line repeated, left out, or in another place."""
    lines = data.splitlines(keepends=True)
    if not lines:
        return data
    line = lines[chance.randrange(len(lines))]
    if chance.random() < 0.6:
        lines.remove(line)
    if chance.random() < 0.7:
        lines.insert(chance.randrange(len(lines) + 1), line)
    return b"".join(lines)


def huge_cell(data: bytes, chance: random.Random) -> bytes:
    """A cell of a table that is longer than any name, in quotation marks or not."""
    place, mark = chance.randrange(len(data) + 1), chance.choice((b"", b'"'))
    long = chance.choice((b"x", b'""', b"\n", b",", b" ")) * chance.choice((5_000, 200_000))
    return data[:place] + mark + long + mark + data[place:]


def reencode(data: bytes, chance: random.Random) -> bytes:
    """The same text as another program saves it."""
    text = data.decode("utf-8", "replace")
    encoding = chance.choice(("latin-1", "utf-16", "utf-16-le", "utf-8-sig", "utf-32", "cp037"))
    return text.encode(encoding, "replace")


def bomb(data: bytes, chance: random.Random) -> bytes:  # noqa: ARG001
    """YAML aliases of aliases: a few hundred bytes that stand for a billion items."""
    lines = [b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [b"a%d: &a%d [%s]" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 9)]
    return data + b"\n" + b"\n".join(lines) + b"\n"


BYTES: tuple[Mutator, ...] = (
    *(flip_bits, overwrite, truncate, extend, duplicate, delete),
    *(extreme_integer, extreme_integer, nearby_integer),
)
TEXT: tuple[Mutator, ...] = (
    *(replace_token, replace_token, swap_letter, swap_letter, insert_token, nest, move_line),
    *BYTES[:6],
)
TABLE: tuple[Mutator, ...] = (*TEXT, huge_cell, reencode, reencode)
YAML: tuple[Mutator, ...] = (*TEXT, bomb)


def _place(data: bytes | bytearray, chance: random.Random) -> int:
    if not data:
        return 0
    return chance.randrange(min(len(data), HEAD) if chance.random() < 0.5 else len(data))


def _chunk(data: bytes, chance: random.Random) -> tuple[int, int]:
    start = _place(data, chance)
    return start, min(len(data), start + chance.choice((1, 4, 12, 64, 512, 4096)))

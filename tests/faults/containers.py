"""Damage inside of containers whose lengths and checksums are then made right again, so that
readers go on to it.
"""

from __future__ import annotations

import io
import random
import struct
import tarfile
import warnings
import zipfile
import zlib

from mutators import BYTES, EXTREMES, TEXT, extreme_integer

_PNG, _TIFF_ENTRY = 8, 12
_TAR_FIELDS = ((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155))
_TAR_SIZES = (
    b"77777777777\0",
    b"-0000000001\0",
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b"00000000000\0",
    b"not octal!!\0",
)
_TAR_KINDS = b"\x000123456789LKxgSVM?"


def png_chunk(data: bytes, chance: random.Random) -> bytes:
    """One chunk with another body, kind or place; its length and checksum are right."""
    chunks, place = list[tuple[bytes, bytes]](), _PNG
    while place + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    number = 0 if chance.random() < 0.5 else chance.randrange(len(chunks))
    kind, body = chunks[number]
    what = chance.randrange(4)
    if what == 0:
        body = chance.choice(BYTES)(body, chance)
    elif what == 1:
        body = extreme_integer(body, chance)
    elif what == 2:
        kind = chance.choice(
            (
                b"tRNS",
                b"gAMA",
                b"iCCP",
                b"zTXt",
                b"tEXt",
                b"eXIf",
                b"acTL",
                b"PLTE",
                b"IEND",
                b"sBIT",
            )
        )
    chunks[number] = (kind, body)
    if what == 3:
        chunks.insert(chance.randrange(len(chunks)), chunks.pop(number))
    packed = [
        struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks
    ]
    return data[:_PNG] + b"".join(packed)


def tiff_entry(data: bytes, chance: random.Random) -> bytes:
    """One entry of the first directory of a TIFF with another tag, kind, count or value."""
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", data, 4)
    if start + 2 > len(data):
        return extreme_integer(data, chance)
    (count,) = struct.unpack_from(order + "H", data, start)
    entry = start + 2 + _TIFF_ENTRY * chance.randrange(max(1, count))
    offset, width = chance.choice(((0, 2), (2, 2), (4, 4), (8, 4), (8, 4), (8, 2)))
    value = chance.choice(
        (*EXTREMES, chance.randrange(2**16), 32773, 50000, 34925, 8, 5, 7)
    ) % 2 ** (8 * width)
    place = entry + offset
    return (
        data[:place] + struct.pack(order + {2: "H", 4: "I"}[width], value) + data[place + width :]
    )


def tar_header(data: bytes, chance: random.Random) -> bytes:
    """One field of one member's header; the header's checksum is right."""
    starts = [
        start
        for start in range(0, len(data) - 511, 512)
        if data[start + 257 : start + 262] == b"ustar"
    ]
    if not starts:
        return extreme_integer(data, chance)
    start = chance.choice(starts)
    header = bytearray(data[start : start + 512])
    place, width = chance.choice(_TAR_FIELDS)
    if width == 12:
        header[place : place + width] = chance.choice(_TAR_SIZES)
    elif width == 1:
        header[place] = chance.choice(_TAR_KINDS)
    else:
        header[place : place + width] = chance.choice(BYTES)(
            bytes(header[place : place + width]), chance
        )[:width].ljust(width, b"\0")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
    return data[:start] + bytes(header) + data[start + 512 :]


def tar_member(data: bytes, chance: random.Random) -> bytes:
    """An archive written anew in which one member has other contents, another name or another kind."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=out, mode="w") as new:
        members = old.getmembers()
        chosen = chance.randrange(len(members))
        for number, member in enumerate(members):
            body = old.extractfile(member)
            content = b"" if body is None else body.read()
            if number == chosen:
                what = chance.randrange(3)
                if what == 0:
                    content = chance.choice((*BYTES, *TEXT))(content, chance)
                elif what == 1:
                    member.name = chance.choice(
                        (
                            "../" + member.name,
                            "/etc/" + member.name,
                            "x" * 300 + ".jpg",
                            "a\nb.jpg",
                            ".",
                            "",
                        )
                    )
                else:
                    member.type, member.linkname = chance.choice(
                        (
                            (tarfile.SYMTYPE, member.name),
                            (tarfile.LNKTYPE, "no"),
                            (tarfile.FIFOTYPE, ""),
                            (tarfile.DIRTYPE, ""),
                        )
                    )
                member.size = len(content) if member.type == tarfile.REGTYPE else 0
            new.addfile(member, io.BytesIO(content))
    return out.getvalue()


def zip_member(data: bytes, chance: random.Random) -> bytes:
    """A zip archive written anew in which one member has other contents, a second copy, another
    name, or is gone.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = [(info.filename, old.read(info)) for info in old.infolist()]
    pickles = [number for number, (name, _) in enumerate(members) if name.endswith(".pkl")]
    number = (
        chance.choice(pickles)
        if pickles and chance.random() < 0.7
        else chance.randrange(len(members))
    )
    name, content = members[number]
    what = chance.randrange(6)
    if what < 3:
        members[number] = (name, chance.choice(BYTES)(content, chance))
    elif what == 3:
        members.pop(number)
    elif what == 4:
        members.append((name, chance.randbytes(len(content))))
    else:
        members[number] = (
            chance.choice(
                ("../x", "constants.pkl", "a/constants.pkl", name.split("/")[0], name + "\0")
            ),
            content,
        )
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as new:
        warnings.simplefilter("ignore")  # about two members of one name
        for member, content in members:
            new.writestr(member, content)
    return out.getvalue()


def zip_directory(data: bytes, chance: random.Random) -> bytes:
    """One integer of the central directory, or of the record that ends it."""
    marks = [
        place
        for mark in (b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7")
        if (place := data.find(mark)) >= 0
    ]
    if not marks:
        return extreme_integer(data, chance)
    place, width = chance.choice(marks) + chance.randrange(4, 46), chance.choice((2, 4))
    value = chance.choice(EXTREMES) % 2 ** (8 * width)
    return data[:place] + value.to_bytes(width, "little") + data[place + width :]


def safetensors_header(data: bytes, chance: random.Random) -> bytes:
    """The JSON at the start of a safetensors file as text; its length is right."""
    (length,) = struct.unpack_from("<Q", data)
    head = chance.choice(TEXT)(data[8 : 8 + length], chance)
    return struct.pack("<Q", len(head)) + head + data[8 + length :]


def npy_header(data: bytes, chance: random.Random) -> bytes:
    """The dictionary at the start of an npy file as text; its length is right."""
    (length,) = struct.unpack_from("<H", data, 8)
    head = chance.choice(TEXT)(data[10 : 10 + length], chance)
    if len(head) >= 2**16:
        return data[:6] + b"\2\0" + struct.pack("<I", len(head)) + head + data[10 + length :]
    return data[:8] + struct.pack("<H", len(head)) + head + data[10 + length :]

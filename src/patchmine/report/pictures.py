"""The part of a report that shows the pictures made during training, carried inside the page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from patchmine.errors import foreign_parser
from patchmine.report.reading import RunRecord
from patchmine.report.words import whole

MOST_PICTURES = 12
"""Per run; of more, evenly chosen ones with the first and the last among them."""

_MOST_BYTES, _MOST_PIXELS = 2**26, 2**25  # no sheet of ours comes near
_PLAIN_BYTES = 200_000  # a larger PNG is a photograph and shrinks to a tenth as WebP


def pictures_section(runs: Sequence[RunRecord]) -> str:
    """One slider per run over its pictures; nothing where there are none."""
    strips = [_strip(i, run, len(runs) > 1) for i, run in enumerate(runs) if run.samples]
    strips = [strip for strip in strips if strip]
    if not strips:
        return ""
    return '<section id="pictures"><h2>Pictures over training</h2>' + "".join(strips) + "</section>"


def choose(
    samples: Sequence[tuple[int, Path]], most: int = MOST_PICTURES
) -> list[tuple[int, Path]]:
    """At most ``most`` of the pictures, evenly spread, the first and the last included."""
    if len(samples) <= most:
        return list(samples)
    return [samples[round(k * (len(samples) - 1) / (most - 1))] for k in range(most)]


def embed(path: Path) -> tuple[str, int, int] | None:
    """A picture as a data URI with its width and height, or None for a file that is no picture."""
    try:
        with foreign_parser(_NoPictureError, _NoPictureError):
            kind, raw, (width, height) = _packed(path)
    except _NoPictureError:
        return None
    return f"data:{kind};base64,{base64.b64encode(raw).decode('ascii')}", width, height


class _NoPictureError(Exception):
    """A file that is not one of our pictures."""


def _packed(path: Path) -> tuple[str, bytes, tuple[int, int]]:
    """Kind, content and size (width first) of a picture, made small where it is a photograph."""
    if (
        not path.is_file() or path.stat().st_size > _MOST_BYTES
    ):  # opening a pipe would wait for ever
        raise _NoPictureError
    raw = path.read_bytes()
    with Image.open(io.BytesIO(raw)) as picture:
        if math.prod(picture.size) > _MOST_PIXELS:
            raise _NoPictureError
        picture.load()
        kind = f"image/{(picture.format or 'png').lower()}"
        if len(raw) > _PLAIN_BYTES:
            packed = io.BytesIO()
            picture.convert("RGB").save(packed, "WEBP", quality=88)
            if packed.tell() < len(raw):
                return "image/webp", packed.getvalue(), picture.size
        return kind, raw, picture.size


def _strip(i: int, run: RunRecord, named: bool) -> str:
    pictures = [
        (step, found) for step, path in choose(run.samples) if (found := embed(path)) is not None
    ]
    if not pictures:
        return ""
    last = len(pictures) - 1
    name = f'<h3 class="run-{i % 8}"><i class="swatch"></i>{escape(run.name)}</h3>' if named else ""
    images = "".join(
        f'<figure data-step="{step}"><img src="{uri}" width="{width}" height="{height}" '
        f'alt="{escape(run.name)}: what the method did to its sample images at step {whole(step)}">'
        f"<figcaption>step {whole(step)}</figcaption></figure>"
        for step, (uri, width, height) in pictures
    )
    slider = (
        f'<label class="slider"><input type="range" min="0" max="{last}" value="{last}" step="1" '
        f'aria-label="Step of the picture of {escape(run.name)}"><output>step {whole(pictures[-1][0])}</output></label>'
    )
    return f'<div class="strip" data-run="{i}">{name}{slider if last else ""}<div class="frames">{images}</div></div>'

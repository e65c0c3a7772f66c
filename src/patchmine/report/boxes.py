"""Objects over the picture that they are in: masks, boxes, names and scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from patchmine.errors import shown_name
from patchmine.evaluate.detection import KeptObjects
from patchmine.evaluate.rle import decoded_part
from patchmine.report.letters import Letters
from patchmine.report.overlays import Pixels, class_colours

SMALLEST_SIDE = 640
"""Pixels that the longer side of a picture with objects has at least; smaller ones are enlarged."""
_FILL = 0.4  # of a mask's colour over its pixels
_SMALLEST_TEXT, _PAD = 11, 2
_MOST_LABELS = 0.2  # share of a picture that labels with names may take
_LITTLE_HIDDEN, _MOST_HIDDEN = 0.05, 0.2  # share of another object that a label may hide

Floats = NDArray[np.float64]


def object_colours(names: Sequence[str]) -> Pixels:
    """(K, 3) RGB of classes that are told apart, none of them the grey of a background."""
    return class_colours(["", *names], {})[1:]


def draw_objects(
    picture: Pixels,
    objects: KeptObjects,
    names: Sequence[str],
    colours: Pixels,
    *,
    scores: bool = True,
    side: int = SMALLEST_SIDE,
) -> Image.Image:
    """The picture with its objects: boxes, translucent masks where there are any, and labels.

    Lines and letters follow the size of the picture; a label that would hide other objects is
    shortened, or left out.

    Args:
        picture: (H, W, 3).
        objects: in its pixels.
        names: of the K classes.
        colours: (K, 3).
        scores: whether labels tell scores.
        side: pixels of the longer side below which a picture is enlarged by a whole factor.
    """
    factor = max(1, -(-side // max(picture.shape[:2])))
    canvas = picture.repeat(factor, 0).repeat(factor, 1)
    boxes = objects.boxes.double().numpy() * factor
    labels = objects.labels.tolist()
    order = range(len(labels) - 1, -1, -1)  # the surest on top
    for n in order if objects.masks is not None else ():
        _paint_mask(canvas, objects, n, factor, colours[labels[n]])
    sheet = Image.fromarray(canvas)
    draw = ImageDraw.Draw(sheet)
    longer = max(sheet.size)
    width, text = max(1, round(longer / 320)), _text_size(boxes, longer)
    for n in order:
        thin = min(width, max(1, int((boxes[n, 2:] - boxes[n, :2]).min() / 12)))
        left, top, right, bottom = boxes[n].round().tolist()
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))
        draw.rectangle(corners, outline=tuple(colours[labels[n]].tolist()), width=thin)
    inks = Letters(text, (255, 255, 255)), Letters(text, (0, 0, 0))
    told = objects.scores.tolist() if scores else [None] * len(labels)
    shown = [shown_name(names[label]) for label in labels]
    for n, words, place in _labels(boxes, shown, told, sheet.size, inks[0]):
        colour = tuple(colours[labels[n]].tolist())
        draw.rectangle(place, fill=colour)
        ink = inks[_is_light(colour)]
        ink.write(draw, (place[0] + _PAD, place[1] + _PAD // 2), [words])
    return sheet


def _paint_mask(canvas: Pixels, objects: KeptObjects, n: int, factor: int, colour: Pixels) -> None:
    """One object's pixels in its colour, their border in full."""
    assert objects.masks is not None
    left, right = (round(side / factor) for side in (0, canvas.shape[1]))
    spread = objects.boxes[n].tolist()
    left, right = max(left, int(spread[0]) - 2), min(right, int(spread[2]) + 3)
    top, bottom = max(0, int(spread[1]) - 2), int(spread[3]) + 3
    if left >= right:
        return
    inside = decoded_part(objects.masks[n], left, right)[top:bottom]
    inside = inside.repeat(factor, 0).repeat(factor, 1)
    height, width = inside.shape
    part = canvas[top * factor : top * factor + height, left * factor : left * factor + width]
    core = np.pad(inside, 1)
    core = core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2] & core[1:-1, 2:]
    part[inside] = ((1 - _FILL) * part[inside] + _FILL * colour).round().astype(np.uint8)
    part[inside & ~core] = colour


def _text_size(boxes: Floats, longer: int) -> int:
    """Of letters that suit the picture and the usual object in it."""
    largest = max(_SMALLEST_TEXT, longer / 50)
    usual = float(np.median((boxes[:, 2:] - boxes[:, :2]).min(1))) if len(boxes) else largest
    return round(min(largest, max(_SMALLEST_TEXT, usual / 4)))


def _labels(
    boxes: Floats,
    names: Sequence[str],
    scores: Sequence[float | None],
    size: tuple[int, int],
    letters: Letters,
) -> Iterator[tuple[int, str, tuple[int, int, int, int]]]:
    """(object, words, rectangle) of each label that has room, the surest object's first."""
    taken, height = np.zeros((0, 4)), letters.line + _PAD
    short = ["" if score is None else f"{score:.2f}" for score in scores]
    long = [f"{name} {score}".rstrip() for name, score in zip(names, short, strict=True)]
    wide_of = {words: round(letters.width(words)) + 2 * _PAD for words in {*short, *long}}
    crowded = height * sum(wide_of[words] for words in long) > _MOST_LABELS * size[0] * size[1]
    for n in range(len(names)):
        for words in filter(None, [short[n]] if crowded else [long[n], short[n]]):
            wide = wide_of[words]
            place = _place(boxes, n, (wide, height), size, taken)
            if place is not None:
                taken = np.concatenate([taken, np.array([place], np.float64)])
                yield n, words, place
                break


def _place(
    boxes: Floats, n: int, label: tuple[int, int], size: tuple[int, int], taken: Floats
) -> tuple[int, int, int, int] | None:
    """Where the label hides least: around box n, or in its corner; None where it hides much."""
    (wide, high), (left, top, right, bottom) = label, boxes[n].round().astype(int).tolist()
    corners = [(left, top - high), (right - wide, top - high), (left, bottom)]
    corners += [(right - wide, bottom), (left, top)]
    around = (min(left, right - wide), top - high, max(right, left + wide), bottom + high)
    boxes, taken = boxes[_shared(boxes, around) > 0], taken[_shared(taken, around) > 0]
    areas = np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(1), 1.0)
    best, least = None, _MOST_HIDDEN
    for x, y in corners:
        x = min(max(0, x), size[0] - wide)
        if x < 0 or not 0 <= y <= size[1] - high:
            continue
        place = (x, y, x + wide, y + high)
        if _shared(taken, place).any():
            continue
        hidden = float((_shared(boxes, place) / areas).max(initial=0.0))
        if hidden <= _LITTLE_HIDDEN:
            return place
        if hidden < least:
            best, least = place, hidden
    return best


def _shared(boxes: Floats, place: tuple[int, int, int, int]) -> Floats:
    """(N,) pixels that boxes have in common with a place."""
    low, high = np.maximum(boxes[:, :2], place[:2]), np.minimum(boxes[:, 2:], place[2:])
    shared: Floats = np.clip(high - low, 0, None).prod(1)
    return shared


def _is_light(colour: tuple[int, ...]) -> bool:
    """Whether black letters are read on it more easily than white ones."""
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140

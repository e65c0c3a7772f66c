"""``patchmine predict``: a table of what a fine-tuned run says of images, and a sheet of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from patchmine.errors import Say, shown_name, silent
from patchmine.evaluate.asked import kind_of
from patchmine.evaluate.predict import Question, open_question
from patchmine.evaluate.settings import PREDICTION_ENDINGS, PredictSettings
from patchmine.evaluate.tables import TABLES
from patchmine.report.classmaps import predict_maps
from patchmine.report.letters import INK, PAPER, SOFT, Letters
from patchmine.report.objects import predict_objects
from patchmine.report.thumbnails import SIDE, pictures
from patchmine.system.disk import output

TABLE, SHEET = "predictions.csv", "predictions.png"
"""What a folder of predictions holds."""
MOST_CLASSES, MOST_SHOWN = 25, 6
"""Classes on the sheet, those with most images; and images at either end of each."""

_GAP, _MARGIN, _LABEL_WIDTH = 8, 18, 150
_NAME, _NOTE, _SMALL = Letters(14, INK), Letters(12, SOFT), Letters(11, SOFT)


def predict(settings: PredictSettings, say: Say = silent) -> Path:
    """Write a row for every readable image: file, class and probability; in a folder also pictures.

    Of a run that segments a folder of class maps, see `report.classmaps`, and of one that detects
    one of objects, see `report.objects`.  Files appear complete or not at all.  Memory is bounded,
    whatever the number of images.

    Args:
        settings: the run, what is read, and the file or folder to write.
        say: hears about the progress.

    Returns:
        The file or folder.

    Raises:
        UserError: the run was not fine-tuned, nothing can be read, or a file cannot be written.
    """
    kind = kind_of(settings.run)
    if kind == "segment":
        return predict_maps(settings, say)
    if kind == "detect":
        return predict_objects(settings, say)
    name = settings.out or TABLE
    out = Path(name)
    is_folder = name.endswith("/") or out.suffix.lower() not in PREDICTION_ENDINGS
    table = out / TABLE if is_folder else out
    question, done = open_question(settings, say), 0
    ends = Ends(len(question.names))
    with ExitStack() as places:  # that cannot be written are told before an hour of work
        new = places.enter_context(output(table))
        sheet = places.enter_context(output(out / SHEET)) if is_folder else None
        with TABLES[table.suffix.lower()](new) as add:
            for index, values in question.batches():
                add(question.rows(index, values))
                if sheet is not None:
                    ends.add(index, values, question.members(values))
                done += len(index)
        if sheet is not None:
            draw_sheet(question, ends).save(sheet)
    noun = question.loop.evaluated.item.noun
    what = f"{shown_name(table)}{f', the most and least certain in {SHEET}' if is_folder else ''}"
    say(f"predictions for {done:,} of {len(question.source):,} {noun}s in {what}")
    return out


class Ends:
    """Of each of K classes the items with the highest and the lowest values, and their number."""

    def __init__(self, classes: int, shown: int = MOST_SHOWN) -> None:
        self.counts = torch.zeros(classes, dtype=torch.int64)
        empty = torch.full((classes, shown), -torch.inf), torch.zeros(classes, shown).long()
        self._kept = {1: empty, -1: empty}

    def add(self, index: Tensor, values: Tensor, members: Tensor) -> None:
        """Items ``index`` (B,) with ``values`` (B, K), of the classes ``members`` (B, K) says."""
        self.counts += members.sum(0)
        for sign, (kept, places) in self._kept.items():
            new = torch.where(members, sign * values, -torch.inf).T
            best, at = torch.cat([kept, new], 1).topk(kept.shape[1], dim=1)
            both = torch.cat([places, index.expand(len(new), -1)], 1)
            self._kept[sign] = best, both.gather(1, at)

    def of(self, number: int) -> list[list[tuple[int, float]]]:
        """(place, value) of the highest, from the top, and of the lowest that are not these."""
        high, low = (
            [
                (place, sign * value)
                for place, value in zip(places[number].tolist(), kept[number].tolist(), strict=True)
                if value > -torch.inf
            ]
            for sign, (kept, places) in self._kept.items()
        )
        taken = {place for place, _ in high}
        return [high, [each for each in low if each[0] not in taken]]


def draw_sheet(question: Question, ends: Ends) -> Image.Image:
    """A row for each class: the images that the run is most certain of, and least certain."""
    order = torch.argsort(ends.counts, descending=True, stable=True)
    chosen = [k for k in order[:MOST_CLASSES].tolist() if ends.counts[k]]
    groups = [ends.of(number) for number in chosen]
    evaluated = question.loop.evaluated
    places = sorted({place for group in groups for end in group for place, _ in end})
    found = pictures(question.source, places, evaluated.item, evaluated.input, workers=0)

    titles = ("highest", "lowest") if question.loss == "mse" else ("most certain", "least certain")
    step, height = SIDE + _GAP, SIDE + 2 * _SMALL.line + 2 * _GAP
    left = _MARGIN + _LABEL_WIDTH + _GAP
    lefts = (left, left + MOST_SHOWN * step + 2 * _GAP)
    top = _MARGIN + _NAME.line + _GAP
    size = (lefts[1] + MOST_SHOWN * step - _GAP + _MARGIN, top + len(chosen) * height + 2 * _MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for x, title in zip(lefts, titles, strict=True):
        _NAME.write(draw, (x, _MARGIN), [title])
    for row, (number, group) in enumerate(zip(chosen, groups, strict=True)):
        y = top + row * height
        name = _NAME.wrap(shown_name(question.names[number]), _LABEL_WIDTH)[:5]
        _NAME.write(draw, (_MARGIN, y), name)
        many = f"{int(ends.counts[number]):,} {evaluated.item.noun}s"
        _NOTE.write(draw, (_MARGIN, y + len(name) * _NAME.line), [many])
        for x, end in zip(lefts, group, strict=True):
            for column, (place, value) in enumerate(end):
                at = (x + column * step, y)
                if place in found:
                    _paste(sheet, found[place], at)
                lines = [f"{value:.4g}", _end_of(question.file(place))]
                _SMALL.write(draw, (at[0], y + SIDE + 2), lines)
    _NOTE.write(draw, (_MARGIN, size[1] - _MARGIN - _NOTE.line), [_legend(question, ends, chosen)])
    return sheet


def _paste(sheet: Image.Image, pixels: NDArray[np.uint8], at: tuple[int, int]) -> None:
    """In the middle of a cell; small images are enlarged by a whole factor."""
    picture = Image.fromarray(pixels)
    factor = max(1, SIDE // max(picture.size))
    width, height = (side * factor for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.NEAREST)
    sheet.paste(picture, (at[0] + (SIDE - width) // 2, at[1] + (SIDE - height) // 2))


def _end_of(name: str) -> str:
    """As much of the end of a name as a cell is wide."""
    name = name[-60:]
    while name and _SMALL.width(name) > SIDE:
        name = name[1:]
    return name


def _legend(question: Question, ends: Ends, chosen: Sequence[int]) -> str:
    empty, many = int((ends.counts == 0).sum()), len(question.names)
    told = {"ce": "classes", "bce": "labels", "mse": "numbers"}[question.loss]
    value = "The value" if question.loss == "mse" else "The probability"
    parts = [f"{value} stands below each {question.loop.evaluated.item.noun}."]
    if len(chosen) + empty < many:
        parts.append(f"{len(chosen)} of {many} {told} are shown, those with most of them.")
    if empty:
        parts.append(f"{empty} of {many} {told} were not predicted.")
    return " ".join(parts)

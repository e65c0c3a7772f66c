"""Average precision of boxes and masks against pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from patchmine.errors import UserError
from patchmine.evaluate.detection import KeptObjects, detection_scores, kept
from patchmine.types import Objects

HEIGHT, WIDTH = 130, 170
NAMES = ["round", "flat", "rare", "never there", "never found"]
KEYS = ["map", "map50", "map75", "map_small", "map_medium", "map_large"]


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    size = torch.tensor([WIDTH, HEIGHT])
    share = torch.rand(count, 2, generator=generator) ** 2 * 0.9 + 0.05
    corner = torch.rand(count, 2, generator=generator) * (1 - share)
    return torch.cat([corner * size, (corner + share) * size], 1)


def ellipses(boxes: Tensor) -> Tensor:
    """Masks (N, H, W) that fill boxes, as cells do."""
    left, top, right, bottom = (edge[:, None, None] for edge in boxes.unbind(1))
    x, y = torch.arange(WIDTH)[None, None] + 0.5, torch.arange(HEIGHT)[None, :, None] + 0.5
    across, down = (2 * x - left - right) / (right - left), (2 * y - top - bottom) / (bottom - top)
    return across**2 + down**2 <= 1


def random_set(
    seed: int, masks: bool, images: int = 14
) -> tuple[list[KeptObjects], list[KeptObjects]]:
    """Found and true objects; of the images some are empty, some have nothing found or true."""
    generator = torch.Generator().manual_seed(seed)
    predictions, truths = [], []
    for i in range(images):
        count = 0 if i % 5 == 1 else 7
        boxes = random_boxes(count, generator)
        labels = torch.tensor([0, 0, 0, 1, 1, 2, 4])[:count]
        crowd = torch.rand(count, generator=generator) < 0.2
        near = boxes.repeat(2, 1) + 3 * torch.randn(2 * count, 4, generator=generator)
        near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 2)
        near = torch.cat([near, random_boxes(9, generator)])
        told = torch.cat([labels, labels.roll(1), torch.arange(9) % 4])
        some = torch.rand(len(near), generator=generator) < (0 if i % 7 == 2 else 0.8)
        some &= told != 4
        scores = torch.rand(len(near), generator=generator).mul(20).round() / 20  # some are equal
        found = Objects(near, told, torch.zeros(len(near), dtype=torch.bool))
        true = Objects(boxes, labels, crowd)
        if masks:
            found = Objects(found.boxes, told, found.crowd, ellipses(near))
            true = Objects(boxes, labels, crowd, ellipses(boxes))
        predictions.append(kept(found.chosen(some), scores[some]))
        truths.append(kept(true))
    return predictions, truths


def as_coco(objects: KeptObjects, image: int, area: bool) -> list[dict[str, Any]]:
    from pycocotools import mask as run_lengths

    rows = []
    for n in range(len(objects)):
        left, top, right, bottom = objects.boxes[n].double().tolist()
        row = {
            "image_id": image,
            "category_id": int(objects.labels[n]),
            "bbox": [left, top, right - left, bottom - top],
            "score": float(objects.scores[n]),
            "iscrowd": int(objects.crowd[n]),
        }
        if area:
            row["area"] = (right - left) * (bottom - top)
        if objects.masks is not None:
            row["segmentation"] = objects.masks[n]
            if area:
                row["area"] = float(run_lengths.area(objects.masks[n]))
        rows.append(row)
    return rows


def by_pycocotools(
    predictions: list[KeptObjects], truths: list[KeptObjects], kind: str
) -> tuple[dict[str, float | None], list[dict[str, float | None]]]:
    """The same numbers, and those of each class."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rows = [row for i, each in enumerate(truths) for row in as_coco(each, i, True)]
    true, told = (
        COCO(),
        [row for i, each in enumerate(predictions) for row in as_coco(each, i, False)],
    )
    for row in told:
        row.pop("bbox" if kind == "segm" else "segmentation", None)
    true.dataset = {
        "info": {},
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(len(truths))],
        "categories": [{"id": k} for k in range(len(NAMES))],
        "annotations": [{**row, "id": n + 1} for n, row in enumerate(rows)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        true.createIndex()
        measured = COCOeval(true, true.loadRes(told), kind)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    stats = [None if value == -1 else 100 * value for value in measured.stats]
    precision = measured.eval["precision"][..., 0, 2]

    def mean(values: np.ndarray) -> float | None:
        return 100 * values[values > -1].mean() if (values > -1).any() else None

    classes = [
        {"ap": mean(precision[..., k]), "ap50": mean(precision[0, ..., k])}
        for k in range(len(NAMES))
    ]
    return dict(zip(KEYS, stats, strict=False)) | {"mar100": stats[8]}, classes


@pytest.mark.parametrize("seed", [0, 1])
def test_boxes_and_masks_equal_pycocotools(seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    predictions, truths = random_set(seed, masks=True)
    found = detection_scores(predictions, truths, NAMES, masks=True)
    assert capfd.readouterr() == ("", "")
    for prefix, kind in (("", "bbox"), ("mask_", "segm")):
        expected, classes = by_pycocotools(predictions, truths, kind)
        assert {key: found[prefix + key] for key in expected} == pytest.approx(expected, abs=1e-6)
        assert all(expected[key] for key in KEYS), "the set tries every size"
        for name, one in zip(NAMES, classes, strict=True):
            told = found["per_class"][name]
            assert {key: told[prefix + key] for key in one} == pytest.approx(one, abs=1e-6)
    assert found["map"] != found["mask_map"]


def test_boxes_alone_equal_pycocotools() -> None:
    predictions, truths = random_set(2, masks=False)
    found = detection_scores(predictions, truths, NAMES)
    expected, _ = by_pycocotools(predictions, truths, "bbox")
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    assert not [key for key in found if key.startswith("mask")]


def test_classes_without_an_object_have_no_precision() -> None:
    predictions, truths = random_set(0, masks=False)
    found = detection_scores(predictions, truths, NAMES)
    assert found["classes"] == list(found["per_class"]) == NAMES
    assert found["per_class"]["never there"] == {"ap": None, "ap50": None, "objects": 0}
    assert found["per_class"]["never found"]["ap"] == 0
    known = [each["ap"] for each in found["per_class"].values() if each["ap"] is not None]
    assert found["map"] == pytest.approx(sum(known) / 4)
    objects = [int((~each.crowd & (each.labels == 0)).sum()) for each in truths]
    assert found["per_class"]["round"]["objects"] == sum(objects)
    json.dumps(found, allow_nan=False)


def test_what_is_true_is_found_wholly() -> None:
    _, truths = random_set(3, masks=True)
    sure = [KeptObjects(t.boxes, t.labels, t.scores, t.crowd & False, t.masks) for t in truths]
    found = detection_scores(sure, truths, NAMES, masks=True)
    for key in (*KEYS, "mar100"):
        assert found[key] == found[f"mask_{key}"] == pytest.approx(100), key


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("masks", [False, True])
def test_images_without_any_object(images: int, masks: bool) -> None:
    none = torch.zeros(0)
    empty = Objects(
        none.view(0, 4), none.long(), none.bool(), none.view(0, 8, 9).bool() if masks else None
    )
    nothing = [kept(empty, none)] * images
    found = detection_scores(nothing, nothing, ["a", "b"], masks)
    numbers = {key: value for key, value in found.items() if "ma" in key}
    assert len(numbers) == (14 if masks else 7)
    assert set(numbers.values()) == {None}
    assert found["per_class"]["a"]["objects"] == 0


def test_no_more_than_a_hundred_of_an_image_count() -> None:
    box, no = torch.tensor([[10.0, 10, 50, 50]]), torch.zeros(1, dtype=torch.bool)
    true = kept(Objects(box, torch.tensor([0]), no))
    wrong = box.repeat(100, 1) + 60
    boxes, scores = torch.cat([wrong, box]), torch.linspace(1, 0.5, 101)
    objects = Objects(boxes, torch.zeros(101).long(), torch.zeros(101).bool())
    assert detection_scores([kept(objects, scores)], [true], ["a"])["map"] == 0
    most = kept(objects.chosen(torch.arange(1, 101)), scores[1:])
    assert detection_scores([most], [true], ["a"])["map"] == pytest.approx(1)


@pytest.mark.parametrize("masks", [False, True])
def test_what_is_not_finite_is_left_out(masks: bool) -> None:
    predictions, truths = random_set(4, masks)
    right = detection_scores(predictions, truths, NAMES, masks)

    def spoiled(each: KeptObjects) -> KeptObjects:
        """With two objects more, of which one has no score and one no box."""
        if not len(each):
            return each
        boxes = torch.cat([each.boxes[:1], each.boxes, torch.full((1, 4), math.inf)])
        scores = torch.cat([torch.tensor([math.nan]), each.scores, torch.ones(1)])
        labels = torch.cat([each.labels[:1], each.labels, each.labels[:1]])
        crowd = torch.cat([each.crowd[:1], each.crowd, each.crowd[:1]])
        masks = each.masks and [each.masks[0], *each.masks, each.masks[0]]
        return KeptObjects(boxes, labels, scores, crowd, masks)

    assert detection_scores([spoiled(each) for each in predictions], truths, NAMES, masks) == right


def test_masks_are_kept_as_run_lengths() -> None:
    boxes = random_boxes(3, torch.Generator().manual_seed(0))
    masks = ellipses(boxes)
    objects = Objects(boxes, torch.zeros(3).long(), torch.zeros(3).bool(), masks)
    small = kept(objects, torch.ones(3))
    assert small.masks is not None
    from faster_coco_eval import mask as run_lengths

    for mask, each in zip(masks, small.masks, strict=True):
        assert (run_lengths.decode(each) == mask.numpy()).all()
    assert sum(len(each["counts"]) for each in small.masks) < masks.numel() / 50
    tensors = (small.boxes, small.labels, small.scores, small.crowd)
    assert sum(each.untyped_storage().nbytes() for each in tensors) < 200


def test_scoring_changes_no_record() -> None:
    predictions, truths = random_set(0, masks=True)
    before = [each.boxes.clone() for each in [*predictions, *truths]]
    first = detection_scores(predictions, truths, NAMES, masks=True)
    assert detection_scores(predictions, truths, NAMES, masks=True) == first
    after = [each.boxes for each in [*predictions, *truths]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match=r"faster-coco-eval.*pip install patchmine\[det\]"):
        detection_scores([], [], ["a"])

"""COCO's average precision of boxes and masks, over whole data sets.

faster-coco-eval matches and counts; it gives what pycocotools gives, and is some times as quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_convert

from patchmine.evaluate.rle import Rle, areas, encoded, library
from patchmine.types import Objects

MOST_FOUND = 100  # objects of one class and image that count, those with the highest scores
_AREAS = ("all", "small", "medium", "large")  # with limits at 32 x 32 and 96 x 96 pixels


@dataclass(frozen=True)
class KeptObjects:
    """The objects of one image, true or found, so small that a whole data set's can be kept.

    ``boxes`` (N, 4): (left, top, right, bottom), ``labels`` (N,), ``scores`` (N,): 1 of true ones,
    ``crowd`` (N,), all on the host; ``masks``: N run lengths, or None where only boxes are known.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    crowd: Tensor
    masks: list[Rle] | None = None

    def __len__(self) -> int:
        return self.boxes.shape[0]


def kept(objects: Objects, scores: Tensor | None = None) -> KeptObjects:
    """The objects of one image for `detection_scores`, their masks as run lengths.

    Args:
        objects: on any device.
        scores: (N,), of found objects; None: these are true ones.

    Raises:
        UserError: there are masks, and faster-coco-eval is missing.
    """
    given = torch.ones(len(objects)) if scores is None else scores.detach().float().cpu()
    masks = None if objects.masks is None else encoded(objects.masks)
    small = Objects(objects.boxes.detach().float(), objects.labels, objects.crowd)
    host = small.each(Tensor.cpu)
    return KeptObjects(host.boxes, host.labels, given, host.crowd, masks)


def detection_scores(
    predictions: Sequence[KeptObjects],
    truths: Sequence[KeptObjects],
    names: Sequence[str],
    masks: bool = False,
) -> dict[str, Any]:
    """How well objects are found, as COCO counts it; numbers are in percent.

    Of each image and class the 100 objects with the highest scores count.  What is found in a
    crowd is neither right nor wrong.  Small objects have less than 32 x 32 pixels, large ones more
    than 96 x 96, counted in the mask of a true object, in its box where it has no mask.  Found
    objects with a score or box that is not finite are left out.

    Args:
        predictions: by image.
        truths: of the same images.
        names: of the classes.
        masks: compare masks too; all objects then have one.

    Returns:
        ``map`` (the mean of AP over classes with an object and over IoU from 0.50 to 0.95),
        ``map50``, ``map75``, ``map_small``, ``map_medium``, ``map_large`` and ``mar100`` (the mean
        recall), all by boxes, and with ``masks`` the same by masks as ``mask_map`` and so on;
        ``classes``; ``per_class``: ``ap``, ``ap50`` (``mask_ap``, ``mask_ap50``) and ``objects``,
        the number of true ones without crowds, by name.  What has no object is None.

    Raises:
        UserError: faster-coco-eval is missing.
    """
    found, columns = _compared(predictions, truths, len(names), "bbox")
    if masks:
        by_mask, mask_columns = _compared(predictions, truths, len(names), "segm")
        found |= {f"mask_{key}": value for key, value in by_mask.items()}
        columns |= {f"mask_{key}": values for key, values in mask_columns.items()}
    counts = _counts(truths, len(names))
    return found | {
        "classes": list(names),
        "per_class": {
            name: {key: values[k] for key, values in columns.items()} | {"objects": counts[k]}
            for k, name in enumerate(names)
        },
    }


def _compared(
    predictions: Sequence[KeptObjects], truths: Sequence[KeptObjects], count: int, kind: str
) -> tuple[dict[str, float | None], dict[str, list[float | None]]]:
    """By boxes ("bbox") or masks ("segm"): means over classes, and columns with a row per class."""
    coco = library()
    true = _data_set(truths, count, kind, by_mask=True)
    told = _data_set([_finite(each) for each in predictions], count, kind, by_mask=kind == "segm")
    compared = coco.COCOeval_faster(true, told, kind, print_function=_silent, rle_iou_max_workers=1)
    compared.params.maxDets = [MOST_FOUND]
    compared.evaluate()
    compared.accumulate()
    # (IoU, recall, class, area) and (IoU, class, area); -1 where there is no object.
    precision, recall = (compared.eval[key][..., 0] for key in ("precision", "recall"))
    found = {"map": precision[..., 0], "map50": precision[0, ..., 0], "map75": precision[5, ..., 0]}
    found |= {f"map_{area}": precision[..., a] for a, area in enumerate(_AREAS) if a}
    found["mar100"] = recall[..., 0]
    columns = {"ap": precision[..., 0], "ap50": precision[:1, ..., 0]}
    return (
        {key: _mean(values) for key, values in found.items()},
        {key: [_mean(each[..., k]) for k in range(count)] for key, each in columns.items()},
    )


def _data_set(records: Sequence[KeptObjects], count: int, kind: str, *, by_mask: bool) -> Any:
    """As the library wants it; objects are as large as their masks, or with ``by_mask`` False as
    their boxes, which is how COCO sizes boxes that are found.
    """
    rows: list[dict[str, Any]] = []
    for i, objects in enumerate(records):
        boxes = box_convert(objects.boxes.double(), "xyxy", "xywh")
        area = (
            torch.from_numpy(areas(objects.masks))
            if by_mask and objects.masks
            else boxes[:, 2:].prod(1)
        )
        scores, crowd = objects.scores.double(), objects.crowd.int()
        columns = (boxes, area, objects.labels, scores, crowd)
        values = zip(*(column.tolist() for column in columns), strict=True)
        for n, (box, size, label, score, group) in enumerate(values):
            row = dict(id=len(rows) + 1, image_id=i + 1, category_id=label, bbox=box)
            row |= dict(area=size, score=score, iscrowd=group)
            if kind == "segm" and objects.masks is not None:
                row["segmentation"] = objects.masks[n]
            rows.append(row)
    content = {
        "images": [_image(i + 1, objects) for i, objects in enumerate(records)],
        "categories": [{"id": k} for k in range(count)],
        "annotations": rows,
    }
    return library().COCO(content, print_function=_silent)


def _image(number: int, objects: KeptObjects) -> dict[str, int]:
    height, width = objects.masks[0]["size"] if objects.masks else (0, 0)  # boxes need none
    return {"id": number, "height": height, "width": width}


def _finite(found: KeptObjects) -> KeptObjects:
    known = found.boxes.isfinite().all(1) & found.scores.isfinite()
    if known.all():
        return found
    columns = (found.boxes[known], found.labels[known], found.scores[known], found.crowd[known])
    masks = found.masks
    if masks is not None:
        masks = [mask for mask, stays in zip(masks, known.tolist(), strict=True) if stays]
    return KeptObjects(*columns, masks)


def _counts(truths: Sequence[KeptObjects], count: int) -> list[int]:
    empty = torch.zeros(0, dtype=torch.int64)
    labels = torch.cat([empty, *(each.labels[~each.crowd] for each in truths)])
    return torch.bincount(labels, minlength=count).tolist()


def _mean(values: NDArray[np.float64]) -> float | None:
    """In percent; None where no value is defined."""
    known = values[values > -1]
    return 100 * float(known.mean()) if known.size else None


def _silent(*_: object) -> None:
    """Takes what the library would print."""

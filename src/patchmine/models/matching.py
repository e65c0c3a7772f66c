"""Which query stands for which class: the cheapest pairs of each image."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from torch import Tensor

from patchmine.errors import UserError

_DEAR = 1e9  # in the place of a cost that is no number


def refuse_missing_scipy() -> None:
    """UserError where what matches is not installed."""
    if importlib.util.find_spec("scipy") is None:
        raise UserError(
            "head=eomt needs scipy to match its masks with classes, which this Python lacks: run "
            '`pip install "patchmine[seg]"`, or choose head=dpt or head=linear'
        )


@torch.no_grad()
def match(costs: Tensor, shown: Tensor) -> Tensor:
    """The query of each class that an image shows, so that the sum of costs is smallest; else -1.

    Of more classes than queries some get none.  Waits for the device: the Hungarian algorithm is
    host work.

    Args:
        costs: (N, Q, K) of each query for each class.
        shown: (N, K) whether an image shows a class.

    Returns:
        (N, K) int64.
    """
    from scipy.optimize import linear_sum_assignment

    costs = costs.float().nan_to_num(_DEAR, _DEAR, -_DEAR)
    costs = costs.masked_fill(~shown[:, None], torch.nan)  # so that one tensor says both
    found = np.full((costs.shape[0], costs.shape[2]), -1)
    # The one copy of a step, for the whole batch at all depths.
    for row, cost in zip(found, costs.cpu().numpy(), strict=True):
        (columns,) = np.isfinite(cost[0]).nonzero()
        queries, places = linear_sum_assignment(cost[:, columns])
        row[columns[places]] = queries
    return torch.from_numpy(found).to(costs.device, non_blocking=True)

"""The cheapest pairs of queries and classes, against all that there are."""

from __future__ import annotations

import importlib.util
from itertools import permutations

import pytest
import torch

from patchmine.errors import UserError
from patchmine.models.matching import match, refuse_missing_scipy

pytest.importorskip("scipy", reason="the extra `seg` is missing")


@pytest.mark.parametrize(("queries", "classes"), [(5, 3), (4, 4), (2, 4)])
def test_no_other_pairs_are_cheaper(queries: int, classes: int) -> None:
    costs = torch.randn(6, queries, classes, generator=torch.Generator().manual_seed(0))
    shown = torch.rand(6, classes, generator=torch.Generator().manual_seed(1)) < 0.7
    shown[5] = False
    found = match(costs, shown)
    for cost, real, matched in zip(costs, shown, found, strict=True):
        columns = real.nonzero()[:, 0].tolist()
        pairs = {k: int(matched[k]) for k in range(classes) if matched[k] >= 0}
        assert set(pairs) <= set(columns)
        assert len(set(pairs.values())) == len(pairs) == min(queries, len(columns))
        total = sum(float(cost[q, k]) for k, q in pairs.items())
        longer, shorter = sorted([list(range(queries)), columns], key=len, reverse=True)
        every = [
            sum(
                float(cost[one, two] if shorter is columns else cost[two, one])
                for one, two in zip(chosen, shorter, strict=True)
            )
            for chosen in permutations(longer, len(shorter))
        ]
        assert total == pytest.approx(min(every))


def test_costs_that_are_no_numbers_are_taken_last() -> None:
    costs = torch.tensor([[[float("nan"), 1.0], [2.0, float("inf")], [3.0, 3.0]]])
    assert match(costs, torch.tensor([[True, True]])).tolist() == [[1, 0]]


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r'scipy.*pip install "patchmine\[seg\]"'):
        refuse_missing_scipy()

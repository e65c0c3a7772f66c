"""The chunked vote against a loop that does one query at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmine.evaluate.neighbours import knn_accuracy, nearest


def slow_knn(bank, bank_labels, query, query_labels, num_classes, k):
    """DINO's rule written out: sort everything, add up one vote at a time."""
    top1 = top5 = 0
    for q, truth in zip(query, query_labels.tolist(), strict=True):
        cosine = [float(torch.dot(q, b) / (q.norm() * b.norm())) for b in bank]
        order = sorted(range(len(bank)), key=lambda i: -cosine[i])[:k]
        votes = [0.0] * num_classes
        for i in order:
            votes[int(bank_labels[i])] += math.exp(cosine[i] / 0.07)
        ranking = sorted(range(num_classes), key=lambda c: -votes[c])
        top1 += ranking[0] == truth
        top5 += truth in ranking[:5]
    return {"top1": 100 * top1 / len(query), "top5": 100 * top5 / len(query)}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 9), size=st.integers(3, 60))
def test_vote_equals_slow_loop_for_every_k(seed, classes, size):
    g = torch.Generator().manual_seed(seed)
    bank, query = torch.randn(size, 6, generator=g), torch.randn(17, 6, generator=g)
    labels, truth = torch.randint(classes, (size,), generator=g), torch.randint(classes, (17,), generator=g)
    fast = knn_accuracy(bank, labels, query, truth, classes, neighbours=(1, 10, 20))
    assert set(fast) == {min(k, size) for k in (1, 10, 20)}
    for k, accuracy in fast.items():
        assert accuracy == pytest.approx(slow_knn(bank, labels, query, truth, classes, k))


def test_slices_of_the_bank_do_not_change_the_neighbours():
    bank, query = torch.randn(101, 8), torch.randn(5, 8)
    whole, in_slices = nearest(bank, query, 20), nearest(bank, query, 20, bank_rows=7)
    torch.testing.assert_close(whole[0], in_slices[0])
    assert torch.equal(whole[1], in_slices[1])


def test_length_of_a_feature_does_not_matter_and_half_precision_does_not_overflow():
    bank = torch.eye(4).half()
    accuracy = knn_accuracy(bank * 300, torch.arange(4), bank * 0.01, torch.arange(4), 4, neighbours=(1, 4))
    assert accuracy[4]["top1"] == 100.0  # exp(1 / 0.07) is beyond half precision


def test_unknown_query_class_counts_as_wrong():
    accuracy = knn_accuracy(torch.eye(2), torch.arange(2), torch.eye(2), torch.tensor([0, 7]), 2, neighbours=(1,))
    assert accuracy == {1: {"top1": 50.0, "top5": 50.0}}

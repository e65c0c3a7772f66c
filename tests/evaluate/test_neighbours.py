"""The chunked vote against a loop that does one query at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.evaluate.votes import knn_accuracy, vote_shares

from patchmine.evaluate.neighbours import class_votes, nearest, nearest_rows


def slow_knn(bank, bank_labels, query, query_labels, num_classes, k, temperature=0.07):
    """DINO's rule written out in float64: a softmax over the k nearest, added up one vote at a
    time.
    """
    bank, query = bank.double(), query.double()
    top1 = top5 = 0
    for q, truth in zip(query, query_labels.tolist(), strict=True):
        cosine = [float(torch.dot(q, b) / (q.norm() * b.norm())) for b in bank]
        order = sorted(range(len(bank)), key=lambda i: -cosine[i])[:k]
        votes = {}
        for c in range(num_classes):
            found = [cosine[i] / temperature for i in order if int(bank_labels[i]) == c]
            votes[c] = (
                max(found) + math.log(sum(math.exp(v - max(found)) for v in found))
                if found
                else -math.inf
            )
        ranking = sorted(range(num_classes), key=lambda c: -votes[c])
        top1 += ranking[0] == truth
        top5 += truth in ranking[:5]
    return {"top1": 100 * top1 / len(query), "top5": 100 * top5 / len(query)}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 9), size=st.integers(3, 60))
def test_vote_equals_slow_loop_for_every_k(seed, classes, size):
    g = torch.Generator().manual_seed(seed)
    bank, query = torch.randn(size, 6, generator=g), torch.randn(17, 6, generator=g)
    labels, truth = (
        torch.randint(classes, (size,), generator=g),
        torch.randint(classes, (17,), generator=g),
    )
    fast = knn_accuracy(bank, labels, query, truth, classes, neighbours=(1, 10, 20))
    assert set(fast) == {min(k, size) for k in (1, 10, 20)}
    for k, accuracy in fast.items():
        assert accuracy == pytest.approx(slow_knn(bank, labels, query, truth, classes, k))


def test_slices_of_the_bank_do_not_change_the_neighbours():
    bank, query = torch.randn(101, 8), torch.randn(5, 8)
    whole, in_slices = nearest_rows(bank, query, 20), nearest_rows(bank, query, 20, bank_rows=7)
    torch.testing.assert_close(whole[0], in_slices[0])
    assert torch.equal(whole[1], in_slices[1])


def test_length_of_a_feature_does_not_matter_and_half_precision_does_not_overflow():
    bank = torch.eye(4).half()
    accuracy = knn_accuracy(
        bank * 300, torch.arange(4), bank * 0.01, torch.arange(4), 4, neighbours=(1, 4)
    )
    assert accuracy[4]["top1"] == 100.0  # exp(1 / 0.07) is beyond half precision


def test_unknown_query_class_counts_as_wrong():
    accuracy = knn_accuracy(
        torch.eye(2), torch.arange(2), torch.eye(2), torch.tensor([0, 7]), 2, neighbours=(1,)
    )
    assert accuracy == {1: {"top1": 50.0, "top5": 50.0}}


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 0.07, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_temperature_equals_the_slow_softmax(temperature, dtype):
    g = torch.Generator().manual_seed(1)
    labels, truth = torch.arange(120) % 8, torch.arange(40) % 8
    centres = torch.randn(8, 16, generator=g)
    bank = (centres[labels] + 0.9 * torch.randn(120, 16, generator=g)).to(dtype)
    query = (centres[truth] + 0.9 * torch.randn(40, 16, generator=g)).to(dtype)
    fast = knn_accuracy(
        bank, labels, query, truth, 8, neighbours=(1, 5, 100, 500), temperature=temperature
    )
    assert set(fast) == {1, 5, 100, 120}  # no more neighbours than there are images
    for k, accuracy in fast.items():
        assert accuracy == pytest.approx(slow_knn(bank, labels, query, truth, 8, k, temperature)), k


def test_a_low_temperature_is_the_nearest_neighbour():
    """exp(1 / 0.01) is beyond float32: infinite weights once made every class alike."""
    bank = torch.eye(4).repeat(25, 1)
    accuracy = knn_accuracy(
        bank, torch.arange(4).repeat(25), torch.eye(4), torch.arange(4), 4, temperature=0.01
    )
    assert accuracy[100] == {"top1": 100.0, "top5": 100.0}


def test_votes_too_small_for_a_float_still_rank_above_none():
    votes = class_votes(torch.tensor([[1.0, -1.0]]), torch.tensor([[3, 2]]), 4, 1e-3)
    assert votes.sort(dim=1, descending=True, stable=True).indices.tolist() == [[3, 2, 0, 1]]


def test_of_equal_similarities_the_first_of_the_bank_vote():
    bank = torch.ones(300, 2)
    labels = torch.zeros(300, dtype=torch.int64)
    labels[10:] = 1  # equally near, but behind the ten that vote
    for rows in (7, 64, 1000):
        assert (
            nearest_rows(bank, torch.ones(3, 2), 10, bank_rows=rows)[1].tolist()
            == [list(range(10))] * 3
        )
    accuracy = knn_accuracy(
        bank, labels, torch.ones(2, 2), torch.tensor([0, 1]), 2, neighbours=(10, 19, 21)
    )
    assert [accuracy[k]["top1"] for k in (10, 19, 21)] == [50.0, 50.0, 50.0]
    one = knn_accuracy(
        bank, labels, torch.ones(1, 2), torch.tensor([0]), 2, neighbours=(10, 19, 20, 21)
    )
    assert [one[k]["top1"] for k in (10, 19, 20, 21)] == [
        100.0,
        100.0,
        100.0,
        0.0,
    ]  # at 20 a tie, for the smaller


@pytest.mark.parametrize("temperature", [1e-3, 0.07])
def test_shares_rank_as_the_vote_and_sum_to_one(temperature):
    g = torch.Generator().manual_seed(2)
    bank = torch.nn.functional.normalize(torch.randn(50, 8, generator=g), dim=1)
    labels, query = torch.arange(50) % 5, torch.randn(9, 8, generator=g)
    shares = vote_shares(bank, labels, query, 5, k=20, temperature=temperature)
    torch.testing.assert_close(shares.sum(1), torch.ones(9))
    similarity, place = nearest_rows(bank, torch.nn.functional.normalize(query, dim=1), 20)
    wanted = class_votes(similarity, labels[place], 5, temperature).softmax(1)
    torch.testing.assert_close(shares, wanted.float())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), exclude_self=st.booleans())
def test_nearest_equals_a_sort_of_all_similarities(seed, k, exclude_self):
    # Small whole numbers: many equal similarities, and rows that are twins of each other.
    table = torch.randint(-2, 3, (300, 3), generator=torch.Generator().manual_seed(seed)).float()
    similarity = table @ table.T
    if exclude_self:
        similarity.fill_diagonal_(-torch.inf)
    wanted = similarity.sort(dim=1, descending=True, stable=True)
    scores, places = nearest(table, table, k, exclude_self=exclude_self)
    assert torch.equal(scores, wanted.values[:, :k])
    assert torch.equal(places, wanted.indices[:, :k])


def test_of_a_small_table_all_rows_are_near():
    table = torch.eye(3)
    assert nearest(torch.ones(5, 3), table, 10)[1].tolist() == [[0, 1, 2]] * 5
    assert nearest(table, table, 10, exclude_self=True)[1].tolist() == [[1, 2], [0, 2], [0, 1]]

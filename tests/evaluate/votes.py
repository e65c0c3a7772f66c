"""The nearest-neighbour classifier on whole tables, put together from its parts."""

from __future__ import annotations

import torch.nn.functional as F

from patchmine.evaluate.measure import count_right
from patchmine.evaluate.neighbours import knn_votes
from patchmine.evaluate.settings import NEIGHBOURS, TEMPERATURE


def knn_accuracy(
    bank, labels, query, truth, classes, *, neighbours=NEIGHBOURS, temperature=TEMPERATURE
):
    """Percent right by the number of neighbours, at most all of the bank."""
    bank = F.normalize(bank.float(), dim=1)
    ks = {min(k, len(bank)) for k in neighbours}
    found = {}
    for k, votes in knn_votes(bank, labels, query, classes, ks, temperature).items():
        top1, top5 = (100 * count_right(votes, truth) / len(query)).tolist()
        found[k] = {"top1": top1, "top5": top5}
    return found


def vote_shares(bank, labels, query, classes, k, temperature=TEMPERATURE):
    """(Q, C): each class's share of the vote."""
    k = min(k, len(bank))
    return knn_votes(bank, labels, query, classes, [k], temperature)[k].softmax(1).float()

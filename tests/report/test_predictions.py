"""What is kept of a stream of predictions, for the sheet."""

from __future__ import annotations

import torch

from patchmine.report.predictions import Ends


def test_the_ends_of_every_class_are_those_of_a_sorted_table() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(50, 3, generator=generator)
    members = torch.rand(50, 3, generator=generator) < torch.tensor([0.9, 0.1, 0.0])
    ends = Ends(3, shown=4)
    for rows in torch.arange(50).split(7):
        ends.add(rows + 100, values[rows], members[rows])
    assert ends.counts.tolist() == members.sum(0).tolist()
    for number in range(3):
        own = members[:, number].nonzero()[:, 0].tolist()
        ranked = sorted(own, key=lambda place: -float(values[place, number]))
        high = ranked[:4]
        low = [place for place in reversed(ranked[-4:]) if place not in high]
        found = ends.of(number)
        assert [[place - 100 for place, _ in end] for end in found] == [high, low]
        assert [value for _, value in found[0]] == values[high, number].tolist()
    assert ends.counts[2] == 0

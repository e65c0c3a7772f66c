"""One draw for a whole batch."""

from __future__ import annotations

from patchmine.models.noise import Noise


def test_host_draws_are_equal_in_all_processes_and_parts_and_differ_by_step() -> None:
    noise = Noise(seed=3)
    parts = []
    for first in (0, 2, 4):
        noise.begin(7, first, global_rows=6)
        parts.append([noise.host(), noise.host()])
    assert parts[0] == parts[1] == parts[2]
    assert len(set(parts[0])) == 2
    assert all(0 <= number < 1 for number in parts[0])
    noise.begin(8)
    assert noise.host() not in parts[0]


def test_a_host_draw_is_one_draw_of_the_step() -> None:
    rows, mixed = Noise(), Noise()
    rows.uniform(2)
    mixed.host()
    assert rows.uniform(2, 3).equal(mixed.uniform(2, 3))

"""Maps of items: what is kept, what is loaded, what several processes bring together."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from patchmine.models.maps import ItemMaps, VisitMaps
from patchmine.types import Batch, Grid


def some_maps() -> torch.Tensor:
    return torch.rand(7, 5, generator=torch.Generator().manual_seed(0))


def share_items(rank: int, folder: Path) -> None:
    """Rank 0 brings items 0, 1 and 2, rank 1 brings 3, 6 and 5; item 4 could not be read."""
    store, maps = ItemMaps(5), some_maps()
    shares = [[[0], [1, 2]], [[3, 6], [5]]]
    store.replace((torch.tensor(items), maps[items]) for items in shares[rank])
    save_file(store.state_dict(), folder / f"rank{rank}.safetensors")


def share_visits(rank: int, folder: Path) -> None:
    """Each rank puts the maps of its own items, which both then hold."""
    values = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    store = VisitMaps(GRID)
    store.grow(5)
    mine = slice(2 * rank, 2 * rank + 2)
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.1, 0.2, 0.6, 0.7]] * 2)
    flip = torch.tensor([True, False, False, True])
    batch = Batch([], torch.tensor([3, 0, 4, 1])[mine], box[mine], flip[mine])
    store.remember(batch, values[mine], torch.arange(4).expand(2, 4))
    save_file(store.state_dict(), folder / f"rank{rank}.safetensors")


def in_two_processes(work: Callable[[int, Path], None], folder: Path) -> list[torch.Tensor]:
    """The values that each of two ranks saves."""

    def start(rank: int) -> None:
        torch.set_num_threads(1)
        meet = f"file://{folder}/meet"
        torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
        work(rank, folder)
        torch.distributed.destroy_process_group()

    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=start, args=(rank,), daemon=True) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0, 0]
    return [load_file(folder / f"rank{rank}.safetensors")["values"] for rank in (0, 1)]


def test_items_come_back_within_half_a_step() -> None:
    store, maps = ItemMaps(5), some_maps()
    store.replace([(torch.tensor([6, 0, 2]), maps[[6, 0, 2]]), (torch.tensor([5]), maps[[5]])])
    found = store(torch.tensor([0, 6, 5, 2]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, maps[[0, 6, 5, 2]], atol=0.5 / 255 + 1e-7, rtol=0)
    assert store.values.dtype == torch.uint8


def test_items_without_a_map_have_zeros() -> None:
    store = ItemMaps(5)
    assert not store(torch.tensor([0, 100])).any()
    store.replace([(torch.tensor([0, 2]), torch.ones(2, 5))])
    assert store(torch.tensor([0, 1, 2, 3, 100])).sum(dim=1).tolist() == [5, 0, 5, 0, 0]


def test_new_maps_replace_all_old_ones() -> None:
    store = ItemMaps(5)
    store.replace([(torch.arange(7), torch.ones(7, 5))])
    store.replace([(torch.tensor([1]), torch.ones(1, 5))])
    assert store(torch.arange(7)).sum().item() == 5
    with pytest.raises(ValueError, match="no image"):
        store.replace([])


def test_loading_takes_any_number_of_items_but_no_other_grid() -> None:
    store = ItemMaps(5)
    store.replace([(torch.arange(7), some_maps())])
    for other in (ItemMaps(5), ItemMaps(5)):
        other.replace([(torch.tensor([2]), torch.ones(1, 5))])
        other.load_state_dict(store.state_dict())
        assert torch.equal(other.values, store.values)
        assert other.values.data_ptr() != store.values.data_ptr()
    store.load_state_dict(ItemMaps(5).state_dict())
    assert store.values.shape == (0, 5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        ItemMaps(4).load_state_dict(other.state_dict())


@pytest.mark.slow
def test_two_processes_end_with_the_table_of_one(tmp_path: Path) -> None:
    both = in_two_processes(share_items, tmp_path)
    alone, read = ItemMaps(5), [0, 1, 2, 3, 5, 6]
    alone.replace([(torch.tensor(read), some_maps()[read])])
    assert all(torch.equal(values, alone.values) for values in both)


GRID = Grid((2, 2), (4, 4))
WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
EVERYWHERE = torch.arange(4)[None]


def visit(index: int, box: torch.Tensor = WHOLE, flip: bool = False) -> Batch:
    return Batch([], torch.tensor([index]), box, torch.tensor([flip]))


def recalled(store: VisitMaps, batch: Batch) -> torch.Tensor:
    return store.recall(batch, torch.zeros(1, 4))[0]


def test_visits_move_a_map_towards_the_order_of_their_values() -> None:
    store = VisitMaps(GRID)
    store.grow(2)
    half = torch.full((4,), 0.5)
    torch.testing.assert_close(recalled(store, visit(0)), half, atol=1 / 255, rtol=0)
    order = torch.tensor([1.0, 0.0, 1 / 3, 2 / 3])
    for _ in range(2):
        store.remember(visit(0), torch.tensor([[90.0, -5.0, 1.0, 7.0]]), EVERYWHERE)
    found = recalled(store, visit(0))
    torch.testing.assert_close(found, half / 4 + 0.75 * order, atol=2 / 255, rtol=0)
    torch.testing.assert_close(recalled(store, visit(1)), half, atol=1 / 255, rtol=0)


def test_what_was_not_seen_or_not_scored_stays() -> None:
    store = VisitMaps(GRID)
    store.grow(1)
    values = torch.tensor([[3.0, -torch.inf, 5.0]])
    store.remember(visit(0), values, torch.tensor([[0, 1, 3]]))
    found = recalled(store, visit(0))
    expected = torch.tensor([0.25, 0.5, 0.5, 0.75])
    torch.testing.assert_close(found, expected, atol=1 / 255, rtol=0)
    # A crop of the right half, mirrored: its left patches show the image's right border.
    right = torch.tensor([[0.0, 0.5, 1.0, 0.5]])
    store.remember(visit(0, right, flip=True), torch.tensor([[9.0, 8.0, 1.0, 2.0]]), EVERYWHERE)
    again = recalled(store, visit(0))
    torch.testing.assert_close(again[[0, 2]], found[[0, 2]])
    assert again[1] > found[1] + 0.1
    assert again[3] < found[3] - 0.1


def test_a_recalled_map_is_in_the_frame_of_the_view() -> None:
    store = VisitMaps(GRID)
    store.grow(1)
    store.remember(visit(0), torch.tensor([[0.0, 3.0, 1.0, 2.0]]), EVERYWHERE)
    plain, mirrored = recalled(store, visit(0)), recalled(store, visit(0, flip=True))
    torch.testing.assert_close(mirrored, plain[[1, 0, 3, 2]])


def test_ties_are_ordered_by_noise_and_nothing_else_is() -> None:
    store = VisitMaps(GRID)
    store.grow(1)
    noise = torch.tensor([[0.1, 0.9, 0.3, 0.999]])
    assert store.recall(visit(0), noise).argsort().tolist() == noise.argsort().tolist()
    store.remember(visit(0), torch.tensor([[4.0, 3.0, 2.0, 1.0]]), EVERYWHERE)
    assert store.recall(visit(0), noise).argsort().tolist() == [[3, 2, 1, 0]]


def test_two_processes_hold_the_visits_of_both(tmp_path: Path) -> None:
    first, second = in_two_processes(share_visits, tmp_path)
    assert torch.equal(first, second)
    values = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    alone = VisitMaps(GRID)
    alone.grow(5)
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.1, 0.2, 0.6, 0.7]] * 2)
    flip = torch.tensor([True, False, False, True])
    batch = Batch([], torch.tensor([3, 0, 4, 1]), box, flip)
    alone.remember(batch, values, torch.arange(4).expand(4, 4))
    assert torch.equal(alone.values, first)
    assert (alone.values[2] == 128).all()

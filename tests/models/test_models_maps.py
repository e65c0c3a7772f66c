"""Maps of items: what is kept, what is loaded, what several processes bring together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from patchmine.models.maps import ItemMaps

# Rank 0 brings items 0, 1 and 2, rank 1 brings 3, 6 and 5; item 4 could not be read.
TWO_PROCESSES = """
import sys, torch
from safetensors.torch import save_file
from patchmine.models.maps import ItemMaps
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
maps = torch.rand(7, 5, generator=torch.Generator().manual_seed(0))
store = ItemMaps(5)
shares = [[[0], [1, 2]], [[3, 6], [5]]]
store.replace((torch.tensor(items), maps[items]) for items in shares[rank])
save_file(store.state_dict(), f"{folder}/rank{rank}.safetensors")
torch.distributed.destroy_process_group()
"""


def some_maps() -> torch.Tensor:
    return torch.rand(7, 5, generator=torch.Generator().manual_seed(0))


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
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), str(tmp_path)], env=environment
        )
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=200) for process in started] == [0, 0]
    alone, read = ItemMaps(5), [0, 1, 2, 3, 5, 6]
    alone.replace([(torch.tensor(read), some_maps()[read])])
    for rank in (0, 1):
        assert torch.equal(load_file(tmp_path / f"rank{rank}.safetensors")["values"], alone.values)

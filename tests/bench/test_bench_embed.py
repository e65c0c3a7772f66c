"""The race of embeddings and predictions is one between ways to the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from skimage.transform import resize


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(2):
        coarse = np.random.default_rng(number).uniform(size=(6, 8, 3))
        pixels = (255 * resize(coarse, (240, 320))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return folder


@pytest.mark.parametrize("mode", ["embed", "predict"])
def test_both_ways_find_the_same(
    mode: str, photos: Path, tmp_path: Path, script: Callable[[str], ModuleType]
) -> None:
    against = script("embed_against_loop")
    race = against.RaceSettings(
        data=str(photos), mode=mode, model="test_vit", images=3, batch_size=2, workers=0
    )
    against.write_files(race, tmp_path / "images" / "all")
    against.write_model(race, tmp_path / "model")
    found = against.theirs(race, tmp_path)()
    assert len(found) == 3
    torch.testing.assert_close(found[0], found[2])  # of two photographs the first is there again
    seconds, processor = against.spent(against.ours(race, tmp_path))
    assert seconds > 0
    assert processor > 0
    table = pq.read_table(tmp_path / f"{mode}.parquet").to_pydict()
    if mode == "embed":
        ours = torch.tensor(table["embedding"])
        assert torch.cosine_similarity(ours, found).min() > 0.999
    else:
        assert table["class"] == [str(number) for number in found.argmax(1).tolist()]
        torch.testing.assert_close(
            torch.tensor(table["probability"]), found.amax(1), rtol=0, atol=0.05
        )

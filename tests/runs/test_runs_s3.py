"""Runs on shards of a local S3 server, by the command line: as on the same shards on a disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from object_server import CUT, SLOW_DOWN, object_server
from patchmine.data.sharding import write_shards
from patchmine.data.sources import remote
from patchmine.data.sources.source import open_source
from spoken import patchmine_says

SMALL = [
    *("model=vit_tiny_patch16_224", "model_args={depth: 1, embed_dim: 32, num_heads: 2}"),
    *("image_size=16", "patch_size=4", "method=mae", "method.decoder_embed_dim=16"),
    *("method.decoder_depth=1", "method.decoder_num_heads=2", "batch_size=8", "warmup_epochs=0"),
    *("workers=0", "tensorboard=false", "device=cpu"),
]


def test_pretrain_knn_and_embed_at_an_address_are_those_of_the_disk(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    write_shards(open_source(image_folder), tmp_path / "set", shard_size=60_000)
    made = dict[str, Any]()
    with object_server(monkeypatch) as served:
        for file in (tmp_path / "set").iterdir():
            served.put(f"set/{file.name}", file.read_bytes())
        for where, data in (("here", f"{tmp_path}/set"), ("there", "s3://bucket/set")):
            run, table = tmp_path / where, tmp_path / f"{where}.parquet"
            served.faults[:] = [CUT, SLOW_DOWN] if where == "there" else []
            patchmine_says("pretrain", f"data={data}", f"out={run}", "steps=5", *SMALL)
            patchmine_says("eval", "knn", str(run), f"data={data}", f"test={data}", "workers=0")
            patchmine_says("embed", str(run), f"data={data}", f"out={table}", "workers=0")
            assert served.faults == []
            top1 = json.loads((run / "eval/knn.json").read_text())["top1"]
            made[where] = weights(run), top1, pq.read_table(table)
        told = patchmine_says("pretrain", "data=s3://none/set", f"out={tmp_path / 'x'}", code=2)
        assert "data=s3://none/set: there is nothing at this address" in told
    (one, here, embedded), (other, there, fetched) = made["here"], made["there"]
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert here == there
    features = [name for name in embedded.column_names if name not in ("path", "file", "name")]
    assert embedded.select(features).equals(fetched.select(features))
    assert len(features) >= 1

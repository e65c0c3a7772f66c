"""``remote_gb`` holds for whatever reads an address, not only for what a run trains on."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchmine.data.sharding import write_shards
from patchmine.data.sources.source import open_source
from spoken import patchmine_says

SMALL = [
    *("model=vit_tiny_patch16_224", "model_args={depth: 1, embed_dim: 32, num_heads: 2}"),
    *("image_size=16", "patch_size=4", "batch_size=8", "warmup_epochs=0", "workers=0"),
    *("tensorboard=false", "device=cpu", "steps=4"),
]
MAE = ["method=mae", "method.decoder_embed_dim=16", "method.decoder_depth=1"]
MAE += ["method.decoder_num_heads=2"]


@pytest.fixture(scope="module")
def local(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 36 images, and a run on the same folder."""
    place = tmp_path_factory.mktemp("local")
    write_shards(open_source(image_folder), place / "set", say=lambda _: None)
    patchmine_says("pretrain", f"data={image_folder}", f"out={place / 'run'}", *SMALL, *MAE)
    return place


@pytest.mark.parametrize(
    "words",
    [
        "eval knn RUN data=HERE test=FAR workers=0",
        "eval cluster RUN data=FAR workers=0",
        "eval quality RUN data=FAR workers=0",
        "eval retrieval RUN data=HERE test=FAR workers=0",
        "eval fewshot RUN data=HERE test=FAR shots=[1] draws=1 workers=0",
        "embed RUN data=FAR out=OUT.parquet workers=0",
        "data inspect FAR",
        "data shard FAR out=OUT",
        "pretrain data=IMAGES monitor_data=FAR out=OUT",
        "pretrain data=HERE eval_data=HERE eval_test=FAR eval_every=1 out=OUT",
        "finetune RUN data=HERE test=FAR out=OUT",
    ],
)
def test_what_is_read_from_an_address_stays_within_its_room(
    words: str, local: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = dict(RUN=local / "run", HERE=local / "set", FAR=f"file://{local}/set")
    names |= dict(IMAGES=image_folder, OUT=tmp_path / "out")
    for name, meant in names.items():
        words = words.replace(name, str(meant))
    own = [] if words.startswith(("eval", "embed", "data")) else SMALL
    own = own[2:] if words.startswith("finetune") else own
    for gigabytes in (0, 1):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache{gigabytes}"))
        more = MAE if words.startswith("pretrain") else []
        given = words.replace(str(names["OUT"]), f"{names['OUT']}{gigabytes}")
        patchmine_says(*given.split(), *own, *more, f"remote_gb={gigabytes}")
        kept = list((tmp_path / f"cache{gigabytes}/patchmine/remote").glob("*/*"))
        assert bool(kept) is bool(gigabytes), kept

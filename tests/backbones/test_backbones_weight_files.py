"""Files of weights that are damaged or made to do harm: one sentence with the file's name, in
little memory.
"""

from __future__ import annotations

import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.backbones.test_backbones_loading import Small, save_torchscript
from torch import Tensor

from patchmine.backbones.export import Preprocessing, export_encoder
from patchmine.backbones.family import build_encoder
from patchmine.backbones.loading import read_checkpoint
from patchmine.backbones.weights import load_encoder, open_weights
from patchmine.errors import UserError

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return build_encoder(
        "vit_tiny_patch16_224", image_size=(32, 32), patch_size=8, model_args=SMALL
    ).state_dict()


def refused(path: Path, reader: Callable[[Path], Any] = read_checkpoint) -> str:
    with pytest.raises(UserError) as caught:
        reader(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    assert "is no regular file" in refused(tmp_path / "pipe.pth")
    assert "is no regular file" in refused(tmp_path / "pipe.pth", load_encoder)
    (tmp_path / "link.pth").symlink_to(tmp_path / "nothing")
    assert "is no regular file" in refused(tmp_path / "link.pth")


def written(folder: Path, kind: str, state: dict[str, Tensor]) -> Path:
    path = folder / f"whole.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "TorchScript":
        save_torchscript(Small(), path)
    else:
        torch.save({"model": state, "epoch": 3}, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "TorchScript"])
def test_damaged_files_are_read_or_refused_in_a_sentence(
    kind: str, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    few = {name: state[name] for name in ("cls_token", "norm.weight", "blocks.0.attn.qkv.bias")}
    whole = written(tmp_path, kind, few)
    data = whole.read_bytes()
    choose = random.Random(5)
    for number in range(150):
        mutant = bytearray(data)
        if number % 3 == 0:
            mutant = mutant[: choose.randrange(len(data))]
        for _ in range(choose.choice((1, 4, 30))):
            if mutant:
                mutant[choose.randrange(min(len(mutant), 4000))] = choose.randrange(256)
        path = tmp_path / f"mutant{number}{whole.suffix}"
        path.write_bytes(mutant)
        with suppress(UserError):  # and nothing else
            read_checkpoint(path)


def test_expanded_tensors_are_refused(tmp_path: Path) -> None:
    torch.save(
        {"a": torch.zeros(1, dtype=torch.half).expand(10**6, 10**6)}, tmp_path / "expanded.pth"
    )
    assert "a has shape (1000000, 1000000), more numbers than the file holds" in refused(
        tmp_path / "expanded.pth"
    )


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch 2.11
def test_sparse_quantised_and_empty_tensors_are_refused(tmp_path: Path) -> None:
    index = torch.zeros(2, 1, dtype=torch.long)
    sparse = torch.sparse_coo_tensor(index, torch.ones(1), (10**6, 10**6), check_invariants=True)
    for name, tensor in (("sparse", sparse), ("meta", torch.empty(3, device="meta"))):
        torch.save({"model": {"a": tensor}}, tmp_path / f"{name}.pth")
        assert "model.a is no plain tensor" in refused(tmp_path / f"{name}.pth")


def test_one_storage_under_many_names_does_not_grow(tmp_path: Path) -> None:
    large = torch.zeros(10**5, dtype=torch.half)
    torch.save({f"a{number}": large.view(-1) for number in range(500)}, tmp_path / "views.pth")
    assert "many times larger than the file" in refused(tmp_path / "views.pth")


def test_dictionaries_without_end_are_refused(tmp_path: Path) -> None:
    inner: dict[str, Any] = {"a": 1}
    for _ in range(6):
        inner = {str(number): inner for number in range(40)}
    torch.save(inner, tmp_path / "laughs.pth")
    assert (tmp_path / "laughs.pth").stat().st_size < 10_000
    assert "more than" in refused(tmp_path / "laughs.pth")
    deep = b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 100_000 + b"}" + b"s" * 100_000 + b"."
    with (
        zipfile.ZipFile(tmp_path / "laughs.pth") as good,
        zipfile.ZipFile(tmp_path / "deep.pth", "w") as bad,
    ):
        for name in good.namelist():
            bad.writestr(name, deep if name.endswith("data.pkl") else good.read(name))
    with pytest.raises(UserError, match=r"deep\.pth"):
        load_encoder(tmp_path / "deep.pth")


@pytest.mark.parametrize("kind", ["TorchScript", "zip"])
def test_packed_archives_are_not_unpacked(
    kind: str, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    whole = written(tmp_path, kind, state)
    with (
        zipfile.ZipFile(whole) as good,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bad,
    ):
        for name in good.namelist():
            bad.writestr(name, bytes(10**8) if name.endswith("/data/0") else good.read(name))
    assert (tmp_path / "bomb.pt").stat().st_size < 10**6
    assert "claim" in refused(tmp_path / "bomb.pt")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"{}", b"[" * 100_000, b'{"architecture": 5}', b"\xff\xfe{}"),
        *(b'{"architecture": "resnet18"}', b'{"model_type": "vit", "image_size": "a"}'),
        *(
            b'{"architecture": "swin_tiny_patch4_window7_224"}',
            b'{"architecture": "vit_of_tomorrow"}',
        ),
        b'{"architecture": "vit_tiny_patch16_224", "model_args": []}',
        b'{"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 1000000000}}',
        b'{"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 30000, "patch_size": 8}}',
        b'{"architecture": "vit_tiny_patch16_224", "model_args": {"embed_dim": 3000000}}',
        b'{"architecture": "vit_tiny_patch16_224", "model_args": {"depth": "many", "nothing": 1}}',
        b'{"architecture": "video_vit_base_patch16", "model_args": {"num_frames": 1000000000}}',
        b'{"architecture": "resnet18", "model_args": {"layers": [1000000000, 1, 1, 1]}}',
    ],
)
def test_a_configuration_that_is_none_is_a_sentence(
    content: bytes, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError):
        load_encoder(tmp_path)
    with pytest.raises(UserError):
        load_encoder(tmp_path / "model.safetensors")


def test_a_small_file_builds_no_large_network(tmp_path: Path) -> None:
    """Widths of 200,000 with one block would need 2 TB: the shapes are compared before there is
    memory for them.
    """
    width = 200_000
    tensors = {
        "patch_embed.proj.weight": torch.zeros(width, 1, 1, 1),
        "pos_embed": torch.zeros(1, 2, width),
        "cls_token": torch.zeros(1, 1, width),
        "blocks.0.mlp.fc1.weight": torch.zeros(1, width),
    }
    save_file(tensors, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"wide\.safetensors"):
        load_encoder(tmp_path / "wide.safetensors", num_heads=1)
    tensors |= {"blocks.999999.mlp.fc1.weight": torch.zeros(1, 1)}
    save_file(tensors, tmp_path / "deep.safetensors")
    with pytest.raises(UserError, match=r"lacks blocks: it has 2"):
        load_encoder(tmp_path / "deep.safetensors", num_heads=1)


@pytest.mark.parametrize(
    "name", ["patch_embed.proj.weight", "pos_embed", "cls_token", "blocks.0.mlp.fc1.weight"]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (1, 2, 3), (2, 0, 3, 3), (1, 2, 3, 4, 5)])
def test_tensors_of_odd_shapes_are_a_sentence(
    name: str, shape: tuple[int, ...], tmp_path: Path, state: dict[str, Tensor]
) -> None:
    save_file(state | {name: torch.ones(shape)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"odd\.safetensors"):
        open_weights(tmp_path / "odd.safetensors", num_heads=3)


def test_names_that_are_no_text_do_not_stop_the_reader(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    torch.save(
        {"model": state, "groups": {0: torch.ones(1), (1, 2): {3: torch.ones(1)}}, 7: 8},
        tmp_path / "a.pth",
    )
    assert load_encoder(tmp_path / "a.pth", num_heads=3).embed_dim == 48
    odd = {f"bad\n{chr(0xDCE9)}": torch.ones(2), **state}
    torch.save({"model": odd}, tmp_path / "b.pth")
    assert r"bad\n" in refused(tmp_path / "b.pth", lambda path: load_encoder(path, num_heads=3))


def test_an_export_with_weights_that_are_not_finite_is_not_written(tmp_path: Path) -> None:
    encoder = build_encoder(
        "vit_tiny_patch16_224", image_size=(32, 32), patch_size=8, model_args=SMALL
    )
    with torch.no_grad():
        encoder.blocks[1].norm1.bias[2] = float("nan")
    with pytest.raises(UserError, match=r"blocks.1.norm1.bias has 1 of 48 numbers that are NaN"):
        export_encoder(encoder, tmp_path / "export", Preprocessing([0.5] * 3, [0.5] * 3))
    assert not (tmp_path / "export").exists()


def test_a_header_that_claims_more_than_there_is(tmp_path: Path) -> None:
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    ).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    refused(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", 2**60) + header)
    refused(tmp_path / "b.safetensors")

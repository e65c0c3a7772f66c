"""Reading files without running them, and saying what became of every tensor."""

from __future__ import annotations

import argparse
import os
import warnings
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from patchmine.backbones.loading import LoadReport, load_tensors, read_checkpoint, tensors_only
from patchmine.errors import UserError


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def save_torchscript(module: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch, and still the format of old files
        torch.jit.save(torch.jit.trace(module, torch.ones(1, 2)), path)


class Small(nn.Module):
    """Parameters of two types, a buffer that is a view, a submodule."""

    odd: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Parameter(torch.arange(6.0).reshape(2, 3).half())
        self.inner = nn.Sequential(nn.Linear(2, 3))
        self.register_buffer("odd", torch.arange(8.0).reshape(2, 4).T[1:])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_pickle_with_settings_is_read(tmp_path: Path) -> None:
    torch.save(
        {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(mask_ratio=0.75)},
        tmp_path / "a.pth",
    )
    content = read_checkpoint(tmp_path / "a.pth")
    assert content["args"].mask_ratio == 0.75
    assert torch.equal(content["model"]["a"], torch.ones(2))


@pytest.mark.parametrize("zipped", [True, False])
def test_what_scripts_leave_beside_their_weights_is_passed_over(
    tmp_path: Path, zipped: bool
) -> None:
    content = {
        "model": {"a": torch.ones(2)},
        "args": argparse.Namespace(output_dir=Path("out"), input_size=224, betas=(0.9, 0.95)),
        "best": np.float64(0.7),
        "history": np.arange(6).reshape(2, 3),
        "when": datetime(2026, 11, 28, tzinfo=UTC),
    }
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "a.pth")
    assert torch.equal(read["model"]["a"], torch.ones(2))
    assert read["args"].input_size == 224
    assert not isinstance(read["args"].output_dir, Path)


@pytest.mark.parametrize("zipped", [True, False])
def test_both_of_torchs_formats_are_read(tmp_path: Path, zipped: bool) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert read_checkpoint(tmp_path / "a.pt")["a"].tolist() == [1, 1]


def test_torchscript_archives_are_refused_with_a_remedy(tmp_path: Path) -> None:
    save_torchscript(Small(), tmp_path / "script.pt")
    with pytest.raises(UserError, match=r"script\.pt is a TorchScript archive.*safetensors"):
        read_checkpoint(tmp_path / "script.pt")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    torch.save({"model": Trap(touched)}, tmp_path / "trap.pth")
    with pytest.raises(
        UserError, match=r"trap.pth holds a \S*\.system, which patchmine does not unpickle"
    ):
        read_checkpoint(tmp_path / "trap.pth")
    assert not touched.exists()


class Getting:
    """Gets an attribute when it is unpickled, as a way to any function."""

    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return getattr, (np.dtype("f4"), "newbyteorder")


def test_values_that_are_passed_over_do_nothing(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": Getting()}, tmp_path / "a.pth")
    read = read_checkpoint(tmp_path / "a.pth")
    assert not callable(read["b"])
    assert torch.equal(read["a"], torch.ones(2))


def test_files_that_are_no_weights_are_named(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2000)}, tmp_path / "whole.pth")
    save_file({"a": torch.ones(2000)}, tmp_path / "whole.safetensors")
    for suffix in ("pth", "safetensors"):
        data = (tmp_path / f"whole.{suffix}").read_bytes()
        for number, content in enumerate([b"", b"some text", data[: len(data) // 2], data[:5]]):
            path = tmp_path / f"broken{number}.{suffix}"
            path.write_bytes(content)
            with pytest.raises(
                UserError, match=rf"weights={path} cannot be read as weights .*complete"
            ):
                read_checkpoint(path, "weights")
    with pytest.raises(UserError, match=r"weights=.*absent.pth does not exist"):
        read_checkpoint(tmp_path / "absent.pth", "weights")
    with pytest.raises(UserError, match="is a folder, not a file of weights"):
        read_checkpoint(tmp_path)
    torch.save(torch.ones(2), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="holds a Tensor, not a dictionary"):
        read_checkpoint(tmp_path / "tensor.pth")


def test_prefixes_of_wrappers_and_counters_are_left_out() -> None:
    mixed = {
        "module.a": torch.ones(1).half(),
        "_orig_mod.b": torch.ones(1),
        "steps": torch.tensor(3),
        "epoch": 4,
    }
    plain = tensors_only(mixed)
    assert plain.keys() == {"a", "b"}
    assert plain["a"].dtype == torch.float32


def test_the_report_accounts_for_every_tensor() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    tensors = {
        name: torch.full_like(t, 5.0) for name, t in module.state_dict().items() if name != "1.bias"
    }
    before = module[1].bias.detach().clone()
    report = LoadReport("file")
    load_tensors(module, tensors | {"extra": torch.ones(1)}, report, allow=["1.*", "extra"])
    assert sorted(report.loaded) == ["0.bias", "0.weight", "1.weight"]
    assert report.missing == ["1.bias"]
    assert report.unexpected == ["extra"]
    assert torch.equal(module[1].bias, before)
    assert torch.all(module[1].weight == 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": torch.ones(1)}, "1 unexpected tensor"),
        ({"0.weight": torch.ones(3, 3)}, r"0.weight has shape \(3, 3\), the model wants \(3, 2\)"),
        ({"0.bias": None}, r"1 missing tensor\(s\): 0.* allow=\[0.bias\]"),
    ],
)
def test_surprises_are_refused_and_leave_the_module_alone(
    change: dict[str, Tensor | None], message: str
) -> None:
    module = nn.Sequential(nn.Linear(2, 3))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tensors = {name: torch.zeros_like(t) for name, t in before.items()} | change
    with pytest.raises(UserError, match=message):
        load_tensors(
            module, {name: t for name, t in tensors.items() if t is not None}, LoadReport("file")
        )
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_the_report_folds_block_numbers() -> None:
    names = [f"blocks.{i}.norm1.{part}" for i in range(3) for part in ("weight", "bias")]
    report = LoadReport(
        "a.pth", loaded=[*names, "cls_token"], missing=names[:2], notes=["look here"]
    )
    assert "blocks.*.norm1 (6), cls_token" in report.render()
    assert "missing       2  blocks.0.norm1.weight, blocks.0.norm1.bias" in report.render()
    assert "note: look here" in report.render()
    many = [f"decoder_blocks.{i}.part{k}.weight" for i in range(2) for k in range(20)]
    assert "40  decoder_blocks (40)" in LoadReport("a.pth", loaded=many).render()

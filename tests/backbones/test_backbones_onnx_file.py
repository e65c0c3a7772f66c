"""The same outputs from timm, ONNX and transformers, and what happens where they are not."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from fixtures.networks import OtherWhenTraced, Rows, network_of, rows
from patchmine.backbones.classifier import Classifier, Head
from patchmine.backbones.export import Preprocessing, export_encoder
from patchmine.backbones.network import Network, check_outputs, check_transformers
from patchmine.backbones.onnx_file import write_onnx
from patchmine.errors import UserError, silent

OPENED_BY_TIMM = ("vit", "five channels", "beit", "resnet")


@pytest.fixture
def onnxruntime() -> Any:
    pytest.importorskip("onnx", reason="the extra `export` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    return pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")


@pytest.mark.parametrize("kind", ["vit", "beit", "small stem", "clips"])
def test_onnxruntime_gives_what_timm_gives(kind: str, tmp_path: Path, onnxruntime: Any) -> None:
    network, said = network_of(kind), list[str]()
    file = write_onnx(network, tmp_path / "new" / "x.onnx", said.append)
    assert [path.name for path in file.parent.iterdir()] == ["x.onnx"]
    assert "features in onnxruntime" in said[0]
    reference = network.module
    if kind in OPENED_BY_TIMM:
        folder = export_encoder(reference, tmp_path / "timm", network.preprocessing)
        reference = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    session = onnxruntime.InferenceSession(file)
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert taken.name == ("clips" if kind == "clips" else "images")
    assert taken.shape == ["batch", *network.input_size]
    assert given.shape == ["batch", reference.num_features]
    for count in (1, 2, 5):
        items = torch.randn(count, *network.input_size)
        (found,) = session.run(["features"], {taken.name: items.numpy()})
        with torch.no_grad():
            wanted = reference(items)
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)


def test_the_file_says_how_images_are_prepared_and_not_where_it_was_made(
    tmp_path: Path, onnxruntime: Any
) -> None:
    made = network_of("clips")
    network = replace(made, loss="bce", names=["cat", "Käfer"])
    file = write_onnx(network, tmp_path / "x.onnx", silent)
    session = onnxruntime.InferenceSession(file)
    told = session.get_modelmeta().custom_metadata_map
    assert [told.pop(name) for name in ("architecture", "interpolation", "loss")] == [
        "video_vit_tiny_patch16",
        "bicubic",
        "bce",
    ]
    assert {name: json.loads(value) for name, value in told.items()} == {
        "image_size": [32, 48],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "crop_pct": 0.875,
        "frames": 4,
        "stride": 3,
        "class_names": ["cat", "Käfer"],
    }
    assert session.get_outputs()[0].name == "logits"
    assert b"site-packages" not in file.read_bytes()


class NotInOnnx(Rows):
    def forward(self, images: Tensor) -> Tensor:
        return torch.linalg.eigvals(images).real.sum(1)


class OfTwo(Rows):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + torch.ones(len(images), 1)


@pytest.mark.usefixtures("onnxruntime")
@pytest.mark.parametrize(
    ("module", "part"),
    [
        (OtherWhenTraced(), r"nothing was written: .* differ by at most 1.0e-03 .*use to=timm"),
        (OfTwo(), r"cannot write rows as ONNX \(.*number of images that is fixed\): use to=timm"),
        (NotInOnnx(), r"torch .* cannot write rows as ONNX \(.*linalg_eig.*\): use to=timm"),
    ],
)
def test_a_file_that_would_be_wrong_is_not_written(
    module: nn.Module, part: str, tmp_path: Path
) -> None:
    (tmp_path / "x.onnx").write_text("an older one")
    with pytest.raises(UserError, match=part):
        write_onnx(rows(module), tmp_path / "x.onnx", silent)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an older one"]


@pytest.mark.parametrize(
    ("error", "refused"), [(0.0, False), (9e-5, False), (1.1e-4, True), (float("nan"), True)]
)
def test_outputs_may_differ_by_rounding_only(error: float, refused: bool) -> None:
    def other(images: Tensor) -> Tensor:
        found = 1000 * Rows()(images)
        found[-1, 0] += error * found.abs().max()
        return found

    class Thousands(Rows):
        def forward(self, images: Tensor) -> Tensor:
            return 1000 * super().forward(images)

    if refused:
        with pytest.raises(UserError, match=r"which is more than 0\.0001"):
            check_outputs(rows(Thousands()), other, "ort 1.0")
    else:
        assert "features in ort 1.0" in check_outputs(rows(Thousands()), other, "ort 1.0")


def test_outputs_of_another_shape_are_refused() -> None:
    with pytest.raises(UserError, match="differ by at most inf"):
        check_outputs(rows(Rows()), lambda images: Rows()(images)[:, :1], "ort 1.0")


@pytest.mark.usefixtures("onnxruntime")
def test_what_onnx_cannot_take_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"out=.*x.pt: .*for example out=.*x.pt.onnx"):
        write_onnx(rows(Rows()), tmp_path / "x.pt", silent)
    huge = nn.Linear(2**15, 2**15, device="meta")
    large = Network(huge, "huge", (3, 4, 4), Preprocessing([0.5], [0.5]))
    monkeypatch.setattr("patchmine.backbones.onnx_file.refuse_non_finite", lambda *_: None)
    with pytest.raises(UserError, match=r"2 GiB, and the weights of huge are 4\.0 GiB: use"):
        write_onnx(large, tmp_path / "x.onnx", silent)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(UserError, match=r"folder.onnx cannot be written \(Is a directory\)"):
        write_onnx(rows(Rows()), tmp_path / "folder.onnx", silent)


def hide(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda each: None if each == name else found(each)
    )


@pytest.mark.usefixtures("onnxruntime")
@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_named_with_its_remedy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(name, monkeypatch)
    with pytest.raises(UserError, match=rf'lacks {name}: run `pip install "patchmine\[export\]"`'):
        write_onnx(rows(Rows()), tmp_path / "x.onnx", silent)


@pytest.mark.parametrize("kind", OPENED_BY_TIMM)
def test_transformers_gives_what_timm_gives(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="`export` is not installed")
    network, said = network_of(kind), list[str]()
    folder = export_encoder(
        network.module,
        tmp_path / "export",
        network.preprocessing,
        check=lambda new: check_transformers(network, said.append, new),
    )
    assert f"features in transformers {transformers.__version__} differ" in said[0]
    opened = transformers.AutoModel.from_pretrained(folder).eval()
    images = torch.randn(2, *network.input_size)
    with torch.no_grad():
        torch.testing.assert_close(opened(images).pooler_output, network.module(images))


def classifier_of(kind: str, pool: str) -> tuple[Network, Head]:
    network = network_of(kind)
    layer = nn.Linear(network.module.num_features, 3)
    head = Head(layer, pool, ["cat", "dog", "Käfer"])
    module = Classifier(network.module, layer, pool).eval()
    return replace(network, module=module, loss="ce", names=head.names), head


@pytest.mark.parametrize(
    ("kind", "pool"),
    [
        ("five channels", "mean"),
        ("vit", "cls"),
        ("beit", "mean"),
        ("resnet", "mean"),
        ("clips", "mean"),
    ],
)
def test_a_classifier_gives_the_same_logits_everywhere(
    kind: str, pool: str, tmp_path: Path, onnxruntime: Any
) -> None:
    transformers = pytest.importorskip("transformers", reason="`export` is not installed")
    network, head = classifier_of(kind, pool)
    items = torch.randn(5, *network.input_size)
    with torch.no_grad():
        wanted = network.module(items)
    session = onnxruntime.InferenceSession(write_onnx(network, tmp_path / "x.onnx", silent))
    (found,) = session.run(["logits"], {network.input_name: items.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)
    if kind == "clips":
        return
    said = list[str]()
    folder = export_encoder(
        network.module.encoder,  # type: ignore[arg-type]
        tmp_path / "export",
        network.preprocessing,
        head,
        check=lambda new: check_transformers(network, said.append, new),
    )
    assert "logits in transformers" in said[0]
    opened = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    classifier = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(items).logits, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(classifier(items), wanted, rtol=1e-4, atol=1e-5)
    assert list(opened.config.id2label.values()) == ["cat", "dog", "Käfer"]


def test_an_export_that_transformers_reads_otherwise_leaves_the_older_one(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra `export` is not installed")
    network, other = network_of("resnet"), network_of("resnet")
    folder = export_encoder(network.module, tmp_path / "export", network.preprocessing)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other.module.conv1.weight.data += 1  # type: ignore[union-attr]
    with pytest.raises(UserError, match="nothing was written"):
        export_encoder(
            network.module,
            folder,
            network.preprocessing,
            check=lambda new: check_transformers(other, silent, new),
        )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_without_transformers_it_is_said_that_nothing_was_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide("transformers", monkeypatch)
    said = list[str]()
    check_transformers(network_of("resnet"), said.append, tmp_path)
    assert said == [
        'Not checked in transformers, which is not installed: `pip install "patchmine[export]"`, '
        "and export again."
    ]

"""The same outputs from a file of torch.export, which torch opens alone."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from fixtures.networks import OtherWhenTraced, Rows, network_of, rows
from patchmine.backbones.torch_file import TOLD, write_torch
from patchmine.errors import UserError, silent


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11 of its own
@pytest.mark.parametrize("kind", ["vit", "beit", "small stem", "clips"])
def test_torch_gives_what_the_network_gives(kind: str, tmp_path: Path) -> None:
    network, said = network_of(kind), list[str]()
    file = write_torch(network, tmp_path / "new" / "x.pt2", said.append)
    assert [path.name for path in file.parent.iterdir()] == ["x.pt2"]
    assert f"features in torch.export {torch.__version__}" in said[0]
    program = torch.export.load(file)
    for count in (1, 2, 5):
        items = torch.randn(count, *network.input_size)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(items), network.module(items))
    elsewhere = move_to_device_pass(program, "meta").module()  # as to a GPU
    assert elsewhere(torch.zeros(3, *network.input_size, device="meta")).shape[0] == 3


def test_the_file_says_how_images_are_prepared_and_not_where_it_was_made(tmp_path: Path) -> None:
    network = network_of("clips")
    file, extra = write_torch(network, tmp_path / "x.pt2", silent), {TOLD: ""}
    torch.export.load(file, extra_files=extra)
    assert json.loads(extra[TOLD]) == network.told()
    assert network.told()["image_size"] == [32, 48]
    archive = zipfile.ZipFile(file)
    places = [str(Path(__file__).parents[2]), "site-packages", str(tmp_path), ".new"]
    for name in archive.namelist():
        assert not [part for part in places if part.encode() in archive.read(name)]
        assert ".new" not in name


class OfTwo(Rows):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + torch.ones(2, 1)


@pytest.mark.parametrize(
    ("module", "part"),
    [
        (OtherWhenTraced(), r"nothing was written: .* differ by at most 1.0e-03 .*use to=timm"),
        (OfTwo(), r"torch .* cannot write rows as a graph \(.*\): use to=timm"),
    ],
)
def test_a_file_that_would_be_wrong_is_not_written(
    module: nn.Module, part: str, tmp_path: Path
) -> None:
    (tmp_path / "x.pt2").write_text("an older one")
    with pytest.raises(UserError, match=part):
        write_torch(rows(module), tmp_path / "x.pt2", silent)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an older one"]

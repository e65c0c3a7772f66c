"""A network as one file of torch.export, which torch alone opens."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.export import ExportedProgram

from patchmine.backbones.loading import refuse_non_finite
from patchmine.backbones.network import Network, check_outputs
from patchmine.disk import output
from patchmine.errors import Say, UserError, foreign_parser, shown_name

TOLD = "network.json"
"""The name inside of the file of what a person needs to know to use the network."""


def write_torch(network: Network, file: Path, say: Say) -> Path:
    """Write a network for any number of items at once, as `torch.export.load` reads it.

    Args:
        network: what is written.
        file: ends in .pt2; it appears complete and checked, or not at all.
        say: hears how far the file's outputs are from the network's.

    Returns:
        The file.

    Raises:
        UserError: the network cannot be written or gives other outputs there, or the file cannot
            be written.
    """
    refuse_non_finite(network.module.state_dict(), f"out={shown_name(file)}")
    with output(file) as new:
        told = json.dumps(network.told(), ensure_ascii=False)
        with new.open("wb") as content:  # of a path the archive would keep the temporary name
            torch.export.save(traced(network), content, extra_files={TOLD: told})
        with torch.no_grad():
            loaded = torch.export.load(new).module()
            checked = check_outputs(network, loaded, f"torch.export {torch.__version__}")
    say(checked)
    return file


def traced(network: Network) -> ExportedProgram:
    """The network as a graph for any number of items, without the places of our source code.

    Raises UserError where torch cannot make one.
    """

    def refuse(reason: str) -> UserError:
        return UserError(
            f"torch {torch.__version__} cannot write {network.architecture} as a graph "
            f"({reason}): {network.remedy}"
        )

    # A batch of 1 would be taken for a constant.
    example = torch.zeros(2, *network.input_size)
    with foreign_parser(refuse):
        program = torch.export.export(
            network.module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of source code, under the paths of this machine
    return program

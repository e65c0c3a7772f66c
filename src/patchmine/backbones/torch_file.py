"""A network as one file of torch.export, which torch alone opens."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from patchmine.backbones.loading import refuse_non_finite
from patchmine.backbones.network import Network, check_outputs
from patchmine.errors import Say, UserError, foreign_parser, shown_name
from patchmine.system.disk import output

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
    if file.suffix.lower() != ".pt2":
        name = shown_name(file)
        raise UserError(f"out={name}: to=torch writes one file; write for example out={name}.pt2")
    refuse_non_finite(network.module.state_dict(), f"out={shown_name(file)}")
    with output(file) as new:
        program = traced(network.module, network)
        save_graph(program, new, {TOLD: json.dumps(network.told(), ensure_ascii=False)})
        checked = check_graph(network, torch.export.load(new).module())
    say(checked)
    return file


def traced(
    module: nn.Module, network: Network, weights: Mapping[str, Tensor] | None = None
) -> ExportedProgram:
    """A module as a graph for any number of the network's items.

    Args:
        module: gives (B, ...) of (B, *input_size).
        network: whose input it takes.
        weights: first input of a module that has none itself; None of any other.

    Raises:
        UserError: torch cannot make a graph of it.
    """

    def refuse(reason: str) -> UserError:
        return UserError(
            f"torch {torch.__version__} cannot write {network.architecture} as a graph "
            f"({reason}): {network.remedy}"
        )

    # A batch of 1 would be taken for a constant.
    inputs: tuple[Any, ...] = (torch.zeros(2, *network.input_size),)
    shapes: tuple[Any, ...] = ({0: torch.export.Dim("batch")},)
    if weights is not None:
        inputs, shapes = (dict(weights), *inputs), (dict.fromkeys(weights), *shapes)
    with foreign_parser(refuse):
        return torch.export.export(module, inputs, dynamic_shapes=shapes)


def save_graph(program: ExportedProgram, file: Path, told: Mapping[str, str] | None = None) -> None:
    """Write a graph without the places of our source code, and without its example.

    Args:
        program: of `traced`; it is changed.
        file: ends in .pt2.
        told: texts in it, by name.
    """
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of source code, under the paths of this machine
    program.example_inputs = None
    # Not to the file at once: torch ends the process where a file cannot take it, and keeps the
    # temporary name of a path in the archive.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files=dict(told or {}))
    file.write_bytes(content.getbuffer())


def check_graph(network: Network, other: Callable[[Tensor], Tensor]) -> str:
    """A sentence on how far a loaded graph is from the network; UserError if far."""
    with torch.no_grad():
        return check_outputs(network, other, f"torch.export {torch.__version__}")

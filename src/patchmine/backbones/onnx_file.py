"""A network as one ONNX file, which onnxruntime opens before it takes its place."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from patchmine.backbones.loading import refuse_non_finite
from patchmine.backbones.network import Network, check_outputs
from patchmine.errors import Say, UserError, foreign_parser, reason_of, shown_name
from patchmine.system.disk import output

_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
_LARGEST = 2**31 - 2**24  # bytes: protobuf's files end at 2 GiB, and the graph needs a little


def refuse_missing_libraries() -> None:
    """UserError where a library is not installed that writes ONNX or checks it."""
    if missing := [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"to=onnx needs {', '.join(_LIBRARIES)}, and this Python lacks {', '.join(missing)}: "
            'run `pip install "patchmine[export]"`'
        )


def write_onnx(network: Network, file: Path, say: Say) -> Path:
    """Write a network for any number of items at once, with how they are prepared as metadata.

    Args:
        network: what is written.
        file: ends in .onnx; it appears complete and checked, or not at all.
        say: hears how far onnxruntime's outputs are from the network's.

    Returns:
        The file.

    Raises:
        UserError: a library is missing, the network cannot be written or gives other outputs there,
            or the file cannot be written.
    """
    refuse_missing_libraries()
    if file.suffix.lower() != ".onnx":
        name = shown_name(file)
        raise UserError(f"out={name}: to=onnx writes one file; write for example out={name}.onnx")
    tensors = network.module.state_dict()
    refuse_non_finite(tensors, f"out={shown_name(file)}")
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > _LARGEST:
        raise UserError(
            f"to=onnx writes one file of at most 2 GiB, and the weights of {network.architecture} "
            f"are {size / 2**30:.1f} GiB: {network.remedy}"
        )
    with output(file) as new:
        program = _traced(network)
        program.save(new, external_data=False)
        checked = _checked(network, new)
    say(checked)
    return file


def _traced(network: Network) -> Any:
    """torch's ONNXProgram of the network, with what a person needs to know to use it."""

    def refuse(reason: str) -> UserError:
        return UserError(
            f"torch {torch.__version__} cannot write {network.architecture} as ONNX ({reason}): "
            f"{network.remedy}"
        )

    # A batch of 1 would be taken for a constant.  Attention is traced as the plain formula: with
    # relative positions, torch's fused one gets a memory layout that the exporter trips over.
    example = torch.zeros(2, *network.input_size)
    with foreign_parser(refuse), sdpa_kernel(SDPBackend.MATH):
        try:
            program = torch.onnx.export(
                network.module,
                (example,),
                dynamo=True,
                input_names=[network.input_name],
                output_names=[network.output_name],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason: BaseException = error  # its own text is advice to programmers
            while reason.__cause__ is not None:
                reason = reason.__cause__
            raise refuse(reason_of(reason)) from error
    assert program is not None  # it is None for torch's older exporter only
    taken = program.model.graph.inputs[0].shape
    if taken is None or isinstance(taken[0], int):  # of len(items) in its code, perhaps
        raise refuse(f"its outputs hang on a number of {network.input_name} that is fixed")
    for node in program.model.graph:
        node.metadata_props.clear()  # lines of source code, under the paths of this machine
    program.model.metadata_props.update(_metadata(network))
    program.model.doc_string = (
        f"{network.input_name}: values in [0, 1], then (x - mean) / std, float32"
    )
    return program


def _metadata(network: Network) -> dict[str, str]:
    """Text as it is, all else as JSON."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in network.told().items()
    }


def _checked(network: Network, file: Path) -> str:
    """How far the file's outputs in onnxruntime are from the network's; UserError if far."""
    import onnxruntime

    library = f"onnxruntime {onnxruntime.__version__}"

    def refuse(reason: str) -> UserError:
        return UserError(
            f"nothing was written: {library} cannot run what torch {torch.__version__} made of "
            f"{network.architecture} ({reason}): install a newer onnxruntime"
        )

    def outputs(items: Tensor) -> Tensor:
        (found,) = session.run(None, {network.input_name: items.numpy()})
        return torch.from_numpy(found)

    with foreign_parser(refuse):
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return check_outputs(network, outputs, library)

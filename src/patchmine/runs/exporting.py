"""Runs out into other people's formats: timm, transformers, ONNX, torch alone, MAE and HPM."""

from __future__ import annotations

from functools import partial
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from patchmine.backbones import onnx_file, reference, torch_file
from patchmine.backbones.classifier import Classifier, Head
from patchmine.backbones.description import note
from patchmine.backbones.family import Encoder, family_of, input_size
from patchmine.backbones.network import Network, check_transformers
from patchmine.config.schema import DetectConfig, FinetuneConfig, PretrainConfig, SegmentConfig
from patchmine.errors import Say, UserError, shown_name, silent
from patchmine.models.cross_decoder import is_cross
from patchmine.models.settings import MethodSettings
from patchmine.runs.detector_folder import write_detector
from patchmine.runs.folder import RunFolder, preprocessing_of, write_export
from patchmine.system.disk import output, system_errors
from patchmine.task import Method

What = Literal["auto", "encoder", "full"]
Target = Literal["timm", "onnx", "torch", "transformers"]

_ONE_FILE = {"onnx": (".onnx", onnx_file.write_onnx), "torch": (".pt2", torch_file.write_torch)}
_FULL = ("mae", "hpm")  # the methods whose whole files the authors' code reads
_TOLD = ("decoder_num_heads", "decoder_norm_eps", "mask_ratio", "norm_pix_loss")
"""Settings of the method that such a file tells."""


def export_run(
    path: str | PathLike[str],
    out: str | None,
    *,
    weights: str,
    what: What = "auto",
    to: Target = "timm",
    say: Say = silent,
) -> Path:
    """Write what a run learned for timm, transformers, ONNX or torch alone, or its full method.

    Args:
        path: the run's folder.
        out: the folder or file, None for ``export/``, ``export.onnx`` or ``export.pt2`` in the run;
            of the full method a .safetensors file under the reference code's names, which
            `import_file` reads (of clips VideoMAE's).
        weights: which of the run's networks.
        what: "auto": the encoder, with the classifier of a fine-tuned run, and in one file with the
            head of a run that segments; "encoder": alone; "full": of a run that pre-trains.
        to: "timm" and "transformers" are one folder, which the latter also opens and compares;
            "onnx" and "torch" one file, which is compared; of a run that detects "torch" is a
            folder (`write_detector`).
        say: hears what a comparison found.

    Returns:
        The folder or file.

    Raises:
        UserError: the run has no such weights, ``to`` does not take such a network or needs a
            library that is missing, or ``out`` cannot be written.
    """
    run = RunFolder(path)
    if what == "full":
        return _write_full(run, out, weights)
    if to == "onnx":
        onnx_file.refuse_missing_libraries()
    if isinstance(run.config, DetectConfig) and to in _ONE_FILE and what == "auto":
        return _write_detector(run, run.config, out, to, say)
    folder = run.export_folder(weights)
    if to in _ONE_FILE:
        ending, write = _ONE_FILE[to]
        return write(_network(run, weights, what), Path(out or folder.with_suffix(ending)), say)
    encoder, head = run.encoder(weights), _classifier(run, what)
    if to == "timm":
        return write_export(run.config, encoder, out or folder, head)
    network = _features(run, encoder, head)
    if not family_of(encoder).timm_opens(encoder):
        raise UserError(
            f"to=transformers: {run.path} is of {network.architecture} for "
            f"{'images with a small stem' if network.input_name == 'images' else 'videos'}, which "
            "transformers cannot build: use to=onnx, or to=timm, whose folder "
            "patchmine.load_encoder opens"
        )
    check = partial(check_transformers, network, say)
    return write_export(run.config, encoder, out or folder, head, check=check)


def _write_detector(
    run: RunFolder, config: DetectConfig, out: str | None, to: Target, say: Say
) -> Path:
    """The folder of a run that detects."""
    if to != "torch":
        raise UserError(
            f"to={to}: {run.path} {run.made}, and what finds objects is no single graph: to=torch "
            "writes a folder that needs no patchmine, what=encoder the encoder alone"
        )
    folder = run.path / "detector" if out is None else Path(out)
    if folder.suffix.lower() == ".pt2":
        raise UserError(
            f"out={shown_name(folder)}: of a run that detects to=torch writes a folder; write for "
            f"example out={shown_name(folder.with_suffix(''))}"
        )
    return write_detector(run, config, folder, say)


def _network(run: RunFolder, weights: str, what: What) -> Network:
    """What becomes one file.  UserError where it cannot."""
    encoder = run.encoder(weights)
    if what == "encoder":
        return _features(run, encoder, None)
    if isinstance(run.config, SegmentConfig):
        return _pixels(run, run.config)
    return _features(run, encoder, _classifier(run, what))


def _classifier(run: RunFolder, what: What) -> Head | None:
    """What goes with an encoder."""
    wanted = what == "auto" and isinstance(run.config, FinetuneConfig)
    return run.classify().head_of() if wanted else None


def _features(run: RunFolder, encoder: Encoder, head: Head | None) -> Network:
    """An encoder of a run, with its classifier where there is one."""
    return Network(
        encoder if head is None else Classifier(encoder, head.layer, head.pool).eval(),
        encoder.built_from.architecture,
        input_size(encoder),
        preprocessing_of(run.config, encoder),
        loss=None if head is None else head.loss,
        names=() if head is None else head.names,
    )


def _pixels(run: RunFolder, config: SegmentConfig) -> Network:
    """Encoder and head of a run that segments: from a window to the scores of its pixels."""
    task = run.segmenter()
    return Network(
        task.network().eval(),
        task.encoder.built_from.architecture,
        (config.channels, *config.image_size),
        preprocessing_of(config, task.encoder),
        loss="ce",
        names=task.names,
        maps={
            "head": config.head,
            "test_stride": config.window_stride,
            "short_side": config.short_side,
            "palette": config.palette,
        },
    )


def _write_full(run: RunFolder, out: str | None, weights: str) -> Path:
    """The whole method of a run under the names of its reference code."""
    config = run.config
    if not isinstance(config, PretrainConfig):
        raise UserError(
            f"what=full writes a pre-training method, and {run.path} {run.made}: leave the "
            "setting out"
        )
    name = config.method.name
    _check_full(config.method, run)
    target = run.path / f"{name}-{weights}.safetensors" if out is None else Path(out)
    if target.suffix != ".safetensors":
        raise UserError(
            f"out={target}: the full method is one file; write for example out={target}.safetensors"
        )
    method = run.method()
    tensors = reference.to_reference_names(method.state_dict(), teacher=weights == "teacher")
    if not tensors:
        raise UserError(
            f"{run.path} holds no teacher: method={name} keeps none; use weights=student"
        )
    encoder: Encoder = method.encoder
    clip = family_of(encoder).clip(encoder)
    if clip is None:
        table: Tensor = method.get_submodule("decoder_input").get_buffer("pos_embed")
        tensors["decoder_pos_embed"] = torch.cat([table.new_zeros(1, table.shape[1]), table])[None]
    else:
        tensors = _as_videomae(tensors, method if weights == "student" else None)
    told = {each: getattr(config.method, each) for each in _TOLD}
    if "norm_eps" in config.model_args:
        told["norm_eps"] = config.model_args["norm_eps"]
    if clip is not None:
        told["clip"] = clip
    metadata = note(config.image_size, encoder.blocks[0].attn.num_heads, **told)
    contiguous = {each: tensor.contiguous() for each, tensor in tensors.items()}
    with output(target) as new, system_errors(target):
        save_file(contiguous, new, metadata=metadata)
    return target


def _check_full(method: MethodSettings, run: RunFolder) -> None:
    """UserError where the authors' code has no such method."""
    if method.name not in _FULL:
        raise UserError(
            f"what=full writes files for the authors' code of {' and '.join(_FULL)}, and "
            f"{run.path} is of method={method.name}: use what=encoder"
        )
    if is_cross(method):
        raise UserError(
            "what=full writes files for the authors' code, whose decoder attends to all tokens, "
            f"and {run.path} has method.decoder_attention=cross: use what=encoder"
        )
    if getattr(method, "predictor", "decoder") == "head":
        raise UserError(
            "what=full writes files for the authors' code, in which a second decoder predicts "
            f"losses, and {run.path} has method.predictor=head: use what=encoder"
        )


def _as_videomae(tensors: dict[str, Tensor], method: Method | None) -> dict[str, Tensor]:
    """Under VideoMAE's names, and the teacher of ``method`` beside them."""
    found = reference.to_videomae_names(tensors)
    if method is not None:
        taught = reference.to_reference_names(method.state_dict(), teacher=True)
        for name, tensor in reference.to_videomae_names(taught).items():
            found[reference.TEACHER + name] = tensor
    return found

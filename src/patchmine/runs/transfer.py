"""Runs out of and into other people's formats: exports for timm and transformers, official
checkpoints.

These are MAE's and HPM's, and on clips VideoMAE's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any, Literal, ParamSpec, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from patchmine.backbones.description import note
from patchmine.backbones.family import Encoder
from patchmine.backbones.loading import LoadReport, load_tensors
from patchmine.backbones.names import reads_clips
from patchmine.backbones.naming import Weights
from patchmine.backbones.official import (
    Checkpoint,
    DecoderShape,
    check_decoder_positions,
    dropped_names,
    from_reference_names,
    read_official,
    to_reference_names,
)
from patchmine.backbones.videomae import TEACHER, to_videomae_names
from patchmine.backbones.weights import as_size
from patchmine.config.explain import shown
from patchmine.config.resolve import from_settings, silent
from patchmine.config.schema import RunConfig
from patchmine.disk import output, replacing, system_errors
from patchmine.errors import UserError
from patchmine.lock import lock
from patchmine.runs.run import Run, build_method, refuse_used_folder, write_export
from patchmine.task import Method
from patchmine.train import checkpoint as checkpoints

Say = Callable[[str], None]
What = Literal["auto", "encoder", "full"]
P = ParamSpec("P")

_TEACHER = "teacher."
_FULL = ("mae", "hpm")  # the methods whose whole files we write and read
_TOLD = ("mask_ratio", "norm_pix_loss")  # settings of the method that a file may tell


def export_run(
    path: str | PathLike[str], out: str | None, *, what: Literal["encoder", "full"], weights: str
) -> Path:
    """Write the encoder of a run as a folder for timm and transformers, or its ``full`` method.

    Args:
        path: the run's folder.
        out: the folder, None for ``export/`` in the run; of the full method a .safetensors file under
            the reference code's names, which `import_file` reads (of clips VideoMAE's).
        what: "encoder" or "full".
        weights: which of the run's networks.

    Returns:
        The folder or file.

    Raises:
        UserError: the run has no such weights, or ``out`` cannot be written.
    """
    run = Run(path)
    if what == "full":
        if run.config.method.name not in _FULL:
            raise UserError(
                f"what=full writes files for the authors' code of {' and '.join(_FULL)}, and {run.path} is of "
                f"method={run.config.method.name}: use what=encoder, or take the newest file in {run.checkpoint_dir}"
            )
        return _export_full(run, out, weights)
    folder = run.export_folder(weights) if out is None else out
    return write_export(run.config, run.encoder(weights), folder, weights)


def _export_full(run: Run, out: str | None, weights: str) -> Path:
    target = (
        Path(out)
        if out is not None
        else run.path / f"{run.config.method.name}-{weights}.safetensors"
    )
    if target.suffix != ".safetensors":
        raise UserError(
            f"out={target}: the full method is one file; write for example out={target}.safetensors"
        )
    method = run.method()
    tensors = to_reference_names(method.state_dict(), teacher=weights == "teacher")
    if not tensors:
        raise UserError(
            f"{run.path} holds no teacher: method={run.config.method.name} keeps none; use weights=student"
        )
    if reads_clips(run.config.model):
        tensors = to_videomae_names(tensors)
        if weights == "student":
            taught = to_videomae_names(to_reference_names(method.state_dict(), teacher=True))
            tensors |= {TEACHER + name: tensor for name, tensor in taught.items()}
    else:
        table: Tensor = method.get_submodule("decoder_input").get_buffer("pos_embed")
        tensors["decoder_pos_embed"] = torch.cat([table.new_zeros(1, table.shape[1]), table])[None]
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with output(target) as new, system_errors(target):
        save_file(contiguous, new, metadata=_note(run.config, method))
    return target


def _note(config: RunConfig, method: Method) -> dict[str, str]:
    """What the file says of itself, because its tensors do not."""
    encoder = cast(Encoder, method.encoder)
    clip = {"clip": (config.clip.frames, config.clip.tubelet)} if reads_clips(config.model) else {}
    values = config.method.model_dump()
    told = {name: values[name] for name in ("decoder_num_heads", "decoder_norm_eps", *_TOLD)}
    if "norm_eps" in config.model_args:
        told["norm_eps"] = config.model_args["norm_eps"]
    return note(config.image_size, encoder.blocks[0].attn.num_heads, **told, **clip)


def _alone(import_to: Callable[P, Run]) -> Callable[P, Run]:
    """Hold the lock of the folder ``out`` from the first check to the end."""
    arguments = inspect.signature(import_to)

    @wraps(import_to)
    def locked(*args: P.args, **kwargs: P.kwargs) -> Run:
        with lock(Path(arguments.bind(*args, **kwargs).arguments["out"])):
            return import_to(*args, **kwargs)

    return locked


@_alone
def import_file(
    file: str,
    out: str,
    *,
    weights: Weights = "auto",
    prefix: str | None = None,
    what: What = "auto",
    image_size: int | tuple[int, int] | None = None,
    source_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    allow: Sequence[str] = (),
    say: Say = silent,
) -> Run:
    """Turn a checkpoint of others into a run in the new folder ``out``, with an encoder's export.

    Args:
        file: in any layout that `models.naming` knows, or a folder of it with a config.json.
        out: the new folder.
        weights: the trained network of a file or its average; auto is the trained one, but DINO's
            teacher.
        prefix: of the encoder's names, where the file holds several.
        what: the encoder only, or the full method, by default as much as the file has.
        image_size: pixels on a side, or (height, width); positions are moved to it.  A file of
            VideoMAE tells no size, and clips of 16 frames of 224x224 pixels, or of ``image_size``,
            are assumed.
        source_size: the size that the file was trained at, where nothing tells it.
        num_heads: needed for models of unusual width, whose tensors do not show it, as
            ``decoder_num_heads``.
        decoder_num_heads: the same of the decoder.
        allow: patterns of tensors that may be missing or unexpected.
        say: hears what became of every tensor.

    Returns:
        The run.

    Raises:
        UserError: a file of another kind, and tensors that are missing, unexpected, of another
            shape or not finite.
    """
    folder = Path(out)
    refuse_used_folder(folder)
    found = read_official(
        file,
        weights=weights,
        prefix=prefix,
        image_size=as_size(image_size, "image_size"),
        source_size=as_size(source_size, "source_size"),
        num_heads=num_heads,
        decoder_num_heads=decoder_num_heads,
        with_decoder=what != "encoder",
    )
    say(found.describe())
    if what == "full" and found.decoder is None:
        raise UserError(f"{file} holds an encoder only: use what=encoder")
    full = found.decoder is not None
    config = _settings(found, out)
    dropped = [*dropped_names(found, full=full), *found.dropped]
    report = LoadReport(file, resized=found.resized, dropped=dropped, notes=found.notes)
    if full:
        method = build_method(config)
        load_tensors(method, _method_tensors(found, method), report, allow=allow)
        report.notes += _assumed(found, config)
        checkpoints.save(
            folder / "checkpoints", 0, method.state_dict(), {}, {"imported": file}, keep=1
        )
        write_export(config, cast(Encoder, method.encoder), folder / "export")
    else:
        encoder = found.architecture.build()
        load_tensors(encoder, found.encoder, report, allow=allow)
        timm = "init= and timm" if found.architecture.clip is None else "and init="
        report.notes.append(
            f"encoder only: {folder} serves for eval, embed, {timm}, not for show and resume"
        )
        write_export(config, encoder, folder / "export")
    say(report.render())
    with replacing(folder / "config.yaml") as new:
        new.write_text(config.to_yaml(), encoding="utf-8")
    return Run(folder)


def _assumed(found: Checkpoint, config: RunConfig) -> list[str]:
    """Which settings of the method the file does not tell."""
    values = config.method.model_dump()
    unknown = ", ".join(
        f"method.{name}={shown(values[name])}" for name in _TOLD if name not in found.settings
    )
    return [f"assumed in config.yaml, because the file does not tell: {unknown}"] if unknown else []


def _settings(found: Checkpoint, out: str) -> RunConfig:
    architecture = found.architecture
    method: dict[str, Any] = {"name": found.method}
    if found.decoder is not None:
        method |= _decoder_settings(found, found.decoder)
    clip: dict[str, Any] = {}
    if architecture.clip is not None:
        clip["clip"] = dict(zip(("frames", "tubelet"), architecture.clip, strict=True))
    return from_settings(
        data=f"imported:{found.source}",
        model=architecture.model,
        model_args={
            name: value
            for name, value in architecture.model_args.items()
            if (name, value) != ("fc_norm", False)
        },
        image_size=architecture.image_size,
        patch_size=architecture.patch_size,
        channels=architecture.channels,
        method=method,
        out=out,
        **clip,
    )


def _decoder_settings(found: Checkpoint, decoder: DecoderShape) -> dict[str, Any]:
    tubelet = 1 if found.architecture.clip is None else found.architecture.clip[1]
    pixels = found.architecture.patch_size**2 * found.architecture.channels * tubelet
    if decoder.values != pixels:
        raise UserError(
            f"{found.source}: its decoder predicts {decoder.values} numbers a patch, not its {pixels} pixel values: "
            "import the encoder only, with what=encoder"
        )
    return {
        "decoder_embed_dim": decoder.width,
        "decoder_depth": decoder.depth,
        "decoder_num_heads": decoder.num_heads,
        "decoder_mlp_ratio": decoder.mlp_ratio,
        "decoder_qkv_bias": decoder.qkv_bias,
        **found.settings,
    }


def _method_tensors(found: Checkpoint, method: Method) -> dict[str, Tensor]:
    """Every tensor of the method from the file; a teacher that the file lacks is the student."""
    unwanted = set(dropped_names(found, full=True))
    check_decoder_positions(found.tensors, found.architecture.table_grid, found.source)
    ours = from_reference_names(
        {name: t for name, t in found.tensors.items() if name not in unwanted}
    )
    names = [name for name in method.state_dict() if name.startswith(_TEACHER)]
    taught = {
        name: ours[name.removeprefix(_TEACHER)]
        for name in names
        if name.removeprefix(_TEACHER) in ours
    }
    if found.teacher is not None:
        stored = {name: t for name, t in found.teacher.items() if name not in unwanted}
        taught |= from_reference_names(stored, teacher=True)
    return ours | taught

"""Other people's checkpoints as runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from patchmine.backbones import official, reference
from patchmine.backbones.family import Blueprint, family_of
from patchmine.backbones.loading import LoadReport, load_tensors
from patchmine.backbones.naming import Weights
from patchmine.backbones.official import OfficialFile
from patchmine.backbones.parts import refuse_other_parts
from patchmine.backbones.reading import read_file
from patchmine.backbones.weights import as_size, open_network, shown_encoder
from patchmine.config.explain import shown
from patchmine.config.resolve import from_settings, of_kind
from patchmine.config.schema import PretrainConfig
from patchmine.errors import Say, UserError, silent
from patchmine.runs.folder import RunFolder, build_method, write_export
from patchmine.runs.fresh import refuse_used_folder
from patchmine.runs.lock import lock
from patchmine.system.disk import replacing
from patchmine.task import Method
from patchmine.train import checkpoint as checkpoints

What = Literal["auto", "encoder", "full"]

_TEACHER = "teacher."
_TOLD = ("mask_ratio", "norm_pix_loss")  # settings of the method that a file may tell


def import_file(
    file: str,
    out: str,
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    weights: Weights = "auto",
    prefix: str | None = None,
    what: What = "auto",
    image_size: int | tuple[int, int] | None = None,
    source_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    allow: Sequence[str] = (),
    say: Say = silent,
) -> RunFolder:
    """Turn a checkpoint of others into a run in the new folder ``out``, with an encoder's export.

    Args:
        file: in any layout that `backbones.naming` knows, or a folder of it with a config.json.
        out: the new folder.
        model: timm's name of the network, where neither the tensors nor a config.json tell it.
        model_args: its arguments.
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
        allow: patterns of tensors that may be missing, or beside what the encoder computes with.
        say: hears what became of every tensor.

    Returns:
        The run.

    Raises:
        UserError: a file of another kind, and tensors that are missing, unexpected, of another
            shape or not finite.
    """
    folder = Path(out)
    with lock(folder):  # from the first check to the end
        refuse_used_folder(folder)
        read = read_file(file, weights=weights, prefix=prefix)
        sizes: dict[str, Any] = {
            "image_size": as_size(image_size, "image_size"),
            "source_size": as_size(source_size, "source_size"),
            "num_heads": num_heads,
        }
        if what == "full" and not read.has_decoder:
            raise UserError(f"{file} holds an encoder only: use what=encoder")
        if what == "encoder" or not read.has_decoder:
            named: dict[str, Any] = {"model": model, "model_args": model_args}
            encoder, report = open_network(read, **named, **sizes, allow=allow)
            config = _settings(encoder.built_from, {"name": "mae"}, file, out)
            say(f"{file}: {shown_encoder(encoder)}, encoder only")
            timm = "init= and timm" if family_of(encoder).timm_opens(encoder) else "and init="
            report.notes.append(
                f"encoder only: {folder} serves for eval, embed, {timm}, not for show and resume"
            )
        else:
            found = official.take_apart(read, **sizes, decoder_num_heads=decoder_num_heads)
            say(found.summary())
            built = found.architecture
            if model is not None:
                built = replace(built, model=model, model_args=dict(model_args or {}))
            told = {"name": found.method, **(found.decoder or {}), **found.settings}
            config, dropped = _settings(built, told, file, out), [*found.unused(), *found.dropped]
            report = LoadReport(file, resized=found.resized, dropped=dropped, notes=found.notes)
            method = build_method(config)
            encoder = method.encoder
            tensors = _method_tensors(found, method)
            refuse_other_parts(method.state_dict(), tensors, file, "encoder.")
            load_tensors(method, tensors, report, allow=allow)
            report.notes += _assumed(found, config)
            state = method.state_dict()
            checkpoints.save(folder / "checkpoints", 0, state, {}, {"imported": file}, keep=1)
        write_export(config, encoder, folder / "export")
        say(report.render())
        with replacing(folder / "config.yaml") as new:
            new.write_text(config.to_yaml(), encoding="utf-8")
    return RunFolder(folder)


def _assumed(found: OfficialFile, config: PretrainConfig) -> list[str]:
    """Which settings of the method the file does not tell."""
    unknown = [name for name in _TOLD if name not in found.settings]
    told = [f"method.{name}={shown(getattr(config.method, name))}" for name in unknown]
    because = "assumed in config.yaml, because the file does not tell"
    return [f"{because}: {', '.join(told)}"] if told else []


def _settings(built: Blueprint, method: Mapping[str, Any], file: str, out: str) -> PretrainConfig:
    """The settings of a run that would have made the file, as far as it tells."""
    clip: dict[str, Any] = {}
    if built.clip is not None:
        clip["clip"] = dict(zip(("frames", "tubelet"), built.clip, strict=True))
    config = from_settings(
        data=f"imported:{file}",
        model=built.model,
        model_args=dict(built.model_args),
        image_size=built.image_size,
        patch_size=built.patch_size,
        channels=built.channels,
        method=method,
        out=out,
        **clip,
    )
    return of_kind(config, PretrainConfig)


def _method_tensors(found: OfficialFile, method: Method) -> dict[str, Tensor]:
    """Every tensor of the method from the file; a teacher that the file lacks is the student."""
    official.check_decoder_positions(found.tensors, found.architecture.table_grid, found.source)
    unwanted = set(found.unused())
    wanted = {name: t for name, t in found.tensors.items() if name not in unwanted}
    ours = reference.from_reference_names(wanted)
    for name in method.state_dict():
        if name.startswith(_TEACHER) and name.removeprefix(_TEACHER) in ours:
            ours[name] = ours[name.removeprefix(_TEACHER)]
    if found.teacher is not None:
        stored = {name: t for name, t in found.teacher.items() if name not in unwanted}
        ours |= reference.from_reference_names(stored, teacher=True)
    return ours

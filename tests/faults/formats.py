"""Every format that patchmine reads: sound files, ways to damage them, and the function that a command reads them by."""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import containers
import mutators
import numpy as np
import seeds
from mutators import BYTES, TEXT, YAML, Mutator
from scene import make_images
from torch import Tensor

from patchmine.data.decode import DecodeError, decode, probe
from patchmine.errors import UserError
from patchmine.train.checkpoint import DamagedCheckpointError

Read = Callable[[bytes, Path], Any]
ITEM_ERRORS = (OSError, DecodeError)  # what loader and inspect take as: this item is broken


@dataclass(frozen=True)
class Format:
    """How one kind of file is tried.

    ``read`` gets the bytes of a mutant and a folder of its own, with a copy of ``run`` inside where one is needed.
    ``refusals``: what it may raise, in one line unless ``lines`` are allowed.  ``named``: a part of the file's name
    that a refusal must contain.  ``sealed``: the file is under a checksum, so what is read without a refusal must be
    what the sound file gives.
    """

    name: str
    seeds: Sequence[bytes]
    mutators: Sequence[Mutator]
    read: Read
    refusals: tuple[type[Exception], ...] = (UserError,)
    named: str = ""
    lines: bool = False
    sealed: bool = False

    def mutant(self, number: int, seed: int) -> tuple[str, bytes]:
        """The name of its mutators and the contents of one mutant; a function of its arguments alone."""
        import random

        chance = random.Random(f"{seed}/{self.name}/{number}")  # noqa: S311
        data = self.seeds[number % len(self.seeds)]
        names = []
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            other = chance.choice(self.seeds)
            mutate = chance.choice((*self.mutators, mutators.splice(other)))
            names.append(mutate.__name__.replace("mutate", "splice"))
            try:
                data = mutate(data, chance)
            except Exception as error:  # noqa: BLE001, a container that is broken already has no inside to damage
                names[-1] += f" ({type(error).__name__})"
                data = mutators.flip_bits(data, chance)
        return " + ".join(names), data


def all_formats(run: Path) -> list[Format]:
    """The table; ``run`` is the folder of a finished run of `scene.SETTINGS`, with an evaluation in it."""
    pictures = seeds.images()
    return [*_items(pictures), *_sources(pictures, run.parent), *_settings(run), *_run_files(run), *_weights(run), *_videos(run.parent)]


def _items(pictures: Mapping[str, list[bytes]]) -> list[Format]:
    extra: dict[str, tuple[Mutator, ...]] = {
        "png": (containers.png_chunk,) * 5,
        "png of 16 bits": (containers.png_chunk,) * 5,
        "tiff": (containers.tiff_entry,) * 5,
        "tiff with many channels": (containers.tiff_entry,) * 5,
        "npy": (containers.npy_header,) * 5,
        "ppm": TEXT,
    }
    return [
        Format(name, files, (*BYTES, *extra.get(name, ())), _read_image, refusals=ITEM_ERRORS)
        for name, files in pictures.items()
    ]


def _read_image(data: bytes, folder: Path) -> object:  # noqa: ARG001
    errors = [_item_error(partial(probe, data)), *(_item_error(partial(decode, data, channels)) for channels in (3, 1, 5))]
    refused = [error for error in errors if error is not None]
    if len(refused) == len(errors):
        raise refused[1]
    return len(refused)


def _item_error(read: Callable[[], object]) -> Exception | None:
    try:
        read()
    except ITEM_ERRORS as error:
        return error
    return None


def _sources(pictures: Mapping[str, list[bytes]], room: Path) -> list[Format]:
    tars = seeds.shards(pictures)
    tar_damage = (*BYTES, *(containers.tar_header,) * 5, *(containers.tar_member,) * 3)
    found = [Format("tar", tars, tar_damage, _read_tar, named="x.tar")]
    found += [
        Format(f"list {suffix}", [content], TEXT, partial(_read_list, suffix, pictures["png"][0]), named="list")
        for suffix, content in seeds.LISTS.items()
    ]
    mixed = [content for files in pictures.values() for content in files]
    archive = room / "x.tar"
    archive.write_bytes(tars[0])
    images = make_images(room / "images")
    kept = {place: _kept_index(place) for place in (archive, images)}
    indices = [
        Format(f"kept index of {place.name}", [index], (*BYTES, *TEXT[:5]), partial(_read_index, place, name), sealed=True)
        for place, (name, index) in kept.items()
    ]
    return [
        *found,
        Format("tar under a kept index", tars, tar_damage, _read_swapped_tar, named="x.tar"),
        *indices,
        Format("folder, inspected", mixed, BYTES, _inspect),
    ]


def _items_of(source: Any) -> list[str]:
    """Names, keys, labels and contents of everything in a source, as far as items can be read."""
    found = []
    for index in range(min(len(source), 50)):
        try:
            content = hashlib.sha256(source.read(index)).hexdigest()
        except ITEM_ERRORS as error:
            content = type(error).__name__
        found.append(f"{source.path(index)} {getattr(source, 'key', source.path)(index)} {content}")
    labels = source.labels()
    return [*found, f"{len(source)}", *([] if labels is None else map(str, [*labels.ids.tolist(), *labels.names]))]


def _read_tar(data: bytes, folder: Path) -> object:
    from patchmine.data.source import open_source

    path = folder / "x.tar"
    path.write_bytes(data)
    return _items_of(open_source(path))


def _read_swapped_tar(data: bytes, folder: Path) -> object:
    """Another archive under a name whose index is kept must read as it would without the index."""
    from patchmine.data.source import open_source

    path, cache = folder / "x.tar", folder / "cache"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    fresh = _outcome(lambda: _items_of(open_source(path)))
    kept = _outcome(lambda: _items_of(open_source(path, cache_dir=cache)))
    if kept != fresh:
        raise AssertionError("what the kept index says differs from what the archive holds")
    if isinstance(fresh, UserError):
        raise fresh
    return fresh


class _Refusal(UserError):
    """A refusal that equals another with the same words."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UserError) and str(other) == str(self)

    __hash__ = None  # type: ignore[assignment]


def _outcome(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except UserError as error:
        return _Refusal(str(error))


def _kept_index(data: Path) -> tuple[str, bytes]:
    """Name and contents of the index that is kept of a folder or an archive."""
    import tempfile

    from patchmine.data.source import open_source

    with tempfile.TemporaryDirectory() as room:
        open_source(data, cache_dir=Path(room))
        (index,) = Path(room).glob("*.index")
        return index.name, index.read_bytes()


def _read_index(of: Path, name: str, data: bytes, folder: Path) -> object:
    """Under a damaged index a source reads as it would without: the index is made again."""
    from patchmine.data.source import open_source

    cache = folder / "cache"
    cache.mkdir(exist_ok=True)
    (cache / name).unlink(missing_ok=True)  # its pages may be mapped still
    (cache / name).write_bytes(data)
    return _items_of(open_source(of, cache_dir=cache))


def _read_list(suffix: str, picture: bytes, data: bytes, folder: Path) -> object:
    from patchmine.data.source import open_source

    for name in ("0.png", "1.jpg", "sub folder/2.png"):
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        if not place.exists():
            place.write_bytes(picture)
    path = folder / f"list{suffix}"
    path.write_bytes(data)
    return _items_of(open_source(path))


_ENDINGS = (".jpg", ".png", ".tif", ".npy", ".gif", ".webp", ".bmp", ".ppm")


def _inspect(data: bytes, folder: Path) -> object:
    from patchmine.data.inspect import inspect, render
    from patchmine.data.source import open_source

    room = folder / "images"
    room.mkdir(exist_ok=True)
    for ending in _ENDINGS[: 1 + len(data) % 2]:
        (room / f"x{ending}").write_bytes(data)
    return render(inspect(open_source(room), full=True))


def _settings(run: Path) -> list[Format]:
    import patchmine.recipes

    shipped = sorted(Path(patchmine.recipes.__file__).parent.glob("*.yaml"))
    config = (run / "config.yaml").read_bytes()
    traps = [b"data: !!python/object/apply:os.system [touch CANARY]\n", b"&x data: [*x]\n"]
    recipes = [path.read_bytes() for path in shipped]
    return [
        Format("recipe", [*recipes, *traps], YAML, _read_recipe, named="x.yaml", lines=True),
        Format("config.yaml", [config, *traps], YAML, _read_config, lines=True),
    ]


def _read_recipe(data: bytes, folder: Path) -> object:
    from patchmine.config import parse

    path = folder / "x.yaml"
    path.write_bytes(data)
    return parse(path, ["data=x", "out=y"]).to_yaml()


def _read_config(data: bytes, folder: Path) -> object:
    from patchmine.report.html import write_report
    from patchmine.run import Run

    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "config.yaml").write_bytes(data)
    write_report([folder / "run"], folder / "report.html")
    config = Run(folder / "run").config
    config.to_yaml()
    return config


def _run_files(run: Path) -> list[Format]:
    checkpoints = sorted((run / "checkpoints").glob("step-*.safetensors"))
    newest = checkpoints[-1].read_bytes()
    damage = (*BYTES, *(containers.safetensors_header,) * 5)
    sample = next(iter(sorted((run / "samples").glob("*.png")))).read_bytes()
    bad = b"images/0.png\tis a truncated or damaged image\nimages/1.png\tcannot be read\n"
    read = partial(_read_run_file, run)
    return [
        Format("checkpoint", [newest], damage, partial(_load_checkpoint, checkpoints[-1].name), (DamagedCheckpointError,), sealed=True),
        Format("checkpoint, resumed", [newest], damage, partial(_load_newest, checkpoints), sealed=True),
        Format("metrics.jsonl", [(run / "metrics.jsonl").read_bytes()], TEXT, partial(read, "metrics.jsonl")),
        Format("eval/NAME.json", [seeds.EVALUATION], TEXT, partial(read, "eval/knn.json")),
        Format("samples/step-N.png", [sample], (*BYTES, *(containers.png_chunk,) * 5), partial(read, "samples/step-00000004.png")),
        Format("bad_files.txt", [bad], TEXT, _read_bad_files),
    ]


def digest(value: Any) -> str:
    """A text that is equal for equal values, tensors included."""
    if isinstance(value, Mapping):
        return digest([[key, value[key]] for key in sorted(value)])
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(digest, value)) + "]"
    if isinstance(value, Tensor):
        content = hashlib.sha256(np.ascontiguousarray(value.numpy()).tobytes()).hexdigest()
        return f"{value.dtype} {tuple(value.shape)} {content}"
    return repr(value)


def _load_checkpoint(name: str, data: bytes, folder: Path) -> object:
    from patchmine.train.checkpoint import load

    path = folder / name
    path.write_bytes(data)
    found = load(path)
    return digest([found.step, found.model, found.optimizer, found.facts])


def _load_newest(checkpoints: Sequence[Path], data: bytes, folder: Path) -> object:
    """The newest file is damaged: what is read is it, unharmed, or the one before."""
    from patchmine.train.checkpoint import load, load_newest

    for path in checkpoints[-2:]:
        if not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)
    (folder / checkpoints[-1].name).write_bytes(data)
    found = load_newest(folder, lambda text: None)
    sound = load(next(path for path in checkpoints if path.name == found.path.name))
    same = digest([found.step, found.model, found.optimizer, found.facts]) == digest([sound.step, sound.model, sound.optimizer, sound.facts])
    return "as it was written" if same else "something else"


def _read_run_file(run: Path, name: str, data: bytes, folder: Path) -> object:
    """Everything that looks at a run's files beside its weights: the run, its report, and a log that goes on."""
    from patchmine.report.html import write_report
    from patchmine.run import Run
    from patchmine.train.log import trim_metrics

    copy = folder / "run"
    if not copy.exists():
        shutil.copytree(run, copy, symlinks=True)
    path = copy / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    Run(copy).metrics()
    write_report([copy], folder / "report.html").read_text(encoding="utf-8")
    if name == "metrics.jsonl":
        trim_metrics(path, 4)
        return [line.get("step") for line in Run(copy).metrics()]
    return None


def _read_bad_files(data: bytes, folder: Path) -> object:
    from patchmine.data.badfiles import BadFiles
    from patchmine.data.combine import DatasetSource
    from torch.utils.data import TensorDataset
    import torch

    path = folder / "bad_files.txt"
    path.write_bytes(data)
    bad = BadFiles(path, 1.0)
    bad.note(DatasetSource(TensorDataset(torch.zeros(3, 3, 4, 4))), 3, [(0, "is broken"), (1, "is broken")])
    return path.read_bytes()


def _weights(run: Path) -> list[Format]:
    tensors = seeds.official_weights()
    export = (run / "export" / "model.safetensors").read_bytes()
    described = (run / "export" / "config.json").read_bytes()
    plain, zips = seeds.safetensors(tensors), seeds.pickles(tensors, zipped=True)
    zip_damage = (*BYTES, *(containers.zip_member,) * 5, *(containers.zip_directory,) * 3)
    header = (*BYTES, *(containers.safetensors_header,) * 5)
    return [
        Format("export: model.safetensors", [export], header, partial(_read_export, run, "model.safetensors"), named="model.safetensors"),
        Format("export: config.json", [described], TEXT, partial(_read_export, run, "config.json"), named="config.json"),
        Format("weights .safetensors", plain, header, partial(_read_weights, "x.safetensors"), named="x.safetensors"),
        Format("weights .pth (zip)", zips, zip_damage, partial(_read_weights, "x.pth"), named="x.pth"),
        Format("weights .pth (legacy)", seeds.pickles(tensors, zipped=False), BYTES, partial(_read_weights, "x.pth"), named="x.pth"),
        Format("weights TorchScript", seeds.torchscript(tensors), zip_damage, partial(_read_weights, "x.pt"), named="x.pt"),
        Format("import .safetensors", plain, header, partial(_import, "x.safetensors")),
        Format("import .pth", zips, zip_damage, partial(_import, "x.pth")),
    ]


def _read_export(run: Path, name: str, data: bytes, folder: Path) -> object:
    from patchmine.evaluate.targets import open_target

    copy = folder / "export"
    if not copy.exists():
        shutil.copytree(run / "export", copy)
    (copy / name).write_bytes(data)
    return open_target(copy)


def _read_weights(name: str, data: bytes, folder: Path) -> object:
    from patchmine.models.weights import load_encoder

    (folder / name).write_bytes(data)
    return load_encoder(folder / name, model_args={"num_heads": 2})


def _import(name: str, data: bytes, folder: Path) -> object:
    from patchmine.transfer import import_file

    (folder / name).write_bytes(data)
    out = folder / "imported"
    shutil.rmtree(out, ignore_errors=True)
    return import_file(str(folder / name), str(out), num_heads=2, decoder_num_heads=2)


def _videos(folder: Path) -> list[Format]:
    return [
        Format(f"video {suffix}", files, BYTES, partial(_read_video, suffix), refusals=ITEM_ERRORS)
        for suffix, files in seeds.videos(folder).items()
    ]


def _read_video(suffix: str, data: bytes, folder: Path) -> object:
    from patchmine.data.video import VideoFile, open_video

    path = folder / f"x{suffix}"
    path.write_bytes(data)
    os.utime(path, ns=(1, zlib.crc32(data)))  # a reader may remember files by size and time
    reader = open_video(VideoFile(str(path)))
    count = reader.num_frames
    return reader.frames(sorted({0, count // 2, count - 1})).shape

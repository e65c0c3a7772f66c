"""Every format that patchmine reads: sound files, ways to damage them, and the function by which a
command reads.
"""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import containers
import data_readers
import mutators
import run_readers
import seeds
import tuned
from data_readers import ITEM_ERRORS
from mutators import BYTES, TABLE, TEXT, YAML, Mutator
from scene import make_images

from patchmine.errors import UserError
from patchmine.train.checkpoint import DamagedCheckpointError

Read = Callable[[bytes, Path], Any]


@dataclass(frozen=True)
class Format:
    """How one kind of file is tried.

    ``read`` gets the bytes of a mutant and a folder of its own, with a copy of ``run`` inside where
    one is needed. ``refusals``: what it may raise, in one line unless ``lines`` are allowed.
    ``named``: a part of the file's name that a refusal must contain.  ``sealed``: the file is under
    a checksum, so what is read without a refusal must be what the sound file gives.
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
        """The name of its mutators and the contents of one mutant; a function of its arguments
        alone.
        """
        chance = random.Random(f"{seed}/{self.name}/{number}")
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
        if data in self.seeds:
            names.append("flip_bits")
            data = mutators.flip_bits(data, chance)
        return " + ".join(names), data


def all_formats(run: Path) -> list[Format]:
    """The table; ``run`` is the folder of a finished run of `scene.SETTINGS`, with an evaluation in
    it; beside it stands what `tuned.make_tuned` makes.
    """
    pictures = seeds.images()
    return [
        *_items(pictures),
        *_sources(pictures, run.parent),
        *_settings(run),
        *_run_files(run),
        *_weights(run),
        *_videos(run.parent, pictures),
        *_labels(pictures["png"][0]),
        *_tuned(run.parent),
    ]


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
        Format(
            name,
            files,
            (*BYTES, *extra.get(name, ())),
            data_readers.read_image,
            refusals=ITEM_ERRORS,
        )
        for name, files in pictures.items()
    ]


def _sources(pictures: Mapping[str, list[bytes]], room: Path) -> list[Format]:
    tars = seeds.shards(pictures)
    tar_damage = (*BYTES, *(containers.tar_header,) * 5, *(containers.tar_member,) * 3)
    found = [Format("tar", tars, tar_damage, data_readers.read_tar, named="x.tar")]
    found += [
        Format(
            f"list {suffix}",
            [content],
            TEXT,
            partial(data_readers.read_list, suffix, pictures["png"][0]),
            named="list",
        )
        for suffix, content in seeds.LISTS.items()
    ]
    mixed = [content for files in pictures.values() for content in files]
    archive = room / "x.tar"
    archive.write_bytes(tars[0])
    images = make_images(room / "images")
    kept = {place: data_readers.kept_index(place) for place in (archive, images)}
    indices = [
        Format(
            f"kept index of {place.name}",
            [index],
            (*BYTES, *TEXT[:5]),
            partial(data_readers.read_index, place, name),
            sealed=True,
        )
        for place, (name, index) in kept.items()
    ]
    return [
        *found,
        Format(
            "tar under a kept index", tars, tar_damage, data_readers.read_swapped_tar, named="x.tar"
        ),
        *indices,
        Format("folder, inspected", mixed, BYTES, data_readers.inspect_images),
        Format("folder, loaded", mixed, BYTES, data_readers.load_images),
    ]


def _settings(run: Path) -> list[Format]:
    import patchmine.config.recipes

    shipped = sorted(Path(patchmine.config.recipes.__file__).parent.glob("*.yaml"))
    config = (run / "config.yaml").read_bytes()
    traps = [b"data: !!python/object/apply:os.system [touch CANARY]\n", b"&x data: [*x]\n"]
    recipes = [path.read_bytes() for path in shipped]
    return [
        Format(
            "recipe", [*recipes, *traps], YAML, run_readers.read_recipe, named="x.yaml", lines=True
        ),
        Format("config.yaml", [config, *traps], YAML, run_readers.read_config, lines=True),
    ]


def _run_files(run: Path) -> list[Format]:
    checkpoints = sorted((run / "checkpoints").glob("step-*.safetensors"))
    newest = checkpoints[-1].read_bytes()
    damage = (*BYTES, *(containers.safetensors_header,) * 5)
    sample = next(iter(sorted((run / "samples").glob("*.png")))).read_bytes()
    bad = b"images/0.png\tis a truncated or damaged image\nimages/1.png\tcannot be read\n"
    read = partial(run_readers.read_run_file, run)
    return [
        Format(
            "checkpoint",
            [newest],
            damage,
            partial(run_readers.load_checkpoint, checkpoints[-1].name),
            (DamagedCheckpointError,),
            sealed=True,
        ),
        Format(
            "checkpoint, resumed",
            [newest],
            damage,
            partial(run_readers.resume_from, checkpoints),
            sealed=True,
        ),
        Format(
            "metrics.jsonl",
            [(run / "metrics.jsonl").read_bytes()],
            TEXT,
            partial(read, "metrics.jsonl"),
        ),
        Format("eval/NAME.json", [seeds.EVALUATION], TEXT, partial(read, "eval/knn.json")),
        Format(
            "samples/step-N.png",
            [sample],
            (*BYTES, *(containers.png_chunk,) * 5),
            partial(read, "samples/step-00000004.png"),
        ),
        Format("bad_files.txt", [bad], TEXT, run_readers.read_bad_files),
        Format(
            "checkpoints/last",
            [checkpoints[-1].name.encode()],
            TEXT,
            partial(run_readers.follow_last, checkpoints),
        ),
        Format(".lock", [_holder()], TEXT, partial(run_readers.take_lock, ".lock")),
        Format(".lock.owner", [_holder()], TEXT, partial(run_readers.take_lock, ".lock.owner")),
    ]


def _holder() -> bytes:
    """What a lock file says, of a process that has ended."""
    return json.dumps(
        {"pid": 2**22 + 1, "host": socket.gethostname(), "since": 1.7e9, "stopping": False}
    ).encode()


def _weights(run: Path) -> list[Format]:
    tensors = seeds.official_weights()
    export = (run / "export" / "model.safetensors").read_bytes()
    described = (run / "export" / "config.json").read_bytes()
    plain, zips = seeds.safetensors(tensors), seeds.pickles(tensors, zipped=True)
    zip_damage = (*BYTES, *(containers.zip_member,) * 5, *(containers.zip_directory,) * 3)
    header = (*BYTES, *(containers.safetensors_header,) * 5)
    return [
        Format(
            "export: model.safetensors",
            [export],
            header,
            partial(run_readers.read_export, run, "model.safetensors"),
            named="export",
        ),
        Format(
            "export: config.json",
            [described],
            TEXT,
            partial(run_readers.read_export, run, "config.json"),
            named="export",
        ),
        Format(
            "weights .safetensors",
            [*plain, *seeds.safetensors(seeds.other_weights())],
            header,
            partial(run_readers.read_weights, "x.safetensors"),
            named="x.safetensors",
        ),
        Format(
            "weights .pth (zip)",
            zips,
            zip_damage,
            partial(run_readers.read_weights, "x.pth"),
            named="x.pth",
        ),
        Format(
            "weights .pth (legacy)",
            seeds.pickles(tensors, zipped=False),
            BYTES,
            partial(run_readers.read_weights, "x.pth"),
            named="x.pth",
        ),
        Format(
            "weights TorchScript",
            seeds.torchscript(tensors),
            zip_damage,
            partial(run_readers.read_weights, "x.pt"),
            named="x.pt",
        ),
        Format(
            "import .safetensors",
            plain,
            header,
            partial(run_readers.import_weights, "x.safetensors"),
        ),
        Format("import .pth", zips, zip_damage, partial(run_readers.import_weights, "x.pth")),
    ]


def _videos(folder: Path, pictures: Mapping[str, list[bytes]]) -> list[Format]:
    files = {**seeds.videos(folder), ".gif": pictures["gif"]}
    return [
        *(
            Format(
                f"video {suffix}",
                found,
                BYTES,
                partial(data_readers.read_video, suffix),
                refusals=ITEM_ERRORS,
            )
            for suffix, found in files.items()
        ),
        Format(
            "video in frames",
            pictures["png"][:3],
            BYTES,
            data_readers.read_frames,
            refusals=ITEM_ERRORS,
        ),
    ]


def _labels(picture: bytes) -> list[Format]:
    return [
        Format(
            f"labels of a table, loss={loss}",
            [text.encode(), text.encode("utf-16")],
            TABLE,
            partial(tuned.read_labels, loss, picture),
            named="table.csv",
        )
        for loss, text in tuned.TABLES.items()
    ]


def _tuned(base: Path) -> list[Format]:
    run, compared = base / "tuned", base / "compared"
    best = (run / "checkpoints" / "best").resolve()
    test = "runs/pretrained-50pct-seed0/eval/test.json"
    weights, config = "model.safetensors", "config.json"

    def of(name: str, file: Path, damage: Sequence[Mutator], read: Any, **given: Any) -> Format:
        return Format(name, [file.read_bytes()], damage, read, **given)

    header = (*BYTES, *(containers.safetensors_header,) * 5)
    predict = partial(tuned.predict_by, run / "export")
    return [
        of("eval/shares.json", compared / "eval" / "shares.json", TEXT, tuned.read_shares),
        of(
            "eval/test.json, compared",
            compared / test,
            TEXT,
            partial(tuned.compare_again, compared, test),
            named="test.json",
        ),
        of(
            "best checkpoint",
            best,
            header,
            partial(tuned.classify_by, run, f"checkpoints/{best.name}"),
            named="checkpoints",
            sealed=True,
        ),
        Format(
            "checkpoints/best",
            [best.name.encode()],
            TEXT,
            partial(tuned.classify_by, run, "checkpoints/best"),
            named="checkpoints",
        ),
        of(
            "config.yaml of labels",
            run / "config.yaml",
            YAML,
            partial(tuned.predict_by, run, "config.yaml"),
            named="tuned",
            lines=True,
        ),
        of(
            "export with classifier: config.json",
            run / "export" / config,
            TEXT,
            partial(predict, config),
            named="export",
        ),
        of(
            f"export with classifier: {weights}",
            run / "export" / weights,
            header,
            partial(predict, weights),
            named="export",
        ),
    ]

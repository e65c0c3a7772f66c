"""The items that a network is asked about, and whether enough of them could be read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from patchmine.config.resolve import of_kind
from patchmine.config.schema import DetectConfig, SegmentConfig
from patchmine.data.badfiles import BadFiles
from patchmine.data.items import IMAGE, Item
from patchmine.data.loader import plain_batches
from patchmine.data.settings import InputSettings
from patchmine.data.sources.contract import IMAGE_SUFFIXES, Kind, Source
from patchmine.data.sources.listfile import open_files
from patchmine.data.sources.source import KINDS
from patchmine.data.views.images import OwnSizeView
from patchmine.errors import Say, UserError, shown_name, whole_name
from patchmine.evaluate.progress import progress
from patchmine.evaluate.settings import PredictSettings
from patchmine.runs.folder import RunFolder
from patchmine.runs.known import is_run
from patchmine.types import Batch

Judged = TypeVar("Judged", SegmentConfig, DetectConfig)

_DOES = {"classify": "classifies", "segment": "segments", "detect": "detects"}
_OF_WHOLE, _OF_OBJECTS = "classes of whole images or videos", "objects"
_MEANT_FOR = {
    **dict.fromkeys(("top", "all", "segments", "crops"), ("classify", _OF_WHOLE)),
    **dict.fromkeys(("score_threshold", "tile", "overlap"), ("detect", _OF_OBJECTS)),
}
_HARMLESS = {"segments": 1, "crops": 1}  # what changes nothing, beside the defaults


def kind_of(path: str) -> str:
    """What a run was made for; of anything else that can be asked, such as an export, classes."""
    return RunFolder(path).config.kind if is_run(path) else "classify"


def does(kind: str) -> str:
    """What a run of this kind does, as a verb."""
    return _DOES[kind]


def refuse_settings_of_others(settings: PredictSettings, kind: str) -> None:
    """UserError for a setting that says something to runs of another kind than this."""
    for name, (own, what) in _MEANT_FOR.items():
        given, usual = getattr(settings, name), type(settings).model_fields[name].default
        if own != kind and given not in (usual, _HARMLESS.get(name, usual)):
            run = shown_name(settings.run)
            raise UserError(
                f"{name}={str(given).lower()} is for {what}, but {run} {does(kind)}: leave it out"
            )


def asked_run(settings: PredictSettings, kind: type[Judged]) -> tuple[RunFolder, Judged]:
    """The run that is asked, and its settings with the question's ``batch_size`` for its tests'.

    Raises UserError for a run of another kind, and for a setting that is for runs of another.
    """
    refuse_settings_of_others(settings, kind.model_fields["kind"].default)
    run = RunFolder(settings.run)
    config = of_kind(run.whole_config, kind)
    if "batch_size" in settings.model_fields_set:
        config = config.model_copy(update={"eval_batch": settings.batch_size})
    return run, config


@dataclass(frozen=True)
class AskedImages:
    """Images that a run is asked about, each at its own size.

    Args:
        asked: the settings of the question.
        input: how the run decodes images.
        smallest_side: pixels of the smallest one that is of use.
        source: they are of.
        say: hears how far it is, and of what is broken.
    """

    asked: PredictSettings
    input: InputSettings
    smallest_side: int
    source: Source
    say: Say

    def __len__(self) -> int:
        return len(self.source)

    def read(self, title: str) -> Iterator[Batch]:
        """A batch of one for every readable image, in order.

        Raises UserError where nothing, or too little, can be read.
        """
        done, wanted, spare = 0, self.asked.workers, (os.cpu_count() or 1) - 1
        loaded = plain_batches(
            self.source,
            OwnSizeView(self.input, self.smallest_side),
            batch_size=1,
            workers=min(8, spare) if wanted == "auto" else wanted,  # one core for the network
            bad=BadFiles(None, 1.0),  # judged at the end: in order, they may come in a row
        )
        with progress(title, len(self), self.say) as tick:
            for batch in loaded:
                yield batch
                done += 1
                tick(1)
        limit = self.asked.max_bad_share
        judge_broken(self.source, len(self), done, IMAGE.noun, limit, title, self.say)

    @property
    def _by_path(self) -> bool:
        """Whether images are named by their whole path, not by their place in the source."""
        return isinstance(self.asked.data, list) and len(self.asked.data) > 1

    def name(self, place: int) -> str:
        """That of an image, by which it is found."""
        return self.source.path(place) if self._by_path else self.source.key(place)

    def file(self, place: int) -> str:
        """The same for a person, as one line."""
        return whole_name(self.name(place))

    def new_names(self, ending: str) -> list[str]:
        """For each image a name for what is made of it: its path below the data with this ending.

        Images that do not lie below one folder are named from the deepest folder that holds all.

        Raises:
            UserError: two images have one name.
        """
        count = range(len(self))
        keys = [os.path.normpath(self.source.key(place)) for place in count]
        outside = (key.startswith("..") or os.path.isabs(key) for key in keys)  # noqa: PTH117
        data, kind = self.asked.data, KINDS[IMAGE.noun]
        single = are_files([data] if isinstance(data, str) else data, kind)
        if self._by_path or any(outside) or single:
            paths = [os.path.abspath(self.source.path(place)) for place in count]  # noqa: PTH100
            root = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
            keys = [os.path.relpath(path, root) for path in paths]
        names: dict[str, int] = {}
        for place, key in enumerate(keys):
            stem, old = os.path.splitext(key)  # noqa: PTH122
            name = f"{stem if old.lower() in IMAGE_SUFFIXES else key}{ending}"
            if name in names:
                both = " and ".join(shown_name(self.file(each)) for each in (names[name], place))
                raise UserError(
                    f"{both} would both become {shown_name(name)}: give one of them another name, "
                    "or ask about them one after the other"
                )
            names[name] = place
        return list(names)


def open_asked_images(
    settings: PredictSettings, config: InputSettings, smallest_side: int, say: Say
) -> AskedImages:
    """The images that the settings name, as the run with ``config`` decodes them."""
    source = open_asked(settings.data, IMAGE)
    for note in source.notes:
        say(note)
    return AskedImages(settings, config, smallest_side, source, say)


def open_asked(data: str | list[str], item: Item) -> Source:
    """What ``item.open`` takes, or the files of single items, as a shell writes out ``*.jpg``."""
    files, kind = [data] if isinstance(data, str) else data, KINDS[item.noun]
    return open_files(files, kind) if are_files(files, kind) else item.open(data)


def are_files(names: Sequence[str], kind: Kind) -> bool:
    """Whether all names are of single items."""
    single = (Path(name).suffix.lower() in kind.suffixes and Path(name).is_file() for name in names)
    return bool(names) and all(single)


def judge_broken(
    source: Source, asked: int, done: int, noun: str, limit: float, title: str, say: Say
) -> None:
    """Whether enough of the items that were asked for could be read.

    Args:
        source: they are of.
        asked: how many were wanted.
        done: how many could be read.
        noun: what an item is called.
        limit: share of broken ones above which to stop.
        title: of what is made of them.
        say: hears of broken ones.

    Raises:
        UserError: none could be read, or more than ``limit`` are broken.
    """
    name = shown_name(source.name)
    if done == 0:
        raise UserError(f"{name} has no {noun} that can be read")
    if broken := asked - done:
        found = f"{broken:,} of {asked:,} {noun}s of {name} are broken"
        if broken > limit * asked:
            raise UserError(f"{found}, more than max_bad_share={limit}: mend them, or raise it")
        say(f"{title}: {found} and were skipped")

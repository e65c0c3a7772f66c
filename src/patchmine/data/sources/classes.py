"""Classes by folders, and folders that divide a data set instead: one rule for ``embed``,
``inspect`` and ``eval``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from patchmine.data.sources.contract import ClassNames, Labels

TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "val", "validation", "valid", "testing")


def folder_classes(paths: Iterable[str]) -> Labels | None:
    """The class of every item by the folder that it lies in.

    The class is the first folder below the root.  Where the folders there divide the data set
    (`is_divided`), it is the folder below them.

    Args:
        paths: of the items below the root, with "/" between folders.

    Returns:
        None where an item lies in no such folder.
    """
    first, second, count = ClassNames(), ClassNames(), 0
    for count, path in enumerate(paths, 1):  # noqa: B007
        parts = path.split("/", 2)
        if len(parts) > 1:
            first.add(parts[0])
        if len(parts) > 2 and _divides(parts[0]):
            second.add(parts[1])
    classes = second if is_divided(first.names()) else first
    return classes.finish() if count and len(classes) == count else None


def is_divided(folders: Collection[str]) -> bool:
    """Whether the first folders of a data set are its parts: train and test (or val), or nothing
    but such.
    """
    names = {name.lower() for name in folders}
    if names & {*TRAIN_FOLDERS} and names & {*TEST_FOLDERS}:
        return True
    return bool(names) and all(map(_divides, names))


def division_of(folders: Collection[str]) -> tuple[str, str] | None:
    """Of such first folders the one to learn from and the one to be tested on, where there are
    both.
    """
    by_name = {name.lower(): name for name in sorted(folders, reverse=True)}
    train = [by_name[name] for name in TRAIN_FOLDERS if name in by_name]
    test = [by_name[name] for name in TEST_FOLDERS if name in by_name]
    return (train[0], test[0]) if train and test else None


def _divides(folder: str) -> bool:
    return folder.lower() in (*TRAIN_FOLDERS, *TEST_FOLDERS)

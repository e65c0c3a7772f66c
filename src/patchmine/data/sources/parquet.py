"""Parquet files of encoded images, read at any place by their row groups.

The smallest part that can be read is a row group's column.  A few of them stay in memory; one that
is too large for that is read in pieces, forwards.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from patchmine.data.sources import contract
from patchmine.data.sources import index as indices
from patchmine.data.sources.columns import Columns, Remedy, columns_of, labels_of
from patchmine.data.sources.members import PassedOver
from patchmine.data.sources.patterns import split
from patchmine.data.sources.stored import Stored, local_files, opened
from patchmine.errors import foreign_parser, shown_name

SUFFIX = ".parquet"
HELD = 128 << 20
"""Bytes of images that a process holds in memory, and so the largest row group read whole."""

_PIECE = 8 << 20  # bytes of a larger row group that are read at a time
_SLOW = 16 << 20  # bytes of a row group above which reading at random is told to be slow


class ParquetSource(contract.Source):
    """The images of the rows of Parquet files, in the order of the files and of their rows."""

    encoded = True

    def __init__(
        self, files: Sequence[Stored], index: indices.Index, columns: Columns, name: str
    ) -> None:
        digest = contract.fingerprint_of(
            [index.stamp["fingerprint"].encode(), columns.image.encode()]
        )
        super().__init__(name, digest, _notes(index, name))
        self.files, self.index, self.columns = list(files), index, columns
        rows, self._sizes = np.split(index.columns["size"], 2)
        self._ends = np.cumsum(rows)
        self._reader: _Reader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> bytes:
        """The bytes of a row's image."""
        group, row = self._find(index)
        if self._reader is None:
            self._reader = _Reader()
        place = self.index.columns["file"][group], self.index.columns["group"][group]
        file, size = self.files[place[0]], int(self._sizes[group])
        if file.was_replaced():
            raise OSError(f"{self.path(index)} is not where it was: the file was changed meanwhile")
        with foreign_parser(lambda why: OSError(f"row {row:,} of its row group: {why}"), OSError):
            value = self._reader.value(file, int(place[1]), size, self.columns.image, row)
        if value is None:
            raise OSError(f"column {self.columns.image} is empty there")
        return value

    def path(self, index: int) -> str:
        """``file:row``."""
        file, row = self._row(index)
        return f"{self.files[file].name}:{row}"

    def key(self, index: int) -> str:
        """``file/row``, the file's name without its ending."""
        file, row = self._row(index)
        return f"{self.index.path(file).removesuffix(SUFFIX)}/{row}"

    def identity(self, index: int) -> bytes | None:
        """That of the file, and the row."""
        number, row = self._row(index)
        file = self.files[number].identity()
        return (
            None if file is None else b"\0".join([file, self.columns.image.encode(), b"%d" % row])
        )

    def labels(self) -> contract.Labels | None:
        """From the column of classes, by the names that the file has for its numbers."""
        remedy = _naming(self.name)
        return labels_of(self.columns, self.name, self._values, self.path, remedy)

    def _values(self, column: str) -> Any:
        import pyarrow as pa

        chunks = list[Any]()
        for file in self.files:
            with _refusing(file, self.name):
                table = _parquet(file).read(columns=[column], use_threads=False)
                values = table.column(0).combine_chunks()
                if pa.types.is_dictionary(values.type):
                    values = values.dictionary_decode()
                chunks.append(values)
        if len({chunk.type for chunk in chunks}) > 1:
            what = f"column {column} is of different types in these files"
            raise contract.data_error(self.name, f"{what}; name those of one type")
        return pa.chunked_array(chunks)

    def _find(self, index: int) -> tuple[int, int]:
        """The row group of an item, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def _row(self, index: int) -> tuple[int, int]:
        """The file of an item, and its row there."""
        group, _ = self._find(index)
        file = int(self.index.columns["file"][group])
        first = int(np.searchsorted(self.index.columns["file"], file))
        return file, index - (int(self._ends[first - 1]) if first else 0)


class _Reader:
    """The images that one process holds: whole row groups, and the place in a larger one."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, int], tuple[int, Any]] = OrderedDict()
        self._files: OrderedDict[str, Any] = OrderedDict()
        self._stream: _Stream | None = None

    def value(self, file: Stored, group: int, size: int, column: str, row: int) -> bytes | None:
        """What stands in a row of a row group, whose column takes ``size`` bytes."""
        key = (file.name, group)
        if size > HELD:
            if self._stream is None or self._stream.key != key or row < self._stream.first:
                self._stream = _Stream(key, file, column, size)
            return self._stream.value(row)
        if key not in self._groups:
            while self._groups and sum(each for each, _ in self._groups.values()) + size > HELD:
                self._groups.popitem(last=False)
            table = self._open(file).read_row_group(group, columns=[column], use_threads=False)
            self._groups[key] = size, _images(table)
        self._groups.move_to_end(key)
        return self._groups[key][1][row].as_py()

    def _open(self, file: Stored) -> Any:
        if file.name not in self._files:
            if len(self._files) >= 16:
                self._files.popitem(last=False)
            self._files[file.name] = _parquet(file)
        return self._files[file.name]


class _Stream:
    """The rows of a large row group, one piece of them in memory, forwards only."""

    def __init__(self, key: tuple[str, int], file: Stored, column: str, size: int) -> None:
        self.key, self.first = key, 0
        source = _parquet(file, buffer_size=1 << 20)  # so that it reads page by page
        rows = source.metadata.row_group(key[1]).num_rows
        pieces = source.iter_batches(
            max(1, int(rows * _PIECE / size)), [key[1]], columns=[column], use_threads=False
        )
        self._pieces: Iterator[Any] = iter(pieces)
        self._piece: Any = ()

    def value(self, row: int) -> bytes | None:
        """What stands in a row, at ``first`` or behind it."""
        import pyarrow as pa

        while row >= self.first + len(self._piece):
            self.first += len(self._piece)
            self._piece = _images(pa.Table.from_batches([next(self._pieces)]))
        return self._piece[row - self.first].as_py()


def _images(table: Any) -> Any:
    """The bytes in a table of one column, which may be a struct with a single field."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table.column(0)
    return pc.struct_field(column, [0]) if pa.types.is_struct(column.type) else column


def open_parquet(
    paths: Sequence[Path], name: str, cache_dir: Path | None, wanted: Sequence[str] = ()
) -> ParquetSource:
    """The images of some Parquet files.

    Args:
        paths: the files.
        name: what the user calls them.
        cache_dir: where their index is kept; None: nowhere.
        wanted: columns that the user named.

    Raises:
        UserError: one is no Parquet file, or has no such column.
    """
    files, marks = local_files(paths, name, "file")
    places = [str(path.resolve()) for path in paths]
    return parquet_source(files, marks, places, name, cache_dir, wanted)


def parquet_source(
    files: Sequence[Stored],
    marks: indices.Marks,
    places: Sequence[str],
    name: str,
    cache_dir: Path | None,
    wanted: Sequence[str],
    holds: Callable[[indices.Index], bool] | None = None,
) -> ParquetSource:
    """The same of files wherever they lie; the last but one arguments as of `kept_index`."""
    with _refusing(files[0], name):
        columns = columns_of(_parquet(files[0]).schema_arrow, wanted, name, _naming(name))
    index = indices.kept_index(
        cache_dir,
        "parquet",
        contract.IMAGES,
        [*places, columns.image],
        lambda: _index(files, marks, columns, name),
        holds,
    )
    return ParquetSource(files, index, columns, name)


def _naming(name: str) -> Remedy:
    place = split(name)[0]
    return lambda columns: f"name one behind ::, as in {place}::{','.join(columns)}"


def _index(
    files: Sequence[Stored], marks: indices.Marks, columns: Columns, name: str
) -> indices.Index:
    """The row groups of all files that have rows: file, place in it, rows and bytes of images."""
    paths = indices.PathList()
    rows: list[tuple[int, int, int, int]] = []
    for number, file in enumerate(files):
        paths.add(os.path.basename(file.name))  # noqa: PTH119, of an address, too
        with _refusing(file, name):
            metadata = _parquet(file).metadata
            leaves = [metadata.schema.column(each).path for each in range(metadata.num_columns)]
            if columns.image not in leaves:
                what = f"{shown_name(file.name)} lacks column {columns.image}, which others have"
                raise contract.data_error(name, f"{what}; name files of one kind, by a pattern")
            place = leaves.index(columns.image)
            for group in range(metadata.num_row_groups):
                found = metadata.row_group(group)
                if found.num_rows:
                    size = found.column(place).total_uncompressed_size
                    rows.append((number, group, found.num_rows, size))
    if not rows:
        raise contract.data_error(name, "there are no rows in it; give files that have some")
    file_numbers, groups, counts, sizes = np.array(rows, np.int64).T
    # Counts and sizes together are `size`, which the fingerprint knows.
    table = {"file": file_numbers, "group": groups, "size": np.concatenate([counts, sizes])}
    return indices.new_index(contract.IMAGES, paths, marks, PassedOver(), table)


def _parquet(file: Stored, buffer_size: int = 0) -> Any:
    """A ``pyarrow.parquet.ParquetFile`` that reads when asked, in the thread that asks."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(opened(file), pre_buffer=False, buffer_size=buffer_size)


def _refusing(file: Stored, name: str) -> AbstractContextManager[None]:
    """Around reading a file: what pyarrow raises becomes one sentence."""
    what = f"the file {shown_name(file.name)} cannot be read as Parquet"
    return foreign_parser(lambda why: contract.data_error(name, f"{what} ({why}); write it again"))


def _notes(index: indices.Index, name: str) -> list[str]:
    """What a person may not expect of these files."""
    shown, notes = shown_name(name), list[str]()
    _, sizes = np.split(index.columns["size"], 2)
    largest, total = int(sizes.max()), int(sizes.sum())
    if largest > _SLOW and total > HELD:
        what = f"row groups have up to {largest / 1e6:,.0f} MB, of which each is read for one image"
        once = f"patchmine data shard {shown} out=shards/"
        notes.append(f"data={shown}: {what}: `{once}`, once, makes reading at random quick")
    parts = {
        index.path(number).partition("-")[0].partition(".")[0].lower()
        for number in range(len(index))
    }
    train, test = parts & {*contract.TRAIN_FOLDERS}, parts & {*contract.TEST_FOLDERS}
    if train and test:
        what = f"files of {min(train)} and of {min(test)} are read together"
        notes.append(
            f"data={shown}: {what}: name one part by a pattern, as in {min(train)}-*{SUFFIX}"
        )
    return notes

"""Datasets of Hugging Face's `datasets` given from Python: rows with a column of encoded images."""

from __future__ import annotations

import hashlib
from typing import Any

from patchmine.data.sampling import spread_indices
from patchmine.data.sources.columns import columns_of, labels_of
from patchmine.data.sources.contract import Labels, Source, contents, data_error, fingerprint_of
from patchmine.errors import foreign_parser

_SAMPLED = 64  # rows whose images the fingerprint knows


def is_rows(given: object) -> bool:
    """Whether this is an object of `datasets`, which is not imported to find out."""
    return type(given).__module__.partition(".")[0] == "datasets"


class RowSource(Source):
    """The images of a ``datasets.Dataset``; its fingerprint knows length, column and 64 images.

    The bytes are read as they are stored: formats and transforms that the dataset has do not count.
    """

    encoded = True

    def __init__(self, dataset: Any) -> None:
        kind = type(dataset).__name__
        name = f"datasets.{kind}"
        if kind != "Dataset":
            what = "this has no rows by number, by which to shuffle and to resume"
            remedy = "give one part, as dataset['train'], that is on a disk (streaming=False)"
            raise data_error(name, f"{what}; {remedy}")
        if not len(dataset):
            raise data_error(name, "the dataset has no rows; give one that has some")
        with foreign_parser(lambda why: data_error(name, f"its columns cannot be read ({why})")):
            self.columns = columns_of(dataset.features.arrow_schema, (), name, _remedy)
            self._rows = dataset.with_format("arrow")
            self._images = self._rows.select_columns([self.columns.image.removesuffix(".bytes")])
        self._length = len(dataset)
        super().__init__(name, "", _notes(dataset, name))
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> bytes:
        """The bytes of a row's image, which may lie in a file that the row names."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        with foreign_parser(lambda why: OSError(f"row {index:,}: {why}"), OSError):
            value: Any = self._images[index].column(0)[0].as_py()
        path = None
        if isinstance(value, dict):
            value, path = value.get("bytes"), value.get("path")
        if value is None and path:
            return contents(path)
        if value is None:
            raise OSError(f"column {self.columns.image} is empty there")
        return bytes(value)

    def path(self, index: int) -> str:
        """``Dataset[row]``."""
        return f"Dataset[{index}]"

    def labels(self) -> Labels | None:
        """From the column of classes, by the names that the dataset has for its numbers."""
        return labels_of(self.columns, self.name, self._values, self.path, _remedy)

    def _values(self, column: str) -> Any:
        return self._rows.select_columns([column])[:].column(0)

    def _fingerprint(self) -> str:
        parts = [self.columns.image.encode(), str(len(self)).encode()]
        for index in spread_indices(len(self), _SAMPLED).tolist():
            try:
                parts.append(hashlib.sha256(self.read(index)).digest())
            except OSError:  # a broken image is one each time
                parts.append(b"")
        return fingerprint_of(parts)


def _notes(dataset: Any, name: str) -> list[str]:
    if dataset.format["type"] != "custom":
        return []
    what = "the dataset's own transform is not used: images are decoded and cropped here"
    return [f"data={name}: {what}; give what it makes as a torch dataset, if you want that"]


def _remedy(columns: tuple[str, ...]) -> str:
    return f"keep those that are meant, by dataset.select_columns({list(columns)})"

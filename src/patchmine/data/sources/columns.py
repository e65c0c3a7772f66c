"""Which columns of a table hold the images and their classes, and what classes these are.

Hugging Face's `datasets` writes what its columns are into the schema's metadata; of other files the
types tell, and the names of columns of labels.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchmine.data.sources.contract import ClassNames, Labels, data_error
from patchmine.data.sources.listfile import LABEL_HEAD
from patchmine.errors import shown_name

_SHOWN = 12  # columns that a message names


@dataclass(frozen=True)
class Columns:
    """What is read of the rows.

    Attributes:
        image: the column of encoded images as pyarrow names it, ``image.bytes`` inside a struct.
        labels: columns that may be the classes; usable where there is one.
        classes: names of the classes by their numbers in that column, where the file tells them.
    """

    image: str
    labels: tuple[str, ...]
    classes: tuple[str, ...] | None


Remedy = Callable[[tuple[str, ...]], str]
"""How the user tells which columns are meant, such as these, at the end of a sentence."""


def columns_of(schema: Any, wanted: Sequence[str], name: str, remedy: Remedy) -> Columns:
    """The columns of a ``pyarrow.Schema`` that are read.

    Args:
        schema: that of the file.
        wanted: columns that the user named, of images, of classes or both.
        name: what the user calls the source.
        remedy: how to name columns.

    Raises:
        UserError: no column is one of images, or several may be, or ``wanted`` are none of these.
    """
    features = _features(schema)
    images = [field.name for field in schema if _bytes_of(field) is not None]
    classes = [field.name for field in schema if _is_label(field.type)]
    for word in wanted:
        if word not in {*images, *classes}:
            raise data_error(name, _stranger(word, schema))
    chosen = [word for word in wanted if word in images]
    marked = [column for column in images if _kind(features, column) == "Image"]
    found = chosen or marked or images
    if not found:
        what = "no column holds images (bytes, or a struct with a field bytes)"
        raise data_error(name, f"{what}; the columns are {_listed(schema)}")
    if len(found) > 1:
        what = f"several columns may be the images ({', '.join(map(shown_name, found))})"
        raise data_error(name, f"{what}; {remedy((found[0],))}")
    labels = [word for word in wanted if word in classes]
    labels = labels or [column for column in classes if _kind(features, column) == "ClassLabel"]
    labels = labels or [column for column in classes if LABEL_HEAD.fullmatch(column.lower())]
    names = features.get(labels[0], {}).get("names") if len(labels) == 1 else None
    known = tuple(map(str, names)) if isinstance(names, list) else None
    return Columns(str(_bytes_of(schema.field(found[0]))), tuple(labels), known)


def labels_of(
    columns: Columns,
    name: str,
    values_of: Callable[[str], Any],
    path: Callable[[int], str],
    remedy: Remedy,
) -> Labels | None:
    """The classes of all rows; None where no column tells any.

    Args:
        columns: as `columns_of` found them.
        name: what the user calls the source.
        values_of: gives a column's values, a ``pyarrow.ChunkedArray``.
        path: a row's name for people.
        remedy: how to name columns.

    Raises:
        UserError: several columns may be meant, or some rows have no class.
    """
    if len(columns.labels) > 1:
        what = f"several columns may be the classes ({', '.join(map(shown_name, columns.labels))})"
        image = columns.image.removesuffix(".bytes")
        raise data_error(name, f"{what}; {remedy((image, columns.labels[0]))}")
    if not columns.labels:
        return None
    column = columns.labels[0]
    numbers, values = _distinct(values_of(column))
    classes = [_class_of(value, columns.classes) for value in values]
    if classes == [None]:  # as in a part that is for a competition's judge
        return None
    if None in classes:
        missing = classes.index(None)
        where = shown_name(path(int(np.argmax(numbers == missing))))
        what = f"column {column} holds no class but {values[missing]} at {where}"
        raise data_error(name, f"{what}; leave such rows out, or label them")
    names = ClassNames()
    for each in classes:
        names.add(str(each))
    labels = names.finish()
    return Labels(labels.ids[numbers], labels.names)


def _class_of(value: Any, classes: tuple[str, ...] | None) -> Any:
    """The class that a value stands for; None where it stands for none."""
    if not isinstance(value, int):
        return value
    if value < 0 or (classes is not None and value >= len(classes)):
        return None
    return value if classes is None else classes[value]


def _distinct(column: Any) -> tuple[NDArray[np.int64], list[Any]]:
    """(N,) places of a column's values in the list of those that there are."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    found = pc.dictionary_encode(column, null_encoding="encode").combine_chunks()
    return found.indices.to_numpy(zero_copy_only=False), found.dictionary.to_pylist()


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` says of each column; nothing where the file is not of its making."""
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = told["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {name: each for name, each in features.items() if isinstance(each, dict)}


def _kind(features: dict[str, Any], column: str) -> str | None:
    return features.get(column, {}).get("_type")


def _bytes_of(field: Any) -> str | None:
    """The column of bytes in a column, by the name that pyarrow reads it by; None without."""
    import pyarrow as pa

    def is_bytes(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    if is_bytes(field.type):
        return str(field.name)
    if pa.types.is_struct(field.type):
        inner = field.type.get_field_index("bytes")
        if inner >= 0 and is_bytes(field.type.field(inner).type):
            return f"{field.name}.bytes"
    return None


def _is_label(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        test(kind) for test in (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
    )


def _stranger(word: str, schema: Any) -> str:
    close = difflib.get_close_matches(word, schema.names, n=1)
    hint = f" (did you mean {shown_name(close[0])}?)" if close else ""
    if word in schema.names:
        hint = f": it holds {schema.field(word).type}"
    what = f"{shown_name(word)} is no column of images or classes{hint}"
    return f"{what}; the columns are {_listed(schema)}"


def _listed(schema: Any) -> str:
    facts = [f"{shown_name(field.name)} ({field.type})" for field in schema][:_SHOWN]
    more = len(schema.names) - len(facts)
    return ", ".join(facts) + (f" and {more} more" if more else "")

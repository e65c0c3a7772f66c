"""Which columns of a Parquet file hold the images and their classes.

Hugging Face's `datasets` writes what its columns are into the schema's metadata; of other files the
types tell, and the names of columns of labels.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from patchmine.data.sources.contract import data_error
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


def columns_of(schema: Any, wanted: Sequence[str], name: str) -> Columns:
    """The columns of a ``pyarrow.Schema`` that are read.

    Args:
        schema: that of the file.
        wanted: columns that the user named, of images, of classes or both.
        name: what the user calls the source.

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
        raise data_error(name, f"{what}; name one behind ::, as in {name}::{found[0]}")
    labels = [word for word in wanted if word in classes]
    labels = labels or [column for column in classes if _kind(features, column) == "ClassLabel"]
    labels = labels or [column for column in classes if LABEL_HEAD.fullmatch(column.lower())]
    names = features.get(labels[0], {}).get("names") if len(labels) == 1 else None
    known = tuple(map(str, names)) if isinstance(names, list) else None
    return Columns(str(_bytes_of(schema.field(found[0]))), tuple(labels), known)


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

"""What users type, as values: `key=value` words, YAML files, and the nearest valid name to a misspelt one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from patchmine.errors import UserError

_SETTING = re.compile(r"^([A-Za-z_][\w.-]*)=(.*)$", re.DOTALL)


class _Loader(yaml.SafeLoader):
    """YAML whose plain words mean what people expect, as in YAML 1.2: ``1e-4`` is a number, ``no`` is text."""


_PLAIN_WORDS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"null|Null|NULL|None|~|", ("n", "N", "~", "")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", "-+.0123456789"),
    ("float", r"[-+]?\.inf|\.nan", "-+."),
    ("merge", r"<<", "<"),
)
_Loader.yaml_implicit_resolvers = {
    first: [
        (f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"))
        for tag, pattern, firsts in _PLAIN_WORDS
        if first in firsts
    ]
    for first in {letter for _, _, firsts in _PLAIN_WORDS for letter in firsts}
}


def read_yaml(path: Path) -> dict[str, Any]:
    """The table in a YAML file.  Raises UserError when it cannot be read or is no table of settings."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no text file'}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} holds no settings: write one 'name: value' a line")
    return content


def parse_value(text: str) -> Any:
    """The value that a word means in YAML's notation: number, true, null, [list] or {table}; anything else is text."""
    if text[:1] not in tuple("[{\"'") and not _is_plain(text):
        return text
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        return text  # a path such as {a,b}/*.tar; whether text is allowed here is for the setting to say


def _is_plain(text: str) -> bool:
    """Whether the word is a number, true, false or null; a path may hold signs that mean something else in YAML."""
    return re.fullmatch(r"[-+.\w~]*", text) is not None


def split_setting(word: str) -> tuple[str, Any] | None:
    """``"epochs=100"`` as ``("epochs", 100)``; None for a word that is no setting (``./a=b.jpg`` is a path)."""
    match = _SETTING.match(word)
    return (match[1].replace("-", "_"), parse_value(match[2])) if match else None


def put(tree: dict[str, Any], path: str, value: Any) -> str | None:
    """Set ``tree["a"]["b"]`` for the path ``a.b`` in place; returns a complaint where a part of it holds no table."""
    *parents, last = path.split(".")
    for i, part in enumerate(parents):
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            return f"no such setting; {'.'.join(parents[: i + 1])} is {shown(inner)} and has no parts"
        tree = inner
    tree[last] = value
    return None


def merge(base: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the settings of ``above`` in their places; tables are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def nearest(name: str, valid: Iterable[str], count: int = 3) -> list[str]:
    """Valid names that look like ``name``, best first.  Dotted names are also found by their last part."""
    by_text: dict[str, str] = {}
    for candidate in valid:
        by_text.setdefault(candidate.rsplit(".", 1)[-1].lower(), candidate)
        by_text.setdefault(candidate.lower(), candidate)
    found = difflib.get_close_matches(name.rsplit(".", 1)[-1].lower(), by_text, n=count, cutoff=0.65)
    found += difflib.get_close_matches(name.lower(), by_text, n=count, cutoff=0.65)
    return list(dict.fromkeys(by_text[text] for text in found))[:count]


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """``"; did you mean epochs?"``, or nothing when no name is near."""
    near = nearest(name, valid)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def shown(value: Any) -> str:
    """A value as it is quoted in messages: short, on one line."""
    try:
        text = repr(value) if isinstance(value, str) else str(value)
    except (ValueError, RecursionError):  # Python prints no whole number of more than 4,300 digits
        return "a number of thousands of digits" if isinstance(value, int) else f"a {type(value).__name__}"
    text = {"None": "null", "True": "true", "False": "false"}.get(text, text)
    return text if len(text) <= 60 else text[:57] + "..."

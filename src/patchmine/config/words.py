"""What users type, as values: `key=value` words, YAML files, and the nearest valid name to a
misspelt one.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node

from patchmine.errors import UserError, foreign_parser, shown_name
from patchmine.strict import expanded

_SETTING = re.compile(r"^([A-Za-z_][\w.-]*)=(.*)$", re.DOTALL)
_SPACED = re.compile(r"([A-Za-z_][\w.-]*)\s+=\s*(.*)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][\w.-]*")

LARGEST_YAML = 2**20  # bytes; settings have some thousand
_DEEPEST, _MOST_NODES = 32, 100_000


class _Loader(yaml.SafeLoader):
    """YAML whose plain words mean what people expect, as in YAML 1.2: ``1e-4`` is a number, ``no``
    is text.

    A name that stands twice in one table is refused, and so is what is nested deeper, or becomes
    larger by its aliases, than settings are.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # nodes below each finished one, aliases written out

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {_DEEPEST} deep", problem_mark=mark
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent) and id(node) not in self._sizes:
            raise yaml.MarkedYAMLError(
                problem="an alias within what it stands for", problem_mark=mark
            )
        if node is not None and id(node) not in self._sizes:
            self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in _children(node))
            if self._sizes[id(node)] > _MOST_NODES:
                problem = "aliases make this larger than any settings are"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        keys: list[Any] = [key for key, _ in node.value]
        for key in keys:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                problem = f"{shown(key.value)} stands here twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else str(id(key)))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> Any:
        try:
            return super().construct_yaml_int(node)
        except ValueError:
            return (
                node.value
            )  # of more digits than Python reads; whether text is allowed is for the setting to say


def _children(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node.value, list) else []


_PLAIN_WORDS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"null|Null|NULL|None|~|", ("n", "N", "~", "")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+",
        "-+.0123456789",
    ),
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


_Loader.yaml_constructors = {
    **yaml.SafeLoader.yaml_constructors,
    "tag:yaml.org,2002:int": _Loader.construct_yaml_int,
}


def read_yaml(path: Path) -> dict[str, Any]:
    """The table in a YAML file.  Raises UserError when it cannot be read or is no table of
    settings.
    """
    name = shown_name(path)
    try:
        content = path.read_bytes() if path.stat().st_size <= LARGEST_YAML else None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error
    if content is None:
        raise UserError(f"{name} is no file of settings: it has more than {LARGEST_YAML:,} bytes")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{name} cannot be read: line {line} is no text in UTF-8; save it in that encoding"
        ) from error
    try:
        with foreign_parser(
            lambda reason: UserError(f"{name} is not valid YAML: {reason}"), yaml.MarkedYAMLError
        ):
            settings = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{name} is not valid YAML: {_located(error)}") from error
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UserError(f"{name} holds no settings: write one 'name: value' a line")
    return settings


def _located(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    problem = " ".join(filter(None, (error.context, error.problem))) or "it cannot be parsed"
    if "'\\t'" in problem:
        problem += "; indent with spaces"
    return f"{problem} (line {mark.line + 1})" if mark is not None else problem


def parse_value(text: str) -> Any:
    """The value that a word means in YAML's notation: number, true, null, [list] or {table};
    anything else is text.
    """
    if text[:1] not in tuple("[{\"'") and not _is_plain(text):
        return text
    try:
        with foreign_parser(ValueError):
            return yaml.load(text, Loader=_Loader)
    except ValueError:
        # A path such as {a,b}/*.tar; whether text is allowed here is for the setting to say
        return text


def _is_plain(text: str) -> bool:
    """Whether the word is a number, true, false or null; a path may hold signs that mean something
    else in YAML.
    """
    return re.fullmatch(r"[-+.\w~]*", text) is not None


def split_setting(word: str) -> tuple[str, Any] | None:
    """``"epochs=100"`` as ``("epochs", 100)``; None for a word that is no setting (``./a=b.jpg`` is
    a path).
    """
    match = _SETTING.match(word)
    return (match[1].replace("-", "_"), expanded(parse_value(match[2]))) if match else None


def read_settings(
    words: Sequence[str],
) -> tuple[list[tuple[str, Any]], list[tuple[str, str]], list[str]]:
    """What the words after a command are.

    Returns:
        Settings, as `split_setting` reads them; (word, complaint) for what was meant as one but is
        written otherwise; all other words.
    """
    pairs: list[tuple[str, Any]] = []
    complaints: list[tuple[str, str]] = []
    others: list[str] = []
    left = [part for word in words for part in _torn(word)]
    while left:
        word = left.pop(0)
        if word.startswith("-") and not exists(word):
            name, equals, value = word.lstrip("-").partition("=")
            if not equals and left and not _is_setting(left[0]) and not left[0].startswith("-"):
                value = left.pop(0)
            example = f"{name.replace('-', '_')}={value or 'VALUE'}"
            complaints.append((word, f"settings are written without dashes, as in {example}"))
        elif _NAME.fullmatch(word) and left and left[0].startswith("="):
            value = left.pop(0).removeprefix("=") or (left.pop(0) if left else "")
            complaints.append(
                (word, f"settings are written without spaces, as in {word}={value or 'VALUE'}")
            )
        elif (pair := split_setting(word)) is None:
            others.append(expanded(word))
        elif word.endswith("=") and word.count("=") == 1:
            text = (
                f"as in {word}{left[0]}"
                if left and not _is_setting(left[0])
                else "or null for none"
            )
            if text.startswith("as"):
                left.pop(0)
            complaints.append(
                (pair[0], f"nothing stands behind its equals sign: write a value there, {text}")
            )
        else:
            pairs.append(pair)
    return pairs, complaints, others


def repeated(pairs: Iterable[tuple[str, Any]]) -> list[str]:
    """A sentence for each setting that is given again with another value, of which the last counts."""
    found: dict[str, Any] = {}
    sentences = []
    for path, value in pairs:
        if path in found and found[path] != value:
            sentences.append(
                f"{path} is given twice: {shown(value)} is used, not {shown(found[path])}."
            )
        found[path] = value
    return sentences


def _torn(word: str) -> list[str]:
    """``"epochs = 3"`` in one word as the words that it would be without its quotes."""
    spaced = None if exists(word) else _SPACED.fullmatch(word)
    return [spaced[1], f"={spaced[2]}"] if spaced is not None else [word]


def _is_setting(word: str) -> bool:
    return _SETTING.match(word) is not None


def exists(name: str) -> bool:
    """Whether there is a file or folder of that name; a name that none can have is not there."""
    return os.path.exists(name)  # noqa: PTH110, Path.exists raises for a name that is too long


def put(tree: dict[str, Any], path: str, value: Any) -> str | None:
    """Set ``tree["a"]["b"]`` for the path ``a.b`` in place, a table part by part.

    Returns a complaint where a part of the path holds no table.
    """
    if isinstance(value, Mapping) and value and all(isinstance(key, str) for key in value):
        complaints = [put(tree, f"{path}.{key}", inner) for key, inner in value.items()]
        return next(filter(None, complaints), None)
    *parents, last = path.split(".")
    for i, part in enumerate(parents):
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            return (
                f"no such setting; {'.'.join(parents[: i + 1])} is {shown(inner)} and has no parts"
            )
        tree = inner
    tree[last] = value
    return None


def merge(base: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the settings of ``above`` in their places; tables are merged, everything else
    is replaced.
    """
    merged = dict(base)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = (
            merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        )
    return merged


def nearest(name: str, valid: Iterable[str], count: int = 3) -> list[str]:
    """Valid names that look like ``name``, best first, never itself; dotted ones are also found by
    their last part.
    """
    by_text: dict[str, str] = {}
    for candidate in valid:
        if candidate == name:
            continue
        by_text.setdefault(candidate.rsplit(".", 1)[-1].lower(), candidate)
        by_text.setdefault(candidate.lower(), candidate)
    found = difflib.get_close_matches(
        name.rsplit(".", 1)[-1].lower(), by_text, n=count, cutoff=0.65
    )
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
        return (
            "a number of thousands of digits"
            if isinstance(value, int)
            else f"a {type(value).__name__}"
        )
    text = {"None": "null", "True": "true", "False": "false"}.get(text, text)
    return text if len(text) <= 60 else text[:57] + "..."

"""From what users type to values: YAML files, and words such as ``method.mask_ratio=0.8``."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node

from patchmine.config.explain import shown
from patchmine.errors import UserError, foreign_parser, shown_name
from patchmine.strict import SettingError, expanded

_SETTING = re.compile(r"^([A-Za-z_][\w.-]*)=(.*)$", re.DOTALL)
_SPACED = re.compile(r"([A-Za-z_][\w.-]*)\s+=\s*(.*)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][\w.-]*")

LARGEST_YAML = 2**20  # bytes; settings have some thousand
_DEEPEST, _MOST_NODES = 32, 100_000

# YAML 1.2's plain words: ``1e-4`` is a number, ``no`` is text.  (tag, pattern, first letters)
_PLAIN_WORDS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"null|Null|NULL|None|~|", ("n", "N", "~", "")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?[0-9]+[eE][-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?\.inf|\.nan", "-+."),
    ("merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain words; no name twice in a table, nothing deeper or larger than settings."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # nodes below each finished one, aliases written out

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _refused(event, f"nested more than {_DEEPEST} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None or id(node) in self._sizes:
            return node
        if isinstance(event, yaml.AliasEvent):
            raise _refused(event, "an alias within what it stands for")
        children = node.value if isinstance(node.value, list) else []
        if isinstance(node, MappingNode):
            children = [child for pair in node.value for child in pair]
        self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in children)
        if self._sizes[id(node)] > _MOST_NODES:
            raise _refused(event, "aliases make this larger than any settings are")
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        keys: list[Any] = [key for key, _ in node.value]
        for key in keys:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise _refused(key, f"{shown(key.value)} stands here twice")
            seen.add(key.value if isinstance(key.value, str) else str(id(key)))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> Any:
        try:
            return super().construct_yaml_int(node)
        except ValueError:  # of more digits than Python reads
            return node.value  # whether text is allowed is for the setting to say


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


def _refused(place: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def read_yaml(path: Path) -> dict[str, Any]:
    """The table in a YAML file.  Raises UserError when there is none that can be read."""
    name = shown_name(path)
    try:
        if path.stat().st_size > LARGEST_YAML:
            large = f"it has more than {LARGEST_YAML:,} bytes"
            raise UserError(f"{name} is no file of settings: {large}")
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        wrong = f"line {line} is no text in UTF-8; save it in that encoding"
        raise UserError(f"{name} cannot be read: {wrong}") from error
    try:
        with foreign_parser(
            lambda reason: UserError(f"{name} is not valid YAML: {reason}"), yaml.MarkedYAMLError
        ):
            settings = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(filter(None, (error.context, error.problem))) or "it cannot be parsed"
        problem += "; indent with spaces" if "'\\t'" in problem else ""
        problem += f" (line {mark.line + 1})" if mark is not None else ""
        raise UserError(f"{name} is not valid YAML: {problem}") from error
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UserError(f"{name} holds no settings: write one 'name: value' a line")
    return settings


def parse_value(text: str) -> Any:
    """The value that a word means in YAML: number, true, null, [list], {table}; else it is text."""
    # A path may hold signs that mean something else in YAML
    if text[:1] not in tuple("[{\"'") and re.fullmatch(r"[-+.\w~]*", text) is None:
        return text
    try:
        with foreign_parser(ValueError):
            return yaml.load(text, Loader=_Loader)
    except ValueError:  # a path such as {a,b}/*.tar; whether text is allowed the setting says
        return text


def split_setting(word: str) -> tuple[str, Any] | None:
    """``"epochs=100"`` as ``("epochs", 100)``; None for what is no setting, as ``./a=b.jpg``."""
    match = _SETTING.match(word)
    return (match[1].replace("-", "_"), expanded(parse_value(match[2]))) if match else None


def read_settings(
    words: Sequence[str],
) -> tuple[list[tuple[str, Any]], list[SettingError], list[str]]:
    """What the words after a command are.

    Returns:
        Settings, as `split_setting` reads them; what was meant as one but is written otherwise;
        all other words.
    """
    pairs: list[tuple[str, Any]] = []
    errors: list[SettingError] = []
    others: list[str] = []
    left: list[str] = []
    for word in words:  # "epochs = 3" in quotes becomes the words that it would be without them
        spaced = None if exists(word) else _SPACED.fullmatch(word)
        left += [word] if spaced is None else [spaced[1], f"={spaced[2]}"]

    def next_value() -> str:
        """The word behind, where it may be a value that was torn off."""
        follows = bool(left) and not _SETTING.match(left[0]) and not left[0].startswith("-")
        return left.pop(0) if follows else ""

    while left:
        word = left.pop(0)
        if word.startswith("-") and not exists(word):
            name, equals, value = word.lstrip("-").partition("=")
            example = (
                f"{name.replace('-', '_')}={value or (not equals and next_value()) or 'VALUE'}"
            )
            text = f"settings are written without dashes, as in {example}"
            errors.append(SettingError(word, text))
        elif _NAME.fullmatch(word) and left and left[0].startswith("="):
            value = left.pop(0).removeprefix("=") or (left.pop(0) if left else "")
            text = f"settings are written without spaces, as in {word}={value or 'VALUE'}"
            errors.append(SettingError(word, text))
        elif (pair := split_setting(word)) is None:
            others.append(expanded(word))
        elif word.endswith("=") and word.count("=") == 1:
            value = next_value()
            example = f"as in {word}{value}" if value else "or null for none"
            text = f"nothing stands behind its equals sign: write a value there, {example}"
            errors.append(SettingError(pair[0], text))
        else:
            pairs.append(pair)
    return pairs, errors, others


def repeated(pairs: Iterable[tuple[str, Any]]) -> list[str]:
    """A sentence for each setting that is given again with another value; the last counts."""
    found: dict[str, Any] = {}
    sentences = []
    for path, value in pairs:
        if path in found and found[path] != value:
            used = f"{shown(value)} is used, not {shown(found[path])}"
            sentences.append(f"{path} is given twice: {used}.")
        found[path] = value
    return sentences


def tree_of(pairs: Iterable[tuple[str, Any]]) -> tuple[dict[str, Any], list[SettingError]]:
    """Dotted settings as nested tables; ``method=hpm`` is short for ``method.name=hpm``."""
    tree: dict[str, Any] = {}
    errors = []
    for path, value in pairs:
        place = "method.name" if path == "method" and isinstance(value, str | list) else path
        complaint = put(tree, place, value)
        errors += [SettingError(path, complaint)] if complaint else []
    return tree, errors


def put(tree: dict[str, Any], path: str, value: Any) -> str | None:
    """Set ``tree["a"]["b"]`` for the path ``a.b``, a table part by part; returns a complaint."""
    if isinstance(value, Mapping) and value and all(isinstance(key, str) for key in value):
        complaints = [put(tree, f"{path}.{key}", inner) for key, inner in value.items()]
        return next(filter(None, complaints), None)
    *parents, last = path.split(".")
    for i, part in enumerate(parents):
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            holder = f"{'.'.join(parents[: i + 1])} is {shown(inner)}"
            return f"no such setting; {holder} and has no parts"
        tree = inner
    tree[last] = value
    return None


def merge(base: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the settings of ``above``; tables are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merge(old, value)
        merged[key] = value
    return merged


def exists(name: str) -> bool:
    """Whether there is a file or folder of that name; a name that none can have is not there."""
    return os.path.exists(name)  # noqa: PTH110, Path.exists raises for a name that is too long

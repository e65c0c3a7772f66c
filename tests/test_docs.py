"""What the documentation names exists: links, headings, commands, settings, Python names, make
targets.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code on a page."""

    page: Path
    line: int
    language: str
    text: str


def named(thing: Any) -> str:
    if isinstance(thing, Block):
        return f"{thing.page.relative_to(ROOT)}:{thing.line}"
    return str(thing.relative_to(ROOT)) if isinstance(thing, Path) else str(thing)


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = [match for match in FENCE.finditer(text) if match[1] in languages]
        found += [
            Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])
            for match in fences
        ]
    return found


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What the headings of a page can be linked by, as MkDocs names them."""
    from markdown.extensions.toc import slugify

    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {slugify(re.sub(r"[`*]", "", heading), "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for match in LINK.finditer(prose(page)):
        target = match[1] or match[2]
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{named(page)} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(linked), (
                f"{named(page)} links to {target}; its headings are {anchors(linked)}"
            )


@pytest.mark.parametrize("block", blocks("python"), ids=named)
def test_python_blocks_name_what_exists(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("patchmine"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), (
                    f"{named(block)}: {node.module} has no {alias.name}"
                )
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "patchmine"
        ):
            assert hasattr(importlib.import_module("patchmine"), node.attr), (
                f"{named(block)}: patchmine.{node.attr}"
            )
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "patchmine.pretrain",
            "from_settings",
        ):
            check_settings(node)


def check_settings(call: ast.Call) -> None:
    """The settings in a call that is shown are settings."""
    from patchmine.config.resolve import from_settings

    settings: dict[str, Any] = {}
    for keyword in call.keywords:
        # A data set made in place is no setting that could be checked; any name stands for it.
        value = (
            "made in place"
            if isinstance(keyword.value, ast.Call)
            else ast.literal_eval(keyword.value)
        )
        settings |= value if keyword.arg is None else {keyword.arg: value}
    from_settings(**settings)


def commands(text: str) -> Iterator[list[str]]:
    """The words of every `patchmine` command in a shell text, without what it is piped into."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        starts = [
            place
            for place, word in enumerate(words)
            if word.rsplit("/", 1)[-1] in ("patchmine", "patchmine.cli.app")
        ]
        if starts:
            rest = words[starts[0] + 1 :]
            end = next(
                (place for place, word in enumerate(rest) if word in ("|", ">", "&&", ";")),
                len(rest),
            )
            yield rest[:end]


COMMANDS = [
    (block, words) for block in blocks("bash", "console", "sh") for words in commands(block.text)
]


class UnderstoodError(Exception):
    """The words of a command were read without a complaint."""


@pytest.fixture
def only_reading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Commands read their words and then stop; the folder they run in holds the recipe that the
    documentation shows.
    """
    import patchmine.cli.commands
    import patchmine.config.resolve
    import patchmine.runs.checking

    pretrain = importlib.import_module(
        "patchmine.training"
    )  # before its names are replaced, or it keeps those

    def stops(function: Callable[..., Any]) -> Callable[..., Any]:
        def read(*arguments: Any, **options: Any) -> None:
            function(*arguments, **options)
            raise UnderstoodError

        return read

    monkeypatch.setattr(
        patchmine.cli.commands, "read_words", stops(patchmine.cli.commands.read_words)
    )
    monkeypatch.setattr(patchmine.config.resolve, "parse", stops(patchmine.config.resolve.parse))
    every = ("CHECKS", "PLAN_CHECKS", "CLASSIFIER_CHECKS", "SEGMENTER_CHECKS", "DETECTOR_CHECKS")
    for checks in every:  # the files shown are not there
        monkeypatch.setattr(patchmine.runs.checking, checks, ())
    shares = importlib.import_module("patchmine.training.shares")
    monkeypatch.setattr(
        shares, "settings_of_start", lambda start: {"kind": "classify", "init": start}
    )
    extending = importlib.import_module("patchmine.training.extending")
    extended = {"kind": "pretrain", "data": "photos"}
    monkeypatch.setattr(extending, "settings_of_extension", lambda path, timed: extended)
    known = importlib.import_module("patchmine.runs.known")
    settings = patchmine.PretrainConfig(data="photos")
    monkeypatch.setattr(known, "settings_of_run", lambda path: settings)
    monkeypatch.setattr(known, "settings_to_resume", lambda path, words, say: settings)
    monkeypatch.setattr(pretrain, "resume", stops(lambda *_, **__: None))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("block", "words"), COMMANDS, ids=[f"{named(b)} {' '.join(w[:3])}" for b, w in COMMANDS]
)
def test_commands_and_their_settings_exist(
    block: Block, words: list[str], only_reading: Path
) -> None:
    from patchmine.cli.app import app

    for word in words:
        if word.endswith(".yaml") and "=" not in word:
            (only_reading / word).write_text(blocks("yaml")[0].text, encoding="utf-8")
    result = CliRunner().invoke(app, words)
    if not isinstance(result.exception, UnderstoodError):
        assert result.exit_code == 0, (
            f"{named(block)}: patchmine {' '.join(words)}\n{result.output}"
        )


def command_names() -> set[str]:
    """Every command and group: "eval", "eval knn", ..."""
    from patchmine.cli.app import app

    top: Any = app
    groups = {name: set(getattr(command, "commands", ())) for name, command in top.commands.items()}
    return set(groups) | {f"{name} {inner}" for name, inside in groups.items() for inner in inside}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_in_sentences_exist(page: Path) -> None:
    known = command_names()
    for text in re.findall(r"`patchmine ([^`]+)`", prose(page)):
        words = [word for word in text.split() if re.fullmatch(r"[a-z]+", word)]
        if words and text.split()[0] == words[0]:
            found = (
                " ".join(words[:2])
                if any(name.startswith(f"{words[0]} ") for name in known)
                else words[0]
            )
            assert found in known or (found.split()[0] in known and len(words) == 1), (
                f"{named(page)}: patchmine {text}"
            )


def test_make_targets_exist() -> None:
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for block in blocks("bash", "console", "sh"):
        for line in block.text.splitlines():
            words = line.split("#")[0].split()
            if words[:1] == ["make"]:
                unknown = {
                    word for word in words[1:] if "=" not in word and not word.startswith("-")
                } - set(rules)
                assert not unknown, f"{named(block)}: make {unknown}"


def test_every_recipe_and_method_has_its_place() -> None:
    from patchmine.config.recipes import recipe_names
    from patchmine.methods import METHODS

    for name in METHODS:
        assert (ROOT / "docs" / "methods" / f"{name}.md").is_file(), (
            f"docs/methods/{name}.md is missing"
        )
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert not [name for name in recipe_names() if f"`{name}`" not in text], (
        "docs/recipes.md lists all recipes"
    )


@cache
def source_texts() -> str:
    """Every text in the sources, one a line, with a line's end where a value is put in."""
    texts = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            constants = (each.value if isinstance(each, ast.Constant) else "" for each in parts)
            texts += [text for text in constants if isinstance(text, str)]
    return "\n".join(texts)


def quoted_messages() -> list[str]:
    """The messages that the page of symptoms quotes, in blocks and in the table of refusals."""
    page = ROOT / "docs" / "troubleshooting.md"
    blocked = [block.text for block in blocks("text") if block.page == page]
    refusals = page.read_text(encoding="utf-8").split("\n## ")[1]
    assert refusals.startswith("The run is refused")
    return [*"".join(blocked).splitlines(), *re.findall(r"^\| `([^`]+)`", refusals, re.MULTILINE)]


@pytest.mark.parametrize("message", quoted_messages())
def test_quoted_messages_are_in_the_sources(message: str) -> None:
    texts = source_texts()
    for part in message.split("..."):
        assert part.strip(" ,;:()?") in texts, f"no message says {part!r}"

"""Recipes: settings that are known to do something, as YAML files.

``about`` says what a recipe is; ``methods`` holds settings of each method, ``by_size`` those that
depend on the number of images; ``with_init`` names the recipe that takes its place where weights
are given, and ``needs_init`` that it is for nothing else; all else are settings of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchmine.config.explain import did_you_mean
from patchmine.config.overrides import exists, read_yaml
from patchmine.errors import Say, UserError, shown_name, silent

_FOLDER = Path(__file__).parent
_FIRST = "my-images"
ABOUT = ("title", "command", "data", "hardware", "time", "expected")


@dataclass(frozen=True)
class Recipe:
    """One recipe as it was read, unchecked.

    ``ours``: it comes with patchmine.  ``with_init``: the recipe for runs with ``init``, or none.
    ``needs_init``: it goes on from weights.
    """

    name: str
    about: Mapping[str, str]
    settings: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    by_size: list[dict[str, Any]]
    ours: bool = False
    with_init: str | None = None
    needs_init: bool = False

    @property
    def method_names(self) -> list[str]:
        """The methods that it has settings for, its default first."""
        default = self.settings.get("method", "mae")
        name = default.get("name", "mae") if isinstance(default, Mapping) else default
        return list(dict.fromkeys([str(name), *self.methods]))


def recipe_names() -> list[str]:
    """Names of the recipes that come with patchmine; first that for images of one's own."""
    names = (path.stem for path in _FOLDER.glob("*.yaml"))
    return sorted(names, key=lambda name: (name != _FIRST, name))


def list_recipes() -> list[Recipe]:
    """The recipes that come with patchmine."""
    return [load_recipe(name) for name in recipe_names()]


def named_recipe(name: str) -> Recipe:
    """A recipe that comes with patchmine.  Raises UserError where none has the name."""
    names = recipe_names()
    if name not in names:
        near = did_you_mean(name, names) or f"; there are {', '.join(names)}"
        raise UserError(f"No recipe '{shown_name(name)}'{near}")
    return load_recipe(name)


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by its name or its file.  Raises UserError when there is none."""
    path = _find(str(name))
    content = read_yaml(path)
    about, methods = content.pop("about", {}), content.pop("methods", {})
    by_size = content.pop("by_size", [])
    with_init, needs_init = content.pop("with_init", None), content.pop("needs_init", False)
    wrong = ""
    if not isinstance(about, dict):
        wrong = f"about must be a table with some of {', '.join(ABOUT)}"
    elif not isinstance(methods, dict) or not _are_tables(methods.values()):
        example = "'hpm: {epochs: 50}'"
        wrong = f"methods must hold one table of settings for each method, as in {example}"
    elif not isinstance(by_size, list) or not _are_tables(by_size):
        wrong = "by_size must be a list of rows such as '- {up_to: 5000, use: {epochs: 400}}'"
    elif not isinstance(with_init, str | None):
        wrong = "with_init must be the name of a recipe, as in with_init: adapt"
    elif not isinstance(needs_init, bool):
        wrong = "needs_init must be true or false"
    if wrong:
        raise UserError(f"{shown_name(path)}: {wrong}")
    ours = path.parent == _FOLDER
    known_as = path.stem if ours else shown_name(name)
    about = {key: str(text) for key, text in about.items()}
    return Recipe(known_as, about, content, methods, by_size, ours, with_init, needs_init)


def recipe_for(name: str | Path, wanted: Mapping[str, Any], say: Say = silent) -> Recipe:
    """The recipe for settings that are ``wanted``: another one where these name weights."""
    recipe = load_recipe(name)
    if recipe.with_init is None or wanted.get("init") is None:
        return recipe
    say(f"With init= the recipe {recipe.name} is {recipe.with_init}.")
    return load_recipe(recipe.with_init)


def _are_tables(rows: Any) -> bool:
    return all(isinstance(row, dict) for row in rows)


def _find(name: str) -> Path:
    if name in recipe_names():
        return _FOLDER / f"{name}.yaml"
    path = Path(name).expanduser() if name.startswith("~/") else Path(name)
    quoted = shown_name(name)
    if exists(name) and path.is_dir():
        resume = f"a run goes on with `patchmine resume {quoted}`"
        raise UserError(f"{quoted} is a folder, not a recipe: images are data={quoted}, {resume}")
    if exists(str(path)):
        if path.is_file():
            return path
        raise UserError(f"{quoted} is no file that holds settings: name a recipe or a YAML file")
    if "/" in name and not name.endswith((".yaml", ".yml")):
        given = f"images are given as data={quoted}"
        raise UserError(f"{quoted} does not exist and would be no recipe: {given}")
    stem, names = name.removesuffix(".yaml"), recipe_names()
    near = f"; did you mean {stem}?" if stem in names else did_you_mean(stem, names)
    raise UserError(
        f"No recipe '{quoted}', and no such file{near or '; there are ' + ', '.join(names)}"
    )

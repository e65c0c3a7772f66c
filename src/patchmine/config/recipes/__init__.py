"""Recipes: settings that are known to do something, as YAML files.

A recipe's head, ``about``, says what it is: title, command, data, hardware, time and expected
number.  ``methods`` holds settings of each method, ``by_size`` those that depend on the number of
images; all else are settings of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchmine.config.words import did_you_mean, exists, read_yaml
from patchmine.errors import UserError, shown_name

_FOLDER = Path(__file__).parent
ABOUT = ("title", "command", "data", "hardware", "time", "expected")


@dataclass(frozen=True)
class Recipe:
    """One recipe as it was read; nothing in ``settings`` is checked yet.  ``ours``: it comes with
    patchmine.
    """

    name: str
    about: Mapping[str, str]
    settings: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    by_size: list[dict[str, Any]]
    ours: bool = False

    @property
    def method_names(self) -> list[str]:
        """The methods that it has settings for, its default first."""
        default = self.settings.get("method", "mae")
        name = default.get("name", "mae") if isinstance(default, Mapping) else default
        return list(dict.fromkeys([str(name), *self.methods]))


def recipe_names() -> list[str]:
    """Names of the recipes that come with patchmine."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def list_recipes() -> list[Recipe]:
    """The recipes that come with patchmine."""
    return [load_recipe(name) for name in recipe_names()]


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by its name or its file.  Raises UserError when there is none, or when it is no
    recipe.
    """
    path = _find(str(name))
    content = read_yaml(path)
    about = content.pop("about", {})
    methods = content.pop("methods", {})
    by_size = content.pop("by_size", [])
    if not isinstance(about, dict):
        raise UserError(
            f"{shown_name(path)}: about must be a table with some of {', '.join(ABOUT)}"
        )
    if not isinstance(methods, dict) or not all(isinstance(row, dict) for row in methods.values()):
        raise UserError(
            f"{shown_name(path)}: methods must hold one table of settings for each method, as in 'hpm: {{epochs: 50}}'"
        )
    if not isinstance(by_size, list) or not all(isinstance(row, dict) for row in by_size):
        raise UserError(
            f"{shown_name(path)}: by_size must be a list of rows such as '- {{up_to: 5000, use: {{epochs: 400}}}}'"
        )
    ours = path.parent == _FOLDER
    known_as = path.stem if ours else shown_name(name)
    return Recipe(
        known_as, {key: str(text) for key, text in about.items()}, content, methods, by_size, ours
    )


def _find(name: str) -> Path:
    inside = _FOLDER / f"{name}.yaml"
    if name in recipe_names():
        return inside
    path = Path(name).expanduser() if name.startswith("~/") else Path(name)
    quoted = shown_name(name)
    if exists(name) and path.is_dir():
        raise UserError(
            f"{quoted} is a folder, not a recipe: images are data={quoted}, a run goes on with "
            f"`patchmine resume {quoted}`"
        )
    if exists(str(path)):
        if not path.is_file():
            raise UserError(
                f"{quoted} is no file that holds settings: name a recipe or a YAML file"
            )
        return path
    if "/" in name and not name.endswith((".yaml", ".yml")):
        raise UserError(
            f"{quoted} does not exist and would be no recipe: images are given as data={quoted}"
        )
    stem = name.removesuffix(".yaml")
    near = (
        f"; did you mean {stem}?" if stem in recipe_names() else did_you_mean(stem, recipe_names())
    )
    near = near or f"; there are {', '.join(recipe_names())}"
    raise UserError(f"No recipe '{quoted}', and no such file{near}")

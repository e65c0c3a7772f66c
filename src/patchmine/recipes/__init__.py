"""Recipes: settings that are known to do something, as YAML files.

A recipe's head, ``about``, says what it is: title, command, data, hardware, time and expected number.  ``methods``
holds settings of each method, ``by_size`` those that depend on the number of images; all else are settings of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchmine.errors import UserError
from patchmine.words import did_you_mean, read_yaml

_FOLDER = Path(__file__).parent
ABOUT = ("title", "command", "data", "hardware", "time", "expected")


@dataclass(frozen=True)
class Recipe:
    """One recipe as it was read; nothing in ``settings`` is checked yet."""

    name: str
    about: Mapping[str, str]
    settings: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    by_size: list[dict[str, Any]]

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
    """A recipe by its name or its file.  Raises UserError when there is none, or when it is no recipe."""
    path = _find(str(name))
    content = read_yaml(path)
    about = content.pop("about", {})
    methods = content.pop("methods", {})
    by_size = content.pop("by_size", [])
    if not isinstance(about, dict):
        raise UserError(f"{path}: about must be a table with some of {', '.join(ABOUT)}")
    if not isinstance(methods, dict) or not all(isinstance(row, dict) for row in methods.values()):
        raise UserError(f"{path}: methods must hold one table of settings for each method, as in 'hpm: {{epochs: 50}}'")
    if not isinstance(by_size, list) or not all(isinstance(row, dict) for row in by_size):
        raise UserError(f"{path}: by_size must be a list of rows such as '- {{up_to: 5000, use: {{epochs: 400}}}}'")
    shown_name = path.stem if path.parent == _FOLDER else str(name)
    return Recipe(shown_name, {key: str(text) for key, text in about.items()}, content, methods, by_size)


def _find(name: str) -> Path:
    inside = _FOLDER / f"{name}.yaml"
    if "/" not in name and inside.is_file():
        return inside
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(
            f"{name} is a folder, not a recipe: images are data={name}, a run goes on with `patchmine resume {name}`"
        )
    if "/" in name and not name.endswith((".yaml", ".yml")):
        raise UserError(f"{name} does not exist and would be no recipe: images are given as data={name}")
    near = did_you_mean(name.removesuffix(".yaml"), recipe_names()) or f"; there are {', '.join(recipe_names())}"
    raise UserError(f"No recipe {name!r}, and no such file{near}")

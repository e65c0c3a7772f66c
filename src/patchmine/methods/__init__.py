"""The methods: settings by name; the file of each class is imported when work starts."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from patchmine.methods.settings.amt import AmtSettings
from patchmine.methods.settings.droppos import DropPosSettings
from patchmine.methods.settings.emae import EmaeSettings
from patchmine.methods.settings.hpm import HpmSettings
from patchmine.methods.settings.mae import MaeSettings
from patchmine.methods.settings.mokd import MokdSettings
from patchmine.methods.settings.scfs import ScfsSettings
from patchmine.methods.settings.semaim import SemAimSettings
from patchmine.methods.settings.simmim import SimMimSettings
from patchmine.models.settings import MethodSettings

if TYPE_CHECKING:
    from patchmine.task import Method

METHODS: dict[str, type[MethodSettings]] = {
    "mae": MaeSettings,
    "hpm": HpmSettings,
    "simmim": SimMimSettings,
    "amt": AmtSettings,
    "emae": EmaeSettings,
    "droppos": DropPosSettings,
    "semaim": SemAimSettings,
    "mokd": MokdSettings,
    "scfs": ScfsSettings,
}
"""Looked up when settings are checked, so that a program may add a method of its own first."""


def method_class(settings: MethodSettings | type[MethodSettings]) -> type[Method]:
    """The class that trains as these settings say; this imports torch."""
    module, _, name = settings.implementation.partition(":")
    found: type[Method] = getattr(import_module(module), name)
    return found

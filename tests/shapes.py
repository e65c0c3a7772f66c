"""The shapes that signatures state are checked in every test, and nowhere else."""

from __future__ import annotations

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number is a float

install_import_hook(["patchmine.ops", "patchmine.backbones.tokens"], "shapes.checked")

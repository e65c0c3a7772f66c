"""Rows of ``by_size`` as a recipe holds them: what they decide beside a user's choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patchmine.methods import METHODS

_NETWORK, _SIZE = {"model", "model_args"}, {"image_size", "patch_size", "crops"}


def rows_beside(
    wanted: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], method: Any
) -> list[dict[str, Any]]:
    """The rows of a recipe without what the user's settings decide.

    Args:
        wanted: these settings, nested.
        rows: as they were read, unchecked.
        method: the name of the run's method.

    Returns:
        Rows of the same number.
    """
    return [_beside(wanted, row, method) for row in rows]


def _beside(wanted: Mapping[str, Any], row: Mapping[str, Any], method: Any) -> dict[str, Any]:
    kept = dict(row)
    if isinstance(use := row.get("use", {}), Mapping):
        kept["use"] = _minus(use, wanted)
    if isinstance(smaller := row.get("smaller"), list):
        left = [_smaller_beside(wanted, each, method) for each in smaller]
        kept["smaller"] = [each for each in left if each]
    return kept


def _smaller_beside(wanted: Mapping[str, Any], smaller: Any, method: Any) -> Any:
    """What is left of smaller settings; those of images and patches go together, and with them the
    network, to which they belong.
    """
    if not isinstance(smaller, Mapping):
        return smaller  # whose error is told
    void: set[str] = _SIZE if _SIZE & wanted.keys() else set()
    void = _SIZE | _NETWORK if _NETWORK & wanted.keys() else void
    if method in METHODS and not METHODS[method].multi_crop:
        void = {*void, "crops"}  # of no use to it
    kept = {key: value for key, value in smaller.items() if key not in void}
    left = _minus({key: kept[key] for key in kept if key != "method"}, wanted)
    own, chosen = smaller.get("method"), wanted.get("method")
    if isinstance(own, Mapping) and method in METHODS:  # which a bare name leaves as it is
        own = _minus(_known_to(method, own), chosen if isinstance(chosen, Mapping) else {})
    return {key: value for key, value in {**left, "method": own}.items() if value not in (None, {})}


def _known_to(method: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a method, without those that only other methods have."""
    known = METHODS[method].model_fields
    elsewhere = {name for settings in METHODS.values() for name in settings.model_fields}
    return {key: value for key, value in own.items() if key in known or key not in elsewhere}


def _minus(use: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What a row still decides beside the user's choices."""
    # A chosen model does not take another's arguments
    void = {"model_args"} if "model" in wanted else set()
    kept: dict[str, Any] = {}
    for key, value in use.items():
        chosen = wanted.get(key)
        if isinstance(value, Mapping) and isinstance(chosen, Mapping):
            kept[key] = _minus(value, chosen)
        elif key not in wanted and key not in void:
            kept[key] = value
    return kept

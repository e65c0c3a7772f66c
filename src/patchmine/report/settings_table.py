"""The part of a report that lists the settings, and of several runs what differs between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from patchmine.report.reading import RunRecord
from patchmine.report.words import NOTHING

_ALWAYS_DIFFERENT = frozenset({"out"})


def settings_section(runs: Sequence[RunRecord]) -> str:
    """All settings of one run in columns, or a table over runs in which rows that differ stand out."""
    settings = [run.settings for run in runs if run.settings]
    if not settings:
        return ""
    content = _list(settings[0]) if len(runs) == 1 else _table(runs)
    return f'<section id="settings"><h2>Settings</h2>{content}</section>'


def differing(settings: Sequence[Mapping[str, str]]) -> set[str]:
    """Names of the settings that are not the same in all runs; a missing one differs from every
    value.
    """
    names = {name for run in settings for name in run}
    return {
        name for name in names - _ALWAYS_DIFFERENT if len({run.get(name) for run in settings}) > 1
    }


def _list(settings: Mapping[str, str]) -> str:
    rows = "".join(
        f"<div><dt>{_breakable(name)}</dt><dd>{_breakable(value)}</dd></div>"
        for name, value in settings.items()
    )
    return f'<dl class="settings">{rows}</dl>'


def _table(runs: Sequence[RunRecord]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    different = differing([run.settings for run in runs])
    head = "".join(
        f'<th scope="col" class="run-{i % 8}"><i class="swatch"></i>{escape(run.name)}</th>'
        for i, run in enumerate(runs)
    )
    rows = "".join(
        f'<tr class="{"differs" if name in different else "same"}"><th scope="row">{_breakable(name)}</th>'
        + "".join(f"<td>{_breakable(run.settings.get(name, NOTHING))}</td>" for run in runs)
        + "</tr>"
        for name in names
    )
    count = f"{len(different)} of {len(names)} settings differ."
    return (
        f'<p class="note">{count} <button type="button" id="all-settings" aria-pressed="true">all settings</button></p>'
        f'<div class="scroll"><table class="settings"><thead><tr><th scope="col">setting</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _breakable(text: str) -> str:
    """Escaped, and allowed to break after the characters at which paths and dotted names are read."""
    return "".join(
        f"{escape(letter)}<wbr>" if letter in "./_" else escape(letter) for letter in text
    )

"""How commands are made: a group of them, one that takes its words as they are, and where messages go."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer


def typer_group(help_text: str, **more: Any) -> typer.Typer:
    """A group of commands in plain text."""
    return typer.Typer(
        help=help_text,
        options_metavar="",
        no_args_is_help=True,
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
        **more,
    )


def command(group: typer.Typer, name: str, usage: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that gets its words as they are, "--epochs 3" too, so that it can say how that is written here."""
    take_all = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help", "-h"]}
    return group.command(name, options_metavar=usage, context_settings=take_all)


def say(text: str) -> None:
    """For a person, apart from what a command gives."""
    print(text, file=sys.stderr, flush=True)

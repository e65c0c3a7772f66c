"""The command line, called within the process of a test."""

from __future__ import annotations

from click.testing import CliRunner, Result

from patchmine.cli.app import app


def call(*words: str) -> Result:
    """What a command gives and prints, and how it ends."""
    return CliRunner().invoke(app, list(words))


def patchmine_says(*words: str, code: int = 0) -> str:
    """What a command prints, in one line; of one that fails with ``code`` what it complains of."""
    result = call(*words)
    assert result.exit_code == code, result.output
    return " ".join((result.stderr if code else result.output).split())

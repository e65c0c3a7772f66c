"""The words after a command as typed settings: what stands first (a run, images) and `key=value`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from pydantic import BaseModel

from patchmine.config.explain import validate
from patchmine.config.overrides import read_settings, repeated, tree_of
from patchmine.errors import shown_name
from patchmine.strict import Mistake

Model = TypeVar("Model", bound=BaseModel)


def read_words(
    model: type[Model],
    words: Sequence[str],
    *,
    command: str,
    first: Sequence[str] = (),
    rest: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Model:
    """The settings of a command.

    Words without ``=`` fill the fields named in ``first``, in order, and then the list ``rest``.
    ``say`` hears of settings that are given twice.  Raises UserError with every mistake.
    """
    pairs, mistakes, plain = read_settings(words)
    settings, torn = tree_of(pairs)
    mistakes += torn
    for sentence in repeated(pairs):
        say(sentence)
    settings |= zip(first, plain, strict=False)
    more = plain[len(first) :]
    if rest is not None and more:
        settings[rest] = more
    else:
        mistakes += [
            Mistake(shown_name(word), "one word too many; settings are written key=value")
            for word in more
        ]
    known = ", ".join(name for name in model.model_fields if name not in (*first, rest))
    hint = f"; there are {known}" if known else ""
    return validate(model, settings, where=f"`patchmine {command}`", before=mistakes, hint=hint)

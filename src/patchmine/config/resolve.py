"""A run's settings from what users give: a recipe, `key=value` words, or keyword arguments from
Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from patchmine.backbones.video import is_video
from patchmine.config.explain import refusal, validate
from patchmine.config.recipes import Recipe, load_recipe
from patchmine.config.schema import RunConfig, SizeRow, names_of
from patchmine.config.words import exists, merge, put, read_settings, repeated, shown
from patchmine.errors import UserError, shown_name
from patchmine.methods import METHODS
from patchmine.strict import LARGEST_COUNT, Mistake

Say = Callable[[str], None]
Check = Callable[[RunConfig], list[Mistake]]

# Absolute learning rates, as others call them.
RATES = ("lr", "learning_rate", "peak_lr", "max_lr")


def no_more(_: RunConfig) -> list[Mistake]:
    """Finds no mistakes."""
    return []


def silent(_: str) -> None:
    """Says nothing."""


def parse(
    recipe: str | Path | None, overrides: Sequence[str], say: Say = silent, *, also: Check = no_more
) -> RunConfig:
    """The run that a recipe (name, file or none) and ``key=value`` words describe.

    Raises UserError with every mistake, those that ``also`` finds in the settings included
    (`checking.misfits`). ``say`` hears what was decided for the user.
    """
    pairs, complaints, others = read_settings(overrides)
    mistakes = [*(Mistake(*complaint) for complaint in complaints), *map(_not_a_setting, others)]
    for sentence in repeated(pairs):
        say(sentence)
    return _assemble(None if recipe is None else load_recipe(recipe), pairs, mistakes, say, also)


def from_settings(
    recipe: str | Path | None = None, say: Say = silent, also: Check = no_more, **settings: Any
) -> RunConfig:
    """The same from Python: ``from_settings(data="photos", method="hpm", **{"method.mask_ratio":
    0.8})``.
    """
    return _assemble(
        None if recipe is None else load_recipe(recipe), list(settings.items()), [], say, also
    )


def _not_a_setting(word: str) -> Mistake:
    example = f"data={word}" if exists(word) else "epochs=100"
    return Mistake(
        shown_name(word),
        f"is no setting; settings are written key=value, as in {shown_name(example)}",
    )


def _assemble(
    recipe: Recipe | None,
    pairs: Sequence[tuple[str, Any]],
    mistakes: list[Mistake],
    say: Say,
    also: Check,
) -> RunConfig:
    wanted = _tree(pairs, mistakes)
    settings = wanted if recipe is None else merge(_recipe_settings(recipe, wanted, say), wanted)
    where = "the settings" if recipe is None else f"the settings (with {recipe.name})"
    advised = "batch_size" not in (wanted if recipe is None or recipe.ours else settings)
    config = _validate(_shared_out(settings, say) if advised else settings, where, mistakes, also)
    for row in config.by_size:
        _with_row(
            config, row, f"{where} for data sets up to {row.up_to or 'any'} images", also=also
        )
    if advised:
        _advise(config, "batch_size")
    shortened = "epochs" in wanted or "warmup_epochs" not in settings
    return _fit_warmup(config, shortened and "warmup_epochs" not in wanted, say)


def _tree(pairs: Sequence[tuple[str, Any]], mistakes: list[Mistake]) -> dict[str, Any]:
    """Dotted settings as nested tables."""
    tree: dict[str, Any] = {}
    for path, value in pairs:
        if path == "method" and isinstance(value, BaseModel):
            value = value.model_dump()
        complaint = put(
            tree, "method.name" if path == "method" and isinstance(value, str) else path, value
        )
        if complaint is not None:
            mistakes.append(Mistake(path, complaint))
    return tree


def _rates(settings: dict[str, Any]) -> list[Mistake]:
    """Absolute learning rates are taken out of the settings, and told as what they are here."""
    return [
        Mistake(
            name,
            f"no such setting (given {shown(value)}); it is blr here, {_conversion(value, settings)}",
        )
        for name in RATES
        if (value := settings.pop(name, None)) is not None
    ]


def _conversion(rate: Any, settings: Mapping[str, Any]) -> str:
    """The setting that gives an absolute learning rate."""
    batch_size = settings.get("batch_size", RunConfig.model_fields["batch_size"].default)
    numbers = all(
        isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < 1e9
        for x in (rate, batch_size)
    )
    if not numbers or "by_size" in settings:
        return "the rate for 256 images: blr = rate * 256 / batch_size"
    return f"the rate for 256 images: with batch_size={batch_size} give blr={rate * 256 / batch_size:.6g}"


def _advise(config: RunConfig, name: str) -> None:
    """Marks a setting as one that the user did not choose, so that it may be fitted to the data."""
    config.model_fields_set.discard(name)


def _validate(
    settings: Mapping[str, Any], where: str, mistakes: Sequence[Mistake] = (), also: Check = no_more
) -> RunConfig:
    hint = "; `patchmine config schema` lists all"
    known = dict(settings)
    mistakes = [*mistakes, *_rates(known)]
    return validate(
        RunConfig,
        known,
        where=where,
        before=mistakes,
        placeholders={"data": "data"},
        hint=hint,
        also=also,
    )


def _recipe_settings(recipe: Recipe, wanted: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """The recipe's settings for the wanted method, without what the wanted model makes void."""
    settings = dict(recipe.settings)
    default = settings.get("method", "mae")
    if not isinstance(default, Mapping):
        default = {"name": default}
    name = _method_name(wanted) or default.get("name")
    if not isinstance(name, str | None):
        return settings  # and let the mistake be told
    settings["method"] = default if name == default.get("name") else {"name": name}
    if name is not None and name in recipe.methods:
        settings = merge(settings, recipe.methods[name])
    elif name in METHODS and (recipe.methods or name != default.get("name")):
        say(
            f"Recipe {recipe.name} has no settings for method={name}: the method's own defaults are used."
        )
    if recipe.by_size:
        rows = [(row, row.get("use", {})) for row in recipe.by_size]
        settings["by_size"] = [
            {**row, "use": _minus(use, wanted) if isinstance(use, Mapping) else use}
            for row, use in rows
        ]
    if (
        "model" in wanted
        and settings.get("model_args")
        and wanted["model"] != settings.get("model")
    ):
        dropped = settings.pop("model_args")
        say(
            f"model={wanted['model']} replaces the recipe's model, so its model_args {shown(dropped)} are not used."
        )
    return settings


def _method_name(settings: Mapping[str, Any]) -> Any:
    method = settings.get("method")
    return method.get("name") if isinstance(method, Mapping) else method


def _minus(use: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What a table still decides beside the user's choices; a chosen model does not take another's
    arguments.
    """
    void = {"model_args"} if "model" in wanted else set()
    kept: dict[str, Any] = {}
    for key, value in use.items():
        chosen = wanted.get(key)
        if isinstance(value, Mapping) and isinstance(chosen, Mapping):
            kept[key] = _minus(value, chosen)
        elif key not in wanted and key not in void:
            kept[key] = value
    return kept


def _fit_warmup(config: RunConfig, may_shorten: bool, say: Say) -> RunConfig:
    """A warm-up that nobody asked for must not outlast a run that somebody shortened."""
    if config.by_size or config.steps is not None or config.epochs is None:
        return config
    if may_shorten and config.warmup_epochs > config.epochs / 2:
        shorter = config.epochs / 10
        say(
            f"warmup_epochs={config.warmup_epochs:g} is shortened to {shorter:g}, a tenth of {config.epochs} epochs."
        )
        return config.model_copy(update={"warmup_epochs": shorter})
    if config.warmup_epochs >= config.epochs:
        text = f"given {config.warmup_epochs:g}; must be below epochs={config.epochs}"
        raise refusal([Mistake("warmup_epochs", text)], "the settings")
    return config


def resolve_size(config: RunConfig, num_images: int, say: Say = silent) -> RunConfig:
    """The settings for a data set of ``num_images``, where the recipe makes them depend on it."""
    if not config.by_size:
        return config
    fitting = [row for row in config.by_size if row.up_to is None or num_images <= row.up_to]
    if not fitting:
        raise UserError(
            f"by_size has no row for {num_images:,} images: end it with a row 'up_to: null'"
        )
    chosen = ", ".join(f"{key}={shown(value)}" for key, value in fitting[0].use.items())
    say(f"{num_images:,} images: {chosen or 'nothing to choose'}.")
    sized = _with_row(config, fitting[0], f"the settings for {num_images:,} images", say)
    if "batch_size" in fitting[0].use or "batch_size" not in config.model_fields_set:
        _advise(sized, "batch_size")
    # A row no longer holds what the user set: where it has no warm-up, that is the user's.
    return _fit_warmup(sized, "warmup_epochs" in fitting[0].use, say)


def _with_row(
    config: RunConfig, row: SizeRow, where: str, say: Say = silent, *, also: Check = no_more
) -> RunConfig:
    settings = merge(config.model_dump(exclude={"by_size"}), row.use)
    advised = "batch_size" in row.use or "batch_size" not in config.model_fields_set
    return _validate(_shared_out(settings, say) if advised else settings, where, also=also)


def _shared_out(settings: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """The settings with a batch that nobody chose lowered to what divides among the parts that it
    is cut into.
    """
    batch, *counts = (
        settings.get(name, RunConfig.model_fields[name].default)
        for name in ("batch_size", "accumulate", "devices", "num_nodes")
    )
    clip = settings.get("clip")
    if is_video(str(settings.get("model"))) and isinstance(clip, Mapping):
        counts.append(clip.get("repeats", 1))
    if not all(type(count) is int and 0 < count <= LARGEST_COUNT for count in (batch, *counts)):
        return dict(settings)  # whose mistakes are told
    parts = math.prod(counts)
    if batch % parts == 0:
        return dict(settings)
    fitting = max(1, batch // parts) * parts
    say(
        f"batch_size={batch} is changed to {fitting}, a multiple of the {parts} parts that a batch is cut into."
    )
    return {**settings, "batch_size": fitting}


def fit_batch(config: RunConfig, samples: int, items: str, say: Say = silent) -> RunConfig:
    """The settings for ``samples`` samples in an epoch, called ``items`` in messages.

    A larger batch that the user did not choose is lowered to what divides among the parts that a
    batch is cut into; UserError for one that was chosen, and where there are fewer samples than
    parts.
    """
    if config.batch_size <= samples:
        return config
    repeats = config.clip.repeats if is_video(config.model) else 1
    parts = config.accumulate * config.devices * config.num_nodes * repeats
    fitting = samples // parts * parts
    told = f"batch_size={config.batch_size} is more than the {samples:,} {items}"
    if fitting == 0:
        raise UserError(
            f"{told}, which are fewer than the {parts} parts of a batch ({_parts(config)}): lower these"
        )
    if "batch_size" in config.model_fields_set:
        raise UserError(f"{told}: set batch_size={fitting} or lower")
    say(f"{told}: it is lowered to {fitting}.")
    return config.model_copy(update={"batch_size": fitting})


def _parts(config: RunConfig) -> str:
    names = ("accumulate", "devices", "num_nodes")
    factors = [f"{name}={getattr(config, name)}" for name in names]
    return " * ".join(
        [*factors, *([f"clip.repeats={config.clip.repeats}"] if is_video(config.model) else [])]
    )


def results_of(config: RunConfig) -> dict[str, Any]:
    """The settings that decide the weights as JSON, by dotted names."""
    return _flat(config.model_dump(mode="json", include=set(names_of(decide_weights=True))))


def changed_results(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The settings that differ between two `results_of`, as "batch_size (was 256, now 512)"."""
    absent = object()
    return [
        f"{name} (was {_told(before, name)}, now {_told(after, name)})"
        for name in dict.fromkeys([*before, *after])
        if before.get(name, absent) != after.get(name, absent)
    ]


def _told(flat: Mapping[str, Any], name: str) -> str:
    return shown(flat[name]) if name in flat else "not set"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat

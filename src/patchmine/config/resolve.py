"""A run's settings from a recipe with overrides, and what they become once the data are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from patchmine.backbones.names import reads_clips
from patchmine.config.explain import refusal, shown, validate
from patchmine.config.overrides import exists, merge, read_settings, repeated, tree_of
from patchmine.config.recipes import Recipe, recipe_for
from patchmine.config.rows import rows_beside
from patchmine.config.schema import (
    KINDS,
    AnyConfig,
    DetectConfig,
    FinetuneConfig,
    PretrainConfig,
    RunConfig,
    SegmentConfig,
    SizeRow,
    names_of,
)
from patchmine.errors import Say, UserError, shown_name, silent
from patchmine.methods import METHODS
from patchmine.strict import LARGEST_COUNT, SettingError

Config = TypeVar("Config", bound=RunConfig)
Checks = Sequence[Callable[[Any], list[SettingError]]]
"""What looks for more errors in the settings of a run."""

RATES = ("lr", "learning_rate", "peak_lr", "max_lr")  # absolute ones, as others call them


def parse(
    recipe: str | Path | None,
    overrides: Sequence[str],
    say: Say = silent,
    *,
    also: Checks = (),
    base: Mapping[str, Any] | None = None,
) -> AnyConfig:
    """The run that a recipe (name, file or none) and ``key=value`` words describe.

    ``say`` hears what was decided for the user, ``also`` looks for more errors, and ``base`` holds
    settings that recipe and words overrule, ``kind`` among them.  Raises UserError with all errors.
    """
    pairs, errors, others = read_settings(overrides)
    for word in others:
        example = f"data={word}" if exists(word) else "epochs=100"
        text = f"is no setting; settings are written key=value, as in {shown_name(example)}"
        errors.append(SettingError(shown_name(word), text))
    for sentence in repeated(pairs):
        say(sentence)
    return _assemble(recipe, pairs, errors, say, also, base or {})


def from_settings(
    recipe: str | Path | None = None,
    say: Say = silent,
    also: Checks = (),
    base: Mapping[str, Any] | None = None,
    **settings: Any,
) -> AnyConfig:
    """The same from Python: ``from_settings(data="photos", **{"method.mask_ratio": 0.8})``."""
    return _assemble(recipe, list(settings.items()), [], say, also, base or {})


def of_kind(config: RunConfig, wanted: type[Config]) -> Config:
    """The settings, where they are of the wanted kind of run; else a UserError."""
    if not isinstance(config, wanted):
        kind = wanted.model_fields["kind"].default
        raise UserError(
            f"kind={config.kind}: these settings are for another kind of run than kind={kind}: "
            f"give them to `patchmine {command_of(config)}`"
        )
    return config


def start_of(recipe_name: str | Path | None, wanted: Mapping[str, Any]) -> str | None:
    """The weights whose network a pre-training run is of, because nothing names its model.

    Args:
        recipe_name: of its recipe, or none.
        wanted: its settings, dotted or nested.

    Returns:
        What ``init`` names, where that exists, else None.  Raises UserError for no such recipe.
    """
    settings, _ = tree_of(wanted.items())
    tables: list[Any] = [settings]
    if recipe_name is not None:
        recipe = recipe_for(recipe_name, settings)
        settings = merge(_settings_of(recipe, settings, silent), settings)
        tables = [settings, *(row.get("use") for row in recipe.by_size)]
    init = settings.get("init")
    named = any("model" in table for table in tables if isinstance(table, Mapping))
    if named or _model_of(settings) is not PretrainConfig or init is None or not exists(str(init)):
        return None
    return str(init)


def _assemble(
    recipe_name: str | Path | None,
    pairs: Sequence[tuple[str, Any]],
    errors: list[SettingError],
    say: Say,
    also: Checks,
    base: Mapping[str, Any],
) -> AnyConfig:
    wanted, torn = tree_of((path, _plain(value)) for path, value in pairs)
    recipe = None if recipe_name is None else recipe_for(recipe_name, wanted, say)
    if _method_in(wanted) not in (None, _method_in(base)):  # another has settings of its own
        base = {name: value for name, value in base.items() if name != "method"}
    settings, where = merge(base, wanted), "the settings"
    if recipe is not None:
        settings = merge(merge(base, _settings_of(recipe, {**base, **wanted}, say)), wanted)
        where = f"the settings (with {recipe.name})"
        if recipe.needs_init and settings.get("init") is None:
            text = "not given; this recipe goes on from weights: name a run, an export or a file"
            errors = [*errors, SettingError("init", text)]
            settings = {**settings, "trainable": wanted.get("trainable", "all")}  # no second error
    errors = [*errors, *_second_lengths(wanted)]
    # A batch size that the user did not choose may be fitted to the machine and to the data.
    own = wanted if recipe is None or recipe.ours else settings
    config = _checked(settings, where, "batch_size" in own, [*errors, *torn], say, also)
    for row in config.by_size:
        text = f"{where} for data sets up to {row.up_to or 'any'} images"
        sized = _with_row(config, row.use, text, silent, also)
        if getattr(config, "budget", None) is not None:
            with_smaller(sized, row, f"{text}, smaller", also)
    shortened = "epochs" in wanted or "warmup_epochs" not in settings
    return _fit_warmup(config, shortened and "warmup_epochs" not in wanted, say)


_COMMANDS: dict[type[RunConfig], str] = {
    FinetuneConfig: "finetune",
    SegmentConfig: "segment",
    DetectConfig: "detect",
}


def command_of(config: RunConfig) -> str:
    """The command that makes runs of this kind."""
    return _COMMANDS.get(type(config), "pretrain")


def _second_lengths(wanted: Mapping[str, Any]) -> list[SettingError]:
    """A length that is given beside a budget."""
    if (budget := wanted.get("budget")) is None:
        return []
    text = f"given {shown(budget)}, which chooses steps: leave one of the two out"
    others = [name for name in ("epochs", "steps") if wanted.get(name) is not None]
    return [SettingError("budget", f"{text}, budget or {name}") for name in others[:1]]


def _schema_of(model: type[RunConfig]) -> str:
    """What lists the settings of such a run."""
    return f"patchmine config schema {_COMMANDS.get(model, '')}".rstrip()


def _model_of(settings: Mapping[str, Any]) -> type[AnyConfig]:
    """The settings that a run of this kind has; of an unknown kind its error is told."""
    kind = settings.get("kind", "pretrain")
    return KINDS.get(kind, PretrainConfig) if isinstance(kind, str) else PretrainConfig


def _method_in(settings: Mapping[str, Any]) -> Any:
    method = settings.get("method")
    return method.get("name") if isinstance(method, Mapping) else method


def _plain(value: Any) -> Any:
    """A table of settings from Python as plain values."""
    return value.model_dump() if hasattr(value, "model_dump") else value


def _checked(
    settings: Mapping[str, Any],
    where: str,
    batch_chosen: bool,
    errors: Sequence[SettingError] = (),
    say: Say = silent,
    also: Checks = (),
) -> AnyConfig:
    """The settings as a run, or every error in them."""
    model = _model_of(settings)
    known = dict(settings) if batch_chosen else _shared_out(settings, model, say)
    rates = [(name, known.pop(name)) for name in RATES if known.get(name) is not None]
    config = validate(
        model,
        known,
        where=where,
        before=[*errors, *(_rate(name, value, known, model) for name, value in rates)],
        hint=f"; `{_schema_of(model)}` lists all",
        also=also,
    )
    if not batch_chosen:
        config.model_fields_set.discard("batch_size")
    return config


def _rate(
    name: str, rate: Any, settings: Mapping[str, Any], model: type[RunConfig]
) -> SettingError:
    """An absolute learning rate, with the setting that gives it."""
    batch_size = settings.get("batch_size", model.model_fields["batch_size"].default)
    remedy = "the rate for 256 images: blr = rate * 256 / batch_size"
    are_numbers = all(type(x) in (int, float) and 0 < x < 1e9 for x in (rate, batch_size))
    if are_numbers and "by_size" not in settings:
        blr = f"{rate * 256 / batch_size:.6g}"
        remedy = f"the rate for 256 images: with batch_size={batch_size} give blr={blr}"
    return SettingError(name, f"no such setting (given {shown(rate)}); it is blr here, {remedy}")


def _settings_of(recipe: Recipe, wanted: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """The recipe's settings for what is wanted, without what the wanted model makes void."""
    settings = dict(recipe.settings)
    if _model_of({**settings, **wanted}) is PretrainConfig:
        settings = _for_method(recipe, wanted.get("method"), say)
    if recipe.by_size:
        settings["by_size"] = rows_beside(wanted, recipe.by_size, _method_in(settings))
    if "model" in wanted and wanted["model"] != settings.get("model"):
        settings.pop("model", None)
        if arguments := settings.pop("model_args", None):
            void = f"its model_args {shown(arguments)} are not used"
            say(f"model={wanted['model']} replaces the recipe's model, so {void}.")
    return settings


def _for_method(recipe: Recipe, method: Any, say: Say) -> dict[str, Any]:
    """The recipe's settings for the wanted method of pre-training, or for its own."""
    settings = dict(recipe.settings)
    default = settings.get("method", "mae")
    default = default if isinstance(default, Mapping) else {"name": default}
    name = (method.get("name") if isinstance(method, Mapping) else method) or default.get("name")
    if not isinstance(name, str | None):
        return settings  # and let the error be told
    if name is not None and "name" not in default:
        default = {**default, "name": name}  # its settings are for whichever method is wanted
    settings["method"] = default if name == default.get("name") else {"name": name}
    if name is not None and name in recipe.methods:
        settings = merge(settings, recipe.methods[name])
    elif name in METHODS and (recipe.methods or name != default.get("name")):
        own = "the method's own defaults are used"
        say(f"Recipe {recipe.name} has no settings for method={name}: {own}.")
    return settings


def _fit_warmup(config: Config, may_shorten: bool, say: Say) -> Config:
    """A warm-up that nobody asked for must not outlast a run that somebody shortened."""
    warmup, epochs = config.warmup_epochs, config.epochs
    if config.by_size or config.steps is not None or epochs is None:
        return config
    if may_shorten and warmup > epochs / 2:
        shorter = epochs / 10
        if "warmup_epochs" in config.model_fields_set:  # by a recipe, or a run that goes on
            say(f"warmup_epochs={warmup:g} is shortened to {shorter:g}, a tenth of the epochs.")
        return config.model_copy(update={"warmup_epochs": shorter})
    if warmup >= epochs:
        text = f"given {warmup:g}; must be below epochs={epochs}"
        raise refusal([SettingError("warmup_epochs", text)], "the settings")
    return config


def row_of(config: RunConfig, num_images: int, on: str = "cuda") -> SizeRow | None:
    """The row of ``by_size`` for so many images on a kind of device.

    Returns:
        The first that fits; None where there are no rows at all.

    Raises:
        UserError: none of them fits.
    """
    here = [row for row in config.by_size if row.device in (None, on)]
    fitting = [row for row in here if row.up_to is None or num_images <= row.up_to]
    if config.by_size and not fitting:
        remedy = "end it with a row 'up_to: null'"
        raise UserError(f"by_size has no row for {num_images:,} images: {remedy}")
    return fitting[0] if fitting else None


def resolve_size(config: Config, num_images: int, say: Say = silent, on: str = "cuda") -> Config:
    """The settings for ``num_images`` on a kind of device, where the recipe lets these decide."""
    row = row_of(config, num_images, on)
    if row is None:
        return config
    use = row.use
    chosen = ", ".join(f"{key}={shown(value)}" for key, value in use.items())
    where = f" with device={on}" if row.device else ""
    say(f"{num_images:,} images{where}: {chosen or 'nothing to choose'}.")
    sized = _with_row(config, use, f"the settings for {num_images:,} images", say)
    # A row no longer holds what the user set: where it has no warm-up, that is the user's.
    return _fit_warmup(sized, "warmup_epochs" in use, say)


def _with_row(
    config: Config, use: Mapping[str, Any], where: str, say: Say, also: Checks = ()
) -> Config:
    settings = merge(config.model_dump(exclude={"by_size"}), use)
    chosen = "batch_size" not in use and "batch_size" in config.model_fields_set
    return of_kind(_checked(settings, where, chosen, say=say, also=also), type(config))


def with_smaller(config: Config, row: SizeRow, where: str, also: Checks = ()) -> list[Config]:
    """Settings that a row was used for, with each of its smaller ones."""
    return [_with_row(config, smaller, where, silent, also) for smaller in row.smaller]


def _shared_out(settings: Mapping[str, Any], model: type[RunConfig], say: Say) -> dict[str, Any]:
    """The settings with a batch that divides among the parts that it is cut into."""
    names, fields = ("batch_size", "accumulate", "devices", "num_nodes"), model.model_fields
    batch, *counts = (settings.get(name, fields[name].default) for name in names)
    clip = settings.get("clip")
    if reads_clips(str(settings.get("model"))) and isinstance(clip, Mapping):
        counts.append(clip.get("repeats", 1))
    if not all(type(count) is int and 0 < count <= LARGEST_COUNT for count in (batch, *counts)):
        return dict(settings)  # whose errors are told
    parts = math.prod(counts)
    if batch % parts == 0:
        return dict(settings)
    fitting = max(1, batch // parts) * parts
    why = f"a multiple of the {parts} parts that a batch is cut into"
    say(f"batch_size={batch} is changed to {fitting}, {why}.")
    return {**settings, "batch_size": fitting}


def fit_batch(config: Config, samples: int, items: str, say: Say = silent) -> Config:
    """The settings for ``samples`` samples in an epoch, called ``items`` in messages.

    A larger batch that the user did not choose is lowered; UserError for one that was chosen, and
    where there are fewer samples than parts of a batch.
    """
    if config.batch_size <= samples:
        return config
    counts = {name: getattr(config, name) for name in ("accumulate", "devices", "num_nodes")}
    if reads_clips(config.model):
        counts["clip.repeats"] = config.clip.repeats
    parts = math.prod(counts.values())
    fitting = samples // parts * parts
    told = f"batch_size={config.batch_size} is more than the {samples:,} {items}"
    if fitting == 0:
        product = " * ".join(f"{name}={count}" for name, count in counts.items())
        fewer = f"which are fewer than the {parts} parts of a batch ({product})"
        raise UserError(f"{told}, {fewer}: lower these")
    if "batch_size" in config.model_fields_set:
        raise UserError(f"{told}: set batch_size={fitting} or lower")
    say(f"{told}: it is lowered to {fitting}.")
    return config.model_copy(update={"batch_size": fitting})


def results_of(config: RunConfig) -> dict[str, Any]:
    """The settings that decide the weights as JSON, by dotted names."""
    tree = config.model_dump(mode="json", include=set(names_of(type(config), decide_weights=True)))
    return _flat(tree)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        is_table = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key}.") if is_table else {f"{prefix}{key}": value}
    return flat


def changed_results(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The settings that differ between two `results_of`, as "batch_size (was 256, now 512)"."""
    absent = object()

    def told(flat: Mapping[str, Any], name: str) -> str:
        return shown(flat[name]) if name in flat else "not set"

    return [
        f"{name} (was {told(before, name)}, now {told(after, name)})"
        for name in dict.fromkeys([*before, *after])
        if before.get(name, absent) != after.get(name, absent)
    ]

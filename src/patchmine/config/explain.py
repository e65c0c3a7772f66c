"""From pydantic's complaints to one message: every error with its path, value and remedy."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from patchmine.errors import UserError
from patchmine.strict import ByName, SettingError, UnfitSettingsError

Model = TypeVar("Model", bound=BaseModel)

# Pydantic's words on the left; a type that fails inside a union is named by the same words.
_PLAINER = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid tuple": "a list",
    "a valid list": "a list",
    "a valid dictionary": "a table of settings",
}
_PREAMBLES = ("Input should be ", "Value error, ", "Input should have ", "Value should have ")
_DEMANDS = {
    "int_parsing_size": "a number of at most 18 digits",
    "string_pattern_mismatch": "letters, digits and the signs . - _ only",
    "string_too_long": "at most {max_length} letters",
    "too_short": "a list with at least {min_length} of them",
}
_BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
_SIGNS = ((Gt, "above", "gt"), (Ge, "at least", "ge"), (Lt, "below", "lt"), (Le, "at most", "le"))

# What other programs call our settings, where the nearest names do not lead to them.
_NAMES_ELSEWHERE = {
    "batch_size": "bs batch batchsize train_batch_size global_batch_size",
    "workers": "num_workers n_workers nworkers loader_workers",
    "image_size": "img_size input_size size resolution crop_size res",
    "weight_decay": "wd decay",
    "epochs": "max_epochs num_epochs n_epochs total_epochs ep",
    "steps": "max_steps num_steps total_steps iterations iters max_iters",
    "warmup_epochs": "warmup warmup_epoch num_warmup_epochs",
    "devices": "gpus num_gpus ngpus nproc_per_node gpus_per_node nprocs",
    "num_nodes": "nodes nnodes",
    "model": "arch architecture backbone network encoder",
    "out": "output_dir output save_dir log_dir exp_dir work_dir outdir run",
    "data": "data_path data_dir dataset root train train_data images path",
    "blr": "lr_base base_lr baselr",
    "accumulate": "accum_iter accum grad_accum accumulate_grad_batches update_freq",
    "init": "pretrained checkpoint ckpt finetune resume_from weights load",
    "precision": "amp fp16 use_fp16 bf16 mixed_precision dtype",
    "channels": "in_chans in_channels input_channels",
    "checkpoint_every": "save_freq save_every save_ckpt_freq saveckp_freq",
    "log_every": "print_freq log_freq log_interval log_every_n_steps",
    "betas": "momentum beta opt_betas",
    "baselines": "floors baseline",
    "eval_data": "val_data val test_data eval_path",
    "flip": "hflip horizontal_flip color_flip",
    "compile": "compile_model torch_compile",
    "model_args.drop_path_rate": "drop_path drop_path_rate",
    "model_args.depth": "depth",
    "model_args.embed_dim": "embed_dim",
    "model_args.num_heads": "num_heads",
    "model_args.mlp_ratio": "mlp_ratio",
}
OTHER_NAMES = {name: ours for ours, names in _NAMES_ELSEWHERE.items() for name in names.split()}


def shown(value: Any) -> str:
    """A value as it is quoted in messages: short, on one line."""
    try:
        text = repr(value) if isinstance(value, str) else str(value)
    except (ValueError, RecursionError):  # Python prints no whole number of over 4,300 digits
        is_number = isinstance(value, int)
        return "a number of thousands of digits" if is_number else f"a {type(value).__name__}"
    text = {"None": "null", "True": "true", "False": "false"}.get(text, text)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(name: str, valid: Iterable[str], count: int = 3) -> list[str]:
    """Valid names that look like ``name``, best first; dotted ones also by their last part."""
    by_text: dict[str, str] = {}
    for candidate in valid:
        if candidate != name:
            by_text.setdefault(candidate.rsplit(".", 1)[-1].lower(), candidate)
            by_text.setdefault(candidate.lower(), candidate)
    found = []
    for text in (name.rsplit(".", 1)[-1], name):
        found += difflib.get_close_matches(text.lower(), by_text, n=count, cutoff=0.65)
    return list(dict.fromkeys(by_text[text] for text in found))[:count]


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """``"; did you mean epochs?"``, or nothing when no name is near."""
    near = nearest(name, valid)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def refusal(errors: Sequence[SettingError], where: str) -> UserError:
    """One UserError that lists all of them.  ``where`` reads like "the settings"."""
    if len(errors) == 1:
        return UserError(f"Error in {where}: {errors[0]}")
    lines = [f"  {error}" for error in errors]
    return UserError("\n".join([f"{len(errors)} errors in {where}:", *lines]))


def validate(
    model: type[Model],
    values: Mapping[str, Any],
    *,
    where: str,
    before: Sequence[SettingError] = (),
    hint: str = "",
    also: Sequence[Callable[[Model], list[SettingError]]] = (),
) -> Model:
    """``model(**values)``, or one UserError with all errors, those found ``before`` included.

    A wrong setting hides others (those of a misspelt method) and what does not fit together.  So
    the wrong ones are mended or taken out, in the place of required ones stands their name, and
    the rest is checked once more.  ``also`` finds errors that the model cannot know: the first is
    asked of mended settings too, each other one only where nothing is wrong so far.
    """
    errors = list(before)
    try:
        checked = model.model_validate(dict(values))
        ask = also
    except ValidationError as error:
        errors += explain(error, model, values, hint)
        ask = also[:1]
        mended = _mended(model, values, error, errors)
        try:
            checked = model.model_validate(mended)
        except ValidationError as second:
            wrong = {error.path for error in errors}
            found = explain(second, model, mended, hint)
            errors += [error for error in found if error.path not in wrong]
            raise refusal(errors, where) from None
    for number, check in enumerate(ask):
        if number == 0 or not errors:
            wrong = {error.path for error in errors}
            errors += [m for m in check(checked) if m.path not in wrong]
    if errors:
        raise refusal(errors, where)
    return checked


def _mended(
    model: type[BaseModel],
    values: Mapping[str, Any],
    error: ValidationError,
    errors: Sequence[SettingError],
) -> dict[str, Any]:
    """The values without the wrong ones; a misspelt ``name`` is replaced by the nearest one."""
    kept = _without(values, [error.path for error in errors])
    for name, field in model.model_fields.items():
        if field.is_required():
            kept.setdefault(name, name)
    for details in error.errors(include_url=False):
        if details["type"] == "unknown_name" and len(details["loc"]) == 1:
            key = str(details["loc"][0])
            given = values[key] if isinstance(values[key], Mapping) else {"name": values[key]}
            if near := nearest(str(given.get("name")), details["ctx"]["known"]):
                kept[key] = {**given, "name": near[0]}
    return kept


def _without(values: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """The values without those at the dotted paths, or without the first part of a false path."""
    kept = dict(values)
    for path in paths:
        first, _, rest = path.split("[")[0].partition(".")
        inner = kept.get(first)
        if rest and isinstance(inner, Mapping) and rest != "name":
            kept[first] = _without(inner, [rest])
        else:
            kept.pop(first, None)
    return kept


def explain(
    error: ValidationError, model: type[BaseModel], values: Mapping[str, Any], hint: str = ""
) -> list[SettingError]:
    """Pydantic's complaints in plain words, one a setting; ``hint`` follows an unknown name."""
    texts: dict[str, list[str]] = {}
    found = error.errors(include_url=False)
    for details in found:
        where, crosswise = details["loc"], details.get("ctx", {}).get("error")
        if isinstance(crosswise, UnfitSettingsError):
            for each in crosswise.errors:
                path = ".".join([*map(str, where), each.path])
                texts.setdefault(path, []).append(each.text)
            continue
        inside = [other for other in found if other["loc"][: len(where)] == where]
        if details["type"] == "too_short" and len(inside) > 1:
            continue  # wrong elements, which are told, did not count
        path, text = _sentence(details, model, values, hint)
        texts.setdefault(path, []).append(text)
    errors = [SettingError(path, _either(several)) for path, several in texts.items()]
    # What is wrong in the same way with every element of a list is said of the list.
    alike = [(error.path.split("[")[0], error.text) for error in errors]
    for place, key in enumerate(alike):
        if "[" in errors[place].path and alike.count(key) > 1:
            errors[place] = SettingError(*key)
    return list(dict.fromkeys(errors))


def _either(texts: Sequence[str]) -> str:
    """Complaints about one setting as one: the branches of a union give one each."""
    first, *others = dict.fromkeys(texts)
    return " or ".join([first, *(text.split("; must be ", 1)[-1] for text in others)])


def _sentence(
    details: ErrorDetails, model: type[BaseModel], values: Mapping[str, Any], hint: str
) -> tuple[str, str]:
    """Path of a setting and what is wrong with it."""
    path, field, owner = _locate(details["loc"], model, values)
    kind, given = details["type"], shown(details["input"])
    if kind == "extra_forbidden":
        known = _near_setting(path, owner, model) or hint
        return path, f"no such setting (given {given}){known}"
    if kind == "unknown_name":
        value, names = details["input"], details["ctx"]["known"]
        name = value.get("name") if isinstance(value, Mapping) else value
        one_of = f"{', '.join(names)}{did_you_mean(str(name), names)}"
        return f"{path}.name", f"given {shown(name)}; must be one of {one_of}"
    if kind == "missing":
        path = path.split("[")[0]  # a list that is too short lacks an element
        if field is not None and field.is_required():
            return path, f"missing; {field.description or 'it has no default'}"
    return path, f"given {given}; must be {_must(details, field)}"


def _must(details: ErrorDetails, field: FieldInfo | None) -> str:
    kind, such_as = details["type"], "its default"
    if field is not None and isinstance(field.default, tuple):
        such_as = shown(list(field.default))
    if kind in ("missing", "too_long"):
        return f"a list with as many values as {such_as}"
    if kind in _BOUNDS and not isinstance(details["loc"][-1], int):
        return _bounds(field) or _demand(details)  # which tell no elements of a list apart
    if kind == "tuple_type":
        return f"{_demand(details)} such as {such_as}"
    if kind == "literal_error":
        return str(details["ctx"]["expected"]).replace("'", "")
    return _demand(details)


def _demand(details: ErrorDetails) -> str:
    """Pydantic's demand without its preamble: "Input should be a valid integer, unable to..."."""
    kind = details["type"]
    if kind == "float_type" and isinstance(details["input"], int):
        kind = "int_parsing_size"  # an infinite number of Python's
    if kind in _DEMANDS:
        return _DEMANDS[kind].format(**details.get("ctx", {}))
    text = details["msg"]
    for end in (", unable to", ", got a", ", exceeded"):
        text = text.split(end, 1)[0]
    for start in _PREAMBLES:
        text = text.removeprefix(start)
    for theirs, plain in _PLAINER.items():
        text = text.replace(theirs, plain)
    return text


def _bounds(field: FieldInfo | None) -> str:
    """All bounds of a field, as "above 0 and below 1"."""

    def inside(annotation: Any) -> Iterator[Any]:  # of the branches of a union
        for part in typing.get_args(annotation):
            yield from part.metadata if isinstance(part, FieldInfo) else inside(part)

    bounds = [*field.metadata, *inside(field.annotation)] if field is not None else []
    found = [
        f"{word} {shown(getattr(bound, name))}"
        for bound in bounds
        for kind, word, name in _SIGNS
        if isinstance(bound, kind)
    ]
    return " and ".join(dict.fromkeys(found))


def _locate(
    location: tuple[int | str, ...], model: type[BaseModel], values: Any
) -> tuple[str, FieldInfo | None, type[BaseModel]]:
    """Dotted path, field and owning model of a complaint; names of union branches are left out."""
    path, field, owner = "", None, model
    inside: list[type[BaseModel]] = [model]
    for part in location:
        values = values.get(part) if isinstance(values, Mapping) else None
        holder = next((each for each in inside if part in each.model_fields), None)
        if holder is not None and isinstance(part, str):
            path, field, owner = f"{path}.{part}".strip("."), holder.model_fields[part], holder
            inside = tables_in(field, values)
        elif isinstance(part, int):
            path += f"[{part}]"
        elif part == location[-1] and inside:
            return f"{path}.{part}".strip("."), None, inside[0]
    return path, field, owner


def by_name(field: FieldInfo | None) -> Mapping[str, type[BaseModel]]:
    """The tables of a field that holds one of several, told apart by name; else none."""
    marks = [] if field is None else field.metadata
    return next((mark.tables() for mark in marks if isinstance(mark, ByName)), {})


def tables_in(field: FieldInfo, value: Any = None) -> list[type[BaseModel]]:
    """The tables that a field may hold; of those told apart by name, the one of ``value``."""
    if tables := by_name(field):
        default = next(mark.default for mark in field.metadata if isinstance(mark, ByName))
        name = value.get("name", default) if isinstance(value, Mapping) else value
        is_known = isinstance(name, str) and name in tables
        return [tables[name]] if is_known else list(tables.values())

    def inside(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        for part in typing.get_args(annotation):
            yield from inside(part)

    return list(inside(field.annotation))


def all_settings(model: type[BaseModel]) -> list[str]:
    """Dotted names of all settings, those of nested tables included."""
    names: dict[str, None] = {}
    for name, field in model.model_fields.items():
        names[name] = None
        for table in tables_in(field):
            names |= dict.fromkeys(f"{name}.{part}" for part in all_settings(table))
    return list(names)


def _near_setting(path: str, owner: type[BaseModel], model: type[BaseModel]) -> str:
    """Names near a misspelt one: those beside it first, then those of the whole model."""
    prefix, _, name = path.rpartition(".")
    first = path.split(".")[0]
    tables = by_name(model.model_fields.get(first)) if prefix == first else {}
    owners = [f"{first}={key}" for key, table in tables.items() if name in table.model_fields]
    if owners:
        return f"; it is one of {' and '.join(owners)}"
    ours = OTHER_NAMES.get(name, "")
    if not prefix and ours.split(".")[0] in model.model_fields:
        return f"; it is called {ours} here"
    beside = [f"{prefix}.{other}".strip(".") for other in owner.model_fields]
    everything = [each for each in all_settings(model) if each != path]
    return did_you_mean(name, [o for o in beside if o != path]) or did_you_mean(name, everything)

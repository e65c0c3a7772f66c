"""One message that lists every mistake in some settings, each with its path, the value given and
what is allowed.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from patchmine.config.words import did_you_mean, nearest, shown
from patchmine.errors import UserError
from patchmine.strict import ByName, CrossMistakesError, Mistake

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


_DEMANDS = {
    "int_parsing_size": "a number of at most 18 digits",
    "string_pattern_mismatch": "letters, digits and the signs . - _ only",
    "string_too_long": "at most {max_length} letters",
    "too_short": "a list with at least {min_length} of them",
}

# What other programs call our settings, where the nearest names do not lead to them.
OTHER_NAMES = {
    **dict.fromkeys(
        ("bs", "batch", "batchsize", "train_batch_size", "global_batch_size"), "batch_size"
    ),
    **dict.fromkeys(("num_workers", "n_workers", "nworkers", "loader_workers"), "workers"),
    **dict.fromkeys(
        ("img_size", "input_size", "size", "resolution", "crop_size", "res"), "image_size"
    ),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("max_epochs", "num_epochs", "n_epochs", "total_epochs", "ep"), "epochs"),
    **dict.fromkeys(
        ("max_steps", "num_steps", "total_steps", "iterations", "iters", "max_iters"), "steps"
    ),
    **dict.fromkeys(("warmup", "warmup_epoch", "num_warmup_epochs"), "warmup_epochs"),
    **dict.fromkeys(
        ("gpus", "num_gpus", "ngpus", "nproc_per_node", "gpus_per_node", "nprocs"), "devices"
    ),
    **dict.fromkeys(("nodes", "nnodes"), "num_nodes"),
    **dict.fromkeys(("arch", "architecture", "backbone", "network", "encoder"), "model"),
    **dict.fromkeys(
        ("output_dir", "output", "save_dir", "log_dir", "exp_dir", "work_dir", "outdir", "run"),
        "out",
    ),
    **dict.fromkeys(
        ("data_path", "data_dir", "dataset", "root", "train", "train_data", "images", "path"),
        "data",
    ),
    **dict.fromkeys(("lr_base", "base_lr", "baselr"), "blr"),
    **dict.fromkeys(
        ("accum_iter", "accum", "grad_accum", "accumulate_grad_batches", "update_freq"),
        "accumulate",
    ),
    **dict.fromkeys(
        ("pretrained", "checkpoint", "ckpt", "finetune", "resume_from", "weights", "load"), "init"
    ),
    **dict.fromkeys(("amp", "fp16", "use_fp16", "bf16", "mixed_precision", "dtype"), "precision"),
    **dict.fromkeys(("in_chans", "in_channels", "input_channels"), "channels"),
    **dict.fromkeys(
        ("save_freq", "save_every", "save_ckpt_freq", "saveckp_freq"), "checkpoint_every"
    ),
    **dict.fromkeys(("print_freq", "log_freq", "log_interval", "log_every_n_steps"), "log_every"),
    **dict.fromkeys(("momentum", "beta", "opt_betas"), "betas"),
    **dict.fromkeys(("val_data", "val", "test_data", "eval_path"), "eval_data"),
    **dict.fromkeys(("hflip", "horizontal_flip", "color_flip"), "flip"),
    **dict.fromkeys(("compile_model", "torch_compile"), "compile"),
    **dict.fromkeys(("drop_path", "drop_path_rate"), "model_args.drop_path_rate"),
    **dict.fromkeys(
        ("depth", "embed_dim", "num_heads", "mlp_ratio"), "model_args."
    ),  # and the word itself
}


def refusal(mistakes: Sequence[Mistake], where: str) -> UserError:
    """The error that lists all of them; a single one is one sentence.  ``where`` reads like "the
    settings".
    """
    if len(mistakes) == 1:
        return UserError(f"Mistake in {where}: {mistakes[0]}")
    return UserError(
        "\n".join(
            [f"{len(mistakes)} mistakes in {where}:", *(f"  {mistake}" for mistake in mistakes)]
        )
    )


def validate(
    model: type[Model],
    values: Mapping[str, Any],
    *,
    where: str,
    before: Sequence[Mistake] = (),
    placeholders: Mapping[str, Any] | None = None,
    hint: str = "",
    also: Callable[[Model], list[Mistake]] = lambda _: [],
) -> Model:
    """``model(**values)``, or one UserError with every mistake, those found ``before`` included.

    A wrong setting hides others (those of a misspelt method) and what does not fit together; so the
    wrong ones are mended or taken out (required ones get their ``placeholders``) and the rest is
    checked once more.  ``also`` looks at what came of it for mistakes that the model itself cannot
    know.
    """
    try:
        checked = model.model_validate(dict(values))
    except ValidationError as error:
        mistakes = explain(error, model, values, hint)
        rest = _without(values, [m.path for m in mistakes]) | _missing(
            model, values, mistakes, placeholders or {}
        )
        rest |= _nearest_branches(error, values)
        wrong = {mistake.path for mistake in mistakes}
        mistakes += [m for m in _crosswise(model, rest, hint, also) if m.path not in wrong]
        raise refusal([*before, *mistakes], where) from None
    mistakes = [*before, *also(checked)]
    if mistakes:
        raise refusal(mistakes, where)
    return checked


def _crosswise(
    model: type[Model], values: Mapping[str, Any], hint: str, also: Callable[[Model], list[Mistake]]
) -> list[Mistake]:
    try:
        return also(model.model_validate(values))
    except ValidationError as error:
        return explain(error, model, values, hint)


def _nearest_branches(error: ValidationError, values: Mapping[str, Any]) -> dict[str, Any]:
    """Tables whose ``name`` is misspelt, with the name that was probably meant."""
    mended: dict[str, Any] = {}
    for details in error.errors(include_url=False):
        if details["type"] == "unknown_name" and len(details["loc"]) == 1:
            key = str(details["loc"][0])
            given = values[key] if isinstance(values[key], Mapping) else {"name": values[key]}
            if near := nearest(str(given.get("name")), details["ctx"]["known"]):
                mended[key] = {**given, "name": near[0]}
    return mended


def _missing(
    model: type[BaseModel],
    values: Mapping[str, Any],
    mistakes: Sequence[Mistake],
    placeholders: Mapping[str, Any],
) -> dict[str, Any]:
    wrong = {mistake.path.split(".")[0] for mistake in mistakes}
    return {
        name: placeholders[name]
        for name, field in model.model_fields.items()
        if field.is_required() and name in placeholders and (name in wrong or name not in values)
    }


def _without(values: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """The values without those at the given dotted paths; a path that leads nowhere takes its whole
    first part away.
    """
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
) -> list[Mistake]:
    """Pydantic's complaints in plain words, one a setting.  ``hint`` follows a name that resembles
    no setting.
    """
    texts: dict[str, list[str]] = {}
    found = error.errors(include_url=False)
    for details in found:
        if details["type"] == "too_short" and _has_wrong_elements(details, found):
            continue  # which did not count as elements
        crosswise = details.get("ctx", {}).get("error")
        if isinstance(crosswise, CrossMistakesError):
            where = ".".join(str(part) for part in details["loc"])
            for mistake in crosswise.mistakes:
                texts.setdefault(f"{where}.{mistake.path}".strip("."), []).append(mistake.text)
            continue
        path, field, owner = _locate(details["loc"], model, values)
        if details["type"] == "unknown_name":
            path += ".name"
        if details["type"] == "missing":
            path = path.split("[")[0]  # a list that is too short lacks an element
        text = _describe(details, path, field, owner, model, hint)
        texts.setdefault(path, []).append(text)
    return _once([Mistake(path, _join(found)) for path, found in texts.items()])


def _has_wrong_elements(details: ErrorDetails, found: Sequence[ErrorDetails]) -> bool:
    length = len(details["loc"])
    return any(
        len(each["loc"]) > length and each["loc"][:length] == details["loc"] for each in found
    )


def _once(mistakes: Sequence[Mistake]) -> list[Mistake]:
    """What is wrong in the same way with every element of a list (a size given as one number) is
    said of the list.
    """
    lists = {(m.path.split("[")[0], m.text) for m in mistakes if "[" in m.path}
    alike = [(m.path.split("[")[0], m.text) for m in mistakes]
    merged = [
        Mistake(*key) if key in lists and alike.count(key) > 1 else mistake
        for key, mistake in zip(alike, mistakes, strict=True)
    ]
    return list(dict.fromkeys(merged))


def _join(texts: Sequence[str]) -> str:
    """Complaints about one setting: the branches of a union give one each."""
    first, *others = dict.fromkeys(texts)
    return " or ".join([first, *(text.split("; must be ", 1)[-1] for text in others)])


def _locate(
    location: tuple[int | str, ...], model: type[BaseModel], values: Any
) -> tuple[str, FieldInfo | None, type[BaseModel]]:
    """Dotted path, field and owning model of a complaint; names of union branches are left out."""
    path, field, owner = "", None, model
    inside: list[type[BaseModel]] = [model]
    for part in location:
        values = values.get(part) if isinstance(values, Mapping) else None
        holder = next((m for m in inside if part in m.model_fields), None)
        if holder is not None and isinstance(part, str):
            path, field, owner = f"{path}.{part}".strip("."), holder.model_fields[part], holder
            inside = _models_in(field, values)
        elif isinstance(part, int):
            path += f"[{part}]"
        elif part == location[-1] and inside:
            return f"{path}.{part}".strip("."), None, inside[0]
    return path, field, owner


def _models_in(field: FieldInfo, value: Any = None) -> list[type[BaseModel]]:
    """The models that a field may hold; of those told apart by name, the one that ``value`` names."""
    if (several := _by_name(field)) is None:
        return _models_of(field.annotation)
    tables = several.tables()
    name = value.get("name", several.default) if isinstance(value, Mapping) else value
    return [tables[name]] if isinstance(name, str) and name in tables else list(tables.values())


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_of(part)]


def _by_name(field: FieldInfo) -> ByName | None:
    return next((mark for mark in field.metadata if isinstance(mark, ByName)), None)


def _describe(
    details: ErrorDetails,
    path: str,
    field: FieldInfo | None,
    owner: type[BaseModel] | None,
    model: type[BaseModel],
    hint: str,
) -> str:
    kind, given, context = details["type"], shown(details["input"]), details.get("ctx", {})
    if kind == "extra_forbidden":
        return f"no such setting (given {given}){_near_setting(path, owner, model) or hint}"
    if kind == "too_long" or (kind == "missing" and field is not None and not field.is_required()):
        return f"given {given}; must be a list with as many values as {_example(field)}"
    if kind == "missing":
        remedy = (
            field.description if field is not None and field.description else "it has no default"
        )
        return f"missing; {remedy}"
    if kind == "unknown_name":
        return _describe_name(details)
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        one_of_several = isinstance(
            details["loc"][-1], int
        )  # whose bounds the field does not tell apart
        return f"given {given}; must be {_must(details) if one_of_several else _bounds(field) or _must(details)}"
    if kind == "literal_error":
        return f"given {given}; must be {str(context['expected']).replace(chr(39), '')}"
    example = f" such as {_example(field)}" if kind == "tuple_type" else ""
    return f"given {given}; must be {_must(details)}{example}"


def _example(field: FieldInfo | None) -> str:
    return (
        shown(list(field.default))
        if field is not None and isinstance(field.default, tuple)
        else "its default"
    )


def _near_setting(path: str, owner: type[BaseModel] | None, model: type[BaseModel]) -> str:
    """Names near a misspelt one: those beside it first, then those of the whole model."""
    if branches := _branches_with(path, model):
        return f"; it is one of {' and '.join(branches)}"
    prefix, _, name = path.rpartition(".")
    ours = OTHER_NAMES.get(name, "")
    if not prefix and ours.split(".")[0] in model.model_fields:
        return f"; it is called {ours + name if ours.endswith('.') else ours} here"
    beside = [f"{prefix}.{other}".strip(".") for other in (owner or model).model_fields]
    beside = [other for other in beside if other != path]
    return did_you_mean(name, beside) or did_you_mean(
        name, [each for each in all_settings(model) if each != path]
    )


def _branches_with(path: str, model: type[BaseModel]) -> list[str]:
    """Where a setting belongs to other branches of a union than the chosen one: ["method=hpm",
    "method=semaim"].
    """
    first, _, name = path.partition(".")
    field = model.model_fields.get(first)
    several = _by_name(field) if field is not None else None
    tables = several.tables() if several is not None else {}
    return [f"{first}={branch}" for branch, table in tables.items() if name in table.model_fields]


def all_settings(model: type[BaseModel]) -> list[str]:
    """Dotted names of all settings, those of nested models included."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        inner = [f"{name}.{part}" for nested in _models_in(field) for part in all_settings(nested)]
        names += dict.fromkeys([name, *inner])
    return names


def _describe_name(details: ErrorDetails) -> str:
    given = details["input"]
    if isinstance(given, Mapping):
        given = given.get("name")
    known = details["ctx"]["known"]
    return (
        f"given {shown(given)}; must be one of {', '.join(known)}{did_you_mean(str(given), known)}"
    )


def _must(details: ErrorDetails) -> str:
    """Pydantic's demand without its preamble: "Input should be a valid integer, unable to..." -> "a
    whole number".
    """
    if details["type"] == "float_type" and isinstance(details["input"], int):
        return _DEMANDS["int_parsing_size"]  # an infinite number of Python's
    if details["type"] in _DEMANDS:
        return _DEMANDS[details["type"]].format(**details.get("ctx", {}))
    text = (
        details["msg"].split(", unable to", 1)[0].split(", got a", 1)[0].split(", exceeded", 1)[0]
    )
    for start in ("Input should be ", "Value error, ", "Input should have ", "Value should have "):
        text = text.removeprefix(start)
    for theirs, plain in _PLAINER.items():
        text = text.replace(theirs, plain)
    return text


_SIGNS: tuple[tuple[type, str, Callable[[Any], Any]], ...] = (
    (Gt, "above", lambda bound: bound.gt),
    (Ge, "at least", lambda bound: bound.ge),
    (Lt, "below", lambda bound: bound.lt),
    (Le, "at most", lambda bound: bound.le),
)


def _bounds(field: FieldInfo | None) -> str:
    """All bounds of a field, as "above 0 and below 1"."""
    bounds = [*field.metadata, *_inner_metadata(field.annotation)] if field is not None else []
    found = [
        f"{word} {shown(read(bound))}"
        for bound in bounds
        for kind, word, read in _SIGNS
        if isinstance(bound, kind)
    ]
    return " and ".join(dict.fromkeys(found))


def _inner_metadata(annotation: Any) -> list[Any]:
    """The bounds of the branches of a union, as in ``Annotated[int, Field(gt=0)] | None``."""
    found: list[Any] = []
    for part in typing.get_args(annotation):
        found += part.metadata if isinstance(part, FieldInfo) else _inner_metadata(part)
    return found

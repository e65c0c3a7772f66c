"""The commands: which settings each takes, what does its work, and the page that explains it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel

Model = TypeVar("Model", bound="BaseModel")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        name: its words, "eval knn".
        summary: one sentence, for the list of commands and the head of its own page.
        work: "module:function" that does it, called with the checked settings and ``say``.
        settings: "module:Model" of its settings; "" where ``work`` takes the words as they are.
        first: settings that words without an equals sign fill, in this order.
        rest: the list that takes all further ones.
        usage: those words, where no model describes them.
        pages: "module:function" with further lines for its page.
        examples: complete command lines.
    """

    name: str
    summary: str
    work: str
    settings: str = ""
    first: tuple[str, ...] = ()
    rest: str = ""
    usage: str = ""
    pages: str = ""
    examples: tuple[str, ...] = ()


_LABELLED = "data=cifar10/train test=cifar10/test"
COMMANDS = (
    Command(
        "pretrain",
        "Pre-train on a folder, list or shards of images.",
        "patchmine.cli.work:pretrain",
        usage="[RECIPE] KEY=VALUE...",
        pages="patchmine.cli.work:pretrain_page",
        examples=(
            "patchmine pretrain data=photos/ method=hpm out=runs/hpm",
            "patchmine pretrain cifar10-tiny data=cifar10/train out=runs/mae",
            "patchmine pretrain my.yaml out=runs/x epochs=50 method.mask_ratio=0.8",
        ),
    ),
    Command(
        "resume",
        "Go on with an interrupted run as if nothing had happened.",
        "patchmine.cli.work:resume",
        usage="RUN [KEY=VALUE...]",
        pages="patchmine.cli.work:resume_page",
        examples=("patchmine resume runs/hpm workers=4",),
    ),
    Command(
        "eval knn",
        "Nearest neighbours on frozen features (DINO's protocol).",
        "patchmine.evaluate.knn:evaluate_knn",
        "patchmine.evaluate.settings:KnnSettings",
        first=("target",),
        examples=(f"patchmine eval knn runs/hpm {_LABELLED} floors=true",),
    ),
    Command(
        "eval linear",
        "Linear classifiers on frozen features.",
        "patchmine.evaluate.linear:evaluate_linear",
        "patchmine.evaluate.settings:LinearSettings",
        first=("target",),
        examples=(f"patchmine eval linear runs/hpm {_LABELLED} floors=true",),
    ),
    Command(
        "eval video",
        "Videos, as papers test them: several clips of each.",
        "patchmine.evaluate.video:evaluate_video",
        "patchmine.evaluate.settings:VideoSettings",
        first=("target",),
        examples=("patchmine eval video runs/video data=clips/train test=clips/test floors=true",),
    ),
    Command(
        "embed",
        "Write one feature vector per image to a file.",
        "patchmine.evaluate.embed:embed",
        "patchmine.evaluate.settings:EmbedSettings",
        first=("target",),
        examples=("patchmine embed runs/hpm data=photos/ out=embeddings.parquet",),
    ),
    Command(
        "show",
        "Draw what a run makes of some images or videos.",
        "patchmine.cli.work:show",
        "patchmine.report.settings:ShowSettings",
        first=("run",),
        rest="images",
        examples=(
            "patchmine show runs/hpm a.jpg b.jpg out=panel.png",
            "patchmine show runs/clips a.mp4 out=clip.gif",
        ),
    ),
    Command(
        "report",
        "Write one HTML page about a run, or comparing several.",
        "patchmine.cli.work:report",
        "patchmine.report.settings:ReportSettings",
        rest="runs",
        examples=("patchmine report runs/hpm runs/mae out=report.html",),
    ),
    Command(
        "export",
        "Write a run's encoder for timm and transformers.",
        "patchmine.cli.work:export",
        "patchmine.runs.settings:ExportSettings",
        first=("run",),
        examples=("patchmine export runs/hpm out=hpm-vit-s",),
    ),
    Command(
        "import",
        "Turn a checkpoint of somebody else into a run.",
        "patchmine.cli.work:import_weights",
        "patchmine.runs.settings:ImportSettings",
        first=("file",),
        examples=("patchmine import mae_pretrain_vit_base.pth out=runs/mae-official",),
    ),
    Command(
        "data inspect",
        "Count images and decode a sample of them.",
        "patchmine.cli.work:inspect",
        "patchmine.data.settings:InspectSettings",
        first=("data",),
        examples=(
            "patchmine data inspect photos/ full=true",
            "patchmine data inspect clips/ video=true",
        ),
    ),
    Command(
        "data shard",
        "Pack images into tar shards, shrunk if wanted.",
        "patchmine.cli.work:shard",
        "patchmine.data.settings:ShardSettings",
        first=("data",),
        examples=("patchmine data shard photos/ out=shards/ max_side=512",),
    ),
    Command(
        "list methods",
        "The methods, or one of them with its settings.",
        "patchmine.cli.work:list_methods",
        usage="[METHOD]",
        examples=("patchmine list methods hpm",),
    ),
    Command(
        "list models",
        "The ViTs, ResNets and encoders of videos to choose from.",
        "patchmine.cli.work:list_models",
        usage="[PART...]",
        examples=("patchmine list models small",),
    ),
    Command(
        "list recipes",
        "The recipes: what each needs and what it gives.",
        "patchmine.cli.work:list_recipes",
        examples=("patchmine list recipes",),
    ),
    Command(
        "config show",
        "The settings that a recipe and your words amount to.",
        "patchmine.cli.work:config_show",
        usage="[RECIPE] [KEY=VALUE...]",
        examples=("patchmine config show cifar10-tiny method=hpm data=cifar10/train > mine.yaml",),
    ),
    Command(
        "config schema",
        "Every setting with its default and meaning.",
        "patchmine.cli.work:config_schema",
        usage="[METHOD|COMMAND]",
        examples=("patchmine config schema hpm", "patchmine config schema eval.knn"),
    ),
    Command(
        "bench step",
        "Time whole training steps.",
        "patchmine.cli.work:bench_step",
        "patchmine.bench.settings:BenchStepSettings",
        examples=("patchmine bench step method=mae against=transformers",),
    ),
    Command(
        "bench data",
        "Time how a worker makes training crops, or clips.",
        "patchmine.cli.work:bench_data",
        "patchmine.bench.settings:BenchDataSettings",
        examples=(
            "patchmine bench data data=photos.tar",
            "patchmine bench data data=clips/ video=true",
        ),
    ),
)


def named(path: str) -> Any:
    """What "module:name" names; its module is imported now."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def perform(command: Command, words: Sequence[str], say: Say) -> None:
    """Do the work of a command on the words behind it, and print what comes of it."""
    if not command.settings:
        named(command.work)(list(words), say)
        return
    given = read_words(
        named(command.settings),
        words,
        command=command.name,
        first=command.first,
        rest=command.rest or None,
        say=say,
    )
    result = named(command.work)(given, say)
    if isinstance(result, dict | list):
        from rich.console import Console

        from patchmine.evaluate import measure

        for each in result if isinstance(result, list) else [result]:
            measure.show_result(each, Console())
    elif result is not None:
        from patchmine.errors import shown_name

        print(shown_name(str(result)))


def read_words(
    model: type[Model],
    words: Sequence[str],
    *,
    command: str,
    first: Sequence[str] = (),
    rest: str | None = None,
    say: Say = lambda _: None,
) -> Model:
    """The settings of a command.

    Words without ``=`` fill the fields named in ``first``, in order, and then the list ``rest``.
    ``say`` hears of settings that are given twice.  Raises UserError with every mistake.
    """
    from patchmine.config.explain import validate
    from patchmine.config.overrides import read_settings, repeated, tree_of
    from patchmine.errors import shown_name
    from patchmine.strict import Mistake

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
        text = "one word too many; settings are written key=value"
        mistakes += [Mistake(shown_name(word), text) for word in more]
    known = ", ".join(name for name in model.model_fields if name not in (*first, rest))
    hint = f"; there are {known}" if known else ""
    return validate(model, settings, where=f"`patchmine {command}`", before=mistakes, hint=hint)


def usage(command: Command) -> str:
    """The words of a command in one line: TARGET data=... [KEY=VALUE...]."""
    if not command.settings:
        return command.usage
    fields = named(command.settings).model_fields
    words = [name.upper() for name in command.first]
    words += [f"{command.rest.upper().removesuffix('S')}..."] if command.rest else []
    plain = (*command.first, command.rest)
    needed = [name for name, field in fields.items() if field.is_required() and name not in plain]
    return " ".join([*words, *(f"{name}=..." for name in needed), "[KEY=VALUE...]"])


def page(command: Command) -> Iterator[str]:
    """The lines of a command's help, from its model."""
    yield f"Usage: patchmine {command.name} {usage(command)}".rstrip()
    yield f"\n  {command.summary}"
    if command.settings:
        from patchmine.config.describe import describe

        model = named(command.settings)
        yield f"\n  {' '.join((model.__doc__ or '').split())}\n"
        for name in [*command.first, *([command.rest] if command.rest else [])]:
            yield f"  {name.upper():<36} {model.model_fields[name].description}"
        others = [name for name in model.model_fields if name not in (*command.first, command.rest)]
        yield from (f"  {line}" for line in describe(model, others))
    else:
        more = (inspect.getdoc(named(command.work)) or "").split("\n")[1:]
        yield from (f"  {line}" for line in more)
    if command.pages:
        yield from (f"  {line}" for line in named(command.pages)())
    yield "\n  Examples:"
    yield from (f"    {example}" for example in command.examples)

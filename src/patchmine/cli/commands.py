"""The commands: which settings each takes, what does its work, and the page that explains it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from patchmine.errors import Say

if TYPE_CHECKING:
    from pydantic import BaseModel

Model = TypeVar("Model", bound="BaseModel")


@dataclass(frozen=True)
class Command:
    """One command; places are "module:name" in patchmine.

    Args:
        name: its words, "eval knn".
        work: what does it; its parameters say what it takes: ``settings``, or some of them by
            name; ``words``; ``say``.
        settings: the model of its settings, whose docstring is its help.
        first: the setting that the first word without an equals sign fills.
        rest: the list that further ones fill.
        usage: the words that it takes, where there are no settings.
    """

    name: str
    work: str
    settings: str = ""
    first: str = ""
    rest: str = ""
    usage: str = ""

    @property
    def help(self) -> str:
        """What it does, in a sentence, at length and in examples."""
        return inspect.getdoc(named(self.settings or self.work)) or ""


COMMANDS = (
    Command("pretrain", "cli.work:pretrain", usage="[RECIPE] KEY=VALUE..."),
    Command("plan", "cli.work:plan", usage="[RECIPE] KEY=VALUE..."),
    Command("resume", "cli.work:resume", usage="RUN [KEY=VALUE...]"),
    Command("extend", "cli.work:extend", usage="RUN epochs=... out=... [KEY=VALUE...]"),
    Command("finetune", "cli.teach:finetune", usage="START data=... out=... [KEY=VALUE...]"),
    Command("segment", "cli.teach:segment", usage="START data=... out=... [KEY=VALUE...]"),
    Command("detect", "cli.teach:detect", usage="START data=... out=... [KEY=VALUE...]"),
    Command("eval knn", "evaluate.knn:evaluate_knn", "evaluate.settings:KnnSettings", "target"),
    Command(
        "eval linear",
        "evaluate.linear:evaluate_linear",
        "evaluate.settings:LinearSettings",
        "target",
    ),
    Command(
        "eval video", "evaluate.video:evaluate_video", "evaluate.settings:VideoSettings", "target"
    ),
    Command(
        "eval attentive",
        "evaluate.attentive:evaluate_attentive",
        "evaluate.settings:AttentiveSettings",
        "target",
    ),
    Command(
        "eval fewshot",
        "evaluate.fewshot:evaluate_fewshot",
        "evaluate.settings:FewshotSettings",
        "target",
    ),
    Command(
        "eval cluster",
        "evaluate.clustering:evaluate_cluster",
        "evaluate.settings:ClusterSettings",
        "target",
    ),
    Command(
        "eval retrieval",
        "evaluate.retrieval:evaluate_retrieval",
        "evaluate.settings:RetrievalSettings",
        "target",
    ),
    Command(
        "eval quality",
        "evaluate.quality:evaluate_quality",
        "evaluate.settings:QualitySettings",
        "target",
    ),
    Command(
        "predict", "report.predictions:predict", "evaluate.settings:PredictSettings", "run", "data"
    ),
    Command("embed", "evaluate.embed:embed", "evaluate.settings:EmbedSettings", "target"),
    Command("show", "cli.work:show", "report.settings:ShowSettings", "run", "images"),
    Command("report", "report.page:write_report", "report.settings:ReportSettings", rest="runs"),
    Command("explore", "report.explore:explore", "report.settings:ExploreSettings", "target"),
    Command("export", "cli.work:export", "runs.settings:ExportSettings", "run"),
    Command("import", "runs.transfer:import_file", "runs.settings:ImportSettings", "file"),
    Command("data inspect", "cli.work:inspect", "data.settings:InspectSettings", "data"),
    Command("data shard", "cli.work:shard", "data.settings:ShardSettings", "data"),
    Command("data tile", "cli.work:tile", "data.settings:TileSettings", "data"),
    Command("list methods", "cli.work:list_methods", usage="[METHOD]"),
    Command("list models", "cli.work:list_models", usage="[PART...]"),
    Command("list recipes", "cli.work:list_recipes", usage="[RECIPE...]"),
    Command("config show", "cli.work:config_show", usage="[RECIPE] [KEY=VALUE...]"),
    Command("config schema", "cli.work:config_schema", usage="[METHOD|COMMAND]"),
    Command("bench step", "cli.work:bench_step", "bench.settings:BenchStepSettings"),
    Command("bench data", "cli.work:bench_data", "bench.settings:BenchDataSettings"),
)


def named(place: str) -> Any:
    """What "module:name" names; its module is imported now."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"patchmine.{module}"), name)


def perform(command: Command, words: Sequence[str], say: Say) -> None:
    """Do the work of a command on the words behind it, and print what comes of it."""
    gives: dict[str, Any] = {"words": list(words), "say": say}
    if command.settings:
        settings = read_words(
            named(command.settings),
            words,
            command=command.name,
            first=[command.first] if command.first else [],
            rest=command.rest or None,
            say=say,
        )
        gives |= {"settings": settings, **dict(settings)}
    work = named(command.work)
    takes = inspect.signature(work).parameters
    result = work(**{name: value for name, value in gives.items() if name in takes})
    if isinstance(result, dict | list):
        from rich.console import Console

        from patchmine.evaluate import measure

        for each in result if isinstance(result, list) else [result]:
            measure.show_result(each, Console())
    elif result is not None:
        from patchmine.errors import shown_name

        print(shown_name(str(getattr(result, "path", result))))


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
    ``say`` hears of settings that are given twice.  Raises UserError with all errors in them.
    """
    from patchmine.config.explain import validate
    from patchmine.config.overrides import read_settings, repeated, tree_of
    from patchmine.errors import shown_name
    from patchmine.strict import SettingError

    pairs, errors, plain = read_settings(words)
    pairs += zip(first, plain, strict=False)
    more = plain[len(first) :]
    if rest is not None and more:
        pairs.append((rest, more))
    elif more:
        text = "one word too many; settings are written key=value"
        errors += [SettingError(shown_name(word), text) for word in more]
    settings, torn = tree_of(pairs)
    errors += torn
    for sentence in repeated(pairs):
        say(sentence)
    known = ", ".join(name for name in model.model_fields if name not in (*first, rest))
    hint = f"; there are {known}" if known else ""
    return validate(model, settings, where=f"`patchmine {command}`", before=errors, hint=hint)


def first_and_settings(words: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """The recipe, run or start, if the first word is one, and the settings."""
    from patchmine.config.overrides import split_setting

    has_first = bool(words) and split_setting(words[0]) is None and not words[0].startswith("-")
    return (words[0], words[1:]) if has_first else (None, words)


def page(command: Command) -> Iterator[str]:
    """The lines of a command's help."""
    usage, lines = command.usage, []
    if command.settings:
        from patchmine.config.describe import describe

        fields = named(command.settings).model_fields
        plain = [name for name in (command.first, command.rest) if name]
        others = [name for name in fields if name not in plain]
        needed = [f"{name}=..." for name in others if fields[name].is_required()]
        shown = [name.upper() + ("..." if name == command.rest else "") for name in plain]
        usage = " ".join([*shown, *needed, "[KEY=VALUE...]"])
        lines = [f"{name.upper():<36} {fields[name].description}" for name in plain]
        lines += describe(named(command.settings), others)
    elif command.name == "pretrain":
        from patchmine.config.describe import describe_blocks
        from patchmine.config.schema import PretrainConfig

        lines = describe_blocks(PretrainConfig)
    elif command.name in ("finetune", "segment", "detect"):
        from patchmine.config.describe import RUNS

        lines = RUNS[command.name]()
    yield f"Usage: patchmine {command.name} {usage}".rstrip()
    yield from (f"  {line}".rstrip() for line in ["", *command.help.splitlines(), "", *lines])

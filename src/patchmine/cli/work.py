"""What the commands do: the words or settings of each, handed to the room that does its work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from patchmine.cli.commands import COMMANDS, first_and_settings, named
from patchmine.errors import Say, UserError, shown_name

if TYPE_CHECKING:
    from patchmine.bench.settings import BenchDataSettings, BenchStepSettings
    from patchmine.data.settings import InspectSettings, ShardSettings, TileSettings
    from patchmine.report.settings import ShowSettings
    from patchmine.runs.settings import ExportSettings


def pretrain(words: Sequence[str], say: Say) -> None:
    """Pre-train on a folder, list or shards of images.

    RECIPE is a name from `patchmine list recipes` or a YAML file; what you set yourself
    overrules it.  Settings of the method are method.KEY=VALUE, see `patchmine list methods hpm`.
    Ctrl-C finishes the step and saves; `patchmine resume RUN` goes on.

    Example:
        patchmine pretrain data=photos/ method=hpm out=runs/hpm
        patchmine pretrain cifar10-tiny data=cifar10/train out=runs/mae
        patchmine pretrain adapt data=photos/ init=mae_pretrain_vit_base.pth out=runs/adapted
        patchmine pretrain my.yaml out=runs/x epochs=50 method.mask_ratio=0.8
    """
    from patchmine.config import resolve
    from patchmine.config.schema import PretrainConfig
    from patchmine.runs import checking

    began = perf_counter()  # before torch is imported, which a budget counts too
    recipe, settings = first_and_settings(words)
    base = _of_start(recipe, settings, say, also=checking.CHECKS[:1])
    config = resolve.parse(recipe, settings, say, also=checking.CHECKS, base=base)
    from patchmine.training import pretrain as start  # after the settings are known to be right

    start(resolve.of_kind(config, PretrainConfig), say=say, began=began)


def plan(words: Sequence[str], say: Say) -> None:
    """Say what a run would take, from a few steps of it.

    The words are those of `patchmine pretrain`; out may be left out, and nothing is kept.

    Example:
        patchmine plan my-images data=photos/ method=hpm
        patchmine plan my-images data=photos/ budget=2h
    """
    from patchmine.config import resolve
    from patchmine.config.schema import PretrainConfig
    from patchmine.runs import checking

    recipe, settings = first_and_settings(words)
    base = _of_start(recipe, settings, say, also=checking.PLAN_CHECKS[:1])
    config = resolve.parse(recipe, settings, say, also=checking.PLAN_CHECKS, base=base)
    from patchmine.training import planning  # after the settings are known to be right

    if text := planning.plan(resolve.of_kind(config, PretrainConfig), say=say):
        print(text)


def _of_start(
    recipe: str | None, words: Sequence[str], say: Say, also: Sequence[Any] = ()
) -> dict[str, Any]:
    """Settings of the network that a pre-training run goes on from, where it names no other."""
    from patchmine.config import resolve
    from patchmine.config.overrides import read_settings
    from patchmine.runs.known import tell_errors, words_known_to_fit

    start = resolve.start_of(recipe, dict(read_settings(words)[0]))
    if start is None:
        return {}
    known, sure = words_known_to_fit(start, words, "pretrain")
    tell_errors(lambda hears: resolve.parse(recipe, sure, hears, also=also, base=known), say)
    from patchmine.training.starting import settings_for  # after the words are known to be right

    return settings_for("pretrain", start)


def resume(words: Sequence[str], say: Say) -> None:
    """Go on with an interrupted run as if nothing had happened.

    Only settings that do not change results may be given, those at the end of `patchmine config
    schema`, and data where the same images have moved.

    Example:
        patchmine resume runs/hpm workers=4
    """
    run, settings = first_and_settings(words)
    if run is None:
        raise UserError("Name the folder of a run first, as in `patchmine resume runs/hpm`.")
    from patchmine.runs.known import settings_to_resume, tell_errors

    tell_errors(lambda hears: settings_to_resume(run, settings, hears), say)
    from patchmine.training import resume as go_on  # after the words are known to be right

    go_on(run, settings, say=say)


def extend(words: Sequence[str], say: Say) -> None:
    """Train longer: a new run from another one's weights.

    The new run starts from all that RUN knows: every weight of its method or classifier, and the
    optimizer's state.  epochs (or steps, or a budget of time) is how much longer: the schedule
    starts anew, with its warm-up, at step 0.  All other settings are RUN's, but for what you give;
    data may be other images.  A pre-training run takes the next seed, so that it sees new crops and
    masks.

    Example:
        patchmine extend runs/hpm epochs=400 out=runs/hpm-longer
        patchmine extend runs/hpm budget=30m out=runs/hpm-longer
        patchmine extend runs/hpm epochs=50 data=more/ blr=5e-5 warmup_epochs=2 out=runs/more
    """
    began = perf_counter()
    run, settings = first_and_settings(words)
    if run is None:
        raise UserError(
            "Name the folder of a run first, as in `patchmine extend runs/hpm epochs=400 "
            "out=runs/hpm-longer`."
        )
    from patchmine.config import resolve
    from patchmine.runs.checking import checks_of
    from patchmine.runs.known import settings_of_run, settings_to_extend, tell_errors

    timed = any(word.startswith("budget=") for word in settings)
    base = settings_to_extend(settings_of_run(run), run, timed=timed)
    checks = checks_of(base["kind"], extends=True)
    tell_errors(lambda hears: resolve.parse(None, settings, hears, also=checks[:1], base=base), say)
    from patchmine.training import extending  # after the words are known to be right

    base = extending.settings_of_extension(run, timed=timed)
    config = resolve.parse(None, settings, say, also=checks, base=base)
    extending.extend(config, run, say=say, began=began)


def show(settings: ShowSettings) -> Path:
    """Draw a panel."""
    from patchmine.report.show import show as draw

    return draw(settings.run, settings.images, settings.out, seed=settings.seed)


def export(settings: ExportSettings, say: Say) -> Path:
    """Write an encoder, or a whole method."""
    from patchmine.runs.exporting import export_run

    how = settings.model_dump(include={"what", "to", "weights"})
    return export_run(settings.run, settings.out, say=say, **how)


def inspect(settings: InspectSettings, say: Say) -> None:
    """Look at a data set."""
    from patchmine.data.inspect import inspect as look
    from patchmine.data.inspect import render

    source = _opened(settings.data, settings.video, settings.remote_gb)
    with _hearing("Reading", say) as hear:
        report = look(source, **settings.model_dump(exclude={"data", "remote_gb"}), progress=hear)
    print(render(report))


def shard(settings: ShardSettings, say: Say) -> None:
    """Pack images."""
    from patchmine.data.sharding import write_shards

    size = settings.shard_mb * 2**20
    source = _opened(settings.data, False, settings.remote_gb)
    write_shards(
        source,
        Path(settings.out),
        max_side=settings.max_side,
        shard_size=size,
        keep_missing=settings.missing == "keep",
        say=say,
    )


def tile(settings: TileSettings, say: Say) -> None:
    """Cut images into tiles, or list these."""
    from patchmine.data.tiling import Cut, is_list, tile_images

    out, keep = Path(settings.out), settings.missing == "keep"
    cut = Cut(settings.size, settings.overlap, settings.level, settings.max_empty, keep)
    with _hearing("Listing" if is_list(out) else "Cutting", say) as hear:
        tile_images(settings.data, out, cut, settings.max_pixels, hear, say)


@contextmanager
def _hearing(title: str, say: Say) -> Iterator[Callable[[int, int], None]]:
    """Yields what hears (items done, items to do) after each item, and shows it."""
    from patchmine.evaluate.progress import progress

    with ExitStack() as shown:
        tick: Callable[[int], None] | None = None

        def hear(_: int, total: int) -> None:
            nonlocal tick
            tick = tick or shown.enter_context(progress(title, total, say))
            tick(1)

        yield hear


def _opened(data: str | list[str], video: bool, remote_gb: float) -> Any:
    from patchmine.data.sources.source import default_cache_dir, open_source

    kind, folder = "video" if video else "image", default_cache_dir()
    return open_source(data, kind, cache_dir=folder, remote_gb=remote_gb)


def bench_step(settings: BenchStepSettings) -> None:
    """Time training steps."""
    from patchmine.bench.step import bench_step as measure

    measure(say=print, **settings.model_dump(exclude_unset=True))


def bench_data(settings: BenchDataSettings) -> None:
    """Time the reading of data."""
    from patchmine.bench.data import bench_data as measure
    from patchmine.bench.video import bench_video

    if settings.video:
        bench_video(
            **settings.model_dump(exclude={"data", "video"}), source=settings.data, say=print
        )
        return
    measure(settings.data, image_size=settings.image_size, repeats=settings.repeats, say=print)


def list_methods(words: Sequence[str]) -> None:
    """The methods, or one of them with its settings.

    Example:
        patchmine list methods hpm
    """
    from inspect import getdoc

    from patchmine.config.describe import describe_method
    from patchmine.methods import METHODS

    for name in words:
        settings = describe_method(name)  # which refuses a name that is none
        print("\n".join([f"{name}: {getdoc(METHODS[name])}", "", *settings]))
    for name, method in METHODS.items() if not words else ():
        print(f"{name}: {(getdoc(method) or '').splitlines()[0].rstrip('.')}")


def list_models(words: Sequence[str]) -> None:
    """The encoders to choose from, with family, size and image.

    ViTs, rotary ViTs, ResNets, ConvNeXts, Swins and encoders of videos.  PART narrows the list;
    parameters are counted, in millions, where it is short.

    Example:
        patchmine list models small
    """
    from patchmine.backbones.available import model_names, model_table
    from patchmine.config.explain import did_you_mean

    names = model_names()
    found = [name for name in names if all(part in name for part in words)]
    if not found:
        part, parts = " ".join(words), {part for name in names for part in name.split("_")}
        near = did_you_mean(part, [*parts, *names])
        raise UserError(f"No model has '{shown_name(part)}' in its name{near}")
    print("\n".join(model_table(found)))


def list_recipes(words: Sequence[str]) -> None:
    """The recipes, or some of them with what each needs and gives.

    Example:
        patchmine list recipes my-images
    """
    from patchmine.config.recipes import list_recipes as recipes
    from patchmine.config.recipes import named_recipe

    for recipe in map(named_recipe, words):
        print(f"{recipe.name}: {recipe.about['title']}")
        if recipe.settings.get("kind", "pretrain") == "pretrain":
            print(f"  methods   {', '.join(recipe.method_names)}")
        for key in ("data", "hardware", "time", "expected", "command"):
            print(f"  {key:<9} {recipe.about[key]}")
    for recipe in recipes() if not words else ():
        print(f"{recipe.name}: {recipe.about['title']}")


def config_show(words: Sequence[str], say: Say) -> None:
    """The settings that a recipe and your words amount to.

    What is printed is a YAML file that `patchmine pretrain` takes as a recipe.  What differs from
    the default says so.  Where data=... is there, what depends on the images is looked up in them.

    Example:
        patchmine config show cifar10-tiny method=hpm data=cifar10/train > mine.yaml
    """
    from patchmine.config import resolve
    from patchmine.config.describe import marked
    from patchmine.config.missing import missing_files
    from patchmine.config.recipes import load_recipe
    from patchmine.config.schema import PretrainConfig

    recipe, settings = first_and_settings(words)
    has_data = recipe is not None and "data" in load_recipe(recipe).settings
    if not has_data and not any(word.startswith("data=") for word in settings):
        settings = ["data=IMAGES", *settings]  # the one setting that has no default
    base = _of_start(recipe, settings, say)
    config = resolve.parse(recipe, settings, say, base=base)
    waits = config.by_size or config.mean is None
    if isinstance(config, PretrainConfig) and waits and not missing_files(config):
        from patchmine.training import planning

        if config.data != "IMAGES":
            config = planning.resolved(config, say=say)
    print(marked(config), end="")


def config_schema(words: Sequence[str]) -> None:
    """Every setting with its default and meaning.

    Without a word those of a run; METHOD gives one method's own, COMMAND those of a command.

    Example:
        patchmine config schema hpm
        patchmine config schema eval.knn
    """
    from patchmine.config.describe import RUNS, describe, describe_method
    from patchmine.config.explain import did_you_mean
    from patchmine.methods import METHODS

    tables = {command.name.replace(" ", "."): command.settings for command in COMMANDS}
    tables = {name: settings for name, settings in tables.items() if settings}
    for word in words or ["pretrain"]:
        if word in METHODS:
            lines = describe_method(word)
        elif word in tables:
            lines = describe(named(tables[word]))
        elif word in RUNS:
            lines = RUNS[word]()
        else:
            names = [*METHODS, *RUNS, *tables]
            near = did_you_mean(word, names) or f"; there are {', '.join(names)}"
            raise UserError(f"No method or command '{shown_name(word)}'{near}")
        print("\n".join(lines))

"""The command line.  It only reads words and calls the rooms; torch is imported when work starts,
not before.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from patchmine.cli.evaluation import evaluate
from patchmine.cli.program import command, ended_in_words, last_words, say, typer_group
from patchmine.errors import UserError, shown_name

_HELP = """Pre-train vision backbones on your own unlabelled images: MAE and Hard Patches Mining.

Settings are words, key=value, dotted where they are nested: method.mask_ratio=0.8. A misspelt one is answered with the
names that come near."""

_EXAMPLES = """\b
Start here:
  patchmine pretrain data=photos/ method=hpm out=runs/hpm   pre-train on a folder of images
  patchmine report runs/hpm out=report.html                 look at curves and pictures
  patchmine eval knn runs/hpm data=labelled/ floors=true    measure it, beside random weights
  patchmine list recipes                                    settings that are known to work
  patchmine config schema                                   every setting of a run
  patchmine COMMAND --help                                  the words of one command

\b
In Python:
  timm.create_model("local-dir:runs/hpm/export", pretrained=True)
  patchmine.pretrain(data="photos/", method="hpm", out="runs/hpm").encoder()"""

_ORDER = (
    "pretrain",
    "resume",
    "eval",
    "embed",
    "show",
    "report",
    "export",
    "import",
    "data",
    "list",
    "config",
    "bench",
)


class _Group(TyperGroup):
    """Commands in the order in which they are met; mistakes of the user as one paragraph and exit
    code 2.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        with ended_in_words():
            return super().invoke(ctx)


app = typer_group(_HELP, name="patchmine", cls=_Group, epilog=_EXAMPLES)
data = typer_group("Look at a data set, or pack it into shards.")
listing = typer_group("List methods, models or recipes.")
config = typer_group("Show a run's settings before making it.")
bench = typer_group("Time training steps or the loading of data.")
app.add_typer(evaluate, name="eval")
app.add_typer(data, name="data")
app.add_typer(listing, name="list")
app.add_typer(config, name="config")
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the program `patchmine`."""
    with last_words():
        app(prog_name="patchmine")


def _show_version(wanted: bool) -> None:
    if wanted:
        from patchmine import __version__

        print(f"patchmine {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


@command(app, "pretrain", "[RECIPE] KEY=VALUE...")
def pretrain(context: typer.Context) -> None:
    """Pre-train on a folder, list or shards of images.

    RECIPE is a name from `patchmine list recipes` or a YAML file; what you set yourself overrules
    it.

    \b
      data=photos/       folder, list file, tar shards, or embedded:photos
      method=hpm         mae (default) or hpm; its own settings are method.KEY=VALUE
      model=NAME         vision transformer or ResNet, see `patchmine list models`
      epochs=100         passes over the data; or steps=20000
      batch_size=256     images in a step; image_size=224 and so on
      out=runs/hpm       new folder for the run
    \b
    Examples:
      patchmine pretrain data=photos/ method=hpm out=runs/hpm
      patchmine pretrain cifar10-tiny data=cifar10/train out=runs/mae
      patchmine pretrain my.yaml out=runs/x epochs=50 method.mask_ratio=0.8
    \b
    Ctrl-C finishes the step and saves; `patchmine resume RUN` goes on.
    `patchmine config schema` lists all settings.
    """
    from patchmine.api import CHECKS
    from patchmine.config.resolve import parse

    config = parse(*_recipe_and_settings(context.args), say, also=CHECKS)
    from patchmine.training import pretrain as start

    start(config, say=say)


def _recipe_and_settings(words: list[str]) -> tuple[str | None, list[str]]:
    """The recipe, if the first word is one, and the settings."""
    from patchmine.config.overrides import split_setting

    has_recipe = bool(words) and split_setting(words[0]) is None and not words[0].startswith("-")
    return (words[0], words[1:]) if has_recipe else (None, words)


@command(app, "resume", "RUN [KEY=VALUE...]")
def resume(context: typer.Context) -> None:
    """Go on with an interrupted run as if nothing had happened.

    Only settings that do not change results may be given: workers, device, checkpoint_every and the
    like.

    \b
    Example:
      patchmine resume runs/hpm workers=4
    """
    from patchmine.training import resume as go_on

    run, words = _recipe_and_settings(context.args)
    if run is None:
        raise UserError("Name the folder of a run first, as in `patchmine resume runs/hpm`.")
    go_on(run, words, say=say)


@command(app, "embed", "TARGET data=IMAGES out=FILE [KEY=VALUE...]")
def embed(context: typer.Context) -> None:
    """Write one feature vector per image to a file.

    \b
      TARGET data= weights= pooling=    as in `patchmine eval knn`; labels are not needed
      out=embeddings.parquet            columns path, index, label and embedding; .csv or .npz as
      well
    \b
    Example:
      patchmine embed runs/hpm data=photos/ out=embeddings.parquet
    """
    from patchmine.cli.commands import read_words
    from patchmine.evaluate.embed import embed as write
    from patchmine.evaluate.settings import EmbedSettings

    write(read_words(EmbedSettings, context.args, command="embed", first=["target"], say=say), say)


@command(app, "show", "RUN IMAGE|VIDEO... [out=panel.png] [seed=0]")
def show(context: typer.Context) -> None:
    """Draw what a run makes of some images or videos.

    Input, mask, reconstruction and error; with HPM also the predicted difficulty of each patch.

    \b
    Examples:
      patchmine show runs/hpm a.jpg b.jpg out=panel.png patchmine show runs/clips a.mp4 out=clip.gif
      or clip.mp4, or .png for a contact sheet of frames
    """
    from patchmine.cli.commands import read_words
    from patchmine.report.settings import ShowSettings
    from patchmine.report.show import show as draw

    given = read_words(
        ShowSettings, context.args, command="show", first=["run"], rest="images", say=say
    )
    print(shown_name(str(draw(given.run, given.images, given.out, seed=given.seed))))


@command(app, "report", "RUN... [out=report.html]")
def report(context: typer.Context) -> None:
    """Write one HTML page about a run, or comparing several.

    \b
    Example:
      patchmine report runs/hpm runs/mae out=report.html
    """
    from patchmine.cli.commands import read_words
    from patchmine.report.html import write_report
    from patchmine.report.settings import ReportSettings

    given = read_words(ReportSettings, context.args, command="report", rest="runs", say=say)
    print(shown_name(str(write_report(given.runs, given.out))))


@command(app, "export", "RUN [out=FOLDER] [KEY=VALUE...]")
def export(context: typer.Context) -> None:
    """Write a run's encoder for timm and transformers.

    \b
      out=hpm-vit-s      folder to write; without it, export/ in the run
      what=full          the whole method instead, out=FILE.safetensors, under the reference's names
      weights=teacher    the slow copy that HPM keeps
    \b
    Example:
      patchmine export runs/hpm out=hpm-vit-s
      timm.create_model("local-dir:hpm-vit-s", pretrained=True)
    """
    from patchmine.cli.commands import read_words
    from patchmine.runs.settings import ExportSettings
    from patchmine.runs.transfer import export_run

    given = read_words(ExportSettings, context.args, command="export", first=["run"], say=say)
    print(shown_name(str(export_run(given.run, given.out, what=given.what, weights=given.weights))))


@command(app, "import", "FILE out=FOLDER [KEY=VALUE...]")
def import_weights(context: typer.Context) -> None:
    """Turn a checkpoint of somebody else into a run.

    A report tells what became of every tensor; nothing missing or unexpected is passed over.

    \b
      out=runs/mae       new folder for the run what=encoder       leave the decoder out; without
      it, all that the file has weights=ema        the average in place of the trained network
      (HPM's teacher, timm's model_ema) image_size=384     another image size; positions are
      resampled source_size=224    the size that it was trained at, where nothing tells it;
      [height,width] of rectangles prefix=student.    which of several encoders in one file
      num_heads=3        attention heads of an unusual model; also decoder_num_heads allow=[head.*]
      tensors that may be missing or unexpected
    \b
    Example:
      patchmine import mae_pretrain_vit_base.pth out=runs/mae-official
    """
    from patchmine.cli.commands import read_words
    from patchmine.runs.settings import ImportSettings
    from patchmine.runs.transfer import import_file

    given = read_words(ImportSettings, context.args, command="import", first=["file"], say=say)
    print(shown_name(import_file(**given.model_dump(), say=say).path))


@command(data, "inspect", "IMAGES [sample=1000] [full=false] [video=false] [max_pixels=N]")
def data_inspect(context: typer.Context) -> None:
    """Count images and decode a sample of them.

    Reports sizes, channels, mean and std, duplicates, and what is broken.

    \b
    Example:
      patchmine data inspect photos/ full=true
      patchmine data inspect clips/ video=true
    """
    from patchmine.cli.commands import read_words
    from patchmine.data.inspect import inspect, render
    from patchmine.data.settings import InspectSettings
    from patchmine.data.sources.source import default_cache_dir, open_source
    from patchmine.data.sources.video_sources import open_videos

    given = read_words(
        InspectSettings, context.args, command="data inspect", first=["data"], say=say
    )
    source = (open_videos if given.video else open_source)(
        given.data, cache_dir=default_cache_dir()
    )
    print(
        render(
            inspect(
                source,
                sample=given.sample,
                full=given.full,
                video=given.video,
                max_pixels=given.max_pixels,
            )
        )
    )


@command(data, "shard", "IMAGES out=FOLDER [max_side=PIXELS] [shard_mb=256]")
def data_shard(context: typer.Context) -> None:
    """Pack images into tar shards, shrunk if wanted.

    The layout is WebDataset's; data=shards/ reads it.

    \b
    Example:
      patchmine data shard photos/ out=shards/ max_side=512
    """
    from pathlib import Path

    from patchmine.cli.commands import read_words
    from patchmine.data.settings import ShardSettings
    from patchmine.data.sharding import write_shards
    from patchmine.data.sources.source import default_cache_dir, open_source

    given = read_words(ShardSettings, context.args, command="data shard", first=["data"], say=say)
    source = open_source(given.data, cache_dir=default_cache_dir())
    write_shards(
        source, Path(given.out), max_side=given.max_side, shard_size=given.shard_mb * 2**20, say=say
    )


@listing.command("methods", options_metavar="[--help]")
def list_methods() -> None:
    """The methods and their settings."""
    from patchmine.config.describe import describe_method
    from patchmine.methods import METHODS

    for name, method in METHODS.items():
        print(f"{name}: {(method.__doc__ or '').strip().splitlines()[0]}")
        print("\n".join(f"  {line}" for line in describe_method(name)), end="\n\n")


@command(listing, "models", "[PART]")
def list_models(context: typer.Context) -> None:
    """The ViTs, ResNets and encoders of videos to choose from.

    PART narrows the list: `patchmine list models small`.
    """
    import timm

    from patchmine.backbones.names import VIDEO_MODELS
    from patchmine.config.explain import did_you_mean

    names = [
        name
        for module in ("vision_transformer", "deit", "resnet")
        for name in timm.list_models(module=module)
    ]
    names = [
        name for name in names if "distilled" not in name
    ]  # they have two class tokens and are no plain ViT
    names += VIDEO_MODELS
    found = [name for name in names if all(part in name for part in context.args)]
    if not found:
        part = " ".join(context.args)
        parts = {part for name in names for part in name.split("_")}
        raise UserError(
            f"No model has '{shown_name(part)}' in its name{did_you_mean(part, [*parts, *names])}"
        )
    print("\n".join(found))


@listing.command("recipes", options_metavar="[--help]")
def list_recipes() -> None:
    """The recipes: what each needs and what it gives."""
    from patchmine.config.recipes import list_recipes as recipes

    for recipe in recipes():
        print(f"{recipe.name}: {recipe.about['title']}")
        print(f"  methods   {', '.join(recipe.method_names)}")
        for key in ("data", "hardware", "time", "expected", "command"):
            print(f"  {key:<9} {recipe.about[key]}")
        print()


@command(config, "show", "[RECIPE] [KEY=VALUE...]")
def config_show(context: typer.Context) -> None:
    """The settings that a recipe and your words amount to.

    What is printed is a YAML file that `patchmine pretrain` takes as a recipe.

    \b
    Example:
      patchmine config show cifar10-tiny method=hpm data=cifar10/train > mine.yaml
    """
    from patchmine.config.recipes import load_recipe
    from patchmine.config.resolve import parse

    recipe, words = _recipe_and_settings(context.args)
    has_data = recipe is not None and "data" in load_recipe(recipe).settings
    if not has_data and not any(word.startswith("data=") for word in words):
        words = ["data=IMAGES", *words]  # the one setting that has no default
    print(parse(recipe, words, say).to_yaml(), end="")


@command(config, "schema", "[METHOD]")
def config_schema(context: typer.Context) -> None:
    """Every setting with its default and meaning.

    METHOD narrows the list to one method's own: `patchmine config schema hpm`.
    """
    from patchmine.config.describe import describe_method, describe_run

    print(
        "\n".join(
            [line for name in context.args for line in describe_method(name)] or describe_run()
        )
    )


@command(bench, "step", "[KEY=VALUE...]")
def bench_step(context: typer.Context) -> None:
    """Time whole training steps.

    Prints ms and samples/s, peak memory, and the share of the machine's matrix-multiply rate.

    \b
      method=mae,hpm model=vit_small_patch16_224 image_size=224 batch_size=16
      precision=fp32 device=cpu rounds=10 out=result.json
      against=transformers    also ViTMAEForPreTraining at the same sizes, in turns
    \b
    Example:
      patchmine bench step method=mae against=transformers
    """
    from patchmine.bench.settings import BenchStepSettings
    from patchmine.bench.step import bench_step as measure
    from patchmine.cli.commands import read_words

    given = read_words(BenchStepSettings, context.args, command="bench step", say=say)
    measure(say=print, **given.model_dump(exclude_unset=True))


@command(bench, "data", "data=IMAGES [image_size=224] [repeats=5]")
def bench_data(context: typer.Context) -> None:
    """Time how a worker makes training crops, or clips.

    Against torchvision's ImageFolder chain with PIL, or PyAV frame after frame, in turns.

    \b
    Example:
      patchmine bench data data=photos.tar
      patchmine bench data data=clips/ video=true
    """
    from patchmine.bench.data import bench_data as measure
    from patchmine.bench.settings import BenchDataSettings
    from patchmine.bench.video import bench_video
    from patchmine.cli.commands import read_words

    given = read_words(BenchDataSettings, context.args, command="bench data", say=say)
    if given.video:
        bench_video(**given.model_dump(exclude={"data", "video"}), source=given.data, say=print)
        return
    measure(given.data, image_size=given.image_size, repeats=given.repeats, say=print)


if __name__ == "__main__":
    main()

"""The commands that teach a backbone labels: of images, of pixels, of objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patchmine.cli.commands import first_and_settings, read_words
from patchmine.errors import Say, UserError


def finetune(words: Sequence[str], say: Say) -> None:
    """Teach a backbone your labels, and test what it learned.

    START is a run, an export, a file of weights, or the name of a model (random weights).  The
    folders in data are the classes, train/ and test/ in it are used as such; or labels=FILE.csv.
    The run is exported with its classifier, and `patchmine resume RUN` goes on with it.
    recipe=NAME takes published settings (`patchmine list recipes`); check=true only looks whether
    settings, labels and images fit together.  shares=, baselines=, compare= and seeds= make many
    runs instead of one, and say how much the pre-training is worth.

    Example:
        patchmine finetune runs/hpm data=labelled/ out=runs/classify
        patchmine finetune runs/hpm data=labelled/ out=runs/few recipe=small-labels share=0.1
        patchmine finetune runs/hpm data=photos/ labels=age.csv loss=mse out=runs/age
        patchmine finetune runs/hpm data=labelled/ out=runs/gain shares=1%,10%,100% baselines=true
    """
    first, settings = first_and_settings(words)
    if first is None:
        raise UserError(
            "Name what to start from first, as in `patchmine finetune runs/hpm data=labelled/ "
            "out=runs/classify`: a run, an export, a file of weights, or a model."
        )
    from patchmine.config import resolve
    from patchmine.config.schema import FinetuneConfig
    from patchmine.runs.checking import CLASSIFIER_CHECKS
    from patchmine.runs.known import tell_errors, words_known_to_fit
    from patchmine.tasks.settings import FinetuneOptions

    def is_option(word: str) -> bool:
        return word.split("=")[0] in FinetuneOptions.model_fields

    options = read_words(
        FinetuneOptions, list(filter(is_option, settings)), command="finetune", say=say
    )
    own = [word for word in settings if not is_option(word)]
    known, sure = words_known_to_fit(first, own)

    def read_at_once(hears: Say) -> None:
        early = CLASSIFIER_CHECKS[:1]
        config = resolve.parse(options.recipe, sure, hears, also=early, base=known)
        resolve.of_kind(config, FinetuneConfig)

    tell_errors(read_at_once, say)
    from patchmine.training import finetuning, shares  # after the words are known to be right

    def read(base: dict[str, Any], hears: Say) -> Any:
        return resolve.parse(options.recipe, own, hears, also=CLASSIFIER_CHECKS, base=base)

    configs = shares.configs_of_starts(first, options, read, say)
    if options.asked:
        if options.check:
            shares.check_shares(configs, options, say=say)
        else:
            _print_table(shares.compare_shares(configs, options, say=say))
        return
    work = finetuning.check if options.check else finetuning.finetune
    work(next(iter(configs.values())), say=say)


def _print_table(result: Mapping[str, Any]) -> None:
    """Scores of each start by the share of labels."""
    from rich.console import Console
    from rich.table import Table

    from patchmine.report.verdict import read_verdict, sentences, table

    verdict = read_verdict(result)
    head, rows = table(verdict)
    shown = Table(title=f"{verdict.title} by share of the labels")
    for column in head:
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(*row)
    console = Console()
    console.print(shown)
    for sentence in sentences(verdict):
        console.print(sentence, markup=False, highlight=False)


def segment(words: Sequence[str], say: Say) -> None:
    """Teach a backbone label maps: the class of every pixel.

    START is a run, an export, a file of weights, or the name of a model (random weights).  data has
    {train,val,test}/{images,labels}, or images and labels, or is a list of "image label" lines; a
    label map is a PNG of class numbers, or of the colours in palette; COCO files serve too, beside
    the images or as labels=instances.json.  image_size is that of training crops and test windows.
    The run is tested on whole images, and `patchmine resume RUN` goes on with it.  check=true lists
    all that is wrong with the label maps.

    Example:
        patchmine segment runs/hpm data=camvid/ out=runs/segment ignore_index=11
        patchmine segment runs/hpm data=cells/ out=runs/cells "palette={background: 0, cell: 255}"
        patchmine segment runs/hpm data=ade20k/ out=runs/ade recipe=segment-mae-vit-b-ade20k
    """
    config, only_check = _read("segment", words, say)
    from patchmine.training import segmenting  # after the words are known to be right

    work = segmenting.check if only_check else segmenting.segment
    work(config, say=say)


def detect(words: Sequence[str], say: Say) -> None:
    """Teach a backbone to find objects.

    What is found are boxes, with masks=true masks too.  START is a run, an export, a file of
    weights, or the name of a model (random weights).  data has {train,val,test}/ with annotations
    in COCO's format, in annotations/{train,val,test}.json or as annotations.json beside the images;
    or annotations=FILE.json.  Images are fitted into image_size, keeping their shape.  The run is
    tested on whole images, and `patchmine resume RUN` goes on with it.  check=true lists all that
    is wrong with the annotations.

    Example:
        patchmine detect runs/hpm data=bccd/ out=runs/detect image_size=512
        patchmine detect runs/hpm data=nuclei/ masks=true out=runs/nuclei image_size=512
        patchmine detect runs/hpm data=coco/ out=runs/coco recipe=detect-vitdet-vit-b-coco
    """
    config, only_check = _read("detect", words, say)
    from patchmine.training import detecting  # after the words are known to be right

    work = detecting.check if only_check else detecting.detect
    work(config, say=say)


def _read(kind: str, words: Sequence[str], say: Say) -> tuple[Any, bool]:
    """The settings of a run of this kind, and whether they are only to be checked."""
    first, settings = first_and_settings(words)
    if first is None:
        raise UserError(
            f"Name what to start from first, as in `patchmine {kind} runs/hpm data=labelled/ "
            f"out=runs/{kind}`: a run, an export, a file of weights, or a model."
        )
    from patchmine.config import resolve
    from patchmine.config.schema import KINDS
    from patchmine.runs.checking import checks_of
    from patchmine.runs.known import tell_errors, words_known_to_fit
    from patchmine.tasks.settings import CommandOptions

    def is_option(word: str) -> bool:
        return word.split("=")[0] in CommandOptions.model_fields

    options = read_words(CommandOptions, list(filter(is_option, settings)), command=kind, say=say)
    own, checks = [word for word in settings if not is_option(word)], checks_of(kind)
    known, sure = words_known_to_fit(first, own, kind)
    tell_errors(
        lambda hears: resolve.parse(options.recipe, sure, hears, also=checks[:1], base=known), say
    )
    from patchmine.training.starting import settings_for  # after the words are known to be right

    base = settings_for(kind, first)
    config = resolve.parse(options.recipe, own, say, also=checks, base=base)
    return resolve.of_kind(config, KINDS[kind]), options.check

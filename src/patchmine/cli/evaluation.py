"""`patchmine eval ...`: the protocols as commands; torch is imported when work starts, not before."""

from __future__ import annotations

from typing import Any

import typer

from patchmine.cli.program import command, say, typer_group

evaluate = typer_group("Measure a frozen encoder on labelled images or videos.")


@command(evaluate, "knn", "TARGET data=IMAGES [KEY=VALUE...]")
def eval_knn(context: typer.Context) -> None:
    """Nearest neighbours on frozen features (DINO's protocol).

    \b
      TARGET             run, export, weights file, timm architecture, random-init:RUN or raw-pixels
      data=labelled/     images in class folders; train/ and test/ in it are used as such
      test=labelled/test images to test on
      floors=true        also a random twin of the encoder, and the raw pixels
      k=20 pooling=cls   neighbours that vote; class token (cls), mean or cls+mean
      weights=teacher    the slow copy that HPM keeps
    \b
    Example:
      patchmine eval knn runs/hpm data=cifar10/train test=cifar10/test floors=true
    """
    from patchmine.cli.commands import read_words
    from patchmine.evaluate.knn import evaluate_knn
    from patchmine.evaluate.settings import KnnSettings

    given = read_words(KnnSettings, context.args, command="eval knn", first=["target"], say=say)
    _show(evaluate_knn(given, say))


@command(evaluate, "linear", "TARGET data=IMAGES [KEY=VALUE...]")
def eval_linear(context: typer.Context) -> None:
    """Linear classifiers on frozen features.

    Many learning rates and poolings are trained at once (DINOv2's way); the best is chosen on
    held-out images.

    \b
      TARGET data= test= floors= weights=    as in `patchmine eval knn`
      protocol=mae       MAE's single classifier, trained with LARS, instead
    \b
    Example:
      patchmine eval linear runs/hpm data=cifar10/train test=cifar10/test floors=true
    """
    from patchmine.cli.commands import read_words
    from patchmine.evaluate.linear import evaluate_linear
    from patchmine.evaluate.settings import LinearSettings

    _show(
        evaluate_linear(
            read_words(
                LinearSettings, context.args, command="eval linear", first=["target"], say=say
            ),
            say,
        )
    )


@command(evaluate, "video", "RUN data=VIDEOS [KEY=VALUE...]")
def eval_video(context: typer.Context) -> None:
    """Videos, as papers test them: several clips of each.

    kNN and a linear classifier learn from one clip of each training video; of a test video the
    scores of several clips and crops are averaged. `eval knn` and `eval linear` take one clip, from
    the middle.

    \b
      data= test= floors= weights=    as in `patchmine eval knn`, of videos
      segments=5 crops=3   test clips of each video, and crops of each of them
      image=runs/mae       floor: an encoder of images, averaged over the frames
      batch_size=256       frames that are encoded at once
    \b
    Example:
      patchmine eval video runs/video data=clips/train test=clips/test floors=true
    """
    from patchmine.cli.commands import read_words
    from patchmine.evaluate.settings import VideoSettings
    from patchmine.evaluate.video import evaluate_video

    given = read_words(VideoSettings, context.args, command="eval video", first=["target"], say=say)
    _show(evaluate_video(given, say))


def _show(results: dict[str, Any] | list[dict[str, Any]]) -> None:
    from rich.console import Console

    from patchmine.evaluate.measure import show_result

    for result in results if isinstance(results, list) else [results]:
        show_result(result, Console())

"""The program `patchmine`: it reads words and calls the rooms; torch waits until work starts."""

from __future__ import annotations

import difflib
from typing import Any

import click

from patchmine.cli.commands import COMMANDS, Command, page, perform
from patchmine.cli.program import ended_in_words, last_words, say_once

_HELP = """Pre-train vision backbones on your own unlabelled images and videos, and use them.

Settings are words, key=value, dotted where they are nested: method.mask_ratio=0.8. A misspelt one
is answered with the names that come near."""

_EXAMPLES = """\b
Start here:
  patchmine pretrain data=photos/ method=hpm out=runs/hpm   pre-train on a folder of images
  patchmine report runs/hpm out=report.html                 look at curves and pictures
  patchmine eval knn runs/hpm data=birds/ baselines=true    measure it, beside random weights
  patchmine finetune runs/hpm data=birds/ out=runs/birds    teach it your labels
  patchmine predict runs/birds photos/ out=birds.csv        and let it tell them
  patchmine list recipes                                    settings that are known to work
  patchmine config schema                                   every setting of a run
  patchmine COMMAND --help                                  the words of one command

\b
In Python:
  timm.create_model("local-dir:runs/hpm/export", pretrained=True)
  patchmine.pretrain(data="photos/", method="hpm", out="runs/hpm").encoder()"""

_GROUPS = {
    "eval": "Measure a frozen encoder on labelled images or videos.",
    "data": "Look at a data set, or pack it into shards.",
    "list": "List methods, models or recipes.",
    "config": "Show a run's settings before making it.",
    "bench": "Time training steps or the loading of data.",
}
_HELP_NAMES = {"help_option_names": ["--help", "-h"]}


class _Program(click.Command):
    """A command that gets its words as they are, "--epochs 3" too, to say how that is written."""

    def __init__(self, command: Command) -> None:
        take_all = dict(allow_extra_args=True, ignore_unknown_options=True, **_HELP_NAMES)
        name = command.name.split()[-1]
        super().__init__(name, context_settings=take_all)
        self.command = command

    def get_short_help_str(self, limit: int = 0) -> str:
        return self.command.help.split("\n")[0]

    def get_help(self, ctx: click.Context) -> str:
        return "\n".join(page(self.command))

    def invoke(self, ctx: click.Context) -> None:
        perform(self.command, ctx.args, say_once)


class _Group(click.Group):
    """Commands in the order in which they are met."""

    def __init__(self, name: str, help_text: str, **more: Any) -> None:
        super().__init__(
            name,
            help=help_text,
            no_args_is_help=True,
            options_metavar="",
            context_settings=_HELP_NAMES,
            **more,
        )

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in self.commands and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.commands)
            meant = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{meant}", ctx)
        return super().resolve_command(ctx, args)


class _App(_Group):
    """What the user can mend is told as one paragraph, and ends the program with exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        with ended_in_words():
            return super().invoke(ctx)


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from patchmine import __version__

        print(f"patchmine {__version__}")
        ctx.exit()


def _program() -> _App:
    version = click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_show_version,
        help="Show the version and exit.",
    )
    program = _App("patchmine", _HELP, epilog=_EXAMPLES, params=[version])
    for command in COMMANDS:
        group: click.Group = program
        first, _, inner = command.name.partition(" ")
        if inner:
            if first not in program.commands:
                program.add_command(_Group(first, _GROUPS[first]))
            group = program.commands[first]  # type: ignore[assignment]
        group.add_command(_Program(command))
    return program


app = _program()


def main() -> None:
    """Entry point of the program `patchmine`."""
    with last_words():
        app(prog_name="patchmine")


if __name__ == "__main__":
    main()

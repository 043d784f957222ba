"""Option groups that several commands share, so that each spells them the same."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from sparse_onnx.cli.output import Output, unwritable

Command = TypeVar("Command", bound=Callable[..., Any])


def reporting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--json`, `-q`, `-v` and `--debug`; the command receives them as one `output`."""

    @click.option(
        "--json", "json_to", metavar="FILE|-", help="Write the machine-readable report; - is standard output."
    )
    @click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
    @click.option("-v", "--verbose", is_flag=True, help="Print every pass, input and version as well.")
    @click.option("--debug", is_flag=True, help="Print the traceback of an error.")
    @functools.wraps(function)
    def wrapper(json_to: str | None, quiet: bool, verbose: bool, debug: bool, **arguments: Any) -> Any:
        if json_to is not None and json_to != "-" and (reason := unwritable(json_to)):
            raise click.BadParameter(reason, param_hint="--json")
        try:
            return function(output=Output(json_to, quiet, verbose), **arguments)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            if debug:
                traceback.print_exc()
            raise

    return wrapper


class TokenCounts(click.ParamType):
    """`1,64,256` -> (1, 64, 256)."""

    name = "tokens"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            counts = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            counts = ()
        if not counts or min(counts) < 1:
            self.fail(f"'{value}' is not a list of positive numbers such as 1,64,256", param, ctx)
        return counts


class Pixels(click.ParamType):
    """`336x448` -> (336, 448)."""

    name = "pixels"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        height, _, width = str(value).lower().partition("x")
        if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            self.fail(f"'{value}' is no height and width such as 336x448", param, ctx)
        return int(height), int(width)


def tokens(default: str, text: str) -> Callable[[Command], Command]:
    return click.option(
        "--tokens", type=TokenCounts(), default=default, show_default=True, metavar="N,N", help=text
    )


def threads(default: int | None, text: str) -> Callable[[Command], Command]:
    return click.option(
        "--threads", type=click.IntRange(min=1), default=default, show_default=default is not None, help=text
    )


def target(function: Command) -> Command:
    return click.option(
        "--target", default="cpu", show_default=True, metavar="NAME", help="`sparse-onnx targets` lists them."
    )(function)


def show(function: Command) -> Command:
    """`[show NAME]` of a catalogue: the command receives `name`, None for the whole list."""

    @click.argument("action", metavar="[show NAME]", required=False, type=click.Choice(["show"]))
    @click.argument("name", metavar="", required=False)
    @functools.wraps(function)
    def wrapper(action: str | None, name: str | None, **arguments: Any) -> Any:
        if action is not None and name is None:
            raise click.UsageError("'show' needs a NAME")
        return function(name=name, **arguments)

    return wrapper  # type: ignore[return-value]


def model(name: str) -> Callable[[Command], Command]:
    """A positional path of a model. The loader judges whether it can be read."""
    return click.argument(name, metavar=name.upper(), type=click.Path(path_type=Path))

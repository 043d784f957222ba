"""`sparse-onnx`: commands imported on use, and the one place where errors become lines and exit codes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from sparse_onnx import __version__
from sparse_onnx.cli.streams import lasting_streams
from sparse_onnx.cli.text import one_line
from sparse_onnx.core.errors import SparseOnnxError

#: Command -> its line in `--help`. Stated here so that the list is printed without importing any command.
COMMANDS = {
    "export": "PyTorch -> ONNX with the sparse blocks whole, checked on inputs that were not traced.",
    "optimize": "Rewrite a model so that ONNX Runtime skips what is not active.",
    "inspect": "What is sparse in a model: blocks, routers, experts, total and active parameters.",
    "verify": "Do two models give the same answers?",
    "bench": "Interleaved timing of models at several token counts.",
    "calibrate": "What the layers read and where the tokens go, measured on your data.",
    "diff": "What changed between two models: nodes, blocks, weights.",
    "package": "A folder ready to ship: the model, what it needs, and runners that check it.",
    "kernels": "The native kernels: compile them, or say where they are.",
    "passes": "The catalogue of passes; `passes show NAME` explains one.",
    "targets": "The catalogue of targets; `targets show NAME` explains one.",
}

INTERRUPTED = 130


class Commands(click.Group):
    """A group of lazily imported commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"sparse_onnx.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs a command line and exits with its code; an error is one line on standard error."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        with lasting_streams():
            code = self._guarded(args, prog_name or "sparse-onnx", complete_var, **extra)
        sys.exit(code)

    def _guarded(
        self, args: Sequence[str] | None, prog_name: str, complete_var: str | None, **extra: Any
    ) -> int:
        try:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra) or 0
        except click.exceptions.NoArgsIsHelpError as help_text:
            click.echo(help_text.format_message())
            return help_text.exit_code
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "sparse-onnx"
            return _fail(error.format_message().rstrip("."), f"see `{path} --help`", error.exit_code)
        except click.ClickException as error:
            return _fail(error.format_message(), "", error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            return _fail("interrupted", "", INTERRUPTED)
        except SparseOnnxError as error:
            message = f"{error.where}: {error.message}" if error.where else error.message
            return _fail(message, error.hint, error.exit_code)
        except OSError as error:
            named = f"{error.filename}: " if error.filename else ""
            return _fail(f"{named}{error.strerror or error}", "", 1)
        except Exception as error:
            return _fail(f"{type(error).__name__}: {error}", "unexpected; `--debug` shows the traceback", 1)


def _fail(message: str, hint: str, code: int) -> int:
    click.echo(f"error: {one_line(message)}" + (f"; {one_line(hint)}" if hint else ""), err=True)
    return code


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sparse-onnx")
def main() -> None:
    """Sparsely activated models on ONNX Runtime: export them whole, run only what is active.

    \b
    sparse-onnx export path/to/hf-model model.onnx
    sparse-onnx optimize model.onnx model.cpu.onnx --target cpu
    sparse-onnx bench model.onnx model.cpu.onnx

    Exit codes: 0 ok; 1 failed outside our control; 2 usage; 3 model unreadable or unsafe; 4 verification
    or budget failed, nothing written; 5 not possible.
    """

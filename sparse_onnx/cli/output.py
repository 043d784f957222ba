"""Where a command's words go: tables, the JSON report, progress."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from sparse_onnx.cli.text import one_line
from sparse_onnx.core.report import SCHEMA, Report, tool_versions

#: Wide enough that no cell is cut: output that is not a terminal is read by programs, or wrapped by a pager.
_UNBOUNDED = 100_000


@dataclasses.dataclass(frozen=True)
class Output:
    """`json_to` is a path, "-" or None. Tables go to standard output unless the JSON does."""

    json_to: str | None = None
    quiet: bool = False
    verbose: bool = False

    @contextlib.contextmanager
    def progress(self, start: str) -> Iterator[Callable[[str], None] | None]:
        """A status line on a terminal, plain lines elsewhere, nothing when quiet."""
        if self.quiet:
            yield None
            return
        errors = console(sys.stderr)
        if not errors.is_terminal:
            yield lambda line: errors.print(one_line(line))
            return
        with errors.status(Text(one_line(start))) as status:  # a str would be read as markup

            def update(line: str) -> None:
                if self.verbose:
                    errors.print(one_line(line))
                status.update(Text(one_line(line)))

            yield update

    @contextlib.contextmanager
    def bar(self, start: str) -> Iterator[Callable[[str, int, int], None] | None]:
        """A progress bar on a terminal, a plain line now and then elsewhere, nothing when quiet."""
        if self.quiet:
            yield None
            return
        errors = console(sys.stderr)
        if not errors.is_terminal:
            yield _lines(lambda text: errors.print(one_line(text)), start)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=errors, transient=True) as drawn:
            task = drawn.add_task(one_line(start), total=None)
            yield lambda text, done, total: drawn.update(
                task, description=one_line(text), completed=done, total=total
            )

    def report(self, report: Report, *, explain: bool = False) -> None:
        """The report as tables, and as JSON where it is asked for."""
        from sparse_onnx.cli.render import render

        self._emit(report.dumps(), lambda out: render(report, out, verbose=self.verbose, explain=explain))

    def catalogue(self, command: str, entries: Any, view: Callable[[Console], None]) -> None:
        """A catalogue (passes, targets): `entries` is the JSON, `view` draws the same for people."""
        data = {"schema": SCHEMA, "command": command, "tool": tool_versions(), command: entries}
        self._emit(json.dumps(data, indent=1, allow_nan=False), view)

    def document(self, data: str, view: Callable[[Console], None]) -> None:
        """A command's own JSON document, of which `view` draws the same for people."""
        self._emit(data.rstrip("\n"), view)

    def _emit(self, data: str, view: Callable[[Console], None]) -> None:
        if self.json_to not in (None, "-"):
            _write(str(self.json_to), data + "\n")
        if not self.quiet:
            view(console(sys.stderr if self.json_to == "-" else sys.stdout))
        if self.json_to == "-":
            print(data)
        sys.stdout.flush()


def _lines(say: Callable[[str], None], start: str) -> Callable[[str, int, int], None]:
    """Says each new kind of work, and then each further tenth of it."""
    said: dict[str, int] = {}
    say(start)

    def update(text: str, done: int, total: int) -> None:
        tenth = 10 * done // max(1, total)
        if said.get(text) != tenth:
            said[text] = tenth
            say(f"{text}: {done} of {total}")

    return update


def unwritable(path: str) -> str:
    """Why no report can be written to `path`, known before the work that it would report; else empty."""
    if not path:
        return "'' is no file name"
    real = os.path.realpath(path)
    folder = os.path.dirname(real)
    if os.path.isdir(real):
        return f"'{path}' is a folder"
    if not os.path.isdir(folder):
        return f"no folder for '{path}'"
    written = real if os.path.exists(real) and not os.path.isfile(real) else folder  # a file is replaced
    return "" if os.access(written, os.W_OK) else f"no permission to write '{path}'"


def _write(path: str, text: str) -> None:
    """Whole or not at all where the path is a file or free; straight through where it is a pipe or device."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(text)
        return
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def console(stream: Any) -> Console:
    """A console that interprets nothing in what it prints: no markup, no emoji codes, no highlighting."""
    terminal = Console(file=stream, markup=False, emoji=False, highlight=False)
    if terminal.is_terminal:
        return terminal
    return Console(
        file=stream,
        markup=False,
        emoji=False,
        highlight=False,
        width=_UNBOUNDED,
        soft_wrap=True,
        no_color=True,
    )

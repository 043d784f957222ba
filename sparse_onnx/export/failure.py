"""Other people's exceptions as one line, and the end that comes from outside."""

from __future__ import annotations

import contextlib
import signal
import threading
import types
from collections.abc import Iterator

from sparse_onnx.graph.text import printable, root_cause


def first_line(error: BaseException) -> str:
    """What the error says in its first line, and in the next one where that announces it with a colon; its type where
    it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    announced = 2 if lines and lines[0].endswith(":") else 1
    return printable(" ".join(lines[:announced])) if lines else type(error).__name__


def root_line(error: BaseException) -> str:
    """Type and first line of the error that caused it all: torch wraps them in pages of advice."""
    root = root_cause(error)
    line = first_line(root)
    return line if line == type(root).__name__ else f"{type(root).__name__}: {line}"


class Terminated(SystemExit):
    """SIGTERM, as an exception that cleans up on its way."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM raises `Terminated` in the main thread, unless the program handles it itself."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def terminate(number: int, frame: types.FrameType | None) -> None:
        raise Terminated(128 + number)

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

"""Standard output and error that end no work: a reader that went away, or a stream closed from the start."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Lossy(io.FileIO):
    """A descriptor whose writes count as done when nobody reads them any more."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """While it lasts, no write to `sys.stdout` or `sys.stderr` fails because its reader is gone (`| head`), or
    because it was closed (`>&-`), whoever writes. What cannot be encoded is escaped."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_lasting, before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a full disk was reported when it was written to
                stream.flush()
        sys.stdout, sys.stderr = before


def _lasting(stream: TextIO | None) -> TextIO:
    if stream is None:  # what Python makes of a closed one
        return open(os.devnull, "w", encoding="utf-8")
    try:
        stream.flush()
        raw = _Lossy(stream.fileno(), "w", closefd=False)
    except BrokenPipeError:  # something was written before, in vain
        return open(os.devnull, "w", encoding="utf-8")
    except (OSError, ValueError, AttributeError):  # no file behind it: a test's or a notebook's
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",  # a name in a file may not exist in the terminal's encoding
        line_buffering=getattr(stream, "line_buffering", False),
    )

"""Python's garbage collector, held up while a graph is built."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No collection of cycles inside: a graph of 300,000 nodes is millions of objects, all of them alive, and going
    through them again and again takes most of the time of loading, copying or rewriting it."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()

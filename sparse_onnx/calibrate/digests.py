"""Files of data by their content: what was calibrated on is no evidence of quality, whatever it is called."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from sparse_onnx.calibrate.text import plain_file

_CHUNK = 1 << 20


def digest(path: Path) -> str:
    """The SHA-256 of a file's content.

    Raises:
        UsageError: it cannot be read, or is no plain file.
    """
    found = hashlib.sha256()
    with plain_file(path) as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def digests(paths: Sequence[Path]) -> tuple[str, ...]:
    return tuple(map(digest, paths))

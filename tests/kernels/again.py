"""What every kernel's tests do: concurrent runs of one session, and all tests again on older processors' code."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence

import numpy as np
import onnxruntime
import pytest


def concurrently(
    run: onnxruntime.InferenceSession, feeds: Sequence[dict[str, np.ndarray]], first: Sequence[np.ndarray]
) -> None:
    """Four threads run two inputs five times each: every answer must be the first one, to the bit."""
    failures: list[str] = []

    def work(number: int) -> None:
        for _ in range(5):
            if not np.array_equal(run.run(None, feeds[number])[0], first[number]):
                failures.append(f"input {number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def on_level(level: str, file: str) -> None:
    """Runs a test file again, as a processor of that level would."""
    if "SPARSE_ONNX_KERNEL_LEVEL" in os.environ:
        pytest.skip("this is that run")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "SPARSE_ONNX_KERNEL_LEVEL": level}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:]

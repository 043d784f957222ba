"""Creation time and resident memory of one model, in a process of its own.

`python -m sparse_onnx.bench.memory MODEL THREADS TOKENS[,TOKENS...]` prints ``{"create_s": ..., "rss_mb":
...}``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from sparse_onnx.core.report import BenchModel


def measure(path: str | os.PathLike[str], threads: int, tokens: Sequence[int]) -> BenchModel:
    """What a session of the model costs: seconds to create it, and megabytes by which the process then grows.

    The memory is taken after a run of every token count: weights that are mapped but never read do not count.
    Both are None where the process fails, as it does when memory runs out.
    """
    command = [
        sys.executable,
        "-m",
        __name__,
        os.path.abspath(path),
        str(threads),
        ",".join(map(str, tokens)),
    ]
    # `-m` puts the working directory first in the import path: not one that a model came in.
    result = subprocess.run(command, cwd=os.sep, capture_output=True, text=True, check=False)
    try:
        values = json.loads(result.stdout)
    except ValueError:
        return BenchModel(os.fspath(path), None, None)
    return BenchModel(os.fspath(path), values["create_s"], values["rss_mb"])


def _resident_mb() -> float | None:
    """Resident memory of this process, mapped files included; None where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(arguments: Sequence[str]) -> None:
    from sparse_onnx.graph import io
    from sparse_onnx.targets import session as sessions
    from sparse_onnx.verify.inputs import sized_inputs

    path, threads, tokens = arguments
    model = io.load(path)
    feeds = [sized_inputs(model, 1, int(count)) for count in tokens.split(",")]
    del model
    import onnxruntime  # noqa: F401 - its own memory is not the model's

    before = _resident_mb()
    start = time.perf_counter()
    session = sessions.create_session(path, threads=int(threads))
    create = time.perf_counter() - start
    for feed in feeds:
        sessions.run(session, feed)
    after = _resident_mb()
    grown = None if before is None or after is None else round(after - before, 1)
    print(json.dumps({"create_s": round(create, 4), "rss_mb": grown}))


if __name__ == "__main__":
    main(sys.argv[1:])

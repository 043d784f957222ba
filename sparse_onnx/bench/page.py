"""The page of a package in headless Chromium, and the picture of it in the docs.

python -m sparse_onnx.bench.page docs/images/page.png
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparse_onnx.core.errors import OutsideError, UsageError
from sparse_onnx.targets import runtimes

_BROWSER = "chromium"
_PROMPT = 'The "with" statement is used to '


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of the folder, on this machine alone."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def browse(folder: Path, **request: Any) -> dict[str, Any]:
    """What the browser shows of a package's page; the request is described in `browse.mjs`.

    Returns:
        `status` and whether it is `wrong`, what was said when it was `loaded`, lines of the `console`, addresses of the
        `requests`; after generating the `text`, `speed`, and by byte and layer the `experts` whose cells are coloured.

    Raises:
        UsageError: the browser is not installed.
        OutsideError: it cannot be driven.
    """
    runtime = runtimes.get(_BROWSER)
    if not runtime.installed:
        raise UsageError(
            f"{_BROWSER} is not installed", f"python -m sparse_onnx.targets.runtimes install {_BROWSER}"
        )
    with served(folder) as address:
        command = [
            "node",
            str(Path(__file__).with_name("browse.mjs")),
            str(runtime.folder),
            address,
            json.dumps(request),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **runtime.variables()}
        )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line]
        raise OutsideError(f"the browser cannot be driven: {lines[0] if lines else done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(arguments: Sequence[str]) -> None:
    import sparse_onnx

    if len(arguments) != 1:
        raise UsageError("page: name the picture to write")
    with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as name:
        folder = Path(name)
        sparse_onnx.export("zoo:byte-moe", folder / "byte.onnx")
        sparse_onnx.package(folder / "byte.onnx", folder / "page", target="wasm")
        shots = {os.path.abspath(arguments[0]): ""}
        told = browse(folder / "page", prompt=_PROMPT, length=60, height=1000, shots=shots)
    print(told["status"], told["speed"])


if __name__ == "__main__":
    from sparse_onnx.core.errors import SparseOnnxError

    try:
        main(sys.argv[1:])
    except SparseOnnxError as error:
        sys.exit(f"error: {error}")

"""Sessions in a runtime that is installed beside this one: each runtime is a process, which `worker` serves."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import math
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_onnx.targets.runtimes import Runtime

#: Seconds that a request may take: a simulator needs minutes for what the device does at once.
_PATIENCE = 600.0

_BY_ORT_NAME = {"float": "float32", "double": "float64"}


class RemoteError(Exception):
    """What went wrong in the other process. `kind` is its exception's name, `died` where it ended with it."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output, as onnxruntime describes it."""

    name: str
    type: str
    shape: list[int | str | None]


class RemoteSession:
    """A model in another runtime, with those methods of onnxruntime's `InferenceSession` that are used here."""

    def __init__(
        self,
        runtime: Runtime,
        model: str | os.PathLike[str],
        options: Mapping[str, str],
        config: Mapping[str, str],
        *,
        record: bool = False,
        optimize: bool = True,
    ) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="sparse-onnx-")
        self._server = _server(runtime)
        made = self._server.ask(
            do="create",
            model=os.path.abspath(model),
            providers=[[name, dict(options)] for name in runtime.providers],
            config=dict(config),
            profile=str(Path(self._scratch.name) / "profile") if record else None,
            optimize=optimize,
        )
        self._id = made["id"]
        self.version: str = made["version"]
        self._inputs = [Port(*each) for each in made["inputs"]]
        self._outputs = [Port(*each) for each in made["outputs"]]

    def get_inputs(self) -> list[Port]:
        return self._inputs

    def get_outputs(self) -> list[Port]:
        return self._outputs

    def run(self, names: None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """All outputs."""
        del names
        sent = []
        for number, (name, array) in enumerate(feeds.items()):
            file = Path(self._scratch.name) / f"i{number}"
            np.ascontiguousarray(array).tofile(file)
            sent.append([name, array.dtype.name, list(array.shape), str(file)])
        reply = self._server.ask(do="run", id=self._id, feeds=sent, folder=self._scratch.name)
        return [_read(*each) for each in reply["outputs"]]

    def placement(self) -> dict[str, Any]:
        """Which provider got which nodes, behind one run; see `worker`."""
        return self._server.ask(do="placement", id=self._id)

    def __del__(self) -> None:
        server = getattr(self, "_server", None)
        if server is not None and server.alive and hasattr(self, "_id"):
            with contextlib.suppress(RemoteError, OSError, ValueError):
                server.ask(do="close", id=self._id)


def _read(dtype: str, shape: Sequence[int], file: str) -> np.ndarray:
    dtype = _BY_ORT_NAME.get(dtype, dtype)
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    return np.fromfile(file, dtype).reshape(shape)


class _Server:
    """The process of one runtime. One that died or hangs is told as such, and the next session starts another."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._replies, theirs = os.pipe()
        self._process = subprocess.Popen(
            [*runtime.command, str(theirs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs],
            env={**os.environ, **runtime.variables()},
        )
        os.close(theirs)
        self._rest = b""

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, **request: Any) -> dict[str, Any]:
        """
        Raises:
            RemoteError: the request failed, or the process ended or hangs.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            reply = json.loads(self._line(request["do"]))
        except BrokenPipeError:
            raise RemoteError(f"{self.runtime.name}: its process has ended", "Died") from None
        if "error" in reply:
            raise RemoteError(reply["error"], reply["kind"])
        return reply

    def _line(self, doing: str) -> bytes:
        end = time.monotonic() + _PATIENCE
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._replies], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._replies, 1 << 16) if ready else b""
            if not part:
                self.end()
                how = "ended" if ready else f"gave no answer within {_PATIENCE:.0f} s"
                code = self._process.returncode
                signal = f" by signal {-code}" if ready and code is not None and code < 0 else ""
                raise RemoteError(f"{self.runtime.name}: its process {how}{signal} in '{doing}'", "Died")
            self._rest += part
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def end(self) -> None:
        if self.alive:
            try:
                self._process.wait(0.5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


_servers: dict[str, _Server] = {}


def _server(runtime: Runtime) -> _Server:
    known = _servers.get(runtime.name)
    if known is None or not known.alive:
        known = _servers[runtime.name] = _Server(runtime)
    return known


@atexit.register
def _end_all() -> None:
    for server in _servers.values():
        if server.alive:
            server._process.kill()

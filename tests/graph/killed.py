"""Saves are killed: `python killed.py FOLDER` prints how many of them left the old and the new model.

Version v of the model holds nothing but v: in weights copied from a file, in some from memory, in the graph.
"""

from __future__ import annotations

import collections
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.graph.io import load, save

SIZE = 30_000
_COUNTED = ("open", "os.rename", "os.remove", "os.truncate", "os.listdir", "mmap.__new__")


def version(folder: Path, number: int) -> ir.Model:
    np.full(SIZE, number, np.float32).tofile(folder / f"{number}.bin")
    file = ir.ExternalTensor(
        f"{number}.bin", 0, 4 * SIZE, ir.DataType.FLOAT, shape=ir.Shape([SIZE]), name="file", base_dir=folder
    )
    memory = ir.tensor(np.full(SIZE, number, np.float32), name="memory")
    inline = ir.tensor(np.full(3, number, np.float32), name="inline")
    values = [ir.Value(name=tensor.name, const_value=tensor) for tensor in (file, memory, inline)]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 20}, name=f"version {number}")
    return ir.Model(graph, ir_version=10)


def found(out: Path) -> int:
    """The version in the file; fails when it is a mixture or cannot be read."""
    model = load(out)
    contents = {
        float(number)
        for value in model.graph.initializers.values()
        if value.const_value is not None
        for number in np.unique(value.const_value.numpy())
    }
    assert len(contents) == 1 and model.graph.name == f"version {int(min(contents))}", contents
    return int(min(contents))


def in_child(work: Callable[[], None]) -> int:
    """Process id of a child that does the work, and exits with 0."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child


def die_at(step: int) -> None:
    """Kills this process at the n-th of the calls by which a save changes files."""
    steps = itertools.count(1)

    def count() -> None:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **named: object) -> object:
            count()
            result = function(*arguments, **named)
            count()
            return result

        return wrapped

    for name in ("copy_file_range", "fsync", "fchmod", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    sys.addaudithook(lambda event, _: count() if event in _COUNTED else None)


def main(folder: Path) -> None:
    # What a killed process wrote, the system keeps: only a machine that stops needs the disk, and costs a minute here.
    os.fsync = lambda _: None
    (folder / "out").mkdir()
    out = folder / "out" / "m.onnx"
    versions = [version(folder, 1), version(folder, 2)]
    save(versions[0], out)
    outcomes: collections.Counter[str] = collections.Counter()

    def judge(old: int, where: str) -> int:
        now = found(out)
        graph = out.read_bytes()
        for path in out.parent.iterdir():  # a kill leaves a file without use; with them, steps would grow
            if path != out and path.name.encode() not in graph:
                path.unlink()
        outcomes[f"{where}: {'old' if now == old else 'new'}"] += 1
        return now

    current = 1
    for step in itertools.count(1):
        new = versions[2 - current]

        def work(step: int = step, new: ir.Model = new) -> None:
            die_at(step)
            save(new, out)

        _, status = os.waitpid(in_child(work), 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        current = judge(current, "step")
    current = found(out)

    def forever() -> None:
        for new in itertools.cycle(reversed(versions)):
            save(new, out)

    chance = random.Random(0)
    for _ in range(20):
        child = in_child(forever)
        time.sleep(chance.uniform(0.001, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        current = judge(current, "random")
    save(versions[2 - current], out)
    assert found(out) == 3 - current
    print(dict(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What experts cost that are never routed to: `python -m sparse_onnx.bench.resident`.

    x = x + block(x)   2 layers of 64 experts, top-2, hidden 1024, inner 768; the routers choose among 3 experts only

Each file is loaded in a process of its own: its resident memory after creation and after 100 runs, and after
`targets.session.release_memory` and as many runs again. Then the files run interleaved in one process. They are the
grouped form as `optimize` writes it, the same with `--weights prepacked`, and `com.microsoft::MoE` of the same layers.
Needs torch and transformers, 5 GB of disk and of memory.

`python -m sparse_onnx.bench.resident --model MODEL` measures one file in this process, and prints JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparse_onnx.bench.tables import markdown, number
from sparse_onnx.core.errors import VerificationError
from sparse_onnx.core.report import BenchRow

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from sparse_onnx.bench.layers import SparseLayers

ORDINARY, PREPACKED, FUSED = "grouped", "grouped, --weights prepacked", "com.microsoft::MoE"
RUNS = 100
TOKENS = (1, 8, 64)

HOT = 3
_LOGIT = 0.1  # of a hot expert, for each unit of a token's sum

_MODULE = "sparse_onnx.bench.resident"  # __name__ is __main__ when it runs


@dataclasses.dataclass(frozen=True)
class Resident:
    """One session: seconds to create it, and megabytes by which the process grew since before: `own` are memory of its
    own, which only a swap file could take; the rest are pages of files, which the system takes back when it needs them.
    `released` is as `ran`, behind `release_memory` and as many runs again."""

    model: str
    file_mb: float
    create_s: float
    created: dict[str, float | None]
    ran: dict[str, float | None]
    released: dict[str, float | None]


def memory_mb() -> dict[str, float]:
    """This process's memory by the names of `/proc/self/status`, in megabytes; empty where there is no such file."""
    found = {}
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in ("VmRSS", "VmHWM", "RssAnon", "RssFile"):
                found[name] = int(value.split()[0]) / 2**10
    return found


def forget_peak() -> None:
    """Lets `VmHWM` begin anew, where the system can."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def layers(*, hidden: int, experts: int, inner: int, layers: int = 2) -> SparseLayers:
    """Layers whose routers choose 2 of the first `HOT` experts, for tokens whose values are mostly positive."""
    import torch

    from sparse_onnx.bench.layers import qwen3_layers

    made = qwen3_layers(hidden=hidden, experts=experts, top_k=2, inner=inner, layers=layers)
    generator = torch.Generator().manual_seed(1)
    for block in made.parts:
        block.gate.weight.zero_()
        block.gate.weight[:HOT] = _LOGIT * (1 + torch.randn((HOT, hidden), generator=generator))
        block.experts.down_proj.mul_(0.1)  # so that values stay positive from layer to layer
    return made


def tokens(count: int, hidden: int, seed: int) -> npt.NDArray[np.float32]:
    import numpy as np

    return np.abs(np.random.default_rng(seed).standard_normal((count, hidden), dtype=np.float32))


def write(made: SparseLayers, folder: Path) -> dict[str, Path]:
    """The files by the name of their row.

    Raises:
        VerificationError: packed weights are missing.
    """
    import torch

    from sparse_onnx.bench import rivals
    from sparse_onnx.export.api import export
    from sparse_onnx.optimize.api import optimize

    paths = {name: folder / f"{number}.onnx" for number, name in enumerate((ORDINARY, PREPACKED, FUSED))}
    neutral = folder / "neutral.onnx"
    sample = {"hidden_states": torch.from_numpy(tokens(7, made.config.hidden_size, 0))}
    export((made, sample, {"hidden_states": {0: "tokens"}}), neutral)
    optimize(neutral, paths[ORDINARY], form="grouped", weights="copy")
    optimize(neutral, paths[PREPACKED], form="grouped", weights="prepacked")
    rivals.build_contrib_moe(made, paths[FUSED])
    if b"prepacked_0" not in paths[PREPACKED].read_bytes():
        raise VerificationError("ONNX Runtime packed no weights", where=os.fspath(paths[PREPACKED]))
    return paths


def run(name: str, path: Path, threads: int, runs: int = RUNS) -> Resident:
    """Loads and runs the file in a process of its own.

    Raises:
        VerificationError: the process failed.
    """
    command = [sys.executable, "-m", _MODULE, "--model", str(path.resolve())]
    command += ["--threads", str(threads), "--runs", str(runs)]
    result = subprocess.run(command, cwd=os.sep, capture_output=True, text=True, check=False)
    if result.returncode:
        raise VerificationError(result.stderr.strip()[-500:], where=name)
    data = path.with_name(f"{path.stem}.data")
    data = data if data.exists() else path.with_name(f"{path.name}.data")
    return Resident(name, round(data.stat().st_size / 2**20, 1), **json.loads(result.stdout))


def measure(path: Path, threads: int, runs: int) -> dict[str, object]:
    """What one session takes in this process."""
    import onnxruntime  # noqa: F401 - its own memory is not the model's

    from sparse_onnx.targets import session as sessions

    before = memory_mb()

    def grown() -> dict[str, float | None]:
        now = memory_mb()
        names = {"all": "VmRSS", "own": "RssAnon"}
        return {
            key: round(now[name] - before[name], 1) if name in now and name in before else None
            for key, name in names.items()
        }

    start = time.perf_counter()
    session = sessions.create_session(path, threads=threads)
    create_s = round(time.perf_counter() - start, 3)
    states = [grown()]
    [entry] = session.get_inputs()
    for release in (False, True):
        if release:
            sessions.release_memory(path)
        for number_ in range(runs):
            sessions.run(session, {entry.name: tokens(1, entry.shape[-1], number_)})
        states.append(grown())
    created, ran, released = states
    return {"create_s": create_s, "created": created, "ran": ran, "released": released}


def race(paths: dict[str, Path], hidden: int, threads: int, min_time: float = 2.0) -> list[BenchRow]:
    """Times relative to the first file, interleaved, at each of `TOKENS`.

    Raises:
        VerificationError: a file gives other answers than the first.
    """
    from sparse_onnx.bench import contestants
    from sparse_onnx.bench.api import INPUTS
    from sparse_onnx.bench.measure import interleave, rows

    sessions = {name: contestants.create(path, threads) for name, path in paths.items()}
    found: list[BenchRow] = []
    for count in TOKENS:
        feeds = [{"hidden_states": tokens(count, hidden, seed)} for seed in range(INPUTS)]
        runs = [contestants.onnx(name, session, feeds) for name, session in sessions.items()]
        contestants.check(runs[0], runs[1:], INPUTS)
        found += rows([item.name for item in runs], count, interleave(runs, INPUTS, min_time=min_time))
    return found


def as_text(results: Sequence[Resident], rows: Sequence[BenchRow]) -> str:
    """A row a file. Memory in megabytes, of it the process's own behind the slash."""
    ratios = {(row.model, row.tokens): row.ratio_to_first for row in rows}
    lines = []
    for result in results:
        states = (result.created, result.ran, result.released)
        memory = [f"{number(state['all'], '.0f')} / {number(state['own'], '.0f')}" for state in states]
        times = [number(ratios.get((result.model, count)), ".2f") for count in TOKENS]
        cells = [result.model, f"{result.file_mb:.0f}", f"{result.create_s:.2f}"]
        lines.append([*cells, *memory, *times])
    columns = [
        "resident MB / not in files",
        "file MB",
        "create s",
        "created",
        f"{RUNS} runs",
        "released, as many",
    ]
    return markdown([*columns, *(f"time, {count} tokens" for count in TOKENS)], lines)


@click.command()
@click.option("--hidden", type=int, default=1024, show_default=True)
@click.option("--inner", type=int, default=768, show_default=True)
@click.option("--experts", type=int, default=64, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--runs", type=click.IntRange(min=1), default=RUNS, show_default=True)
@click.option("--json", "json_to", type=click.Path(path_type=Path), default="out/resident.json")
@click.option("--model", type=click.Path(path_type=Path), hidden=True)
def main(
    hidden: int, inner: int, experts: int, threads: int, runs: int, json_to: Path, model: Path | None
) -> None:
    """Resident memory and speed of a model most of whose experts are never used."""
    if model is not None:
        click.echo(json.dumps(measure(model, threads, runs)))
        return
    json_to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=json_to.parent, prefix="resident-") as folder:
        paths = write(layers(hidden=hidden, experts=experts, inner=inner), Path(folder))
        results = [run(name, path, threads, runs) for name, path in paths.items()]
        rows = race(paths, hidden, threads)
    data = {
        "models": [dataclasses.asdict(item) for item in results],
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    json_to.write_text(json.dumps(data, indent=1) + "\n")
    click.echo(as_text(results, rows))


if __name__ == "__main__":
    main()

"""How long a session of a deep model with many experts takes to create: `python -m sparse_onnx.bench.startup`.

One layer is exported and repeated, with weights of its own each time, and `optimize` lowers the whole. Each model is
then loaded in processes of their own, with ORT's default options and with those that the documents give to users:
`SessionOptions.enable_mem_reuse = False` (the reason is at `targets.session.plans_memory_reuse`). The last model has
layers of a real width: what the option does to the memory of activations shows there. Needs torch and transformers.

`python -m sparse_onnx.bench.startup --model MODEL` measures one file in this process, and prints JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
import onnx_ir as ir

from sparse_onnx.bench.resident import forget_peak, memory_mb
from sparse_onnx.bench.tables import markdown, number
from sparse_onnx.core.errors import VerificationError

TOKENS = (1, 256)

_MODULE = "sparse_onnx.bench.startup"  # __name__ is __main__ when it runs


@dataclasses.dataclass(frozen=True)
class Model:
    layers: int
    experts: int
    hidden: int
    inner: int
    top_k: int = 8

    def __str__(self) -> str:
        return f"{self.layers} x {self.experts} experts, hidden {self.hidden}, inner {self.inner}"


MODELS = (*(Model(layers, 128, 64, 32) for layers in (4, 12, 48)), Model(12, 64, 1024, 64))


@dataclasses.dataclass(frozen=True)
class Created:
    """One session: seconds to create it, None where they exceed the limit; by token count, the megabytes that a run
    adds at its peak."""

    model: str
    nodes: int
    documented: bool
    create_s: float | None
    run_peak_mb: dict[str, float | None]


def write(model: Model, path: Path) -> int:
    """The model in grouped form.

    Returns:
        How many nodes it has.

    Raises:
        VerificationError: not all of its blocks were lowered.
    """
    from sparse_onnx.bench import scaling, spelled
    from sparse_onnx.bench.layers import qwen3_layers
    from sparse_onnx.optimize.api import optimize

    sizes = {"hidden": model.hidden, "inner": model.inner, "experts": model.experts, "top_k": model.top_k}
    one, source = (path.with_name(f"{name}-{path.name}") for name in ("one", "source"))
    spelled.write_batched(qwen3_layers(layers=1, **sizes), one)
    single = ir.load(one)
    ir.external_data.load_to_model(single)
    ir.save(scaling.repeat(single, model.layers), source, external_data=f"{source.name}.data")
    report = optimize(source, path, form="grouped", weights="copy", verify="none")
    lowered = sum(block.form == "grouped" for block in report.blocks)
    if lowered != model.layers or report.output is None:
        raise VerificationError(f"{lowered} of {model.layers} blocks lowered", where=str(model))
    return report.output.nodes


def run(model: Model, path: Path, nodes: int, documented: bool, threads: int, limit_s: float) -> Created:
    """Loads the file in a process of its own, and gives up after `limit_s` seconds.

    Raises:
        VerificationError: the process failed.
    """
    command = [sys.executable, "-m", _MODULE, "--model", str(path.resolve()), "--threads", str(threads)]
    if documented:
        command.append("--documented")
    try:
        result = subprocess.run(
            command, cwd=os.sep, capture_output=True, text=True, check=False, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return Created(str(model), nodes, documented, None, {})
    if result.returncode:
        raise VerificationError(result.stderr.strip()[-500:], where=str(model))
    return Created(str(model), nodes, documented, **json.loads(result.stdout))


def measure(path: Path, documented: bool, threads: int) -> dict[str, object]:
    """What one session takes in this process."""
    import numpy as np
    import onnxruntime

    from sparse_onnx.targets import session as sessions

    options = sessions.session_options(threads)
    options.enable_mem_reuse = not documented
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    created = time.perf_counter() - start
    [entry] = session.get_inputs()
    peaks: dict[str, float | None] = {}
    for tokens in TOKENS:
        rows = np.random.default_rng(tokens).standard_normal((tokens, entry.shape[-1]), dtype=np.float32)
        before = memory_mb().get("VmRSS")
        forget_peak()
        sessions.run(session, {entry.name: rows})
        after = memory_mb().get("VmHWM")
        peaks[str(tokens)] = None if before is None or after is None else round(after - before, 1)
    return {"create_s": round(created, 3), "run_peak_mb": peaks}


def as_text(results: Sequence[Created], limit_s: float) -> str:
    """A row a model: default options, then the documented ones."""
    lines = []
    for name in dict.fromkeys(result.model for result in results):
        default, documented = sorted(
            (result for result in results if result.model == name), key=lambda result: result.documented
        )
        cells = [name, str(default.nodes)]
        for result in (default, documented):
            cells.append(f"> {limit_s:.0f}" if result.create_s is None else f"{result.create_s:.1f}")
        for count in TOKENS:
            peaks = (result.run_peak_mb.get(str(count)) for result in (default, documented))
            cells += [number(peak, ".1f") for peak in peaks]
        lines.append(cells)
    columns = ["layers x experts", "nodes", "create s", "create s, documented"]
    for count in TOKENS:
        columns += [f"run of {count} adds MB", "documented"]
    return markdown(columns, lines)


@click.command()
@click.option("--layers", type=int, multiple=True, help="Only models of so many layers; repeatable.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--limit", type=float, default=300.0, show_default=True, help="Seconds until a session is given up."
)
@click.option("--json", "json_to", type=click.Path(path_type=Path), default="out/startup.json")
@click.option("--model", type=click.Path(path_type=Path), hidden=True)
@click.option("--documented", is_flag=True, hidden=True)
def main(
    layers: tuple[int, ...], threads: int, limit: float, json_to: Path, model: Path | None, documented: bool
) -> None:
    """Creation time of sessions by the size of the graph, with default options and with the documented ones."""
    if model is not None:
        click.echo(json.dumps(measure(model, documented, threads)))
        return
    json_to.parent.mkdir(parents=True, exist_ok=True)
    results: list[Created] = []
    for item in MODELS:
        if layers and item.layers not in layers:
            continue
        with tempfile.TemporaryDirectory(dir=json_to.parent, prefix="startup-") as folder:
            path = Path(folder) / "model.onnx"
            nodes = write(item, path)
            results += [run(item, path, nodes, option, threads, limit) for option in (False, True)]
        json_to.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=1) + "\n")
        click.echo(as_text(results[-2:], limit).splitlines()[-1], err=True)
    click.echo(as_text(results, limit))


if __name__ == "__main__":
    main()

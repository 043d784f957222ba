"""How long recognition takes, by the size of the graph: `python -m sparse_onnx.bench.scaling`.

One small layer of each spelling is written by its exporter and repeated, with weights of its own in every layer; then
`optimize` runs on the file without verification, in a process of its own. Time is by nodes, not by weights, which are
tiny. Every block has to be recognised. Needs torch and transformers.

`python -m sparse_onnx.bench.scaling --model MODEL OUT` measures one file, and prints JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import onnx_ir as ir

from sparse_onnx.bench.tables import markdown, number
from sparse_onnx.core.errors import VerificationError

if TYPE_CHECKING:
    from sparse_onnx.bench.spelled import Spelling

SIZES = ((1, 8), (12, 32), (48, 64), (48, 128))
HIDDEN, INNER, TOP_K = 16, 8, 2
SPELLINGS = ("gathered", "grouped", "per-expert-loop", "dense-mask", "gshard", "contrib")

_MODULE = "sparse_onnx.bench.scaling"  # __name__ is __main__ when it runs

#: Steps named in the table, apart from the phases; all steps are in the JSON.
_SLOWEST = 3


@dataclasses.dataclass(frozen=True)
class Scaled:
    """One graph: its size, seconds by step and in all (reading and writing included), and the process's peak."""

    spelling: str
    layers: int
    experts: int
    nodes: int
    nodes_after: int
    seconds: dict[str, float]
    total_s: float
    peak_mb: float | None


def repeat(model: ir.Model, layers: int) -> ir.Model:
    """`layers` copies of the model's graph in a row, each reading what the one before gives.

    Values and nodes are renamed, tensors shared. The graph has one input and one output, of one type, and no subgraph.
    """
    first = model.graph
    [entry], [_] = first.inputs, first.outputs
    current = start = ir.val(entry.name, entry.dtype, entry.shape)
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []
    for number_ in range(layers):
        graph = first.clone()
        held = list(graph.initializers.values())
        inputs, outputs = set(graph.inputs), list(graph.outputs)
        for value in (*held, *(output for node in graph for output in node.outputs)):
            if value not in inputs and value.name:
                value.name = f"{number_}.{value.name}"
        [graph_input], [graph_output] = graph.inputs, outputs
        taken = list(graph)
        graph.outputs.clear()
        graph.initializers.clear()
        graph.inputs.clear()
        graph.remove(taken)
        for node in taken:
            node.name = f"{number_}.{node.name}" if node.name else None
        ir.convenience.replace_all_uses_with(graph_input, current)
        current = graph_output
        nodes += taken
        initializers += held
    current.name = "output"
    graph = ir.Graph(
        [start],
        [current],
        nodes=nodes,
        initializers=initializers,
        opset_imports=model.opset_imports,
        name=first.name or "layers",
    )
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


def write(spelling: Spelling, layers: int, experts: int, path: Path) -> None:
    """A model of `layers` small blocks of `experts` experts in one spelling."""
    from sparse_onnx.bench.layers import mixtral_layers

    one = mixtral_layers(hidden=HIDDEN, experts=experts, top_k=TOP_K, inner=INNER, layers=1)
    single = path.with_name(f"one-{path.name}")
    spelling.write(one, single)
    model = ir.load(single)
    ir.external_data.load_to_model(model)
    ir.save(repeat(model, layers), path)


def run(spelling: str, layers: int, experts: int, path: Path) -> Scaled:
    """`optimize` on the file, in a process of its own.

    Raises:
        VerificationError: it failed, or a block was not recognised.
    """
    command = [sys.executable, "-m", _MODULE, "--model", str(path.resolve()), str(path.resolve()) + ".out"]
    result = subprocess.run(command, cwd=os.sep, capture_output=True, text=True, check=False)
    if result.returncode:
        raise VerificationError(result.stderr.strip()[-500:], where=f"{spelling} {layers} x {experts}")
    measured = json.loads(result.stdout)
    blocks = measured.pop("blocks")
    if blocks != {f"{spelling}, {experts} experts, grouped": layers}:
        where = f"{spelling} {layers} x {experts}"
        raise VerificationError(f"found {blocks or 'no block'}; {measured['refusals']}", where=where)
    del measured["refusals"]
    return Scaled(spelling, layers, experts, **measured)


def measure(source: Path, out: Path) -> dict[str, object]:
    """What `optimize` of one file takes in this process, and the blocks that it found."""
    from sparse_onnx.optimize.api import optimize
    from sparse_onnx.passes import PIPELINE

    start = time.perf_counter()
    report = optimize(source, out, verify="none")
    total = time.perf_counter() - start
    assert report.model is not None and report.output is not None
    phases = {step.name: step.phase for step in PIPELINE if step.phase in ("recognise", "lower")}
    seconds: defaultdict[str, float] = defaultdict(float)
    for record in report.passes:
        seconds[record.name] += record.ms / 1e3
        seconds[phases.get(record.name, "prepare and finish")] += record.ms / 1e3
    blocks = Counter(f"{block.spelling}, {block.experts} experts, {block.form}" for block in report.blocks)
    return {
        "nodes": report.model.nodes,
        "nodes_after": report.output.nodes,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "total_s": round(total, 3),
        "peak_mb": _peak_mb(),
        "blocks": dict(blocks),
        "refusals": [refusal.reason for refusal in report.refusals][:3],
    }


def _peak_mb() -> float | None:
    """The most memory that this process had resident; None where the system does not say.

    Not `ru_maxrss`, which begins with what the process had that started this one.
    """
    try:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
    return round(int(line.split()[1]) / 2**10, 1)


def as_text(results: Sequence[Scaled]) -> str:
    """A row a graph."""
    phases = ("prepare and finish", "recognise", "lower")
    lines = []
    for item in results:
        steps = Counter({name: value for name, value in item.seconds.items() if name not in phases})
        slowest = ", ".join(f"{name} {value:.1f}" for name, value in steps.most_common(_SLOWEST))
        lines.append(
            [
                f"{item.spelling}, {item.layers} x {item.experts}",
                f"{item.nodes}",
                f"{item.nodes_after}",
                *(number(item.seconds.get(phase), ".1f") for phase in phases),
                number(item.total_s, ".1f"),
                number(item.peak_mb, ".0f"),
                slowest,
            ]
        )
    columns = [
        "spelling, layers x experts",
        "nodes",
        "nodes after",
        *(f"{phase} s" for phase in phases),
        "optimize s",
        "peak MB",
        "slowest passes s",
    ]
    return markdown(columns, lines)


@click.command()
@click.option("--spelling", "chosen", type=click.Choice(SPELLINGS), multiple=True, help="Not all of them.")
@click.option("--size", "sizes", multiple=True, help="LAYERSxEXPERTS, in place of those of the documents.")
@click.option("--json", "json_to", type=click.Path(path_type=Path), default="out/scaling.json")
@click.option("--model", type=(click.Path(path_type=Path), click.Path(path_type=Path)), hidden=True)
def main(
    chosen: tuple[str, ...], sizes: tuple[str, ...], json_to: Path, model: tuple[Path, Path] | None
) -> None:
    """Time of `optimize` by the number of nodes, for every spelling, blocks all recognised."""
    if model is not None:
        click.echo(json.dumps(measure(*model)))
        return
    from sparse_onnx.bench import spelled

    pairs = [tuple(map(int, size.split("x"))) for size in sizes] or SIZES
    json_to.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for spelling in spelled.ALL:
        if chosen and spelling.spelling not in chosen:
            continue
        for layers, experts in pairs:
            with tempfile.TemporaryDirectory(dir=json_to.parent, prefix="scaling-") as folder:
                path = Path(folder) / "model.onnx"
                write(spelling, layers, experts, path)
                try:
                    results.append(run(spelling.spelling, layers, experts, path))
                except VerificationError as error:
                    raise click.ClickException(str(error)) from error
            click.echo(as_text(results[-1:]).splitlines()[-1], err=True)
            json_to.write_text(json.dumps([dataclasses.asdict(item) for item in results], indent=1) + "\n")
    click.echo(as_text(results))


if __name__ == "__main__":
    main()

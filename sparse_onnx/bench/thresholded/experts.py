"""`python -m sparse_onnx.bench.thresholded.experts`: thresholds in experts, in each form that can have them.

One block of gated experts (SiLU, gate and up in one matrix) on standard normal inputs, each token with experts of its
own draw: without thresholds in the form `grouped`, and with thresholds, by the native kernels, in `grouped`, `branched`
and `gathered`. All take turns in one process, and caches are emptied before each run, as the layers between two runs of
a block do within a model. Times are the least of each input, averaged over inputs (geometric mean), as `--tune` does;
with one thread they are that thread's own, so that other work on the machine does not count. A ratio is the dense
block's time over the form's: above 1 is faster.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import onnx_ir as ir

from sparse_onnx.bench.measure import NO_SPINNING, Contestant, interleave
from sparse_onnx.bench.tables import markdown
from sparse_onnx.blocks import Activation, ExpertSpec, GateLayout, WeightLayout, attach_functions
from sparse_onnx.blocks.moe import make_node
from sparse_onnx.core.errors import SparseOnnxError
from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.graph import io
from sparse_onnx.kernels import build
from sparse_onnx.matching.sites import sites
from sparse_onnx.optimize.tune import Eviction
from sparse_onnx.passes.branch_experts import BranchExperts
from sparse_onnx.passes.fuse_gating import FuseGating
from sparse_onnx.passes.gather_experts import GatherExperts
from sparse_onnx.passes.insert_thresholds import InsertThresholds
from sparse_onnx.passes.quantize_experts import QuantizeExperts
from sparse_onnx.sparsify.plan import Plan, SitePlan
from sparse_onnx.targets.session import create_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession as Session

FORMS: tuple[Pass, ...] = (FuseGating(), BranchExperts(), GatherExperts())
SHARES = (0, 30, 50, 70)
_DIAL = "sparsity_level"
_INPUTS = 4


@dataclasses.dataclass(frozen=True)
class Block:
    experts: int
    top_k: int
    inner: int
    hidden: int

    @staticmethod
    def parse(text: str) -> Block:
        """``64x8x768x1024``."""
        return Block(*map(int, text.split("x")))


def model(block: Block, dtype: str, forms_index: int | None) -> ir.Model:
    """tokens, index, weight -> y. The form of that number with thresholds; None: grouped, without."""
    rng = np.random.default_rng(0)
    spec = ExpertSpec(Activation.SILU, GateLayout.CONCATENATED, WeightLayout.OUT_IN)
    shapes = {"fc1": (2 * block.inner, block.hidden), "fc2": (block.hidden, block.inner)}
    arrays = {}
    for role, (outputs, inputs) in shapes.items():
        numbers = rng.standard_normal((block.experts, outputs, inputs), np.float32)
        arrays[role] = numbers / np.float32(np.sqrt(inputs))
        arrays[f"{role}_bias"] = np.zeros((block.experts, outputs), np.float32)
    weights = {name: _constant(name, array) for name, array in arrays.items()}
    tokens, index, weight = (
        ir.Value(name=name, shape=ir.Shape(["T", size]), type=ir.TensorType(kind))
        for name, size, kind in (
            ("tokens", block.hidden, ir.DataType.FLOAT),
            ("index", block.top_k, ir.DataType.INT64),
            ("weight", block.top_k, ir.DataType.FLOAT),
        )
    )
    node = make_node(spec, tokens, index, weight, weights, name="block")
    graph = ir.Graph(
        [tokens, index, weight],
        node.outputs,
        nodes=[node],
        initializers=list(weights.values()),
        opset_imports={"": 21, "sparse_onnx": 1},
        name="block",
    )
    made = ir.Model(graph, ir_version=10)
    attach_functions(made)
    if dtype != "float32":
        _apply(QuantizeExperts(bits=int(dtype.removeprefix("int"))), made)
    if forms_index is None:
        _apply(FuseGating(), made)
    else:
        _apply(InsertThresholds(_plan(made)), made)
        _apply(FORMS[forms_index], made)
    return made


def _constant(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    return ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )


def _apply(step: Pass, made: ir.Model) -> None:
    outcome = step(made)
    assert isinstance(outcome, Outcome)
    if not outcome.modified:
        raise click.ClickException(outcome.refusals[0].reason)


def _plan(made: ir.Model) -> Plan:
    """Level L skips L % of normal inputs, and of what silu(gate) * up makes of two normal ones."""
    gate, up = np.random.default_rng(1).standard_normal((2, 1 << 20))
    seen = {"up": np.abs(up), "down": np.abs(gate / (1 + np.exp(-gate)) * up)}
    levels = np.linspace(0, 1, 101)
    plans = {}
    for site in sites(made):
        table = np.quantile(seen["down" if site.name.endswith("down") else "up"], levels)
        table[0] = -1
        plans[site.name] = SitePlan(site.name, np.zeros(1, np.float32), table, levels)
    return Plan(plans, 50)


def sessions(block: Block, dtype: str, threads: int, folder: Path, bodies: bool) -> dict[str, Session]:
    """Of the dense block first, then of each form that takes such weights with thresholds."""
    found = {}
    for at in (None, *range(len(FORMS))):
        name = "dense" if at is None else str(getattr(FORMS[at], "form", ""))
        try:
            made = model(block, dtype, at)
        except click.ClickException as error:
            click.echo(f"{name}: {error.message}", err=True)
            continue
        path = folder / f"{name}.onnx"
        io.save(made, path, weights="copy")
        found[name] = create_session(
            path, threads=threads, entries=NO_SPINNING, kernels=at is not None and not bodies
        )
    return found


def measure(
    block: Block, made: dict[str, Session], tokens: int, threads: int, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds: of the dense block, and of each form by share."""
    rng = np.random.default_rng(tokens)
    feeds: list[dict[str, np.ndarray]] = []
    for _ in range(_INPUTS):
        index = np.argsort(rng.random((tokens, block.experts)), axis=1)[:, : block.top_k]
        feeds.append(
            {
                "tokens": rng.standard_normal((tokens, block.hidden), np.float32),
                "index": index.astype(np.int64),
                "weight": np.full((tokens, block.top_k), 1 / block.top_k, np.float32),
            }
        )
    cold, runs = Eviction(), []
    for name, session in made.items():
        for share in SHARES if name != "dense" else (None,):
            level = {} if share is None else {_DIAL: np.array(share)}
            own = [each | level for each in feeds]
            runs.append(Contestant(name, functools.partial(_run, session, own), prepare=cold))
    clock = time.thread_time if threads == 1 else time.perf_counter
    times = interleave(runs, _INPUTS, rounds=rounds, clock=clock)
    least = [times[at::_INPUTS].min(axis=0) for at in range(min(_INPUTS, rounds))]
    means = np.exp(np.mean(np.log(least), axis=0)) * 1e3
    found: dict[str, list[float]] = {}
    for contestant, each in zip(runs, means.tolist(), strict=True):
        found.setdefault(contestant.name, []).append(each)
    return found


def _run(session: Session, feeds: Sequence[dict[str, np.ndarray]], index: int) -> object:
    return session.run(None, feeds[index])


@click.command(help=__doc__)
@click.option(
    "--blocks", default="8x2x2816x1024,32x4x1408x1024,64x8x768x1024", help="Experts, top-k, inner, hidden."
)
@click.option("--types", default="float32,int8,int4")
@click.option("--tokens", default="1,64")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=24, show_default=True)
@click.option("--bodies", is_flag=True, help="Without the native kernels.")
def main(blocks: str, types: str, tokens: str, threads: int, rounds: int, bodies: bool) -> None:
    rows: list[list[str]] = []
    try:
        build()
        for text in blocks.split(","):
            block = Block.parse(text)
            for dtype in types.split(","):
                with tempfile.TemporaryDirectory() as folder:
                    made = sessions(block, dtype, threads, Path(folder), bodies)
                    for count in map(int, tokens.split(",")):
                        found = measure(block, made, count, threads, rounds)
                        [dense] = found.pop("dense")
                        head = [f"{block.experts}, top-{block.top_k}", dtype, str(count), f"{dense:.2f}"]
                        for name, ms in found.items():
                            rows.append([*head, name, *(f"{dense / each:.2f}" for each in ms)])
                            click.echo(" ".join(rows[-1]), err=True)
                    del made
    except SparseOnnxError as error:
        raise click.ClickException(str(error)) from error
    columns = [
        "experts",
        "weights",
        "tokens",
        "dense, ms",
        "thresholds in",
        *(f"{share} %" for share in SHARES),
    ]
    click.echo(markdown(columns, rows))


if __name__ == "__main__":
    main()

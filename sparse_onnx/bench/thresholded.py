"""`python -m sparse_onnx.bench.thresholded`: thresholded layers by native kernels against ONNX Runtime's dense ones.

    ratio = seconds of the fastest dense layer of the type / seconds of the thresholded one, median over rounds

A stack of equal layers, each with weights of its own, is run at once: together they are larger than `--stack-mb`, so
that each layer's weights come from memory, as they do within a model. Inputs change from run to run, the contestants
take turns, and a session's threshold is an input: one session gives all sparsities.

Dense: float32 MatMul; int8 MatMulNBits (accuracy level 4, blocks of 32 and 128) and DynamicQuantizeLinear with
MatMulInteger; int4 MatMulNBits (accuracy levels 0 and 4, blocks of 32 and 128). All but level 0 round activations to 8
bits; the native kernels do not.

`--gated` measures a whole gated feed-forward layer instead, of `inputs x hidden units`, against its three dense layers:
the gate runs dense in both, and its activation says which units up and down skip (CATS).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper  # noqa: TID251 - the models are parts of the measurement

from sparse_onnx.bench.measure import Contestant, interleave
from sparse_onnx.bench.tables import markdown
from sparse_onnx.bench.thresholded_gated import dense_gated, gate_tau, thresholded_gated
from sparse_onnx.blocks.spec import DOMAIN
from sparse_onnx.kernels import build, register_kernels

#: Thresholds of standard normal inputs by the share that they skip.
TAU = {0: -1.0, 30: 0.3853205, 50: 0.6744898, 70: 1.0364334}
_MICROSOFT = "com.microsoft"

Part = tuple[list[onnx.NodeProto], list[onnx.TensorProto]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A way to run a layer. `make` gives the nodes and constants of layer number i of shape K, N."""

    name: str
    bits: int
    native: bool
    make: Callable[[int, int, int], Part]
    gated: bool = False

    @property
    def matrices(self) -> int:
        return 3 if self.gated else 1

    def tau(self, skipped: int, inputs: int) -> float:
        return gate_tau(skipped, inputs) if self.gated and skipped else TAU[skipped]


def kinds(dtype: str, gated: bool = False) -> Iterator[Kind]:
    """The dense ones first."""
    if gated:
        if dtype == "float32":
            yield Kind("gated: 3 MatMul", 32, False, dense_gated, True)
            yield Kind("gated: thresholded by its gate", 32, True, thresholded_gated, True)
        return
    if dtype == "float32":
        yield Kind("MatMul", 32, False, _dense)
        yield Kind("thresholded", 32, True, _thresholded)
        return
    bits = {"int8": 8, "int4": 4}[dtype]
    for block in (32, 128):
        for level in (4,) if bits == 8 else (0, 4):
            yield Kind(f"MatMulNBits {block}, level {level}", bits, False, _nbits(bits, block, level))
    if bits == 8:
        yield Kind("MatMulInteger", bits, False, _integer)
    for axis, block in ((0, 32), (0, 128), (1, 128)):
        what = "inputs" if axis == 0 else "outputs"
        yield Kind(f"thresholded, {block} {what} a scale", bits, True, _thresholded_nbits(bits, axis, block))


def measure(
    dtype: str,
    inputs: int,
    outputs: int,
    tokens: int,
    threads: int,
    *,
    stack_mb: float,
    rounds: int,
    gated: bool = False,
) -> Iterator[tuple[str, float, dict[int, float]]]:
    """Of each kind its name, milliseconds a layer at 0 % (or dense), and ratios to the fastest dense kind."""
    found = list(kinds(dtype, gated))
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((tokens, inputs)).astype(np.float32) for _ in range(4)]
    contestants, rows = [], []
    for kind in found:
        size = kind.matrices * inputs * outputs * kind.bits
        layers = max(1, int(np.ceil(stack_mb * 2**20 * 8 / size)))
        session = _session(kind, inputs, outputs, layers, threads)
        for skipped in TAU if kind.native else (None,):
            tau = None if skipped is None else kind.tau(skipped, inputs)
            contestants.append(Contestant(kind.name, _runner(session, xs, tau)))
            rows.append((kind, skipped, layers))
    seconds = interleave(contestants, len(xs), rounds=rounds) / np.array([row[2] for row in rows])
    dense = min(
        np.flatnonzero([not kind.native for kind, *_ in rows]), key=lambda at: np.median(seconds[:, at])
    )
    ratios = np.median(seconds[:, [dense]] / seconds, axis=0)
    for kind in found:
        at = [index for index, row in enumerate(rows) if row[0] is kind]
        by_share = {rows[index][1] or 0: float(ratios[index]) for index in at}
        yield kind.name, float(np.median(seconds[:, at[0]]) * 1e3), by_share


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="4096x4096,4096x11008", help="inputs x outputs")
    parser.add_argument("--types", default="float32,int8,int4")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tokens", default="1,256")
    parser.add_argument(
        "--stack-mb", type=float, default=320, help="weights of a stack; more than the last cache"
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--gated", action="store_true", help="gated layers, inputs x hidden units; float32")
    given = parser.parse_args(arguments)
    build()
    table = []
    for tokens in map(int, given.tokens.split(",")):
        for shape in given.shapes.split(","):
            for threads in map(int, given.threads.split(",")):
                for dtype in ["float32"] if given.gated else given.types.split(","):
                    inputs, outputs = map(int, shape.split("x"))
                    rows = measure(
                        *(dtype, inputs, outputs, tokens, threads),
                        stack_mb=given.stack_mb,
                        rounds=given.rounds,
                        gated=given.gated,
                    )
                    for name, ms, ratios in rows:
                        cells = [f"{ratios[share]:.2f}" if share in ratios else "" for share in TAU]
                        table.append([name, dtype, shape, str(tokens), str(threads), f"{ms:.2f}", *cells])
    columns = ["layer", "type", "shape", "tokens", "threads", "ms", *(f"{share} %" for share in TAU)]
    print(markdown(columns, table))


def _runner(
    session: onnxruntime.InferenceSession, xs: Sequence[np.ndarray], tau: float | None
) -> Callable[[int], object]:
    fed = [{"X": x} if tau is None else {"X": x, "tau": np.array([tau], np.float32)} for x in xs]
    return lambda index: session.run(None, fed[index])


def _session(
    kind: Kind, inputs: int, outputs: int, layers: int, threads: int
) -> onnxruntime.InferenceSession:
    parts = [kind.make(index, inputs, outputs) for index in range(layers)]
    fed = [helper.make_tensor_value_info("X", TensorProto.FLOAT, [None, inputs])]
    constants = [tensor for _, tensors in parts for tensor in tensors]
    if kind.native:
        fed.append(helper.make_tensor_value_info("tau", TensorProto.FLOAT, [1]))
        width = inputs if kind.gated else outputs
        constants.append(
            numpy_helper.from_array(np.zeros(outputs if kind.gated else 1, np.float32), "centre")
        )
        constants.append(numpy_helper.from_array(np.zeros(width, np.float32), "bias"))
    results = [helper.make_tensor_value_info(f"Y{index}", TensorProto.FLOAT, None) for index in range(layers)]
    nodes = [node for nodes, _ in parts for node in nodes]
    versions = {"": 21, DOMAIN: 1, _MICROSOFT: 1}
    model = helper.make_model(
        helper.make_graph(nodes, "stack", fed, results, constants),
        opset_imports=[helper.make_opsetid(*item) for item in versions.items()],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if kind.native:
        register_kernels(options)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _floats(index: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(index).standard_normal(shape, np.float32) / np.float32(64)


def _bytes(index: int, count: int) -> bytes:
    return np.random.default_rng(index).bytes(count)


def _ones(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ones(shape, np.float32), name)


def _dense(index: int, inputs: int, outputs: int) -> Part:
    node = helper.make_node("MatMul", ["X", f"W{index}"], [f"Y{index}"])
    return [node], [numpy_helper.from_array(_floats(index, inputs, outputs), f"W{index}")]


def _thresholded(index: int, inputs: int, outputs: int) -> Part:
    names = ["X", f"W{index}", "tau", "centre", "bias"]
    node = helper.make_node("ThresholdedLinear", names, [f"Y{index}"], domain=DOMAIN)
    return [node], [numpy_helper.from_array(_floats(index, inputs, outputs), f"W{index}")]


def _nbits(bits: int, block: int, level: int) -> Callable[[int, int, int], Part]:
    def make(index: int, inputs: int, outputs: int) -> Part:
        attributes: dict[str, Any] = {
            "K": inputs,
            "N": outputs,
            "bits": bits,
            "block_size": block,
            "accuracy_level": level,
        }
        names = ["X", f"W{index}", f"s{index}"]
        node = helper.make_node("MatMulNBits", names, [f"Y{index}"], domain=_MICROSOFT, **attributes)
        shape = (outputs, inputs // block, block * bits // 8)
        weight = helper.make_tensor(
            names[1], TensorProto.UINT8, shape, _bytes(index, inputs * outputs * bits // 8), raw=True
        )
        return [node], [weight, _ones(names[2], outputs, inputs // block)]

    return make


def _integer(index: int, inputs: int, outputs: int) -> Part:
    q, scale, zero, sums, numbers, both = (f"{name}{index}" for name in ("q", "s", "z", "sums", "n", "both"))
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["X"], [q, scale, zero]),
        helper.make_node("MatMulInteger", [q, f"W{index}", zero], [sums]),
        helper.make_node("Cast", [sums], [numbers], to=TensorProto.FLOAT),
        helper.make_node("Mul", [scale, f"scales{index}"], [both]),
        helper.make_node("Mul", [numbers, both], [f"Y{index}"]),
    ]
    weight = helper.make_tensor(
        f"W{index}", TensorProto.INT8, (inputs, outputs), _bytes(index, inputs * outputs), raw=True
    )
    return nodes, [weight, _ones(f"scales{index}", outputs)]


def _thresholded_nbits(bits: int, axis: int, block: int) -> Callable[[int, int, int], Part]:
    kind = {8: TensorProto.INT8, 4: TensorProto.INT4}[bits]

    def make(index: int, inputs: int, outputs: int) -> Part:
        names = ["X", f"W{index}", f"s{index}", f"z{index}", "tau", "centre", "bias"]
        node = helper.make_node(
            "ThresholdedLinearNBits", names, [f"Y{index}"], domain=DOMAIN, axis=axis, block_size=block
        )
        grid = (inputs // block, outputs) if axis == 0 else (inputs, outputs // block)
        weight, points = (
            helper.make_tensor(name, kind, shape, data, raw=True)
            for name, shape, data in (
                (names[1], (inputs, outputs), _bytes(index, inputs * outputs * bits // 8)),
                (names[3], grid, bytes(grid[0] * grid[1] * bits // 8)),
            )
        )
        return [node], [weight, _ones(names[2], *grid), points]

    return make


if __name__ == "__main__":
    main()

"""`python -m sparse_onnx.bench.thresholded`: thresholded layers by native kernels against ONNX Runtime's dense ones.

    ratio = seconds of the fastest dense layer of the type / seconds of the thresholded one, medians over rounds

A stack of equal layers, each with weights of its own, is run at once: together they are larger than `--stack-mb`, so
that each layer's weights come from memory, as they do within a model. Inputs change from run to run, the contestants
take turns, and a session's threshold is an input: one session gives all shares. For many tokens, where arithmetic
decides, one layer is run, and nothing skipped.

Dense: float32 MatMul; float16 MatMul, and bfloat16 weights cast to float32, both of which ONNX Runtime keeps as
float32 copies; int8 MatMulNBits (accuracy level 4, blocks of 32 and 128) and DynamicQuantizeLinear with MatMulInteger;
int4 MatMulNBits (accuracy levels 0 and 4, blocks of 32 and 128). MatMulInteger and level 4 round activations to 8
bits; the native kernels do not. `with a copy` is what `optimize --prefill copy` writes.

`--types gated` measures a whole gated feed-forward layer instead, of inputs x hidden units, against its three dense
layers: the gate runs dense in both, and its activation says which units up and down skip (CATS).

With `--json` an interrupted run goes on where it was; `--docs` puts the tables between the marks of a page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper  # noqa: TID251 - the models are parts of the measurement

from sparse_onnx.bench.measure import NO_SPINNING, Contestant, interleave
from sparse_onnx.bench.thresholded import page
from sparse_onnx.bench.thresholded.layers import FLOATS, MICROSOFT, TAU, TYPES, Kind, cast, kinds
from sparse_onnx.blocks.spec import DOMAIN
from sparse_onnx.core.errors import SparseOnnxError
from sparse_onnx.kernels import build, register_kernels
from sparse_onnx.sparsify.prefill import MOST_ROWS

_SETTLE = 0.01  # seconds, where a pool of threads spins for a while behind each run


def measure(
    dtype: str, inputs: int, outputs: int, tokens: int, threads: int, *, stack_mb: float, rounds: int
) -> list[page.Row]:
    """Of each kind its milliseconds a layer, by share: medians of rounds in which all take turns."""
    few = tokens <= MOST_ROWS
    found = [kind for kind in kinds(dtype) if not (few and kind.many)]
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((tokens, inputs)).astype(np.float32) for _ in range(4)]
    contestants, rows = [], []
    for kind in found:
        size = kind.weights(inputs, outputs) * kind.bits
        layers = max(1, int(np.ceil(stack_mb * 2**20 * 8 / size))) if few else 1
        session = _session(kind, inputs, outputs, layers, threads)
        for share in (TAU if few else (0,)) if kind.native else (None,):
            settle = _SETTLE if threads > 1 else 0.0
            tau = None if share is None else kind.tau(share, inputs)
            contestants.append(Contestant(kind.name, _runner(session, xs, tau), settle))
            rows.append((kind, share, layers))
    seconds = interleave(contestants, len(xs), rounds=rounds) / np.array([row[2] for row in rows])
    medians = np.median(seconds, axis=0) * 1e3
    return [
        page.Row(
            kind.name,
            kind.native,
            {str(rows[at][1] or 0): float(medians[at]) for at in range(len(rows)) if rows[at][0] is kind},
        )
        for kind in found
    ]


def _listed(context: object, option: object, value: str) -> list[str]:
    return value.split(",")


@click.command(help=__doc__)
@click.option("--shapes", default="4096x4096,4096x11008", callback=_listed, help="Inputs x outputs.")
@click.option("--types", default=",".join(TYPES), callback=_listed)
@click.option("--threads", default="1,2", callback=_listed)
@click.option("--tokens", default="1,256", callback=_listed)
@click.option(
    "--stack-mb", default=320.0, show_default=True, help="Weights of a stack: more than the last cache."
)
@click.option("--rounds", type=click.IntRange(min=1), default=12, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Results; an earlier run goes on.")
@click.option(
    "--docs", type=click.Path(path_type=Path, exists=True), help="A page with the marks of the tables."
)
def main(
    shapes: list[str],
    types: list[str],
    threads: list[str],
    tokens: list[str],
    stack_mb: float,
    rounds: int,
    file: Path | None,
    docs: Path | None,
) -> None:
    try:
        build()
        document = page.read(file, stack_mb, rounds)
        for count in tokens:
            for shape in shapes:
                for some in threads:
                    for dtype in types:
                        inputs, outputs = map(int, shape.split("x"))
                        sizes = (dtype, inputs, outputs, int(count), int(some))
                        if page.known(document, *sizes):
                            continue
                        click.echo(f"{dtype} {shape}, {count} tokens, {some} threads", err=True)
                        found = measure(*sizes, stack_mb=stack_mb, rounds=rounds)
                        page.add(document, *sizes, found, file)
        if docs is None:
            click.echo(page.markdown(document))
        else:
            page.put(docs, document)
    except SparseOnnxError as error:
        raise click.ClickException(str(error)) from error


def _runner(
    session: onnxruntime.InferenceSession, xs: Sequence[np.ndarray], tau: float | None
) -> Callable[[int], list[np.ndarray]]:
    fed = [{"X": x} if tau is None else {"X": x, "tau": np.array([tau], np.float32)} for x in xs]
    return lambda index: session.run(None, fed[index])  # type: ignore[no-any-return]


def _session(
    kind: Kind, inputs: int, outputs: int, layers: int, threads: int
) -> onnxruntime.InferenceSession:
    parts = [kind.make(index, inputs, outputs) for index in range(layers)]
    fed = [helper.make_tensor_value_info("X", TensorProto.FLOAT, [None, inputs])]
    constants = [tensor for _, tensors in parts for tensor in tensors]
    nodes = [cast("X", "x", kind.dtype)]
    if kind.native:
        fed.append(helper.make_tensor_value_info("tau", TensorProto.FLOAT, [1]))
        nodes.append(cast("tau", "t", kind.dtype))
        sizes = (outputs, inputs) if kind.gated else (1, outputs)
        for name, size in zip(("centre", "bias"), sizes, strict=True):
            constants.append(helper.make_tensor(name, FLOATS[kind.dtype], [size], np.zeros(size, np.float32)))
    if kind.many:
        constants += [numpy_helper.from_array(np.array(MOST_ROWS * inputs), "most")]
        constants += [
            numpy_helper.from_array(np.array([end]), name) for name, end in (("none", 0), ("all", 2**62))
        ]
        nodes += [
            helper.make_node("Size", ["x"], ["size"]),
            helper.make_node("Greater", ["size", "most"], ["many"]),
            helper.make_node("Where", ["many", "none", "all"], ["end"]),
            helper.make_node("Slice", ["x", "none", "end", "none"], ["few"]),
        ]
    nodes += [node for nodes, _ in parts for node in nodes]
    results = []
    for index in range(layers):
        nodes.append(cast(f"y{index}", f"Y{index}", "float32"))
        results.append(helper.make_tensor_value_info(f"Y{index}", TensorProto.FLOAT, None))
    versions = {"": 21, DOMAIN: 1, MICROSOFT: 1}
    model = helper.make_model(
        helper.make_graph(nodes, "stack", fed, results, constants),
        opset_imports=[helper.make_opsetid(*item) for item in versions.items()],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for entry in NO_SPINNING.items():
        options.add_session_config_entry(*entry)
    if kind.native:
        register_kernels(options)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


if __name__ == "__main__":
    main()

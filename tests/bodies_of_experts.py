"""Bodies of experts that treat rows one by one, in many spellings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from any_body import Graph, Write


def linear(graph: Graph, x: str, inputs: int, outputs: int) -> str:
    """On the last axis of any rank."""
    return graph.op("Add", graph.op("MatMul", x, graph.weight(inputs, outputs)), graph.vector(outputs))


def conv(graph: Graph, x: str, inputs: int, outputs: int, size: int = 3, **attributes) -> str:
    pads = [size // 2] * 4
    return graph.op(
        "Conv", x, graph.weight(outputs, inputs, size, size), graph.vector(outputs), pads=pads, **attributes
    )


def three_layers(graph: Graph, x: str, expert: int) -> str:
    for width in (24, 8):
        x = graph.op(
            "Tanh", graph.op("Gemm", x, graph.weight(16 if width == 24 else 24, width), graph.vector(width))
        )
    return graph.op("Gemm", x, graph.weight(16, 8), graph.vector(16), transB=1)


def mish(graph: Graph, x: str, expert: int) -> str:
    return linear(graph, graph.op("Mish", linear(graph, x, 16, 24)), 24, 16)


def norm_after(graph: Graph, x: str, expert: int) -> str:
    hidden = linear(graph, graph.op("Relu", linear(graph, x, 16, 24)), 24, 16)
    return graph.op("LayerNormalization", graph.op("Add", hidden, x), graph.vector(16), graph.vector(16))


def norm_written_out(graph: Graph, x: str, expert: int) -> str:
    hidden = linear(graph, x, 16, 16)
    square = graph.op("ReduceMean", graph.op("Mul", hidden, hidden), graph.ints(-1))
    scale = graph.op("Sqrt", graph.op("Add", square, graph.constant(np.float32(1e-5))))
    return graph.op("Mul", graph.op("Div", hidden, scale), graph.vector(16))


def fused(graph: Graph, x: str, expert: int) -> str:
    """What ORT's optimizer leaves behind."""
    hidden = graph.op("FusedMatMul", x, graph.weight(24, 16), domain="com.microsoft", transB=1, alpha=0.5)
    hidden = graph.op("BiasGelu", hidden, graph.vector(24), domain="com.microsoft")
    return graph.op(
        "FusedGemm",
        hidden,
        graph.weight(16, 24),
        graph.vector(16),
        domain="com.microsoft",
        transB=1,
        activation="Relu",
    )


def heads(graph: Graph, x: str, expert: int) -> str:
    """Four heads that attend to each other within a token."""
    shape = graph.op("Concat", graph.op("Shape", x, start=0, end=1), graph.ints(4, -1), axis=0)
    parts = [graph.op("Reshape", linear(graph, x, 16, 16), shape) for _ in range(3)]
    turned = graph.op("Transpose", parts[1], perm=[0, 2, 1])
    score = graph.op("Softmax", graph.op("MatMul", parts[0], turned))
    return graph.op("Reshape", graph.op("MatMul", score, parts[2]), graph.ints(-1, 16))


def einsum(graph: Graph, x: str, expert: int) -> str:
    """ORT divides by zero in an Einsum over 0 rows."""
    parts = graph.op("Reshape", linear(graph, x, 16, 16), graph.ints(0, 4, 4))
    mixed = graph.op("Einsum", parts, parts, equation="nsd,ntd->nst")
    return graph.op("Flatten", mixed)


def conv_block(graph: Graph, x: str, expert: int) -> str:
    """As in YOLO: convolution, SiLU, residual."""
    hidden = conv(graph, x, 4, 8)
    hidden = graph.op("Mul", hidden, graph.op("Sigmoid", hidden))
    return graph.op("Add", conv(graph, hidden, 8, 4, 1), x)


def conv_norms(graph: Graph, x: str, expert: int) -> str:
    hidden = graph.op("BatchNormalization", conv(graph, x, 4, 8), *(graph.vector(8) for _ in range(4)))
    hidden = graph.op("InstanceNormalization", graph.op("Relu", hidden), graph.vector(8), graph.vector(8))
    return conv(graph, graph.op("Concat", hidden, x, axis=1), 12, 4, 1)


def group_norm(graph: Graph, x: str, expert: int) -> str:
    """ORT's own fails on 0 rows."""
    return graph.op(
        "GroupNormalization", conv(graph, x, 4, 4), graph.vector(4), graph.vector(4), num_groups=2
    )


def group_norm_written_out(graph: Graph, x: str, expert: int) -> str:
    """torch's: ``[N, C, H, W] -> [N, groups, -1]``, norm, and back."""
    hidden = conv(graph, x, 4, 4)
    groups = graph.op("Reshape", hidden, graph.ints(0, 2, -1))
    one, zero = graph.constant(np.ones(2, np.float32)), graph.constant(np.zeros(2, np.float32))
    normal = graph.op("InstanceNormalization", groups, one, zero)
    back = graph.op("Reshape", normal, graph.op("Shape", hidden))
    return graph.op("Mul", back, graph.op("Unsqueeze", graph.vector(4), graph.ints(1, 2)))


def down_and_up(graph: Graph, x: str, expert: int) -> str:
    small = graph.op("Relu", conv(graph, graph.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), 4, 4))
    scales = graph.constant(np.asarray([1, 1, 2, 2], np.float32))
    return graph.op("Resize", small, "", scales, mode="nearest")


def classify(graph: Graph, x: str, expert: int) -> str:
    pooled = graph.op("GlobalAveragePool", conv(graph, x, 4, 6))
    return graph.op("Gemm", graph.op("Flatten", pooled), graph.weight(6, 5), graph.vector(5))


def sequence_linear(graph: Graph, x: str, expert: int) -> str:
    hidden = linear(graph, graph.op("Elu", linear(graph, x, 16, 24)), 24, 16)
    return graph.op("LayerNormalization", hidden, graph.vector(16), axis=2)


def sequence_flattened(graph: Graph, x: str, expert: int) -> str:
    """torch's Linear on three axes as Gemm: to rows and back."""
    hidden = graph.op(
        "Gemm", graph.op("Reshape", x, graph.ints(-1, 16)), graph.weight(16, 24), graph.vector(24)
    )
    front = graph.op("Shape", x, start=0, end=2)
    hidden = graph.op("Reshape", graph.op("Tanh", hidden), graph.op("Concat", front, graph.ints(24), axis=0))
    return graph.op("MatMul", hidden, graph.weight(24, 16))


@dataclasses.dataclass(frozen=True)
class Of:
    """A body and the axes of one row of its input and result.

    `sizes` are those that the graph leaves open; `empty` says whether ORT runs the body as it is on no rows at all;
    `guarded`, whether it must not run behind the dispatch either."""

    write: Write
    row: Sequence[int | str] = (16,)
    out: Sequence[int | str] | None = None
    lead: Sequence[str] = ("T",)
    opset: int = 20
    sizes: dict[str, int] | None = None
    empty: bool = True
    guarded: bool = False


IMAGE = (4, 6, 6)
OPEN = (4, "H", "W")
BODIES: dict[str, Of] = {
    "three layers": Of(three_layers),
    "mish": Of(mish),
    "norm after": Of(norm_after),
    "norm written out": Of(norm_written_out),
    "fused by ORT": Of(fused),
    "heads": Of(heads, empty=False),
    "einsum": Of(einsum, empty=False, guarded=True),
    "conv": Of(conv_block, IMAGE),
    "conv of open size": Of(conv_block, OPEN, sizes={"H": 5, "W": 7}),
    "conv and norms": Of(conv_norms, IMAGE),
    "group norm": Of(group_norm, IMAGE, opset=21, empty=False, guarded=True),
    "group norm written out": Of(group_norm_written_out, IMAGE, empty=False),
    "down and up": Of(down_and_up, IMAGE),
    "classifier": Of(classify, IMAGE, (5,)),
    "sequence": Of(sequence_linear, lead=("B", "S")),
    "sequence flattened": Of(sequence_flattened, lead=("B", "S")),
}

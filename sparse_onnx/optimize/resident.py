"""What of a model's weights stays in memory from the creation of a session on, under ORT's CPU provider.

A session packs constant matrices into the layout of its kernels and keeps the packed copies, whether they are ever used
or not: the right-hand side of Gemm, MatMul and the integer products, and the integers of MatMulNBits and QMoE. Weights
that are not packed stay mapped and are read when a kernel uses them; MoE never reads those of experts without tokens.
In a body of If, Loop or Scan, ORT packs what the body itself or the graph around it holds, and nothing from further
out. float16 matrices become float32 copies before they are packed.

Thresholded layers hold copies of their weights, too: of their native kernels in large pages (`register_kernels`), or of
ONNX Runtime's products in their functions' bodies. Those are counted that the kernels hold: the body of layers of all
experts holds none, but its integers of 4 bits as bytes.

The sizes are those of resident memory, measured with ORT 1.32 on x86-64, without padding. Other processors may leave
some n-bit weights as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from sparse_onnx.blocks.spec import DOMAIN
from sparse_onnx.blocks.thresholded import is_thresholded
from sparse_onnx.blocks.thresholded_experts import is_of_experts
from sparse_onnx.blocks.thresholded_gated import is_gated

#: Inputs that kernels pack, where they are constant.
_PACKED = {
    ("", "Gemm"): (1,),
    ("", "MatMul"): (1,),
    ("", "MatMulInteger"): (1,),
    ("com.microsoft", "DynamicQuantizeMatMul"): (1,),
    ("com.microsoft", "MatMulIntegerToFloat"): (1,),
    ("com.microsoft", "MatMulNBits"): (1,),
    ("com.microsoft", "QMoE"): (2, 5),
}
_LEAST_HELD = 1 << 16  # bytes that a kernel copies
_FLOAT = ("Gemm", "MatMul")
_INTEGERS = ("MatMulNBits", "QMoE")  # each weight has its scales in the input behind it

#: Bytes a scale that are packed with the weights where activations become 8-bit integers too: the scale and a sum.
_ROUNDED_SCALE = 8
_ROUNDED_SCALE_OF_2_BIT_QMOE = 4

_UNITS = ("B", "kB", "MB", "GB", "TB")
_WORTH_SAYING = 1_000_000
_ONLY_USED = "resident: only weights that are used"


@dataclasses.dataclass(frozen=True)
class Residency:
    """Bytes of packed copies: `movable` ones can stay in the file (`--weights prepacked`), `fixed` ones cannot, and
    those of thresholded layers need not be (`register_kernels(hold_weights=False)`)."""

    movable: int
    fixed: int
    thresholded: int = 0

    @property
    def total(self) -> int:
        return self.movable + self.fixed + self.thresholded


def residency(model: ir.Model) -> Residency:
    """What a session of the model will copy, from the graph alone: no weight is read."""
    movable: dict[int, int] = {}
    fixed: dict[int, int] = {}
    held = 0  # by kernels, each of which has its own
    pending: list[tuple[ir.Graph, tuple[ir.Graph, ...]]] = [(model.graph, ())]
    while pending:
        graph, outer = pending.pop()
        for node in graph:
            for value, size in _packed(node):
                if value.graph is not graph and value.graph not in outer[:1]:
                    continue
                widened = value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT16
                if node.domain == DOMAIN:
                    held += size
                    continue
                (movable if value.graph is model.graph and not widened else fixed)[id(value)] = size
            pending += [(body, (graph, *outer)) for body in _bodies(node)]
    return Residency(sum(movable.values()), sum(fixed.values()), held)


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _packed(node: ir.Node) -> Iterator[tuple[ir.Value, int]]:
    """The constant inputs that the node's kernel packs, and the bytes of each packed copy."""
    for index in _places(node):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None or not value.is_initializer() or value.is_graph_input():
            continue
        tensor = value.const_value
        if tensor is None:
            continue
        if node.domain == DOMAIN:
            if tensor.nbytes >= _LEAST_HELD:
                yield value, tensor.nbytes
        elif node.op_type in _INTEGERS:
            extra = _n_bits(node, index + 1)
            if extra is not None:
                yield value, tensor.nbytes + extra
        elif len(tensor.shape) == 2:  # stacks of matrices are read as they are
            if tensor.dtype == ir.DataType.FLOAT16 and node.op_type in _FLOAT:
                yield value, 2 * tensor.nbytes
            elif tensor.dtype == ir.DataType.FLOAT or node.op_type not in _FLOAT:
                yield value, tensor.nbytes


def _places(node: ir.Node) -> Sequence[int]:
    """Inputs that the node's kernel packs where they are constant; those of thresholded layers hold whatever is."""
    if is_thresholded(node) or is_gated(node):
        return range(len(node.inputs))
    if is_of_experts(node):
        return [at for at in range(len(node.inputs)) if at != 1]  # but the index
    return _PACKED.get((node.domain, node.op_type), ())


def _n_bits(node: ir.Node, scales: int) -> int | None:
    """Bytes that are packed with n-bit weights, whose scales are this input; None where the kernel packs nothing."""
    qmoe = node.op_type == "QMoE"
    bits = node.attributes.get_int("expert_weight_bits" if qmoe else "bits", 4)
    rounded = node.attributes.get_int("accuracy_level", 0) == 4 or (qmoe and bits == 8)
    if bits != 4 and not rounded:
        return None
    if bits == 2 and node.attributes.get_int("block_size", 0) < 32:
        return None
    value = node.inputs[scales]
    if not rounded or value is None or value.shape is None:
        return 0
    each = _ROUNDED_SCALE_OF_2_BIT_QMOE if qmoe and bits == 2 else _ROUNDED_SCALE
    return each * math.prod(value.shape.numpy())


def note(found: Residency, packed_bytes: int | None = None) -> str | None:
    """One line for the report; None for models without copies worth a line.

    Args:
        found: of the model.
        packed_bytes: what `save_prepacked` put into the file; None for a model that is saved in another way.
    """
    copied = 0 if packed_bytes else found.movable
    if packed_bytes is None and copied + found.fixed + found.thresholded < _WORTH_SAYING:
        return None
    kept = []
    if copied:
        hint = (
            "--weights prepacked leaves them in the file" if packed_bytes is None else "this ORT stores none"
        )
        kept.append(f"{amount(copied)} of packed weights, copied at creation, unused experts too ({hint})")
    if found.fixed:
        kept.append(
            f"{amount(found.fixed)} of packed weights that ORT has to copy (float16, or held by branches)"
        )
    if found.thresholded:
        kept.append(
            f"{amount(found.thresholded)} of thresholded layers (native kernels leave them where they are with "
            "register_kernels(hold_weights=False))"
        )
    text = f"resident: {' and '.join([*kept, 'what is used of the others'])}" if kept else _ONLY_USED
    if packed_bytes is None:
        return text
    if not packed_bytes:
        return f"{text}; ONNX Runtime had no packed weights to store"
    return (
        f"{text}; {amount(packed_bytes)} of packed weights stay in the file until they are used "
        "(ONNX Runtime 1.32 reads them at creation too, into memory that the system can take back)"
    )


def amount(size: int) -> str:
    """Bytes in the largest unit that they fill: ``1.1 GB``, ``48 MB``."""
    step = min(int(math.log(size, 1000)), len(_UNITS) - 1) if size else 0
    value = size / 1000**step
    return f"{value:.{1 if value < 10 and step else 0}f} {_UNITS[step]}"

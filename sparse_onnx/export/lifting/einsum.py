"""`torch.einsum` as one operator of the trace.

torch finds the result's shape by running its own way of computing it, which looks at sizes - is one 1? - and
notes what it saw as assumptions of the trace. ONNX has the operator itself, for all sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sparse_onnx.export.lifting import graph_edits
from sparse_onnx.export.lifting.program import tracing


def kept(equation: Any, *operands: Any) -> Tensor | None:
    """The result of an einsum over symbolic sizes; None: as torch does it."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if (
        tracing() is None
        or not isinstance(equation, str)
        or not all(isinstance(each, Tensor) for each in operands)
    ):
        return None
    shape = _shape(equation, operands)
    nodes = [graph_edits.node_of(each) for each in operands]
    if shape is None or any(node is None for node in nodes) or len({each.dtype for each in operands}) != 1:
        return None
    tracer, first = tracing().tracer, operands[0]
    proxies = [fx.Proxy(node, tracer) for node in nodes if node is not None]
    made = tracer.create_proxy("call_function", torch.ops.aten.einsum.default, (equation, proxies), {})
    with proxy_tensor.disable_proxy_modes_tracing(), first.fake_mode:
        result = torch.empty(shape, dtype=first.dtype, device=first.device)
    proxy_tensor.track_tensor_tree(result, made, constant=None, tracer=tracer)
    return result


def _shape(equation: str, operands: tuple[Tensor, ...]) -> list[Any] | None:
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or len(terms) != len(operands):
        return None
    sizes: dict[str, Any] = {}
    for term, operand in zip(terms, operands, strict=True):
        if len(term) != operand.dim() or len(set(term)) != len(term):
            return None
        for label, size in zip(term, operand.shape, strict=True):
            if not statically_known_true(sizes.setdefault(label, size) == size):
                return None
    if all(isinstance(size, int) for size in sizes.values()) or not set(output) <= set(sizes):
        return None
    return [sizes[label] for label in output]

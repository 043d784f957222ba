"""A model in ONNX Runtime whose inner values can be looked at: more outputs, no weight copied."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx import targets
from sparse_onnx.core.collector import paused
from sparse_onnx.core.errors import OutsideError, SparseOnnxError
from sparse_onnx.graph import stats
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.matching.linear import MICROSOFT
from sparse_onnx.matching.values import attribute, scalar
from sparse_onnx.optimize import runner
from sparse_onnx.optimize.choose import choose
from sparse_onnx.passes.repair_scatter_add import RepairScatterAdd
from sparse_onnx.targets import session as sessions

#: Bytes of weights from which on ORT keeps no packed copies of them: it maps the files, and multiplies more slowly.
_LARGE = 2 << 30
_MAPPED = {"session.disable_prepacking": "1"}


@dataclasses.dataclass(frozen=True)
class Counted:
    """An operator whose results are counted in the graph: names of the outputs that hold zeros and elements."""

    name: str
    operator: str
    zeros: str
    size: str


class Observed:
    """A model with the values of these names among its outputs.

    Blocks run in the form that the CPU target takes: their experts are slices of what is stored, also where the model
    that they were found in keeps them apart.

    Args:
        model: prepared and recognised; it is not changed.
        names: of values of the main graph.
        rectified: values whose zeros are counted, and the operators that they come from.
        threads: of the session; None: ORT's default.

    Raises:
        ModelError, ImpossibleError: ORT cannot load or run it.
    """

    def __init__(
        self,
        model: ir.Model,
        names: Iterable[str],
        rectified: Sequence[tuple[ir.Value, str]] = (),
        threads: int | None = None,
    ) -> None:
        copy = model.clone()
        values = ir.convenience.create_value_mapping(copy.graph, include_subgraphs=False)
        inputs = {value.name for value in copy.graph.inputs}
        self._fed = {name for name in names if name in inputs}
        present = {value.name for value in copy.graph.outputs}
        for name in names:
            if name not in inputs and name not in present:
                copy.graph.outputs.append(values[name])
                present.add(name)
        emit = Emitter(copy.graph, Namespace(copy), "zeros")
        self.counted = tuple(
            _count(emit, values[value.name or ""], operator) for value, operator in rectified
        )
        copy.graph.extend(emit.nodes)
        entries = _MAPPED if stats.weight_bytes(model) > _LARGE else None
        self._session = sessions.create_session(
            _lowered(copy), threads=threads, entries=entries, name="the model"
        )

    def __call__(self, feeds: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
        """The values of these names in one run.

        Raises:
            OutsideError: the runtime failed.
        """
        found = {name: feeds[name] for name in names if name in self._fed}
        rest = [name for name in names if name not in self._fed]
        if rest:
            try:
                found |= dict(zip(rest, self._session.run(rest, dict(feeds)), strict=True))
            except Exception as error:  # ORT's exceptions share no base class
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise OutsideError(f"onnxruntime failed while running: {first[:400]}") from error
        return found


def _lowered(model: ir.Model) -> ir.Model:
    """The blocks as the CPU runs them; in neutral form where they cannot be lowered."""
    profile = targets.get("cpu")
    lowered = model.clone()
    try:
        with paused():
            choose(lowered, profile, None)
        steps = [item for item in runner.plan(profile.forms) if item.step.phase in ("lower", "finish")]
        runner.run(lowered, steps)
    except SparseOnnxError:
        with paused():
            RepairScatterAdd()(model)
        return model
    return lowered


def rectified_values(model: ir.Model) -> list[tuple[ir.Value, str]]:
    """Results of the main graph's operators that make exact zeros of what is small or negative."""
    return [(node.outputs[0], node.op_type) for node in model.graph if _rectifies(node)]


def _rectifies(node: ir.Node) -> bool:
    if node.domain == MICROSOFT:
        return node.op_type in ("FusedConv", "FusedGemm") and attribute(node, "activation", "") == "Relu"
    if node.op_type in ("Relu", "ThresholdedRelu"):
        return node.domain == ""
    if node.op_type != "Clip" or node.domain != "":
        return False
    low = node.inputs[1] if len(node.inputs) > 1 else None
    floor = attribute(node, "min") if low is None else scalar(low)
    return floor == 0 and node.outputs[0].dtype is not None and node.outputs[0].dtype.is_floating_point()


def _count(emit: Emitter, value: ir.Value, operator: str) -> Counted:
    number = value if value.dtype == ir.DataType.FLOAT else emit.op("Cast", value, to=ir.DataType.FLOAT)
    equal = emit.op("Equal", number, emit.scalar(0.0, ir.DataType.FLOAT))
    zeros = emit.op("ReduceSum", emit.op("Cast", equal, to=ir.DataType.INT64), keepdims=0)
    size = emit.op("Size", value)
    for counted in (zeros, size):
        counted.type, counted.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([])
        emit.graph.outputs.append(counted)
    return Counted(value.name or "", operator, zeros.name or "", size.name or "")

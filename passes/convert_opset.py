"""Models of an opset from 13 to 17 become opset 18, in which the neutral form is written.

Blocks of quantized experts need 21 (block-wise DequantizeLinear), so a model with `com.microsoft::QMoE` becomes 21.
Where model-local functions are written in another version than the model, all become the newest of these: only then
can they be inlined.

Between 13 and 24 few definitions changed in meaning:

- ReduceMax, ReduceMean ... take `axes` as an input (18), `Split` into equal parts counts them (18),
- `RoiAlign` would move its samples by half a pixel (16), `GridSample` renamed its modes (20),

and these are rewritten. All other changes added types, attributes or inputs that mean the same where they are absent.
No weight is read or moved: the size of the model does not matter. Names, metadata and operators of other domains stay.
onnx's own converter is not used, since it drops functions, metadata and what its C++ classes do not know.

Exact. Enters subgraphs and functions. Afterwards onnx's checker must accept the model, and ONNX Runtime load it, if
they did before (graphs above 20,000 nodes are left to the checker). Refused, the model left as it was: an opset below
13, an operator whose change of meaning is not among the above (BatchNormalization in training, DFT,
GroupNormalization), an attribute that a function takes from its caller, and whatever fails those checks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import ClassVar

import onnx
import onnx_ir as ir

from sparse_onnx.core.errors import SparseOnnxError
from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.core.report import Refusal
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.graph.valid import invalid, without_weights
from sparse_onnx.targets import session

_OLDEST, _NEEDED, _QUANTIZED, _NEWEST = 13, 18, 21, 24
#: The IR version that a default-domain version belongs to.
_IR_VERSION = {_NEEDED: 8, 19: 9, 20: 9, _QUANTIZED: 10, 22: 10, 23: 11, _NEWEST: 12}
_LARGEST_LOADED = 20_000

_REDUCTIONS = frozenset(
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)
#: Where the newer definitions, up to 24, say the same of every older node.
_SAME = frozenset(
    """Acos Acosh Add Asin Asinh Atan Atanh AveragePool Bernoulli Cast CastLike Constant ConstantOfShape Conv
    ConvTranspose Cos Cosh CumSum DeformConv DequantizeLinear Det Div Dropout Elu Equal EyeLike Flatten GRU
    GlobalAveragePool GlobalLpPool GlobalMaxPool GreaterOrEqual HardSigmoid HardSwish Identity If InstanceNormalization
    IsInf IsNaN LSTM LayerNormalization LeakyRelu LessOrEqual Loop LpNormalization LpPool MaxPool MaxRoiPool MaxUnpool
    Mish Mul Multinomial NegativeLogLikelihoodLoss OptionalGetElement OptionalHasElement PRelu Pad Pow QLinearMatMul
    QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Relu Reshape Resize Round Scan
    ScatterElements ScatterND Selu Shape Sin Sinh Size Softplus Softsign SplitToSequence Squeeze Sub Tan
    ThresholdedRelu TopK Transpose Unsqueeze Where""".split()  # noqa: SIM905
)
_MODES = {"bilinear": "linear", "bicubic": "cubic"}

Undo = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class ConvertOpset(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "convert_opset"
    summary: ClassVar[str] = "models of opset 13 to 17 become opset 18"

    oldest: int = dataclasses.field(default=_NEEDED, metadata={"help": "opset that older models become"})

    def call(self, model: ir.Model) -> Outcome:
        bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
        versions = [body.opset_imports[""] for body in bodies if "" in body.opset_imports]
        if not versions:
            return Outcome(model, False)
        quantized = any(
            node.domain == "com.microsoft" and node.op_type == "QMoE" for node in model.graph.all_nodes()
        )
        target = max(*versions, self.oldest, _QUANTIZED if quantized else 0)
        if min(versions) == target:
            return Outcome(model, False)
        refusal = _obstacle(bodies, target)
        if refusal is None:
            undo = contextlib.ExitStack()
            _convert(model, bodies, target, undo)
            refusal = _judge(model, undo, functools.partial(_convert, model, bodies, target))
        if refusal is not None:
            return Outcome(model, False, 1, 0, (refusal,))
        return Outcome(model, True, 1, 1)


def _obstacle(bodies: list[ir.Graph | ir.Function], target: int) -> Refusal | None:
    for body in bodies:
        version = body.opset_imports.get("", target)
        if version < _OLDEST:
            return _refusal(
                f"opset {version} is older than {_OLDEST}, which blocks of experts are recognised from",
                "",
                f"convert it to opset {_NEEDED} or newer with onnx.version_converter, or export it again",
            )
        if version == target:
            continue
        for node in body.all_nodes():
            if node.domain == "" and _changed(node.op_type, version, target):
                reason = _unknown(node, version, target)
                if reason:
                    return _refusal(
                        f"opset {version} cannot be converted to {target}: {node.op_type} {reason}",
                        node.name or node.outputs[0].name or node.op_type,
                        f"export the model with opset {target}",
                    )
    return None


def _unknown(node: ir.Node, version: int, target: int) -> str:
    """Why the node cannot be converted; empty where it can."""
    known = node.op_type in _SAME or node.op_type in _ADAPTERS
    if node.op_type == "BatchNormalization":
        if version < 14 and sum(1 for value in node.outputs if value.name) > 1:
            return "in training mode means something else in newer versions"
        known = True
    if not known or target > _NEWEST:
        return "changed its meaning in between"
    if node.op_type in _ADAPTERS and any(attribute.is_ref() for attribute in node.attributes.values()):
        return "has an attribute that the caller of its function gives"
    return ""


@functools.lru_cache(maxsize=4096)
def _changed(op_type: str, version: int, target: int) -> bool:
    """Whether the operator has another definition in `target`. ORT's own, which onnx never had, have none."""
    return _since(op_type, version) != _since(op_type, target)


def _since(op_type: str, version: int) -> int:
    try:
        return onnx.defs.get_schema(op_type, version).since_version
    except onnx.defs.SchemaError:
        return 0


def _convert(
    model: ir.Model, bodies: list[ir.Graph | ir.Function], target: int, undo: contextlib.ExitStack
) -> None:
    names = Namespace(model)
    for body in bodies:
        version = body.opset_imports.get("", target)
        for node in list(body.all_nodes()) if version < target else ():
            since, adapt = _ADAPTERS.get(node.op_type, (0, None))
            if node.domain == "" and adapt is not None and version < since <= target:
                for back in adapt(node, names, isinstance(body, ir.Function)):
                    undo.callback(back)
        if "" in body.opset_imports:
            undo.callback(body.opset_imports.__setitem__, "", version)
            body.opset_imports[""] = target
    undo.callback(setattr, model, "ir_version", model.ir_version)
    model.ir_version = max(model.ir_version, _IR_VERSION[target])


def _axes_input(node: ir.Node, names: Namespace, in_function: bool) -> Iterator[Undo]:
    """`axes` from an attribute to an input. None, or an empty one, reduces all axes in both."""
    if "axes" not in node.attributes:
        return
    yield _attributes_back(node)
    attribute = node.attributes.pop("axes")
    axes = list(attribute.as_ints())
    if not axes:
        return
    graph = node.graph
    assert graph is not None
    if in_function:  # whose constants cannot be initializers
        name = names.free(f"{node.name or node.op_type}/axes")
        constant = ir.node("Constant", [], {"value_ints": axes}, name=name)
        constant.outputs[0].name = name
        graph.insert_before(node, constant)
        yield functools.partial(graph.remove, constant)
        value = constant.outputs[0]
    else:
        assert isinstance(graph, ir.Graph)
        value = Emitter(graph, names, "").ints(*axes)
        yield functools.partial(_remove_unused, graph, value)
    node.resize_inputs(2)
    node.replace_input_with(1, value)
    yield functools.partial(node.resize_inputs, 1)


def _attributes_back(node: ir.Node) -> Undo:
    """The way back to the attributes that the node has now, in their order."""
    attributes = list(node.attributes.values())

    def back() -> None:
        node.attributes.clear()
        node.attributes.update({attribute.name: attribute for attribute in attributes})

    return back


def _remove_unused(graph: ir.Graph, value: ir.Value) -> None:
    if not value.uses():
        graph.initializers.pop(value.name or "", None)


def _count_parts(node: ir.Node, names: Namespace, in_function: bool) -> Iterator[Undo]:
    """Parts of equal size were counted by the outputs, and now are by an attribute."""
    del names, in_function
    if len(node.inputs) < 2 or node.inputs[1] is None:
        yield _attributes_back(node)
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _whole_pixels(node: ir.Node, names: Namespace, in_function: bool) -> Iterator[Undo]:
    del names, in_function
    key = "coordinate_transformation_mode"
    yield _attributes_back(node)
    node.attributes[key] = ir.AttrString(key, "output_half_pixel")


def _renamed_mode(node: ir.Node, names: Namespace, in_function: bool) -> Iterator[Undo]:
    del names, in_function
    attribute = node.attributes.get("mode")
    mode = _MODES.get(attribute.as_string()) if attribute is not None else None
    if attribute is not None and mode is not None:
        yield _attributes_back(node)
        node.attributes["mode"] = ir.AttrString("mode", mode)


#: From which version on a node must be changed, and how. Each gives the ways back, the last first to be gone.
_ADAPTERS: dict[str, tuple[int, Callable[[ir.Node, Namespace, bool], Iterator[Undo]]]] = {
    **dict.fromkeys(_REDUCTIONS, (18, _axes_input)),
    "Split": (18, _count_parts),
    "RoiAlign": (16, _whole_pixels),
    "GridSample": (20, _renamed_mode),
}


def _judge(
    model: ir.Model, undo: contextlib.ExitStack, again: Callable[[contextlib.ExitStack], None]
) -> Refusal | None:
    """Keeps a conversion that is as valid as the model was, and takes back any other."""
    after = _faults(model)
    if any(after):
        undo.close()
        before = _faults(model)
        for fault, former, judge in zip(after, before, ("onnx's checker", "ONNX Runtime"), strict=True):
            if fault and not former:
                return _refusal(f"the conversion fails: {judge} says: {fault}", "", "please report it")
        again(undo)
    undo.pop_all()
    return None


def _faults(model: ir.Model) -> tuple[str, str]:
    """What onnx's checker and ORT, which gets the weights as inputs, have against the model."""
    fault = invalid(model)
    if fault or sum(1 for _ in model.graph.all_nodes()) > _LARGEST_LOADED:
        return fault, ""
    try:
        session.create_session(ir.from_proto(without_weights(model)), threads=1)
    except SparseOnnxError as error:
        return fault, str(error)
    return fault, ""


def _refusal(reason: str, node: str, hint: str) -> Refusal:
    return Refusal(reason, node, hint, ConvertOpset.name)

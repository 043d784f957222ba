"""What a graph does with an integer or boolean input: index a table, choose experts, mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from sparse_onnx.blocks.combine import is_combine
from sparse_onnx.blocks.moe import is_neutral
from sparse_onnx.verify.metadata import sound_blocks

#: Operators whose result holds values of these inputs, perhaps others beside them; None: of all inputs.
_CARRIERS: dict[str, tuple[int, ...] | None] = {
    "Cast": (0,), "Reshape": (0,), "Unsqueeze": (0,), "Squeeze": (0,), "Identity": (0,), "Flatten": (0,),
    "Transpose": (0,), "Expand": (0,), "Tile": (0,), "Slice": (0,), "Split": (0,), "Clip": (0,), "Pad": (0,),
    "Where": (1, 2), "Concat": None, "Max": None, "Min": None, "Gather": (0,), "GatherElements": (0,),
    "GatherND": (0,), "ScatterElements": (0, 2), "ScatterND": (0, 2),
}  # fmt: skip
_LOGIC = frozenset({"And", "Or", "Not", "Xor"})
_COMPARISONS = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})


@dataclasses.dataclass(frozen=True)
class Meaning:
    """`rows`: values must lie below; None where no table was found. `experts`: of the block whose expert_index this
    is; such a value may be `experts` itself, a dropped slot. `mask`: it decides what is seen."""

    rows: int | None = None
    experts: int | None = None
    mask: bool = False

    @property
    def droppable(self) -> bool:
        return self.experts is not None and (self.rows is None or self.rows > self.experts)

    @property
    def bound(self) -> int | None:
        known = [size for size in (self.rows, self.experts) if size is not None]
        return min(known) if known else None


def lowered_indices(model: ir.Model) -> dict[str, int]:
    """Names of the values that choose experts of lowered blocks, and how many experts these have."""
    found: dict[str, int] = {}
    for block in sound_blocks(model):
        if block.experts:
            found[block.expert_index] = min(block.experts, found.get(block.expert_index, block.experts))
    return found


def meaning(value: ir.Value, indices: Mapping[str, int]) -> Meaning:
    """Follows an input forward through all operators that keep its values.

    Args:
        value: the input.
        indices: as `lowered_indices` gives them.
    """
    rows: list[int] = []
    experts: list[int] = []
    mask = arithmetic = False
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.name is not None and current.name in indices:
            experts.append(indices[current.name])
        for node, position in current.uses():
            if is_neutral(node) and position == 1:
                rows_of = [
                    weight.shape[0] for weight in node.inputs[3:] if weight is not None and weight.shape
                ]
                experts += [size for size in rows_of[:1] if isinstance(size, int)]
                continue
            if is_combine(node) and position == 0:
                stack = node.inputs[2]
                count = stack.shape[0] if stack is not None and stack.shape else None
                experts += [count] if isinstance(count, int) else []
                continue
            size = _table_rows(node, position)
            if size is not None:
                rows.append(size)
            elif node.op_type in _LOGIC or (node.op_type == "Where" and position == 0):
                mask = True
            elif node.op_type in _COMPARISONS:
                pending.append(node.outputs[0])
            elif node.op_type in _CARRIERS and node.domain == "":
                positions = _CARRIERS[node.op_type]
                if positions is None or position in positions:
                    pending.extend(node.outputs)
            elif _is_float(current):
                arithmetic = True
    found = bool(rows or experts)
    return Meaning(
        min(rows, default=None), min(experts, default=None), mask=not found and (mask or arithmetic)
    )


def _is_float(value: ir.Value) -> bool:
    """Whether the integers were cast to a floating-point type: (1 - mask) * -inf and the like."""
    node = value.producer()
    while (
        node is not None and node.domain == "" and node.op_type != "Cast" and node.inputs and node.inputs[0]
    ):
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Cast" or "to" not in node.attributes:
        return False
    return ir.DataType(node.attributes["to"].as_int()).is_floating_point()


def _table_rows(node: ir.Node, position: int) -> int | None:
    if node.op_type == "OneHot" and node.domain == "" and position == 0:
        depth = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
        return None if depth is None else int(depth.numpy().reshape(-1)[0])
    if position != 1 or node.inputs[0] is None:
        return None
    if node.op_type == "Gather" and node.domain == "":
        name = "axis"
    elif node.op_type == "GatherBlockQuantized" and node.domain == "com.microsoft":
        name = "gather_axis"
    else:
        return None
    axis = node.attributes[name].as_int() if name in node.attributes else 0
    shape = _shape(node.inputs[0])
    return shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None


def _shape(table: ir.Value) -> tuple[int, ...] | None:
    """Of a table with known axes, or one that is computed from such a one without changing them but in order."""
    if table.shape is not None and table.shape.is_static():
        return tuple(table.shape.numpy())
    tensor = ir.convenience.get_const_tensor(table)
    if tensor is not None:
        return tuple(tensor.shape.numpy())
    node = table.producer()
    if node is None or node.domain != "" or not node.inputs or node.inputs[0] is None:
        return None
    if node.op_type in ("DequantizeLinear", "QuantizeLinear", "Cast", "Identity", "Mul", "Neg"):
        return _shape(node.inputs[0])
    if node.op_type == "Transpose":
        shape = _shape(node.inputs[0])
        if shape is None:
            return None
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(shape))[::-1]
        return tuple(shape[axis] for axis in order)
    return None

"""The body of layers of all experts: bytes are taken as they are, other integers as narrow as may be."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from expert_layers import Experts, fed, make, rows
from layers import error, session

from sparse_onnx import blocks
from sparse_onnx.blocks.thresholded_experts import EXPERTS_N_BITS, widened

TYPES = ["int8", "uint8", "int4", "uint4"]
RANGE = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15), "int16": (-32768, 32767)}


def casts(model: ir.Model) -> list[str]:
    function = model.functions["sparse_onnx", EXPERTS_N_BITS, ""]
    found = (node.attributes["to"].as_int() for node in function if node.op_type == "Cast")
    return [ir.DataType(to).name.lower() for to in found]


@pytest.mark.parametrize(
    ("stored", "wide"), [("int8", []), ("uint8", []), ("int4", ["int8"]), ("uint4", ["int8"])]
)
def test_integers_are_no_wider_than_they_must_be(stored: str, wide: list[str]) -> None:
    model = ir.from_proto(make(Experts(4, 32, 16, stored=stored)).model)
    assert casts(model) == wide * 2
    assert not blocks.attach_functions(model)


def test_what_all_types_are_widened_to_holds_them() -> None:
    for count in (1, 2, 3, 4):
        for names in itertools.combinations(TYPES, count):
            wide = widened(ir.DataType[name.upper()] for name in names)
            if wide is None:
                assert set(names) <= {"int8", "uint8"}
                continue
            low, high = RANGE[wide.name.lower()]
            assert all(low <= RANGE[name][0] and RANGE[name][1] <= high for name in names), names
    assert widened([]) == widened([None]) == widened([ir.DataType.INT8, None]) == ir.DataType.INT16


@pytest.mark.parametrize(("first", "second"), [("uint8", "int4"), ("uint8", "uint4"), ("int8", "uint4")])
def test_layers_of_two_types(first: str, second: str) -> None:
    """One function serves both, also where the second came later."""
    layers = [Experts(4, 32, 32, stored=stored, seed=at) for at, stored in enumerate((first, second))]
    made = [make(layer) for layer in layers]
    model = ir.to_proto(ir.from_proto(made[0].model))
    node = onnx.NodeProto.FromString(made[1].model.graph.node[0].SerializeToString())
    node.input[:] = ["Y", "index", *(f"second.{name}" for name in node.input[2:])]
    node.output[:] = ["Z"]
    model.graph.node.append(node)
    for item in made[1].model.graph.initializer:
        model.graph.initializer.add().CopyFrom(item)
        model.graph.initializer[-1].name = f"second.{item.name}"
    model.graph.output[0].name = "Z"
    joined = ir.from_proto(model)
    assert blocks.attach_functions(joined) and not blocks.attach_functions(joined)
    model = ir.to_proto(joined)
    onnx.checker.check_model(model, full_check=True)
    x, index = rows(layers[0], 9)
    expected = made[1].expected(made[0].expected(x, index).astype(np.float32), index)
    assert error(expected, session(model, native=False).run(None, fed(layers[0], x, index))[0]) < 1e-5

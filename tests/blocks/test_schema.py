"""Schemas of the neutral operators. Each test has a process of its own: registering is for good."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PRELUDE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import onnx
from onnx import helper
from moe_cases import Case, specs, session
from sparse_onnx.blocks import register_schemas
register_schemas()
register_schemas()
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_operators_are_documented() -> None:
    out = run("""
for op in ("MoE", "GatedMoE"):
    schema = onnx.defs.get_schema(op, 1, "sparse_onnx")
    print(op, [i.name for i in schema.inputs], sorted(schema.attributes))
    assert all(a.required and a.description for a in schema.attributes.values())
    assert all(i.description for i in schema.inputs) and "dropped" in schema.doc
    types = {t.type_param_str: set(t.allowed_type_strs) for t in schema.type_constraints}
    assert {"tensor(float)", "tensor(float16)", "tensor(bfloat16)"} <= types["T"] == types["W"]
    assert types["I"] == {"tensor(int64)"}
""")
    assert out.splitlines() == [
        "MoE ['tokens', 'expert_index', 'expert_weight', 'fc1', 'fc1_bias', 'fc2', 'fc2_bias'] "
        "['activation', 'alpha', 'beta', 'gate_layout', 'limit', 'weight_layout']",
        "GatedMoE ['tokens', 'expert_index', 'expert_weight', 'gate', 'gate_bias', 'up', 'up_bias', 'down', "
        "'down_bias'] ['activation', 'alpha', 'beta', 'limit', 'weight_layout']",
    ]


def test_models_are_checked_and_inferred_with_and_without_the_function() -> None:
    run("""
for spec in specs():
    for dtype, weight_dtype in (("float32", "float32"), ("bfloat16", "float32")):
        case = Case(spec, dtype=dtype, weight_dtype=weight_dtype)
        model = case.model()
        model.graph.node[0].output[0] = "moe"
        model.graph.node.append(helper.make_node("Identity", ["moe"], ["y"]))
        bare = onnx.ModelProto()
        bare.CopyFrom(model)
        del bare.functions[:]
        for each in (model, bare):
            onnx.checker.check_model(each, full_check=True)
            inferred = onnx.shape_inference.infer_shapes(each, strict_mode=True, data_prop=True)
            (moe,) = (value for value in inferred.graph.value_info if value.name == "moe")
            shape = moe.type.tensor_type.shape.dim
            assert [shape[0].dim_param, shape[1].dim_value] == ["T", case.outputs], moe
            assert moe.type.tensor_type.elem_type == inferred.graph.output[0].type.tensor_type.elem_type
""")


def test_a_missing_attribute_or_another_type_is_refused() -> None:
    run("""
case = Case(next(specs()))
for breakage in ("attribute", "type"):
    model = case.model()
    del model.functions[:]
    if breakage == "attribute":
        del model.graph.node[0].attribute[0]
    else:
        model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.INT32
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        continue
    raise SystemExit(f"accepted a wrong {breakage}")
""")


def test_sizes_that_are_unknown_stay_unknown() -> None:
    run("""
case = Case(next(specs()))
model = case.model()
del model.functions[:]
for value in (*model.graph.input, *model.graph.output):
    for dimension in value.type.tensor_type.shape.dim:
        dimension.Clear()
model.graph.node[0].output[0] = "moe"
model.graph.node.append(helper.make_node("Identity", ["moe"], ["y"]))
inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
(moe,) = inferred.graph.value_info
dimensions = moe.type.tensor_type.shape.dim
assert len(dimensions) == 2 and not any(d.dim_value for d in dimensions), moe
""")

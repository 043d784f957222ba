"""MoE and QMoE nodes, lifted and lowered, against ONNX Runtime's own kernels; and nodes that must stay."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from contrib_models import Case, feeds, model, weights
from harness import assert_close, run_model
from onnx import TensorProto, helper

import sparse_onnx
from sparse_onnx.blocks import blocks, reference
from sparse_onnx.passes.fuse_gating import FuseGating
from sparse_onnx.passes.recognise_contrib import RecogniseContrib
from sparse_onnx.verify import lowering

KINDS = ["random", "ties", "zeros", "far", "broken"]
QUANTIZED = [
    Case(bits=4, block=16),
    Case(bits=4, block=32, points=True),  # 48 is no multiple of 32: the last block of fc2 is half a block
    Case(bits=4, points=True),
    Case(bits=8, points=True),
    Case(bits=8, kind="gelu", top_k=1),
    Case(bits=2, block=16, points=True, opset=25),
    Case(bits=2, opset=25, kind="relu"),
    Case(bits=4, block=64, biases=False, rank=3),  # one block a row
    Case(bits=4, block=16, router_weights=True),
    Case(bits=4, block=16, router_weights=True, normalize=0, experts=9, top_k=3),
    Case(bits=4, hidden=24, inner=20),  # rows that MatMulNBits has no blocks for
    Case(bits=4, block=16, extra=(("weights_prepacked", 0), ("accuracy_level", 1))),
]


def lifted(original: ir.Model) -> ir.Model:
    """A copy in neutral form; the original stays as it was."""
    copy = original.clone()
    outcome = RecogniseContrib(any_width=True)(copy)
    assert (outcome.matched, outcome.rewritten, outcome.refusals, outcome.modified) == (1, 1, (), True)
    onnx.checker.check_model(ir.to_proto(copy), full_check=True)
    again = RecogniseContrib()(copy)
    assert not again.modified and again.matched == 0
    return copy


def check(case: Case, kinds: list[str], tokens: tuple[int, ...] = (7,), tolerance: float = 2e-6) -> ir.Model:
    """Original, neutral form and dispatch give the same; returns the last."""
    original = model(case)
    neutral = lifted(original)
    lowered = neutral.clone()
    outcome = FuseGating()(lowered)
    assert outcome.rewritten == 1 and not outcome.refusals
    onnx.checker.check_model(ir.to_proto(lowered), full_check=True)
    for kind in kinds:
        for count in tokens:
            inputs = feeds(case, count, kind)
            [expected] = run_model(original, inputs)
            assert count == 0 or kind in ("far", "broken") or np.abs(expected).max() > 0.1
            for form in (neutral, lowered):
                assert_close(expected, run_model(form, inputs)[0], tolerance)
    return lowered


@pytest.mark.parametrize("kind", ["relu", "gelu", "silu", "swiglu"])
@pytest.mark.parametrize("normalize", [0, 1])
def test_moe_as_the_kernel_computes_it(kind: str, normalize: int) -> None:
    check(Case(kind=kind, normalize=normalize), KINDS)
    check(Case(kind=kind, normalize=normalize, top_k=5, experts=11, biases=False), ["random", "zeros"])


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("case", [Case(), Case(bits=4, block=16)])
def test_any_number_of_tokens(case: Case, rank: int) -> None:
    check(dataclasses.replace(case, rank=rank), ["random"], (0, 1, 2, 40))


@pytest.mark.parametrize("top_k", [1, 6])
def test_one_expert_and_all_experts(top_k: int) -> None:
    check(Case(top_k=top_k), ["random", "far"])
    check(Case(top_k=top_k, bits=4, block=16), ["random", "far"])


def test_alpha_beta_and_limit_of_swiglu() -> None:
    extra = (("activation_alpha", 1.702), ("activation_beta", 1.0), ("swiglu_limit", 0.4))
    lowered = check(Case(extra=extra), ["random"])
    assert lowered.metadata_props["sparse_onnx.blocks"].count('"spelling": "contrib"') == 1
    [block] = blocks(lifted(model(Case(extra=extra))))
    assert (block.spec.alpha, block.spec.beta, block.spec.limit) == (1.702, 1.0, 0.4)
    check(Case(extra=(("swiglu_limit", float("inf")),)), ["random"])


@pytest.mark.parametrize("case", [Case(), Case(bits=4, block=16)])
def test_float16(case: Case) -> None:
    check(dataclasses.replace(case, dtype=np.float16), ["random"], tolerance=2e-3)


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_weights_stay_quantized(case: Case) -> None:
    # Among NaN, the kernel's choice is that of a sort by an order that is none; router_weights make it visible.
    lowered = check(case, KINDS[:4] if case.router_weights else KINDS)
    stored = sum(value.const_value.nbytes for value in lowered.graph.initializers.values())
    assert stored < 0.7 * sum(
        array.nbytes for array in weights(dataclasses.replace(case, bits=0), rng()).values()
    )
    kinds = [node.op_type for node in lowered.graph]
    fits = not case.block or case.hidden % 16 == case.inner % 16 == 0  # whole rows are filled up
    assert kinds.count("MatMulNBits") == (2 * case.experts if fits else 0)
    assert kinds.count("DequantizeLinear") == (0 if fits else 2 * case.experts)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_weights_are_the_same_bytes(tmp_path: Path) -> None:
    case = Case(bits=4, block=16)
    path = tmp_path / "model.onnx"
    ir.save(model(case), path, external_data="model.data", size_threshold_bytes=64)
    copy = ir.load(path)
    ranges = {(t.offset, t.nbytes) for value in copy.graph.initializers.values() if (t := value.const_value)}
    RecogniseContrib()(copy)
    [block] = blocks(copy)
    for role in ("fc1", "fc2"):
        data = block.weights[role].producer().inputs[0].const_value
        assert isinstance(data, ir.ExternalTensor) and (data.offset, data.nbytes) in ranges
        assert data.dtype == ir.DataType.UINT4
    whole = data
    FuseGating()(copy)
    parts = [
        t
        for value in copy.graph.initializers.values()
        if isinstance(t := value.const_value, ir.ExternalTensor)
    ]
    inside = [t for t in parts if whole.offset <= t.offset < whole.offset + whole.nbytes]
    assert len(inside) == case.experts and sum(t.nbytes for t in inside) == whole.nbytes


@pytest.mark.parametrize(
    "case",
    [Case(kind="silu", fc3=True), Case(kind="swiglu", fusion=2), Case(kind="swiglu", fc3=True, fusion=0)],
)
def test_forms_that_only_cuda_runs_follow_the_definition(case: Case) -> None:
    lowered = lifted(model(case))
    [block] = blocks(lowered)
    assert block.op == ("GatedMoE" if case.fc3 else "MoE") and block.gated
    FuseGating()(lowered)
    inputs = feeds(case, 7)
    held = weights(case, rng())
    scores = np.exp(inputs["logits"]) / np.exp(inputs["logits"]).sum(1, keepdims=True)
    index = np.argsort(-scores, axis=1)[:, : case.top_k]
    weight = np.take_along_axis(scores, index, 1)
    names = {"gate": "fc1", "up": "fc3", "down": "fc2"} if case.fc3 else {"fc1": "fc1", "fc2": "fc2"}
    matrices = {role + part: held[name + part] for role, name in names.items() for part in ("", "_bias")}
    expected = reference(
        block.spec, inputs["input"], index, weight / weight.sum(1, keepdims=True), **matrices
    )
    assert_close(expected, run_model(lowered, inputs)[0], 2e-6)


MIXER = (("use_sparse_mixer", 1),)
ROUNDED = (("accuracy_level", 4),)
REFUSED: list[tuple[Case, dict[str, Any], str]] = [
    (Case(top_k=7), {}, "k is 7, and there are 6 experts"),
    (Case(extra=(("k", 0),)), {}, "k is 0"),
    (Case(kind="identity"), {}, "activation_type is 'identity'"),
    (Case(kind="relu2"), {}, "activation_type is 'relu2'"),
    (Case(kind="relu", fc3=True), {}, "'relu' with swiglu_fusion 0 with fc3"),
    (Case(fusion=0), {}, "'swiglu' with swiglu_fusion 0 without fc3"),
    (Case(fc3=True, fusion=1), {}, "'swiglu' with swiglu_fusion 1 with fc3"),
    (Case(extra=MIXER), {}, "use_sparse_mixer is set"),
    (Case(extra=(("normalize_routing_weights", 2),)), {}, "normalize_routing_weights is 2"),
    (Case(extra=(("swiglu_limit", 0.0),)), {}, "swiglu_limit is 0"),
    (Case(extra=(("swiglu_limit_after_activation", 1),)), {}, "swiglu_limit_after_activation"),
    (Case(extra=(("temperature", 2.0),)), {}, "attribute 'temperature'"),
    (Case(without=("fc1",)), {}, "fc1 is computed or passed in"),
    (Case(without=("fc2_bias",)), {}, "fc2_bias is computed or passed in"),
    (Case(bits=4, block=16, without=("fc1_scales",)), {}, "fc1_scales is computed or passed in"),
    (Case(), {"fc2": np.zeros((6, 48, 32), np.float32)}, "fc1 has the shape [6, 96, 32], not [6, 64, 48]"),
    (Case(), {"fc1": np.zeros((5, 96, 32), np.float32)}, "fc1 has the shape [5, 96, 32], not [6, 96, 32]"),
    (Case(), {"fc1": np.zeros((6, 96), np.float32)}, "fc1 is [6, 96]"),
    (Case(), {"fc1_bias": np.zeros((6, 48), np.float32)}, "fc1_bias has the shape [6, 48]"),
    (Case(), {"fc2_bias": np.zeros((6, 32), np.float16)}, "different types"),
    (Case(), {"fc3_bias": np.zeros((6, 48), np.float32)}, "fc3_bias and no fc3"),
    (Case(opset=17), {}, "opset 17"),
    (Case(bits=4, block=16, opset=20), {}, "opset 20 cannot hold 4-bit weights"),
    (Case(bits=2, block=16, opset=24), {}, "opset 24 cannot hold 2-bit weights"),
    (Case(bits=4, block=16, normalize=0), {}, "normalize_routing_weights is 0 on a QMoE"),
    (Case(bits=4, block=16, extra=ROUNDED), {}, "rounds activations to 8 bits"),
    (Case(bits=8, block=16), {}, "rounds activations to 8 bits"),
    (Case(bits=8), {}, "8-bit experts run several times faster"),
    (Case(bits=2, block=16, opset=25), {}, "2-bit experts run several times faster"),
    (Case(bits=4, block=16, extra=(("quant_type", "fp4"),)), {}, "quantized as 'fp4'"),
    (Case(bits=4, block=16, extra=(("fc1_expert_weight_bits", 8),)), {}, "different widths"),
    (Case(bits=4, block=16, extra=(("weights_prepacked", 1),)), {}, "only one GPU kernel reads"),
    (Case(bits=4, block=16, fusion=2), {}, "only one GPU kernel reads"),
    (Case(bits=4, block=16, extra=(("block_size", 32),)), {}, "fc1_scales has the shape [6, 96, 2]"),
    (
        Case(bits=4, block=16),
        {"fc1_zero_points": np.zeros((6, 96, 2), np.uint8)},
        "fc1_zero_points has the shape",
    ),
    (Case(bits=4, block=16), {"fc2_scales": np.ones((6, 32, 3), np.float16)}, "different types"),
]


@pytest.mark.parametrize(("case", "replaced", "reason"), REFUSED, ids=[reason for _, _, reason in REFUSED])
def test_what_is_not_such_a_block_stays(case: Case, replaced: dict[str, Any], reason: str) -> None:
    original = model(case, **replaced)
    before = ir.to_proto(original).SerializeToString(deterministic=True)
    outcome = RecogniseContrib()(original)
    assert (outcome.modified, outcome.matched, outcome.rewritten) == (False, 1, 0)
    [refusal] = outcome.refusals
    assert reason in refusal.reason and refusal.hint and refusal.by == "recognise_contrib"
    assert refusal.node == "/model/layers.0/moe/node"
    assert ir.to_proto(original).SerializeToString(deterministic=True) == before


def test_the_refused_roundings_are_the_kernels_own() -> None:
    """What ORT gives for these is off by far more than the tolerance that a rewrite is held to."""
    for case in (Case(bits=8, block=16), Case(bits=4, block=16, extra=ROUNDED)):
        exact = dataclasses.replace(case, extra=(), bits=4)
        inputs = feeds(case, 20)
        [rounded] = run_model(model(case), inputs)
        if case.bits == 4:
            [expected] = run_model(model(exact), inputs)
            assert np.abs(rounded - expected).max() > 1e-4 * np.abs(expected).max()
        else:  # 256 times as fine, with the same kernel for rows that are one block
            [again] = run_model(model(dataclasses.replace(case, block=0), **_as_rows(case)), inputs)
            [in_blocks] = run_model(model(case, **_in_blocks(case)), inputs)
            assert np.abs(in_blocks - again).max() > 1e-4 * np.abs(again).max()


def _as_rows(case: Case) -> dict[str, np.ndarray]:
    return {name: array[..., 0] for name, array in _in_blocks(case).items()}


def _in_blocks(case: Case) -> dict[str, np.ndarray]:
    """Scales that are the same in all blocks of a row."""
    held = weights(case, rng())
    return {
        name: np.repeat(held[name][..., :1], held[name].shape[-1], -1)
        for name in ("fc1_scales", "fc2_scales")
    }


def test_shapes_that_only_name_the_axes_the_other_way_round() -> None:
    """The kernel takes ``[E, D, I]`` for the bytes of ``[E, I, D]``; without the input's width nothing tells which."""
    case = Case(kind="relu", biases=False)
    held = weights(case, rng())
    turned = {name: held[name].reshape(6, *held[name].shape[:0:-1]) for name in ("fc1", "fc2")}
    original = model(case, **turned)
    [refusal] = RecogniseContrib()(original).refusals
    assert "input has rows of 32, not 48" in refusal.reason
    unknown = model(case)
    unknown.graph.inputs[0].shape = ir.Shape(["T", "D"])
    [refusal] = RecogniseContrib()(unknown).refusals
    assert "the width of its input is not known" in refusal.reason


def test_other_domains_and_operators_are_left_in_silence() -> None:
    original = model(Case())
    for node in original.graph:
        node.domain = "com.example"
    outcome = RecogniseContrib()(original)
    assert outcome.matched == 0 and not outcome.refusals and not outcome.modified


@pytest.mark.parametrize("case", [Case(), Case(bits=4, block=16)])
def test_in_a_branch(case: Case) -> None:
    inner = ir.to_proto(model(case)).graph
    branch = helper.make_graph(list(inner.node), "then", [], list(inner.output), list(inner.initializer))
    other = helper.make_graph(
        [helper.make_node("Identity", ["input"], ["y2"])],
        "else",
        [],
        [helper.make_tensor_value_info("y2", TensorProto.FLOAT, ["T", case.hidden])],
    )
    choose = helper.make_node("If", ["flag"], ["out"], then_branch=branch, else_branch=other)
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["T", case.hidden])
    graph = helper.make_graph([choose], "outer", [*inner.input, flag], [out])
    imports = [helper.make_opsetid("", case.opset), helper.make_opsetid("com.microsoft", 1)]
    original = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10))
    lowered = lifted(original)
    assert FuseGating()(lowered).rewritten == 1
    for value in (True, False):
        inputs = feeds(case, 5) | {"flag": np.asarray(value)}
        assert_close(run_model(original, inputs)[0], run_model(lowered, inputs)[0], 2e-6)


def test_optimize_says_where_the_original_does_not_run(tmp_path: Path) -> None:
    case = Case(kind="silu", fc3=True)
    ir.save(model(case), tmp_path / "in.onnx")
    report = sparse_onnx.optimize(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert report.verify is not None and report.verify.passed
    [note] = [note for note in report.notes if "does not run" in note]
    assert note.startswith("the original does not run on CPUExecutionProvider: ") and "FC3" in note
    assert note.endswith("compared with the neutral form")
    [block] = report.blocks
    assert (block.spelling, block.experts, block.top_k, block.form) == ("contrib", 6, 2, "grouped")


@pytest.mark.parametrize("case", [Case(bits=4, block=16), Case(bits=8, points=True)])
def test_optimize_block_by_block(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for models that are too large to run whole: the reference dequantizes one expert at a time."""
    monkeypatch.setattr(lowering, "WHOLE_BYTES", 0)
    ir.save(model(case), tmp_path / "in.onnx")
    passes = {"recognise_contrib": {"any_width": "true"}}
    report = sparse_onnx.optimize(tmp_path / "in.onnx", tmp_path / "out.onnx", passes=passes)
    assert report.verify is not None and report.verify.passed and report.verify.method == "blocks"
    assert report.verify.max_rel_error is not None and report.verify.max_rel_error < 1e-5
    assert not [note for note in report.notes if "does not run" in note]


CORPUS = Path(__file__).parents[2] / "../shared/corpus"


@pytest.mark.parametrize(
    ("name", "count"),
    [("genai-lfm2-contrib-moe", 1), ("genai-lfm2-contrib-qmoe-int4", 1), ("hf-mixtral-contrib-moe-cuda", 2)],
)
def test_corpus(name: str, count: int, tmp_path: Path) -> None:
    path = CORPUS / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"the corpus is not here: {path}")
    report = sparse_onnx.optimize(path, tmp_path / "out.onnx")
    assert [(block.spelling, block.experts, block.top_k) for block in report.blocks] == [
        ("contrib", 8, 2)
    ] * count
    assert report.verify is not None and report.verify.passed
    assert report.verify.max_rel_error is not None and report.verify.max_rel_error <= 1e-5
    assert not report.refusals

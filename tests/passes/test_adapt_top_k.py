"""Slots of little weight dropped: against a numpy oracle that sorts, through lowering, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from any_block import routing
from any_body import Graph, dense_model, outlined
from bodies_of_experts import linear
from builders import Shape, layered_model, routed_model
from harness import assert_close, run_model
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sparse_onnx.blocks.lowered import lowered_blocks
from sparse_onnx.core.errors import UsageError
from sparse_onnx.core.passes import Outcome
from sparse_onnx.passes.adapt_top_k import ADAPTED_KEY, AdaptTopK
from sparse_onnx.passes.dense_experts import DenseExperts
from sparse_onnx.passes.fuse_gating import FuseGating
from sparse_onnx.passes.gather_experts import GatherExperts
from sparse_onnx.passes.route_experts import RouteExperts


def oracle(
    index: np.ndarray, weight: np.ndarray, experts: int, options: AdaptTopK
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index and weight after, and how close each token's closest decision was."""
    index, new, margin = index.copy(), weight.astype(np.float64), np.full(len(index), np.inf)
    for token in range(len(index)):
        kept = [k for k in range(index.shape[1]) if index[token, k] != experts]
        new[token, [k for k in range(index.shape[1]) if k not in kept]] = 0
        total = new[token, kept].sum()
        if not total > 0:
            continue
        before, stay = 0.0, []
        for rank, k in enumerate(sorted(kept, key=lambda k: (-new[token, k], k))):
            share = new[token, k] / total
            drops = share < options.threshold or (options.top_p < 1 and before >= options.top_p)
            if rank and options.threshold > 0:
                margin[token] = min(margin[token], abs(share - options.threshold))
            if rank and options.top_p < 1:
                margin[token] = min(margin[token], abs(before - options.top_p))
            before += share
            if not rank or not drops:
                stay.append(k)
        gone = [k for k in kept if k not in stay]
        if options.renormalise and gone:
            new[token, stay] *= total / new[token, stay].sum()
        index[token, gone] = experts
    return index, new, margin


def proved_model(shape: Shape) -> ir.Model:
    """`routed_model`, its weights behind a Relu: at least zero, as the graph proves."""
    proto = ir.to_proto(routed_model(shape))
    proto.graph.node.insert(0, helper.make_node("Relu", ["weight"], ["positive"], name="positive"))
    proto.graph.node[1].input[2] = "positive"
    kind = proto.graph.input[2].type.tensor_type.elem_type
    proto.graph.value_info.append(helper.make_tensor_value_info("positive", kind, ["T", shape.top_k]))
    return ir.from_proto(proto)


def adapt(
    model: ir.Model, rewrite: AdaptTopK, rewritten: int, refused: Sequence[str] = ()
) -> tuple[ir.Model, Outcome]:
    """What `harness.check_rewrite` checks, but for the numbers: they change."""
    after = ir.from_proto(copy.deepcopy(ir.to_proto(model)))
    outcome = rewrite(after)
    assert isinstance(outcome, Outcome)
    assert outcome.rewritten == rewritten and outcome.modified == (rewritten > 0)
    assert len(outcome.refusals) == len(refused), outcome.refusals
    for refusal, text in zip(outcome.refusals, refused, strict=True):
        assert text in refusal.reason and refusal.by == "adapt_top_k"
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    proto = ir.to_proto(after).SerializeToString(deterministic=True)
    again = rewrite(ir.from_proto(onnx.load_from_string(proto)))
    assert not again.modified and again.rewritten == 0 and len(again.refusals) == len(refused)
    second = ir.from_proto(copy.deepcopy(ir.to_proto(model)))
    rewrite(second)
    assert ir.to_proto(second).SerializeToString(deterministic=True) == proto
    return after, outcome


def with_routing(model: ir.Model) -> ir.Model:
    """Its first block's index and weight as further outputs."""
    model = ir.from_proto(copy.deepcopy(ir.to_proto(model)))
    [node, *_] = [node for node in model.graph if node.domain == "sparse_onnx"]
    at = 0 if node.op_type == "Combine" else 1
    model.graph.outputs.extend([node.inputs[at], node.inputs[at + 1]])
    return model


#: On the edges of what `test_exact_shares` draws.
EDGES = st.builds(
    AdaptTopK,
    st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]),
    st.sampled_from([1.0, 0.25, 0.5, 0.75]),
    st.booleans(),
).filter(lambda rewrite: rewrite.threshold > 0 or rewrite.top_p < 1)
TYPES = st.sampled_from(["float32", "float16"])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data(), st.integers(2, 6), st.sampled_from([0, 1, 5]), EDGES, TYPES)
def test_exact_shares(data: st.DataObject, top_k: int, tokens: int, rewrite: AdaptTopK, dtype: str) -> None:
    """Sums that are powers of two: what stands on the edge must fall as the rule says, and ties by place."""
    weight, index = np.zeros((tokens, top_k)), np.zeros((tokens, top_k), np.int64)
    for token in range(tokens):
        cuts = sorted(data.draw(st.lists(st.integers(0, 16), min_size=top_k - 1, max_size=top_k - 1)))
        weight[token] = data.draw(st.permutations(np.diff([0, *cuts, 16]).tolist()))
        index[token] = data.draw(st.lists(st.integers(0, 4), min_size=top_k, max_size=top_k))
    feeds = {"tokens": np.ones((tokens, 16), dtype), "index": index, "weight": (weight / 8).astype(dtype)}
    # A dropped slot takes its share out of the sum: leave it at a power of two, at the cost of the first kept slot.
    lost = np.where(index == 4, weight, 0).sum(axis=1)
    first = (index != 4).argmax(axis=1)
    feeds["weight"][np.arange(tokens), first] += (lost / 8).astype(dtype)
    after, _ = adapt(proved_model(Shape(top_k=top_k, dtype=dtype, weight_dtype=dtype)), rewrite, 1)
    _, found, weights = run_model(with_routing(after), feeds)
    expected, new, _ = oracle(index, feeds["weight"], 4, rewrite)
    np.testing.assert_array_equal(found, expected)
    assert weights.dtype == feeds["weight"].dtype
    kept = expected != 4
    np.testing.assert_allclose(weights[kept], new[kept], rtol=1e-3 if dtype == "float16" else 1e-6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.integers(2, 8), st.sampled_from([0, 1, 2, 40]), st.sampled_from(["random", "one", "ties", "dropped"]),
    st.sampled_from([(0.2, 1.0), (0.0, 0.6), (0.07, 0.9), (0.0, 1e-3), (1.0, 1.0)]), st.booleans(), TYPES,
    st.sampled_from([1e-6, 1.0, 1e4]),
)  # fmt: skip
def test_any_weights(
    top_k: int, tokens: int, kind: str, options: tuple[float, float], renormalise: bool, dtype: str, size: float
) -> None:  # fmt: skip
    """Weights of any size, before lowering and after."""
    if dtype == "float16":
        size = 1.0
    shape = Shape(experts=9, top_k=top_k, weight_dtype=dtype)
    feeds = routing(shape, tokens, kind)
    feeds["weight"] = (np.abs(feeds["weight"]).astype(np.float32) ** 3 * size).astype(dtype)
    feeds["weight"][feeds["index"] == 9] = np.inf
    feeds["weight"][: tokens // 8] = 0
    rewrite = AdaptTopK(*options, renormalise)
    after, _ = adapt(proved_model(shape), rewrite, 1)
    _, found, weights = run_model(with_routing(after), feeds)
    expected, new, margin = oracle(feeds["index"], feeds["weight"], 9, rewrite)
    sure = margin > 1e-5
    assert sure.sum() >= 0.8 * tokens or kind == "ties"
    np.testing.assert_array_equal(found[sure], expected[sure])
    kept = (expected != 9) & sure[:, None]
    np.testing.assert_allclose(weights[kept], new[kept], rtol=2e-3 if dtype == "float16" else 2e-6)

    clean = {"tokens": feeds["tokens"], "index": found, "weight": np.where(found == 9, 0, weights)}
    reference = run_model(routed_model(shape), clean)[0]
    tolerance = 2e-3 if dtype == "float16" else 3e-6
    for lowering in (FuseGating(), GatherExperts(), DenseExperts()):
        lowered = ir.from_proto(copy.deepcopy(ir.to_proto(after)))
        assert lowering(lowered).rewritten == 1
        assert_close(reference, run_model(lowered, feeds)[0], tolerance)


def test_bfloat16_weights() -> None:
    """Compared in float32, since ORT compares no bfloat16 on CPU; nor runs the block, which is left out."""
    shape = Shape(weight_dtype="bfloat16", top_k=3)
    proto = ir.to_proto(proved_model(shape))
    proto.graph.node[0].output[0] = "wide"
    cast = helper.make_node("Cast", ["wide"], ["positive"], name="cast", to=TensorProto.BFLOAT16)
    proto.graph.node.insert(1, cast)
    proto.graph.input[2].type.tensor_type.elem_type = TensorProto.FLOAT
    rewrite = AdaptTopK(threshold=0.25, top_p=0.75)
    after, _ = adapt(ir.from_proto(proto), rewrite, 1)
    proto = ir.to_proto(after)
    [block] = [node for node in proto.graph.node if node.op_type == "MoE"]
    proto.graph.node.remove(block)
    proto.graph.node.append(
        helper.make_node("Cast", [block.input[2]], ["new"], name="new", to=TensorProto.FLOAT)
    )
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_value_info(block.input[1], TensorProto.INT64, ["T", 3]))
    proto.graph.output.append(helper.make_tensor_value_info("new", TensorProto.FLOAT, ["T", 3]))
    weight = np.asarray([[2, 5, 1], [1, 1, 2], [4, 4, 0], [3, 2, 3]], np.float32) / 8
    index = np.tile(np.asarray([0, 1, 2]), (4, 1))
    feeds = {"tokens": np.zeros((4, 16), np.float32), "index": index, "weight": weight}
    found, weights = run_model(ir.from_proto(proto), feeds)
    expected, new, _ = oracle(index, weight, 4, rewrite)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(weights[found != 4], new[found != 4], rtol=8e-3)


def test_nothing_is_lost_where_all_weights_are_zero_or_no_number() -> None:
    shape = Shape(experts=4, top_k=3)
    feeds = routing(shape, 4, "random")
    feeds["weight"] = np.asarray([[0, 0, 0], [np.nan, 1, 2], [0, 0, 5], [np.inf, 1, 1]], np.float32)
    after, _ = adapt(proved_model(shape), AdaptTopK(threshold=0.4, top_p=0.5), 1)
    _, index, weight = run_model(with_routing(after), feeds)
    np.testing.assert_array_equal(index[:2], feeds["index"][:2])
    np.testing.assert_array_equal(weight[0], 0)
    np.testing.assert_array_equal(index[2], [4, 4, feeds["index"][2, 2]])
    np.testing.assert_array_equal(weight[2], [0, 0, 5])
    assert index[3, 0] == feeds["index"][3, 0] and weight[3, 0] == np.inf


def test_a_models_own_router() -> None:
    """TopK proves that nothing was dropped before; lowerings must now count on it."""
    model = layered_model(Shape(experts=8, top_k=4), layers=2)
    feeds = {"x": np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)}
    after, outcome = adapt(model, AdaptTopK(threshold=0.15), 2)
    assert outcome.matched == 2
    kinds = [node.op_type for node in after.graph]
    assert kinds.count("ArgMax") == 2 and kinds.count("Less") == 2 * 2, "no test for slots dropped before"
    index = run_model(with_routing(after), feeds)[1]
    assert 0.2 < (index == 8).mean() < 0.7
    expected = run_model(after, feeds)[0]
    assert np.abs(expected - run_model(model, feeds)[0]).max() > 1e-2, "it is lossy"
    for lowering in (FuseGating(), GatherExperts(), DenseExperts()):
        lowered = ir.from_proto(copy.deepcopy(ir.to_proto(after)))
        assert lowering(lowered).rewritten == 2
        assert_close(expected, run_model(lowered, feeds, threads=2)[0], 3e-6)
        assert len(lowered_blocks(lowered)) == 2
        assert adapt(lowered, AdaptTopK(threshold=0.15), 0)[1].matched == 0


def neutral_sums(second_weight: str | None = None) -> ir.Model:
    """Two `Combine` over one routing and the same experts. `second_weight`: an operator in front of the second's."""

    def write(graph: Graph, x: str, expert: int) -> tuple[str, str]:
        return linear(graph, x, 16, 16), linear(graph, x, 16, 16)

    model, shop = outlined(dense_model(write))
    assert shop.rewritten == 1, shop.refusals
    proto = ir.to_proto(model)
    first, last = (node for node in proto.graph.node if node.op_type == "Combine")
    first.input[1] = last.input[1] = "positive"
    proto.graph.node.insert(0, helper.make_node("Abs", ["weight"], ["positive"], name="positive"))
    proto.graph.value_info.append(helper.make_tensor_value_info("positive", TensorProto.FLOAT, ["T", 2]))
    if second_weight:
        [*_, last] = (node for node in proto.graph.node if node.op_type == "Combine")
        last.input[1] = "other"
        proto.graph.node.insert(1, helper.make_node(second_weight, ["positive"], ["other"], name="other"))
        proto.graph.value_info.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, ["T", 2]))
    return ir.from_proto(proto)


def test_blocks_of_one_routing_stay_together() -> None:
    model = neutral_sums()
    after, _ = adapt(model, AdaptTopK(threshold=0.4), 2)
    assert sum(node.op_type == "ArgMax" for node in after.graph) == 1
    rng = np.random.default_rng(0)
    feeds = {
        "x": rng.standard_normal((20, 16)).astype(np.float32),
        "index": rng.integers(0, 5, (20, 2)),
        "weight": rng.uniform(0, 1, (20, 2)).astype(np.float32),
    }
    expected = run_model(after, feeds)
    index, weight, _ = oracle(feeds["index"], feeds["weight"], 4, AdaptTopK(threshold=0.4))
    assert (index != feeds["index"]).any()
    by_hand = run_model(model, feeds | {"index": index, "weight": weight.astype(np.float32)})
    lowered = ir.from_proto(copy.deepcopy(ir.to_proto(after)))
    assert RouteExperts()(lowered).rewritten == 2
    for left, middle, right in zip(expected, run_model(lowered, feeds), by_hand, strict=True):
        assert_close(left, middle, 3e-6)
        assert_close(left, right, 3e-6)


def test_the_same_experts_weighed_differently_are_refused() -> None:
    texts = ["another block weighs the same experts differently"] * 2
    adapt(neutral_sums("Sqrt"), AdaptTopK(threshold=0.4), 0, texts)


def test_two_blocks_of_other_experts_with_one_index() -> None:
    """Each has weights of its own, and so drops slots of its own."""
    proto = ir.to_proto(proved_model(Shape()))
    again = proto.graph.node.add()
    again.CopyFrom(proto.graph.node[1])
    again.name, again.input[0], again.input[2], again.output[0] = "again", "y", "root", "z"
    proto.graph.node.insert(1, helper.make_node("Sqrt", ["positive"], ["root"], name="root"))
    proto.graph.value_info.append(helper.make_tensor_value_info("root", TensorProto.FLOAT, ["T", 2]))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["T", 16]))
    after, _ = adapt(ir.from_proto(proto), AdaptTopK(top_p=0.6), 2)
    indices = [node.inputs[1] for node in after.graph if node.op_type == "MoE"]
    assert indices[0] is not indices[1]


def test_inside_a_branch() -> None:
    proto = ir.to_proto(proved_model(Shape()))
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", 16])
    then = helper.make_graph([proto.graph.node[1]], "then", [], [out])
    none = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["T", 16])
    other = helper.make_graph(
        [helper.make_node("Identity", ["tokens"], ["z"], name="pass")], "else", [], [none]
    )
    del proto.graph.node[1:]
    proto.graph.node.append(
        helper.make_node("If", ["use"], ["out"], name="choice", then_branch=then, else_branch=other)
    )
    proto.graph.input.append(helper.make_tensor_value_info("use", TensorProto.BOOL, []))
    proto.graph.output[0].name = "out"
    rewrite = AdaptTopK(threshold=0.4)
    after, _ = adapt(ir.from_proto(proto), rewrite, 1)
    feeds = routing(Shape(), 9, "random")
    index, weight, _ = oracle(feeds["index"], np.maximum(feeds["weight"], 0), 4, rewrite)
    by_hand = feeds | {"index": index, "weight": weight.astype(np.float32)}
    expected = run_model(routed_model(Shape()), by_hand)[0]
    assert_close(expected, run_model(after, feeds | {"use": np.asarray(True)})[0], 3e-6)


def test_without_renormalising_the_weights_are_the_models_own() -> None:
    after, _ = adapt(proved_model(Shape()), AdaptTopK(threshold=0.4, renormalise=False), 1)
    [block] = [node for node in after.graph if node.op_type == "MoE"]
    assert block.inputs[2].name == "positive"


def test_other_options_afterwards_are_refused() -> None:
    after, _ = adapt(proved_model(Shape()), AdaptTopK(threshold=0.4), 1)
    [block] = [node for node in after.graph if node.op_type == "MoE"]
    assert block.metadata_props[ADAPTED_KEY] == "threshold=0.4,top_p=1.0,renormalise=True"
    adapt(after, AdaptTopK(top_p=0.5), 0, ["adapted before, with threshold=0.4"])


def test_nothing_asked_for() -> None:
    adapt(proved_model(Shape()), AdaptTopK(), 0, ["nothing asked for"])


@pytest.mark.parametrize(
    "options",
    [{"threshold": -0.1}, {"threshold": 1.1}, {"threshold": np.nan}, {"top_p": 0.0}, {"top_p": 2.0}],
)
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="is not a share"):
        AdaptTopK(**options)


def test_refused() -> None:
    adapt(routed_model(Shape()), AdaptTopK(threshold=0.1), 0, ["not known to be at least zero"])
    adapt(proved_model(Shape(top_k=1)), AdaptTopK(threshold=0.1), 0, ["nothing to drop"])
    model = proved_model(Shape())
    model.graph.inputs[1].shape = model.graph.inputs[2].shape = ir.Shape(["T", "K"])
    for value in model.graph.node(0).outputs:
        value.shape = ir.Shape(["T", "K"])
    adapt(model, AdaptTopK(threshold=0.1), 0, ["not known from the graph"])

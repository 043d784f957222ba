"""The rewrites, one a file, and the order in which `optimize` runs them."""

from __future__ import annotations

import dataclasses
from typing import Literal

Phase = Literal["prepare", "recognise", "sparsify", "lower", "finish"]
PHASES: tuple[Phase, ...] = ("prepare", "recognise", "sparsify", "lower", "finish")


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the pipeline.

    `name` is a registered pass, or `onnx_ir:CLASS` of onnx-ir's common passes. `forms` limits a lowering to the
    targets and blocks that take that form; empty means always. A step that is `asked` runs only where the user names
    it.
    """

    phase: Phase
    name: str
    reason: str
    forms: tuple[str, ...] = ()
    asked: bool = False


PIPELINE: tuple[Step, ...] = (
    Step(
        "prepare",
        "convert_opset",
        "the neutral form needs opset 18; first, since only functions of the model's own version can be inlined",
    ),
    Step(
        "prepare",
        "onnx_ir:InlinePass",
        "a block inside a model-local function cannot have weights of its own",
    ),
    Step("prepare", "onnx_ir:NameFixPass", "nodes are named in reports, and names must be told apart"),
    Step("prepare", "onnx_ir:LiftConstantsToInitializersPass", "weights may be written as Constant nodes"),
    Step("prepare", "infer_shapes", "the number of a token's experts and the types of a block"),
    Step("prepare", "fold_shapes", "exporters compute sizes that are known"),
    Step(
        "prepare",
        "share_values",
        "recognisers compare values by identity; behind the folding, which makes equals",
    ),
    Step(
        "prepare",
        "onnx_ir:RemoveUnusedNodesPass",
        "a reader that nobody reads hides that a value has one use",
    ),
    Step("prepare", "name_blocks", "an inlined function leaves the same name on each copy of its blocks"),
    Step(
        "recognise", "recognise_contrib", "ORT's own operators, for targets that lack them or run them slower"
    ),
    Step("recognise", "recognise_gathered", "each slot's weights gathered, one product a slot"),
    Step("recognise", "recognise_grouped", "tokens sorted by expert, one product an expert"),
    Step("recognise", "recognise_expert_loop", "one branch an expert, over the tokens that NonZero finds"),
    Step("recognise", "recognise_dense_mask", "every expert on every token, most of it weighted with zero"),
    Step("recognise", "recognise_gshard", "tokens dispatched into an expert's slots by one-hot products"),
    Step(
        "recognise",
        "branch_conditions",
        "parts that a Where throws away are not computed; behind the others, which read masks",
    ),
    Step("sparsify", "adapt_top_k", "fewer experts where the router is sure", asked=True),
    Step("sparsify", "quantize_experts", "weights of fewer bits, of the blocks found above", asked=True),
    Step(
        "sparsify",
        "insert_thresholds",
        "inputs that are skipped; behind the others, so that quality is measured with all of them",
        asked=True,
    ),
    Step(
        "lower",
        "repair_scatter_add",
        "ORT's sums are wrong where indices repeat, in a block or anywhere else",
    ),
    Step("lower", "fuse_moe_op", "neutral blocks into ORT's own operators", forms=("fused",)),
    Step("lower", "branch_experts", "experts in branches that a cold one skips", forms=("branched",)),
    Step("lower", "gather_experts", "weights gathered by slot, for static shapes", forms=("gathered",)),
    Step("lower", "dense_experts", "every expert on every token, exactly masked", forms=("dense",)),
    Step(
        "lower",
        "fuse_gating",
        "neutral blocks into the dispatch that ORT runs best; behind the forms that fall back on it",
        forms=("grouped",),
    ),
    Step(
        "lower", "route_experts", "experts of any body, each on its own rows", forms=("grouped", "branched")
    ),
    Step(
        "lower",
        "repair_cast_transpose",
        "ORT dies of an order that exporters write; last, since forms may write it too",
    ),
    Step("finish", "onnx_ir:RemoveUnusedNodesPass", "what only a rewritten block read"),
    Step("finish", "onnx_ir:RemoveUnusedFunctionsPass", "bodies of neutral operators that are all lowered"),
    Step("finish", "onnx_ir:RemoveUnusedOpsetsPass", "the domain of those operators"),
)

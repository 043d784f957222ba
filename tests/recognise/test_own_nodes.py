"""What this tool lowered itself is not recognised again: a block optimized twice would otherwise change its form."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from contrib_models import Case as Operator
from contrib_models import model as operator
from family import SPELLINGS, Case
from spellings import build

from sparse_onnx.blocks.lowered import FORM_KEY
from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.passes.infer_shapes import InferShapes
from sparse_onnx.passes.recognise_contrib import RecogniseContrib
from sparse_onnx.passes.recognise_dense_mask import RecogniseDenseMask
from sparse_onnx.passes.recognise_expert_loop import RecogniseExpertLoop
from sparse_onnx.passes.recognise_gathered import RecogniseGathered
from sparse_onnx.passes.recognise_grouped import RecogniseGrouped
from sparse_onnx.passes.recognise_gshard import RecogniseGShard

RECOGNISERS: dict[str, type[Pass]] = {
    recogniser.name: recogniser
    for recogniser in (
        RecogniseContrib,
        RecogniseDenseMask,
        RecogniseExpertLoop,
        RecogniseGathered,
        RecogniseGrouped,
        RecogniseGShard,
    )
}


def model_of(spelling: str) -> ir.Model:
    if spelling == "contrib":
        return operator(Operator(bits=4, block=16))
    return ir.from_proto(build(Case(spelling)).model)


@pytest.mark.parametrize("spelling", [*SPELLINGS, "contrib"])
def test_nodes_of_a_lowered_block_are_left_in_silence(spelling: str) -> None:
    found = []
    for marked in (False, True):
        model = model_of(spelling)
        InferShapes()(model)
        for node in model.graph.all_nodes():
            if marked:
                node.metadata_props[FORM_KEY] = "any"
        for recogniser in RECOGNISERS.values():
            outcome = recogniser()(model)
            assert isinstance(outcome, Outcome)
            if outcome.rewritten:
                found.append((recogniser.name, marked))
            if marked:
                assert not outcome.modified and not outcome.refusals, outcome.refusals
    assert len(found) == 1 and not found[0][1], f"recognised by {found}"

"""Loops over experts whose rows are pieces of the slots sorted by expert, added to the tokens one expert at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from harness import check_rewrite
from loop_models import HIDDEN, INNER, Loop, lifted, ready, refused
from onnx import helper

from sparse_onnx.blocks import MoEBlock
from sparse_onnx.passes.recognise_expert_loop import RecogniseExpertLoop


@dataclasses.dataclass
class Sorted(Loop):
    """DeepSeek-MoE's `moe_infer`. `cut`: how pieces are taken; `wrong`: a change."""

    add: str = "elements"
    cut: str = "slice"
    wrong: str = ""

    def sort(self, ids: str) -> str:
        found = self.op(
            "TopK", ids, self.op("Shape", ids), outputs=2, axis=0, largest=int(self.wrong == "down")
        )
        return f"{found}_1"

    def pieces(self, value: str, counts: str, ends: list[str]) -> list[str]:
        if self.cut == "split":
            first = self.op("Split", value, counts, outputs=self.experts, axis=0)
            return [first, *(f"{first}_{e}" for e in range(1, self.experts))]
        if self.cut.startswith("range"):
            starts = [self.const(np.array(0)), *(self.op("Squeeze", end) for end in ends)]
            at = [
                self.op("Range", starts[e], starts[e + 1], self.const(np.array(1)))
                for e in range(self.experts)
            ]
            if self.cut == "range of columns":
                at = [self.op("Reshape", piece, [-1, 1]) for piece in at]
            return [self.op("Gather", value, piece, axis=0) for piece in at]
        bounds = [self.const(np.array([0], np.int64)), *ends]
        return [self.op("Slice", value, bounds[e], bounds[e + 1], [0]) for e in range(self.experts)]

    def build(self) -> onnx.ModelProto:
        ids, weight = self.routing()
        flat = self.op("Reshape", ids, [-1])
        order = self.sort(flat)
        hot = self.op("Equal", self.op("Unsqueeze", flat, [1]), list(range(self.experts)))
        kind = 10 if self.wrong == "counted in float16" else 7
        counts = self.op("ReduceSum", self.op("Cast", hot, to=kind), [0], keepdims=0)
        if kind != 7:
            counts = self.op("Cast", counts, to=7)
        if self.wrong == "rounded counts":
            counts = self.op("Cast", self.op("Cast", counts, to=10), to=7)
        each = [self.op("Slice", counts, [e], [e + 1]) for e in range(self.experts)]
        ends = [each[0]]
        for count in each[1:]:
            ends.append(self.op("Add", ends[-1], count))
        if self.wrong == "ends":
            ends[1] = self.op("Add", ends[1], each[0])
        token = self.op("Div", order, self.top_k + (self.wrong == "slots"))
        rows = self.pieces(token, counts, ends)
        places = self.pieces(
            self.sort(self.op("Cast", flat, to=6)) if self.wrong == "another sort" else order, counts, ends
        )
        if self.wrong == "weights":
            places = places[1:] + places[:1]
        scales = self.op("Reshape", weight, [-1, 1])
        total = self.op("ConstantOfShape", self.op("Shape", "x"))
        for e in range(self.experts):
            read = rows[(e + 1) % self.experts] if self.wrong == "rows" and e == 1 else rows[e]
            hidden = self.op(
                "Relu", self.op("MatMul", self.op("Gather", "x", read), self.weight(HIDDEN, INNER))
            )
            y = self.op("MatMul", hidden, self.weight(INNER, HIDDEN))
            y = self.op("Mul", y, self.op("Gather", scales, places[e], axis=0))
            if self.wrong == "narrow":
                y = self.op("Slice", y, [0], [HIDDEN // 2], [1])
            total = self.at("total", e, self.step(total, rows[e], y))
        self.nodes.append(helper.make_node("Identity", [total], ["y"], name="end"))
        return self.model()

    def step(self, total: str, token: str, y: str) -> str:
        if self.add == "elements":
            width = HIDDEN // 2 if self.wrong == "narrow" else HIDDEN
            wide = self.op("Tile", self.op("Reshape", token, [-1, 1]), [1, width])
            return self.op("ScatterElements", total, wide, y, axis=0, reduction="add")
        return super().step(total, token, y)


@pytest.mark.parametrize("cut", ["slice", "split", "range"])
@pytest.mark.parametrize("add", ["elements", "add", "gather"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_found(cut: str, add: str, top_k: int) -> None:
    after = lifted(Sorted(cut=cut, add=add, top_k=top_k))
    [block] = [found for node in after.graph if (found := MoEBlock.of(node)) is not None]
    assert (block.experts, block.top_k) == (4, top_k)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("narrow", "does not write whole rows"),
        ("rows", "expert 1 reads tokens gathered by the mask of expert 2"),
        ("weights", "the weight is gathered where other slots chose an expert"),
        ("ends", "writes rows that are not the tokens of a mask of one expert"),
        ("another sort", "the weight is gathered where other slots chose an expert"),
    ],
)
def test_refused(wrong: str, reason: str) -> None:
    refused(Sorted(wrong=wrong), reason)


def test_pieces_that_are_columns() -> None:
    """``[n, 1]``, of which a factor ``[n, 1, 1]`` is gathered: each row would meet the weights of all."""
    check_rewrite(ready(Sorted(cut="range of columns").build()), RecogniseExpertLoop(), rewritten=0)


@pytest.mark.parametrize("wrong", ["down", "slots", "rounded counts", "counted in float16"])
def test_no_pieces_of_experts(wrong: str) -> None:
    """Sorted the other way, counted in a type that rounds, or taken for tokens of another number of slots."""
    check_rewrite(ready(Sorted(wrong=wrong).build()), RecogniseExpertLoop(), rewritten=0)

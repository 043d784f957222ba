"""Loops over the slots of a token around, or inside, the one over experts."""

from __future__ import annotations

import dataclasses
import itertools

import onnx
import pytest
from loop_models import HIDDEN, INNER, Loop, lifted, refused
from onnx import helper

from sparse_onnx.blocks import MoEBlock


@dataclasses.dataclass
class Slots(Loop):
    """`pick`: how the column of a slot is taken; `inside`: the loop over slots is the inner one; `wrong`: a change."""

    pick: str = "gather"
    inside: bool = False
    weighted: bool = True
    wrong: str = ""

    def column(self, value: str, slot: int) -> str:
        if self.wrong == "column" and slot == 1:
            slot = self.top_k
        if self.pick == "gather":
            return self.op("Gather", value, slot, axis=1)
        if self.pick == "slice":
            return self.op("Squeeze", self.op("Slice", value, [slot], [slot + 1], [1]), [1])
        first = self.op("Split", value, [1] * self.top_k, outputs=self.top_k, axis=1)
        return self.op("Squeeze", f"{first}_{slot}" if slot else first, [1])

    def build(self) -> onnx.ModelProto:
        ids, weight = self.routing()
        matrices = [(self.weight(HIDDEN, INNER), self.weight(INNER, HIDDEN)) for _ in range(self.experts)]
        total = self.at("start", -1, self.op("ConstantOfShape", self.op("Shape", "x")))
        order = list(itertools.product(range(self.top_k), range(self.experts)))
        for slot, e in sorted(order, key=lambda item: item[::-1]) if self.inside else order:
            if self.wrong == "left out" and slot == 1:
                continue
            mask = self.op("Equal", self.column(ids, slot), e)
            rows = self.op("Squeeze", self.op("NonZero", mask), [0])
            first, second = matrices[(e + (self.wrong == "experts" and slot == 1)) % self.experts]
            hidden = self.op(
                "Sin" if self.wrong == "bodies" else "Relu",
                self.op("MatMul", self.op("Gather", "x", rows, axis=0), first),
            )
            y = self.op("MatMul", hidden, second)
            if self.weighted:
                own = self.column(weight, 0 if self.wrong == "weights" else slot)
                y = self.op("Mul", self.op("Unsqueeze", self.op("Gather", own, rows, axis=0), [1]), y)
            keep, self.add = self.add, "overwrite" if self.wrong == "overwrites" and slot else self.add
            total, self.add = self.step(total, rows, y), keep
        self.nodes.append(helper.make_node("Identity", [total], ["y"], name="end"))
        return self.model()


@pytest.mark.parametrize("pick", ["gather", "slice", "split"])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("add", ["gather", "elements", "add"])
def test_one_block_of_all_slots(pick: str, inside: bool, add: str) -> None:
    after = lifted(Slots(pick=pick, inside=inside, add=add))
    [block] = [found for node in after.graph if (found := MoEBlock.of(node)) is not None]
    assert (block.experts, block.top_k) == (4, 2)


@pytest.mark.parametrize("top_k", [3, 4])
def test_more_slots(top_k: int) -> None:
    lifted(Slots(top_k=top_k))


def test_without_weights() -> None:
    lifted(Slots(weighted=False))


def test_what_the_sum_began_with_stays_an_addition() -> None:
    after = lifted(Slots(change={"start": lambda g, e, v: g.op("Relu", "x")}))
    assert [node.op_type for node in after.graph][-3:] == ["MoE", "Add", "Identity"]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("bodies", "expert 0 is no expert of two layers, in a loop over slots"),
        ("column", "the mask of expert 0 is over"),
        ("experts", "the experts of slot 1 are not proved to be those of slot 0"),
        ("weights", "the weights of slot 1 are not proved to be those of its column"),
        ("overwrites", "results of one slot take the place of those of another"),
    ],
)
def test_refused(wrong: str, reason: str) -> None:
    refused(Slots(wrong=wrong), reason)


def test_a_slot_that_is_left_out() -> None:
    """Of two slots the first one alone is a routing of its own, with one expert a token; of three, two are none."""
    lifted(Slots(wrong="left out"))
    refused(Slots(wrong="left out", top_k=3), "slot 1 of 3 is left out of the sum")


def test_the_column_of_indices_of_no_router() -> None:
    loop = Slots(router=-1)
    loop.routing = lambda: ("ids", "w")  # type: ignore[method-assign]
    refused(loop, "the mask of expert 0 is over")

"""One thing changed in a loop over experts, so that it is no mixture of experts any more."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from loop_models import Loop, lifted, refused


def only(expert: int, change: Callable[[Loop, str], str]) -> Callable[[Loop, int, str], str]:
    return lambda g, e, value: change(g, value) if e == expert else value


def _slot(g: Loop, token: str) -> str:
    """The slot coordinate in the place of the token's."""
    return g.nodes[-1].output[0] if g.nodes[-1].op_type == "Squeeze" else _last(g, "Squeeze")


def _last(g: Loop, kind: str) -> str:
    return next(node.output[0] for node in g.nodes[::-1] if node.op_type == kind)


def _swapped(g: Loop, place: str) -> str:
    both = g.nodes[-1].input
    return g.op("Concat", both[1], both[0], axis=1)


def _token_twice(g: Loop, place: str) -> str:
    return g.op("Concat", g.nodes[-1].input[0], g.nodes[-1].input[0], axis=1)


def _first_rows(g: Loop, place: str) -> str:
    """Coordinates of another expert's hits."""
    return next(node.output[0] for node in g.nodes if node.op_type == "Concat")


def _also_read(g: Loop, total: str) -> str:
    g.extra_outputs.append(g.op("Tanh", total))
    return total


def _twice_weighted(g: Loop, y: str) -> str:
    return g.op("Mul", g.nodes[-1].input[0], y)


def _more_rows(g: Loop, e: int, start: str) -> str:
    shape = g.op("Add", g.op("Shape", "x"), g.const(np.array([1, 0], np.int64)))
    return g.op("ConstantOfShape", shape)


def _result_read(g: Loop, y: str) -> str:
    g.extra_outputs.append(g.op("Tanh", g.nodes[-1].input[1]))
    return y


def _other_ids(g: Loop, ids: str) -> str:
    node = next(node for node in g.nodes if node.op_type == "TopK")
    return f"{g.op('TopK', g.op('Neg', node.input[0]), [2], outputs=2, axis=-1)}_1"


CASES: dict[str, tuple[Loop, str]] = {
    "router wider than the loop": (Loop(router=8), "experts 4, 5, 6, 7 of 8 are missing"),
    "one expert missing": (Loop(order=(0, 1, 3)), "expert 2 of 4 is missing"),
    "one expert twice": (Loop(order=(0, 1, 2, 3, 1)), "expert 1 is added twice"),
    "a number too far": (Loop(change={"number": only(3, lambda g, v: "5")}), "experts 3, 4 of 6 are missing"),
    "rows of the tokens by slot": (Loop(change={"read": only(1, _slot)}), "picked by slot, not by token"),
    "results put by slot": (Loop(change={"target": only(1, _slot)}), "where its slot says"),
    "weight coordinates swapped": (
        Loop(change={"place": only(2, _swapped)}),
        "by slot and token, not by token and slot",
    ),
    "weight by token twice": (Loop(change={"place": only(2, _token_twice)}), "by token and token"),
    "weight of another expert's hits": (
        Loop(change={"place": only(2, _first_rows)}),
        "the weight is gathered where other slots chose an expert",
    ),
    "weight twice": (Loop(change={"y": only(0, _twice_weighted)}), "expert 0: the weight is applied twice"),
    "mask of other indices": (Loop(change={"ids": only(2, _other_ids)}), "the mask of expert 2 is over"),
    "other tokens for one": (
        Loop(change={"x": only(3, lambda g, v: g.op("Relu", v))}),
        "expert 3 reads",
    ),
    "partial sum read": (Loop(change={"total": only(1, _also_read)}), "is read by node"),
    "an expert's result read": (Loop(change={"y": only(1, _result_read)}), "used elsewhere"),
    "an expert's result read, and the sum begins with something": (
        Loop(change={"y": only(1, _result_read), "start": lambda g, e, v: g.op("Relu", "x")}),
        "used elsewhere",
    ),
    "more rows than tokens": (Loop(change={"start": _more_rows}), "has a row for each token"),
    "overwritten with two experts a token": (Loop(add="overwrite"), "the last one wins"),
    "one expert unweighted": (
        Loop(change={"y": only(2, lambda g, v: g.nodes[-1].input[1])}),
        "the weight of expert 2 comes from elsewhere",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_near_miss(name: str) -> None:
    loop, reason = CASES[name]
    refused(
        Loop(**{key: getattr(loop, key) for key in ("experts", "top_k", "router", "order", "add", "change")}),
        reason,
    )


def test_the_loop_itself_is_one() -> None:
    lifted(Loop())

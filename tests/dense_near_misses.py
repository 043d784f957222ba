"""Dense mixtures of experts with one thing changed, and what a refusal must say of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from dense_graphs import COLUMNS, GATES, ROUTER, SUMS, D, Dense, E

SOFT = "shape = Shape (logits) base = Expand (fill, shape) s = ScatterElements <axis = -1> (base, ids, top) "
OTHER = " top2, ids2 = TopK <axis = -1, largest = 0> (logits, k)"
STACK = {"column": "", "term": "", "total": SUMS["joined"]}

NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "soft mixture": ({"gates": "g = Softmax <axis = -1> (logits)"}, "soft mixture: every expert takes part"),
    "stacked soft mixture": ({"gates": "g = Softmax <axis = -1> (logits)", **STACK}, "soft mixture"),
    "softmax of zeros": (
        {"gates": GATES["softmax-of-scatter"].replace("low", "zero")},
        "soft mask: 0 stands in the place of minus infinity",
    ),
    "finite fill": (
        {"gates": SOFT + "g = Softmax <axis = -1> (s)", "weights": {"fill": np.float32(-1e4)}},
        "soft mask: -10000",
    ),
    "fill of a sigmoid": (
        {"gates": SOFT + "g = Sigmoid (s)", "weights": {"fill": np.float32(-30)}},
        "not zero, for experts that a token did not choose",
    ),
    "base not zero": ({"gates": GATES["scatter"].replace("zero", "half")}, "gates are 0.5, not zero"),
    "softmax over tokens": (
        {
            "gates": GATES["softmax-of-scatter"]
            .replace("(s)", "(s)")
            .replace("g = Softmax <axis = -1>", "g = Softmax <axis = 0>")
        },
        "not proved to be zero",
    ),
    "ties": (
        {
            "gates": "kth = Slice (top, at1, at2, last) m = GreaterOrEqual (logits, kth) "
            "p = Softmax <axis = -1> (logits) g = Where (m, p, zero)"
        },
        "ties would choose more than k",
    ),
    "mask inverted": (
        {"column": COLUMNS["equal-where"].replace("w, zero", "zero, w")},
        "not proved to be zero",
    ),
    "unknown gates": ({"gates": "g = Relu (logits)"}, "not proved to be zero"),
    "missing expert": ({"experts": (0, 1, 3)}, "expert 2 is missing: 4 experts can be chosen"),
    "second result": (
        {"column": COLUMNS["slice"].replace("at{f}", "at{f}"), "total": "y = Sum ({terms}, t1)"},
        "expert 1 occurs twice",
    ),
    "one number twice": (
        {
            "column": "q{e} = Gather <axis = 1> (g, m{e}) c{e} = Unsqueeze (q{e}, last)",
            "weights": {f"m{e}": np.array(max(e, 1)) for e in range(E)},
        },
        "expert 1 occurs twice",
    ),
    "number too high": (
        {"column": COLUMNS["equal-mul"], "weights": {f"n{e}": np.array(e + 1) for e in range(E)}},
        "expert 0 is missing",
    ),
    "one result twice in the stack": (
        {**STACK, "total": SUMS["joined"].replace("{plain}", "y0, y1, y2, y0")},
        "experts 0 and 3 are the same",
    ),
    "twice weighted": (
        {"term": "u{e} = Mul (y{e}, c{e}) t{e} = Mul (u{e}, c{e})"},
        "the weight is applied twice",
    ),
    "mask from other ids": (
        {
            "router": ROUTER + OTHER,
            "column": COLUMNS["equal-mul"].replace("ids", "i{e}"),
            "gates": "i0 = Identity (ids) i1 = Identity (ids) i2 = Identity (ids) i3 = Identity (ids2)",
        },
        "expert 3 is missing",
    ),
    "sum over the tokens": (
        {
            "column": COLUMNS["equal-mul"].replace("one_axis", "first").replace("c{e} =", "o{e} =")
            + " c{e} = Slice (o{e}, at0, at1, last)"
        },
        "does not run over the experts of one token",
    ),
    "gates of another token": (
        {
            "gates": GATES["scatter"].replace("g =", "g0 =")
            + " a = Slice (g0, at0, at1, first) b = Slice (g0, at1, huge, first) g = Concat <axis = 0> (b, a)",
            "weights": {"huge": np.array([2**31])},
        },
        "not proved to be zero",
    ),
    "one gate for all tokens": (
        {"column": "q{e} = Slice (g, at{e}, at{f}, last) c{e} = Slice (q{e}, at0, at1, first)"},
        "of some tokens only",
    ),
    "result reused": ({"outputs": f", float[T, {D}] y1"}, "used elsewhere"),
    "weight computed": (
        {
            "expert": Dense.expert.replace("down{e})", "d{e})")
            .replace("y{e} =", "n = ReduceMax <keepdims = 0> (x) d{e} = Mul (n, down{e}) y{e} =")
            .replace("n = ReduceMax <keepdims = 0> (x) ", ""),
            "router": ROUTER + " n = ReduceMax <keepdims = 0> (x)",
        },
        "not known to treat its tokens one by one: operator ReduceMax",
    ),
    "ids from outside of 0..E-1": (
        {"column": COLUMNS["equal-mul"].replace("ids", "far"), "gates": "far = Add (ids, n1)"},
        "not proved to lie in 0..3",
    ),
    "experts that may be equal": (
        {
            "gates": "wild = Gather (table, ids) " + GATES["renormalised"].replace("ids, ones", "wild, ones"),
            "weights": {"table": np.array([0, 0, 2, 3])},
        },
        "not proved to differ",
    ),
}

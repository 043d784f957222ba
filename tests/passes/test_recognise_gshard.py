"""GShard's dispatch and combine: spellings that are found, and blocks with one thing changed, which are refused."""

from __future__ import annotations

import numpy as np
import pytest
from spoiling import Change, D, Draft, E, K, N, recognised, refused, weights

from sparse_onnx.passes.recognise_gshard import RecogniseGShard

PASS = RecogniseGShard()


def block(capacity: int | None = None) -> Draft:
    """All first choices are seated before all second ones; `capacity` None is one seat for each token."""
    g = Draft(constants=weights())
    g.constants |= {
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "experts": np.array(E, np.int64),
        "off_on": np.array([0, 1], np.int64),
        "nought": np.array(0, np.float32),
    }
    if capacity is None:
        g.add("shape", "Shape", "x")
        g.add("seats", "Gather", "shape", "zero", axis=0)
    else:
        g.constants["seats"] = np.array(capacity, np.int64)
    g.add("logits", "MatMul", "x", "router")
    g.add("scores", "Softmax", "logits", axis=-1)
    g.add("weight", "TopK", "scores", g.ints(K), axis=-1)
    g.add("hot", "OneHot", "weight_index", "experts", "off_on", axis=-1)
    g.add("by_slot", "Transpose", "hot", perm=[1, 0, 2])
    g.add("line", "Reshape", "by_slot", g.ints(-1, E))
    g.add("count", "CumSum", "line", "zero")
    g.add("apart", "Reshape", "count", g.ints(K, -1, E))
    g.add("seen", "Transpose", "apart", perm=[1, 0, 2])
    g.add("own", "Mul", "seen", "hot")
    g.add("place", "Sub", "own", "one")
    g.add("clipped", "Clip", "place", "zero")
    g.add("where", "OneHot", "clipped", "seats", "off_on", axis=-1)
    g.add("hot4", "Unsqueeze", "hot", g.ints(-1))
    g.add("product", "Mul", "where", "hot4")
    g.add("fits", "Less", "place", "seats")
    g.add("fits4", "Unsqueeze", "fits", g.ints(-1))
    g.add("fits_int", "Cast", "fits4", to=7)
    g.add("kept", "Mul", "product", "fits_int")
    g.add("mask", "Cast", "kept", to=1)
    g.add("combine", "Einsum", "weight", "mask", equation="sk,skec->sec")
    g.add("above", "Greater", "combine", "nought")
    g.add("dispatch", "Cast", "above", to=1)
    g.add("rows", "Einsum", "dispatch", "x", equation="sec,sm->ecm")
    g.add("h", "Einsum", "rows", "w1", equation="ecm,ehm->ech")
    g.add("act", "Relu", "h")
    g.add("out", "Einsum", "act", "w2", equation="ech,emh->ecm")
    g.add("y", "Einsum", "combine", "out", equation="sec,ecm->sm")
    return g


@pytest.mark.parametrize("capacity", [None, 1, 3, 64])
def test_found_with_dropped_slots(capacity: int | None) -> None:
    found = recognised(block(capacity).build(), PASS)
    assert (found.experts, found.top_k, found.hidden, found.inner) == (E, K, D, N)
    # With a seat for every token nothing is dropped, and the router's own indices stay in sight.
    assert (found.expert_index.name == "weight_index") == (capacity is None)


def token_by_token(g: Draft) -> None:
    g.nodes["line"] = ("Reshape", ["hot", g.ints(-1, E)], {})
    g.nodes["apart"] = ("Reshape", ["count", g.ints(-1, K, E)], {})
    g.rewire("own", "seen", "apart")


def counted_from_the_end(g: Draft) -> None:
    g.nodes["count"] = ("CumSum", ["line", "zero"], {"reverse": 1})


def counted_before(g: Draft) -> None:
    """The number of slots before, without taking one off."""
    g.nodes["count"] = ("CumSum", ["line", "zero"], {"exclusive": 1})
    g.nodes["place"] = ("Identity", ["own"], {})


def counted_in_floats(g: Draft) -> None:
    g.before("count", "line32", "Cast", "line", to=1)
    g.before("apart", "whole", "Cast", "count", to=7)
    g.rewire("count", "line", "line32")
    g.rewire("apart", "count", "whole")


def place_of_a_slot(g: Draft) -> None:
    """One place for each slot, summed over the experts, and two one-hots that meet in a product."""
    g.nodes["place"] = ("Sub", ["seen", "one"], {})
    g.before("clipped", "chosen", "Mul", "hot", "place")
    g.before("clipped", "mine", "ReduceSum", "chosen", g.ints(2), keepdims=0)
    g.nodes["where"] = ("OneHot", ["mine", "seats", "off_on"], {"axis": -1})
    g.before("product", "where4", "Unsqueeze", "where", g.ints(2))
    g.rewire("product", "where", "where4")
    g.nodes["mask"] = ("Cast", ["product"], {"to": 1})


def places_of_the_kept(g: Draft) -> None:
    """`one_hot(place * kept) * kept`: slots that are dropped ask for seat 0, where the mask has none of them."""
    g.before("where", "kept_early", "Less", "place", "seats")
    g.before("where", "kept_int", "Cast", "kept_early", to=7)
    g.before("where", "moved", "Mul", "kept_int", "clipped")
    g.rewire("where", "clipped", "moved")
    g.rewire("fits4", "fits", "kept_early")


def compared_with_numbers(g: Draft) -> None:
    g.constants["numbers"] = np.arange(E)
    g.before("hot", "column", "Unsqueeze", "weight_index", g.ints(-1))
    g.before("hot", "same", "Equal", "numbers", "column")
    g.nodes["hot"] = ("Cast", ["same"], {"to": 7})


def weights_spread(g: Draft) -> None:
    """Mul and ReduceSum in place of the Einsum."""
    g.before("combine", "weight4", "Reshape", "weight", g.ints(-1, K, 1, 1))
    g.before("combine", "shares", "Mul", "mask", "weight4")
    g.nodes["combine"] = ("ReduceSum", ["shares", g.ints(1)], {"keepdims": 0})


def dispatched_by_truth(g: Draft) -> None:
    g.nodes["above"] = ("Cast", ["combine"], {"to": 9})
    g.constants["shift"] = np.array(1, np.float32)
    g.nodes["scores"] = ("Sub", ["logits", "shift"], {})  # weights may be negative then


def dispatched_by_mask(g: Draft) -> None:
    g.nodes["dispatch"] = ("ReduceSum", ["mask", g.ints(1)], {"keepdims": 0})


def dispatched_at_once(g: Draft) -> None:
    g.nodes["rows"] = ("Einsum", ["x", "mask"], {"equation": "sm,skec->ecm"})


def products_by_matmul(g: Draft) -> None:
    g.before("h", "w1_turned", "Transpose", "w1", perm=[0, 2, 1])
    g.before("h", "b1_row", "Unsqueeze", "b1", g.ints(1))
    g.before("h", "p1", "MatMul", "rows", "w1_turned")
    g.nodes["h"] = ("Add", ["b1_row", "p1"], {})


def other_letters(g: Draft) -> None:
    g.nodes["y"] = ("Einsum", ["out", "combine"], {"equation": "bcz, abc -> az"})


@pytest.mark.parametrize("capacity", [None, 3])
@pytest.mark.parametrize(
    "change",
    [
        token_by_token,
        counted_from_the_end,
        counted_before,
        counted_in_floats,
        place_of_a_slot,
        places_of_the_kept,
        compared_with_numbers,
        weights_spread,
        dispatched_by_truth,
        dispatched_by_mask,
        dispatched_at_once,
        products_by_matmul,
        other_letters,
    ],
)
def test_found_in_other_words(change: Change, capacity: int | None) -> None:
    draft = block(capacity)
    change(draft)
    recognised(draft.build(), PASS)


def switch() -> Draft:
    """One expert a token, tokens in groups of their own seats: Switch and lucidrains' spelling, without an axis k."""
    g = block(3)
    g.inputs["x"] = ["T", D]
    g.constants["pair"] = np.array([-1, 1, D], np.int64)
    g.before("logits", "groups", "Reshape", "x", "pair")
    g.nodes["logits"] = ("MatMul", ["groups", "router"], {})
    g.before("hot", "best", "ArgMax", "scores", axis=-1, keepdims=0)
    g.nodes["weight"] = ("ReduceMax", ["scores", g.ints(-1)], {"keepdims": 0})
    g.rewire("hot", "weight_index", "best")
    g.nodes["count"] = ("CumSum", ["hot", "one"], {})
    g.rewire("own", "seen", "count")
    g.nodes["combine"] = ("Einsum", ["weight", "mask"], {"equation": "bn,bnec->bnec"})
    g.nodes["rows"] = ("Einsum", ["groups", "dispatch"], {"equation": "bnd,bnec->ebcd"})
    g.nodes["h"] = ("Einsum", ["rows", "w1"], {"equation": "ebcd,ehd->ebch"})
    g.nodes["out"] = ("Einsum", ["act", "w2"], {"equation": "ebch,edh->ebcd"})
    g.nodes["y"] = ("Einsum", ["combine", "out"], {"equation": "bnec,ebcd->bnd"})
    return g


def grouped(size: int) -> Draft:
    g = switch()
    g.constants["pair"] = np.array([1, -1, D] if size == 0 else [-1, size, D], np.int64)
    return g


def test_found_in_groups() -> None:
    found = recognised(grouped(1).build(), PASS)
    assert (found.experts, found.top_k) == (E, 1)
    recognised(grouped(0).build(), PASS)


def counted_along_experts(g: Draft) -> None:
    g.nodes["count"] = ("CumSum", ["line", "one"], {})


def counted_for_each_choice(g: Draft) -> None:
    """First and second choices of an expert get the same places."""
    g.nodes["count"] = ("CumSum", ["hot", "zero"], {})
    g.rewire("own", "seen", "count")


def taken_apart_otherwise(g: Draft) -> None:
    g.nodes["apart"] = ("Reshape", ["count", g.ints(-1, K, E)], {})
    g.rewire("own", "seen", "apart")


def count_of_others(g: Draft) -> None:
    g.before("by_slot", "last", "TopK", "scores", g.ints(K), axis=-1, largest=0)
    g.before("by_slot", "other", "OneHot", "last_index", "experts", "off_on", axis=-1)
    g.rewire("by_slot", "hot", "other")


def places_below_zero(g: Draft) -> None:
    g.constants["two"] = np.array(2, np.int64)
    g.rewire("place", "one", "two")


def places_held_at_the_last(g: Draft) -> None:
    g.constants["last"] = np.array(2, np.int64)
    g.nodes["clipped"] = ("Clip", ["place", "zero", "last"], {})


def dropped_into_the_first_seat(g: Draft) -> None:
    places_of_the_kept(g)
    g.nodes["mask"] = ("Cast", ["product"], {"to": 1})


def dropped_by_another_condition(g: Draft) -> None:
    places_of_the_kept(g)
    g.before("fits4", "late", "Greater", "place", "zero")
    g.rewire("fits4", "kept_early", "late")


def half_precision(g: Draft) -> None:
    counted_in_floats(g)
    g.nodes["line32"] = ("Cast", ["line"], {"to": 10})


def kept_in_half_precision(g: Draft) -> None:
    places_of_the_kept(g)
    g.before("where", "half", "Cast", "moved", to=10)
    g.rewire("where", "moved", "half")


def places_in_bytes(g: Draft) -> None:
    g.before("where", "narrow", "Cast", "clipped", to=3)
    g.before("where", "wide", "Cast", "narrow", to=7)
    g.rewire("where", "clipped", "wide")


def counts_in_bytes(g: Draft) -> None:
    g.before("apart", "narrow", "Cast", "count", to=3)
    g.before("apart", "wide", "Cast", "narrow", to=7)
    g.rewire("apart", "count", "wide")


def soft_choice(g: Draft) -> None:
    g.constants["off_on"] = np.array([0, 2], np.int64)


def negative_weights(g: Draft) -> None:
    g.nodes["scores"] = ("Neg", ["logits"], {})


def threshold(g: Draft) -> None:
    g.constants["nought"] = np.array(0.1, np.float32)


def dispatched_elsewhere(g: Draft) -> None:
    """Tokens are taken out of seats where none was put in: one condition more there than here."""
    g.before("dispatch", "seated", "Cast", "product", to=1)
    g.nodes["dispatch"] = ("ReduceSum", ["seated", g.ints(1)], {"keepdims": 0})
    g.before("fits4", "late", "Greater", "place", "zero")
    g.rewire("fits4", "fits", "late")


def dispatched_with_weights(g: Draft) -> None:
    g.rewire("rows", "dispatch", "combine")


def weighted_twice(g: Draft) -> None:
    g.nodes["combine"] = ("Einsum", ["weight", "mask", "weight"], {"equation": "sk,skec,sk->sec"})


def weight_of_choices_alone(g: Draft) -> None:
    g.constants["shares"] = np.array([0.7, 0.3], np.float32)
    g.nodes["combine"] = ("Einsum", ["shares", "mask"], {"equation": "k,skec->sec"})


def mean_taken_off(g: Draft) -> None:
    g.before("act", "mean", "ReduceMean", "h", g.ints(1), keepdims=1)
    g.before("act", "centred", "Sub", "h", "mean")
    g.rewire("act", "h", "centred")


def seats_read_elsewhere(g: Draft) -> None:
    g.add("most", "ReduceMax", "out", keepdims=0)
    g.outputs.append("most")


def weights_of_the_caller(g: Draft) -> None:
    g.inputs["w2"] = [E, D, N]
    del g.constants["w2"]


NEAR: list[tuple[Change, str]] = [
    (counted_along_experts, "does not count over all slots"),
    (counted_for_each_choice, "does not count over all slots"),
    (taken_apart_otherwise, "in another order than they are taken apart"),
    (count_of_others, "does not count how often each expert was chosen"),
    (places_below_zero, "begin below 0"),
    (places_held_at_the_last, "is not proved to be a running count"),
    (dropped_into_the_first_seat, "is not proved to be a running count"),
    (dropped_by_another_condition, "is not proved to be a running count"),
    (half_precision, "counts slots in FLOAT16"),
    (kept_in_half_precision, "counts slots in FLOAT16"),
    (places_in_bytes, "counts slots in INT8"),
    (counts_in_bytes, "counts slots in INT8"),
    (soft_choice, "soft"),
    (negative_weights, "may be negative"),
    (threshold, "does not say where combine is more than 0"),
    (dispatched_elsewhere, "other seats"),
    (dispatched_with_weights, "when they are dispatched"),
    (weighted_twice, "multiplied twice"),
    (weight_of_choices_alone, "is not one for each slot"),
    (mean_taken_off, "ReduceMean"),
    (seats_read_elsewhere, "used elsewhere"),
    (weights_of_the_caller, "are not constant"),
]


@pytest.mark.parametrize(("change", "says"), NEAR, ids=[change.__name__ for change, _ in NEAR])
def test_refused(change: Change, says: str) -> None:
    draft = block(3)
    change(draft)
    refused(draft.build(), PASS, says)

"""Dense masks: every expert on every token, and a gate a (token, expert) that is zero where it was not chosen."""

from __future__ import annotations

import numpy as np
from experts import Stored, mlp, one_expert
from family import ALPHA, BETA, LIMIT
from onnx import TensorProto
from writer import Writer


def dense(g: Writer, stored: Stored, x: str, index: str, weight: str, rank: int) -> str:
    """``x [.., D]``, index and weight ``[.., K]`` to ``[.., D]``, on two or three axes."""
    options = ["columns", "stacked", "slots"]
    if g.case.packed and rank == 2:
        options += ["batched", "batched-einsum"]
    form = g.pick("dense", *options)
    if form == "batched":
        return _batched(g, stored, x, _gates(g, index, weight, rank))
    if form == "batched-einsum":
        return _batched_einsum(g, stored, x, _gates(g, index, weight, rank))
    if form == "stacked":
        return _stacked(g, stored, x, _gates(g, index, weight, rank), rank)
    if form == "slots":
        gates = []
        for e in range(g.case.experts):
            g.expert = e
            gates.append(_slot_gate(g, index, weight, g.at("number", e), rank))
    else:
        gates = _columns(g, _gates(g, index, weight, rank), rank)
    terms = []
    for e, gate in enumerate(g.at("columns", gates)):
        y = one_expert(g, stored, e, x, rank)
        terms.append(g.at("term", g.mul(y, gate)))
    return g.sum(g.at("terms", terms))


def _gates(g: Writer, index: str, weight: str, rank: int) -> str:
    return g.at("gates", _made_gates(g, index, weight, rank))


def _made_gates(g: Writer, index: str, weight: str, rank: int) -> str:
    """``[.., E]``: a token's weight for each expert, 0 where not chosen."""
    how = g.pick("gates", "scatter", "scatter", "one-hot", "equal")
    e = g.case.experts
    if how == "scatter":
        shape = g.op("Concat", *_leading(g, index, rank), g.ints(e), axis=0)
        zeros = g.at("gate-base", g.zeros(shape))
        return g.op("ScatterElements", zeros, index, weight, axis=g.axis(-1, rank))
    if how == "one-hot":
        values = g.constant(np.array([0, 1], g.case.numpy))
        hot = g.op("OneHot", index, g.int(e), values, axis=g.at("one-hot-axis", -1))
    else:
        numbers = g.constant(np.arange(e, dtype=np.int64))
        hot = g.cast(g.both("Equal", g.unsqueeze(index, -1, rank + 1), numbers), g.type)
    return g.reduce_sum(g.mul(hot, g.unsqueeze(weight, -1, rank + 1)), -2, rank + 1)


def _leading(g: Writer, value: str, rank: int) -> list[str]:
    """The sizes of all axes but the last, each ``[1]``."""
    shape = g.shape(value)
    return [g.slice(shape, i, i + 1, 0) for i in range(rank - 1)]


def _columns(g: Writer, gates: str, rank: int) -> list[str]:
    """Each expert's column ``[.., 1]``."""
    e, last = g.case.experts, g.axis(-1, rank)
    how = g.pick("column", "Slice", "Gather", "Split")
    if how == "Split":
        return g.split(gates, [1] * e, last)
    if how == "Slice":
        return [g.slice(gates, i, i + 1, last) for i in range(e)]
    if g.maybe():
        return [g.op("Gather", gates, g.ints(i), axis=last) for i in range(e)]
    return [g.unsqueeze(g.op("Gather", gates, g.int(i), axis=last), -1, rank) for i in range(e)]


def _slot_gate(g: Writer, index: str, weight: str, e: int, rank: int) -> str:
    """One expert's gate from the slots: the sum of the weights of those that chose it."""
    hit = g.both("Equal", index, g.int(e))
    how = g.pick("mask", "Where", "Cast", *(["CastLike"] if g.case.opset >= 15 else []))
    if how == "Where":
        kept = g.op("Where", hit, *g.at("branches", (weight, g.number(0.0))))
    elif how == "CastLike":
        kept = g.mul(g.op("CastLike", hit, weight), weight)
    else:
        kept = g.mul(g.cast(hit, g.type), weight)
    return g.reduce_sum(kept, g.at("slot-axis", -1), rank, keep=True)


def _stacked(g: Writer, stored: Stored, x: str, gates: str, rank: int) -> str:
    """The experts' results side by side, weighted and summed at once."""
    y = g.at("terms", [one_expert(g, stored, e, x, rank) for e in range(g.case.experts)])
    if g.pick("stack", "inner", "outer") == "outer":
        stack = g.op("Concat", *[g.unsqueeze(value, 0, rank + 1) for value in y], axis=0)
        turned = g.op("Transpose", gates, perm=[rank - 1, *range(rank - 1)])
        return g.reduce_sum(g.mul(stack, g.unsqueeze(turned, -1, rank + 1)), 0, rank + 1)
    stack = g.op("Concat", *[g.unsqueeze(value, -2, rank + 1) for value in y], axis=-2)
    how = g.pick("stack-sum", "Mul", "MatMul", "Einsum")
    if how == "MatMul":
        return g.squeeze(g.op("MatMul", g.unsqueeze(gates, -2, rank + 1), stack), -2, rank + 1)
    if how == "Einsum":
        batch = "bt"[-(rank - 1) :]
        return g.einsum(f"{batch}ed,{batch}e->{batch}d", stack, gates)
    wide = g.unsqueeze(gates, g.at("gate-axis", -1), rank + 1)
    return g.reduce_sum(g.mul(stack, wide), -2, rank + 1)


def _batched(g: Writer, stored: Stored, x: str, gates: str) -> str:
    """``[E, T, D]`` by MatMul over packed weights."""
    case = g.case
    how = g.pick("copies", "none", "Unsqueeze", "Expand", "Tile")
    wide = x
    if how != "none":
        wide = g.unsqueeze(x, 0, 3)
    if how in ("Expand", "Tile"):
        wide = g.op(how, wide, g.ints(case.experts, 1, 1))

    def project(role: str, value: str) -> str:
        matrix = stored.whole(role)
        if case.layout == "out_in":
            matrix = g.op("Transpose", matrix, perm=[0, 2, 1])
        y = g.op("MatMul", value, matrix)
        return g.add(y, g.unsqueeze(stored.whole(role + "_bias"), 1, 3)) if case.bias else y

    y = mlp(g, project, wide, 3)
    turned = g.op("Transpose", gates, perm=[1, 0])
    return g.reduce_sum(g.mul(y, g.unsqueeze(turned, 2, 3)), 0, 3)


def _batched_einsum(g: Writer, stored: Stored, x: str, gates: str) -> str:
    """The same by Einsum, experts first or tokens first."""
    case = g.case
    order = g.pick("einsum-order", "et", "te")
    right = "eoi" if case.layout == "out_in" else "eio"

    def project(role: str, value: str) -> str:
        left = "ti" if value == x else order + "i"
        y = g.einsum(f"{left},{right}->{order}o", value, stored.whole(role))
        if not case.bias:
            return y
        bias = stored.whole(role + "_bias")
        return g.add(y, g.unsqueeze(bias, 1, 3) if order == "et" else bias)

    return g.einsum(f"{order}d,te->td", mlp(g, project, x, 3), gates)


def gshard(g: Writer, stored: Stored, x: str, index: str, weight: str) -> str:
    """Tokens put into the experts' slots by one Einsum, and taken out by another; ``[T, D]`` to ``[T, D]``."""
    case = g.case
    capacity = g.op("Gather", g.shape(x), g.int(0), axis=0) if case.capacity is None else g.int(case.capacity)
    combine, mask = _combine(g, index, weight, capacity)
    how = g.pick("dispatch", "Greater", "bool", "mask")
    if how == "Greater":
        comparison = g.at("comparison", "Greater")
        dispatch = g.cast(g.op(comparison, combine, g.number(g.at("threshold", 0.0))), g.type)
    elif how == "bool":
        dispatch = g.cast(g.cast(combine, TensorProto.BOOL), g.type)
    else:
        dispatch = g.reduce_sum(mask, 1, 4)
    slots = g.einsum("sec,sm->ecm", dispatch, x)

    def project(role: str, value: str) -> str:
        if g.pick("slot-product", "Einsum", "MatMul") == "Einsum":
            right = "eoi" if case.layout == "out_in" else "eio"
            y = g.einsum(f"eci,{right}->eco", value, stored.whole(role))
        else:
            matrix = stored.whole(role)
            if case.layout == "out_in":
                matrix = g.op("Transpose", matrix, perm=[0, 2, 1])
            y = g.op("MatMul", value, matrix)
        return g.add(y, g.unsqueeze(stored.whole(role + "_bias"), 1, 3)) if case.bias else y

    return g.einsum("sec,ecm->sm", combine, mlp(g, project, slots, 3))


def _combine(g: Writer, index: str, weight: str, capacity: str) -> tuple[str, str]:
    """Weight of a token in each expert's slots ``[S, E, C]``, and the mask ``[S, K, E, C]`` it comes from."""
    e, k = g.case.experts, g.case.top_k
    on_off = g.constant(g.at("on-off", np.array([0, 1], np.int64)))
    hot = g.op("OneHot", index, g.int(e), on_off, axis=-1)
    if g.pick("order", "slots", "tokens") == "slots":
        by_slot = g.reshape(g.op("Transpose", hot, perm=[1, 0, 2]), -1, e)
        count = g.op("CumSum", by_slot, g.int(g.at("cumsum-axis", 0)), **g.at("cumsum", {}))
        seen = g.op("Transpose", g.reshape(count, k, -1, e), perm=[1, 0, 2])
    else:
        seen = g.reshape(g.op("CumSum", g.reshape(hot, -1, e), g.int(0)), -1, k, e)
    seen = g.at("seen", (seen, hot))[0]
    values = g.constant(np.array([0, 1], np.int64))
    if g.pick("place", "clipped", "summed") == "clipped":
        place = g.op("Sub", g.mul(seen, hot), g.int(1))
        where = g.op("OneHot", g.op("Clip", place, g.int(0)), capacity, values, axis=-1)
        mask = g.mul(where, g.unsqueeze(hot, -1, 4))
        if g.maybe():
            fits = g.cast(g.unsqueeze(g.op("Less", place, capacity), -1, 4), TensorProto.INT64)
            mask = g.mul(mask, fits)
    else:
        place = g.reduce_sum(g.mul(g.op("Sub", seen, g.int(1)), hot), -1, 3)
        where = g.op("OneHot", place, capacity, values, axis=-1)
        mask = g.mul(g.unsqueeze(hot, 3, 4), g.unsqueeze(where, 2, 4))
    mask = g.at("mask", g.cast(mask, g.type))
    if g.maybe(0.7):
        return g.einsum("sk,skec->sec", weight, mask), mask
    spread = g.reshape(weight, -1, k, 1, 1)
    return g.reduce_sum(g.mul(spread, mask), 1, 4), mask


def contrib(g: Writer, stored: Stored, x: str, logits: str) -> str:
    """ONNX Runtime's own operator; it takes the logits and routes by itself."""
    case = g.case
    inputs = [x, logits]
    for role in ("fc1", "fc2"):
        inputs += [stored.whole(role), stored.whole(role + "_bias") if case.bias else ""]
    attributes: dict[str, object] = {"k": case.top_k}
    attributes["normalize_routing_weights"] = int(case.router == "softmax-renorm")
    if case.gated == "interleaved":
        attributes |= {"activation_type": "swiglu", "swiglu_fusion": 1}
        if case.activation == "swiglu":
            attributes |= {"activation_alpha": ALPHA, "activation_beta": BETA, "swiglu_limit": LIMIT}
    else:
        attributes["activation_type"] = "gelu" if case.activation == "gelu_tanh" else case.activation
    while not inputs[-1]:
        inputs.pop()
    return g.op("MoE", *inputs, domain="com.microsoft", **attributes)

"""A member of the generated family of blocks: its description, weights, and what it computes in numpy (float64)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

SPELLINGS = ("gathered", "grouped", "per-expert-loop", "dense-mask", "gshard", "contrib")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu")
GATES = ("none", "concatenated", "interleaved", "separate")
ROUTERS = ("softmax-renorm", "softmax", "topk-softmax", "sigmoid-bias", "argmax", "sparsemixer")
ALPHA, BETA, LIMIT = 1.702, 1.0, 0.75
"""Of gpt-oss's clamped SwiGLU; with a limit that the small numbers here reach."""
SCALE, EPS = 2.5, 1e-6
"""Of the sigmoid router's weights."""
JITTER = 0.02
"""Of the sparse mixer: what is relatively farther from the best than this takes no part."""

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Case:
    """One block. `force` fixes choices that the seed would make, as (name, option) pairs.

    `activation` "swiglu" is the clamped one. `capacity` is of gshard: slots an expert, None for one a token.
    """

    spelling: str
    experts: int = 4
    top_k: int = 2
    activation: str = "silu"
    gated: str = "none"
    bias: bool = False
    packed: bool = True
    layout: str = "out_in"
    router: str = "softmax-renorm"
    opset: int = 18
    dtype: str = "float32"
    rank: int = 2
    capacity: int | None = None
    seed: int = 0
    force: tuple[tuple[str, str], ...] = ()
    hidden: int = 8
    inner: int = 12

    @property
    def roles(self) -> dict[str, tuple[int, int]]:
        """Matrices of an expert with their (outputs, inputs)."""
        d, i = self.hidden, self.inner
        if self.gated == "separate":
            return {"gate": (i, d), "up": (i, d), "fc2": (d, i)}
        return {"fc1": (i if self.gated == "none" else 2 * i, d), "fc2": (d, i)}

    @property
    def numpy(self) -> type:
        return np.float16 if self.dtype == "float16" else np.float32

    @property
    def label(self) -> str:
        """What a report calls the activation."""
        return "silu" if self.activation == "swiglu" else self.activation


def invalid(case: Case) -> str:
    """Why there is no such block, or the empty string."""
    if case.top_k > case.experts:
        return "more experts a token than experts"
    if case.activation == "swiglu" and case.gated == "none":
        return "the clamped SwiGLU has a gate"
    if case.router == "argmax" and case.top_k != 1:
        return "argmax routes to one expert"
    if case.router == "sparsemixer" and case.top_k != 2:
        return "the sparse mixer routes to two experts"
    if not case.packed and case.spelling in ("gathered", "gshard", "contrib"):
        return "this spelling reads packed weights"
    if case.capacity is not None and case.spelling != "gshard":
        return "only gshard has a capacity"
    if case.router == "sparsemixer" and case.spelling in ("dense-mask", "gshard"):
        return "those spellings need ids that differ, which two ArgMax do not show"
    adds = case.opset >= 16 and case.dtype == "float32"
    if case.router == "sparsemixer" and case.spelling == "per-expert-loop" and not adds:
        return "without an adding scatter, a loop needs ids that differ"
    if case.spelling == "contrib":
        gate = (case.activation, case.gated)
        if not (case.gated == "none" and case.activation in ("silu", "relu", "gelu_tanh")) and gate not in (
            ("silu", "interleaved"),
            ("swiglu", "interleaved"),
        ):
            return "the kernel of the CPU has no such activation"
        if case.layout != "out_in" or case.router not in ("softmax", "softmax-renorm"):
            return "the operator has one layout, and routes by itself"
    return ""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Matrices by role as ``[E, outputs, inputs]``, biases ``[E, outputs]``, and the router's."""

    matrices: dict[str, Array]
    biases: dict[str, Array]
    router: Array
    router_bias: Array | None
    selection_bias: Array


def make_weights(case: Case) -> Weights:
    """Size 1 / sqrt(fan in) for the experts, a wide spread of the router's logits."""
    rng = np.random.default_rng([case.seed, case.experts, case.top_k])
    matrices, biases = {}, {}
    for role, (rows, columns) in case.roles.items():
        matrices[role] = rng.standard_normal((case.experts, rows, columns)) / math.sqrt(columns)
        biases[role] = rng.standard_normal((case.experts, rows)) * 0.3
    router = rng.standard_normal((case.experts, case.hidden)) * 0.7
    with_bias = rng.random() < 0.4 and case.router != "sparsemixer"

    def rounded(array: Array) -> Array:
        return array.astype(case.numpy)

    return Weights(
        {role: rounded(value) for role, value in matrices.items()},
        {role: rounded(value) for role, value in biases.items()} if case.bias else {},
        rounded(router),
        rounded(rng.standard_normal(case.experts) * 0.2) if with_bias else None,
        (rng.standard_normal(case.experts) * 0.1).astype(np.float32),
    )


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _activate(name: str, x: Array) -> Array:
    if name == "silu":
        return x * sigmoid(x)
    if name == "gelu":
        return x / 2 * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return np.maximum(x, 0) ** (2 if name == "relu2" else 1)


def expert(case: Case, weights: Weights, e: int, x: Array) -> Array:
    """Expert `e` of rows ``[n, D]``."""

    def project(role: str, value: Array) -> Array:
        result = value @ weights.matrices[role][e].astype(float).T
        return result + weights.biases[role][e].astype(float) if case.bias else result

    if case.gated == "separate":
        gate, up = project("gate", x), project("up", x)
    else:
        first = project("fc1", x)
        if case.gated == "none":
            return project("fc2", _activate(case.activation, first))
        if case.gated == "concatenated":
            gate, up = first[..., : case.inner], first[..., case.inner :]
        else:
            gate, up = first[..., 0::2], first[..., 1::2]
    if case.activation == "swiglu":
        gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
        return project("fc2", gate * sigmoid(ALPHA * gate) * (up + BETA))
    return project("fc2", _activate(case.activation, gate) * up)


def route(case: Case, weights: Weights, x: Array) -> tuple[Array, Array, Array]:
    """Index and weight ``[T, K]`` of rows, and how far the nearest decision was from going the other way ``[T]``."""
    logits = x.astype(float) @ weights.router.astype(float).T
    if weights.router_bias is not None:
        logits = logits + weights.router_bias.astype(float)
    if case.router == "sparsemixer":
        return _sparse_mixer(logits)
    selection = logits
    if case.router == "sigmoid-bias":
        selection = sigmoid(logits) + weights.selection_bias
    index = np.argsort(-selection, -1, kind="stable")[:, : case.top_k]
    ordered = -np.sort(-selection, -1)
    margin = np.diff(-ordered, axis=-1)[:, : case.top_k].min(-1, initial=np.inf)
    if case.router == "topk-softmax":
        weight = softmax(np.take_along_axis(logits, index, -1))
    elif case.router == "sigmoid-bias":
        weight = np.take_along_axis(sigmoid(logits), index, -1)
        weight = weight / (weight.sum(-1, keepdims=True) + EPS) * SCALE
    else:
        weight = np.take_along_axis(softmax(logits), index, -1)
        if case.router == "softmax-renorm":
            weight = weight / weight.sum(-1, keepdims=True)
    return index, weight, margin


def _sparse_mixer(logits: Array) -> tuple[Array, Array, Array]:
    rest, index, weight, margin = logits.copy(), [], [], np.full(len(logits), np.inf)
    for _ in range(2):
        best = rest.argmax(-1)[:, None]
        top = rest.max(-1, keepdims=True)
        distance = (top - logits) / np.maximum(np.abs(logits), top)
        gate = softmax(np.where(distance > 2 * JITTER, -np.inf, rest))
        ordered = -np.sort(-rest, -1)
        margin = np.minimum(margin, ordered[:, 0] - ordered[:, 1])
        margin = np.minimum(margin, np.abs(distance - 2 * JITTER).min(-1))
        index.append(best)
        weight.append(np.take_along_axis(gate, best, -1))
        np.put_along_axis(rest, best, -np.inf, -1)
    return np.concatenate(index, -1), np.concatenate(weight, -1), margin


def reference(case: Case, weights: Weights, x: Array, order: str = "slots") -> Array:
    """The block on rows ``[T, D]``. `order` says who comes first where there is a capacity.

    "slots": all tokens' first choices, then all second ones (GShard); "tokens": token by token (Switch).
    """
    index, weight, _ = route(case, weights, x)
    pairs = [(t, k) for t in range(len(x)) for k in range(case.top_k)]
    if order == "slots":
        pairs.sort(key=lambda pair: (pair[1], pair[0]))
    taken = np.zeros(case.experts, int)
    y = np.zeros((len(x), case.hidden))
    for t, k in pairs:
        e = index[t, k]
        taken[e] += 1
        if case.capacity is None or taken[e] <= case.capacity:
            y[t] += weight[t, k] * expert(case, weights, e, x[t].astype(float))
    return y


def tokens(case: Case, weights: Weights, count: int, seed: int = 0, same: bool = False) -> Array:
    """Rows ``[count, D]`` whose routing no rounding changes; `same` sends them all to the same experts."""
    rng = np.random.default_rng([seed, count, 17])
    enough = 0.03 if case.dtype == "float16" else 0.004
    kept: list[Array] = []
    wanted = None
    while len(kept) < count:
        rows = rng.standard_normal((64, case.hidden))
        if wanted is not None:
            rows = kept[0] + 0.05 * rows
        rows = rows.astype(case.numpy)
        index, _, margin = route(case, weights, rows)
        for row, chosen, gap in zip(rows, index, margin, strict=True):
            if gap < enough or (wanted is not None and chosen.tolist() != wanted):
                continue
            kept.append(row)
            if same and wanted is None:
                wanted = chosen.tolist()
                break
    shape = (count, case.hidden)
    return np.stack(kept[:count]).astype(case.numpy) if count else np.zeros(shape, case.numpy)

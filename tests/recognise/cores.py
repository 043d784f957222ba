"""The deterministic core of the family: every choice of the generator at least once, and a strategy for the rest."""

from __future__ import annotations

import dataclasses
import itertools

from family import ACTIVATIONS, GATES, ROUTERS, SPELLINGS, Case, invalid
from hypothesis import strategies as st

# What a choice needs to come up, before the semicolon; then its name and options.
CHOICES: dict[str, tuple[str, ...]] = {
    "gathered": (
        "gathered: rows rows-einsum slots slots-einsum",
        "gathered=rows; repeat: Expand Tile Gather",
        "gathered=rows; side: matrix-first row-first",
        "gathered=rows; weighted: rows slots",
        "gathered=slots; combine: Mul Einsum MatMul",
    ),
    "grouped": (
        "count: Shape Gather",
        "floor-div: chain Div",
        "histogram: one-hot equal histc scatter",
        "stages=layers; segments: Range Slice Split",
        "stages=experts; segments: Range Slice Split",
        "put-back: inverse index-add scatter-add",
        "put-back=inverse; weight-early: yes no",
        "put-back=inverse; inverse: ScatterND ScatterElements TopK",
        "weight-slice: Split Slice Gather",
    ),
    "per-expert-loop": (
        "accumulate: scatternd-gathered optimum zeros-scatternd sum scatter-elements-add scatternd-add overwrite",
        "hits: Equal OneHot any",
        "nonzero: columns-split columns-slice rows-split rows-gather",
        "hits=Equal; weight-of-pair: GatherND-3d GatherND flat",
        "rows: rows optimum",
        "weight-slice: Split Slice Gather",
        "accumulate=sum; sum: chain zero-chain tree Sum",
    ),
    "dense-mask": (
        "dense: columns stacked slots batched batched-einsum",
        "dense=columns; gates: scatter one-hot equal",
        "dense=columns gates=scatter; column: Slice Gather Split",
        "dense=slots; mask: Where Cast CastLike",
        "dense=stacked; stack: inner outer",
        "dense=stacked stack=inner; stack-sum: Mul MatMul Einsum",
        "dense=batched; copies: none Unsqueeze Expand Tile",
        "dense=batched-einsum; einsum-order: et te",
        "dense=columns; sum: chain zero-chain tree Sum",
    ),
    "gshard": (
        "dispatch: Greater bool mask",
        "place: clipped summed",
        "order: slots tokens",
        "slot-product: Einsum MatMul",
    ),
    "contrib": ("constants: initializers nodes", "residual: no yes"),
}
EXPERT_CHOICES: tuple[tuple[str, str, str], ...] = (
    ("relu", "none", "relu: Relu Max Clip"),
    ("relu2", "none", "square: Mul Pow"),
    ("silu", "none", "silu: Sigmoid Exp QuickGelu"),
    ("gelu", "none", "gelu: half-first half-last half-outer contrib operator"),
    ("gelu_tanh", "none", "gelu_tanh: chain contrib operator"),
    ("swiglu", "interleaved", "halves: Slice Gather Reshape"),
    ("silu", "concatenated", "halves: Split Slice Gather"),
    ("swiglu", "separate", "clamp: Clip MinMax"),
)


def _rotate(number: int, spelling: str, **given: object) -> Case | None:
    """A case whose other dimensions come from its number; the first that exists near it."""
    for shift in range(60):
        n = number + shift * 11
        values: dict[str, object] = {
            "experts": (4, 8, 3, 16, 2, 5)[n % 6],
            "top_k": (2, 1, 3, 2, 4)[n % 5],
            "activation": ACTIVATIONS[(n // 2) % 6],
            "gated": GATES[(n // 3) % 4],
            "bias": n % 3 == 0,
            "packed": n % 4 != 1,
            "layout": ("out_in", "in_out")[(n // 5) % 2],
            "router": ROUTERS[n % len(ROUTERS)],
            "opset": (18, 20, 17, 21, 16, 23, 13)[n % 7],
            "rank": 2 + n % 2,
            "seed": number,
        }
        case = Case(spelling, **(values | given))  # type: ignore[arg-type]
        if not invalid(case) and _can(case):
            return case
    return None


def _can(case: Case) -> bool:
    """Whether every forced choice has its option in such a block."""
    forced = dict(case.force)
    if {
        "histc",
        "scatter",
        "index-add",
        "scatter-add",
        "scatter-elements-add",
        "scatternd-add",
        "CastLike",
    } & set(forced.values()) and (case.opset < 16 or case.dtype != "float32"):
        return False
    if forced.get("accumulate") == "overwrite" and case.top_k != 1:
        return False
    if case.spelling == "per-expert-loop" and case.router == "sparsemixer":
        return False
    if "side" in forced and case.layout != "out_in":
        return False
    if forced.get("repeat") and case.top_k == 1:
        return False
    if "operator" in forced.values() and case.opset < 20:
        return False
    if str(forced.get("dense", "")).startswith("batched") and (not case.packed or case.rank != 2):
        return False
    if forced.get("stages") == "layers" and not case.packed and case.bias:
        return False
    return not ("weight-slice" in forced and not case.packed)


def structural() -> list[Case]:
    """Each option of each choice of each spelling, once."""
    cases = []
    number = itertools.count()
    for spelling, lines in CHOICES.items():
        for line in lines:
            needs, _, rest = line.rpartition(";")
            name, _, options = rest.strip().partition(":")
            force = [tuple(need.split("=")) for need in needs.split()]
            for option in options.split():
                case = _rotate(next(number), spelling, force=(*force, (name, option)))
                assert case is not None, (spelling, name, option)
                cases.append(case)
    for activation, gated, line in EXPERT_CHOICES:
        name, _, options = line.partition(":")
        for option, spelling in zip(options.split(), itertools.cycle(SPELLINGS[:4]), strict=False):
            given = {"activation": activation, "gated": gated, "force": ((name, option),)}
            case = _rotate(next(number), spelling, **given)
            assert case is not None, (name, option)
            cases.append(case)
    for how, hits in itertools.product(("scatter-elements-add", "scatternd-add"), ("Equal", "OneHot")):
        force = (("accumulate", how), ("hits", hits))  # ids that nothing shows to differ
        cases.append(Case("per-expert-loop", router="sparsemixer", force=force))
    return cases


def matrix() -> list[Case]:
    """Every activation with every gate in every spelling, float16, capacities; other dimensions in rotation."""
    cases: list[Case | None] = []
    number = itertools.count(1000)
    for spelling, activation, gated in itertools.product(SPELLINGS, ACTIVATIONS, GATES):
        cases.append(_rotate(next(number), spelling, activation=activation, gated=gated))
    for spelling, router in itertools.product(SPELLINGS, ROUTERS):
        cases.append(_rotate(next(number), spelling, router=router))
    cases += [_rotate(next(number), spelling, dtype="float16") for spelling in SPELLINGS for _ in range(2)]
    cases += [_rotate(next(number), "gshard", capacity=capacity) for capacity in (1, 2, 3, 8)]
    for spelling, k, experts in itertools.product(SPELLINGS, (1, 2, 3, 4), (4, 16)):
        cases.append(_rotate(next(number), spelling, top_k=k, experts=experts))
    return [case for case in cases if case is not None]


@st.composite
def anything(draw: st.DrawFn) -> Case:
    """Any member of the family."""
    case = Case(
        draw(st.sampled_from(SPELLINGS)),
        experts=draw(st.integers(2, 16)),
        top_k=draw(st.integers(1, 4)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        gated=draw(st.sampled_from(GATES)),
        bias=draw(st.booleans()),
        packed=draw(st.booleans()),
        layout=draw(st.sampled_from(["out_in", "in_out"])),
        router=draw(st.sampled_from(ROUTERS)),
        opset=draw(st.integers(13, 23)),
        dtype=draw(st.sampled_from(["float32"] * 5 + ["float16"])),
        rank=draw(st.sampled_from([2, 3])),
        seed=draw(st.integers(0, 2**20)),
    )
    if case.spelling == "gshard" and draw(st.booleans()):
        case = dataclasses.replace(case, capacity=draw(st.integers(1, 6)))
    return _nearest(case)


def _nearest(case: Case) -> Case:
    """The case itself, or one changed as little as makes it exist: most draws should count."""
    if case.top_k > case.experts:
        case = dataclasses.replace(case, top_k=case.experts)
    if case.activation == "swiglu" and case.gated == "none":
        case = dataclasses.replace(case, gated="interleaved")
    if case.spelling in ("gathered", "gshard", "contrib"):
        case = dataclasses.replace(case, packed=True)
    distinct = case.spelling in ("dense-mask", "gshard", "per-expert-loop")
    if case.router == "sparsemixer" and (case.top_k != 2 or distinct):
        case = dataclasses.replace(case, router="softmax-renorm")
    if case.router == "argmax" and case.top_k != 1:
        case = dataclasses.replace(case, router="topk-softmax")
    if case.spelling == "contrib":
        routers = {"softmax", "softmax-renorm"}
        router = case.router if case.router in routers else "softmax"
        case = dataclasses.replace(case, layout="out_in", router=router)
        if invalid(case) and case.gated == "none":
            case = dataclasses.replace(case, activation="relu")
        elif invalid(case):
            activation = case.activation if case.activation == "swiglu" else "silu"
            case = dataclasses.replace(case, gated="interleaved", activation=activation)
    return case

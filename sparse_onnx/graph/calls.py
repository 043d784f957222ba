"""Functions that call functions: recursion and exponential growth are found before anything inlines them."""

from __future__ import annotations

import dataclasses

from sparse_onnx.core.errors import ModelError
from sparse_onnx.graph.text import DAMAGED, quoted

MAX_CALL_DEPTH = 100  # onnx-ir and ORT recurse into calls; real models stay below 20
# Functions that each call the next one twice double with every step when they are inlined.
MAX_EXPANDED_NODES = 10_000_000

FunctionKey = tuple[str, str, str]


@dataclasses.dataclass
class Body:
    """A graph or function body: nodes with subgraphs flattened, and how often it calls which functions."""

    nodes: int = 0
    calls: dict[FunctionKey, int] = dataclasses.field(default_factory=dict)


def function_key(domain: str, name: str, overload: str) -> FunctionKey:
    """Under which a function is found; the default domain has two names."""
    return ("" if domain == "ai.onnx" else domain, name, overload)


def check_calls(main: Body, bodies: dict[FunctionKey, Body]) -> None:
    """Refuses functions that call themselves, chains of calls that are too long, exponential expansion.

    Raises:
        ModelError: names the function, or says how far the calls go.
    """
    expanded: dict[FunctionKey, tuple[int, int]] = {}  # nodes when inlined, length of the longest chain
    path: dict[FunctionKey, None] = {}
    pending = [(key, False) for key in bodies]
    while pending:
        key, ready = pending.pop()
        if ready:
            del path[key]
            expanded[key] = _expand(bodies[key], expanded)
        elif key in path:
            raise ModelError(f"function {quoted(key[1])} calls itself", DAMAGED)
        elif key not in expanded:
            path[key] = None
            pending.append((key, True))
            pending.extend((callee, False) for callee in bodies[key].calls)
    _expand(main, expanded)


def _expand(body: Body, expanded: dict[FunctionKey, tuple[int, int]]) -> tuple[int, int]:
    nodes = body.nodes + sum(count * expanded[key][0] for key, count in body.calls.items())
    depth = 1 + max((expanded[key][1] for key in body.calls), default=0)
    if nodes > MAX_EXPANDED_NODES or depth > MAX_CALL_DEPTH:
        raise ModelError(
            f"functions call each other {depth} deep and expand to {nodes} nodes; "
            f"the limits are {MAX_CALL_DEPTH} and {MAX_EXPANDED_NODES}",
            DAMAGED,
        )
    return nodes, depth

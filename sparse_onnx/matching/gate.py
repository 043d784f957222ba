"""The fact that is known of a gate."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir


@dataclasses.dataclass(frozen=True)
class Gate:
    """What is known of a value.

    Attributes:
        ids: the chosen experts; its axes but the slots' are the tokens. None where there is a flaw.
        slots: K, the last axis of `ids`, where it was summed or scattered away; None: each element of `ids` is a
            token's only expert (unless the value still has the slots' axis).
        expert: the value's axis of experts, counted from the front; None: it is of the expert `column` alone.
        column: that expert.
        experts: E, of a value that has (or had) an axis of experts.
        outside: what the value holds where the expert is not chosen.
        inside: the weights, one for each element of `ids`, which are summed where it is; 1.0 for ones; None: unknown.
        plain: the value's axes are still those of `ids` (and the experts', and others of length 1).
        distinct: `inside` holds only if a token's experts differ.
        flaw: why the value is no sparse gate, although it looks like one.
    """

    ids: ir.Value | None
    slots: int | None
    expert: int | None
    column: int | None
    outside: float
    inside: ir.Value | float | None
    plain: bool = False
    distinct: bool = False
    flaw: str = ""
    experts: int | None = None

    @property
    def sparse(self) -> bool:
        return not self.flaw and self.outside == 0

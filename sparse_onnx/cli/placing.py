"""Where a model runs, in lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sparse_onnx.cli.text import size
from sparse_onnx.core.report import PlacementRecord, StaticRecord

#: Operators named of those that another provider runs.
_NAMED = 6


def placement_lines(records: Sequence[PlacementRecord]) -> Iterator[str]:
    """Who runs how many nodes, then what the target's provider leaves to others, and what that costs."""
    yield "runs on " + ", ".join(_part(record) for record in records) + _by(records)
    for record in records:
        if not record.guilty:
            continue
        operators = list((record.operators or {}).items())
        named = ", ".join(f"{count} {name}" for name, count in operators[:_NAMED])
        more = f" and {len(operators) - _NAMED} other operators" if len(operators) > _NAMED else ""
        cost = ""
        if record.values:
            cost = f"; at least {record.values} values ({size(record.bytes or 0)} at size 1) change providers in a run"
        yield f"  left to {record.provider}: {named}{more}{cost}"


def _part(record: PlacementRecord) -> str:
    pieces = f" in {record.partitions} partitions" if (record.partitions or 0) > 1 else ""
    return f"{record.provider} ({record.nodes} nodes{pieces})"


def _by(records: Sequence[PlacementRecord]) -> str:
    told = next((record.by for record in records if record.by), None)
    return "" if told is None else ", by its profile" if told == "profile" else f", told by {told}"


def static_lines(records: Sequence[StaticRecord]) -> Iterator[str]:
    """The graphs of fixed sizes, each with its comparison."""
    for record in records:
        sizes = ", ".join(f"{name} {number}" for name, number in record.sizes.items()) or "its own sizes"
        verdict = record.verify.failure or "not run"
        if record.verify.passed is not None:
            error = record.verify.max_rel_error
            verdict = (
                f"same answers, {record.verify.runs} runs{'' if error is None else f', error {error:.1e}'}"
            )
            verdict += f", on {record.verify.on}" if record.verify.on else ""
        yield f"{record.path or 'graph'}: {sizes}: {verdict}"

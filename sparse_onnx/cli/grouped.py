"""What many layers have in common, told once: rows of blocks, and reasons why something was left alone."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence

from sparse_onnx.core.report import BlockRecord, Refusal

#: Equal blocks in succession that still get a row each, and nodes that are named of one reason.
_ROWS, _NODES = 3, 3


def block_rows(blocks: Sequence[BlockRecord], folded: bool) -> Iterator[tuple[str, BlockRecord]]:
    """(name, block) a row; folded: one row for more than three blocks in succession that differ by name alone."""
    for _, group in itertools.groupby(blocks, key=lambda block: dataclasses.replace(block, name="")):
        alike = list(group)
        if folded and len(alike) > _ROWS:
            names = [block.name for block in alike]
            yield f"{folded_name(names)} x {len(names)}", alike[0]
        else:
            yield from ((block.name, block) for block in alike)


def folded_name(names: Sequence[str]) -> str:
    """``layers.{0...47}.mlp`` where one number tells the names apart, else the first and the last."""
    parts = [re.split(r"(\d+)", name) for name in names]
    if len({len(item) for item in parts}) == 1:
        varying = [at for at, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
        if len(varying) == 1 and varying[0] % 2:
            at = varying[0]
            numbers = [int(item[at]) for item in parts]
            parts[0][at] = f"{{{_run(numbers)}}}"
            return "".join(parts[0])
    return f"{names[0]} ... {names[-1]}"


def _run(numbers: Sequence[int]) -> str:
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}...{numbers[-1]}"
    return f"{numbers[0]},{numbers[1]},...,{numbers[-1]}"


def refusal_lines(refusals: Sequence[Refusal], every_node: bool) -> list[list[str]]:
    """For each reason, who, where and why, and if there is one a line of what to do.

    Reasons that differ by the names in quotes are the same: that of the first is shown.
    """
    groups: dict[tuple[str, str, str], list[Refusal]] = {}
    for item in refusals:
        groups.setdefault((item.by, re.sub(r"'[^']*'", "''", item.reason), item.hint), []).append(item)
    return [_lines(group, every_node) for group in groups.values()]


def _lines(group: Sequence[Refusal], every_node: bool) -> list[str]:
    first = group[0]
    nodes = list(dict.fromkeys(item.node for item in group if item.node))
    shown = nodes if every_node else nodes[:_NODES]
    who = f"{first.by or 'refused'}{f' x {len(group)}' if len(group) > 1 else ''}"
    where = f", at {', '.join(shown)}" if shown else ""
    more = f" and {len(nodes) - len(shown)} more" if len(nodes) > len(shown) else ""
    return [f"{who}{where}{more}: {first.reason}", *([f"  ({first.hint})"] if first.hint else [])]

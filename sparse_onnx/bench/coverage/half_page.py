"""The tables of float16 and bfloat16: totals, and the models of which something else comes than in float32."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from sparse_onnx.bench.coverage import cases, table
from sparse_onnx.bench.coverage.measure import BLOCK, FAILED, FALLBACK, NO_KERNEL, REFUSED, WRONG

_OUTCOMES = (BLOCK, FALLBACK, REFUSED, FAILED, WRONG)
_TEXT = """
## In float16 and bfloat16

The same models by `export --dtype float16` and `--dtype bfloat16`, without a cache, made by {commands}; seven
inputs here too. Measure is torch's answer with its weights widened to float32. A file is right where three things
hold. Its graph with every weight and constant widened is off by no more than twice the type's epsilon (2^-10,
2^-7), at every token. Its graph with each operator in float32 and its result rounded, and the file itself in ONNX
Runtime, are off in the median token by no more than twice torch's own error in that type, or twice its epsilon
where that is more, and finite wherever torch is; single tokens are further off on all sides, where rounding decides
between experts. And whatever torch chooses by (`topk`, `sort`, `argmax`) enters the file's TopK and ArgMax in the
same type, from matrix products of the same type: a router that the model computes in float32 stays so. An input at
which a file fails gives way to others of its sizes, up to three; at the last of them the widened graph may be off
at as many tokens as torch itself is with its weights moved by half a unit in the type's last place.

"of" counts the models that were measured, "no kernel" files that onnxruntime's CPU provider does not run, since it
lacks an operator in that type; of those the other two runs are compared. Errors are the median model's: of each the
largest at any input, in the median token. The ratio of the file's error to torch's own is the largest of any model.

"""
_COLUMNS = [
    "type",
    *(table.WORDS[each] for each in _OUTCOMES),
    "of",
    "no kernel",
    "error",
    "torch's",
    "ratio",
]


def markdown(documents: Mapping[str, Mapping[str, Any]], float32: Mapping[str, Any]) -> str:
    """
    Args:
        documents: float16 and bfloat16, or one of them: what `run.sweep` returns for the cases of that name.
        float32: the same of `cases.architectures`.
    """
    commands = " and ".join(
        f"`{table.COMMAND} --cases {cases.HALF[kind]} --exporter ours`" for kind in documents
    )
    parts = [_TEXT.format(commands=commands) + _totals(documents)]
    for kind, document in documents.items():
        parts.append(_differing(kind, document, float32))
        parts.append(_missing(kind, document))
    return "\n\n".join(part for part in parts if part) + "\n"


def _cells(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    rows = sorted(document["results"].items())
    return {name: row["cells"]["ours"] for name, row in rows if "ours" in row["cells"]}


def _outcome(cell: Mapping[str, Any]) -> str:
    """Without regard to what the provider has kernels for."""
    if cell["outcome"] != NO_KERNEL:
        return str(cell["outcome"])
    return BLOCK if cell["blocks"] and cell["blocks"] >= cell["layers"] else FALLBACK


def _totals(documents: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [table.line(_COLUMNS), table.rule(len(_COLUMNS))]
    for kind, document in documents.items():
        cells = _cells(document).values()
        counts = Counter(_outcome(cell) for cell in cells)
        missing = sum(cell["outcome"] == NO_KERNEL for cell in cells)
        numbers = [*(counts[each] for each in _OUTCOMES), len(cells), missing]
        lines.append(table.line([kind, *map(str, numbers), *_errors(cells)]))
    return "\n".join(lines)


def _errors(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    pairs = [(cell["error"], cell["rounding"]) for cell in cells if cell["error"] and cell["rounding"]]
    if not pairs:
        return ["", "", ""]
    medians = [f"{statistics.median(each):.1g}" for each in zip(*pairs, strict=True)]
    return [*medians, f"{max(file / own for file, own in pairs):.1f}"]


def _differing(kind: str, document: Mapping[str, Any], float32: Mapping[str, Any]) -> str:
    known, said = _cells(float32), []
    for name, cell in _cells(document).items():
        outcome = _outcome(cell)
        if name in known and (before := _outcome(known[name])) != outcome:
            words = f"{table.WORDS[outcome]} (float32: {table.WORDS[before]})"
            said.append(f"- `{name}`: {words}: {table.escaped(cell['reason'])}".removesuffix(": "))
    return "\n".join([f"### Other than in float32: {kind}", "", *(said or ["None."])])


def _missing(kind: str, document: Mapping[str, Any]) -> str:
    """What the provider says of its kernels, and of how many models."""
    reasons: dict[str, list[str]] = {}
    for name, cell in _cells(document).items():
        if cell["outcome"] == NO_KERNEL:
            reasons.setdefault(cell["reason"], []).append(name)
    if not reasons:
        return ""
    ordered = sorted(reasons.items(), key=lambda each: (-len(each[1]), each[0]))
    lines = [f"- {_named(names)}: {table.escaped(reason)}" for reason, names in ordered]
    return "\n".join([f"### No kernel: {kind}", "", *lines])


def _named(names: list[str]) -> str:
    return f"{len(names)} models" if len(names) > 3 else ", ".join(f"`{name}`" for name in names)

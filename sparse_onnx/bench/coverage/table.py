"""The results as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparse_onnx.bench.coverage.measure import (
    BLOCK,
    FAILED,
    FALLBACK,
    INAPPLICABLE,
    NO_KERNEL,
    OUTCOMES,
    REFUSED,
    WRONG,
)

COMMAND = "python -m sparse_onnx.bench.coverage"
_RARE = (INAPPLICABLE, NO_KERNEL)
_HEADINGS = {
    "legacy": "torch.onnx.export, dynamo=False",
    "torch": "torch.onnx.export",
    "transformers": "transformers' OnnxExporter",
    "ours": "sparse-onnx",
}
WORDS = {
    BLOCK: "neutral block",
    FALLBACK: "exact operators",
    NO_KERNEL: "no kernel",
    REFUSED: "refused",
    FAILED: "failed",
    WRONG: "**silently wrong**",
    INAPPLICABLE: "not applicable",
}
_MEANINGS = {
    BLOCK: "every sparse layer is one neutral block, exact",
    FALLBACK: "plain operators, exact",
    NO_KERNEL: "exact with each operator in float32 and its result rounded; the runtime lacks one in the type itself",
    REFUSED: "an error that says why the model cannot be exported",
    FAILED: "any other error, of the exporter or of the runtime",
    WRONG: "a file that runs and answers otherwise than torch",
    INAPPLICABLE: "transformers itself does not generate with this model and a key/value cache",
}


def markdown(document: Mapping[str, Any], exporters: Sequence[str], rows: str = "architecture") -> str:
    """Totals, a row a model, and the reason of each cell that is no success.

    Args:
        document: what `run.sweep` returns.
        exporters: columns, in order.
        rows: what a row is.
    """
    results = document["results"]
    parts = [_totals(results, exporters), _rows(results, exporters, rows), _reasons(results, exporters)]
    return "\n\n".join(part for part in parts if part) + "\n"


def legend(*documents: Mapping[str, Any]) -> str:
    """What the words of these tables mean."""
    rows = [row for document in documents for row in document["results"].values()]
    return "\n".join(f"- {WORDS[outcome]}: {_MEANINGS[outcome]}" for outcome in _outcomes(rows))


def _outcomes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """All, but "not applicable" and "no kernel" only where they occur."""
    found = {cell["outcome"] for row in rows for cell in row["cells"].values()}
    return [outcome for outcome in OUTCOMES if outcome in found or outcome not in _RARE]


def _totals(results: Mapping[str, Any], exporters: Sequence[str]) -> str:
    outcomes = _outcomes(results.values())
    lines = [line(["exporter", *(WORDS[each] for each in outcomes), "of"]), rule(len(outcomes) + 2)]
    for exporter in exporters:
        counts = Counter(
            row["cells"][exporter]["outcome"] for row in results.values() if exporter in row["cells"]
        )
        cells = [str(counts[outcome]) for outcome in outcomes]
        lines.append(line([_HEADINGS[exporter], *cells, str(counts.total())]))
    return "\n".join(lines)


def _rows(results: Mapping[str, Any], exporters: Sequence[str], rows: str) -> str:
    lines = [
        line([rows, "model", *(_HEADINGS[each] for each in exporters), "blocks", "largest error"]),
        rule(len(exporters) + 4),
    ]
    for name, row in sorted(results.items()):
        cells = [_word(row["cells"].get(exporter)) for exporter in exporters]
        own = row["cells"].get("ours", {})
        blocks = f"{own['blocks']} of {own['layers']}" if own.get("layers") else ""
        error = "" if own.get("error") is None else f"{own['error']:.1g}"
        lines.append(line([f"`{name}`", row["title"], *cells, blocks, error]))
    return "\n".join(lines)


def _word(cell: Mapping[str, Any] | None) -> str:
    return "" if cell is None else WORDS[cell["outcome"]]


def _reasons(results: Mapping[str, Any], exporters: Sequence[str]) -> str:
    parts = []
    for exporter in reversed(exporters):
        said = [
            f"- `{name}`: {WORDS[cell['outcome']]}: {escaped(cell['reason'])}"
            for name, row in sorted(results.items())
            if (cell := row["cells"].get(exporter)) is not None and cell["reason"]
        ]
        if said:
            parts.append("\n".join([f"### Why: {_HEADINGS[exporter]}", "", *said]))
    return "\n\n".join(parts)


def escaped(text: str) -> str:
    return text[:240].replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def rule(columns: int) -> str:
    return "|" + " --- |" * columns

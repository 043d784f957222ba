"""The page of docs/ that holds the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparse_onnx.bench.coverage import cases, exporters, half_page, table

#: Columns where the command names none.
USUAL = ("torch", "transformers", "ours")
_TEXT = """# Which models can be exported

Made by {command} with {versions}.

Each {rows} is tiny and has random weights under which routing matters. Each exporter traces the same sample and
declares the same axes dynamic, without a key/value cache; its file runs in ONNX Runtime on seven inputs of sizes
that were not traced (one token, other batches, longer, all ids alike, padded), and is compared with torch. Exact
means: within 1e-5 of the largest magnitude of a row, in float32, or within four times the distance of torch's own
float32 from its float64 where that is more (and within 1e-4); a model that does not run in float64 is measured by its
answers with weights moved by half a unit in the last place. Equal scores, of which torch takes any, are no error where
the file takes the first, as ONNX prescribes. An input at which such rounding alone moves torch's answer by more than
1e-4 gives way to another of its sizes.

{legend}

"blocks" and "largest error" are those of sparse-onnx. torch.onnx.export is given the model as transformers makes it,
with its own choice of how experts are computed. An empty cell was not measured, and "of" counts those that were.

"""
_CACHED = """
## With key/value cache

The same models by `export --past`. Seven inputs here too: texts without a past, one token after a past, and several,
in batches and padded; torch itself made the pasts. Compared are the logits and every tensor of the new cache. The
other exporters take transformers' cache object among their sample inputs. Their file is a step after a past, and the
first one another file, so that it runs on the five inputs with a past, and its logits are compared.

"""


def markdown(
    document: Mapping[str, Any],
    cached: Mapping[str, Any] | None,
    place: str,
    rows: str = "architecture",
    half: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """
    Args:
        document: what `run.sweep` returns.
        cached: the same of `cases.with_cache`, for a second table.
        place: the cases of the first table, ``package.module:FUNCTION``.
        rows: what a row is.
        half: the same of `cases.float16` and `cases.bfloat16` by those names, for what differs there.
    """
    documents = [document] if cached is None else [document, cached]
    commands = [_command(place, rows, columns(document))]
    if cached is not None:
        commands.append(_command(cases.WITH_CACHE, rows, columns(cached)))
    text = _TEXT.format(
        rows=rows,
        command=" and ".join(f"`{command}`" for command in commands),
        versions=", ".join(f"{name} {version}" for name, version in document["tool"].items() if version),
        legend=table.legend(*documents),
    )
    text += table.markdown(document, columns(document), rows)
    if cached is not None:
        text += _CACHED + table.markdown(cached, columns(cached), rows)
    return text + half_page.markdown(half, document) if half else text


def columns(document: Mapping[str, Any]) -> list[str]:
    """The exporters that were measured, in order."""
    cells = [row["cells"] for row in document["results"].values()]
    return [name for name in exporters.EXPORTERS if any(name in each for each in cells)]


def _command(place: str, rows: str, measured: Sequence[str]) -> str:
    parts = [table.COMMAND]
    if place != cases.ARCHITECTURES:
        parts += ["--cases", place]
    if rows != "architecture":
        parts += ["--rows", rows]
    if set(measured) != set(USUAL):
        parts += [f"--exporter {name}" for name in measured]
    return " ".join(parts)

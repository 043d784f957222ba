"""The human view of a `Report`. Everything printed is in the JSON too."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_onnx.cli.grouped import block_rows, refusal_lines
from sparse_onnx.cli.placing import placement_lines, static_lines
from sparse_onnx.cli.skipping import site_rows, summary
from sparse_onnx.cli.text import count, plain, size
from sparse_onnx.core.report import (
    BenchRecord,
    BlockRecord,
    ModelRecord,
    Refusal,
    Report,
    ThresholdsRecord,
    TuningRecord,
    TuningRow,
    VerifyRecord,
    tool_versions,
)

#: Reasons shown without `--explain`.
_FIRST = 3


def render(report: Report, out: Console, *, verbose: bool = False, explain: bool = False) -> None:
    if report.model is not None:
        line(out, _model("", report.model))
    if report.output is not None:
        line(out, _model("-> ", report.output))
    if report.blocks:
        _blocks(out, report.blocks, verbose)
    elif report.command in ("inspect", "optimize", "export"):
        line(out, f"no {'sparse blocks' if report.command == 'inspect' else 'mixture of experts'} found")
    if verbose:
        _passes(out, report)
    _refusals(out, report.refusals, explain, verbose)
    if report.tuning is not None:
        _tuning(out, report.tuning)
    if report.thresholds is not None:
        _thresholds(out, report.thresholds, verbose)
    if report.verify is not None:
        _verify(out, report.verify, verbose)
    if report.bench is not None:
        _bench(out, report.bench)
    for text in static_lines(report.static or ()):
        line(out, text)
    for text in placement_lines(report.placement) if report.placement else ():
        line(out, text)
    if report.diff is not None:
        _diff(out, report.diff)
    for note in report.notes:
        line(out, f"note: {note}")
    if verbose:
        line(out, ", ".join(f"{name} {version}" for name, version in tool_versions().items()))


def table(
    out: Console, columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()
) -> None:
    """A plain table; None is an empty cell. `right` names the columns of numbers."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(Text(column), justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text("" if cell is None else plain(cell)) for cell in row))
    out.print(drawn)


def line(out: Console, text: str) -> None:
    """One line, as it is: nothing in it is interpreted."""
    out.print(Text(plain(text)))


def _model(prefix: str, model: ModelRecord) -> str:
    text = f"{prefix}{model.path}: {model.nodes} nodes, {size(model.weight_bytes)} of weights"
    if model.parameters is not None:
        text += f", {count(model.parameters)} parameters"
        if model.active_parameters is not None:
            text += f", {count(model.active_parameters)} active for one token"
    return text


def _blocks(out: Console, blocks: list[BlockRecord], verbose: bool) -> None:
    columns = [
        "block",
        "kind",
        "spelling",
        "form",
        "router",
        "experts",
        "top-k",
        "hidden",
        "inner",
        "activation",
    ]
    numbers = ["experts", "top-k", "hidden", "inner", "parameters", "active"]
    rows = [
        (
            *(name, block.kind, None if block.spelling == block.kind else block.spelling, block.form),
            *(block.router, block.experts, block.top_k, block.hidden, block.inner, _activation(block)),
            *(count(block.parameters), count(block.active_parameters)),
        )
        for name, block in block_rows(blocks, folded=not verbose)
    ]
    table(out, [*columns, "parameters", "active"], rows, right=numbers)


def _activation(block: BlockRecord) -> str | None:
    """Experts that are no two layers have none of their own."""
    if block.activation:
        rounded = ", rounded to 8 bits" if block.rounding else ""
        return f"{block.activation}{', gated' if block.gated else ''}{rounded}"
    return "any body" if block.kind == "moe" else None


def _passes(out: Console, report: Report) -> None:
    if not report.passes:
        return
    columns = ["pass", "kind", "matched", "rewritten", "refused", "ms", "nodes", "bytes"]
    rows = [
        (
            *(record.name, record.kind, record.matched, record.rewritten, record.refused, f"{record.ms:.1f}"),
            f"{record.nodes_after - record.nodes_before:+d}",
            f"{record.bytes_after - record.bytes_before:+d}",
        )
        for record in report.passes
    ]
    table(out, columns, rows, right=columns[2:])


def _refusals(out: Console, refusals: list[Refusal], explain: bool, verbose: bool) -> None:
    if not refusals:
        return
    reasons = refusal_lines(refusals, every_node=verbose)
    shown = reasons if explain else reasons[:_FIRST]
    line(out, f"{len(refusals)} left alone:")
    for text in itertools.chain.from_iterable(shown):
        line(out, f"  {text}")
    if len(shown) < len(reasons):
        line(out, f"  ... and {len(reasons) - len(shown)} more reasons; --explain lists them, so does --json")


def _verify(out: Console, record: VerifyRecord, verbose: bool) -> None:
    if record.passed is None:
        line(out, "not verified: nothing was compared")
        return
    error = "" if record.max_rel_error is None else f", largest relative error {record.max_rel_error:.1e}"
    margin = (
        f", {record.tokens_left_out} tokens of near-tied routing left out" if record.tokens_left_out else ""
    )
    where = f", on {record.on}" if record.on else ""
    verdict = f"verified{where}: same answers" if record.passed else "NOT the same answers"
    line(out, f"{verdict} ({record.method}), {record.runs} runs{error}{margin}")
    if record.failure:
        line(out, f"  {record.failure}")
    for text in record.not_run:
        line(out, f"  not compared, since the original fails there as well: {text}")
    if verbose:
        line(out, f"  inputs: {'; '.join(record.inputs)}")


def _tuning(out: Console, record: TuningRecord) -> None:
    """One line a form: time relative to the default form at each token count."""
    where = f"read from {record.source}, measured" if record.source else "measured"
    line(out, f"forms {where} on {record.processor}, {record.threads} threads, relative to the default form:")
    groups: dict[tuple[str, str], list[TuningRow]] = {}
    for row in record.rows:
        groups.setdefault((row.block, row.form), []).append(row)
    drawn = []
    for (block, form), rows in groups.items():
        ratios = {row.tokens: f"{row.ratio_to_default:.2f}" for row in rows}
        name = f"{block} x {rows[0].blocks}" if rows[0].blocks > 1 else block
        drawn.append((name, form, *map(ratios.get, record.tokens), "chosen" if rows[0].chosen else None))
    counts = [f"{count} tokens" if count > 1 else "1 token" for count in record.tokens]
    table(out, ["block", "form", *counts, ""], drawn, right=counts)
    for text in record.left_out:
        line(out, f"  not measured: {text}")


def _thresholds(out: Console, record: ThresholdsRecord, verbose: bool) -> None:
    for text in summary(record):
        line(out, text)
    columns = ["site", "layers", "centre", "expected", "measured", "bytes", "skipped"]
    table(out, columns, site_rows(record.sites, folded=not verbose), right=[*columns[3:], "layers"])


def _bench(out: Console, record: BenchRecord) -> None:
    line(out, f"{record.threads} threads, at least {record.rounds} interleaved rounds a token count")
    rows = [
        (
            *(row.tokens, row.model, f"{row.median_ms:.3f}", f"{row.p10_ms:.3f}", f"{row.p90_ms:.3f}"),
            f"{row.ratio_to_first:.2f}",
        )
        for row in record.rows
    ]
    columns = ["tokens", "model", "median ms", "p10", "p90", "ratio to first"]
    table(out, columns, rows, right=[column for column in columns if column != "model"])
    models = [
        (model.model, _number(model.create_s, ".2f"), _number(model.rss_mb, ".0f")) for model in record.models
    ]
    table(out, ["model", "create s", "resident MB"], models, right=["create s", "resident MB"])


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _diff(out: Console, diff: dict[str, Any]) -> None:
    nodes = diff["nodes"]
    operators = sorted({*nodes["added"], *nodes["removed"]})
    rows = [(name, -nodes["removed"].get(name, 0) or "", nodes["added"].get(name, "")) for name in operators]
    if rows:
        table(out, ["operator", "removed", "added"], rows, right=["removed", "added"])
    for block in diff["blocks"]:
        line(out, f"block {block['name']}: {block['from']} -> {block['to']}")
    for kind in ("inputs", "outputs", "functions"):
        for name in diff[kind]["removed"]:
            line(out, f"{kind}: - {name}")
        for name in diff[kind]["added"]:
            line(out, f"{kind}: + {name}")
    weights = diff["weights"]
    line(
        out,
        f"weights: {size(weights['bytes_shared'])} the same, {size(weights['bytes_added'])} added, "
        f"{size(weights['bytes_removed'])} removed",
    )
    if not rows and not diff["blocks"] and not weights["bytes_added"] and not weights["bytes_removed"]:
        line(out, "no difference in nodes, blocks or weights")

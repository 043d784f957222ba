"""The options of `optimize` that have layers skip inputs, and the view of what came of it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from sparse_onnx.cli.text import size
from sparse_onnx.core.report import SiteRecord, ThresholdsRecord

Command = TypeVar("Command", bound=Callable[..., Any])
#: Names of the options, as `optimize` takes them.
NAMES = (
    "thresholds",
    "budget",
    "sparsity",
    "eval_data",
    "method",
    "allocation",
    "threshold_mode",
    "dense_first",
    "tokenizer",
    "prefill",
)


def thresholds(function: Command) -> Command:
    """Adds the options; the command receives them as one dictionary `skipping`."""

    @click.option(
        "--thresholds",
        metavar="CALIB.json",
        type=click.Path(path_type=Path),
        help="Skip small inputs of linear layers, and their weights, as `calibrate` measured them (lossy).",
    )
    @click.option(
        "--budget",
        metavar="METRIC<=X",
        help="Skip as much as quality allows: perplexity<=2% (above the dense model's) or <=20.5, top1>=0.95, "
        "cosine>=0.99, FILE.py:NAME>=X. The last runs your code: NAME(run, feeds) -> float.",
    )
    @click.option("--sparsity", type=float, metavar="S", help="Or skip this share of linear weights, 0 to 1.")
    @click.option(
        "--eval-data",
        multiple=True,
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Texts or .npz arrays that calibration has not seen, to measure quality and sparsity on; repeatable.",
    )
    @click.option(
        "--method",
        metavar="scap|teal|topk|relu|cats",
        default="scap",
        show_default=True,
        help="scap: centres by output error; teal: centre 0; topk: a number of inputs; relu: exact zeros, lossless; "
        "cats: units of gated layers whose gate is small.",
    )
    @click.option(
        "--allocation",
        metavar="blocks|greedy|uniform",
        default="blocks",
        show_default=True,
        help="By output error for bytes skipped: within blocks that skip alike, or over all; or the same for all.",
    )
    @click.option(
        "--threshold-mode",
        metavar="native|gather|simulate",
        default="native",
        show_default=True,
        help="native: our operator, fast with `kernels build`; gather: standard operators, from 70 % on; simulate: "
        "for accuracy studies, never faster.",
    )
    @click.option(
        "--dense-first",
        type=int,
        metavar="N",
        help="Prefill, and the first N positions, skip nothing; needs a key/value cache.",
    )
    @click.option(
        "--prefill",
        metavar="shared|copy",
        default="shared",
        show_default=True,
        help="copy: MatMulNBits layers that round inputs to 8 bits stay beside the thresholded ones, for runs of more "
        "than 4 rows: faster there, nothing skipped, twice the weights.",
    )
    @click.option(
        "--tokenizer",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="tokenizer.json that reads --eval-data, where none lies beside IN.",
    )
    @functools.wraps(function)
    def wrapper(**arguments: Any) -> Any:
        return function(skipping={name: arguments.pop(name) for name in NAMES}, **arguments)

    return wrapper  # type: ignore[return-value]


def summary(record: ThresholdsRecord) -> list[str]:
    """Lines on the whole."""
    how = "measured on the evaluation data" if record.measured else "expected from calibration, not measured"
    lines = [
        f"thresholds ({record.method}, {record.mode}) at level {record.level} of input '{record.level_input}': "
        f"{record.share_skipped:.1%} of {size(record.bytes)} of linear weights skipped for one token, {how}"
    ]
    for quality in record.quality:
        budget = "" if quality.budget is None else f", asked for {quality.budget}"
        lines.append(
            f"  {quality.metric} {quality.value:.6g}, dense {quality.dense:.6g} ({quality.tokens} tokens{budget})"
        )
    return lines


def site_rows(sites: list[SiteRecord], folded: bool) -> list[tuple[object, ...]]:
    """(site, layers, centre, expected, measured, bytes, skipped) a row; folded: one row for sites whose names differ
    by numbers alone, shares being means by bytes."""
    groups: dict[str, list[SiteRecord]] = {}
    for site in sites:
        groups.setdefault(re.sub(r"\d+", "*", site.name) if folded else site.name, []).append(site)
    rows: list[tuple[object, ...]] = []
    for name, group in groups.items():
        total = sum(site.bytes for site in group) or 1
        expected = sum(site.expected * site.bytes for site in group) / total
        known = [site.measured for site in group if site.measured is not None]
        measured = None
        if len(known) == len(group):
            measured = f"{sum((site.measured or 0) * site.bytes for site in group) / total:.1%}"
        centres = dict.fromkeys(site.centre for site in group)
        label = f"{name} x {len(group)}" if len(group) > 1 else group[0].name
        rows.append(
            (
                *(label, sum(site.layers for site in group), ", ".join(centres), f"{expected:.1%}", measured),
                *(size(sum(site.bytes for site in group)), size(sum(site.bytes_skipped for site in group))),
            )
        )
    return rows

"""The tables of `bench.thresholded.models`, as a section of a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sparse_onnx.bench.tables import markdown, number
from sparse_onnx.bench.thresholded.variants import BEST, OVER_ALL, SHARES, Variant, recipes, variants
from sparse_onnx.core.calibration import CENTRES
from sparse_onnx.core.errors import UsageError

BEGIN = "<!-- python -m sparse_onnx.bench.thresholded.models -->"
END = "<!-- end of the measurements -->"
_TITLES = {
    "smollm2": "SmolLM2-135M",
    "byte-moe": "The zoo's mixture of experts",
    "minilm": "all-MiniLM-L6-v2",
}
_HEADS = {
    "perplexity": "perplexity",
    "top1": "same token",
    "cosine": "cosine",
    "order": "order of pairs",
    "neighbour": "same neighbour",
}
_TYPES = {
    "float32": "float32",
    "int8": "int8",
    "int8-dynamic": "int8, dynamic",
    "int4": "int4",
}
_COLUMNS = {"channel_median": "each channel's median", "over all": "best, over all"}
#: Losses that the summary looks for the fastest model within: of perplexity above the dense one, and of the cosine.
_ALLOWED = {"perplexity": (0.01, 0.03, 0.1), "cosine": (0.01, 0.02, 0.05)}

Found = Mapping[str, Any]


def placed(page: str, text: str) -> str:
    """The page with the section between its markers.

    Raises:
        UsageError: the markers are not there, once each and in this order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise UsageError("the page has no place for the tables", f"put {BEGIN} and {END} there, each once")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def section(found: Found) -> str:
    """All models that were measured."""
    names = [name for name in _TITLES if found["quality"].get(name) or found["speed"].get(name)]
    parts = [part for name in names for part in _model(name, found)]
    return "\n\n".join(parts)


def _model(name: str, found: Found) -> Iterable[str]:
    quality = {key: row for key, row in found["quality"].get(name, {}).items() if "refused" not in row}
    times = found["speed"].get(name, {})
    yield f"### {_TITLES[name]}"
    if "float32 dense" in quality:
        yield _centres(quality)
        shown = _recipes(name == "minilm", quality, times)
        if shown:
            yield shown
        if not times:
            yield _types(quality)
    if times:
        yield from _speed(quality, times, found["processor"])


def loss(metric: str, value: float, dense: float) -> str:
    """How a metric is told: perplexity as the change to the dense one, others as they are."""
    return f"{value / dense - 1:+.1%}" if metric == "perplexity" else f"{value:.3f}"


def _told(row: Found | None, dense: Found) -> list[str]:
    if row is None:
        return ["" for _ in dense["metrics"]]
    return [loss(metric, row["metrics"][metric][0], value[0]) for metric, value in dense["metrics"].items()]


def _centres(quality: Found) -> str:
    """One column a centre, two numbers a cell."""
    dense = quality["float32 dense"]
    names = (*CENTRES, BEST, OVER_ALL)
    lines = []
    for share in SHARES:
        rows = [quality.get(Variant("float32", kind, share).key) for kind in names]
        skipped = [row["skipped"] for row in rows if row is not None]
        if not skipped:
            continue
        span = sorted({f"{min(skipped):.0%}", f"{max(skipped):.0%}"})
        cells = [", ".join(cell for cell in _told(row, dense) if cell) for row in rows]
        lines.append([" to ".join(span), *cells])
    what = ", ".join(_HEADS[metric] for metric in dense["metrics"])
    head = ["skipped", *(_COLUMNS.get(each, each) for each in names)]
    first = next(iter(dense["metrics"]))
    base = f"; dense {dense['metrics'][first][0]:.2f}" if first == "perplexity" else ""
    return f"By centre, weights in float32 ({what}{base}):\n\n{markdown(head, lines)}"


def _types(quality: Found) -> str:
    """What the speed tables say of quality, where there are none yet."""
    dense = quality["float32 dense"]
    lines = []
    for weights, name in _TYPES.items():
        for key in (f"{weights} dense", *(Variant(weights, BEST, share).key for share in SHARES)):  # type: ignore[arg-type]
            row = quality.get(key)
            if row is not None:
                skipped = "dense" if key.endswith("dense") else f"{row['skipped']:.0%}"
                lines.append([name, skipped, *_told(row, dense)])
    head = ["weights", "skipped", *(_HEADS[metric] for metric in dense["metrics"])]
    return f"By type of weights, against dense float32, best centres:\n\n{markdown(head, lines)}"


def _recipes(encoder: bool, quality: Found, times: Found) -> str:
    dense = quality["float32 dense"]
    heads = [_HEADS[metric] for metric in dense["metrics"]]
    lines = []
    for variant in recipes(encoder):
        row = quality.get(variant.key)
        if row is None:
            continue
        ours = at_bytes(quality, row["skipped"], dense)
        fast = [number(_ratio(times, count, "decode", variant.key), ".2f") for count in times]
        lines.append(
            [
                variant.key.removeprefix("float32 "),
                f"{row['skipped']:.1%}",
                *_told(row, dense),
                *_told(ours, dense),
                *(fast if not encoder else []),
            ]
        )
    if not lines:
        return ""
    speed = [] if encoder else [f"decoding, {_threads(count)}" for count in times]
    head = ["recipe", "skipped", *heads, *(f"{each}, best" for each in heads), *speed]
    text = "Published recipes, and `best` where it skips as much, between the two nearest shares that were measured"
    return f"{text}:\n\n{markdown(head, lines)}"


def at_bytes(quality: Found, skipped: float, dense: Found) -> dict[str, Any] | None:
    """What our own rows lose where they skip as much, between the two nearest ones; None beyond the last."""
    rows = [quality.get(Variant("float32", BEST, share).key) for share in SHARES]
    have = [dense, *(row for row in rows if row is not None)]
    shares = [row["skipped"] for row in have]
    if skipped > max(shares):
        return None
    return {
        "metrics": {
            metric: (float(np.interp(skipped, shares, [row["metrics"][metric][0] for row in have])), None)
            for metric in dense["metrics"]
        }
    }


def _ratio(times: Found, count: str, shape: str, key: str) -> float | None:
    rows = times.get(count, {}).get(shape, ())
    return next((row["ratio"] for row in rows if row["key"] == key), None)


def _speed(quality: Found, times: Found, processor: str) -> Iterable[str]:
    encoder = not any("decode" in shapes for shapes in times.values())
    dense = quality.get("float32 dense")
    for shape in next(iter(times.values())):
        keys = list(dict.fromkeys(row["key"] for found in times.values() for row in found.get(shape, ())))
        every = {each.key: each for each in variants(encoder, list(_TYPES))}
        heads = [] if dense is None else [_HEADS[metric] for metric in dense["metrics"]]
        lines = []
        for key in keys:
            variant, row = every.get(key), quality.get(key)
            if variant is None or variant.is_recipe or variant.kind in (*CENTRES, OVER_ALL):
                continue
            cells = [
                _TYPES[variant.weights],
                "dense" if variant.kind == "dense" else f"{row['skipped']:.0%}" if row else "",
            ]
            cells += _told(row, dense) if dense is not None else []
            for found in times.values():
                time = next((each for each in found.get(shape, ()) if each["key"] == key), None)
                cells += ["", "", ""] if time is None else [
                    f"{time['ms']:.4g}", f"{time['to_dense']:.2f}", f"{time['ratio']:.2f}"
                ]  # fmt: skip
            lines.append(cells)
        speeds = [f"{what}, {_threads(count)}" for count in times for what in ("ms", "own dense", "float32")]
        text = {
            "decode": "Decoding one token",
            "prefill": "Many tokens at once",
            "text": "One sentence",
        }[shape]
        yield (
            f"{text} ({processor}): milliseconds, and how many times as fast as the dense model of the same type, and "
            f"as dense float32:\n\n{markdown(['weights', 'skipped', *heads, *speeds], lines)}"
        )
        if shape == "decode" and dense is not None:
            yield _summary(quality, dense, times, every)


def _summary(quality: Found, dense: Found, times: Found, every: Mapping[str, Variant]) -> str:
    """The fastest model by what it may lose: without thresholds, and with them."""
    metric = next(iter(dense["metrics"]))
    count = next(iter(times))
    rows = {row["key"]: row["ms"] for row in times[count]["decode"]}
    lines = []
    for most in _ALLOWED[metric]:
        good = [
            key
            for key in rows
            if key in quality and key in every and _lost(metric, quality[key], dense) <= most
        ]
        plain = [key for key in good if every[key].kind == "dense"]
        cells = [f"{most:.0%}"]
        for keys in (plain, good):
            best = min(keys, key=lambda key: rows[key], default=None)
            cells += ["", ""] if best is None else [_named(every[best], quality[best]), f"{rows[best]:.4g}"]
        lines.append(cells)
    head = ["loss at most", "fastest dense", "ms", "fastest of all", "ms"]
    return f"The fastest by what may be lost, {_threads(count)}:\n\n{markdown(head, lines)}"


def _lost(metric: str, row: Found, dense: Found) -> float:
    value, base = row["metrics"][metric][0], dense["metrics"][metric][0]
    return float(value / base - 1 if metric == "perplexity" else base - value)


def _named(variant: Variant, row: Found) -> str:
    name = _TYPES[variant.weights]
    return name if variant.kind == "dense" else f"{name}, {variant.kind}, {row['skipped']:.0%} skipped"


def _threads(count: str) -> str:
    return "1 thread" if count == "1" else f"{count} threads"


__all__: Sequence[str] = ("BEGIN", "END", "at_bytes", "loss", "placed", "section")

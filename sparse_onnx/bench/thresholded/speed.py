"""How fast whole models with thresholds are, beside the dense ones in every type: interleaved, in one process.

    decode   one token behind `Amounts.context` cached ones, which are real text and whose keys the dense model gave
    prefill  `Amounts.prefill` tokens at once, nothing cached; of an encoder one text of that length
    text     one sentence (encoders)

A model without a cache decodes its first token. Outputs are taken as they are, caches among them.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from sparse_onnx.bench.measure import NO_SPINNING, Contestant, interleave
from sparse_onnx.bench.thresholded.cases import Case, Feeds
from sparse_onnx.bench.thresholded.variants import Variant
from sparse_onnx.targets import session as sessions

#: Texts that take turns.
_TEXTS = 4
#: Seconds that the shortest runs are repeated for, a contestant, and rounds at least.
_SECONDS, _ROUNDS = 1.0, 9
_SHOWN = (0.3, 0.5)


@dataclasses.dataclass(frozen=True)
class Time:
    """`ms` is the median; `ratio` the median over rounds of the dense float32 model's time by this one's, `to_dense`
    the same for the dense model of its own weights."""

    key: str
    ms: float
    ratio: float
    to_dense: float


def shapes(case: Case) -> dict[str, list[Feeds]]:
    """What is timed, by name: runs that take turns."""
    amounts = case.amounts
    if case.encoder:
        long = np.concatenate([feeds["input_ids"][0] for feeds in case.held_out])
        pieces = [long[at * amounts.prefill :][: amounts.prefill] for at in range(_TEXTS)]
        rows = [np.array([piece]) for piece in pieces if len(piece) == amounts.prefill]
        return {
            "text": list(case.held_out[:_TEXTS]),
            "prefill": [{"input_ids": row, "attention_mask": np.ones_like(row)} for row in rows],
        }
    whole = [feeds for feeds in case.held_out if feeds["input_ids"].shape[1] >= amounts.prefill][:_TEXTS]
    cut = [cut_to(feeds, amounts.prefill) for feeds in whole]
    if not any(_is_past(name) for name in case.held_out[0]):
        return {"decode": [cut_to(feeds, 1) for feeds in whole], "prefill": cut}
    session = sessions.create_session(case.file(Variant("float32", "dense")))
    names = [value.name for value in session.get_outputs()]
    decode = [decoded(feeds, amounts.context, lambda fed: dict(zip(names, session.run(None, fed), strict=True)))
              for feeds in whole]  # fmt: skip
    return {"decode": decode, "prefill": cut}


def cut_to(feeds: Feeds, tokens: int) -> Feeds:
    """The first tokens of a run with nothing cached: everything ``[B, S]`` is cut."""
    length = feeds["input_ids"].shape[1]
    return {
        name: array[:, :tokens] if array.ndim == 2 and array.shape[1] == length else array
        for name, array in feeds.items()
    }


def decoded(feeds: Feeds, context: int, run: Callable[[Feeds], dict[str, np.ndarray]]) -> Feeds:
    """The run of one token behind `context` ones, with the keys and values that `run` gives for these."""
    results = run(cut_to(feeds, context))
    found: Feeds = {}
    for name, array in feeds.items():
        if _is_past(name):
            found[name] = results[name.replace("past_key_values", "present")]
        elif name == "attention_mask":
            found[name] = array[:, : context + 1]
        else:
            found[name] = array[:, context : context + 1]
    return found


def measure(
    case: Case, chosen: Sequence[Variant], threads: int, *, seconds: float = _SECONDS, rounds: int = _ROUNDS
) -> dict[str, list[Time]]:
    """Times by shape. The first of the variants is the dense model in float32.

    Args:
        case: the model.
        chosen: the variants; their files are there.
        threads: of each session.
        seconds: see `measure.interleave`.
        rounds: of decoding, at least; half as many of what takes longer.
    """
    for variant in chosen:
        _forget(case.file(variant))
    opened = [
        sessions.create_session(case.file(variant), threads=threads, entries=NO_SPINNING, kernels=True)
        for variant in chosen
    ]
    found = {}
    for name, feeds in shapes(case).items():
        now = [at for at, variant in enumerate(chosen) if name == "decode" or _is_shown(variant)]
        contestants = [Contestant(chosen[at].key, _runner(opened[at], feeds)) for at in now]
        fewest = rounds if name == "decode" else max(2, rounds // 2)  # seconds each
        times = interleave(contestants, len(feeds), min_time=seconds, fewest=fewest)
        found[name] = _times([chosen[at] for at in now], times)
    del opened
    gc.collect()
    return found


def _forget(model: Path) -> None:
    """Drops a model's files from the system's cache. Native kernels read weights where the file is mapped, and files
    that were cached in different ways differed by a fifth with nothing skipped: so all begin alike."""
    for path in (model, model.with_suffix(".data"), model.with_name(f"{model.name}.data")):
        if path.exists() and hasattr(os, "posix_fadvise"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # pages that are not written yet stay
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _runner(session: onnxruntime.InferenceSession, feeds: Sequence[Feeds]) -> Callable[[int], object]:
    return lambda index: session.run(None, feeds[index])


def _times(chosen: Sequence[Variant], times: np.ndarray) -> list[Time]:
    dense = {variant.weights: at for at, variant in enumerate(chosen) if variant.kind == "dense"}
    ratios = np.median(times[:, :1] / times, axis=0)
    own = [float(np.median(times[:, dense[each.weights]] / times[:, at])) for at, each in enumerate(chosen)]
    middle = np.median(times, axis=0) * 1e3
    return [
        Time(variant.key, float(middle[at]), float(ratios[at]), own[at]) for at, variant in enumerate(chosen)
    ]


def _is_past(name: str) -> bool:
    return name.startswith("past_key_values")


def timed(found: Sequence[Variant]) -> list[Variant]:
    """Those that decoding is timed of: how fast a model is follows from what it skips, whatever decided that. Where
    many tokens run at once, dense models and two shares do."""
    return [
        each
        for each in found
        if each.kind in ("dense", "best")
        or each.is_recipe
        or (each.kind in ("zero", "channel_median") and each.share in _SHOWN)
    ]


def _is_shown(variant: Variant) -> bool:
    return variant.kind == "dense" or (variant.kind == "best" and variant.share in _SHOWN)

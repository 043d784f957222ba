"""What thresholds cost: perplexity, agreement and similarity on the user's data, or what the user's own code measures.

    perplexity  exp of the mean over predicted tokens of -log p(token | tokens before it), from logits [B, S, V]
    top1        share of rows of the first output whose largest element is where the dense model's is
    cosine      mean cosine between the rows of the first output and the dense model's
    FILE.py:F   F(run, feeds): `run(feed)` gives the outputs by name, `feeds` is a list of inputs by name

The dense model is the same model at level 0. Rows that the attention mask leaves out count nowhere.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparse_onnx.core.errors import ImpossibleError, OutsideError, UsageError
from sparse_onnx.export import users

Feeds = dict[str, np.ndarray]
#: Runs a model at a level: outputs in order.
Run = Callable[[Feeds, int], list[np.ndarray]]

BUILT_IN = ("perplexity", "top1", "cosine")
_FORM = re.compile(
    r"(?P<metric>.+?)(?P<sign><=|>=)(?P<number>[+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)(?P<percent>%?)"
)
_CONTRACT = "expected such as perplexity<=2% (above the dense model's), top1>=0.95 or cosine>=0.99"


@dataclasses.dataclass(frozen=True)
class Budget:
    """`metric` is to be at most (`upper`) or at least `bound`; `relative`: of perplexity, how far above the dense
    model's it may be, as a share of it."""

    metric: str
    upper: bool
    bound: float
    relative: bool = False

    @staticmethod
    def parse(text: str) -> Budget:
        """
        Raises:
            UsageError: another form, an unknown metric, or a bound on its wrong side.
        """
        found = _FORM.fullmatch(text.replace(" ", ""))
        if found is None:
            raise UsageError(f"'{text}' is no budget", _CONTRACT)
        metric, upper = found["metric"], found["sign"] == "<="
        try:
            bound = float(found["number"])
        except ValueError:
            raise UsageError(f"'{found['number']}' is no number", _CONTRACT) from None
        percent = bool(found["percent"])
        bound = bound / 100 if percent else bound
        if metric not in BUILT_IN and ":" not in metric:
            raise UsageError(f"unknown metric '{metric}'", f"one of {', '.join(BUILT_IN)}, or FILE.py:NAME")
        if metric in BUILT_IN and upper != (metric == "perplexity"):
            raise UsageError(
                f"{metric} is better the {'lower' if metric == 'perplexity' else 'higher'} it is", _CONTRACT
            )
        if metric in ("top1", "cosine") and not -1 <= bound <= 1:
            raise UsageError(f"{metric} is never {bound:g}", _CONTRACT)
        return Budget(metric, upper, bound, percent and metric == "perplexity")

    def met(self, value: float, dense: float) -> bool:
        bound = dense * (1 + self.bound) if self.relative else self.bound
        return value <= bound if self.upper else value >= bound

    def __str__(self) -> str:
        bound = f"{self.bound:.4g}" if not self.relative else f"{self.bound:.2%} above the dense model's"
        return f"{self.metric} {'<=' if self.upper else '>='} {bound}"


@dataclasses.dataclass(frozen=True)
class Measured:
    """`value` at the level, `dense` at level 0; `error` is the standard error of their difference over runs, in units
    of `value`; None where it is not known. `tokens` counts what was compared."""

    value: float
    dense: float
    error: float | None
    tokens: int


class Judge:
    """Measures one metric on some runs, at any level.

    Args:
        metric: built in, or FILE.py:NAME, whose code is run.
        run: the model.
        names: of its outputs.
        feeds: the runs.

    Raises:
        UsageError: no runs, or no such function.
    """

    def __init__(self, metric: str, run: Run, names: Sequence[str], feeds: Sequence[Feeds]) -> None:
        if not feeds:
            raise UsageError("there is nothing to measure on", "give more --eval-data")
        self.metric, self.run, self.names, self.feeds = metric, run, list(names), list(feeds)
        self._user: Callable[..., Any] | None = None
        if metric not in BUILT_IN:
            place, _, name = metric.rpartition(":")
            self._user = users.imported(
                place, name, "expected a function (run, feeds) -> float", "the metric"
            )
        self._dense: list[tuple[float, int]] | float | None = None

    def __call__(self, level: int) -> Measured:
        """
        Raises:
            ImpossibleError: the model's outputs have no such metric.
            OutsideError: the user's code raises, or gives no finite number.
        """
        if self._user is not None:
            if self._dense is None:
                self._dense = self._users(0)
            assert isinstance(self._dense, float)
            value = self._dense if level == 0 else self._users(level)
            return Measured(value, self._dense, None, len(self.feeds))
        if self.metric == "perplexity":
            if self._dense is None:
                self._dense = [self._surprise(feeds, 0) for feeds in self.feeds]
            assert isinstance(self._dense, list)
            found = self._dense if level == 0 else [self._surprise(feeds, level) for feeds in self.feeds]
            return _perplexity(found, self._dense)
        scores = [self._compared(feeds, level) for feeds in self.feeds]
        return _mean(scores)

    def _users(self, level: int) -> float:
        assert self._user is not None

        def run(feeds: Feeds) -> dict[str, np.ndarray]:
            return dict(zip(self.names, self.run(dict(feeds), level), strict=True))

        with users.users_code(self.metric, "the metric"):
            value = self._user(run, [dict(feeds) for feeds in self.feeds])
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise OutsideError(f"the metric gave {value!r}, no finite number", where=self.metric)
        return number

    def _surprise(self, feeds: Feeds, level: int) -> tuple[float, int]:
        """Sum of -log p over the tokens that something predicts, and how many they are."""
        ids = feeds.get("input_ids")
        if ids is None or ids.ndim != 2:
            raise ImpossibleError(
                "perplexity needs an input 'input_ids' [batch, sequence]", "take top1 or cosine"
            )
        logits = self._first(self.run(feeds, level))
        if (
            logits.ndim != 3
            or logits.shape[:2] != ids.shape
            or ids.size == 0
            or ids.max() >= logits.shape[-1]
        ):
            raise ImpossibleError(
                f"perplexity needs logits [batch, sequence, vocabulary], and the first output is {logits.shape}",
                "take top1 or cosine",
            )
        total, count = 0.0, 0
        mask = _mask(feeds, ids.shape)
        for row in range(len(ids)):
            scores = logits[row, :-1].astype(np.float64)
            scores -= scores.max(axis=-1, keepdims=True)
            chosen = np.take_along_axis(scores, ids[row, 1:, None].astype(np.int64), axis=-1)[:, 0]
            bits = np.log(np.exp(scores).sum(axis=-1)) - chosen
            real = mask[row, 1:] & mask[row, :-1]
            total, count = total + float(bits[real].sum()), count + int(real.sum())
        return total, count

    def _compared(self, feeds: Feeds, level: int) -> tuple[float, int]:
        """The sum of the metric over the rows of the first output, and how many these are."""
        dense = self._first(self.run(feeds, 0))
        sparse = dense if level == 0 else self._first(self.run(feeds, level))
        keep = _mask(feeds, dense.shape[:-1]).reshape(-1)
        left, right = (each.reshape(-1, dense.shape[-1])[keep].astype(np.float64) for each in (dense, sparse))
        if self.metric == "top1":
            return float((left.argmax(axis=-1) == right.argmax(axis=-1)).sum()), len(left)
        norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
        products = (left * right).sum(axis=-1)
        same = np.where((left == right).all(axis=-1), 1.0, 0.0)
        cosines = np.where(norms > 0, products / np.where(norms > 0, norms, 1), same)
        return float(cosines.sum()), len(left)

    def _first(self, outputs: list[np.ndarray]) -> np.ndarray:
        first = outputs[0]
        if first.ndim < 1 or first.dtype.kind != "f" or first.shape[-1] < 2:
            raise ImpossibleError(
                f"{self.metric} needs rows of numbers, and the first output is {first.dtype} {first.shape}",
                "give a function of your own: FILE.py:NAME",
            )
        if not np.isfinite(first).all():
            raise ImpossibleError(
                f"{self.metric} of outputs that are not finite means nothing", "check the data"
            )
        return first


def _mask(feeds: Feeds, shape: tuple[int, ...]) -> np.ndarray:
    """Which rows are tokens: ``[B, S]`` of the attention mask where rows have that shape, else all."""
    given = feeds.get("attention_mask")
    if given is None or given.ndim != 2 or len(shape) != 2:
        return np.ones(shape, np.bool_)
    if given.shape[0] == shape[0] and given.shape[1] >= shape[1]:
        return given[:, given.shape[1] - shape[1] :] > 0
    return np.ones(shape, np.bool_)


def _perplexity(found: Sequence[tuple[float, int]], dense: Sequence[tuple[float, int]]) -> Measured:
    tokens = sum(count for _, count in found)
    if not tokens:
        raise ImpossibleError("no token has another before it: there is no perplexity", "give longer texts")
    value = math.exp(min(700.0, sum(total for total, _ in found) / tokens))
    base = math.exp(min(700.0, sum(total for total, _ in dense) / tokens))
    pairs = [
        (ours / count - theirs / count, count)
        for (ours, count), (theirs, _) in zip(found, dense, strict=True)
        if count
    ]
    error = _standard_error([change for change, _ in pairs], [count for _, count in pairs])
    return Measured(value, base, None if error is None else value * error, tokens)


def _mean(scores: Sequence[tuple[float, int]]) -> Measured:
    tokens = sum(count for _, count in scores)
    if not tokens:
        raise ImpossibleError("no output has any rows", "check the data")
    each = [(total / count, count) for total, count in scores if count]
    error = _standard_error([value for value, _ in each], [count for _, count in each])
    return Measured(sum(total for total, _ in scores) / tokens, 1.0, error, tokens)


def _standard_error(values: Sequence[float], weights: Sequence[int]) -> float | None:
    """Of the weighted mean of runs that are independent of each other."""
    if len(values) < 2:
        return None
    share = np.array(weights, np.float64) / sum(weights)
    array = np.array(values)
    mean = float(share @ array)
    spread = float((share**2) @ np.square(array - mean))
    return math.sqrt(spread * len(values) / (len(values) - 1))

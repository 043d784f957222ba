"""Metrics against their definitions, and budgets as people write them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparse_onnx.core.errors import ImpossibleError, UsageError
from sparse_onnx.optimize.quality import Budget, Feeds, Judge, Measured
from sparse_onnx.optimize.thresholds import _safely


def judge(metric: str, outputs: dict[int, list[np.ndarray]], feeds: list[Feeds] | None = None) -> Judge:
    """A model that gives `outputs[level][run]`; which run it is, its input says."""
    runs = feeds if feeds is not None else [{"n": np.array(at)} for at in range(len(outputs[0]))]
    order = {id(each["n"] if "n" in each else each["input_ids"]): at for at, each in enumerate(runs)}

    def run(fed: Feeds, level: int) -> list[np.ndarray]:
        return [outputs[level][order[id(fed["n"] if "n" in fed else fed["input_ids"])]]]

    return Judge(metric, run, ["y"], runs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("perplexity<=2%", Budget("perplexity", True, 0.02, True)),
        ("perplexity <= +0.5%", Budget("perplexity", True, 0.005, True)),
        ("perplexity<=20.5", Budget("perplexity", True, 20.5)),
        ("top1>=95%", Budget("top1", False, 0.95)),
        ("cosine>=0.99", Budget("cosine", False, 0.99)),
        ("a/b.py:score<=1e-3", Budget("a/b.py:score", True, 0.001)),
        ("package.module:f>=-2", Budget("package.module:f", False, -2.0)),
    ],
)
def test_budgets(text: str, expected: Budget) -> None:
    assert Budget.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "top1", "top1>0.9", "top1>=", "<=3", "top1>=x", "top1>=0.9.1", "bleu>=1", "top1>=2"]
)
def test_no_budgets(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Budget.parse(text)
    assert "\n" not in str(caught.value)


def test_met() -> None:
    assert Budget.parse("perplexity<=2%").met(10.2, 10.0) and not Budget.parse("perplexity<=2%").met(
        10.21, 10.0
    )
    assert Budget.parse("top1>=0.9").met(0.9, 1.0) and not Budget.parse("top1>=0.9").met(0.899, 1.0)


def test_a_budget_is_searched_with_a_standard_error_to_spare() -> None:
    budget = Budget.parse("top1>=0.9")
    assert _safely(budget, Measured(0.92, 1, 0.01, 10)) and not _safely(budget, Measured(0.905, 1, 0.01, 10))
    assert _safely(budget, Measured(0.9, 1, None, 10))
    assert not _safely(Budget.parse("perplexity<=1%"), Measured(10.09, 10, 0.02, 10))


def test_perplexity_is_exp_of_the_mean_surprise() -> None:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 11, (2, 7)), rng.integers(0, 11, (1, 4))]
    logits = {
        level: [rng.standard_normal((*each.shape, 11)).astype(np.float32) for each in ids] for level in (0, 5)
    }
    mask = np.ones((2, 7), np.int64)
    mask[1, :3] = 0
    feeds = [{"input_ids": ids[0], "attention_mask": mask}, {"input_ids": ids[1]}]

    def expected(level: int) -> float:
        surprise = []
        for run, each in enumerate(ids):
            for row in range(len(each)):
                for at in range(1, each.shape[1]):
                    if run == 0 and not (mask[row, at] and mask[row, at - 1]):
                        continue
                    p = np.exp(logits[level][run][row, at - 1].astype(np.float64))
                    surprise.append(-math.log(p[each[row, at]] / p.sum()))
        assert len(surprise) == 6 + 3 + 3
        return math.exp(np.mean(surprise))

    found = judge("perplexity", logits, feeds)(5)
    assert found.value == pytest.approx(expected(5), rel=1e-6) and found.dense == pytest.approx(
        expected(0), rel=1e-6
    )
    assert found.tokens == 12 and found.error is not None and found.error > 0


def test_top1_and_cosine() -> None:
    dense = [np.array([[1, 2, 3], [3, 2, 1]], np.float32), np.array([[0, 1, 0]], np.float32)]
    sparse = [np.array([[1, 3, 2], [6, 4, 2]], np.float32), np.array([[0, 2, 0]], np.float32)]
    assert judge("top1", {0: dense, 9: sparse})(9).value == pytest.approx(2 / 3)
    cosine = judge("cosine", {0: dense, 9: sparse})(9)
    first = (1 * 1 + 2 * 3 + 3 * 2) / 14
    assert cosine.value == pytest.approx((first + 1 + 1) / 3) and cosine.dense == 1 and cosine.tokens == 3
    assert judge("cosine", {0: dense, 9: sparse})(0).value == pytest.approx(1)


def test_rows_of_zeros_are_alike_only_if_both_are() -> None:
    zero, one = np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32)
    assert judge("cosine", {0: [zero], 1: [zero]})(1).value == 1
    assert judge("cosine", {0: [zero], 1: [one]})(1).value == 0


def test_what_has_no_such_metric() -> None:
    ids: list[Feeds] = [{"input_ids": np.zeros((1, 4), np.int64)}]
    with pytest.raises(ImpossibleError, match="needs logits"):
        judge("perplexity", {0: [np.zeros((1, 8), np.float32)]}, ids)(0)
    with pytest.raises(ImpossibleError, match="input_ids"):
        judge("perplexity", {0: [np.zeros((1, 4, 8), np.float32)]})(0)
    with pytest.raises(ImpossibleError, match="needs rows of numbers"):
        judge("cosine", {0: [np.zeros((1, 4), np.int64)]})(0)
    with pytest.raises(ImpossibleError, match="not finite"):
        judge("cosine", {0: [np.full((1, 4), np.nan, np.float32)]})(0)
    with pytest.raises(UsageError, match="nothing to measure"):
        Judge("cosine", lambda feeds, level: [], ["y"], [])


def test_the_standard_error_is_that_of_the_runs() -> None:
    rng = np.random.default_rng(1)
    dense = [rng.standard_normal((50, 4)).astype(np.float32) for _ in range(30)]
    sparse = [each.copy() for each in dense]
    shares = []
    for each in sparse:
        wrong = int(rng.integers(0, 20))
        each[:wrong] = -each[:wrong]
        shares.append(1 - wrong / 50)
    found = judge("top1", {0: dense, 1: sparse})(1)
    assert found.value == pytest.approx(np.mean(shares), abs=1e-9)
    assert found.error == pytest.approx(np.std(shares, ddof=1) / math.sqrt(30), rel=1e-6)

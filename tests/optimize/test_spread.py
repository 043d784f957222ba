"""Tokens are drawn as the thresholds of a plan know them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from builders import Shape, layered_model
from dense_layers import plan_for

from sparse_onnx.blocks import neutral_blocks
from sparse_onnx.optimize.runner import Planned, plan
from sparse_onnx.optimize.spread import Spread, spread
from sparse_onnx.passes.insert_thresholds import InsertThresholds
from sparse_onnx.sparsify.plan import Plan, SitePlan


def site(table: list[float], sparsity: list[float]) -> SitePlan:
    return SitePlan("s", np.linspace(-1, 1, 8, dtype=np.float32), np.array(table), np.array(sparsity))


@pytest.mark.parametrize("size", [1e-3, 1, 50])
def test_each_level_skips_its_share(size: float) -> None:
    share = np.arange(101) * 0.009
    plan = site([-1, *size * share[1:] ** 2], list(share))
    distance = np.abs(Spread.of(plan).draw(np.random.default_rng(0), (4000, 8)) - plan.centre)
    for level in (10, 50, 95):
        assert np.mean(distance <= plan.table[level]) == pytest.approx(share[level], abs=0.01)


def test_exact_zeros_alone() -> None:
    plan = dataclasses.replace(site([-1] + [0] * 100, [0] + [0.6] * 100), centre=np.zeros(1, np.float32))
    x = Spread.of(plan).draw(np.random.default_rng(0), (4000, 8))
    assert np.mean(x == 0) == pytest.approx(0.6, abs=0.01) and x.min() < 0 < x.max()


def test_whose_inputs_they_are() -> None:
    def of(change=lambda made: made, top_k: bool = False) -> Spread | None:
        model = layered_model(Shape(separate=True), layers=1)
        made: Plan = change(plan_for(model, "native", top_k=top_k, least=0.2))
        planned = [
            dataclasses.replace(item, run=InsertThresholds(made)) if named(item) else item
            for item in plan(["grouped"], {"insert_thresholds": {}})
        ]
        InsertThresholds(made)(model)
        return spread(neutral_blocks(model)[0], planned)

    def named(item: Planned) -> bool:
        return item.step.name == "insert_thresholds"

    def without_up(made: Plan) -> Plan:
        few = {
            name: dataclasses.replace(each, sparsity=each.sparsity * 0.1) if name.endswith("up") else each
            for name, each in made.sites.items()
        }
        return dataclasses.replace(made, sites=few)

    whole = of()
    down = of(without_up)
    assert whole is not None and down is not None and np.array_equal(whole.bounds, down.bounds)
    assert of(top_k=True) is None, "of any size as many are kept"
    assert of(lambda made: dataclasses.replace(made, sites={})) is None
    assert spread(neutral_blocks(layered_model(Shape()))[0], plan(["grouped"])) is None

"""Plans out of calibrations: centres, thresholds, levels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sparse_onnx.core.calibration import (
    CENTRES,
    SPARSITIES,
    BlockRecord,
    Calibration,
    DataRecord,
    GatedRecord,
    SiteRecord,
)
from sparse_onnx.core.errors import ImpossibleError, UsageError
from sparse_onnx.sparsify.calibrated import Costs, make_plan, skipped
from sparse_onnx.sparsify.plan import Plan

STEPS = np.array(SPARSITIES)


def site(name: str, nbytes: int = 1000, zeros: float = 0.0, **scales: float) -> SiteRecord:
    """Errors grow as the square of the sparsity, by `scales` a centre; quantiles are those of a half normal."""
    quantiles = tuple(np.maximum(0, np.linspace(0, 3, 101) - 3 * zeros).tolist())
    errors = {centre: tuple((scales.get(centre, 1.0) * STEPS**2).tolist()) for centre in CENTRES}
    return SiteRecord(
        name, (name,), name, 8, (4,), nbytes, 100, zeros, 0.1, 0.2, 0.3, tuple(np.arange(8.0)),
        dict.fromkeys(CENTRES, quantiles), errors,
    )  # fmt: skip


def document(*sites: SiteRecord, blocks: tuple[BlockRecord, ...] = ()) -> Calibration:
    return Calibration("m.onnx", "00", DataRecord(("d",), 1, 1, 1), sites, blocks)


def test_the_first_row_skips_nothing_and_thresholds_never_fall() -> None:
    plan = make_plan(document(site("a"), site("b", 5000)), sparsity=0.4)
    assert isinstance(plan, Plan) and plan.mode == "native" and plan.least == 0.1
    for each in plan.sites.values():
        assert (
            each.table[0] == -1 and (np.diff(each.table) >= 0).all() and (np.diff(each.sparsity) >= 0).all()
        )
        at = plan.level
        assert each.table[at] == pytest.approx(
            np.interp(each.sparsity[at], np.linspace(0, 1, 101), np.linspace(0, 3, 101))
        )


def test_a_level_skips_at_least_what_was_asked_for() -> None:
    calibration = document(site("a"), site("b", 5000, zero=0.1, median=0.1, mode=0.1, channel_median=0.1))
    for sparsity in (0.1, 0.25, 0.5, 0.9):
        plan = make_plan(calibration, sparsity=sparsity)
        shares = skipped(Costs.of(calibration), dict(plan.sites), plan.least)
        assert shares[plan.level] >= sparsity - 1e-9 and (
            plan.level == 0 or shares[plan.level - 1] < sparsity
        )


def test_each_site_gets_the_centre_of_the_least_error_and_zero_where_it_is_as_good() -> None:
    sites = [
        site("median", median=0.5),
        site("mode", mode=0.4),
        site("each", channel_median=0.3),
        site("zero"),
    ]
    plan = make_plan(document(*sites), sparsity=0.5)
    assert {name: each.centring for name, each in plan.sites.items()} == {
        "median": "median", "mode": "mode", "each": "channel_median", "zero": "zero",
    }  # fmt: skip
    assert plan.sites["median"].centre == pytest.approx([0.2]) and plan.sites["zero"].centre == pytest.approx(
        [0.0]
    )
    assert plan.sites["each"].centre == pytest.approx(np.arange(8))
    for method in ("teal", "topk"):
        plan = make_plan(document(*sites), sparsity=0.5, method=method)
        assert all(not each.centre.any() for each in plan.sites.values())


def test_a_centre_that_is_better_only_elsewhere_is_not_taken() -> None:
    """The median wins below 40 % and ruins the layer above: at 60 % it is not taken."""
    crossing = tuple(float(s**2 * (0.5 if s < 0.4 else 4)) for s in STEPS)
    record = site("a")
    record = dataclasses.replace(record, errors={**record.errors, "median": crossing})
    assert make_plan(document(record), sparsity=0.6).sites["a"].centring == "zero"
    assert make_plan(document(record), sparsity=0.2).sites["a"].centring == "median"


def test_natural_zeros_cost_nothing_and_are_counted() -> None:
    free = tuple(np.maximum(0, STEPS - 0.6).tolist())
    relu = dataclasses.replace(site("relu", zeros=0.6), errors=dict.fromkeys(CENTRES, free))
    plan = make_plan(document(relu, site("other")), sparsity=0.3, method="teal", allocation="greedy")
    at = plan.level
    assert plan.sites["relu"].table[at] == 0 and plan.sites["relu"].sparsity[at] == pytest.approx(0.6)
    assert plan.sites["other"].table[at] == -1
    exact = make_plan(document(relu, site("other")), method="relu")
    assert set(exact.sites["relu"].table[1:]) == {0.0} and exact.sites["relu"].table[0] == -1
    assert (
        exact.sites["relu"].sparsity[exact.level] == 0.6 and exact.sites["other"].sparsity[exact.level] == 0
    )
    with pytest.raises(ImpossibleError, match="exact zeros"):
        make_plan(document(site("other")), method="relu")


def test_top_k_counts_inputs() -> None:
    plan = make_plan(document(site("a")), sparsity=0.5, method="topk")
    table = plan.sites["a"].table
    assert plan.top_k and table[0] == 8 and table[plan.level] == 4 and table.min() >= 1
    assert plan.sites["a"].sparsity[plan.level] == 0.5


def test_experts_count_what_one_token_reads() -> None:
    block = BlockRecord("moe", 8, 2, 10, (0,) * 8, 0, (), None, (0.0,) * 101, ("moe.up",))
    costs = Costs.of(document(site("a", 1000), site("moe.up", 8000), blocks=(block,)))
    assert costs.reads == (1000.0, 2000.0)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -1.0, float("nan"), float("inf")])
def test_no_sparsity(sparsity: float) -> None:
    with pytest.raises(UsageError, match="no share between"):
        make_plan(document(site("a")), sparsity=sparsity)


def test_more_than_there_is() -> None:
    with pytest.raises(ImpossibleError, match="97% of the weights cannot be skipped, 95% at most"):
        make_plan(document(site("a")), sparsity=0.97)
    with pytest.raises(ImpossibleError, match="no layer"):
        make_plan(document(), sparsity=0.3)


def gate(name: str, nbytes: int, block: str = "", zeros: float = 0.0) -> GatedRecord:
    quantiles = tuple(np.maximum(0, np.linspace(0, 3, 101) - 3 * zeros).tolist())
    errors = tuple((STEPS**2).tolist())
    return GatedRecord(
        name, block, ("g", "u", "d"), "a", 8, nbytes, 100, zeros, {"zero": quantiles}, {"zero": errors}
    )


def test_gates_decide_over_up_and_down_and_shares_are_of_all_layers() -> None:
    block = BlockRecord(
        "moe", 4, 2, 10, (5, 5, 5, 5), 0, (), None, tuple([0.0] * 101), ("moe.up", "moe.down")
    )
    sites = (site("gate+up", 2000), site("down", 1000), site("moe.up", 8000), site("moe.down", 4000))
    calibration = dataclasses.replace(
        document(*sites, blocks=(block,)), gated=(gate("mlp", 2000), gate("moe.gated", 8000, "moe"))
    )
    costs = Costs.of(calibration, "cats")
    assert costs.reads == (2000, 4000) and costs.total == 3000 + 6000, "a token goes to half of the experts"
    for sparsity in (0.2, 0.5):
        plan = make_plan(calibration, sparsity=sparsity, method="cats", allocation="uniform")
        assert plan.gated and set(plan.sites) == {"mlp", "moe.gated"}
        own = skipped(costs, dict(plan.sites), plan.least)[plan.level]
        assert sparsity <= own < sparsity + 0.01
        for each in plan.sites.values():
            assert each.table[0] == -1 and (np.diff(each.table) >= 0).all() and each.centring == "zero"
            assert each.sparsity[plan.level] == pytest.approx(sparsity * 9000 / 6000, abs=0.01)
    with pytest.raises(ImpossibleError, match="63% at most"):
        make_plan(calibration, sparsity=0.8, method="cats")
    with pytest.raises(ImpossibleError, match="no gated layer"):
        make_plan(document(*sites), sparsity=0.2, method="cats")
    assert not make_plan(calibration, sparsity=0.2).gated


def test_gates_that_are_zero_by_themselves_count() -> None:
    calibration = dataclasses.replace(document(site("s", 3000)), gated=(gate("mlp", 2000, zeros=0.6),))
    plan = make_plan(calibration, sparsity=0.1, method="cats")
    assert plan.sites["mlp"].sparsity[plan.level] == 0.6 and plan.sites["mlp"].table[plan.level] == 0


def test_blocks_skip_alike_unless_all_layers_are_compared() -> None:
    """Two blocks of two layers, told by their sizes; the second is ten times as sensitive."""
    sizes = {"q": 1000, "d": 3000}
    every = [
        site(f"{name}{at}", size, zero=factor)
        for at, factor in ((0, 1.0), (1, 10.0))
        for name, size in sizes.items()
    ]
    calibration = document(*every)
    for allocation, alike in (("blocks", True), ("greedy", False)):
        plan = make_plan(calibration, sparsity=0.4, method="teal", allocation=allocation)  # type: ignore[arg-type]
        skipped = [
            sum(size * plan.sites[f"{name}{at}"].sparsity[plan.level] for name, size in sizes.items())
            for at in (0, 1)
        ]
        assert bool(skipped[0] == pytest.approx(skipped[1], rel=0.02)) is alike
    assert make_plan(calibration, sparsity=0.4).sites["q0"].sparsity == pytest.approx(
        make_plan(calibration, sparsity=0.4, allocation="blocks").sites["q0"].sparsity
    )

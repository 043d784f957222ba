"""One thing changed: refused with the true reason, left as it was. And changes that change nothing: exact."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from changes import NearMiss, inputs
from checking import differences, optimized
from family import tokens
from near_misses import NEAR_MISSES, SAME
from near_squares import MORE_NEAR_MISSES, SAME_SQUARES
from spellings import Built, build, error, session

MISSES, EXACT = [*NEAR_MISSES, *MORE_NEAR_MISSES], [*SAME, *SAME_SQUARES]


def fed(built: Built) -> dict[str, dict[str, np.ndarray]]:
    """Token counts from one on, one expert for all, exact ties."""
    extra = inputs(built)
    made = {f"{n} tokens": tokens(built.case, built.weights, n, seed=n) for n in (1, 2, 7, 33)}
    made["one expert"] = tokens(built.case, built.weights, 9, seed=5, same=True)
    made["ties"] = np.zeros((6, built.case.hidden), np.float32)
    return {name: {"x": x} | extra for name, x in made.items()}


def test_there_are_enough() -> None:
    names = [miss.name for miss in MISSES + EXACT]
    assert len(MISSES) >= 30 and len(set(names)) == len(names)


@pytest.mark.parametrize("miss", MISSES, ids=lambda miss: miss.name)
def test_the_change_is_one(miss: NearMiss) -> None:
    """The model runs, and its numbers are not the block's, unless it is told that they are."""
    changed, block = miss.build(), build(miss.case)
    old, new = session(block.model), session(changed.model)
    worst = 0.0
    for feeds in fed(changed).values():
        y = new.run(["y"], feeds)[0]
        assert np.isfinite(y).all()
        worst = max(worst, error(old.run(["y"], {"x": feeds["x"]})[0], y))
    assert miss.differs is None or (worst > 1e-3) == miss.differs, worst


@pytest.mark.parametrize("miss", MISSES, ids=lambda miss: miss.name)
def test_refused(miss: NearMiss, tmp_path: Path) -> None:
    built = miss.build()
    out, report = optimized(built.model, tmp_path)
    for name, value in differences(built.model, str(out), fed(built)).items():
        assert value == 0, (name, value)
    assert not report.blocks
    assert not any(record.rewritten for record in report.passes if record.name.startswith("recognise_"))
    if miss.says is not None:
        reasons = [refusal.reason for refusal in report.refusals]
        assert reasons, "silence"
        assert any(re.search(miss.says, reason) for reason in reasons), reasons
        assert all(refusal.node and refusal.by for refusal in report.refusals)


@pytest.mark.parametrize("miss", EXACT, ids=lambda miss: miss.name)
def test_still_exact(miss: NearMiss, tmp_path: Path) -> None:
    """Whether a block is found here is the recogniser's choice; that it is right, or refused, is not."""
    built = miss.build()
    out, report = optimized(built.model, tmp_path)
    for name, value in differences(built.model, str(out), fed(built)).items():
        assert value <= 1e-5, (name, value)
    assert report.blocks or report.refusals, "silence"

"""The controller that the documentation shows, on a model whose load it can ease."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from dense_layers import Net, dense_model, plan_for, prepared, rows

from sparse_onnx.passes.insert_thresholds import InsertThresholds
from sparse_onnx.targets import session as sessions

DOCUMENT = Path(__file__).parents[2] / "docs" / "activation-sparsity.md"


def shown() -> dict[str, Any]:
    """What the document's controller defines."""
    [code] = [
        block
        for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
        if "class Dial" in block
    ]
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_it_raises_the_level_under_load_and_goes_back() -> None:
    dial, level, levels, times = shown()["Dial"](target=1.0, highest=60), 0, [], []
    for request in range(120):
        load = 1.4 if 20 <= request < 70 else 0.8  # what a request takes where nothing is skipped
        seconds = load * (1 - 0.9 * level / 100)
        level = dial.level(seconds)
        levels.append(level)
        times.append(seconds)
    assert set(levels[:20]) == {0}
    assert 28 <= levels[69] <= 36 and times[69] < 1.03, "just what brings 1.4 down to 1"
    assert set(levels[-20:]) == {0}


def test_it_stops_at_the_highest_level_and_comes_down_at_once() -> None:
    dial = shown()["Dial"](target=1.0, highest=30)
    assert [dial.level(5.0) for _ in range(50)][-1] == 30
    down = [dial.level(0.5) for _ in range(12)]
    assert down[0] < 30 and down[-1] == 0, "it did not wind up"


def test_it_runs_a_model() -> None:
    names = shown()
    model = prepared(ir.from_proto(dense_model()))
    InsertThresholds(plan_for(model, "native"))(model)
    session = sessions.create_session(model, threads=1)
    requests = [rows(Net(), 3, seed) for seed in range(4)]
    results = list(names["serve"](session, requests, names["Dial"](target=1e-9, highest=70)))
    dense = session.run(None, requests[0] | {"sparsity_level": np.array(0)})
    busy = session.run(None, requests[3] | {"sparsity_level": np.array(70)})
    assert np.array_equal(results[0][0], dense[0]) and np.array_equal(results[3][0], busy[0])

from __future__ import annotations

import json
import math

from sparse_onnx.core.report import Refusal, Report, VerifyRecord


def test_json_is_plain_and_finite() -> None:
    report = Report("verify", verify=VerifyRecord("whole", False, 1, math.inf, math.nan, ["1x1"]))
    report.refusals.append(Refusal("why", "node", "next", "a_pass"))
    data = json.loads(report.dumps())
    assert data["schema"] == 1 and data["command"] == "verify"
    assert data["verify"]["max_abs_error"] is None and data["verify"]["max_rel_error"] is None
    assert data["refusals"] == [{"pass": "a_pass", "reason": "why", "node": "node", "hint": "next"}]
    assert set(data["tool"]) == {"sparse_onnx", "onnxruntime"}

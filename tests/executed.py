"""Which operators ONNX Runtime really ran, by its own profile; those in bodies of If and Loop included."""

from __future__ import annotations

import collections
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime


def executed(model: ir.Model, feeds: dict[str, np.ndarray]) -> collections.Counter[str]:
    """How often each operator ran in one run, without ORT's optimizations."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    ran = (event for event in events if event.get("cat") == "Node" and event["name"].endswith("kernel_time"))
    return collections.Counter(event["args"]["op_name"] for event in ran)

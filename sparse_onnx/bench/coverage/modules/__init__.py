"""Modules as people write them: tutorials, reference code, papers' repositories.

Each case gives `(module, inputs, dynamic axes)`, in eval mode and with random weights.
"""

from sparse_onnx.bench.coverage.modules import (
    capacity,
    dense,
    depth,
    dispatch,
    loops,
    papers,
    python,
    routers,
    rows,
)
from sparse_onnx.bench.coverage.modules.common import Build, Case

MODULES: dict[str, Build] = {
    **loops.MODULES,
    **dispatch.MODULES,
    **dense.MODULES,
    **capacity.MODULES,
    **depth.MODULES,
    **routers.MODULES,
    **rows.MODULES,
    **papers.MODULES,
    **python.MODULES,
}

__all__ = ["MODULES", "Build", "Case"]

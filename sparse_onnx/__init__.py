"""Sparsely activated models on ONNX Runtime: export them whole, and run only what is active.

    import sparse_onnx

    report = sparse_onnx.export("path/to/hf-model", "model.onnx")
    report = sparse_onnx.optimize("model.onnx", "model.cpu.onnx", target="cpu")
    report = sparse_onnx.verify("model.onnx", "model.cpu.onnx")

Each function returns the `Report` that the command line prints, `calibrate` a `Calibration`. Nothing heavy is imported
before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "bench",
    "calibrate",
    "diff",
    "export",
    "inspect",
    "optimize",
    "package",
    "register_kernels",
    "verify",
]

if TYPE_CHECKING:
    from sparse_onnx.bench.api import bench
    from sparse_onnx.calibrate.api import calibrate
    from sparse_onnx.export.api import export
    from sparse_onnx.inspect.api import diff, inspect
    from sparse_onnx.kernels import register_kernels
    from sparse_onnx.optimize.api import optimize
    from sparse_onnx.package.api import package
    from sparse_onnx.verify.api import verify


def __getattr__(name: str) -> Any:
    if name == "diff":
        return importlib.import_module("sparse_onnx.inspect.api").diff
    if name == "register_kernels":
        return importlib.import_module("sparse_onnx.kernels").register_kernels
    if name in __all__:
        return importlib.import_module(f"sparse_onnx.{name}")
    raise AttributeError(f"module 'sparse_onnx' has no attribute '{name}'")

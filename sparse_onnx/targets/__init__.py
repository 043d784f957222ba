"""Execution providers as data: what each one runs, and which form of a sparse block it runs best."""

from sparse_onnx.targets.profile import TargetProfile, get, names

__all__ = ["TargetProfile", "get", "names"]

"""Modules that exist only while a model is traced.

An adapter gives for a mixture-of-experts module another one that computes the same from the same weights, but calls
`PackedExperts`, which the export turns into one block. See docs/adapters.md.
"""

from sparse_onnx.export.adapters.apply import Adapted, Adapter, Named, Replaced, adapt
from sparse_onnx.export.adapters.packed import PackedExperts

__all__ = ["Adapted", "Adapter", "Named", "PackedExperts", "Replaced", "adapt"]

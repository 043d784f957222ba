"""Decoders with their key/value cache among inputs and outputs: `export(past=True)`."""

from sparse_onnx.export.past.cross import ENCODER, CrossSource
from sparse_onnx.export.past.genai import write_config
from sparse_onnx.export.past.generation import check_generation
from sparse_onnx.export.past.source import PastSource, with_past
from sparse_onnx.export.past.tracing import trace_with_past

__all__ = [
    "ENCODER",
    "CrossSource",
    "PastSource",
    "check_generation",
    "trace_with_past",
    "with_past",
    "write_config",
]

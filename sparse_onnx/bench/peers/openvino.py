"""OpenVINO on ONNX files, and on the same graph with weights compressed by NNCF. Needs the package openvino.

Settings: float32 arithmetic (`INFERENCE_PRECISION_HINT`; elsewhere it may take bfloat16), one stream, the latency hint.
All else is OpenVINO's default.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_onnx.bench.contestants import SETTLE_S, Feeds
from sparse_onnx.bench.measure import Contestant
from sparse_onnx.bench.peers.base import environment, require

#: Blocks of compressed 4-bit weights, as in the other peers; NNCF's own default is 128.
_GROUP = 32


class OpenVino:
    """One compiled model.

    Args:
        name: of the contestants.
        path: of an .onnx file of one input and one output.
        threads: that it computes on.
        bits: None for float32 weights; 8 takes NNCF's default, per channel with zero points; 4 is symmetric, in
            blocks of 32. The routers stay float32.
        router: ``(hidden, experts)``, by which the routers' products are known.

    Raises:
        ImpossibleError: a package is not installed, or NNCF finds no weights to compress.
    """

    def __init__(
        self, name: str, path: Path, threads: int, bits: int | None = None, router: tuple[int, int] = (0, 0)
    ) -> None:
        installed(bits)
        import openvino

        core = openvino.Core()
        model = core.read_model(path)
        if bits is not None:
            model = compress(model, bits, router)
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._name = name
        self._request: Any = core.compile_model(model, "CPU", options).create_infer_request()

    def on(self, feeds: Sequence[Feeds]) -> Contestant:
        import openvino

        # Tensors on the feeds' memory: the request's own conversion of arrays takes tens of microseconds a run.
        arrays = [np.ascontiguousarray(next(iter(feed.values()))) for feed in feeds]
        tensors = [openvino.Tensor(array, shared_memory=True) for array in arrays]
        request = self._request

        def run(index: int) -> np.ndarray:
            request.set_input_tensor(0, tensors[index])
            request.infer()
            return request.get_output_tensor(0).data.copy()

        return Contestant(self._name, run, SETTLE_S)

    def close(self) -> None:
        self._request = None
        gc.collect()


def installed(bits: int | None) -> None:
    """Asked before a graph is written for it.

    Raises:
        ImpossibleError: OpenVINO is not installed, or for `bits` NNCF is not.
    """
    require("openvino", "openvino")
    if bits is not None:
        require("nncf", "nncf")


def compress(model: Any, bits: int, router: tuple[int, int]) -> Any:
    """The model with weights of `bits` bits, except in products with a matrix of the sizes `router`.

    Raises:
        ImpossibleError: no weight became smaller.
    """
    environment(NNCF_CI="1")  # NNCF reports its use over the network elsewhere
    import nncf

    from sparse_onnx.core.errors import ImpossibleError
    from sparse_onnx.export.translate import quiet

    products = (op for op in model.get_ordered_ops() if op.get_type_name() == "MatMul")
    ignored = nncf.IgnoredScope(
        names=[op.get_friendly_name() for op in products if _sizes(op) == sorted(router)]
    )
    modes = nncf.CompressWeightsMode
    with quiet():
        if bits == 8:
            model = nncf.compress_weights(model, mode=modes.INT8_ASYM, ignored_scope=ignored)
        else:
            model = nncf.compress_weights(
                model,
                mode=modes.INT4_SYM,
                group_size=_GROUP,
                ratio=1.0,
                all_layers=True,
                ignored_scope=ignored,
            )
    if not any(_is_compressed(op, bits) for op in model.get_ops()):
        raise ImpossibleError("NNCF found no weights to compress in this graph")
    return model


def _is_compressed(op: Any, bits: int) -> bool:
    return (
        op.get_type_name() == "Constant"
        and op.get_element_type().bitwidth == bits
        and len(op.get_shape()) > 1
    )


def _sizes(product: Any) -> list[int]:
    shape = product.input_value(1).get_partial_shape()
    return sorted(shape.to_shape()) if shape.is_static else []

"""ggml's `mul_mat_id`, in the graph that llama.cpp builds for such a block (`build_moe_ffn`): router, soft_max,
argsort_top_k, normalised weights, gate, up, swiglu, down, weighted sum, and the residual.

Float32 weights are used where they lie. Quantized ones are made by ggml's quantizers without an importance matrix, all
experts in the one type, and laid out as ggml's kernels for this processor want them where there are such kernels.
Needs llama-cpp-python; importing this needs torch.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from sparse_onnx.bench.contestants import SETTLE_S, Feeds
from sparse_onnx.bench.measure import Contestant
from sparse_onnx.bench.peers import ggml_library as ggml
from sparse_onnx.bench.peers.base import Setting
from sparse_onnx.core.errors import ImpossibleError, OutsideError

#: Smallest sum of a token's weights: llama.cpp clamps it so.
_LEAST_SUM = 6.103515625e-5
#: What llama.cpp takes where rows are not whole blocks of a type.
_INSTEAD = {ggml.Q4_K: ggml.Q5_0}


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Tensors of one layer: router ``[E, D]``, gate and up ``[E, I, D]``, down ``[E, D, I]``, by their addresses."""

    router: int
    gate: int
    up: int
    down: int


class Ggml:
    """The layers in ggml.

    Args:
        name: of the contestants.
        setting: see there.
        kind: ggml's type of the experts' weights, a number of `ggml_library`.

    Raises:
        ImpossibleError: no ggml here, or sizes that are not whole blocks of the type.
    """

    def __init__(self, name: str, setting: Setting, kind: int) -> None:
        self._name, self._kind, self._threads = name, kind, setting.threads
        self._top_k = setting.layers.top_k
        self._lib = ggml.library()
        self._contexts: list[Any] = []
        self._buffers: list[Any] = []
        self._kept: list[Tensor] = []
        self._graph: _Graph | None = None
        self._backend = self._lib.backend_cpu_init()
        self._lib.backend_cpu_set_n_threads(self._backend, setting.threads)
        try:
            self._layers = [self._layer(block) for block in setting.layers.parts]
        except BaseException:
            self.close()
            raise

    def on(self, feeds: Sequence[Feeds]) -> Contestant:
        arrays = [np.ascontiguousarray(feed["hidden_states"]) for feed in feeds]
        if self._graph is not None:
            self._graph.close()
        graph = self._graph = _Graph(self._lib, self._backend, self._layers, self._top_k, arrays[0].shape)
        return Contestant(self._name, lambda index: graph.run(arrays[index]), SETTLE_S)

    def close(self) -> None:
        if self._graph is not None:
            self._graph.close()
        for buffer in self._buffers:
            self._lib.backend_buffer_free(buffer)
        for context in self._contexts:
            self._lib.free(context)
        if self._backend:
            self._lib.backend_free(self._backend)
        self._graph, self._buffers, self._contexts, self._backend, self._kept = None, [], [], None, []
        gc.collect()

    def _layer(self, block: Any) -> _Layer:
        packed, down = block.experts.gate_up_proj.detach(), block.experts.down_proj.detach()
        router = self._in_place(block.gate.weight.detach()[None])
        if self._kind == ggml.F32:
            gate, up = self._halves(packed)
            return _Layer(router, gate, up, self._in_place(down))
        matrices = (*packed.chunk(2, dim=1), down)
        return _Layer(router, *(self._quantized(weights) for weights in matrices))

    def _in_place(self, weights: Tensor) -> int:
        """A tensor on torch's memory, ``[E, N, K]``."""
        lib, count = self._lib, weights.numel() * 4
        if not weights.is_contiguous():
            raise ImpossibleError("ggml reads weights in place, and these are not contiguous")
        self._kept.append(weights)
        buffer = lib.backend_cpu_buffer_from_ptr(weights.data_ptr(), count)
        self._buffers.append(buffer)
        tensor = lib.new_tensor_3d(self._context(1), ggml.F32, *reversed(weights.shape))
        lib.backend_tensor_alloc(buffer, tensor, weights.data_ptr())
        return int(tensor)

    def _halves(self, packed: Tensor) -> tuple[int, int]:
        """Gate and up of ``[E, 2I, D]``, as views."""
        lib, whole = self._lib, self._in_place(packed)
        experts, double, hidden = packed.shape
        context = self._context(2)
        row = hidden * 4
        views = []
        for half in range(2):
            offset = half * (double // 2) * row
            sizes = (hidden, double // 2, experts, row, double * row)
            views.append(int(lib.view_3d(context, whole, *sizes, offset)))
            lib.backend_view_init(views[-1])
        return views[0], views[1]

    def _quantized(self, weights: Tensor) -> int:
        """``[E, N, K]``, whose matrices are contiguous each, in the type."""
        lib = self._lib
        kind = (
            self._kind
            if weights.shape[2] % lib.blck_size(self._kind) == 0
            else _INSTEAD.get(self._kind, self._kind)
        )
        if weights.shape[2] % lib.blck_size(kind):
            raise ImpossibleError(f"rows of {weights.shape[2]} are not whole blocks of {lib.blck_size(kind)}")
        tensor = self._allocated(kind, weights.shape)
        data = quantize(lib, kind, weights, self._threads)
        assert data.nbytes == lib.nbytes(tensor)
        lib.backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)
        return tensor

    def _allocated(self, kind: int, shape: Sequence[int]) -> int:
        """A tensor in the first buffer type whose kernels take it as experts."""
        lib = self._lib
        for where in (*lib.repacked(self._backend), lib.backend_cpu_buffer_type()):
            context = lib.context(1)
            tensor = lib.new_tensor_3d(context, kind, *reversed(shape))
            buffer = lib.backend_alloc_ctx_tensors_from_buft(context, where)
            if buffer and self._takes(tensor, shape):
                self._contexts.append(context)
                self._buffers.append(buffer)
                return int(tensor)
            if buffer:
                lib.backend_buffer_free(buffer)
            lib.free(context)
        raise ImpossibleError("ggml cannot hold or multiply these weights")

    def _takes(self, tensor: int, shape: Sequence[int]) -> bool:
        lib = self._lib
        context = lib.context(3)
        rows = lib.new_tensor_3d(context, ggml.F32, shape[2], 1, 1)
        chosen = lib.new_tensor_2d(context, ggml.I32, min(self._top_k, shape[0]), 1)
        supported = lib.backend_supports_op(self._backend, lib.mul_mat_id(context, tensor, rows, chosen))
        lib.free(context)
        return bool(supported)

    def _context(self, tensors: int) -> Any:
        self._contexts.append(self._lib.context(tensors))
        return self._contexts[-1]


class _Graph:
    """All layers for one token count, with memory for what lies between."""

    def __init__(
        self, lib: Any, backend: Any, layers: Sequence[_Layer], top_k: int, shape: tuple[int, ...]
    ) -> None:
        self._lib, self._backend, self._shape = lib, backend, shape
        self._context = lib.context(1 + len(layers) * (24 + 2 * top_k), 1)
        self._graph = lib.new_graph(self._context)
        self._input = lib.new_tensor_2d(self._context, ggml.F32, *reversed(shape))
        lib.set_input(self._input)
        self._output = self._input
        for layer in layers:
            self._output = self._block(layer, top_k, self._output)
        lib.set_output(self._output)
        lib.build_forward_expand(self._graph, self._output)
        self._allocator = lib.gallocr_new(lib.backend_cpu_buffer_type())
        if not lib.gallocr_alloc_graph(self._allocator, self._graph):
            raise OutsideError("ggml cannot allocate its graph")

    def run(self, x: np.ndarray) -> np.ndarray:
        lib, result = self._lib, np.empty(self._shape, np.float32)
        lib.backend_tensor_set(self._input, x.ctypes.data, 0, x.nbytes)
        if lib.backend_graph_compute(self._backend, self._graph) != ggml.SUCCESS:
            raise OutsideError("ggml failed while running")
        lib.backend_tensor_get(self._output, result.ctypes.data, 0, result.nbytes)
        return result

    def close(self) -> None:
        self._lib.gallocr_free(self._allocator)
        self._lib.free(self._context)

    def _block(self, layer: _Layer, top_k: int, x: int) -> int:
        """Node for node what llama.cpp builds, and the residual. Sizes are ggml's: the innermost first."""
        lib, context, graph = self._lib, self._context, self._graph
        tokens, hidden = self._shape
        logits = lib.mul_mat(context, layer.router, x)
        scores = lib.soft_max(context, logits)
        chosen = lib.argsort_top_k(context, scores, top_k)
        experts = lib.nbytes(logits) // (4 * tokens)
        weights = lib.get_rows(context, lib.reshape_3d(context, scores, 1, experts, tokens), chosen)
        weights = lib.reshape_2d(context, weights, top_k, tokens)
        total = lib.clamp(context, lib.sum_rows(context, weights), _LEAST_SUM, float("inf"))
        weights = lib.reshape_3d(context, lib.div(context, weights, total), 1, top_k, tokens)
        lib.build_forward_expand(graph, weights)
        rows = lib.reshape_3d(context, x, hidden, 1, tokens)
        up = lib.mul_mat_id(context, layer.up, rows, chosen)
        gate = lib.mul_mat_id(context, layer.gate, rows, chosen)
        inner = lib.swiglu_split(context, gate, up)
        outputs = lib.mul(context, lib.mul_mat_id(context, layer.down, inner, chosen), weights)
        lib.build_forward_expand(graph, outputs)
        row = hidden * 4
        parts = [
            lib.view_2d(context, outputs, hidden, tokens, top_k * row, slot * row) for slot in range(top_k)
        ]
        mixed = parts[0] if top_k > 1 else lib.cont(context, parts[0])
        for part in parts[1:]:
            mixed = lib.add(context, mixed, part)
        return int(lib.add(context, mixed, x))


def quantize(lib: Any, kind: int, weights: Tensor, threads: int) -> np.ndarray:
    """Matrices ``[E, N, K]``, each contiguous, in ggml's blocks: bytes ``[E, N, size of a row]``."""
    experts, outputs, inputs = weights.shape
    data = np.empty((experts, outputs, lib.row_size(kind, inputs)), np.uint8)
    lib.quantize_init(kind)

    def one(number: int) -> None:
        matrix = weights[number].contiguous()
        lib.quantize_chunk(kind, matrix.data_ptr(), data[number].ctypes.data, 0, outputs, inputs, None)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(experts)))
    return data

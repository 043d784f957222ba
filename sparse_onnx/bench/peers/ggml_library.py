"""ggml's C functions by ctypes, from the shared libraries in the package llama-cpp-python (0.3.36: ggml 0.25.3).

Only functions are used, no layout of a structure of ggml's but `ggml_init_params`. ggml ends the process where an
assertion of its own fails: callers give it only what it takes.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

from sparse_onnx.bench.peers.base import require
from sparse_onnx.core.errors import ImpossibleError

#: ggml's numbers of its element types, which are those in GGUF files.
F32, Q4_0, Q5_0, Q8_0, Q4_K, I32 = 0, 2, 6, 8, 12, 26
#: Of `ggml_status`.
SUCCESS = 0

_P, _I, _I64, _Z, _F, _B = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_size_t,
    ctypes.c_float,
    ctypes.c_bool,
)


class InitParams(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = (("mem_size", _Z), ("mem_buffer", _P), ("no_alloc", _B))


#: `ggml_log_callback`.
_LOG = ctypes.CFUNCTYPE(None, _I, ctypes.c_char_p, _P)

#: Result and arguments of each function, as ggml.h, ggml-alloc.h, ggml-backend.h and ggml-cpu.h declare them.
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_log_set": (None, (_LOG, _P)),
    "ggml_init": (_P, (InitParams,)),
    "ggml_free": (None, (_P,)),
    "ggml_tensor_overhead": (_Z, ()),
    "ggml_graph_overhead": (_Z, ()),
    "ggml_nbytes": (_Z, (_P,)),
    "ggml_row_size": (_Z, (_I, _I64)),
    "ggml_blck_size": (_I64, (_I,)),
    "ggml_quantize_init": (None, (_I,)),
    "ggml_quantize_chunk": (_Z, (_I, _P, _P, _I64, _I64, _I64, _P)),
    "ggml_new_tensor_2d": (_P, (_P, _I, _I64, _I64)),
    "ggml_new_tensor_3d": (_P, (_P, _I, _I64, _I64, _I64)),
    "ggml_view_2d": (_P, (_P, _P, _I64, _I64, _Z, _Z)),
    "ggml_view_3d": (_P, (_P, _P, _I64, _I64, _I64, _Z, _Z, _Z)),
    "ggml_reshape_2d": (_P, (_P, _P, _I64, _I64)),
    "ggml_reshape_3d": (_P, (_P, _P, _I64, _I64, _I64)),
    "ggml_cont": (_P, (_P, _P)),
    "ggml_mul_mat": (_P, (_P, _P, _P)),
    "ggml_mul_mat_id": (_P, (_P, _P, _P, _P)),
    "ggml_soft_max": (_P, (_P, _P)),
    "ggml_argsort_top_k": (_P, (_P, _P, _I)),
    "ggml_get_rows": (_P, (_P, _P, _P)),
    "ggml_sum_rows": (_P, (_P, _P)),
    "ggml_clamp": (_P, (_P, _P, _F, _F)),
    "ggml_add": (_P, (_P, _P, _P)),
    "ggml_mul": (_P, (_P, _P, _P)),
    "ggml_div": (_P, (_P, _P, _P)),
    "ggml_swiglu_split": (_P, (_P, _P, _P)),
    "ggml_set_input": (None, (_P,)),
    "ggml_set_output": (None, (_P,)),
    "ggml_new_graph": (_P, (_P,)),
    "ggml_build_forward_expand": (None, (_P, _P)),
    "ggml_gallocr_new": (_P, (_P,)),
    "ggml_gallocr_free": (None, (_P,)),
    "ggml_gallocr_alloc_graph": (_B, (_P, _P)),
    "ggml_backend_cpu_init": (_P, ()),
    "ggml_backend_cpu_set_n_threads": (None, (_P, _I)),
    "ggml_backend_cpu_buffer_type": (_P, ()),
    "ggml_backend_cpu_buffer_from_ptr": (_P, (_P, _Z)),
    "ggml_backend_free": (None, (_P,)),
    "ggml_backend_get_device": (_P, (_P,)),
    "ggml_backend_dev_backend_reg": (_P, (_P,)),
    "ggml_backend_reg_get_proc_address": (_P, (_P, ctypes.c_char_p)),
    "ggml_backend_supports_op": (_B, (_P, _P)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, (_P, _P)),
    "ggml_backend_buffer_free": (None, (_P,)),
    "ggml_backend_tensor_alloc": (_I, (_P, _P, _P)),
    "ggml_backend_view_init": (_I, (_P,)),
    "ggml_backend_tensor_set": (None, (_P, _P, _Z, _Z)),
    "ggml_backend_tensor_get": (None, (_P, _P, _Z, _Z)),
    "ggml_backend_graph_compute": (_I, (_P, _P)),
}


class Library:
    """The functions as attributes, without their prefix: `library.mul_mat_id(...)`."""

    def __init__(self, folder: Path) -> None:
        handles = [ctypes.CDLL(str(_find(folder, name))) for name in ("ggml-base", "ggml-cpu")]
        for name, (result, arguments) in _FUNCTIONS.items():
            function = next((getattr(handle, name) for handle in handles if hasattr(handle, name)), None)
            if function is None:
                raise ImpossibleError(f"this ggml has no {name}", "0.25.3 has, of llama-cpp-python 0.3.36")
            function.restype, function.argtypes = result, list(arguments)
            setattr(self, name.removeprefix("ggml_"), function)
        self._quiet = _LOG(lambda level, text, data: None)  # ggml keeps its address
        self.log_set(self._quiet, None)

    def __getattr__(self, name: str) -> Any:
        """Only for what is not there: tells type checkers that any name may be."""
        raise AttributeError(name)

    def context(self, tensors: int, graphs: int = 0) -> Any:
        """A context for descriptions of so many tensors, and of graphs; their data lie elsewhere. Free it."""
        size = tensors * self.tensor_overhead() + graphs * self.graph_overhead()
        return self.init(InitParams(size, None, True))

    def repacked(self, backend: Any) -> list[Any]:
        """Buffer types in which this processor's kernels want weights, best first, as llama.cpp asks for them."""
        device = self.backend_get_device(backend)
        registry = self.backend_dev_backend_reg(device)
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return []
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(address)(device)
        found: list[Any] = []
        while listed and listed[len(found)]:
            found.append(listed[len(found)])
        return found


@functools.lru_cache(maxsize=1)
def library() -> Library:
    """Loaded once; the package's Python part is not imported.

    Raises:
        ImpossibleError: the package is not installed, or its ggml is another one.
    """
    require("llama_cpp", "llama-cpp-python")
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    return Library(Path(spec.origin).parent / "lib")


def _find(folder: Path, name: str) -> Path:
    for suffix in ("so", "dylib"):
        path = folder / f"lib{name}.{suffix}"
        if path.exists():
            return path
    raise ImpossibleError(f"no lib{name} in {folder}", "build llama-cpp-python with shared libraries")

"""ONNX Runtime sessions, with its failures as one line each."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from sparse_onnx.core.errors import ImpossibleError, ModelError, OutsideError, SparseOnnxError

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

#: Where a model that is given as bytes finds its external data.
_FOLDER_KEY = "session.model_external_initializers_file_folder_path"

#: ORT keeps which provider each node was given to.
RECORD_KEY = "session.record_ep_graph_assignment_info"

#: See `plans_memory_reuse`.
_MANY_NODES = 2000
_PLANS_FAST = (1, 32)

_PAGE_OUT = 21  # Linux's MADV_PAGEOUT, which Python 3.11 has no name for


def session_options(
    threads: int | None = None, entries: dict[str, str] | None = None
) -> onnxruntime.SessionOptions:
    """Quiet options with `threads` intra-op threads (None: ORT's default) and one inter-op thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    return options


def plans_memory_reuse(nodes: int, version: str) -> bool:
    """Whether ORT should plan which values of a graph share a buffer: `SessionOptions.enable_mem_reuse`.

    Up to ORT 1.31 the plan takes time quadratic in the nodes of a graph: a session of 12 layers of 128 experts (4,572
    nodes) takes 69 s to create with ORT 1.31.1, and 1.3 s without a plan. What it saves is next to nothing, since
    buffers go back to the arena behind their last reader anyway: 12 layers of 64 experts, hidden 1024, need the same
    at their peak without it, at 1 token and at 256.

    Args:
        nodes: of the main graph.
        version: of ORT.
    """
    numbers = tuple(int(part) for part in re.findall(r"[0-9]+", version)[:2])
    return nodes <= _MANY_NODES or numbers >= _PLANS_FAST


def create_session(
    model: str | os.PathLike[str] | ir.Model,
    *,
    threads: int | None = None,
    provider: str = "CPUExecutionProvider",
    entries: dict[str, str] | None = None,
    name: str = "",
    optimized_to: str | os.PathLike[str] | None = None,
    kernels: bool = False,
    record: bool = False,
) -> onnxruntime.InferenceSession:
    """A session for a file, or for a model in memory whose external weights all lie in one folder.

    Args:
        model: path of an .onnx file, or an ir.Model.
        threads: intra-op threads.
        provider: full name of an execution provider of this onnxruntime, or a place as in `places`.
        entries: session configuration entries.
        name: what to call a model in memory in messages.
        optimized_to: a file that ORT writes the model to as it runs it.
        kernels: run our native kernels, which must have been built. They hold copies of weights unless `entries` says
            that these are shared.
        record: which provider gets which node can be asked afterwards (`placement.placed`).

    Raises:
        ModelError: ORT cannot load the model.
        ImpossibleError: ORT loads it, but the provider has no kernel for one of its operators.
    """
    import onnxruntime

    from sparse_onnx.targets import places

    entries = dict(entries or {})
    if places.is_elsewhere(provider):
        try:
            return places.start(provider, model, entries, record=record)
        except places.Failed as error:
            raise _refused(error, name or (model if isinstance(model, str) else "")) from error
    if record:
        entries[RECORD_KEY] = "1"
    given: dict[str, str] = {}
    if provider != places.CPU:
        recommended = places.recommended(provider)
        entries, given = {**recommended[0], **entries}, dict(recommended[1])
    if isinstance(model, ir.Model):
        folder = external_folder(model)
        if folder is not None:
            entries[_FOLDER_KEY] = folder
        source: Any = ir.to_proto(model).SerializeToString()
    else:
        source = os.fspath(model)
        name = name or source
    options = session_options(threads, entries)
    if optimized_to is not None:
        options.optimized_model_filepath = os.fspath(optimized_to)
    version = onnxruntime.__version__
    if not plans_memory_reuse(_MANY_NODES + 1, version):  # or the nodes need not be counted
        options.enable_mem_reuse = plans_memory_reuse(_nodes(model), version)
    if kernels:
        from sparse_onnx.kernels.build import WEIGHTS_ENTRY, register_kernels

        register_kernels(options, hold_weights=entries.get(WEIGHTS_ENTRY) != "shared")
    try:
        return onnxruntime.InferenceSession(source, options, providers=[(provider, given)])
    except Exception as error:  # ORT's exceptions share no base class
        raise _refused(error, name) from error


def _refused(error: Exception, name: str) -> SparseOnnxError:
    message = first_line(error)
    if getattr(error, "kind", type(error).__name__) == "NotImplemented":
        return ImpossibleError(f"onnxruntime has no kernel: {message}", where=name)
    return ModelError(
        f"onnxruntime cannot load the model: {message}", "check it with onnx.checker", where=name
    )


def run(
    session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray], name: str = ""
) -> list[np.ndarray]:
    """Runs a session.

    Raises:
        OutsideError: the runtime failed.
    """
    try:
        return session.run(None, feeds)
    except Exception as error:
        raise OutsideError(f"onnxruntime failed while running: {first_line(error)}", where=name) from error


def release_memory(path: str | os.PathLike[str]) -> None:
    """Gives memory back to the system which this process holds without need behind the creation of a session.

    That is what ORT freed and the C library keeps, and the pages of data files beside the model, in or under its
    folder, which are read from there again when they are used. For models with prepacked weights: a session packs
    every weight once more, to see whether the file has what it needs, and ORT 1.32 compares all bytes with those of
    the file. Linux only (5.4 and newer for the pages); does nothing elsewhere.
    """
    folder = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    library = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # another C library than GNU's
        library.malloc_trim(0)
    with contextlib.suppress(AttributeError, OSError):
        advise = library.madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start, size in list(_mappings(folder)):
            advise(start, size, _PAGE_OUT)  # keeps what was written to, unlike MADV_DONTNEED


def _mappings(folder: str) -> Iterator[tuple[int, int]]:
    """First address and size of each mapping of a file in or under the folder into this process."""
    with open("/proc/self/maps") as file:
        for line in file:
            span, *_, name = line.rstrip("\n").split(None, 5)
            if name.startswith(folder + os.sep):
                start, end = (int(address, 16) for address in span.split("-"))
                yield start, end - start


def _nodes(model: str | os.PathLike[str] | ir.Model) -> int:
    """Nodes of the main graph; 0 where the file is no model, which ORT will say."""
    if isinstance(model, ir.Model):
        return len(model.graph)
    import onnx

    try:
        return len(onnx.load(model, load_external_data=False).graph.node)
    except Exception:  # whatever a damaged file makes of protobuf
        return 0


def external_folder(model: ir.Model) -> str | None:
    """The one folder that the external tensors' locations are relative to; None when there are none.

    Raises:
        ModelError: tensors of several folders, which no single ORT session can find.
    """
    folders = {
        os.path.abspath(value.const_value.base_dir or ".")
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    if len(folders) > 1:
        raise ModelError("external weights lie in several folders", "save the model first")
    return folders.pop() if folders else None


def first_line(error: Exception) -> str:
    """What an exception of the runtime says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:400]

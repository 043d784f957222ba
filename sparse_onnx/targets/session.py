"""ONNX Runtime sessions, with its failures as one line each."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from sparse_onnx.core.errors import ImpossibleError, ModelError, OutsideError

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

#: Where a model that is given as bytes finds its external data.
_FOLDER_KEY = "session.model_external_initializers_file_folder_path"


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


def create_session(
    model: str | os.PathLike[str] | ir.Model,
    *,
    threads: int | None = None,
    provider: str = "CPUExecutionProvider",
    entries: dict[str, str] | None = None,
    name: str = "",
) -> onnxruntime.InferenceSession:
    """A session for a file, or for a model in memory whose external weights all lie in one folder.

    Args:
        model: path of an .onnx file, or an ir.Model.
        threads: intra-op threads.
        provider: full name of an execution provider.
        entries: session configuration entries.
        name: what to call a model in memory in messages.

    Raises:
        ModelError: ORT cannot load the model.
        ImpossibleError: ORT loads it, but the provider has no kernel for one of its operators.
    """
    import onnxruntime

    entries = dict(entries or {})
    if isinstance(model, ir.Model):
        folder = external_folder(model)
        if folder is not None:
            entries[_FOLDER_KEY] = folder
        source: Any = ir.to_proto(model).SerializeToString()
    else:
        source = os.fspath(model)
        name = name or source
    try:
        return onnxruntime.InferenceSession(source, session_options(threads, entries), providers=[provider])
    except Exception as error:  # ORT's exceptions share no base class
        message = _first_line(error)
        if type(error).__name__ == "NotImplemented":
            raise ImpossibleError(f"onnxruntime has no kernel: {message}", where=name) from error
        raise ModelError(
            f"onnxruntime cannot load the model: {message}", "check it with onnx.checker", where=name
        ) from error


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
        raise OutsideError(f"onnxruntime failed while running: {_first_line(error)}", where=name) from error


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


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:400]

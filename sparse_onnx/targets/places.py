"""Where the models of a target can be run on this machine: a text that `create_session` takes as its provider.

`CPUExecutionProvider`: a provider of this onnxruntime. `runtime:NAME`: a runtime that is installed beside it.
`format:ort`: this onnxruntime, from the file format of its minimal builds.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from sparse_onnx.core.errors import UsageError
from sparse_onnx.targets import profile as profiles
from sparse_onnx.targets import runtimes
from sparse_onnx.targets.profile import TargetProfile
from sparse_onnx.targets.remote import RemoteError, RemoteSession

Failed = RemoteError

CPU = "CPUExecutionProvider"
_RUNTIME, _FORMAT = "runtime:", "format:ort"
#: A file of one piece has no more.
_ONE_FILE = 2 << 30


def place(target: TargetProfile) -> str | None:
    """Where the target's models can be run here; None where they cannot."""
    import onnxruntime

    if target.format == "ort":
        return _FORMAT
    if target.provider in onnxruntime.get_available_providers() and target.runtime is None:
        return target.provider
    if target.runtime is not None and runtimes.get(target.runtime).installed:
        return f"{_RUNTIME}{target.runtime}"
    if target.provider != CPU and target.provider in onnxruntime.get_available_providers():
        return target.provider
    return None


def described(where: str) -> str:
    """The place in words."""
    import onnxruntime

    if where.startswith(_RUNTIME):
        return runtimes.get(where.removeprefix(_RUNTIME)).versions
    form = ", .ort file" if where == _FORMAT else ""
    return f"onnxruntime {onnxruntime.__version__}{form}"


def is_elsewhere(provider: str) -> bool:
    return provider.startswith(_RUNTIME) or provider == _FORMAT


def simulated(provider: str) -> bool:
    """Whether the device is simulated in software there."""
    return provider.startswith(_RUNTIME) and runtimes.get(provider.removeprefix(_RUNTIME)).simulates


def start(
    where: str,
    model: str | os.PathLike[str] | ir.Model,
    config: Mapping[str, str],
    *,
    record: bool = False,
    optimize: bool = True,
) -> Any:
    """A session at a place that is elsewhere.

    Raises:
        Failed: it cannot be created.
    """
    with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as folder:
        if where == _FORMAT:
            return _ort_session(one_file(model, Path(folder)), config)
        name = where.removeprefix(_RUNTIME)
        runtime = runtimes.get(name)
        found = _profile(name)
        config = {**found.config, **config} if found is not None else config
        if runtime.npm:
            config = {}  # what is set in Python alone
        if isinstance(model, ir.Model) or runtime.npm:
            path = one_file(model, Path(folder))
        else:
            path = os.fspath(model)
        options = {} if found is None else found.provider_options
        return RemoteSession(runtime, path, options, config, record=record, optimize=optimize)


def recommended(provider: str) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Session entries and provider options that the provider's profile recommends; none where there is no profile."""
    found = (profiles.get(name) for name in profiles.names())
    target = next((each for each in found if each.provider == provider), None)
    return ({}, {}) if target is None else (target.config, target.provider_options)


def _profile(runtime: str) -> TargetProfile | None:
    """The one that names the runtime."""
    found = (profiles.get(name) for name in profiles.names())
    return next((each for each in found if each.runtime == runtime), None)


def one_file(model: str | os.PathLike[str] | ir.Model, folder: Path) -> str:
    """The model with its weights inside."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else onnx.load(model, load_external_data=False)
    base = None if isinstance(model, ir.Model) else os.path.dirname(os.path.abspath(model))
    if isinstance(model, ir.Model):
        held = model.clone()
        try:
            ir.external_data.load_to_model(held)
        except (OSError, ValueError) as error:
            raise Failed(str(error)) from error
        proto = ir.to_proto(held)
    elif base is not None:
        onnx.load_external_data_for_model(proto, base)
    path = str(folder / "model.onnx")
    try:
        onnx.save(proto, path)
    except ValueError as error:  # of more than 2 GB
        raise Failed(f"the model does not fit into one file: {error}") from error
    return path


def _ort_session(path: str, config: Mapping[str, str]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    content = to_ort(Path(path)).read_bytes()
    return onnxruntime.InferenceSession(content, options, providers=[CPU])


def to_ort(path: Path) -> Path:
    """Writes the .ort file beside a model, with the rewrites that hold on every processor done, as ORT's tool
    `convert_onnx_models_to_ort` does.

    Raises:
        Failed: the model cannot be converted.
    """
    import onnxruntime

    made = path.with_suffix(".ort")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(made)
    options.add_session_config_entry("session.save_model_format", "ORT")
    try:
        onnxruntime.InferenceSession(str(path), options, providers=[CPU])
    except Exception as error:  # ORT's exceptions share no base class
        raise Failed(str(error), type(error).__name__) from error
    return made


def require(target: TargetProfile) -> str:
    """
    Raises:
        UsageError: the target's models cannot be run here.
    """
    found = place(target)
    if found is None:
        how = f"python -m sparse_onnx.targets.runtimes install {target.runtime}" if target.runtime else ""
        raise UsageError(f"target '{target.name}' cannot be run on this machine", how or target.needs)
    return found

"""The page of a package: in a browser, by onnxruntime-web, it generates text and shows which experts each byte used.

The choices are values of the graph already, so the page's graph is the packaged one with these values among its
outputs: no node is changed or added, and the weights are the same file.
"""

from __future__ import annotations

import importlib.resources
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.lowered import LoweredBlock, lowered_blocks
from sparse_onnx.core.errors import ImpossibleError, UsageError, VerificationError
from sparse_onnx.graph import io
from sparse_onnx.package.contents import data_files
from sparse_onnx.package.smoke import Recorded, outputs_of
from sparse_onnx.targets import runtimes
from sparse_onnx.targets.profile import TargetProfile

FILES = ("index.html", "page.mjs", "page.worker.mjs")
MODEL = "page.onnx"
_LIBRARY, _RUNTIME = "onnxruntime-web", "wasm"
#: By target, the files of onnxruntime-web that a page of one provider needs: the module, and what it loads.
_SHIPPED = {
    "wasm": ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
_BYTES = 256
_IDS = (ir.DataType.INT64, ir.DataType.INT32)


def wanted(asked: bool | None, profile: TargetProfile) -> bool:
    """
    Raises:
        UsageError: a page for a target that no browser has.
    """
    if asked and profile.name not in _SHIPPED:
        raise UsageError(
            f"a page runs in a browser, and target '{profile.name}' does not",
            f"--target {' or '.join(_SHIPPED)}",
        )
    return profile.name in _SHIPPED and asked is not False


def build(
    main: Path, recorded: Recorded, beside: Path, asked: bool | None, profile: TargetProfile
) -> tuple[dict[str, Any] | None, list[str]]:
    """Puts the page into the package, if it can run the model.

    Args:
        main: the packaged model, lowered.
        recorded: its smoke input.
        beside: the model that was packaged; a tokenizer may lie next to it.
        asked: None: only if it can.
        profile: the target's.

    Returns:
        What the manifest says of the page, None where there is none; and notes for the report.

    Raises:
        ImpossibleError: a page was asked for, and cannot run the model.
        VerificationError: with more outputs, the others are not the same.
    """
    model = io.load(main)
    reason, entry = _interface(model)
    if not reason and (beside.parent / "tokenizer.json").is_file():
        reason = "it has a tokenizer.json, and the page knows bytes alone"
    shown, hidden = ([], []) if reason else _shown(model)
    path = main.with_name(MODEL)
    while shown and (odd := _compare(_write(io.load(main), path, shown), recorded, shown)):
        hidden += [(block.name, "what it chooses is not for each token") for block in odd]
        shown = [block for block in shown if block not in odd]
        path.unlink()
    if not reason and not shown:
        why = hidden[0][1] if hidden else "there is no block of experts"
        reason = f"no block tells which experts each token takes: {why}"
    if reason:
        if asked:
            raise ImpossibleError(f"the page cannot run this model: {reason}", "leave out --page")
        return None, [f"without a page to try it in a browser: {reason}"]
    notes = [f"the page does not show the experts of {name}: {why}" for name, why in hidden]
    entry |= {
        "model": path.name,
        "data": sorted(data_files(io.load(path))),
        "provider": profile.name,
        "experts": [
            {
                "output": block.expert_index,
                "block": block.name,
                "experts": block.experts,
                "top_k": block.top_k,
            }
            for block in shown
        ],
        "runtime": _runtime(main.parent, profile, notes),
    }
    shipped = importlib.resources.files("sparse_onnx.package") / "web"
    for name in FILES:
        (main.parent / name).write_bytes((shipped / name).read_bytes())
    return entry, ["index.html generates text in a browser, served by `python -m http.server -d DIR`", *notes]


def _interface(model: ir.Model) -> tuple[str, dict[str, Any]]:
    """Why it is no model of bytes that runs without a cache; else what it reads and gives."""
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    if len(inputs) != 1:
        return f"it has {len(inputs)} inputs, and the page gives token ids alone", {}
    ids, scores = inputs[0], model.graph.outputs[0] if model.graph.outputs else None
    if ids.dtype not in _IDS or ids.shape is None or len(ids.shape) != 2:
        return f"'{ids.name}' does not take token ids [batch, sequence]", {}
    batch, sequence = ids.shape
    if isinstance(sequence, int) or (isinstance(batch, int) and batch != 1):
        return f"'{ids.name}' is of the fixed size {ids.shape}, and text grows", {}
    if scores is None or scores.dtype != ir.DataType.FLOAT or scores.shape is None or len(scores.shape) != 3:
        return "its first output is no scores [batch, sequence, vocabulary] of float32", {}
    if scores.shape[2] != _BYTES:
        return f"it has a vocabulary of {scores.shape[2]}, and the page knows the {_BYTES} bytes alone", {}
    dtype = "int64" if ids.dtype == ir.DataType.INT64 else "int32"
    return "", {"input": ids.name, "type": dtype, "scores": scores.name, "vocabulary": _BYTES}


def _shown(model: ir.Model) -> tuple[list[LoweredBlock], list[tuple[str, str]]]:
    """Blocks whose choices are values of the main graph; the others by name, with the reason."""
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    shown, hidden = [], []
    for block in lowered_blocks(model):
        found = values.get(block.expert_index)
        if found is None or found.dtype not in _IDS:
            hidden.append((block.name, "its choice is no value of the main graph"))
        elif found.is_graph_input() or found.is_initializer() or not block.experts:
            hidden.append((block.name, "its choice is not computed from the text"))
        else:
            shown.append(block)
    return shown, hidden


def _write(model: ir.Model, path: Path, shown: list[LoweredBlock]) -> Path:
    """The packaged model, with what its blocks choose among its outputs."""
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    given = {value.name for value in model.graph.outputs}
    for block in shown:
        if block.expert_index not in given:
            model.graph.outputs.append(values[block.expert_index])
            given.add(block.expert_index)
    io.save(model, path, weights="link")
    return path


def _compare(path: Path, recorded: Recorded, shown: list[LoweredBlock]) -> list[LoweredBlock]:
    """Requires that the outputs that were there are the same still; gives the blocks whose new ones do not name experts
    of each token."""
    found = outputs_of(path, recorded.feeds, entries=recorded.entries)
    problem = recorded.differs(found[: len(recorded.names)])
    if problem:
        raise VerificationError(f"the graph of the page: {problem}")
    names = dict.fromkeys([*recorded.names, *(block.expert_index for block in shown)])
    by_name = dict(zip(names, found, strict=True))
    tokens = next(iter(recorded.feeds.values())).size
    odd = []
    for block in shown:
        chosen = by_name[block.expert_index]
        rows = chosen.ndim > 1 and chosen.size == tokens * chosen.shape[-1]
        if not rows or not _in_range(chosen, block.experts):
            odd.append(block)
    return odd


def _in_range(chosen: np.ndarray, experts: int | None) -> bool:
    """A dropped slot is called E."""
    return experts is not None and bool(((chosen >= 0) & (chosen <= experts)).all())


def _runtime(folder: Path, profile: TargetProfile, notes: list[str]) -> dict[str, Any]:
    """onnxruntime-web's files, from where it is installed."""
    runtime = runtimes.get(_RUNTIME)
    version = runtime.npm[0].removeprefix(f"{_LIBRARY}@")
    module, wasm = (f"{_LIBRARY}/{name}" for name in _SHIPPED[profile.name])
    source = runtime.folder / "node_modules" / _LIBRARY / "dist"
    (folder / _LIBRARY).mkdir()
    if runtime.installed:
        for name in (module, wasm):
            shutil.copyfile(source / Path(name).name, folder / name)
    else:
        notes.append(
            f"{_LIBRARY} {version} is not on this machine: put {' and '.join(_SHIPPED[profile.name])} of that npm "
            f"package's dist/ into {_LIBRARY}/, or `python -m sparse_onnx.targets.runtimes install {_RUNTIME}` and "
            "package again"
        )
        (folder / _LIBRARY).rmdir()
    return {"package": _LIBRARY, "version": version, "module": module, "wasm": wasm}

"""`manifest.json`: what a package is and what it needs (schema 1), and `manifest.txt`, the same for `run.cc`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.core.report import tool_versions
from sparse_onnx.graph import io, stats
from sparse_onnx.inspect.blocks import block_records
from sparse_onnx.optimize.resident import note, residency
from sparse_onnx.package.contents import RUNNERS, Kernels, digest
from sparse_onnx.package.page import FILES as PAGE
from sparse_onnx.package.smoke import Recorded
from sparse_onnx.package.variants import Variant
from sparse_onnx.passes.fuse_moe_op import REQUIRES_KEY
from sparse_onnx.targets import runtimes
from sparse_onnx.targets.profile import TargetProfile

SCHEMA = 1
MANIFEST, TEXT = "manifest.json", "manifest.txt"
_JAVASCRIPT_ONLY = ("wasm", "cpu")
_IN_JAVASCRIPT = {
    "CPUExecutionProvider": "cpu",
    "WebGpuExecutionProvider": "webgpu",
    "CUDAExecutionProvider": "cuda",
    "CoreMLExecutionProvider": "coreml",
    "DmlExecutionProvider": "dml",
}


def describe(
    model: ir.Model,
    made: Sequence[Variant],
    profile: TargetProfile,
    recorded: Recorded,
    kernels: Kernels | None,
) -> dict[str, Any]:
    """The manifest without its files; `model` is the one that `made` begins with, before it became an .ort file."""
    tools = tool_versions()
    needed = [profile.onnxruntime, model.metadata_props.get(REQUIRES_KEY, "")]
    python = "CPUExecutionProvider" if profile.provider in _JAVASCRIPT_ONLY else profile.provider
    found = residency(model)
    return {
        "schema": SCHEMA,
        "tool": tools,
        "target": profile.name,
        "onnxruntime": {"minimum": minimum(needed), "packaged_with": tools["onnxruntime"]},
        "providers": {
            "python": [python],
            "javascript": [_IN_JAVASCRIPT.get(profile.provider, profile.provider)],
        },
        "plugin": runtimes.get(profile.runtime).plugin or None if profile.runtime else None,
        "provider_options": dict(profile.provider_options),
        "session": dict(profile.session),
        "config": dict(recorded.entries),
        "inputs": [_port(value) for value in model.graph.inputs if value.name in recorded.feeds],
        "outputs": [_port(value) for value in model.graph.outputs],
        "memory": {
            "weight_bytes": stats.weight_bytes(model),
            "packed_bytes": found.total,
            "note": note(found),
        },
        "kernels": None if kernels is None else dataclasses.asdict(kernels),
        "variants": [
            {
                "name": each.name,
                "model": each.model.name,
                "data": list(each.data),
                "forms": _forms(each),
            }
            for each in made
        ],
        "smoke": {"recorded": recorded},
    }


def _forms(variant: Variant) -> list[str] | None:
    if variant.model.suffix == ".ort":
        return None
    blocks = block_records(io.load(variant.model))
    return sorted({block.form for block in blocks if block.form is not None})


def minimum(ranges: Sequence[str]) -> str:
    """The least version that all of ``>=1.24``, ``onnxruntime>=1.31`` allow."""
    numbers = []
    for text in filter(None, ranges):
        found = re.fullmatch(r"(?:onnxruntime)?>=(\d+(?:\.\d+)*)", text.replace(" ", ""))
        if found is None:
            raise ImpossibleError(f"the model needs '{text}', which is no range of versions of onnxruntime")
        numbers.append(tuple(map(int, found[1].split("."))))
    return ".".join(map(str, max(numbers)))


def _port(value: ir.Value) -> dict[str, Any]:
    shape = (
        None
        if value.shape is None
        else [size if isinstance(size, int) else size.value for size in value.shape]
    )
    return {
        "name": value.name,
        "type": None if value.dtype is None else value.dtype.numpy().name,
        "shape": shape,
    }


def write(described: dict[str, Any], folder: Path) -> None:
    """Puts the arrays and both manifests into the folder."""
    recorded: Recorded = described["smoke"]["recorded"]
    (folder / "smoke").mkdir()
    inputs = [_raw(folder, "input", at, item) for at, item in enumerate(recorded.feeds.items())]
    pairs = zip(recorded.names, recorded.outputs, strict=True)
    outputs = [_raw(folder, "output", at, item) for at, item in enumerate(pairs)]
    arrays = {f"input_{at}": array for at, array in enumerate(recorded.feeds.values())}
    arrays |= {f"output_{at}": array for at, array in enumerate(recorded.outputs)}
    np.savez(folder / "smoke" / "smoke.npz", **arrays)  # type: ignore[arg-type]
    timing = []
    for tokens, feeds in recorded.timed.items():
        file = f"smoke/tokens_{tokens}.npz"
        np.savez(folder / file, **{f"input_{at}": array for at, array in enumerate(feeds.values())})  # type: ignore[arg-type]
        timing.append({"tokens": tokens, "arrays": file})
    described["smoke"] = {
        "arrays": "smoke/smoke.npz",
        "inputs": inputs,
        "outputs": outputs,
        "tolerance": recorded.tolerance,
        "timing": timing,
    }
    paths = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name not in (*RUNNERS, *PAGE)
    )
    text = _text(described, {str(path.relative_to(folder)): path.stat().st_size for path in paths})
    (folder / TEXT).write_text(text, encoding="utf-8")
    described["files"] = {
        path.relative_to(folder).as_posix(): {"sha256": digest(path), "bytes": path.stat().st_size}
        for path in (*paths, folder / TEXT)
    }
    (folder / MANIFEST).write_text(json.dumps(described, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _raw(folder: Path, kind: str, at: int, item: tuple[str, np.ndarray]) -> dict[str, Any]:
    """One array as its bytes, little-endian, the last axis fastest."""
    name, array = item
    file = f"smoke/{kind}_{at}.bin"
    (folder / file).write_bytes(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
    return {"name": name, "type": array.dtype.name, "shape": list(array.shape), "file": file}


def _text(described: dict[str, Any], sizes: dict[str, int]) -> str:
    """A line a fact, its words apart by blanks, a name last."""
    lines = [
        f"schema {SCHEMA}",
        f"minimum {described['onnxruntime']['minimum']}",
        f"provider {described['providers']['python'][0]}",
        f"model {described['variants'][0]['model']}",
        f"tolerance {described['smoke']['tolerance']:g}",
    ]
    if described["kernels"] is not None:
        library = described["kernels"]
        lines.append(f"kernels {library['file']} {library['system']}-{library['machine']}")
    lines += [f"config {key} {value}" for key, value in described["config"].items()]
    for kind in ("input", "output"):
        for item in described["smoke"][f"{kind}s"]:
            shape = " ".join(map(str, [len(item["shape"]), *item["shape"]]))
            lines.append(f"{kind} {item['type']} {shape} {item['file']} {item['name']}")
    lines += [f"file {size} {name}" for name, size in sizes.items()]
    return "\n".join(lines) + "\n"

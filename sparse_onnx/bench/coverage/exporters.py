"""The exporters that are compared, each called as its own documentation shows.

All trace the same sample of the same model, of sizes that differ from each other and from 1, with the same axes
declared dynamic, without a key/value cache. `legacy` is measured only where it is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_onnx.bench.coverage import cached_exporters
from sparse_onnx.bench.coverage.cases import Made

if TYPE_CHECKING:
    from sparse_onnx.export.sources import Source


@dataclasses.dataclass(frozen=True)
class Exported:
    """A file; and of our own exporter the blocks that it kept whole, and its notes. `feed`: how it is fed where its
    inputs have names of their own."""

    path: Path
    blocks: int = 0
    notes: tuple[str, ...] = ()
    feed: cached_exporters.Feed | None = None


def ours(made: Made, path: Path) -> Exported:
    import sparse_onnx

    report = sparse_onnx.export(made.source, path, **made.arguments)
    return Exported(path, len(report.blocks), tuple(report.notes))


def torch_onnx(made: Made, path: Path) -> Exported:
    """``torch.onnx.export(model, kwargs=..., dynamic_shapes=..., dynamo=True)``."""
    import torch

    if made.cached:
        return Exported(path, feed=cached_exporters.torch_onnx(made, path))
    source, inputs, shapes = _sample(made)
    with torch.no_grad():
        torch.onnx.export(
            source.module, (), str(path), kwargs=inputs, dynamic_shapes=shapes, dynamo=True, verbose=False
        )
    return Exported(path)


def transformers_onnx(made: Made, path: Path) -> Exported:
    """``OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True, dynamic_shapes=...))``; where that fails,
    without explicit shapes, which lets torch find out what is dynamic."""
    import onnx_ir as ir
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    if made.cached:
        return Exported(path, feed=cached_exporters.transformers_onnx(made, path))
    source, inputs, shapes = _sample(made)
    model: Any = source.module
    try:
        exported = OnnxExporter().export(model, dict(inputs), OnnxConfig(dynamic=True, dynamic_shapes=shapes))
    except Exception:  # torch's export errors share no base class
        source, inputs, _ = _sample(made)
        model = source.module
        exported = OnnxExporter().export(model, dict(inputs), OnnxConfig(dynamic=True))
    ir.save(exported.program, str(path), external_data=f"{path.name}.data")
    return Exported(path)


def legacy_onnx(made: Made, path: Path) -> Exported:
    """``torch.onnx.export(model, args, dynamic_axes=..., dynamo=False)``, the exporter by tracing that most tutorials
    use still."""
    import torch

    if made.cached:
        raise NotImplementedError("it takes no cache, only tuples of tensors")
    source, inputs, _ = _sample(made)
    axes = {name: dict(spec.axes) for name, spec in source.interface.inputs.items()}
    with torch.no_grad():
        torch.onnx.export(
            source.module,
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            dynamic_axes=axes,
            dynamo=False,
        )
    return Exported(path)


EXPORTERS: dict[str, Callable[[Made, Path], Exported]] = {
    "legacy": legacy_onnx,
    "torch": torch_onnx,
    "transformers": transformers_onnx,
    "ours": ours,
}


def _sample(made: Made) -> tuple[Source, dict[str, Any], dict[str, Any]]:
    import torch

    source = load(made)
    inputs = source.interface.draw(source.interface.traced_sizes())
    shapes = {
        name: dict.fromkeys(spec.axes, torch.export.Dim.DYNAMIC)
        for name, spec in source.interface.inputs.items()
    }
    return source, inputs, shapes


def load(made: Made) -> Source:
    """The model in torch, as `sparse_onnx.export` loads it."""
    from sparse_onnx.export import past

    return past.with_past(load_plain(made)) if made.cached else load_plain(made)


def load_plain(made: Made) -> Source:
    """The same without its key/value cache."""
    import torch

    from sparse_onnx.export import sources

    arguments = {name: value for name, value in made.arguments.items() if name != "past"}
    if made.half:
        arguments["dtype"] = getattr(torch, made.half)
    if isinstance(made.source, str):
        return sources.resolve(made.source, **arguments)
    return sources.of_objects(made.source, arguments.get("dtype"))

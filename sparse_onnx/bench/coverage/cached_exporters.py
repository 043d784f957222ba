"""The other exporters with a key/value cache: both take transformers' cache object among the sample inputs.

Such a file is a step after a past; the first step, without one, is another file in their terms. Names are theirs, so
that each has its own way of being fed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_onnx.bench.coverage.cases import Made

if TYPE_CHECKING:
    from sparse_onnx.export.past import PastSource

#: Of names of inputs and tensors by our names, what goes into the file.
Feed = Callable[[Sequence[str], Mapping[str, Any]], dict[str, np.ndarray]]


def torch_onnx(made: Made, path: Path) -> Feed:
    """``torch.onnx.export(model, kwargs={..., "cache": cache}, dynamic_shapes=..., dynamo=True)``, with transformers'
    own registration of its caches, and every axis of the cache left to torch."""
    import torch
    from transformers.exporters import exporter_dynamo

    source, inputs = _drawn(made)
    model: Any = source.module
    exporter_dynamo.register_cache_pytrees_for_model(model)
    sample = _sample(source, inputs)
    shapes = exporter_dynamo.get_auto_dynamic_shapes(sample)
    for name, spec in source.interface.inputs.items():
        if name in sample:
            shapes[name] = dict.fromkeys(spec.axes, torch.export.Dim.DYNAMIC)
            # The sum of two others.
            shapes[name] |= {
                axis: torch.export.Dim.AUTO
                for axis, symbol in spec.axes.items()
                if symbol == "total_sequence"
            }
    with torch.no_grad():
        torch.onnx.export(
            model, (), str(path), kwargs=sample, dynamic_shapes=shapes, dynamo=True, verbose=False
        )

    def feed(names: Sequence[str], tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
        leaves = torch.utils._pytree.tree_leaves(_sample(source, tensors))
        values = [leaf.numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if len(values) != len(names):
            raise ValueError(f"the file has {len(names)} inputs, and the sample {len(values)}")
        return dict(zip(names, values, strict=True))

    return feed


def transformers_onnx(made: Made, path: Path) -> Feed:
    """``OnnxExporter().export(model, {..., "cache": cache}, OnnxConfig(dynamic=True))``."""
    import onnx_ir as ir
    from transformers.exporters import utils
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    source, inputs = _drawn(made)
    model: Any = source.module
    exported = OnnxExporter().export(model, _sample(source, inputs), OnnxConfig(dynamic=True))
    ir.save(exported.program, str(path), external_data=f"{path.name}.data")

    def feed(names: Sequence[str], tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return utils.onnx_feed(list(names), _sample(source, tensors))

    return feed


def _drawn(made: Made) -> tuple[PastSource, Mapping[str, Any]]:
    from sparse_onnx.bench.coverage import exporters
    from sparse_onnx.export.past import PastSource

    source = exporters.load(made)
    assert isinstance(source, PastSource)
    return source, source.interface.draw(source.interface.traced_sizes())


def _sample(source: PastSource, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the model's forward, with a cache that keeps every token, as both exporters trace it."""
    from transformers.modeling_outputs import MoEModelOutput

    from sparse_onnx.export.past import CrossSource

    decoder: Any = source.decoder
    if isinstance(source, CrossSource):
        return {
            "encoder_outputs": MoEModelOutput(last_hidden_state=inputs["encoder_hidden_states"]),
            "attention_mask": inputs["encoder_attention_mask"],
            "decoder_input_ids": inputs["input_ids"],
            decoder.cache: decoder.own(source.slots, inputs),
            "use_cache": True,
        }
    names = ("input_ids", "attention_mask", "position_ids")
    return {
        **{name: inputs[name] for name in names if name in inputs},
        decoder.cache: decoder.full(source.slots, inputs),
        "use_cache": True,
    }

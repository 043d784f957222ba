"""Whether past and present states may lie in one buffer, where onnxruntime-genai keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparse_onnx.core.errors import SparseOnnxError
from sparse_onnx.export.past.source import PastSource
from sparse_onnx.targets import session as sessions

#: Lengths of the pieces that one text goes in as.
_PIECES = (3, 1, 1, 4, 1, 1, 1)
_BATCHES = (1, 3)


def bear_one_buffer(path: Path, source: PastSource) -> bool:
    """Runs a text through the file with separate buffers and with one for each state, and compares all logits; False
    too where onnxruntime cannot run the file here."""
    try:
        session = sessions.create_session(path, name=path.name)
    except SparseOnnxError:
        return False
    for batch in _BATCHES:
        one, two = (np.concatenate(list(_logits(session, source, batch, shared))) for shared in (True, False))
        if not np.array_equal(one, two):
            return False
    return True


def _logits(session: Any, source: PastSource, batch: int, shared: bool) -> Iterator[np.ndarray]:
    import onnxruntime

    value = onnxruntime.OrtValue.ortvalue_from_numpy
    names = [output.name for output in session.get_outputs()]
    drawn = source.interface.draw({"batch": batch, "sequence": sum(_PIECES), "past_sequence": 0}, seed=1)
    given = {name: tensor.numpy() for name, tensor in drawn.items()}
    past = {slot.past: value(given[slot.past].copy()) for slot in source.slots}
    seen = 0
    for piece in _PIECES:
        feeds = dict(past)  # a binding does not keep what it binds
        for name, start in (("input_ids", seen), ("attention_mask", 0), ("position_ids", seen)):
            if name in given:
                feeds[name] = value(np.ascontiguousarray(given[name][:, start : seen + piece]))
        binding = session.io_binding()
        for name, fed in feeds.items():
            binding.bind_ortvalue_input(name, fed)
        for name in names:
            binding.bind_output(name, "cpu")
        if shared:
            for slot in source.slots:
                if slot.axis is None:
                    binding.bind_ortvalue_output(slot.present, past[slot.past])
        session.run_with_iobinding(binding)
        results = dict(zip(names, binding.get_outputs(), strict=True))
        kept = {slot.past: past[slot.past] for slot in source.slots if shared and slot.axis is None}
        past = {slot.past: results[slot.present] for slot in source.slots} | kept
        seen += piece
        yield results["logits"].numpy()[:, -1].astype(np.float32)

"""`targets probe`: single operators, and one block in each form, on a target."""

from __future__ import annotations

from collections.abc import Callable

from sparse_onnx.bench.sample_blocks import samples
from sparse_onnx.bench.target_forms import form_on, results
from sparse_onnx.targets import TargetProfile, places
from sparse_onnx.targets import probe as operators
from sparse_onnx.targets.profile import FormResult
from sparse_onnx.targets.record import Record

#: The block that forms are probed with.
_BLOCK = "silu, gated"


def probe(target: TargetProfile, say: Callable[[str], None] | None = None) -> Record:
    """What the target runs, seen on this machine.

    Raises:
        UsageError: the target cannot be run here.
    """
    where = places.require(target)
    # Of a file format the kernels are those of the CPU provider: its forms alone are tried.
    found = [] if target.format == "ort" else operators.probe(target, say)
    block = [sample for sample in samples() if sample.name == _BLOCK]
    forms: dict[str, FormResult] = {}
    for form, _, result in results(target, where, block):
        if result is not None:
            forms[form_on(target, form)] = result
            if say is not None:
                say(f"form {form}: {result}")
    return Record(target.name, places.described(where), operators.operators(found), forms)

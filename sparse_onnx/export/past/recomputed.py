"""Models whose `generate` drops the cache once: PhiMoE with longrope, whose keys up to a length were turned by other
angles than those beyond it. A step of the model with such a cache is one thing, and what `generate` gives another."""

from __future__ import annotations

import inspect
from typing import Any

_FIELD = "original_max_position_embeddings"


def forgets_after(module: Any) -> int | None:
    """The number of tokens after which transformers' `generate` computes the whole text anew; None for models of which
    it does not."""
    prepare: Any = getattr(type(module), "prepare_inputs_for_generation", None)
    code = getattr(inspect.unwrap(prepare), "__code__", None) if callable(prepare) else None
    if code is None or _FIELD not in (*code.co_names, *code.co_consts):
        return None
    rope = getattr(module.config, "rope_parameters", None) or {}
    length = getattr(module.config, _FIELD, None)
    return length if rope.get("rope_type") == "longrope" and isinstance(length, int) else None


def note(module: Any) -> tuple[str, ...]:
    length = forgets_after(module)
    if length is None:
        return ()
    return (
        f"beyond {length} tokens the model turns all its keys otherwise: where a text grows past that, give all of it "
        "again with an empty past, as transformers' generate does",
    )

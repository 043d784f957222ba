"""The table with a key/value cache: which models have one, and the inputs, whose pasts torch itself made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_onnx.export.past import CrossSource, PastSource
    from sparse_onnx.export.samples import Kind, Run
    from sparse_onnx.export.sources import Source

#: Batch, new tokens, past tokens; none was traced, nor is compared by our exporter.
_PLAN: tuple[tuple[int, int, int, Kind], ...] = (
    (1, 33, 0, "random"),
    (1, 1, 12, "random"),
    (4, 1, 21, "random"),
    (2, 8, 3, "one"),
    (1, 5, 30, "random"),
    (3, 9, 0, "padded"),
    (2, 6, 11, "padded"),
)
#: With the encoder's tokens in front of the kind.
_CROSSED: tuple[tuple[int, int, int, int, Kind], ...] = (
    (1, 1, 0, 33, "random"),
    (1, 1, 12, 8, "random"),
    (4, 1, 21, 14, "random"),
    (2, 8, 3, 11, "one"),
    (1, 5, 30, 17, "random"),
    (3, 2, 0, 10, "padded"),
    (2, 6, 11, 9, "padded"),
)
_SEED = 2000


def inapplicable(source: Source) -> str:
    """Why transformers itself does not generate with this model and a key/value cache; empty where it does."""
    import inspect

    from transformers import GenerationMixin

    model: Any = source.module
    kind = type(model)
    if not isinstance(model, GenerationMixin):
        return f"{kind.__name__} does not generate text token by token"
    if not kind.can_generate():
        return f"{kind.__name__} does not generate text"
    if not {"cache", "past_key_values"} & set(inspect.signature(kind.forward).parameters):
        return f"{kind.__name__} takes no key/value cache"
    return ""


def untraced(source: PastSource) -> list[Run]:
    """Seven inputs: whole texts, single tokens after a past, and several, in batches and with padding."""
    from sparse_onnx.export.past import CrossSource

    if isinstance(source, CrossSource):
        return [_cross_run(source, *sizes, _SEED + seed) for seed, sizes in enumerate(_CROSSED)]
    return [
        _run(source, batch, new, past, kind, _SEED + seed)
        for seed, (batch, new, past, kind) in enumerate(_PLAN)
    ]


def _run(source: PastSource, batch: int, new: int, past: int, kind: Kind, seed: int) -> Run:
    """One text, whose first `past` tokens torch runs for the cache that goes in."""
    interface, states = source.interface, {slot.past: slot for slot in source.slots}
    text = interface.draw({"batch": batch, "sequence": past + new, "past_sequence": 0}, kind, seed)

    def piece(start: int, end: int) -> dict[str, Any]:
        """Masks go from the beginning on, and positions and ids are the new ones."""
        return {
            name: value[:, (0 if name in interface.masks else start) : end].contiguous()
            for name, value in text.items()
            if name not in states
        }

    inputs = {name: text[name] for name in states}
    if past:
        _, *presents = source.forward(piece(0, past) | inputs)
        inputs = {slot.past: value for slot, value in zip(source.slots, presents, strict=True)}
    given = piece(past, past + new) | inputs
    sizes = {"batch": batch, "sequence": new, "past_sequence": past}
    name = interface.described(sizes) + {"one": " alike", "padded": " padded"}.get(kind, "")
    return interface.run(name, {name: given[name] for name in interface.inputs}, sizes)


def _cross_run(
    source: CrossSource, batch: int, new: int, past: int, length: int, kind: Kind, seed: int
) -> Run:
    """The same after torch's own encoder, which read a text of this length."""
    interface, encoder = source.interface, source.encoder
    assert encoder is not None
    text = encoder.interface.draw({"batch": batch, "encoder_sequence": length}, kind, seed)
    sizes = {"batch": batch, "sequence": past + new, "past_sequence": 0, "encoder_sequence": length}
    inputs = interface.draw(sizes, kind, seed)
    inputs["encoder_hidden_states"] = encoder.forward(text)[0]
    inputs["encoder_attention_mask"] = text["attention_mask"]
    ids = inputs["input_ids"]
    if past:
        _, *presents = source.forward(inputs | {"input_ids": ids[:, :past]})
        inputs |= {slot.past: value for slot, value in zip(source.slots, presents, strict=True)}
    inputs["input_ids"] = ids[:, past:].contiguous()
    sizes |= {"sequence": new, "past_sequence": past}
    name = interface.described(sizes) + {"one": " alike", "padded": " padded"}.get(kind, "")
    return interface.run(name, inputs, sizes)

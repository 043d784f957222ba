"""A decoder with its cache as a source: what goes in, what the module itself answers, which runs it is compared on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export import patches, samples
from sparse_onnx.export.past import recomputed, reference
from sparse_onnx.export.past.cache import Decoder, presents
from sparse_onnx.export.past.slots import HINT, Slot, blocks_axis, own_cache
from sparse_onnx.export.samples import Interface, Kind, Spec
from sparse_onnx.export.sources import Source

#: Batch, new tokens, past tokens.
_RUNS: tuple[tuple[int, int, int, Kind], ...] = (
    (3, 11, 0, "random"),
    (1, 1, 0, "random"),
    (1, 1, 8, "random"),
    (4, 1, 6, "one"),
    (2, 9, 4, "one"),
    (1, 6, 40, "random"),
    (5, 3, 13, "random"),
    (3, 6, 0, "padded"),
    (2, 1, 9, "padded"),
    (2, 4, 5, "padded"),
)
#: Tokens of padding that end a past.
_GAP = 2
#: For a model of which the file is right where transformers is not.
_STEPWISE = (
    "transformers' own code for this model forgets its state where several tokens follow a past; the file goes on from "
    "it, and was compared with transformers given one token after another"
)
#: Largest cache that a run beyond the window is made for.
_MAX_BYTES = 1 << 30


class _PromptLength(Spec):
    """`reference_length`: one number, the same for all sequences, and no more than the past that it is given with."""

    @property
    def constant(self) -> bool:
        return False

    def draw(self, sizes: Mapping[str, int], kind: Kind, generator: torch.Generator) -> Tensor:
        return torch.randint(1, 4, (1,), generator=generator).repeat(sizes["batch"])


@dataclasses.dataclass(frozen=True)
class PastInterface(Interface):
    """Inputs by their ONNX names. The attention mask is `past_sequence + sequence` long; positions follow from it."""

    cached: ClassVar[bool] = True
    thresholds: tuple[int, ...] = ()
    longest: int | None = None
    rates: tuple[int, ...] = ()
    """Tokens of the blocks of which a layer keeps one entry each."""
    states: frozenset[int] = frozenset()
    """Outputs that are recurrent states `[batch, heads, width, width]`."""

    @property
    def symbols(self) -> tuple[str, ...]:
        return "batch", "sequence", "past_sequence"

    def complete(self, sizes: Mapping[str, int]) -> Mapping[str, int]:
        past = sizes["past_sequence"]
        blocks = {blocks_axis(rate): past // rate for rate in self.rates}
        return {**sizes, "total_sequence": sizes["sequence"] + past, **blocks}

    def traced_sizes(self) -> dict[str, int]:
        """With a past of several blocks, as many of each kind as no other axis has."""
        sizes = super().traced_sizes()
        for past in range(sizes["past_sequence"], 16 * max(self.rates, default=1)):
            values = self.complete({**sizes, "past_sequence": past}).values()
            if len(set(values)) == len(values) and min(values) > 1:
                return {**sizes, "past_sequence": past}
        return sizes

    def draw(self, sizes: Mapping[str, int], kind: Kind = "random", seed: int = 0) -> dict[str, Tensor]:
        """Keys, values and states are random; without a past the states are zero, as both runtimes begin. Padding is
        on the left of the first sequence, and at the end of the second one's past: onnxruntime-genai pads prompts
        on the right."""
        drawn = super().draw(self.complete(sizes), kind, seed)
        new, past = sizes["sequence"], sizes["past_sequence"]
        if kind == "padded" and past > _GAP and sizes["batch"] > 1:
            drawn["attention_mask"][1, past - _GAP : past] = 0
        if "position_ids" in drawn:
            positions = (drawn["attention_mask"].cumsum(1) - 1).clamp(min=0)
            drawn["position_ids"] = positions[:, -new:].contiguous()
        if not past:
            for name, spec in self.inputs.items():
                state = name.startswith("past") and spec.dtype.is_floating_point and len(spec.axes) == 1
                if state or isinstance(spec, _PromptLength):
                    drawn[name] = torch.zeros_like(drawn[name])
        return drawn

    def planned(self) -> list[tuple[dict[str, int], Kind]]:
        """Splits into past and new tokens, with and without padding; some end just behind each threshold."""
        runs = list(_RUNS)
        for length in self.thresholds:
            for past in (length - 1, length, length + 7):
                runs.append((1, 1, past, "random"))
            runs.append((2, 5, length + 2, "padded"))
        return [
            ({"batch": batch, "sequence": new, "past_sequence": past}, kind)
            for batch, new, past, kind in dict.fromkeys(runs)
            if (self.longest is None or new + past <= self.longest) and self._bytes(batch, past) <= _MAX_BYTES
        ]

    def described(self, sizes: Mapping[str, int]) -> str:
        return f"{sizes['batch']}x{sizes['sequence']} after {sizes['past_sequence']}"

    def exceeds(self, length: int) -> bool:
        """Whether any run goes beyond this length."""
        return any(sizes["sequence"] + sizes["past_sequence"] > length for sizes, _ in self.planned())

    def renamed(self) -> PastInterface:
        """By names that Python takes for arguments."""
        return dataclasses.replace(
            self, inputs={python_name(name): spec for name, spec in self.inputs.items()}
        )

    def run(self, name: str, inputs: dict[str, Tensor], sizes: Mapping[str, int]) -> samples.Run:
        return PastRun(name, inputs, sizes, self.masks, states=self.states)

    def _bytes(self, batch: int, past: int) -> int:
        sizes = self.complete({"batch": batch, "sequence": 1, "past_sequence": past})
        return sum(math.prod(spec.shape(sizes)) for spec in self.inputs.values()) * 4


@dataclasses.dataclass(frozen=True)
class PastRun(samples.Run):
    """Padding is left out of the logits `[batch, sequence, vocabulary]` and of the keys and values `[batch, heads,
    total, width]`."""

    states: frozenset[int] = frozenset()

    def kept(self, output: int, shape: tuple[int, ...]) -> np.ndarray:
        mask = self.inputs["attention_mask"].numpy().astype(np.bool_)
        if output == 0:
            return mask[:, -shape[1] :]
        if output not in self.states and len(shape) == 4 and shape[2] == mask.shape[1]:
            return np.broadcast_to(mask[:, None], shape[:3])
        return np.ones(shape[:1], np.bool_)

    def rows(self, output: int, value: np.ndarray) -> np.ndarray:
        """A state is one matrix a head, whose rows are summed over where it is read; those that have decayed to next to
        nothing are differences of logarithms, and have next to no digits of their own."""
        return value.reshape(*value.shape[:-2], -1) if output in self.states else value


def python_name(name: str) -> str:
    return name.replace(".", "_")


@dataclasses.dataclass(frozen=True)
class PastSource(Source):
    """A decoder; `slots` are the tensors of its cache, in the order of the outputs behind the logits, and `plain` is
    the same model without cache. `stepwise` says that transformers' own code is right only for one token after a
    past, so that it is given them one by one."""

    generates: ClassVar[bool] = True  #: whether ids go in, so that the model generates by itself
    interface: PastInterface
    slots: tuple[Slot, ...] = ()
    plain: Source | None = None
    stepwise: bool = False

    @property
    def decoder(self) -> Decoder:
        return Decoder.of(self.module)

    def forward(self, inputs: Mapping[str, Tensor]) -> Any:
        """Logits and new cache by the module with transformers' own cache, its sliding windows cut as they are."""
        with torch.no_grad():
            cache = self.decoder.own(self.slots, inputs)
            logits = [self.answer(self.decoder, piece, cache).logits for piece in self._pieces(inputs)]
            joined = torch.cat(logits, dim=1)
            return joined, *presents(cache, self.slots, inputs, joined.shape[1])

    def flat(self, decoder: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same for a trace, by names of the outputs, with a cache that keeps every token."""
        cache = decoder.full(self.slots, inputs)
        output = self.answer(decoder, inputs, cache)
        now = presents(cache, self.slots, inputs)
        return {"logits": output.logits} | {
            slot.present: value for slot, value in zip(self.slots, now, strict=True)
        }

    def answer(self, decoder: Any, inputs: Mapping[str, Tensor], cache: Any) -> Any:
        """The model's output, for inputs by their ONNX names; `cache` grows."""
        return decoder(inputs["input_ids"], inputs["attention_mask"], inputs.get("position_ids"), cache)

    def _pieces(self, inputs: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """What transformers' own code is given at a time."""
        if not self.stepwise:
            return [inputs]
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        past = mask.shape[1] - ids.shape[1]
        if not past:
            return [inputs]
        cut = [name for name in ("input_ids", "position_ids") if name in inputs]
        return [
            {
                **inputs,
                "attention_mask": mask[:, : past + at + 1],
                **{name: inputs[name][:, at : at + 1] for name in cut},
            }
            for at in range(ids.shape[1])
        ]

    def widened(self) -> PastSource:
        assert self.plain is not None
        return with_past(self.plain.widened())


def states_of(slots: tuple[Slot, ...]) -> frozenset[int]:
    """Which outputs are recurrent states, behind the logits."""
    return frozenset(
        at
        for at, slot in enumerate(slots, start=1)
        if slot.kind == "recurrent_state" and len(slot.shape) == 4
    )


def with_past(source: Source) -> PastSource:
    """The same decoder with its cache among inputs and outputs.

    Raises:
        ImpossibleError: it has none, or one that has no such inputs.
    """
    if getattr(getattr(source.module, "config", None), "is_encoder_decoder", False):
        from sparse_onnx.export.past.cross import with_encoder  # which is a source of this kind

        return with_encoder(source)
    decoder = Decoder.of(source.module)
    with own_cache():
        slots = decoder.layout()
        stepwise = not decoder.continues(slots)
        with patches.replaced(source.module):
            forgets = stepwise and not decoder.continues(slots)
    if forgets:
        raise ImpossibleError(
            "transformers' own code for this model forgets its state where several tokens follow a past", HINT
        )
    text = decoder.text
    longest = getattr(text, "max_position_embeddings", None)
    rates = tuple(sorted({slot.rate for slot in slots} - {0}))
    interface = PastInterface(
        _inputs(decoder, slots), tuple(decoder.thresholds()), longest, rates, states_of(slots)
    )
    notes = tuple(
        f"no input longer than {length} tokens was compared, from which on the model goes on otherwise: too large"
        for length in interface.thresholds
        if not interface.exceeds(length) and (longest is None or longest > length)
    )
    if stepwise:
        notes += (_STEPWISE,)
    notes += recomputed.note(source.module)
    own = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    changed = {"interface": interface, "is_transformers": True, "notes": (*source.notes, *notes)}
    return PastSource(**{**own, **changed}, slots=slots, plain=source, stepwise=stepwise)


def _inputs(decoder: Decoder, slots: tuple[Slot, ...]) -> dict[str, Spec]:
    """Examples of two sequences of two tokens after three."""
    last = int(decoder.text.vocab_size) - 1
    ids = torch.tensor([[0, last], [last, 0]])
    inputs = {
        "input_ids": Spec(ids, {0: "batch", 1: "sequence"}),
        "attention_mask": Spec(torch.ones(2, 5, dtype=torch.int64), {0: "batch", 1: "total_sequence"}, True),
    }
    if decoder.takes_positions:
        positions = torch.tensor([[3, 4], [3, 4]])
        inputs["position_ids"] = Spec(positions, {0: "batch", 1: "sequence"})
    generator = torch.Generator().manual_seed(0)
    for slot in slots:
        sizes = {"batch": 2, "past_sequence": 3} | (
            {blocks_axis(slot.rate): 3 // slot.rate} if slot.rate else {}
        )
        shape = [
            sizes[slot.axes[axis]] if axis in slot.axes else size for axis, size in enumerate(slot.shape)
        ]
        if slot.dtype.is_floating_point:
            example = torch.randn(shape, generator=generator)
        else:  # token ids, or their positions
            example = torch.randint(last + 1 if slot.fixed else 3, shape, generator=generator)
        inputs[slot.past] = Spec(example.to(slot.dtype), slot.axes)
        if slot.kind == reference.KIND:
            inputs[slot.past] = _PromptLength(torch.tensor([3, 3]), slot.axes)
    return inputs

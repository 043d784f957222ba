"""Greedy generation by the exported file against transformers' `generate`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_onnx.core.report import VerifyRecord
from sparse_onnx.export import check, samples, ties
from sparse_onnx.export.experts import Experts
from sparse_onnx.export.past import cross_generation, reference
from sparse_onnx.export.past.cross import CrossSource
from sparse_onnx.export.past.recomputed import forgets_after
from sparse_onnx.export.past.source import PastSource
from sparse_onnx.export.users import users_code
from sparse_onnx.targets import session as sessions
from sparse_onnx.verify.compare import Difference, difference

#: Lengths of the prompts of each batch; shorter ones are padded on the left.
_PROMPTS: tuple[tuple[int, ...], ...] = ((6,), (8, 5))
_TOKENS = 32
#: The prompt goes in as two pieces, so that several tokens follow a past of real keys and values.
_FIRST = 2


def check_generation(
    record: VerifyRecord,
    path: Path,
    source: PastSource,
    found: Sequence[Experts],
    *,
    tolerance: float,
    progress: Callable[[str], None] | None = None,
) -> VerifyRecord:
    """The record with the greedy generations added; those after which it has failed are not run.

    Args:
        record: of the comparisons so far.
        path: the exported model.
        source: the reference.
        found: the experts modules, whose routing is compared where tokens differ.
        tolerance: largest accepted error of the logits of each step.
        progress: called with a line a batch.

    Raises:
        OutsideError: the module raises.
    """
    session = sessions.create_session(path, name=path.name)
    for lengths in _PROMPTS:
        if record.passed is False:
            break
        count = _count(source, max(lengths))
        name = f"{len(lengths)} prompt{'s' * (len(lengths) > 1)}, {count} greedy tokens"
        if count < 1:
            continue
        if progress is not None:
            progress(f"generating from {name}")
        ids, mask = _prompts(source, lengths)
        cut = isinstance(source, CrossSource) or _may_be_cut(source, ids, mask, tolerance)
        if not cut:
            name += ", the prompt at once: torch's own answer depends on how a text is cut"
        steps = _compared(session, source, ids, mask, count, tolerance, cut)
        if steps.different is not None:
            with ties.first_of_equal() as equal:
                others = _compared(session, source, ids, mask, count, tolerance, cut)
            if equal.met and others.different is None:
                steps, name = others, f"{name}, {ties.NOTE}"
        total, failure = steps.total, None
        if steps.different is not None:
            step = steps.tokens.shape[1]
            if isinstance(source, CrossSource):
                run = cross_generation.whole_text(source, ids, mask, steps.tokens)
            else:
                run = _whole_text(source, ids, mask, steps.tokens)
            undecided = step * 2 > count and (
                check.compare(path, source, found, [run], tolerance=tolerance).tokens_left_out
            )
            if undecided:
                name += f", compared up to token {step}, where rounding decides"
            else:
                failure, total = (
                    f"{name}: token {step}: {steps.different.reason}",
                    total.worse(steps.different),
                )
        if steps.others:
            name += f", {steps.others} of them within rounding of another"
        record = dataclasses.replace(
            record,
            passed=failure is None,
            runs=record.runs + 1,
            max_abs_error=max(record.max_abs_error or 0.0, total.max_abs),
            max_rel_error=max(record.max_rel_error or 0.0, total.max_rel),
            inputs=[*record.inputs, name],
            failure=failure,
        )
    return record


def _may_be_cut(source: PastSource, ids: np.ndarray, mask: np.ndarray, tolerance: float) -> bool:
    """Whether torch's own answer to the prompt is the same in two pieces. Doge's router mixes the scores of all tokens
    of a call."""
    whole = _text(source, ids, mask)
    inputs = {name: value for name, value in whole.items() if name.startswith("past")}
    for start, end in ((0, _FIRST), (_FIRST, ids.shape[1])):
        piece = {
            "input_ids": whole["input_ids"][:, start:end],
            "attention_mask": whole["attention_mask"][:, :end],
        }
        if "position_ids" in whole:
            piece["position_ids"] = whole["position_ids"][:, start:end]
        logits, *presents = source.forward(inputs | piece)
        inputs |= {slot.past: value for slot, value in zip(source.slots, presents, strict=True)}
    at_once = source.forward(whole)[0]
    left, right = (np.asarray(each[:, -1].float()) for each in (at_once, logits))
    return difference(left, right, tolerance).within


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Steps of one generation: the tokens `[batch, steps]` by torch, the largest difference of logits within the
    tolerance, how many tokens are others by rounding alone, and the difference of the last step where it is none of
    these."""

    tokens: np.ndarray
    total: Difference
    others: int = 0
    different: Difference | None = None


def _compared(
    session: Any,
    source: PastSource,
    ids: np.ndarray,
    mask: np.ndarray,
    count: int,
    tolerance: float,
    cut: bool,
) -> _Steps:
    with users_code(source.name):
        tokens, logits = _by_transformers(source, ids, mask, count)
    if isinstance(source, CrossSource):
        answers = cross_generation.by_onnxruntime(session, source, ids, mask, tokens)
    else:
        answers = _by_onnxruntime(session, source, ids, mask, tokens, cut)
    total, others = Difference.none(), 0
    for step, actual in enumerate(answers):
        worst = difference(logits[:, step], actual, tolerance)
        if not worst.within:
            return _Steps(tokens[:, : step + 1], total, others, worst)
        total = total.worse(worst)
        others += int((actual.argmax(axis=-1) != tokens[:, step]).sum())
    return _Steps(tokens, total, others)


def _count(source: PastSource, prompt: int) -> int:
    longest, forgets = source.interface.longest, forgets_after(source.module)
    count = _TOKENS if longest is None else min(_TOKENS, longest - prompt)
    return count if forgets is None or prompt > forgets else min(count, forgets - prompt + 1)


def _prompts(source: PastSource, lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask `[batch, longest]`."""
    ids = np.zeros((len(lengths), max(lengths)), np.int64)
    mask = np.zeros_like(ids)
    generator = np.random.default_rng(sum(lengths))
    for row, length in enumerate(lengths):
        ids[row, -length:] = generator.integers(0, source.decoder.text.vocab_size, length)
        mask[row, -length:] = 1
    return ids, mask


def _by_transformers(
    source: PastSource, ids: np.ndarray, mask: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[batch, count]` and their logits `[batch, count, vocabulary]`."""
    module: Any = source.module
    given = (
        {source.decoder.cache: source.decoder.empty()}
        if getattr(source.decoder, "gives_cache", False)
        else {}
    )
    with torch.no_grad(), nothing_but_greedy(module, count):
        result = module.generate(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            return_dict_in_generate=True,
            output_logits=True,
            **given,
        )
    logits = torch.stack(list(result.logits), dim=1).float().numpy()
    return result.sequences[:, -logits.shape[1] :].numpy(), logits


@contextlib.contextmanager
def nothing_but_greedy(module: Any, count: int) -> Iterator[None]:
    """The model's own settings of `generate` out of the way: penalties, sampling, the token that ends it."""
    from transformers import GenerationConfig

    before = module.generation_config
    begin = (
        {"decoder_start_token_id": cross_generation.start_token(module)}
        if module.config.is_encoder_decoder
        else {}
    )
    module.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=count, pad_token_id=0, use_cache=True, **begin
    )
    try:
        yield
    finally:
        module.generation_config = before


def _by_onnxruntime(
    session: Any, source: PastSource, ids: np.ndarray, mask: np.ndarray, tokens: np.ndarray, cut: bool
) -> Iterator[np.ndarray]:
    """Logits `[batch, vocabulary]` of each step; the next step is fed with `tokens`. `cut`: the prompt, in two."""
    names = [output.name for output in session.get_outputs()]
    feeds = {spec: value.numpy() for spec, value in source.interface.draw(_nothing(len(ids))).items()}
    past = {slot.past: feeds[slot.past] for slot in source.slots}
    for slot in source.slots:
        if slot.kind == reference.KIND:  # or it would be that of the first piece
            past[slot.past][:] = ids.shape[1]
    first = [ids[:, :_FIRST], ids[:, _FIRST:]] if cut else [ids]
    pieces = [*first, *(tokens[:, [step]] for step in range(tokens.shape[1] - 1))]
    seen = 0
    for piece in pieces:
        seen += piece.shape[1]
        attended = np.concatenate(
            [mask, np.ones((len(mask), max(0, seen - mask.shape[1])), mask.dtype)], axis=1
        )
        attended = attended[:, :seen]
        feeds = {"input_ids": piece, "attention_mask": attended, **past}
        if source.decoder.takes_positions:
            positions = np.maximum(attended.cumsum(axis=1) - 1, 0)
            feeds["position_ids"] = positions[:, -piece.shape[1] :]
        feeds = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        results = dict(zip(names, sessions.run(session, feeds, "generation"), strict=True))
        past = {slot.past: results[slot.present] for slot in source.slots}
        if seen >= ids.shape[1]:
            yield results["logits"][:, -1].astype(np.float32)


def _nothing(batch: int) -> dict[str, int]:
    return {"batch": batch, "sequence": 1, "past_sequence": 0}


def _whole_text(source: PastSource, ids: np.ndarray, mask: np.ndarray, tokens: np.ndarray) -> samples.Run:
    """All tokens at once, in which a router may have flipped."""
    ids = np.concatenate([ids, tokens], axis=1)
    attended = np.concatenate([mask, np.ones((len(ids), ids.shape[1] - mask.shape[1]), mask.dtype)], axis=1)
    sizes = {"batch": len(ids), "sequence": ids.shape[1], "past_sequence": 0}
    return source.interface.run("the generated text", _text(source, ids, attended), sizes)


def _text(source: PastSource, ids: np.ndarray, mask: np.ndarray) -> dict[str, torch.Tensor]:
    """Inputs without a past."""
    inputs = source.interface.draw({"batch": len(ids), "sequence": ids.shape[1], "past_sequence": 0})
    inputs |= {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    if "position_ids" in inputs:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return inputs

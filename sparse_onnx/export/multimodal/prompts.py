"""Token ids with places for images and sound, and the positions that go with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_onnx.export.multimodal.media import Media


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Some sequences, padded on the left: `input_ids` and `attention_mask` `[batch, sequence]`, and how many pieces of
    each kind of media they hold."""

    input_ids: Tensor
    attention_mask: Tensor
    pieces: Mapping[str, int]

    def types(self, tokens: Mapping[str, int]) -> Tensor:
        """0 for text, 1 for an image, 3 for sound, as transformers' processors number them."""
        kinds = torch.zeros_like(self.input_ids)
        for kind, token in tokens.items():
            kinds[self.input_ids == token] = 1 if kind == "image" else 3
        return kinds

    @property
    def positions(self) -> Tensor:
        return (self.attention_mask.cumsum(1) - 1).clamp(min=0)


def prompt(
    config: Any,
    media: Sequence[Media],
    lengths: Mapping[str, int],
    texts: Sequence[Mapping[str, int]],
    seed: int = 0,
) -> Prompt:
    """Sequences of text with pieces of media in it.

    Args:
        config: the model's.
        media: what it takes.
        lengths: tokens of one piece, by kind.
        texts: a sequence each: how many pieces of each kind.
        seed: of the text.
    """
    generator = torch.Generator().manual_seed(seed)
    ordinary = plain_ids(config)
    rows = []
    for number, pieces in enumerate(texts):
        row: list[int] = []
        for each in media:
            for _ in range(pieces.get(each.kind, 0)):
                row += [*_some(ordinary, 2 + number, generator), *[each.token] * lengths[each.kind]]
        rows.append(row + _some(ordinary, 3 + number, generator))
    longest = max(map(len, rows))
    ids = torch.tensor([[ordinary[0]] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    total = {each.kind: sum(pieces.get(each.kind, 0) for pieces in texts) for each in media}
    return Prompt(ids, mask, total)


def plain_ids(config: Any) -> list[int]:
    """Ids of the vocabulary that stand for nothing but text."""
    text = config.get_text_config()
    special: set[Any] = set()
    for place in (config, text):
        for name, value in vars(place).items():
            if name.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, list) else [value])
    return [token for token in range(int(text.vocab_size)) if token not in special]


def _some(ordinary: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    drawn = torch.randint(len(ordinary), (count,), generator=generator)
    return [ordinary[index] for index in drawn.tolist()]

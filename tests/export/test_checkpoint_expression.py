"""What transformers does to a checkpoint, noted and read slice by slice, gives what torch gives at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparse_onnx.export.checkpoint import expression, tensors
from sparse_onnx.export.checkpoint.expression import Leaf, take, value
from sparse_onnx.export.checkpoint.index import read_index
from sparse_onnx.export.checkpoint.stored import Stored, recording
from sparse_onnx.graph.external import read_array

E, R, C = 4, 6, 10
Made = Callable[..., Tensor]

#: Of E gates and E ups `[R, C]`, and one packed tensor `[E, R, C]`.
RECIPES: dict[str, Made] = {
    "stack": lambda gates, ups, packed: torch.stack(gates),
    "gate and up": lambda gates, ups, packed: torch.cat([torch.stack(gates), torch.stack(ups)], dim=1),
    "side by side": lambda gates, ups, packed: torch.cat([torch.stack(gates), torch.stack(ups)], dim=-1),
    "one behind the other": lambda gates, ups, packed: torch.cat([*gates, *ups]),
    "other type": lambda gates, ups, packed: torch.cat([torch.stack(gates), torch.stack(ups)], dim=1).half(),
    "type before": lambda gates, ups, packed: torch.stack([gate.to(torch.bfloat16) for gate in gates]),
    "transposed": lambda gates, ups, packed: packed.transpose(1, 2).contiguous(),
    "transposed stack": lambda gates, ups, packed: torch.stack(gates).transpose(-1, -2).contiguous(),
    "first axis moved": lambda gates, ups, packed: packed.transpose(0, 1).contiguous(),
    "permuted": lambda gates, ups, packed: packed.permute(0, 2, 1).contiguous(),
    "stack inside": lambda gates, ups, packed: torch.stack(gates, dim=1),
    "interleaved": lambda gates, ups, packed: torch.stack([torch.stack(gates), torch.stack(ups)], 2).flatten(
        1, 2
    ),
    "a chunk": lambda gates, ups, packed: torch.chunk(packed, 2, dim=1)[1].contiguous(),
    "rows of a chunk": lambda gates, ups, packed: torch.chunk(packed, 2)[1],
    "sizes": lambda gates, ups, packed: torch.split(packed, [3, 7], dim=-1)[1].contiguous(),
    "a part": lambda gates, ups, packed: packed[:, 1:5, ::2],
    "some of the first": lambda gates, ups, packed: packed[1:3],
    "one": lambda gates, ups, packed: packed[-1],
    "unbound": lambda gates, ups, packed: torch.stack(packed.unbind()[::-1]),
    "reshaped": lambda gates, ups, packed: packed.reshape(E, R // 2, 2, C),
    "merged": lambda gates, ups, packed: packed.reshape(E * R, C),
    "computed": lambda gates, ups, packed: packed * 2 + torch.stack(ups),
    "flat": lambda gates, ups, packed: gates[0].flatten(),
}


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        f"{kind}.{at}": torch.randn(R, C, generator=generator) for kind in ("gate", "up") for at in range(E)
    }
    made["packed"] = torch.randn(E, R, C, generator=generator)
    save_file(made, tmp_path / "model.safetensors")
    return made


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(
    name: str, stored: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "PIECE_BYTES", 100)
    lazy = {key: Stored(Leaf(entry)) for key, entry in read_index(tmp_path).items()}

    def made(of: dict[str, Tensor]) -> Tensor:
        return RECIPES[name](
            [of[f"gate.{at}"] for at in range(E)], [of[f"up.{at}"] for at in range(E)], of["packed"]
        )

    expected = made(stored)
    with recording():
        noted = made(lazy)
    assert isinstance(noted, Stored) and (noted.shape, noted.dtype) == (expected.shape, expected.dtype)
    found = noted.expression
    assert torch.equal(value(found), expected)
    size = len(expected)
    for at in range(size):
        assert torch.equal(value(take(found, at)), expected[at])
    for span in (slice(0, size), slice(1, size - 1), slice(size - 1, size), slice(1, 1)):
        assert torch.equal(value(take(found, span)), expected[span])
    tensor = tensors.tensor_of(found, "t")
    array = tensors.array_of(expected)
    assert tensor.dtype.numpy() == array.dtype
    assert np.array_equal(read_array(tensor), array) and tensor.tobytes() == array.tobytes()


def test_a_linear_layer_in_blocks(
    stored: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = {key: Stored(Leaf(entry)) for key, entry in read_index(tmp_path).items()}
    monkeypatch.setattr("sparse_onnx.export.checkpoint.stored.BLOCK_BYTES", 2 * C * 4)
    read: list[tuple[int, ...]] = []
    plain = expression._mapped
    monkeypatch.setattr(expression, "_mapped", lambda entry: read.append(entry.shape) or plain(entry))
    x, bias = torch.randn(3, C), torch.randn(R)
    for of_bias in (None, bias):
        expected = torch.nn.functional.linear(x, stored["gate.0"], of_bias)
        actual = torch.nn.functional.linear(x, lazy["gate.0"], of_bias)
        assert torch.allclose(actual, expected, atol=1e-6) and type(actual) is Tensor
    assert read == [(2, C)] * 6


def test_an_embedding_reads_its_rows_in_the_stored_type(stored: dict[str, Tensor], tmp_path: Path) -> None:
    lazy = Stored(Leaf(read_index(tmp_path)["gate.1"])).to(torch.float64)
    ids = torch.tensor([[5, 0, 5]])
    actual = torch.nn.functional.embedding(ids, lazy)
    assert torch.equal(actual, stored["gate.1"].double()[ids]) and type(actual) is Tensor


def test_weights_are_not_written_to(stored: dict[str, Tensor], tmp_path: Path) -> None:
    from sparse_onnx.core.errors import ImpossibleError

    weight = Stored(Leaf(read_index(tmp_path)["gate.0"]))
    with pytest.raises(ImpossibleError, match="changed in place"):
        weight.add_(1)
    joined = torch.cat([weight, torch.zeros(1, C)])
    joined += 1
    assert torch.equal(joined[:R], stored["gate.0"] + 1)

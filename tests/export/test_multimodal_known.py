"""What an image's size alone decides is a constant of the trace."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from sparse_onnx.export.multimodal import known  # noqa: E402

GRID = torch.tensor([[1, 2, 3], [1, 1, 2]])


class Packed(torch.nn.Module):
    """Images of several sizes in one tensor, as vision encoders split it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        with known.factories():
            grid = known.known(GRID) * torch.tensor([1, 1, 1])
            image = torch.repeat_interleave(torch.arange(1, 3), grid.prod(-1))
            parts = torch.split(pixels, grid.prod(-1).tolist())
            return known.unknown(torch.cat([self.linear(part) for part in parts]) + image[:, None])


def test_a_trace_follows_python_that_reads_the_grid() -> None:
    module, pixels = Packed(), torch.randn(8, 4)
    program = torch.export.export(module, (pixels,), strict=False)
    other = torch.randn(8, 4)
    torch.testing.assert_close(program.module()(other), module(other))
    assert [list(node.args[1]) for node in program.graph.nodes if "split" in str(node.target)] == [[6, 2]]


def test_without_knowledge_it_cannot() -> None:
    class Unknown(torch.nn.Module):
        def forward(self, pixels: torch.Tensor, grid: torch.Tensor) -> Any:
            return torch.cat([part + 1 for part in torch.split(pixels, grid.prod(-1).tolist())]).sum()[
                None
            ] + len(range(int(grid[0, 0])))

    with pytest.raises(Exception, match=r"data-dependent|Data|symbol|unbacked"):
        torch.export.export(Unknown(), (torch.randn(8, 4), GRID), strict=False)


def test_what_meets_another_tensor_is_no_longer_known() -> None:
    with known.factories():
        size = torch.arange(3)
        assert isinstance(size, known.Known) and isinstance(size + 1, known.Known)
        assert not isinstance(size + torch.zeros(3), known.Known)
        assert type(known.unknown([size])[0]) is torch.Tensor


def test_writing_something_unknown_into_it_is_refused() -> None:
    size = known.known(GRID)
    with pytest.raises(NotImplementedError, match="written into"):
        size[0] = torch.zeros(3, dtype=torch.int64)
    assert GRID[0].tolist() == [1, 2, 3]


def test_what_vmap_takes_as_it_is_enters_a_trace() -> None:
    """transformers' masks are made by `vmap`, which asks no tensor what it is."""

    class Masked(torch.nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            with known.factories():
                mask = torch.vmap(lambda place: torch.ones((), dtype=torch.bool))(torch.arange(4)[:2])
                return states * mask

    states = torch.randn(1, 2)
    program = torch.export.export(Masked(), (states,), strict=False)
    torch.testing.assert_close(program.module()(states), states)

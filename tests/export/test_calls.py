"""What a module keeps between calls: it is left as it was, and refused where its next answer differs."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

import sparse_onnx  # noqa: E402
from sparse_onnx.core.errors import ImpossibleError  # noqa: E402
from sparse_onnx.export import calls, sources  # noqa: E402


class Counts(nn.Module):
    """Statistics that no answer depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(3))
        self.steps, self.last, self.seen = 0, None, []

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.last = x.argmax(-1)
        self.seen.append(x.shape[0])
        self.load += torch.bincount(self.last, minlength=3)  # type: ignore[operator]
        return x * 2


class Balances(Counts):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.load  # type: ignore[operator]


class CountsCalls(Counts):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (1 + self.steps)


class GrowsCache(nn.Module):
    """A table that grows with the longest input: another state, the same answer."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = torch.zeros(0, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.positions.shape[0] < x.shape[0]:
            self.positions = torch.arange(float(x.shape[0]))[:, None].expand(-1, 3)
        return x + self.positions[: x.shape[0]]


def case(module: nn.Module) -> tuple[nn.Module, Tensor, dict[str, dict[int, str]]]:
    return module.eval(), torch.randn(5, 3), {"x": {0: "tokens"}}


def test_the_module_is_as_it_was(tmp_path: Path) -> None:
    module = Counts()
    report = sparse_onnx.export(case(module), tmp_path / "out.onnx")
    assert report.verify is not None and report.verify.passed
    assert (module.steps, module.last, module.seen) == (0, None, [])
    assert module.load.tolist() == [0, 0, 0]  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("kind", [Balances, CountsCalls])
def test_a_model_with_a_memory_is_refused(kind: type[nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ImpossibleError, match="answers the same input otherwise") as caught:
        sparse_onnx.export(case(kind()), tmp_path / "out.onnx")
    assert "the buffer 'load'" in caught.value.message


def test_a_cache_that_grows_is_none() -> None:
    calls.refuse_memory(sources.of_objects(case(GrowsCache())))


def test_a_lazy_module_keeps_the_weights_of_its_first_call() -> None:
    module, x, _ = case(nn.Sequential(nn.LazyLinear(4), nn.ReLU()))
    source = sources.of_objects((module, x))
    torch.testing.assert_close(source.forward({"input": x}), source.forward({"input": x}))

"""Conditional parts as torch exports them: torch.where over an exit, a tower, a mask of tokens; torch.cond."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from executed import executed
from harness import Feeds, check_rewrite, run_model

from sparse_onnx.optimize import runner
from sparse_onnx.passes.branch_conditions import BranchConditions

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

WIDTH = 16
#: Nearly all of the time is torch's exporter.
pytestmark = pytest.mark.slow


class Layer(nn.Module):
    """Attention of one head and a feed-forward network, with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
        scores = (query @ key.transpose(-1, -2) / WIDTH**0.5).softmax(-1)
        x = x + scores @ value
        return x + self.second(torch.nn.functional.gelu(self.first(x)))


class EarlyExit(nn.Module):
    """The most confident word of each depth decides whether the next one is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 5) for _ in range(3))

    def forward(self, x: Tensor, bound: Tensor) -> Tensor:
        logits = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = layer(x)
            logits.append(head(x))
        y = logits[-1]
        for early in reversed(logits[:-1]):
            y = torch.where(early[:, -1].softmax(-1).max() > bound, early, y)
        return y


class FrozenTokens(nn.Module):
    """Tokens that are sure stay as they are: each layer is for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, bound: Tensor) -> Tensor:
        for layer in self.layers:
            done = (self.head(x).softmax(-1).amax(-1, keepdim=True) > bound).all(1, keepdim=True)
            x = torch.where(done, x, layer(x))
        return x


class AbsentImage(nn.Module):
    """Patches of an image stand before the text, where there is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.tower, self.body = Layer(), Layer()
        self.nothing = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, image: Tensor, has_image: Tensor) -> Tensor:
        seen = self.tower(self.patches(image).flatten(2).transpose(1, 2))
        seen = torch.where(has_image, seen, self.nothing)
        return self.body(torch.cat([seen, x], 1))


class MixtureOfDepths(nn.Module):
    """A router decides for each token whether it takes the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.layer = nn.Linear(WIDTH, 1), Layer()

    def forward(self, x: Tensor, bound: Tensor) -> Tensor:
        return torch.where(self.router(x) > bound, self.layer(x), x)


def exported(module: nn.Module, inputs: dict[str, Tensor], dynamic: dict[str, Any]) -> ir.Model:
    """As `optimize` has it when it recognises."""
    torch.manual_seed(0)
    buffer = io.BytesIO()
    program = torch.onnx.export(
        module.eval(), kwargs=inputs, dynamic_shapes=dynamic, dynamo=True, optimize=True, verbose=False
    )
    program.save(buffer)
    model = ir.from_proto(onnx.load_from_string(buffer.getvalue()))
    prepare = [item for item in runner.plan(["grouped"]) if item.step.phase == "prepare"]
    runner.run(model, prepare)
    return model


def work(model: ir.Model, feeds: Feeds) -> int:
    ran = executed(model, feeds)
    return ran["MatMul"] + ran["Gemm"] + ran["Conv"]


def tokens(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(0))


LENGTHS = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}


def bounds(*values: float) -> list[Feeds]:
    return [{"x": tokens().numpy(), "bound": np.asarray(value, np.float32)} for value in values]


def test_early_exit() -> None:
    module = EarlyExit()
    model = exported(module, {"x": tokens(), "bound": torch.tensor(0.5)}, {"x": LENGTHS, "bound": {}})
    feeds = bounds(0.0, 2.0)
    after, outcome = check_rewrite(model, BranchConditions(), rewritten=2, feeds=feeds, tolerance=1e-5)
    assert not outcome.refusals
    first, all_three = (work(after, each) for each in feeds)
    assert first * 3 == all_three == work(model, feeds[0])


def test_tokens_that_are_frozen() -> None:
    model = exported(FrozenTokens(), {"x": tokens(), "bound": torch.tensor(0.5)}, {"x": LENGTHS, "bound": {}})
    feeds = bounds(0.0, 2.0, 0.25)
    after, outcome = check_rewrite(model, BranchConditions(), rewritten=3, feeds=feeds, tolerance=1e-5)
    assert not outcome.refusals
    none, every, _ = (work(after, each) for each in feeds)
    assert none == 3 and every == work(model, feeds[0])


def test_an_image_that_is_absent() -> None:
    inputs = {"x": tokens(), "image": torch.randn(2, 3, 8, 8), "has_image": torch.tensor(True)}
    dynamic = {"x": LENGTHS, "image": {0: LENGTHS[0]}, "has_image": {}}
    model = exported(AbsentImage(), inputs, dynamic)
    feeds = [{name: value.numpy() for name, value in inputs.items()} for _ in range(2)]
    feeds[1]["has_image"] = np.asarray(False)
    after, outcome = check_rewrite(model, BranchConditions(), rewritten=1, feeds=feeds, tolerance=1e-5)
    assert not outcome.refusals
    assert executed(after, feeds[0])["Conv"] == 1 and executed(after, feeds[1])["Conv"] == 0
    assert work(after, feeds[0]) == work(model, feeds[0]) == 2 * work(after, feeds[1]) + 1


def test_a_mixture_of_depths() -> None:
    module = MixtureOfDepths()
    model = exported(module, {"x": tokens(), "bound": torch.tensor(0.5)}, {"x": LENGTHS, "bound": {}})
    feeds = bounds(-9.0, 0.0, 9.0)
    after, outcome = check_rewrite(model, BranchConditions(), rewritten=1, feeds=feeds, tolerance=1e-5)
    assert not outcome.refusals
    assert [work(after, each) for each in feeds] == [work(model, feeds[0])] * 2 + [1]


def test_one_decoder_step() -> None:
    """Of one token in all, a mask decides as a condition does."""
    model = exported(
        MixtureOfDepths(), {"x": tokens(1, 1), "bound": torch.tensor(0.5)}, {"x": {}, "bound": {}}
    )
    feeds = [each | {"x": tokens(1, 1).numpy()} for each in bounds(-9.0, 9.0)]
    after, _ = check_rewrite(model, BranchConditions(), rewritten=1, feeds=feeds, tolerance=1e-5)
    assert work(after, feeds[1]) == 1
    assert not any(node.op_type == "Where" for node in after.graph)


def test_a_branch_of_torch_is_one_already() -> None:
    class Cond(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, x: Tensor, bound: Tensor) -> Tensor:
            return torch.cond(x.max() > bound, lambda x: self.layer(x), lambda x: x.clone(), (x,))

    model = exported(Cond(), {"x": tokens(), "bound": torch.tensor(0.5)}, {"x": LENGTHS, "bound": {}})
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    check_rewrite(model, BranchConditions(), rewritten=0)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    run_model(model, bounds(9.0)[0])

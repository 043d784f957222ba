"""Forwards that stand in for transformers' own compute the same, for every length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from sparse_onnx.bench.coverage import exporters, registry, tiny  # noqa: E402
from sparse_onnx.bench.coverage.cases import Made  # noqa: E402
from sparse_onnx.export import patches, samples  # noqa: E402
from sparse_onnx.export.sources import Source, leaves  # noqa: E402

CLASSES = {
    "deepseek_v4": {"DeepseekV4CSACompressor", "DeepseekV4HCACompressor", "DeepseekV4Indexer"},
    "qwen4_exp_text": {"Qwen4ExpTextAttention", "Qwen4ExpTextQSAIndexer"},
    "glm5_next": {"Glm5NextTextIndexer"},
    "jamba": {"JambaMambaMixer"},
    "minimax": {"MiniMaxLightningAttention"},
}


def load(name: str, folder: Path) -> Source:
    found = {each.name: each for each in registry.architectures()}
    if name not in found:
        pytest.skip(f"this transformers has no {name}")
    return exporters.load(Made(str(tiny.write(found[name], folder / name)), {"random_weights": True}))


@pytest.mark.parametrize("name", CLASSES)
def test_the_other_forward_is_the_same_function(name: str, tmp_path: Path) -> None:
    source = load(name, tmp_path)
    kinds = {type(module): type(module).forward for module in source.module.modules()}
    for run in [*samples.untraced(source.interface), samples.long(source.interface)]:
        expected = leaves(source.forward(run.inputs))[0]
        with patches.replaced(source.module) as names, torch.no_grad():
            actual = leaves(source.forward(run.inputs))[0]
        assert set(names) == CLASSES[name]
        keep = run.inputs["attention_mask"].bool()
        np.testing.assert_allclose(
            actual[keep].numpy(), expected[keep].numpy(), rtol=0, atol=2e-5 * float(expected.abs().max())
        )
    assert all(kind.forward is forward for kind, forward in kinds.items())


def test_random_models_are_the_same_each_time(tmp_path: Path) -> None:
    """Decays of linear attention too, which transformers draws itself."""
    first, second = (load("qwen3_next", tmp_path / each) for each in "ab")
    for (name, left), right in zip(first.module.named_parameters(), second.module.parameters(), strict=True):
        assert torch.equal(left, right), name

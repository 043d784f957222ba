"""A model whose `generate` computes the text anew once: exported with a note, and compared up to there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import sparse_onnx  # noqa: E402
from sparse_onnx.bench.coverage import registry, tiny  # noqa: E402
from sparse_onnx.export.past import generation, recomputed  # noqa: E402

LENGTH = 16


def folder(name: str, path: Path) -> Path:
    found = {each.name: each for each in registry.architectures()}
    place = tiny.write(found[name], path / name)
    config = json.loads((place / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": LENGTH,
        "short_factor": [1.0 + 0.05 * at for at in range(8)],
        "long_factor": [1.5 + 0.2 * at for at in range(8)],
        "short_mscale": 1.1,
        "long_mscale": 1.3,
    }
    config["original_max_position_embeddings"] = LENGTH
    (place / "config.json").write_text(json.dumps(config))
    return place


def model(name: str, path: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder(name, path))
    return transformers.AutoModelForCausalLM.from_config(config)


def test_after_how_many_tokens(tmp_path: Path) -> None:
    changed = model("phimoe", tmp_path)
    assert recomputed.forgets_after(changed) == LENGTH
    assert f"beyond {LENGTH} tokens" in recomputed.note(changed)[0]
    assert recomputed.forgets_after(model("mixtral", tmp_path)) is None
    changed.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    assert recomputed.forgets_after(changed) is None and recomputed.note(changed) == ()


def test_tokens_that_are_compared(tmp_path: Path) -> None:
    class Source:
        module = model("phimoe", tmp_path)
        interface = type("Interface", (), {"longest": None})

    source: Any = Source()
    assert generation._count(source, 5) == 12  # the step at which sixteen tokens are known is the last
    assert generation._count(source, 17) == 32


@pytest.mark.slow
def test_exported_with_a_note(tmp_path: Path) -> None:
    place = folder("phimoe", tmp_path)
    report = sparse_onnx.export(place, tmp_path / "out.onnx", random_weights=True, past=True)
    assert report.verify is not None and report.verify.passed
    assert any(f"beyond {LENGTH} tokens" in note for note in report.notes)
    assert any("11 greedy tokens" in name for name in report.verify.inputs)

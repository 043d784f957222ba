"""`export(past=True)` of encoder-decoders: two files, which translate as torch does."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import adapted_families  # noqa: E402
from architectures import write_config  # noqa: E402
from generating import padded  # noqa: E402

import sparse_onnx  # noqa: E402
from sparse_onnx.core.errors import UsageError  # noqa: E402
from sparse_onnx.export import check, past, samples, sources  # noqa: E402
from sparse_onnx.graph import io  # noqa: E402

TEXTS = ([[5, 6, 7, 8, 9]], [[11, 90, 3], [40, 2, 77, 31, 8, 1]])
TOKENS = 32
START = 0


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model in torch, and both files before and after `optimize`."""

    folder: Path
    plain: Path
    fast: Path
    report: sparse_onnx.Report

    def module(self) -> torch.nn.Module:
        return transformers.AutoModelForSeq2SeqLM.from_pretrained(self.folder / "model").eval()


def _exported(name: str, folder: Path) -> Exported:
    """With weights whose answer is more than one token over and over, and no token that ends it."""
    ends = {"eos_token_id": None, "decoder_start_token_id": START}
    if name == "t5":
        config = write_config(name, folder / "config", **ends)
    else:
        config = folder / "config"
        adapted_families.config(name, **ends).save_pretrained(config)
    module = sources.resolve(str(config), random_weights=True).module
    module.generation_config = transformers.GenerationConfig(pad_token_id=0, decoder_start_token_id=START)
    module.save_pretrained(folder / "model")
    plain, fast = folder / "plain", folder / "fast"
    plain.mkdir()
    fast.mkdir()
    report = sparse_onnx.export(folder / "model", plain / "decoder_model.onnx", past=True)
    for file in (past.ENCODER, "decoder_model.onnx"):
        sparse_onnx.optimize(plain / file, fast / file)
    return Exported(folder, plain, fast, report)


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return _exported("switch", tmp_path_factory.mktemp("switch"))


def by_torch(module: torch.nn.Module, texts: Sequence[Sequence[int]]) -> list[list[int]]:
    ids, mask = padded(texts)
    with torch.no_grad():
        tokens = module.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            do_sample=False,
            max_new_tokens=TOKENS,
            use_cache=True,
        )
    return tokens[:, 1:].tolist()


def by_onnxruntime(folder: Path, texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Knows nothing but names and shapes. The encoder's states are given once only: later they are rubbish, which
    nothing reads."""
    sessions = [
        onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        for name in (past.ENCODER, "decoder_model.onnx")
    ]
    encoder, decoder = sessions
    ids, mask = padded(texts)
    (hidden,) = encoder.run(None, {"input_ids": ids, "attention_mask": mask})
    free = {"batch": len(ids), "past_sequence": 0, "cached_encoder_sequence": 0}
    cache = {
        value.name: np.zeros([free.get(size, size) for size in value.shape], np.float32)
        for value in decoder.get_inputs()
        if value.name.startswith("past")
    }
    new, chosen = np.full((len(ids), 1), START), []
    while len(chosen) < TOKENS:
        feeds = {"input_ids": new, "encoder_hidden_states": hidden, "encoder_attention_mask": mask}
        logits, *presents = decoder.run(None, feeds | cache)
        new = logits[:, -1:].argmax(axis=-1)
        chosen.append(new)
        cache = dict(zip(cache, presents, strict=True))
        hidden = np.full_like(hidden, np.nan)
    return np.concatenate(chosen, axis=1).tolist()


def _check(exported: Exported) -> None:
    module = exported.module()
    for texts in TEXTS:
        expected = by_torch(module, texts)
        assert by_onnxruntime(exported.plain, texts) == expected
        assert by_onnxruntime(exported.fast, texts) == expected
    record = exported.report.verify
    assert record is not None and record.passed and record.max_rel_error < 1e-5
    assert record.inputs[-2:] == ["1 prompt, 32 greedy tokens", "2 prompts, 32 greedy tokens"]
    assert {"encoder 1x1", "3x1 after 0 from 9", "2x4 after 5 from 13 padded"} <= set(record.inputs)
    assert not (exported.plain / "genai_config.json").exists()


def test_switch_translates(switch: Exported) -> None:
    _check(switch)
    names = [block.name for block in switch.report.blocks]
    assert names == ["encoder.block.1.layer.1.mlp.experts", "decoder.block.1.layer.2.mlp.experts"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nllb", "t5"])
def test_each_family_translates(name: str, tmp_path: Path) -> None:
    exported = _exported(name, tmp_path)
    _check(exported)
    assert len(exported.report.blocks) == (2 if name == "nllb" else 0)


def test_the_names_are_those_of_optimum(switch: Exported) -> None:
    encoder, decoder = (io.load(switch.plain / name) for name in (past.ENCODER, "decoder_model.onnx"))
    assert [value.name for value in encoder.graph.inputs] == ["input_ids", "attention_mask"]
    assert [value.name for value in encoder.graph.outputs] == ["last_hidden_state"]
    shapes = {value.name: [str(size) for size in value.shape] for value in decoder.graph.inputs}
    assert set(shapes) == {"input_ids", "encoder_attention_mask", "encoder_hidden_states"} | {
        f"past_key_values.{layer}.{side}.{kind}"
        for layer in (0, 1)
        for side in ("decoder", "encoder")
        for kind in ("key", "value")
    }
    assert shapes["past_key_values.1.decoder.key"] == ["batch", "4", "past_sequence", "8"]
    assert shapes["past_key_values.1.encoder.value"] == ["batch", "4", "cached_encoder_sequence", "8"]
    outputs = {value.name: [str(size) for size in value.shape] for value in decoder.graph.outputs}
    assert outputs["present.1.encoder.value"] == ["batch", "4", "encoder_sequence", "8"]


def test_a_step_computes_no_keys_of_the_encoder_anew(switch: Exported) -> None:
    """With the rows that are cached cut off before their products, not behind them."""
    graph = io.load(switch.plain / "decoder_model.onnx").graph
    states = next(value for value in graph.inputs if value.name == "encoder_hidden_states")
    assert {node.op_type for node in states.consumers()} <= {"Slice", "Shape"}
    assert sum(node.op_type == "Slice" for node in states.consumers()) >= 1


def test_wrong_caches_are_caught(switch: Exported, tmp_path: Path) -> None:
    """Keys of the encoder's and of another layer's tokens in each other's place."""
    source = past.with_past(sources.resolve(str(switch.folder / "model")))
    runs = samples.untraced(source.interface)
    assert check.compare(switch.plain / "decoder_model.onnx", source, [], runs, tolerance=1e-4).passed
    model = io.load(switch.plain / "decoder_model.onnx")
    inputs = {value.name: value for value in model.graph.inputs}
    first, second = (inputs[f"past_key_values.{layer}.encoder.key"] for layer in (0, 1))
    first.name, second.name = second.name, first.name
    io.save(model, tmp_path / "swapped.onnx")
    swapped = {run.name: run for run in runs}
    for name, passed in (("3x1 after 0 from 9", True), ("1x1 after 8 from 12", False)):
        record = check.compare(tmp_path / "swapped.onnx", source, [], [swapped[name]], tolerance=1e-4)
        assert record.passed is passed


def test_the_sample_of_the_documentation(
    switch: Exported, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
    (tmp_path / "translate").symlink_to(switch.fast)
    with contextlib.chdir(tmp_path):
        exec(code, {})
    (expected,) = by_torch(switch.module(), [[5, 6, 7, 8, 9]])
    assert json.loads(capsys.readouterr().out) == expected


def test_another_models_encoder_is_not_overwritten(switch: Exported, tmp_path: Path) -> None:
    (tmp_path / past.ENCODER).write_text("another model")
    for name in ("decoder_model.onnx", past.ENCODER):
        with pytest.raises(UsageError):
            sparse_onnx.export(switch.folder / "model", tmp_path / name, past=True)
    assert [path.name for path in tmp_path.iterdir()] == [past.ENCODER]
    with pytest.raises(UsageError, match="cannot stay in their files"):
        sparse_onnx.export(switch.folder / "model", switch.plain / "other.onnx", past=True, stream=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str, switch: Exported, tmp_path: Path) -> None:
    report = sparse_onnx.export(switch.folder / "model", tmp_path / "half.onnx", dtype=dtype, past=True)
    assert report.verify is not None and report.verify.passed
    assert report.verify.inputs[-1].startswith("2 prompts, 32 greedy tokens")

"""Streamed exports against ordinary ones: the same bits, from checkpoints as their authors publish them."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from architectures import write_config
from safetensors.torch import load_file, save_file

import sparse_onnx
from sparse_onnx.core.errors import SparseOnnxError, UsageError, VerificationError
from sparse_onnx.export import hugging_face, random_weights
from sparse_onnx.export.checkpoint import expression, streamed, tensors
from sparse_onnx.export.checkpoint import load as loading
from sparse_onnx.export.checkpoint.expression import value
from sparse_onnx.export.checkpoint.stored import Stored, widened
from sparse_onnx.graph import io
from sparse_onnx.graph.external import read_array
from sparse_onnx.graph.stacked import pieces
from sparse_onnx.targets import session as sessions

#: Checkpoints in which one expert is one tensor.
PER_EXPERT = ("mixtral", "qwen3_moe", "deepseek_v3")
LOADED = (*PER_EXPERT, "qwen2_moe", "olmoe", "gpt_oss", "phimoe", "granitemoe", "nemotron_h")


@functools.cache
def _model(name: str, folder: Path, changes: tuple[tuple[str, Any], ...]) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(write_config(name, folder / name, **dict(changes)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, config.architectures[0])(config)
    random_weights.fill(model)
    return model.eval()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def write_checkpoint(
    name: str, models: Path, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Several shards, experts apart where the architecture's own checkpoints have them so."""
    model = copy.deepcopy(_model(name, models, tuple(changes.items()))).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def load(folder: Path, stream: bool, dtype: torch.dtype | None = None) -> torch.nn.Module:
    module, _, _ = hugging_face.load(
        str(folder),
        random_weights=False,
        dtype=dtype,
        trust_remote_code=False,
        allow_pickle=False,
        stream=stream,
    )
    return module


def stored_names(folder: Path) -> list[str]:
    return [name for shard in sorted(folder.glob("*.safetensors")) for name in load_file(shard)]


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize(("stored", "wanted"), [(torch.float32, None), (torch.bfloat16, torch.float32)])
def test_every_weight_is_the_one_that_transformers_loads(
    name: str, stored: torch.dtype, wanted: torch.dtype | None, models: Path, tmp_path: Path
) -> None:
    folder = write_checkpoint(name, models, tmp_path, stored)
    if name in PER_EXPERT:
        assert any(".experts.0." in each for each in stored_names(folder))
    ordinary, lazy = load(folder, False, wanted), load(folder, True, wanted)
    expected, actual = ordinary.state_dict(), dict(lazy.named_parameters(remove_duplicate=False))
    assert actual and all(isinstance(each, Stored) for each in actual.values())
    actual |= dict(lazy.named_buffers())
    for key, tensor in expected.items():
        got = actual[key]
        got = value(got.expression) if isinstance(got, Stored) else got
        assert got.dtype == tensor.dtype and torch.equal(got, tensor), key
    for key, buffer in ordinary.named_buffers():
        assert torch.equal(actual[key], buffer), key


@pytest.mark.parametrize("name", LOADED)
def test_the_module_answers_as_if_it_were_loaded(name: str, models: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(name, models, tmp_path, torch.bfloat16)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = load(folder, False).float()(ids).logits
        actual = widened(load(folder, True))(ids).logits
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PER_EXPERT)
def test_written_tensors_are_made_of_pieces_of_one_expert(name: str, models: Path, tmp_path: Path) -> None:
    """What is copied range by range; each piece of an expert lies in the checkpoint as it will in the file."""
    module = load(write_checkpoint(name, models, tmp_path), True)
    packed = {key: p for key, p in module.named_parameters() if key.endswith(("gate_up_proj", "down_proj"))}
    assert packed
    for key, parameter in packed.items():
        tensor = tensors.tensor_of(parameter.expression, key)
        assert all(isinstance(each, ir.ExternalTensor) for each in pieces(tensor))
        assert np.array_equal(read_array(tensor), value(parameter.expression).numpy())


def test_one_expert_is_read_without_the_others(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(write_checkpoint("mixtral", models, tmp_path), True)
    read: list[str] = []
    plain = expression._mapped
    monkeypatch.setattr(expression, "_mapped", lambda entry: read.append(entry.name) or plain(entry))
    module.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[3].sum()
    assert {name.rsplit(".experts.")[1] for name in read} == {"3.w1.weight", "3.w3.weight"}


def same_files(first: Path, second: Path) -> None:
    """Nodes, attributes and every initializer are the same."""
    left, right = io.load(first), io.load(second)
    assert [str(node) for node in left.graph] == [str(node) for node in right.graph]
    assert list(left.graph.initializers) == list(right.graph.initializers)
    for name, value_ in left.graph.initializers.items():
        ours, theirs = value_.const_value, right.graph.initializers[name].const_value
        assert ours is not None and theirs is not None
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.tobytes() == theirs.tobytes(), name


@pytest.mark.parametrize(
    ("name", "dtype", "changes"),
    [
        ("mixtral", torch.float32, {"num_hidden_layers": 1}),
        pytest.param(
            *("qwen3_moe", torch.bfloat16, {"num_hidden_layers": 1, "tie_word_embeddings": True}),
            marks=pytest.mark.slow,
        ),
        pytest.param("deepseek_v3", torch.float32, {}, marks=pytest.mark.slow),
        pytest.param("gpt_oss", torch.float16, {}, marks=pytest.mark.slow),
    ],
)
def test_the_export_is_the_ordinary_one(
    name: str, dtype: torch.dtype, changes: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    folder = write_checkpoint(name, models, tmp_path / "model", dtype, **changes)
    whole = sparse_onnx.export(folder, tmp_path / "whole.onnx", stream=False)
    report = sparse_onnx.export(folder, tmp_path / "streamed.onnx", stream=True)
    same_files(tmp_path / "whole.onnx", tmp_path / "streamed.onnx")
    assert report.verify is not None and whole.verify is not None
    assert report.verify.passed and report.verify.method == "whole"
    assert report.verify.inputs == whole.verify.inputs
    assert any("were never loaded" in note for note in report.notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model",
        "streamed.data",
        "streamed.onnx",
        "whole.data",
        "whole.onnx",
    ]


@pytest.fixture(scope="session")
def checkpoint(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one layer."""
    return write_checkpoint("mixtral", models, tmp_path_factory.mktemp("checkpoint"), num_hidden_layers=1)


def test_with_a_cache(checkpoint: Path, tmp_path: Path) -> None:
    """Compared with its own cache, and configured for onnxruntime-genai; greedy tokens would read all weights each."""
    for name, stream in (("ordinary", False), ("streamed", True)):
        (tmp_path / name).mkdir()
        report = sparse_onnx.export(checkpoint, tmp_path / name / "model.onnx", stream=stream, past=True)
        assert report.verify is not None and report.verify.passed and "1x1 after 8" in report.verify.inputs
        assert any("greedy tokens were not compared" in note for note in report.notes) == stream
        assert (tmp_path / name / "genai_config.json").is_file()
    same_files(tmp_path / "ordinary" / "model.onnx", tmp_path / "streamed" / "model.onnx")


def test_linked_weights_stay_in_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """What the checkpoint has as the graph wants it is named where it lies; packed experts are written."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = sparse_onnx.export(folder, tmp_path / "out.onnx", weights="link")
    assert report.verify is not None and report.verify.passed
    model = io.load(tmp_path / "out.onnx")
    places = {
        name: os.fspath(value_.const_value.location)
        for name, value_ in model.graph.initializers.items()
        if isinstance(value_.const_value, ir.ExternalTensor)
    }
    assert places["model.layers.0.self_attn.q_proj.weight"].startswith("model/model-0000")
    assert places["model.layers.0.mlp.experts.gate_up_proj"] == "out.data"
    written = sum(
        value_.const_value.nbytes
        for name, value_ in model.graph.initializers.items()
        if places.get(name) == "out.data"
    )
    assert (tmp_path / "out.data").stat().st_size < written + 64 * 1024
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.data", "out.onnx"]
    answers = sessions.run(
        sessions.create_session(tmp_path / "out.onnx"),
        {"input_ids": np.arange(6).reshape(1, 6), "attention_mask": np.ones((1, 6), np.int64)},
    )
    with torch.no_grad():
        expected = load(checkpoint, False)(torch.arange(6).reshape(1, 6)).logits
    assert np.allclose(answers[0], expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"stream": True}, {"weights": "link"}])
def test_what_is_no_folder_of_weights_cannot_be_streamed(options: dict[str, Any], tmp_path: Path) -> None:
    for source, more in (
        ("zoo:byte-moe", {}),
        (write_config("mixtral", tmp_path / "m"), {"random_weights": True}),
    ):
        with pytest.raises(UsageError, match="only the weights of a folder of safetensors"):
            sparse_onnx.export(source, tmp_path / "out.onnx", **options, **more)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_weights_elsewhere_cannot_be_linked(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in or below the output's folder"):
        sparse_onnx.export(checkpoint, tmp_path / "out.onnx", weights="link")
    assert not list(tmp_path.iterdir())


def test_a_flipped_byte_is_seen(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = streamed._stage

    def flip(*args: Any) -> Any:
        staged, saved = stage(*args)
        with open(saved.data_path, "r+b") as file:
            file.seek(5000)
            byte = file.read(1)[0]
            file.seek(5000)
            file.write(bytes([byte ^ 1]))
        return staged, saved

    monkeypatch.setattr(streamed, "_stage", flip)
    with pytest.raises(VerificationError, match="other bytes"):
        sparse_onnx.export(checkpoint, tmp_path / "out.onnx", stream=True)
    assert not list(tmp_path.iterdir())


def test_a_weight_in_anothers_place_is_seen(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their bytes are the checkpoint's, and the answers are not torch's."""
    attach = streamed.attach

    def swap(model: ir.Model, table: Any) -> Any:
        attached = attach(model, table)
        first, second = (
            model.graph.initializers[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "kv"
        )
        first.const_value, second.const_value = second.const_value, first.const_value
        return attached

    monkeypatch.setattr(streamed, "attach", swap)
    with pytest.raises(VerificationError, match="differ"):
        sparse_onnx.export(checkpoint, tmp_path / "out.onnx", stream=True)
    assert not list(tmp_path.iterdir())


def test_refusals(checkpoint: Path, models: Path, tmp_path: Path) -> None:
    """Before anything is traced."""
    out = tmp_path / "out.onnx"
    quantized = shutil.copytree(checkpoint, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    short = shutil.copytree(checkpoint, tmp_path / "short")
    names = json.loads((short / "model.safetensors.index.json").read_text())["weight_map"]
    lost = names["model.layers.0.self_attn.q_proj.weight"]
    kept = {
        name: tensor
        for name, tensor in load_file(short / lost).items()
        if "layers.0.self_attn.q_proj" not in name
    }
    save_file(kept, short / lost, metadata={"format": "pt"})
    (short / "model.safetensors.index.json").write_text(
        json.dumps(
            {
                "weight_map": {
                    name: file for name, file in names.items() if "layers.0.self_attn.q_proj" not in name
                }
            }
        )
    )
    reshaped = shutil.copytree(checkpoint, tmp_path / "reshaped")
    (reshaped / "config.json").write_text(json.dumps(config | {"vocab_size": 96}))
    cut = shutil.copytree(checkpoint, tmp_path / "cut")
    (cut / lost).write_bytes((cut / lost).read_bytes()[:-1])
    pickled = write_config("mixtral", tmp_path / "pickled")
    torch.save({}, pickled / "pytorch_model.bin")
    for folder, code, says in (
        (quantized, 5, "quantized"),
        (short, 3, "weights of the model are missing: model.layers.0.self_attn.q_proj.weight"),
        (reshaped, 3, "have other shapes than the configuration says: lm_head.weight"),
        (cut, 3, "end at byte"),
        (pickled, 3, "only a folder of safetensors"),
    ):
        with pytest.raises(SparseOnnxError, match=says) as caught:
            sparse_onnx.export(folder, out, stream=True, allow_pickle=folder == pickled)
        assert caught.value.exit_code == code and str(folder) in str(caught.value)
    assert not out.exists()
    with pytest.raises(UsageError, match="cannot be linked"):
        sparse_onnx.export(checkpoint, out, stream=False, weights="link")


def test_streams_where_memory_does_not_suffice(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    for free, streams in ((2 * size, True), (100 * size, False)):
        monkeypatch.setattr(loading, "available_memory", lambda free=free: free)
        assert (loading.wanted(str(checkpoint), None, None) is not None) == streams
    assert loading.wanted(str(checkpoint), False, None) is None

"""Eight architectures by transformers, from folders as users have them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from architectures import CONFIGS, write_config  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import sparse_onnx  # noqa: E402
from sparse_onnx import blocks  # noqa: E402
from sparse_onnx.core.errors import ImpossibleError, ModelError, OutsideError, SparseOnnxError, UsageError  # noqa: E402
from sparse_onnx.export import check, experts, hugging_face, samples, sources, translate  # noqa: E402
from sparse_onnx.graph import io  # noqa: E402

FAST = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
SPARSE_LAYERS = 2


Exported = tuple[Path, Path]  # a folder with safetensors, and its export
EIGHT = tuple(name for name in CONFIGS if name not in ("lfm2_moe", "nemotron_h", "t5"))
EACH = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in EIGHT]


@pytest.mark.parametrize("name", EACH)
def test_each_layer_is_one_verified_node(name: str, tmp_path: Path) -> None:
    folder, out = write_config(name, tmp_path / name), tmp_path / "out.onnx"
    report = sparse_onnx.export(folder, out, random_weights=True)
    assert report.verify is not None and report.verify.passed and report.verify.runs >= 6
    assert report.verify.max_rel_error is not None and report.verify.max_rel_error < 1e-5
    assert report.verify.tokens_left_out == 0
    assert any("random weights" in note for note in report.notes)
    model = io.load(out)
    assert len(report.blocks) == len(blocks.blocks(model)) == SPARSE_LAYERS
    assert all(
        block.name.endswith(".experts") and block.name.startswith("model.layers.") for block in report.blocks
    )
    shapes = {
        value.name: [str(dim) for dim in value.shape or ()]
        for value in (*model.graph.inputs, *model.graph.outputs)
    }
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "logits": ["batch", "sequence", "97"],
    }
    named = {block.node.inputs[3].name for block in blocks.blocks(model) if block.node.inputs[3] is not None}
    assert named == {f"{block.name}.gate_up_proj" for block in report.blocks}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_experts_without_gate(tmp_path: Path) -> None:
    report = sparse_onnx.export(
        write_config("nemotron_h", tmp_path / "n"), tmp_path / "out.onnx", random_weights=True
    )
    assert [(block.activation, block.gated) for block in report.blocks] == [("relu2", False)]


@pytest.mark.slow
def test_an_encoder_with_a_decoder(tmp_path: Path) -> None:
    report = sparse_onnx.export(
        write_config("t5", tmp_path / "t5"), tmp_path / "out.onnx", random_weights=True
    )
    assert report.verify is not None and report.verify.passed and report.blocks == []
    shapes = {
        value.name: [str(dim) for dim in value.shape or ()]
        for value in io.load(tmp_path / "out.onnx").graph.inputs
    }
    assert shapes["decoder_input_ids"] == ["batch", "decoder_sequence"]


@pytest.mark.parametrize(("name", "expected"), [("mixtral", "MixtralForCausalLM"), ("t5", "T5Model")])
def test_a_configuration_that_names_no_class(name: str, expected: str, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(write_config(name, tmp_path / "config"))
    config.architectures = None
    assert type(hugging_face._model_class(config).from_config(config)).__name__ == expected


def test_an_assertion_that_the_file_lacks_is_a_refusal(mixtral: Exported) -> None:
    folder, out = mixtral
    source = sources.resolve(str(folder))

    def program(**inputs: torch.Tensor) -> None:
        raise AssertionError("u0 == 14")

    with pytest.raises(ImpossibleError, match="input 3x11: u0 == 14"):
        check.compare(out, source, [], samples.untraced(source.interface), tolerance=1e-4, program=program)


def test_gpt_oss_keeps_its_gate_and_layout(tmp_path: Path) -> None:
    module = _model("gpt_oss", tmp_path)
    specs = {entry.spec for entry in experts.find(module)}
    (spec,) = specs
    assert spec is not None
    assert dataclasses.astuple(spec) == (0, 2, 1, 7.0, 1.702, 1.0)


def _model(name: str, folder: Path, **changes: object) -> torch.nn.Module:
    module, _, _ = hugging_face.load(
        str(write_config(name, folder, **changes)),
        random_weights=True,
        dtype=None,
        trust_remote_code=False,
        allow_pickle=False,
    )
    return module


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("mixtral")
    _model("mixtral", folder / "config").save_pretrained(folder / "model")
    sparse_onnx.export(folder / "model", folder / "out.onnx")
    return folder / "model", folder / "out.onnx"


def test_weights_of_the_folder_arrive_untouched(mixtral: Exported) -> None:
    folder, out = mixtral
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    initializers = io.load(out).graph.initializers
    for name, parameter in module.named_parameters():
        tensor = initializers[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), parameter.detach().numpy())


@pytest.mark.parametrize("role", ["fc1", "fc2"])
def test_swapping_two_experts_fails_verification(role: str, mixtral: Exported, tmp_path: Path) -> None:
    folder, out = mixtral
    source = sources.resolve(str(folder))
    found, runs = experts.find(source.module), samples.untraced(source.interface)
    assert check.compare(out, source, found, runs, tolerance=1e-4).passed
    for block in range(SPARSE_LAYERS):
        model = io.load(out)
        weight = blocks.blocks(model)[block].weights[role]
        tensor = ir.convenience.get_const_tensor(weight)
        assert tensor is not None
        array = tensor.numpy().copy()
        array[[1, 2]] = array[[2, 1]]
        weight.const_value = ir.tensor(array, name=weight.name)
        changed = tmp_path / f"swapped{block}.onnx"
        io.save(model, changed)
        record = check.compare(changed, source, found, runs, tolerance=1e-4)
        assert record.passed is False
        assert record.max_rel_error is not None and record.max_rel_error > 1e-2
        assert record.failure is not None and "input 3x11" in record.failure


@pytest.mark.parametrize(("apart", "passes"), [(3e-7, True), (1e-2, False)])
def test_only_near_ties_are_left_out(apart: float, passes: bool, mixtral: Exported, tmp_path: Path) -> None:
    """Experts 1 and 2 score alike in the last layer, and the file has their router rows the other way
    round."""
    folder, out = mixtral
    source = sources.resolve(str(folder))
    name = "model.layers.1.mlp.gate.weight"
    weight = source.module.get_parameter(name)
    with torch.no_grad():
        weight[2] = weight[1] * (1 + apart)
    model = io.load(out)
    model.graph.initializers[name].const_value = ir.tensor(
        weight.detach().numpy()[[0, 2, 1, 3, 4]], name=name
    )
    changed = tmp_path / "tied.onnx"
    io.save(model, changed)
    sizes = {"batch": 16, "sequence": 1}
    runs = [samples.Run("16x1", source.interface.draw(sizes), sizes)]
    record = check.compare(changed, source, experts.find(source.module), runs, tolerance=1e-4)
    assert record.passed is passes
    if passes:
        assert 0 < record.tokens_left_out < 16
        assert record.router_margin is not None and record.router_margin < 1e-5
    else:
        assert record.failure is not None and "chose other experts" in record.failure


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_verified_on_a_float32_twin(dtype: str, mixtral: Exported, tmp_path: Path) -> None:
    folder, _ = mixtral
    out = tmp_path / "half.onnx"
    report = sparse_onnx.export(folder, out, dtype=dtype)
    assert report.verify is not None and report.verify.passed
    assert report.verify.max_rel_error is not None and report.verify.max_rel_error < 1e-5
    assert any(f"widened from {dtype}" in note for note in report.notes)
    model = io.load(out)
    kind = ir.DataType[dtype.upper()]
    assert model.graph.outputs[0].dtype == kind
    for block in blocks.blocks(model):
        assert {value.dtype for value in block.weights.values()} == {kind}
    # Mixtral's router takes its softmax in float32.
    assert {node.inputs[0].dtype for node in model.graph if node.op_type == "TopK" and node.inputs[0]} == {
        ir.DataType.FLOAT
    }
    if dtype == "float16":
        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        ids = np.array([[1, 2, 3]])
        (logits,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        assert logits.dtype == np.float16 and np.isfinite(logits).all()


def test_an_unknown_gate_falls_back_to_transformers_own_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    def softcapped(self: torch.nn.Module, projected: torch.Tensor) -> torch.Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return torch.tanh(self.act_fn(gate)) * up

    monkeypatch.setattr(MixtralExperts, "_apply_gate", softcapped)
    folder = write_config("mixtral", tmp_path / "config")
    report = sparse_onnx.export(folder, tmp_path / "out.onnx", random_weights=True)
    assert report.blocks == [] and report.verify is not None and report.verify.passed
    assert sum("its gate has no neutral form" in note for note in report.notes) == SPARSE_LAYERS


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    module = _model("mixtral", tmp_path)
    module.config.use_cache = True
    module.train()
    config, implementation = module.config.to_dict(), module.get_experts_implementation()
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    attributes = {name: dict(vars(part)) for name, part in module.named_modules()}
    if fails:

        def fail(*args: object, **kwargs: object) -> None:
            raise RuntimeError("no")

        monkeypatch.setattr(translate, "to_onnx", fail)
    with pytest.raises(ImpossibleError) if fails else contextlib.nullcontext():
        ids = torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(0))
        report = sparse_onnx.export((module, {"input_ids": ids}), tmp_path / "out.onnx")
        assert len(report.blocks) == SPARSE_LAYERS
    assert (module.config.to_dict(), module.get_experts_implementation()) == (config, implementation)
    assert "sparse_onnx" not in ALL_EXPERTS_FUNCTIONS
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    for name, part in module.named_modules():
        assert part.training and "forward" not in vars(part) and not part._forward_pre_hooks
        assert vars(part).keys() == attributes[name].keys()


def test_experts_of_sizes_that_transformers_grouped_form_refuses(tmp_path: Path) -> None:
    report = sparse_onnx.export(
        write_config("mixtral", tmp_path / "m", intermediate_size=47),
        tmp_path / "out.onnx",
        random_weights=True,
        dtype="bfloat16",
    )
    assert len(report.blocks) == SPARSE_LAYERS


def test_a_model_that_cannot_run_is_one_line(tmp_path: Path) -> None:
    folder = write_config("mixtral", tmp_path / "m", num_experts_per_tok=9)
    code = "import sys; from sparse_onnx.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "export", str(folder), str(tmp_path / "out.onnx")]
    done = subprocess.run(
        [*command, "--random-weights", "--quiet"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")


def test_random_weights_do_not_depend_on_the_run(tmp_path: Path) -> None:
    first, second = _model("deepseek_v3", tmp_path / "a"), _model("deepseek_v3", tmp_path / "b")
    for (name, one), (_, other) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)
    router = first.model.layers[1].mlp.gate
    assert float(router.weight.detach().std()) == pytest.approx(3 / 32**0.5, rel=0.2)
    assert float(router.e_score_correction_bias.abs().max()) > 0


def _refused(source: Path | str, out: Path, error: type[SparseOnnxError], **settings: object) -> str:
    with pytest.raises(error) as caught:
        sparse_onnx.export(source, out, **settings)
    assert not out.exists() and "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_that_cannot_be_loaded(mixtral: Exported, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "no config.json" in _refused(folder, out, ModelError)
    shutil.copy(mixtral[0] / "config.json", folder)
    assert "--random-weights" in _refused(folder, out, ModelError)
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    _refused(folder, out, ModelError)
    (folder / "config.json").write_text("{")
    _refused(folder, out, ModelError)
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    _refused(folder, out, ModelError)


def _changed_checkpoint(
    source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> Path:
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_missing_weight_is_refused(mixtral: Exported, tmp_path: Path) -> None:
    folder = _changed_checkpoint(
        mixtral[0], tmp_path / "m", lambda weights: weights.pop("model.layers.1.self_attn.q_proj.weight")
    )
    text = _refused(folder, tmp_path / "out.onnx", ModelError)
    assert "1 weights of the model are missing: model.layers.1.self_attn.q_proj.weight" in text


def test_weights_under_another_prefix_are_refused(mixtral: Exported, tmp_path: Path) -> None:
    def rename(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[f"wrapped.{name}"] = weights.pop(name)

    folder = _changed_checkpoint(mixtral[0], tmp_path / "m", rename)
    text = _refused(folder, tmp_path / "out.onnx", ModelError)
    assert "missing" in text and "wrapped." in text


def test_a_weight_of_another_shape_is_refused(mixtral: Exported, tmp_path: Path) -> None:
    def shorten(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["lm_head.weight"][:-1].contiguous()

    folder = _changed_checkpoint(mixtral[0], tmp_path / "m", shorten)
    assert "other shapes than the configuration says: lm_head.weight" in _refused(
        folder, tmp_path / "out.onnx", ModelError
    )


def test_an_unused_weight_is_a_note(mixtral: Exported, tmp_path: Path) -> None:
    folder = _changed_checkpoint(
        mixtral[0], tmp_path / "m", lambda weights: weights.update(extra=torch.zeros(2))
    )
    assert "1 weights of the checkpoint are not used: extra" in sources.resolve(str(folder)).notes


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    module = _model("mixtral", tmp_path / "config", tie_word_embeddings=True)
    module.save_pretrained(tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    assert sources.resolve(str(tmp_path / "model")).notes == ()


def test_pickles_only_when_allowed(mixtral: Exported, tmp_path: Path) -> None:
    folder, out = tmp_path / "folder", tmp_path / "out.onnx"
    folder.mkdir()
    shutil.copy(mixtral[0] / "config.json", folder)
    module = transformers.AutoModelForCausalLM.from_pretrained(mixtral[0])
    torch.save(module.state_dict(), folder / "pytorch_model.bin")
    assert "--allow-pickle" in _refused(folder, out, ModelError)
    loaded = sources.resolve(str(folder), allow_pickle=True).module
    for name, parameter in module.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


def test_remote_code_only_when_trusted(tmp_path: Path) -> None:
    folder, out = tmp_path / "folder", tmp_path / "out.onnx"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "own",
                "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
            }
        )
    )
    (folder / "own.py").write_text("raise SystemExit('ran')\n")
    text = _refused(folder, out, ModelError, random_weights=True)
    assert "--trust-remote-code" in text


def test_a_hub_id_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = _refused("no-such-owner/no-such-model", tmp_path / "out.onnx", OutsideError)
    assert "HF_HUB_OFFLINE" in text


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_config("mixtral", tmp_path / "config")
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "sparse_onnx.export.hugging_face")
    monkeypatch.delattr("sparse_onnx.export.hugging_face")
    text = _refused(folder, tmp_path / "out.onnx", UsageError, random_weights=True)
    assert "pip install 'sparse-onnx[hf]'" in text

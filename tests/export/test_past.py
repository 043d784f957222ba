"""`export(past=True)`: decoders with their key/value cache, and what they generate."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from architectures import write_config  # noqa: E402
from generating import by_genai, by_onnxruntime, by_torch  # noqa: E402

import sparse_onnx  # noqa: E402
from sparse_onnx.core.errors import ImpossibleError  # noqa: E402
from sparse_onnx.export import check, experts, past, samples, sources, translate  # noqa: E402
from sparse_onnx.graph import io  # noqa: E402

PROMPTS = ([[5, 6, 7, 8, 9]], [[11, 90, 3], [40, 2, 77, 31, 8, 1]])
TOKENS = 32
#: The runs that every report of a decoder without windows names.
RUNS = [
    "3x11 after 0",
    "1x1 after 0",
    "1x1 after 8",
    "4x1 after 6 one expert",
    "2x9 after 4 one expert",
    "1x6 after 40",
    "5x3 after 13",
    "3x6 after 0 padded",
    "2x1 after 9 padded",
    "2x4 after 5 padded",
    "2x2 after 3 sample",
    "1 prompt, 32 greedy tokens",
    "2 prompts, 32 greedy tokens",
]
#: Those whose keys and values onnxruntime-genai can hold.
GENAI = ("mixtral", "gpt_oss", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe")
WITHOUT_GENAI = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is not installed"
)


@dataclasses.dataclass(frozen=True)
class Exported:
    """A folder with safetensors, its export, what the export reported, and the optimized export in a folder of its
    own. The model ends with a token that it does not come to."""

    source: Path
    path: Path
    report: sparse_onnx.Report
    optimized: Path

    def module(self) -> torch.nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(self.source).eval()


def _exported(name: str, folder: Path) -> Exported:
    config = write_config(name, folder / "config", eos_token_id=None, pad_token_id=None)
    module: Any = sources.resolve(str(config), random_weights=True).module
    module.generation_config = transformers.GenerationConfig(pad_token_id=0)
    used = {
        token
        for prompts in PROMPTS
        for row in (*prompts, *by_torch(module, prompts, TOKENS))
        for token in row
    }
    # onnxruntime-genai ends at some token always: one that does not come.
    never = min(set(range(97)) - used)
    module.generation_config.pad_token_id = module.generation_config.eos_token_id = never
    module.save_pretrained(folder / "model")
    path, optimized = folder / "export" / "model.onnx", folder / "optimized" / "fast.onnx"
    for each in (path, optimized):
        each.parent.mkdir()
    report = sparse_onnx.export(folder / "model", path, past=True)
    sparse_onnx.optimize(path, optimized)
    return Exported(folder / "model", path, report, optimized)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return _exported("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """With a window of 9 tokens in its first layer."""
    return _exported("gpt_oss", tmp_path_factory.mktemp("gpt_oss"))


def test_names_and_shapes_are_those_of_genai_and_optimum(mixtral: Exported) -> None:
    graph = io.load(mixtral.path).graph
    keys = {f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")}
    assert {value.name: [str(dim) for dim in value.shape or ()] for value in graph.inputs} == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total_sequence"],
        "position_ids": ["batch", "sequence"],
        **{key: ["batch", "2", "past_sequence", "8"] for key in keys},
    }
    assert [value.name for value in graph.outputs] == [
        "logits",
        *(f"present.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")),
    ]
    assert [str(dim) for dim in graph.outputs[0].shape or ()] == ["batch", "sequence", "97"]
    assert [str(dim) for dim in graph.outputs[1].shape or ()] == ["batch", "2", "total_sequence", "8"]
    assert len(mixtral.report.blocks) == 2


def test_the_report_names_the_splits_and_generations(mixtral: Exported) -> None:
    record = mixtral.report.verify
    assert record is not None and record.passed
    assert record.inputs == RUNS and record.runs == len(RUNS)
    assert record.max_rel_error is not None and record.max_rel_error < 1e-5


@pytest.mark.parametrize("prompts", PROMPTS, ids=["one", "two"])
def test_it_generates_what_torch_generates(prompts: list[list[int]], mixtral: Exported) -> None:
    expected = by_torch(mixtral.module(), prompts, TOKENS)
    assert len(expected[0]) == TOKENS
    assert by_onnxruntime(mixtral.path, prompts, TOKENS) == expected
    assert by_onnxruntime(mixtral.optimized, prompts, TOKENS) == expected


def test_optimize_keeps_names_and_configuration_in_step(mixtral: Exported) -> None:
    before, after = io.load(mixtral.path).graph, io.load(mixtral.optimized).graph
    assert [value.name for value in (*before.inputs, *before.outputs)] == [
        value.name for value in (*after.inputs, *after.outputs)
    ]
    config = json.loads((mixtral.path.parent / "genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == "model.onnx"
    config["model"]["decoder"]["filename"] = "fast.onnx"
    assert json.loads((mixtral.optimized.parent / "genai_config.json").read_text()) == config
    assert config["search"]["past_present_share_buffer"] is False
    generation = mixtral.module().generation_config
    assert config["model"]["eos_token_id"] == config["model"]["pad_token_id"] == generation.pad_token_id


@WITHOUT_GENAI
@pytest.mark.parametrize("prompts", PROMPTS, ids=["one", "two"])
def test_genai_generates_what_torch_generates(prompts: list[list[int]], mixtral: Exported) -> None:
    expected = by_torch(mixtral.module(), prompts, TOKENS)
    assert by_genai(mixtral.path.parent, prompts, TOKENS) == expected
    assert by_genai(mixtral.optimized.parent, prompts, TOKENS) == expected


def test_a_window_shorter_than_the_past(gpt_oss: Exported) -> None:
    _check(gpt_oss, "gpt_oss")
    assert gpt_oss.report.verify is not None
    assert gpt_oss.report.verify.inputs[10:-3] == ["1x1 after 9", "1x1 after 16", "2x5 after 11 padded"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "olmoe", "granitemoe", "phimoe", "qwen2_moe"])
def test_each_family(name: str, tmp_path: Path) -> None:
    _check(_exported(name, tmp_path), name)


def _check(exported: Exported, name: str) -> None:
    """It generates, before and after `optimize`, in both runtimes. A window counts the padding that
    onnxruntime-genai puts between prompt and answer."""
    assert len(exported.report.blocks) == 2
    record = exported.report.verify
    assert record is not None and record.max_rel_error is not None and record.max_rel_error < 1e-5
    module = exported.module()
    for prompts in PROMPTS:
        expected = by_torch(module, prompts, TOKENS)
        assert by_onnxruntime(exported.path, prompts, TOKENS) == expected
        assert by_onnxruntime(exported.optimized, prompts, TOKENS) == expected
        together = prompts if name != "gpt_oss" else [prompts[-1]] * 2
        if name in GENAI and importlib.util.find_spec("onnxruntime_genai"):
            answers = expected if name != "gpt_oss" else [expected[-1]] * 2
            assert by_genai(exported.path.parent, together, TOKENS) == answers
            assert by_genai(exported.optimized.parent, together, TOKENS) == answers
    config = exported.path.parent / "genai_config.json"
    assert config.exists() is (name in GENAI)
    if name not in GENAI:
        assert any("keys and values of one width" in note for note in exported.report.notes)


def test_another_window_is_caught(gpt_oss: Exported) -> None:
    """The file has a window of 9 tokens, the module one of 10: they differ where more than 9 come together only."""
    source = past.with_past(sources.resolve(str(gpt_oss.source)))
    other = past.with_past(sources.resolve(str(gpt_oss.source)))
    for part in other.module.modules():
        if hasattr(part, "config"):
            part.config.sliding_window = 10
        if getattr(part, "sliding_window", None) == 9:
            part.sliding_window = 10
    runs = {run.name: run for run in samples.untraced(source.interface)}
    found = experts.find(other.module)
    assert check.compare(gpt_oss.path, other, found, [runs["1x1 after 8"]], tolerance=1e-4).passed
    for name in ("3x11 after 0", "1x1 after 9", "1x6 after 40"):
        assert check.compare(gpt_oss.path, other, found, [runs[name]], tolerance=1e-4).passed is False
        assert check.compare(gpt_oss.path, source, found, [runs[name]], tolerance=1e-4).passed


def test_wrong_caches_are_caught(mixtral: Exported, tmp_path: Path) -> None:
    source = past.with_past(sources.resolve(str(mixtral.source)))
    found, runs = experts.find(source.module), samples.untraced(source.interface)
    record = check.compare(mixtral.path, source, found, runs, tolerance=1e-4)
    assert record.passed
    generated = past.check_generation(record, mixtral.path, source, found, tolerance=1e-4)
    assert generated.passed and generated.runs == record.runs + 2
    model = io.load(mixtral.path)
    outputs = model.graph.outputs
    outputs[1], outputs[3] = outputs[3], outputs[1]
    outputs[1].name, outputs[3].name = "present.0.key", "present.1.key"
    changed = tmp_path / "swapped.onnx"
    io.save(model, changed)
    assert check.compare(changed, source, found, runs, tolerance=1e-4).passed is False
    generated = past.check_generation(record, changed, source, found, tolerance=1e-4)
    assert generated.passed is False
    assert generated.failure is not None and re.match(
        "1 prompt, 32 greedy tokens: token 1: relative error", generated.failure
    )


@pytest.mark.parametrize("past_length", [0, 3, 8, 9, 12])
def test_the_reference_is_the_model_without_cache(past_length: int, tmp_path: Path) -> None:
    """`PastSource.forward` fed with keys and values of real tokens gives what the model gives at once."""
    source = _with_past("gpt_oss", tmp_path / "gpt")
    ids = torch.randint(0, 97, (2, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = source.module(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    inputs = source.interface.draw({"batch": 2, "sequence": 1, "past_sequence": 0})
    inputs = {name: value for name, value in inputs.items() if name.startswith("past")}
    for start, end in ((0, past_length), (past_length, 14)):
        if start == end:
            continue
        inputs |= {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
        }
        logits, *presents = source.forward(inputs)
        inputs |= {slot.past: value for slot, value in zip(source.slots, presents, strict=True)}
    kept = mask[:, past_length:].bool()
    torch.testing.assert_close(logits[kept], expected[:, past_length:][kept], rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the export succeeds or fails."""
    source = _with_past("mixtral", tmp_path / "m")
    before = {name: set(vars(part)) for name, part in source.module.named_modules()}
    function = transformers.masking_utils.create_recurrent_attention_mask

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(translate, "to_onnx", fail)
    with pytest.raises(ImpossibleError):
        past.trace_with_past(source, experts.find(source.module), 20)
    assert {name: set(vars(part)) for name, part in source.module.named_modules()} == before
    assert transformers.masking_utils.create_recurrent_attention_mask is function


def _with_past(name: str, folder: Path, **changes: object) -> past.PastSource:
    return past.with_past(sources.resolve(str(write_config(name, folder, **changes)), random_weights=True))


def test_modules_without_a_cache_are_refused(tmp_path: Path) -> None:
    _refused((torch.nn.Linear(8, 4), torch.randn(4, 8)), tmp_path, "needs a decoder of transformers")
    _refused("zoo:byte-moe", tmp_path, "needs a decoder of transformers")
    settings = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.BertConfig(**settings, intermediate_size=40, architectures=["BertForMaskedLM"])
    config.save_pretrained(tmp_path / "bert")
    _refused(tmp_path / "bert", tmp_path, "BertForMaskedLM has no key/value cache", random_weights=True)


def test_convolutions_have_the_names_of_genai(tmp_path: Path) -> None:
    """LFM2: a layer that is a convolution and nothing else."""
    source = _with_past("lfm2_moe", tmp_path / "lfm2")
    assert [(slot.past, slot.present) for slot in source.slots] == [
        ("past_conv.0", "present_conv.0"),
        ("past_key_values.1.key", "present.1.key"),
        ("past_key_values.1.value", "present.1.value"),
        ("past_conv.2", "present_conv.2"),
    ]
    begun = source.interface.draw({"batch": 2, "sequence": 3, "past_sequence": 0})
    assert not begun["past_conv.0"].any()
    past.write_config(source, tmp_path / "model.onnx")
    written = json.loads((tmp_path / "genai_config.json").read_text())["model"]
    assert written["type"] == "lfm2"
    assert written["decoder"]["layer_types"] == ["conv", "full_attention", "conv"]
    assert written["decoder"]["inputs"]["past_conv_names"] == "past_conv.%d"


def _refused(source: object, folder: Path, reason: str, **settings: object) -> None:
    with pytest.raises(ImpossibleError, match=reason) as caught:
        sparse_onnx.export(source, folder / "out.onnx", past=True, **settings)
    assert "\n" not in str(caught.value) and not (folder / "out.onnx").exists()


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    code = "import sys; from sparse_onnx.cli import main; sys.exit(main())"
    command = [
        sys.executable,
        "-c",
        code,
        "export",
        "zoo:byte-moe",
        str(tmp_path / "out.onnx"),
        "--past",
        "-q",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 5 and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_lfm2_generates(tmp_path: Path) -> None:
    """onnxruntime-genai keeps the padding of a batch in the convolutions' states: prompts of one length."""
    exported = _exported("lfm2_moe", tmp_path)
    for prompts in (PROMPTS[0], [[11, 90, 3, 4], [40, 2, 77, 31]]):
        expected = by_torch(exported.module(), prompts, TOKENS)
        assert by_onnxruntime(exported.path, prompts, TOKENS) == expected
        assert by_onnxruntime(exported.optimized, prompts, TOKENS) == expected
        if importlib.util.find_spec("onnxruntime_genai"):
            assert by_genai(exported.path.parent, prompts, TOKENS) == expected
            assert by_genai(exported.optimized.parent, prompts, TOKENS) == expected


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str, mixtral: Exported, tmp_path: Path) -> None:
    report = sparse_onnx.export(mixtral.source, tmp_path / "half.onnx", dtype=dtype, past=True)
    assert report.verify is not None and report.verify.passed
    assert report.verify.inputs[-1] == "2 prompts, 32 greedy tokens"
    inputs = {value.name: value.dtype for value in io.load(tmp_path / "half.onnx").graph.inputs}
    assert inputs["past_key_values.1.value"] == ir.DataType[dtype.upper()]


def test_the_sample_of_the_documentation(
    mixtral: Exported, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The code of docs/generation.md, on this model."""
    text = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
    plain, genai, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (expected,) = by_torch(mixtral.module(), [[1, 2, 3]], 32)
    (tmp_path / "fast").symlink_to(mixtral.optimized.parent)
    with contextlib.chdir(tmp_path):
        exec(plain.replace("fast/model.onnx", "fast/fast.onnx"), {})
        assert capsys.readouterr().out.strip() == str(expected)
        if importlib.util.find_spec("onnxruntime_genai"):
            exec(genai, {})
            assert json.loads(capsys.readouterr().out) == expected


def test_prompts_are_padded_on_the_left() -> None:
    from generating import padded

    ids, mask = padded([[1], [2, 3]])
    np.testing.assert_array_equal(ids, [[0, 1], [2, 3]])
    np.testing.assert_array_equal(mask, [[0, 1], [1, 1]])

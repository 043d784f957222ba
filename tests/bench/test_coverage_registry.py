"""The architectures of the coverage table come from the installed transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from sparse_onnx.bench.coverage import registry, tiny  # noqa: E402

#: One of each router group, and the undecorated ones.
KNOWN = {
    "mixtral": "MixtralForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "phimoe": "PhimoeForCausalLM",
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
    "nllb-moe": "NllbMoeForConditionalGeneration",
    "jetmoe": "JetMoeForCausalLM",
    "doge": "DogeForCausalLM",
    "dbrx": "DbrxForCausalLM",
    "vitpose": "VitPoseForPoseEstimation",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}


def test_known_architectures_are_found_and_dense_ones_are_not() -> None:
    found = {each.name: each.model_class for each in registry.architectures()}
    if missing := {name for name in KNOWN if not hasattr(transformers, KNOWN[name])}:
        pytest.skip(f"this transformers lacks {missing}")
    assert KNOWN.items() <= found.items()
    assert not found.keys() & {"llama", "t5", "bert", "vit", "big_bird", "gemma3"}


def test_undecorated_experts_are_told_apart() -> None:
    decorated = {each.directory: each.decorated for each in registry.architectures()}
    assert decorated["mixtral"] and decorated["gpt_oss"] and decorated["aria"]
    assert not decorated["llama4"] and not decorated["longcat_flash"] and not decorated["doge"]


def test_a_new_directory_shows_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {
        "fresh/modeling_fresh.py": "@use_experts_implementation(has_bias=True)\nclass FreshExperts(nn.Module): ...\n",
        "other/modeling_other.py": "import torch\n\n\nclass OtherExperts(nn.ModuleList):\n    pass\n",
        "counted/modeling_counted.py": "class CountedMLP(nn.Module):\n    pass\n",
        "counted/configuration_counted.py": "class CountedConfig:\n    num_local_experts: int = 8\n",
        "dense/modeling_dense.py": "class DenseMLP(nn.Module):\n    pass\n",
        "dense/configuration_dense.py": "class DenseConfig:\n    num_heads: int = 8\n",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(registry, "_models", lambda: tmp_path)
    assert registry.directories() == {"fresh": True, "other": False, "counted": False}


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "qwen3_vl_moe", "nemotron_h"])
def test_tiny_keeps_what_decides_which_code_runs(name: str) -> None:
    full, small = transformers.AutoConfig.for_model(name), tiny.tiny(name)
    text, tiny_text = full.get_text_config(), small.get_text_config()
    assert type(small) is type(full)
    assert tiny_text.hidden_size <= 64 and tiny_text.vocab_size <= 256 and tiny_text.num_hidden_layers <= 6
    assert getattr(tiny_text, "hidden_act", None) == getattr(text, "hidden_act", None)
    for field in ("layer_types", "layers_block_type", "mlp_layer_types"):
        kinds = getattr(text, field, None)
        if kinds is not None:
            assert set(getattr(tiny_text, field)) == set(kinds)
            assert len(getattr(tiny_text, field)) == tiny_text.num_hidden_layers

"""A Hugging Face model whose code came with it: its Python control flow is lifted as a hand-written module's is."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import sparse_onnx  # noqa: E402
from sparse_onnx.core.errors import ModelError  # noqa: E402

CODE = '''
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class OwnConfig(PretrainedConfig):
        model_type = "own_moe_of_a_test"

        def __init__(self, vocab_size=60, hidden_size=16, experts=4, **others):
            self.vocab_size, self.hidden_size, self.experts = vocab_size, hidden_size, experts
            super().__init__(**others)

    class MoE(nn.Module):
        """As DeepSeek's `moe_infer`."""

        def __init__(self, config):
            super().__init__()
            size = config.hidden_size
            self.gate = nn.Linear(size, config.experts, bias=False)
            self.experts = nn.ModuleList(
                [nn.Sequential(nn.Linear(size, 24), nn.SiLU(), nn.Linear(24, size)) for _ in range(config.experts)]
            )

        @torch.no_grad()
        def forward(self, hidden):
            x = hidden.view(-1, hidden.shape[-1])
            weight, ids = torch.topk(self.gate(x).softmax(-1), 2, dim=-1, sorted=False)
            counts = torch.bincount(ids.view(-1), minlength=len(self.experts)).cpu().numpy()
            order = ids.view(-1).argsort()
            rows, outputs, start = x[order // 2], [], 0
            for i, count in enumerate(counts):
                end = start + count
                if count == 0:
                    continue
                outputs.append(self.experts[i](rows[start:end]))
                start = end
            outs = torch.cat(outputs, dim=0) if len(outputs) else rows.new_empty(0)
            back = torch.empty_like(outs)
            back[order] = outs
            return (back.view(*ids.shape, -1) * weight.unsqueeze(-1)).sum(dim=1).view(hidden.shape)

    class OwnForCausalLM(PreTrainedModel):
        config_class = OwnConfig

        def __init__(self, config):
            super().__init__(config)
            self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
            self.mlp = MoE(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids=None, attention_mask=None, **others):
            hidden = self.embed(input_ids)
            if attention_mask is not None:
                hidden = hidden * attention_mask.unsqueeze(-1)
            return CausalLMOutputWithPast(logits=self.lm_head(hidden + self.mlp(hidden)))
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    place = tmp_path / "own"
    place.mkdir()
    (place / "modeling_own.py").write_text(textwrap.dedent(CODE))
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {"model_type": "own_moe_of_a_test", "architectures": ["OwnForCausalLM"], "auto_map": auto}
    (place / "config.json").write_text(json.dumps(config))
    return place


def test_its_loop_is_lifted(folder: Path, tmp_path: Path) -> None:
    report = sparse_onnx.export(folder, tmp_path / "out.onnx", random_weights=True, trust_remote_code=True)
    assert report.verify is not None and report.verify.passed and report.verify.runs >= 7
    assert report.verify.max_rel_error is not None and report.verify.max_rel_error < 1e-5


def test_not_without_asking(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Python code of its own"):
        sparse_onnx.export(folder, tmp_path / "out.onnx", random_weights=True)

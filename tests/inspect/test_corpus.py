"""Graphs by other exporters: what `inspect` says of each, in full."""

from __future__ import annotations

from typing import Any

import pytest
from corpus_tools import FOLDER, entries

from sparse_onnx.inspect.api import inspect

RENORMALISED = "softmax_topk_renormalised"
DEEPSEEK = "sigmoid_bias_group_topk_renormalised"
ROUTERS = {
    "genai-lfm2-contrib-moe": "sigmoid_bias_topk_renormalised",
    "genai-lfm2-contrib-qmoe-int4": "sigmoid_bias_topk_renormalised",
    "hf-deepseekv3-grouped": DEEPSEEK,
    "hf-gptoss-grouped": "topk_softmax",
    "hf-mixtral-contrib-moe-cuda": RENORMALISED,
    "hf-mixtral-grouped": RENORMALISED,
    "hf-mixtral-grouped-ortfused": RENORMALISED,
    "mobius-mixtral-densemask": RENORMALISED,
    "module-all-experts-scatter-mask": "topk_softmax",
    "module-gather-einsum": RENORMALISED,
    "module-gshard-einsum": RENORMALISED,
    "module-mistral-reference-loop": "topk_softmax",
    "optimum-qwen3moe-loop": RENORMALISED,
    "torch-deepseekv3-batched": DEEPSEEK,
    "torch-gptoss-batched": "topk_softmax",
    "torch-mixtral-batched": RENORMALISED,
    "torch-mixtral-batched-kv": RENORMALISED,
    "torch-phimoe-batched": "sparsemixer",
}
#: Kinds of blocks and reasons for what is left alone, of models without a mixture of experts.
OTHERS: dict[str, tuple[list[str], list[str]]] = {
    "dense-bert": ([], []),
    "dense-llama": ([], []),
    "module-relu-ffn": (["relu-ffn"], []),
    "module-topk-activation": (["topk-activation"], []),
    "module-soft-mixture": (["relu-ffn"] * 8, ["soft mixture: every expert takes part in every token"]),
}


@pytest.mark.parametrize("entry", entries())
def test_what_is_said(entry: dict[str, Any]) -> None:
    name = entry["model"].removesuffix(".onnx")
    report = inspect(FOLDER / entry["model"])
    assert report.model is not None and report.model.active_parameters is not None
    assert [refusal.reason for refusal in report.refusals] == OTHERS.get(name, ([], []))[1]
    if entry["moe_blocks"]:
        assert [block.kind for block in report.blocks] == ["moe"] * entry["moe_blocks"]
        assert {block.router for block in report.blocks} == {ROUTERS[name]}
        assert report.model.active_parameters < report.model.parameters
    else:
        assert [block.kind for block in report.blocks] == OTHERS[name][0]
        assert report.model.active_parameters == report.model.parameters

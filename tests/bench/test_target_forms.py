from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sparse_onnx import targets
from sparse_onnx.bench import target_forms
from sparse_onnx.bench.sample_blocks import HIDDEN, ROUTERS, build, samples
from sparse_onnx.bench.targets import BEGIN, END, find, merged
from sparse_onnx.blocks import Activation, neutral_blocks
from sparse_onnx.core.errors import UsageError
from sparse_onnx.inspect.router import router_name
from sparse_onnx.targets import places, session


def test_every_activation_and_router_is_among_the_samples() -> None:
    found = list(samples())
    assert {sample.spec.activation for sample in found} == set(Activation)
    assert {sample.router for sample in found} == set(ROUTERS)
    assert len({sample.name for sample in found}) == len(found)
    for sample in found:
        if sample.router in ("softmax_top1", "topk_softmax", "sigmoid_bias_topk_renormalised"):
            block = neutral_blocks(build(sample))[0]
            assert router_name(block.expert_index, block.expert_weight) == sample.router


@pytest.mark.parametrize("form", target_forms.FORMS)
def test_forms_on_the_cpu(form: str) -> None:
    cpu = targets.get("cpu")
    for sample in list(samples())[::5]:
        result = target_forms.try_sample(sample, form, cpu, places.CPU)
        if result is None:
            assert form == "fused"
        else:
            assert result.runs and result.right and result.whole, (sample.name, result)


def test_a_wrong_block_is_seen() -> None:
    """The comparison is with the block's own neutral form: another seed's weights do not pass."""
    sample = next(samples())
    x = np.random.default_rng(0).standard_normal((6, HIDDEN)).astype(np.float32)
    expected = session.run(session.create_session(build(sample, seed=1)), {"x": x})[0]
    result, _ = target_forms.attempt(build(sample), [{"x": x}], [expected], targets.get("cpu"), places.CPU)
    assert result.runs and not result.right and result.note.startswith("relative error")


def test_forms_take_the_targets_options() -> None:
    webgpu = targets.get("webgpu")
    assert target_forms.form_on(webgpu, "gathered") == "gathered:index=int32"
    fewer = dataclasses.replace(webgpu, forms=("dense:index=int32",))
    assert target_forms.form_on(fewer, "gathered") == "gathered:index=int32"
    assert target_forms.form_on(targets.get("openvino"), "gathered") == "gathered"


def test_rows_of_other_targets_stay() -> None:
    text = f"before\n{BEGIN}\n| target | form |\n| --- | --- |\n| a | `old` |\n| b | `kept` |\n{END}\nafter\n"
    new = merged(text, {"a": ["| a | `new` |"], "c": ["| c | `more` |"]})
    assert "old" not in new and new.index("`new`") < new.index("`kept`") < new.index("`more`")
    assert new.startswith("before\n") and new.endswith("\nafter\n") and merged(new, {}) == new


def test_a_target_that_is_not_here(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_ONNX_RUNTIMES", str(tmp_path))
    for name in ("cpu-oldest", "webgpu", "coreml"):
        with pytest.raises(UsageError):
            find(name)

"""Runtimes that are installed beside this one: blocks, the language model, drift, and faults that are worked round.

`make runtimes` installs them; without, these tests are skipped and say so.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from builders import Shape, layered_model, save_external

import sparse_onnx
from sparse_onnx import targets
from sparse_onnx.bench.probing import probe
from sparse_onnx.bench.sample_blocks import samples
from sparse_onnx.bench.target_forms import try_sample
from sparse_onnx.core.errors import VerificationError
from sparse_onnx.targets import places, runtimes, session
from sparse_onnx.targets.placement import placed
from sparse_onnx.targets.record import drift

pytestmark = pytest.mark.slow

RUN = ["openvino", "qnn-htp", "webgpu", "wasm", "node", "ort-mobile"]
#: Whose blocks must lie on the provider as a whole.
WHOLE = ["openvino", "qnn-htp", "webgpu"]


def there(name: str) -> str:
    place = places.place(targets.get(name))
    if place is None:
        pytest.skip(
            f"not installed: python -m sparse_onnx.targets.runtimes install {targets.get(name).runtime}"
        )
    return place


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "byte.onnx"
    sparse_onnx.export("zoo:byte-moe", path)
    return path


@pytest.mark.parametrize("name", RUN)
def test_every_block_runs_right_in_the_targets_first_form(name: str) -> None:
    place, target = there(name), targets.get(name)
    form = target.form_names[0]
    for sample in samples():
        result = try_sample(sample, form, target, place)
        assert result is not None and result.runs and result.right, (sample.name, result)
        if name in WHOLE and not (name == "webgpu" and sample.spec.limit):  # it has no Min
            assert result.whole, (sample.name, result)


@pytest.mark.parametrize("name", ["cpu", *RUN])
def test_the_profile_says_what_the_probe_says(name: str) -> None:
    there(name)
    assert drift(targets.get(name), probe(targets.get(name))) == []


@pytest.mark.parametrize("name", RUN)
def test_the_language_model_is_verified_there(name: str, language_model: Path, tmp_path: Path) -> None:
    there(name)
    sizes = [{"batch": 1, "sequence": 1}, {"batch": 1, "sequence": 8}]
    report = sparse_onnx.optimize(
        language_model, tmp_path / "out.onnx", target=name, static=sizes, no_fallback=name in WHOLE
    )
    assert report.static is not None and all(each.verify.passed for each in report.static)
    assert all(each.verify.on for each in report.static)
    if name in WHOLE:
        assert [record.provider for record in report.placement or ()] == [targets.get(name).provider]


def test_the_oldest_runtime_runs_the_same_file(language_model: Path, tmp_path: Path) -> None:
    if not runtimes.get("cpu-oldest").installed:
        pytest.skip("not installed: python -m sparse_onnx.targets.runtimes install cpu-oldest")
    sparse_onnx.optimize(language_model, tmp_path / "out.onnx")
    feeds = {"input_ids": np.random.default_rng(0).integers(0, 256, (2, 9))}
    expected = session.run(session.create_session(tmp_path / "out.onnx"), feeds)[0]
    actual = session.run(session.create_session(tmp_path / "out.onnx", provider="runtime:cpu-oldest"), feeds)[
        0
    ]
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["node", "wasm", "webgpu"])
def test_without_tokens_it_is_the_runtime_that_fails(name: str, tmp_path: Path) -> None:
    """TopK (webgpu: Softmax) of no rows. When this fails it is mended, and the note in docs/targets.md can go."""
    there(name)
    source = save_external(layered_model(Shape(experts=6, hidden=32, inner=48)), tmp_path / "in.onnx")
    report = sparse_onnx.optimize(source, tmp_path / "out.onnx", target=name)
    assert report.verify is not None and report.verify.passed
    assert [each.partition(":")[0] for each in report.verify.not_run] == ["0 tokens"]


def test_webgpu_leaves_a_reshape_of_int64_to_the_cpu(tmp_path: Path) -> None:
    """microsoft/onnxruntime#29756. When this fails it is mended, and the forms need no index=int32 any more."""
    place = there("webgpu")
    text = """<ir_version: 9, opset_import: ["" : 18]>
    g (float[4,8] x) => (float[8,1] y) <int64[1] k = {2}, int64[2] shape = {-1, 1}>
    { v, i = TopK<axis=-1>(x, k) r = Reshape(i, shape) y = Cast<to=1>(r) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    made = session.create_session(tmp_path / "m.onnx", provider=place, record=True)
    session.run(made, {"x": np.random.default_rng(0).random((4, 8), np.float32)})
    at = placed(made, "WebGpuExecutionProvider")
    assert at is not None and "Reshape" in [op for _, op in at.fallen("WebGpuExecutionProvider")]


def test_the_htp_simulator_gets_long_prompts_wrong(language_model: Path, tmp_path: Path) -> None:
    """QNN 2.7.0: attention of the language model at 16 tokens and more; the same graph is right on the CPU provider.
    When this fails it is mended, and the note in docs/targets.md can go."""
    there("qnn-htp")
    with pytest.raises(VerificationError, match="wrong, and CPUExecutionProvider gets it right"):
        sparse_onnx.optimize(
            language_model, tmp_path / "o.onnx", target="qnn-htp", static=[{"batch": 1, "sequence": 32}]
        )
    assert not (tmp_path / "o.onnx").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_every_form_on_a_gpu(name: str) -> None:
    target = targets.get(name)
    place = places.place(target)
    if place is None:
        pytest.skip(f"{target.provider} is not here: it needs {target.needs}")
    for form in target.form_names:
        for sample in samples():
            result = try_sample(sample, form, target, place)
            assert result is None or (result.runs and result.right), (form, sample.name, result)

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from builders import Shape, layered_model, save_external
from click.testing import CliRunner

import sparse_onnx
from sparse_onnx.cli import main
from sparse_onnx.core.errors import ImpossibleError, UsageError, VerificationError
from sparse_onnx.graph import io
from sparse_onnx.optimize import checks, static
from sparse_onnx.targets import places


def parsed(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]>\n{text}'))


def shapes(path) -> list[list[int | str]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [value.shape for value in (*session.get_inputs(), *session.get_outputs())]


def test_decode_and_prefill_over_the_same_weights(tmp_path) -> None:
    path = save_external(layered_model(Shape()), tmp_path / "in.onnx")
    out = tmp_path / "out.onnx"
    report = sparse_onnx.optimize(path, out, form="gathered", static=[{"T": 1}, {"T": 7}])
    beside = tmp_path / "out.7.onnx"
    assert report.static is not None
    assert [(each.path, each.verify.passed) for each in report.static] == [
        (str(out), True),
        (str(beside), True),
    ]
    assert shapes(out) == [[1, 16], [1, 16]] and shapes(beside) == [[7, 16], [7, 16]]
    for model in (io.load(out), io.load(beside)):
        sizes = [size for node in model.graph for value in node.outputs for size in value.shape or ()]
        assert all(isinstance(size, int) for size in sizes)
        assert any(
            isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values()
        )
    for rows, file in ((1, out), (7, beside)):
        x = {"x": np.random.default_rng(rows).standard_normal((rows, 16)).astype(np.float32)}
        expected, actual = (
            onnxruntime.InferenceSession(str(each), providers=["CPUExecutionProvider"]).run(None, x)[0]
            for each in (path, file)
        )
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_sizes_that_are_sums_follow_from_the_others() -> None:
    model = parsed(
        'g (float[batch, "past + new"] a, float[batch, new] b) => (float[batch, "past + new"] y, float[batch, new] z) '
        "{ y = Relu(a) z = Relu(b) }"
    )
    made = (
        static.specialise(model, {"batch": 2, "past": 3, "new": 1})
        if "past" in static.open_axes(model)
        else None
    )
    if made is None:  # `past` alone is no axis of an input
        with pytest.raises(UsageError, match="no input has an open axis 'past'"):
            static.specialise(model, {"batch": 2, "past": 3, "new": 1})
        made = static.specialise(model, {"batch": 2, "past + new": 4, "new": 1})
    assert [list(value.shape) for value in made.graph.outputs] == [[2, 4], [2, 1]]
    assert model.graph.inputs[0].shape[0] == "batch", "the model itself is unchanged"


@pytest.mark.parametrize(
    ("sizes", "message", "hint"),
    [
        ({"T": 1, "batch": 1}, "no input has an open axis 'batch'", "open axes: T"),
        ({}, "no size is given for the axis 'T'", "--static T=1"),
    ],
)
def test_what_is_wrong_with_sizes(sizes: dict[str, int], message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        static.specialise(layered_model(Shape()), sizes)
    assert caught.value.hint == hint


@pytest.mark.parametrize("text", ["batch", "batch=", "batch=0", "batch=-1", "=3", "batch=1,,x=2"])
def test_sizes_in_text(text: str) -> None:
    assert static.parse("batch=1, sequence=128") == {"batch": 1, "sequence": 128}
    with pytest.raises(UsageError, match="is not AXIS=SIZE"):
        static.parse(text)


def test_a_shape_that_depends_on_values_has_no_static_graph() -> None:
    model = parsed("g (float[n] x) => (int64[1, m] y) { y = NonZero(x) }")
    with pytest.raises(ImpossibleError, match="output 'y' does not follow"):
        static.specialise(model, {"n": 4})


def test_a_target_of_static_shapes_asks_for_sizes(tmp_path) -> None:
    path = save_external(layered_model(Shape()), tmp_path / "in.onnx")
    result = CliRunner().invoke(main, ["optimize", str(path), str(tmp_path / "o.onnx"), "--target", "nnapi"])
    assert result.exit_code == 2 and "--static T=1" in result.stderr and not (tmp_path / "o.onnx").exists()
    given = ["optimize", str(path), str(tmp_path / "o.onnx"), "--target", "nnapi", "--static", "T=1"]
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 0, result.stderr
    assert "placed by the profile" in result.stdout and "NnapiExecutionProvider" in result.stdout


def test_a_provider_that_computes_something_else_is_told_from_our_own_fault(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_external(layered_model(Shape()), tmp_path / "in.onnx")
    honest = checks.compare_whole

    def spoiled(original, model, cases, *, provider, **options):
        record = honest(original, model, cases, provider=places.CPU, **options)
        wrong = checks.dataclasses.replace(record, passed=False, failure="relative error 1")
        return record if provider == places.CPU else wrong

    monkeypatch.setattr(places, "place", lambda profile: "format:ort")
    monkeypatch.setattr(checks, "compare_whole", spoiled)
    with pytest.raises(
        VerificationError, match="gets the graph of T 2 wrong, and CPUExecutionProvider gets it right"
    ):
        sparse_onnx.optimize(path, tmp_path / "o.onnx", static=[{"T": 2}], target="qnn-htp", form="dense")
    assert not (tmp_path / "o.onnx").exists()


@pytest.mark.parametrize("verify", ["final", "each"])
def test_quantized_graphs_of_one_size_are_compared_with_the_quantized_model(tmp_path, verify) -> None:
    path = save_external(layered_model(Shape()), tmp_path / "in.onnx")
    report = sparse_onnx.optimize(
        path, tmp_path / "out.onnx", quantize="int8", verify=verify, static=[{"T": 1}]
    )
    assert report.static is not None and report.static[0].verify.passed

"""Modules by FILE.py:NAME: what arrives as a block, what is refused, and how their failures read."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
import toy_modules  # noqa: E402

import sparse_onnx  # noqa: E402
from sparse_onnx import blocks  # noqa: E402
from sparse_onnx.core.errors import (  # noqa: E402
    ImpossibleError,
    ModelError,
    OutsideError,
    SparseOnnxError,
    UsageError,
    VerificationError,
)
from sparse_onnx.core.report import Report  # noqa: E402
from sparse_onnx.export import experts, translate  # noqa: E402
from sparse_onnx.graph import io  # noqa: E402

FILE = toy_modules.__file__
assert FILE is not None


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.onnx"


def export(name: str, out: Path, **settings: object) -> Report:
    return sparse_onnx.export(f"{FILE}:{name}", out, **settings)


def refused(name: str, out: Path, error: type[SparseOnnxError], **settings: object) -> str:
    with pytest.raises(error) as caught:
        export(name, out, **settings)
    assert list(out.parent.iterdir()) == []
    text = str(caught.value)
    assert type(caught.value) is error and "\n" not in text
    return text


@pytest.mark.parametrize(("name", "activation", "gated"), [("packed", "silu", True), ("relu", "relu", False)])
def test_an_experts_module_is_one_node(name: str, activation: str, gated: bool, out: Path) -> None:
    report = export(name, out)
    assert report.verify is not None and report.verify.passed and report.verify.runs >= 6
    assert report.verify.max_rel_error is not None and report.verify.max_rel_error < 1e-5
    (block,) = report.blocks
    assert (block.name, block.activation, block.gated, block.experts, block.top_k) == (
        "experts",
        activation,
        gated,
        toy_modules.EXPERTS,
        2,
    )
    assert (block.hidden, block.inner) == (toy_modules.HIDDEN, toy_modules.INNER)
    model = io.load(out)
    (view,) = blocks.blocks(model)
    assert view.node.metadata_props["sparse_onnx.block"] == "experts"
    assert [str(dim) for dim in model.graph.inputs[0].shape or ()] == ["batch", "sequence", "12"]
    module = getattr(toy_modules, name)()[0].experts
    for role, value in view.weights.items():
        expected = getattr(module, (value.name or "").rpartition(".")[2], None)
        tensor = ir.convenience.get_const_tensor(value)
        assert tensor is not None
        if expected is None:
            assert role.endswith("_bias") and blocks.is_zero(value)
        else:
            assert value.name in (
                "experts.gate_up_proj",
                "experts.up_proj",
                "experts.down_proj",
            ) or role.endswith("bias")
            np.testing.assert_array_equal(tensor.numpy(), expected.detach().numpy())


def test_nothing_of_this_machine_is_in_the_file(out: Path) -> None:
    export("packed", out)
    content = out.read_bytes()
    assert b"toy_modules.py" not in content and str(Path.cwd()).encode() not in content


def test_arguments_by_other_names(out: Path) -> None:
    assert len(export("named_arguments", out).blocks) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [("softcapped", "gate"), ("lying", "something else"), ("otherwise_called", "something else")],
)
def test_an_unknown_block_stays_exact_and_is_noted(name: str, reason: str, out: Path) -> None:
    report = export(name, out)
    assert report.blocks == [] and report.verify is not None and report.verify.passed
    assert any(note.startswith("experts:") and reason in note for note in report.notes)


def test_swapping_two_experts_fails_verification(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attach = blocks.attach_functions

    def swapped(model: ir.Model) -> bool:
        (view,) = blocks.blocks(model)
        weight = view.weights["fc2"]
        assert weight.const_value is not None
        array = weight.const_value.numpy().copy()
        array[[0, 1]] = array[[1, 0]]
        weight.const_value = ir.tensor(array, name=weight.name)
        return attach(model)

    monkeypatch.setattr(blocks, "attach_functions", swapped)
    assert "differ" in refused("packed", out, VerificationError)


@pytest.mark.parametrize("pair", [(0, 1), (17, 33), (62, 63)])
def test_swapping_any_two_of_many_experts_fails(
    pair: tuple[int, int], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = blocks.attach_functions

    def swapped(model: ir.Model) -> bool:
        (view,) = blocks.blocks(model)
        for role in ("fc1", "fc2"):
            weight = view.weights[role]
            assert weight.const_value is not None
            array = weight.const_value.numpy().copy()
            array[list(pair)] = array[list(reversed(pair))]
            weight.const_value = ir.tensor(array, name=weight.name)
        return attach(model)

    monkeypatch.setattr(blocks, "attach_functions", swapped)
    assert f"in expert {pair[0]} and" in refused("many", out, VerificationError)


def test_an_expert_that_its_module_ignores_keeps_the_module_as_it_is(out: Path) -> None:
    assert len(export("many", out).blocks) == 1
    report = export("ignores_one", out)
    assert report.blocks == [] and any("something else" in note for note in report.notes)


def test_a_baked_in_size_is_refused(out: Path) -> None:
    text = refused("longer_is_other", out, ImpossibleError)
    assert "sequence" in text and "<= 8" in text


@pytest.mark.parametrize("name", ["gshard", "capacity"])
def test_a_capacity_from_a_shape_stays_one(name: str, out: Path) -> None:
    report = export(name, out)
    assert report.verify is not None and report.verify.passed and report.verify.runs >= 6


def test_a_largest_size_is_a_note(out: Path) -> None:
    report = export("positions", out)
    assert any("sequence <= 16" in note for note in report.notes)
    assert report.verify is not None and report.verify.runs >= 6
    assert all(int(name.split()[0].split("x")[1]) <= 16 for name in report.verify.inputs)


def test_a_branch_on_values_has_both_sides(out: Path) -> None:
    export("value_branch", out)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    for sign in (1.0, -1.0):
        x = np.full((1, 3, toy_modules.HIDDEN), sign, np.float32)
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], np.abs(x))


def test_a_python_loop_over_a_dynamic_axis_is_refused(out: Path) -> None:
    text = refused("recurrent", out, ImpossibleError)
    assert re.search(r"toy_modules\.py:\d+: `for position in range", text) and "a dynamic axis" in text


def test_an_answer_that_differs_is_refused(out: Path) -> None:
    assert "onnxruntime and torch differ: input 3x11" in refused("stateful_elsewhere", out, VerificationError)


def test_a_model_that_remembers_its_calls_is_refused(out: Path) -> None:
    assert "each call changes 'calls' of Stateful" in refused("stateful", out, ImpossibleError)


def test_a_file_that_is_there_stays_when_the_export_is_refused(out: Path) -> None:
    out.write_bytes(b"former")
    with pytest.raises(VerificationError):
        export("stateful_elsewhere", out)
    assert out.read_bytes() == b"former" and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("name", ["normalise", "nearly_one"])
def test_small_constants_survive(name: str, out: Path) -> None:
    export(name, out)
    module = getattr(toy_modules, name)()[0]
    x = torch.stack([torch.zeros(12), torch.full((12,), 123456.0)])
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"x": x.numpy()})
    expected = module(x).numpy()
    assert np.isfinite(actual).all()
    np.testing.assert_array_equal(actual[0], expected[0])
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-7)


@pytest.mark.parametrize("name", ["normalise", "nearly_one"])
def test_onnxscript_still_removes_small_constants(name: str, tmp_path: Path) -> None:
    """When this fails, `translate.tidy` can use onnxscript's optimizer whole."""
    import onnxscript.optimizer

    sparse_onnx.export(f"{FILE}:{name}", tmp_path / "out.onnx")
    model = io.load(tmp_path / "out.onnx")
    operator = {"normalise": "Add", "nearly_one": "Mul"}[name]
    assert operator in [node.op_type for node in model.graph]
    onnxscript.optimizer.optimize_ir(model)
    assert operator not in [node.op_type for node in model.graph]


def test_what_the_source_raises_is_one_line_with_its_place(out: Path) -> None:
    text = refused("raises", out, OutsideError)
    assert "ValueError: no luck today and a second line" in text
    assert re.search(r"toy_modules\.py:\d+", text)
    assert "KeyError: 'missing'" in refused("raises_in_forward", out, OutsideError)


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:\n")
    with pytest.raises(OutsideError, match=r"SyntaxError.*broken\.py:1"):
        sparse_onnx.export(f"{broken}:f", folder / "out.onnx")
    assert list(folder.iterdir()) == []


def test_what_is_not_there(out: Path, tmp_path: Path) -> None:
    assert "did you mean 'packed'" in refused("paked", out, UsageError)
    assert "sample inputs" in refused("no_inputs", out, UsageError)
    assert "not a torch module" in refused("not_a_module", out, UsageError)
    for source, error in (
        ("no/such/file.py:model", ModelError),
        ("no_such_module_anywhere:model", UsageError),
        ("zoo:no-such-model", UsageError),
        ("./no/such/folder/at/all", ModelError),
        (FILE, UsageError),
        ("model.onnx", ModelError),
    ):
        with pytest.raises(error) as caught:
            sparse_onnx.export(source, out)
        assert type(caught.value) is error
    assert not out.exists()


@pytest.mark.parametrize(
    "name",
    [
        "axes_as_text",
        "axes_of_an_input_as_text",
        "axis_as_list",
        "axis_without_name",
        "axis_by_bad_name",
        "axis_from_behind",
        "axes_of_too_many",
        "one_name_twice",
        "complex_input",
        "empty_input",
        "nothing",
        "no_tensor",
    ],
)
def test_what_a_source_gives_is_checked_before_tracing(name: str, out: Path) -> None:
    refused(name, out, UsageError)


def test_training_mode_comes_back(out: Path) -> None:
    module, x, axes = toy_modules.packed()
    module.train()
    module.router.eval()
    sparse_onnx.export((module, x, axes), out)
    assert module.training and module.experts.training and not module.router.training
    with pytest.raises(UsageError):
        sparse_onnx.export((module, x, "batch"), out)
    assert module.training and not module.router.training


@pytest.mark.parametrize("step", ["loading the model", "tracing", "writing", "saving"])
def test_a_termination_leaves_nothing_behind(step: str, out: Path) -> None:
    def terminate(text: str) -> None:
        if text.startswith(step):
            os.kill(os.getpid(), signal.SIGTERM)

    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(SystemExit) as caught:
        export("packed", out, progress=terminate)
    assert caught.value.code == 143
    assert list(out.parent.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_program_keeps_its_own_handler_of_terminations(out: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        export("packed", out, progress=lambda text: os.kill(os.getpid(), signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen and out.exists()


@pytest.mark.parametrize(("name", "status"), [("recurrent", 5), ("wrong_axis", 1), ("axis_as_list", 2)])
def test_a_failure_is_one_line_on_the_terminal(name: str, status: int, tmp_path: Path) -> None:
    code = "import sys; from sparse_onnx.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "export", f"{FILE}:{name}", str(tmp_path / "out.onnx"), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")


def test_wrong_arguments(out: Path, tmp_path: Path) -> None:
    refused("packed", out, UsageError, dtype="float8")
    refused("packed", out, UsageError, opset=17)
    refused("packed", out, UsageError, opset=26)
    refused("packed", out, UsageError, random_weights=True)
    with pytest.raises(UsageError):
        export("packed", tmp_path / "no" / "folder" / "out.onnx")


def test_a_class_whose_instances_know_their_inputs(out: Path) -> None:
    assert export("WithExamples", out).verify is not None
    model = io.load(out)
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == ["input", "output"]


def test_a_module_given_as_an_object(out: Path) -> None:
    module, x, axes = toy_modules.packed()
    module.eval()
    before = dict(vars(module.experts))
    report = sparse_onnx.export((module, x, axes), out, dtype="bfloat16")
    assert len(report.blocks) == 1
    assert vars(module.experts) == before
    assert module.router.weight.dtype == torch.float32


def test_a_python_module_in_this_folder(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(FILE).parent)
    assert len(sparse_onnx.export("toy_modules:packed", out).blocks) == 1


@pytest.mark.parametrize("opset", [18, 21, 25])
def test_other_opsets(opset: int, out: Path) -> None:
    export("packed", out, opset=opset)
    assert io.load(out).opset_imports[""] == opset


def test_the_zoo(out: Path) -> None:
    from sparse_onnx import models

    try:
        model = models.get("byte-moe").load()
    except ModelError:
        pytest.skip("its weights are not here")
    report = sparse_onnx.export("zoo:byte-moe", out)
    assert len(report.blocks) == len(experts.find(model.module)) > 0
    assert report.verify is not None and report.verify.passed


def test_progress_is_told(out: Path) -> None:
    said: list[str] = []
    say: Callable[[str], None] = said.append
    export("packed", out, progress=say)
    assert "tracing" in said and any("1x40" in text for text in said)


def test_a_dead_translation_leaves_no_hook(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no")

    module, x, axes = toy_modules.packed()
    monkeypatch.setattr(translate, "to_onnx", fail)
    with pytest.raises(ImpossibleError, match="RuntimeError: no"):
        sparse_onnx.export((module, x, axes), out)
    assert "forward" not in vars(module.experts)


def test_the_operator_in_torch_is_the_reference() -> None:
    """Empty, dropped and doubled slots, against the numpy reference of the neutral form."""
    module = toy_modules.PackedExperts()
    (found,) = experts.find(torch.nn.ModuleList([module]))
    assert found.spec is not None
    generator = torch.Generator().manual_seed(0)
    for tokens in (0, 1, 9):
        x = torch.randn(tokens, toy_modules.HIDDEN, generator=generator)
        index = torch.randint(0, toy_modules.EXPERTS + 1, (tokens, 3), generator=generator)
        weight = torch.rand(tokens, 3, generator=generator)
        actual = experts._call(module, found.spec, x, index, weight).detach().numpy()
        weights = {
            "fc1": module.gate_up_proj.detach().numpy(),
            "fc1_bias": zeros(module.gate_up_proj.shape[:2]),
            "fc2": module.down_proj.detach().numpy(),
            "fc2_bias": zeros(module.down_proj.shape[:2]),
        }
        expected = blocks.reference(found.spec, x.numpy(), index.numpy(), weight.numpy(), **weights)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def zeros(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(tuple(shape), np.float32)

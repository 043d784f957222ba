"""`--adapter`: replacements are tried, used while the model is traced, and gone afterwards."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
import toy_adapters  # noqa: E402

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
from sparse_onnx.export import adapters, experts, samples, sources, translate  # noqa: E402
from sparse_onnx.graph import io  # noqa: E402

FILE = str(Path(toy_adapters.__file__))
DOCS = Path(__file__).parents[2] / "docs" / "adapters.md"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "out.onnx"


def test_without_an_adapter_there_is_no_block(out: Path) -> None:
    report = sparse_onnx.export(toy_adapters.model(), out)
    assert report.blocks == [] and report.verify is not None and report.verify.passed


def test_each_replaced_module_is_one_block(out: Path) -> None:
    report = sparse_onnx.export(f"{FILE}:model", out, adapters=[f"{FILE}:none", f"{FILE}:good"])
    assert [block.name for block in report.blocks] == ["0.experts", "2.experts"]
    assert {(block.activation, block.gated, block.experts) for block in report.blocks} == {("silu", True, 5)}
    assert report.verify is not None and report.verify.max_rel_error is not None
    assert report.verify.passed and report.verify.max_rel_error < 1e-5
    assert f"adapter {FILE}:good: 0 and 1 more" in report.notes
    assert f"adapter {FILE}:none: replaced no module" in report.notes
    assert "0 and 1 more: packed for a test" in report.notes
    names = [str(value.name) for value in io.load(out).graph.initializers.values()]
    assert {"0.experts.gate_up_proj", "0.experts.gate_up_proj_bias", "2.experts.down_proj"} <= set(names)


def refused(adapter: object, out: Path, error: type[SparseOnnxError]) -> str:
    module, x, axes = toy_adapters.model()
    before, state = dict(module.named_modules()), {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(error) as caught:
        sparse_onnx.export((module, x, axes), out, adapters=[adapter])
    assert type(caught.value) is error
    assert list(out.parent.iterdir()) == []
    assert "\n" not in str(caught.value)
    assert dict(module.named_modules()) == before
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    return str(caught.value)


def test_a_wrong_adapter_is_refused(out: Path) -> None:
    text = refused(f"{FILE}:wrong", out, VerificationError)
    assert f"{FILE}:wrong" in text and "replacement for '0'" in text
    measured = re.search(r"differs by ([\d.]+)", text)
    assert measured is not None and float(measured[1]) > 1e-2
    text = refused(toy_adapters.wrong_for_one, out, VerificationError)
    measured = re.search(r"differs by ([\d.]+)", text)
    assert measured is not None and 1e-3 < float(measured[1]) < 2e-2
    assert "float32 [7, 11]" not in text
    assert re.search(
        r"float32 \[\d+, 11\] instead of float32 \[\d+, 12\]",
        refused(toy_adapters.other_shape, out, VerificationError),
    )


def test_what_an_adapter_raises_is_one_line_with_its_place(out: Path) -> None:
    text = refused(f"{FILE}:raises", out, OutsideError)
    assert "the adapter raised KeyError: 'Sequential'" in text and re.search(r"toy_adapters\.py:\d+", text)
    text = refused(f"{FILE}:raises_in_forward", out, OutsideError)
    assert "ValueError: not today" in text and re.search(r"toy_adapters\.py:\d+", text)


def test_what_is_no_adapter(out: Path) -> None:
    assert "gives int for ''" in refused(f"{FILE}:number", out, UsageError)
    assert "cannot be called" in refused(f"{FILE}:not_callable", out, UsageError)
    assert "did you mean 'good'" in refused(f"{FILE}:goood", out, UsageError)
    assert "no such file" in refused("nowhere.py:good", out, ModelError)
    assert "FILE.py:NAME" in refused(FILE, out, UsageError)
    with pytest.raises(UsageError, match="as a list"):
        sparse_onnx.export(toy_adapters.model(), out, adapters=toy_adapters.good)


def test_the_module_is_as_it_was(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, axes = toy_adapters.model()
    module.eval()
    expected = module(x)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    storage = {key: value.data_ptr() for key, value in module.named_parameters()}
    parts = dict(module.named_modules())
    for fails in (False, True):
        if fails:
            monkeypatch.setattr(translate, "to_onnx", None)
            with pytest.raises(ImpossibleError):
                sparse_onnx.export((module, x, axes), out, adapters=[toy_adapters.good])
        else:
            sparse_onnx.export((module, x, axes), out, adapters=[toy_adapters.good])
        assert dict(module.named_modules()) == parts
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
        assert {key: value.data_ptr() for key, value in module.named_parameters()} == storage
        assert torch.equal(module(x), expected)
        assert not any("forward" in vars(part) for part in module.modules())


def test_a_module_in_two_places_is_replaced_in_both(out: Path) -> None:
    module, x, axes = toy_adapters.model()
    module = torch.nn.Sequential(module[0], torch.nn.Tanh(), module[0])
    report = sparse_onnx.export((module, x, axes), out, adapters=[toy_adapters.good])
    assert len(report.blocks) == 2
    assert len({block.node.inputs[3] for block in blocks.blocks(io.load(out))}) == 1


def test_the_whole_model_can_be_replaced(out: Path) -> None:
    module, x, _ = toy_adapters.model()
    report = sparse_onnx.export(
        (module[0], x, {"x": {0: "tokens"}}), out, adapters=[toy_adapters.good], dtype="float16"
    )
    assert [block.name for block in report.blocks] == ["experts"]
    assert report.verify is not None and report.verify.passed


def test_a_gate_without_neutral_form_is_computed_on_chosen_rows_only(out: Path) -> None:
    report = sparse_onnx.export(f"{FILE}:mish_model", out, adapters=[f"{FILE}:mish"])
    assert report.blocks == []
    assert any("experts: its gate has no neutral form" in note for note in report.notes)
    assert report.verify is not None and report.verify.max_rel_error is not None
    assert report.verify.passed and report.verify.max_rel_error < 1e-5
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    model = io.load(out)
    products = [node for node in model.graph.all_nodes() if node.op_type in ("MatMul", "Gemm")]
    assert len(products) >= 2 * toy_adapters.EXPERTS
    assert np.isfinite(session.run(None, {"x": np.zeros((3, 12), np.float32)})[0]).all()


def test_weights_are_moved_into_the_stack_only_where_nobody_else_has_them() -> None:
    for share in (False, True):
        module, x, axes = toy_adapters.model()
        source = sources.of_objects((module, x, axes))
        given = [adapters.Named("good", toy_adapters.good)]
        adapted = adapters.adapt(source, given, share=share)
        packed = adapted.replaced[0].replacement.experts
        weight, place = module[0].experts[2].up.weight, packed.gate_up_proj[2, toy_adapters.INNER :]
        assert torch.equal(weight, place)
        assert (weight.data_ptr() == place.data_ptr()) is share
        run = samples.untraced(source.interface)[0]
        with adapted.in_place(source) as replaced:
            (first, _) = experts.find(replaced.module)
            assert first.spec is not None
            torch.testing.assert_close(replaced.forward(run.inputs), source.forward(run.inputs))


def test_packed_experts_are_checked() -> None:
    first, down = torch.zeros(3, 4, 5), torch.zeros(2, 5, 4)
    with pytest.raises(ValueError, match="packed weights"):
        adapters.PackedExperts(first, down, torch.relu, gated=False)
    with pytest.raises(ValueError, match="bias"):
        adapters.PackedExperts(first, first, torch.relu, gated=False, first_bias=torch.zeros(3, 4))


@pytest.mark.parametrize("transposed", [False, True])
def test_packed_experts_compute_what_they_say(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    first, down = torch.randn(3, 8, 5, generator=generator), torch.randn(3, 6, 4, generator=generator)
    biases = torch.randn(3, 8, generator=generator), torch.randn(3, 6, generator=generator)
    packed = adapters.PackedExperts(
        first.transpose(1, 2).contiguous() if transposed else first,
        down.transpose(1, 2).contiguous() if transposed else down,
        torch.nn.functional.silu,
        gated=True,
        first_bias=biases[0],
        down_bias=biases[1],
        transposed=transposed,
    )
    tokens, weight = torch.randn(7, 5, generator=generator), torch.rand(7, 2, generator=generator)
    index = torch.tensor([[0, 1], [1, 1], [3, 3], [2, 3], [0, 2], [2, 1], [3, 0]])
    expected = torch.zeros(7, 6)
    for token in range(7):
        for slot in range(2):
            expert = int(index[token, slot])
            if expert < 3:
                gate, up = (first[expert] @ tokens[token] + biases[0][expert]).chunk(2)
                row = down[expert] @ (torch.nn.functional.silu(gate) * up) + biases[1][expert]
                expected[token] += weight[token, slot] * row
    torch.testing.assert_close(packed(tokens, index, weight), expected)
    (found,) = experts.find(torch.nn.ModuleList([packed]))
    assert found.spec is not None
    torch.testing.assert_close(experts._call(packed, found.spec, tokens, index, weight), expected)


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    text = DOCS.read_text()
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        name = re.match(r"# (\w+\.py)\n", code)
        assert name is not None
        (tmp_path / name[1]).write_text(code)
    (command,) = re.findall(r"```sh\n(.*?)\n```", text, re.DOTALL)
    program, *arguments = command.split()
    assert program == "sparse-onnx"
    code = "import sys; from sparse_onnx.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--json", "-"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    names = [block.name for block in blocks.blocks(io.load(tmp_path / "model.onnx"))]
    assert names == ["1.experts", "2.experts"]
    assert all(f"`{name}`" in text for name in names)


def test_a_wrong_adapter_on_the_terminal(tmp_path: Path) -> None:
    code = "import sys; from sparse_onnx.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "export", f"{FILE}:model", str(tmp_path / "out.onnx"), "--quiet"]
    done = subprocess.run(
        [*command, "--adapter", f"{FILE}:wrong"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")

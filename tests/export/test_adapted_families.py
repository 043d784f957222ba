"""Families of transformers that its experts interface does not reach: one block a sparse layer, exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from adapted_families import FALLBACKS, FAMILIES, config  # noqa: E402
from transformers.models.switch_transformers.modeling_switch_transformers import (  # noqa: E402
    SwitchTransformersSparseMLP,
)

import sparse_onnx  # noqa: E402
from sparse_onnx import blocks  # noqa: E402
from sparse_onnx.export import adapters, check, experts, random_weights, samples, sources  # noqa: E402
from sparse_onnx.export.adapters import jetmoe, registry  # noqa: E402
from sparse_onnx.graph import io  # noqa: E402

EXPERTS = {"longcat": 5, "zaya": 4}
#: Sparse layers; the encoder-decoders have one of two in each half.
LAYERS = 2


def model(name: str, folder: Path, **changes: Any) -> sources.Source:
    config(name, **changes).save_pretrained(folder)
    return sources.resolve(str(folder), random_weights=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_each_sparse_layer_is_one_block(name: str, tmp_path: Path) -> None:
    config(name).save_pretrained(tmp_path / "model")
    out = tmp_path / "out.onnx"
    report = sparse_onnx.export(tmp_path / "model", out, random_weights=True)
    assert report.verify is not None and report.verify.passed and report.verify.runs >= 7
    assert report.verify.max_rel_error is not None and report.verify.max_rel_error < 1e-5
    assert report.verify.tokens_left_out == 0
    assert len(report.blocks) == LAYERS
    for block, record in zip(blocks.blocks(io.load(out)), report.blocks, strict=True):
        assert record.experts == EXPERTS.get(name, 5)
        assert record.name.endswith(".experts")
        weight = block.node.inputs[3]
        assert weight is not None and (weight.name or "").startswith(f"{record.name}.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"), [("step3p7", "no neutral form"), ("muse_spark", "is normalised")]
)
def test_experts_without_neutral_form_are_exact(name: str, reason: str, tmp_path: Path) -> None:
    config(name).save_pretrained(tmp_path / "model")
    report = sparse_onnx.export(tmp_path / "model", tmp_path / "out.onnx", random_weights=True)
    assert report.verify is not None and report.verify.max_rel_error is not None
    assert report.verify.passed and report.verify.max_rel_error < 1e-5
    assert report.blocks == []
    assert any(reason in note for note in report.notes)


@pytest.mark.parametrize("name", FALLBACKS)
def test_plain_operators_answer_like_the_model(name: str, tmp_path: Path) -> None:
    source = model(name, tmp_path)
    adapted = adapters.adapt(source)
    assert not any("does not fit" in note for note in adapted.notes)
    runs = samples.untraced(source.interface)
    for grouped in (False, True):
        with adapted.in_place(source) as replaced:
            found = experts.find(replaced.module)
            assert all(entry.spec is None for entry in found)
            with experts.hooked(found, grouped=grouped):
                actual = [outputs(replaced, run) for run in runs]
        for run, answer in zip(runs, actual, strict=True):
            np.testing.assert_allclose(answer, outputs(source, run), rtol=1e-4, atol=2e-5)


class VitPose(torch.nn.Module):
    """The backbone with its last features alone."""

    def __init__(self) -> None:
        super().__init__()
        settings = transformers.VitPoseBackboneConfig(
            image_size=[32, 24],
            patch_size=[8, 8],
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            mlp_ratio=2,
            num_experts=5,
            part_features=12,
            out_indices=[-1],
        )
        self.backbone = transformers.VitPoseBackbone(settings).eval()
        random_weights.fill(self.backbone)

    def forward(self, pixel_values: torch.Tensor, dataset_index: torch.Tensor) -> torch.Tensor:
        return self.backbone(pixel_values, dataset_index=dataset_index).feature_maps[0]


def test_the_data_set_of_an_image_decides_its_expert(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "pixel_values": torch.randn(5, 3, 32, 24, generator=generator),
        "dataset_index": torch.tensor([0, 4, 2, 1, 3]),
    }
    module = VitPose()
    report = sparse_onnx.export((module, inputs), tmp_path / "out.onnx")
    assert report.verify is not None and report.verify.max_rel_error is not None
    assert report.verify.passed and report.verify.max_rel_error < 1e-5
    assert any("each image gathers its own" in note for note in report.notes)
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
    inputs["dataset_index"] = torch.tensor([4, 3, 5, -1, 0])  # and data sets of no expert
    (actual,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    np.testing.assert_allclose(actual, module(**inputs).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("export", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_rotary_embedding_of_llama4s_pictures(export: bool, tmp_path: Path) -> None:
    settings = transformers.Llama4VisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        vision_output_dim=24,
        image_size=8,
        patch_size=2,
        projector_input_dim=24,
        projector_output_dim=24,
    )
    module = transformers.Llama4VisionModel(settings).eval()
    random_weights.fill(module)
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    source = sources.of_objects((module, {"pixel_values": pixels}))
    adapted = adapters.adapt(source)
    assert [entry.path for entry in adapted.replaced] == [f"model.layers.{n}.self_attn" for n in range(2)]
    if export:
        report = sparse_onnx.export((module, {"pixel_values": pixels}), tmp_path / "out.onnx")
        assert report.verify is not None and report.verify.passed


@pytest.fixture(params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, sources.Source]]:
    yield request.param, model(request.param, tmp_path)


def outputs(source: sources.Source, run: samples.Run) -> np.ndarray:
    return sources.leaves(source.forward(run.inputs))[0].double().numpy()


def test_replacements_answer_like_the_model_and_leave_it_as_it_was(
    source: tuple[str, sources.Source],
) -> None:
    """On every input of the comparison; also with the weights moved to where they are packed."""
    _, found = source
    state = {key: value.clone() for key, value in found.module.state_dict().items()}
    runs = samples.untraced(found.interface)
    before = [outputs(found, run) for run in runs]
    adapted = adapters.adapt(found, share=True)
    assert not any("does not fit" in note for note in adapted.notes)
    modules = dict(found.module.named_modules())
    with adapted.in_place(found) as replaced:
        specs = [entry.spec for entry in experts.find(replaced.module) if entry.spec is not None]
        assert len(specs) == LAYERS
        for run, expected in zip(runs, before, strict=True):
            np.testing.assert_allclose(outputs(replaced, run), expected, rtol=1e-4, atol=2e-5)
    assert dict(found.module.named_modules()) == modules
    for key, value in found.module.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    for run, expected in zip(runs, before, strict=True):
        np.testing.assert_array_equal(outputs(found, run), expected)


def chosen(source: sources.Source) -> torch.Tensor:
    """All indices that the packed experts of the first sparse layer are called with on an untraced input."""
    adapted = adapters.adapt(source)
    seen: list[torch.Tensor] = []
    with adapted.in_place(source) as replaced:
        found = experts.find(replaced.module)
        handle = found[0].module.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
        for run in samples.untraced(replaced.interface):
            replaced.forward(run.inputs)
        handle.remove()
    return torch.cat([index.flatten() for index in seen])


@pytest.mark.parametrize(("name", "count"), [("switch", 5), ("longcat", 5), ("zaya", 4), ("nllb", 5)])
def test_slots_are_really_dropped(name: str, count: int, tmp_path: Path) -> None:
    index = chosen(model(name, tmp_path))
    dropped = (index == count).double().mean()
    assert 0.02 < dropped < 0.9
    assert len(index.unique()) == {"nllb": 3, "zaya": 4}.get(name, count + 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_expert_matters(name: str, tmp_path: Path) -> None:
    """Random weights under which two swapped experts show in the answer."""
    source = model(name, tmp_path)
    run = samples.untraced(source.interface)[5]
    before = outputs(source, run)
    adapted = adapters.adapt(source, share=False)
    with adapted.in_place(source) as replaced:
        for entry in experts.find(replaced.module):
            if entry.spec is not None:
                with torch.no_grad():
                    weight = entry.module.down_proj
                    weight.copy_(weight.roll(1, 0))
        changed = outputs(replaced, run)
    assert np.abs(changed - before).max() > 1e-2 * np.abs(before).max()


@pytest.mark.parametrize("form", ["grouped", "gathered", pytest.param("branched", marks=pytest.mark.slow)])
def test_dropped_slots_add_nothing_in_any_form(form: str, tmp_path: Path) -> None:
    module = SwitchTransformersSparseMLP(config("switch")).eval()
    random_weights.fill(module)
    generator = torch.Generator().manual_seed(0)
    sample, axes = torch.randn(3, 9, 32, generator=generator), {"hidden_states": {0: "batch", 1: "sequence"}}
    report = sparse_onnx.export((module, sample, axes), tmp_path / "out.onnx")
    assert [block.router for block in report.blocks] == ["softmax_top1_capacity"]
    optimized = sparse_onnx.optimize(tmp_path / "out.onnx", tmp_path / "fast.onnx", target="cpu", form=form)
    assert [block.form for block in optimized.blocks] == [form]
    session = onnxruntime.InferenceSession(str(tmp_path / "fast.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(2, 40, 32, generator=generator)
    expected = module(x).detach().numpy()
    dropped = np.abs(expected).max(-1) == 0
    assert 0.5 < dropped.mean() < 1
    (actual,) = session.run(None, {"hidden_states": x.numpy()})
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert not actual[dropped].any()


def test_nllb_still_has_its_bug(tmp_path: Path) -> None:
    """When this fails, transformers has fixed it, and the adapter and its note go."""
    source = model("nllb", tmp_path)
    notes = adapters.adapt(source).notes
    assert any("only experts 0 and 1" in note for note in notes)
    run = samples.untraced(source.interface)[5]
    before = outputs(source, run)
    layer = source.module.model.encoder.layers[1].ffn
    with torch.no_grad():
        for number in (2, 3, 4):
            for parameter in layer.experts[f"expert_{number}"].parameters():
                parameter.zero_()
    np.testing.assert_array_equal(outputs(source, run), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_prioritized_routing": True},
        {"normalize_router_prob_before_dropping": True, "router_bias": True},
        {"moe_eval_capacity_token_fraction": -1.0, "expert_capacity": 3, "moe_token_dropout": 0.0},
        {"router_ignore_padding_tokens": True},
    ],
    ids=str,
)
def test_ways_of_nllb_to_route(changes: dict[str, Any], tmp_path: Path) -> None:
    source = model("nllb", tmp_path, **changes)
    adapted = adapters.adapt(source)
    assert len([entry for entry in adapted.replaced if entry.path.endswith("ffn")]) == LAYERS
    with adapted.in_place(source) as replaced:
        for run in samples.untraced(source.interface):
            np.testing.assert_allclose(outputs(replaced, run), outputs(source, run), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"second_expert_policy": "random"}, {"second_expert_policy": "sampling"}]
)
def test_a_router_that_draws_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    from sparse_onnx.core.errors import ImpossibleError

    with pytest.raises(ImpossibleError, match=r"ffn: the router draws random numbers"):
        adapters.adapt(model("nllb", tmp_path, **changes))


@pytest.mark.parametrize("break_it", ["values", "names"])
def test_an_adapter_of_ours_that_no_longer_fits_is_not_used(
    break_it: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(module: Any) -> Any:
        replacement = jetmoe.moe(module)
        if break_it == "names":
            return module.no_longer_there
        replacement.experts.activation = torch.nn.GELU()
        return replacement

    monkeypatch.setitem(registry._BY_CLASS, "JetMoeMoE", changed)
    adapted = adapters.adapt(model("jetmoe", tmp_path))
    assert adapted.replaced == ()
    reason = {"values": "it differs by 0.", "names": "AttributeError"}[break_it]
    for number in range(LAYERS):
        (note,) = [note for note in adapted.notes if note.startswith(f"model.layers.{number}.mlp: ")]
        assert "does not fit" in note and reason in note
    assert any("attention experts of one matrix" in note for note in adapted.notes)


def test_llama4_with_a_bias_is_not_adapted(tmp_path: Path) -> None:
    source = model("llama4", tmp_path)
    moe = source.module.model.layers[0].feed_forward
    moe.experts.register_parameter("bias", torch.nn.Parameter(torch.ones(3)))
    paths = [entry.path for entry in adapters.adapt(source).replaced]
    assert "model.layers.0.feed_forward" not in paths and "model.layers.1.feed_forward" in paths


@pytest.mark.parametrize(("apart", "passes"), [(3e-7, True), (1e-2, False)])
def test_only_near_ties_of_a_replaced_module_are_left_out(apart: float, passes: bool, tmp_path: Path) -> None:
    """Experts 1 and 2 score alike in the last layer, and the file has their router rows the other way round."""
    source = model("jetmoe", tmp_path / "model")
    name = "model.layers.1.mlp.router.layer.weight"
    out, changed = tmp_path / "out.onnx", tmp_path / "tied.onnx"
    sparse_onnx.export(tmp_path / "model", out, random_weights=True)
    weight = source.module.get_parameter(name)
    with torch.no_grad():
        weight[2] = weight[1] * (1 + apart)
    file = io.load(out)
    file.graph.initializers[name].const_value = ir.tensor(weight.detach().numpy()[[0, 2, 1, 3, 4]], name=name)
    io.save(file, changed)
    adapted = adapters.adapt(source)
    with adapted.in_place(source) as replaced:
        found = experts.find(replaced.module)
    sizes = {"batch": 16, "sequence": 1}
    runs = [samples.Run("16x1", source.interface.draw(sizes), sizes)]
    record = check.compare(changed, source, found, runs, tolerance=1e-4, alongside=adapted.alongside)
    assert record.passed is passes
    if passes:
        assert 0 < record.tokens_left_out < 16
        assert record.router_margin is not None and record.router_margin < 1e-5
    else:
        assert record.failure is not None and "chose other experts" in record.failure
    assert not any(module._forward_pre_hooks for module in source.module.modules())

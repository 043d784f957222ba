from __future__ import annotations

import dataclasses

import pytest

from sparse_onnx import targets
from sparse_onnx.blocks.lowering import Form
from sparse_onnx.core import registry
from sparse_onnx.core.errors import UsageError
from sparse_onnx.core.passes import parse_options
from sparse_onnx.passes import PIPELINE
from sparse_onnx.targets import profile as profiles

EXPECTED = [
    *("coreml", "cpu", "cuda", "directml", "nnapi", "node", "openvino", "ort-mobile", "qnn-htp"),
    *("tensorrt", "wasm", "webgpu", "xnnpack"),
]

#: Fields that say nothing about a provider, or are provenance themselves.
NO_PROVENANCE = {"name", "provider", "summary", "onnxruntime", "format", "runtime", "needs", "sources"}
NO_PROVENANCE |= {"provenance", "operators", "results"}


def test_short_and_full_names() -> None:
    assert targets.get("cpu") is targets.get("CPUExecutionProvider") is targets.get("CPU")
    assert targets.get("WebGpuExecutionProvider") is targets.get("webgpu")
    assert targets.names() == EXPECTED


def test_unknown_target_has_a_hint() -> None:
    with pytest.raises(UsageError, match="unknown target 'cpy'") as caught:
        targets.get("cpy")
    assert "cpu" in caught.value.hint and caught.value.exit_code == 2


def test_a_target_that_is_no_misspelling_gets_the_list() -> None:
    with pytest.raises(UsageError, match="unknown target 'hexagon'") as caught:
        targets.get("hexagon")
    assert caught.value.hint == f"known targets: {', '.join(EXPECTED)}"


def without_source(profile: profiles.TargetProfile) -> list[str]:
    """What the profile claims without saying where it is from."""
    entries = {**profile.operators, **profile.results}
    found = [key for key, entry in entries.items() if not profile.sources.get(entry.source)]
    defaults = {field.name: field.default for field in dataclasses.fields(profile)}
    for field in dataclasses.fields(profile):
        value = getattr(profile, field.name)
        if field.name not in NO_PROVENANCE and value and value != defaults[field.name]:
            found += [] if profile.provenance.get(field.name) else [field.name]
    for text in profile.provenance.values():
        if not (text in profile.sources or "https://" in text or "probed" in text or "measured" in text):
            found += [] if text.startswith(("by the sources", "left out", "the order of")) else [text]
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_every_entry_has_its_provenance(name: str) -> None:
    profile = targets.get(name)
    assert without_source(profile) == []
    assert profile.operators or profile.format == "ort", "nothing is known of what it runs"
    lowerings = {form for step in PIPELINE for form in step.forms}
    assert set(profile.form_names) <= lowerings, "a form that no pass makes"
    assert not set(profile.never) & set(profile.form_names)
    assert set(profile.form_names) | set(profile.never) == lowerings, "forms not judged"
    by_form = {form: step.name for step in PIPELINE for form in step.forms}
    for text in profile.forms:
        form = Form.parse(text)
        parse_options(registry.get(by_form[form.name]), dict(form.options))


def test_an_entry_without_provenance_is_seen() -> None:
    profile = targets.get("cuda")
    operator = profiles.Operator(("float32",), "nobody")
    assert without_source(dataclasses.replace(profile, operators={"Add": operator})) == ["Add"]
    assert "static" in without_source(dataclasses.replace(profile, static=True))


def test_a_probe_comes_before_the_profiles_own_entries(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(profiles.PROBED_VARIABLE, str(tmp_path))
    (tmp_path / "cuda.toml").write_text(
        '[sources]\nprobe = "probed"\n[operators]\nTopK = { types = [], source = "probe", note = "on the CPU" }\n'
    )
    profiles.forget()
    try:
        changed = targets.get("cuda")
    finally:
        monkeypatch.undo()
        profiles.forget()
    assert changed.operators["TopK"].types == () and changed.operators["Gather"].source == "kernels"
    assert targets.get("cuda").operators["TopK"].types

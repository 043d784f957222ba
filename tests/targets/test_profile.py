from __future__ import annotations

import pytest

from sparse_onnx import targets
from sparse_onnx.core.errors import UsageError
from sparse_onnx.passes import PIPELINE


def test_short_and_full_names() -> None:
    assert targets.get("cpu") is targets.get("CPUExecutionProvider") is targets.get("CPU")
    assert targets.names() == ["cpu"]


def test_unknown_target_has_a_hint() -> None:
    with pytest.raises(UsageError, match="unknown target 'cpy'") as caught:
        targets.get("cpy")
    assert "cpu" in caught.value.hint and caught.value.exit_code == 2


def test_a_target_that_is_no_misspelling_gets_the_list() -> None:
    with pytest.raises(UsageError, match="unknown target 'cuda'") as caught:
        targets.get("cuda")
    assert caught.value.hint == "known targets: cpu"


@pytest.mark.parametrize("name", targets.names())
def test_every_entry_has_its_provenance(name: str) -> None:
    profile = targets.get(name)
    assert set(profile.provenance) >= {"forms", "dtypes"}
    assert all(profile.provenance.values())
    lowerings = {form for step in PIPELINE for form in step.forms}
    assert set(profile.forms) <= lowerings, "a form that no pass makes"

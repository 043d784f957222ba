"""Which form a block is wanted in, and what happens when that form refuses it."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape, layered_model, routed_model

from sparse_onnx import targets
from sparse_onnx.blocks import neutral_blocks
from sparse_onnx.blocks.lowering import WANTED_KEY, Form, strike, takes, want, wanted
from sparse_onnx.core.errors import UsageError
from sparse_onnx.optimize import choose as chooser
from sparse_onnx.optimize.choose import choose, parse_form
from sparse_onnx.targets.profile import Rule, TargetProfile


def profile(**changes: object) -> TargetProfile:
    values = {
        "name": "test",
        "provider": "CPUExecutionProvider",
        "summary": "",
        "onnxruntime": "",
        "forms": ("grouped", "fused", "branched"),
        "dtypes": ("float32",),
        "provenance": {},
    }
    return TargetProfile(**{**values, **changes})  # type: ignore[arg-type]


def wishes(model: ir.Model) -> list[list[str]]:
    return [[str(form) for form in wanted(block.node)] for block in neutral_blocks(model)]


def test_forms_as_text() -> None:
    assert str(Form.parse("branched:style=loop,group=4")) == "branched:style=loop,group=4"
    assert Form.parse("fused") == Form("fused")
    for text in ("", ":a=1", "x:a", "x:=1"):
        with pytest.raises(ValueError):
            Form.parse(text)


def test_a_form_that_refuses_makes_way_for_the_next() -> None:
    [block] = neutral_blocks(routed_model())
    want(block.node, [Form("fused"), Form("grouped")])
    assert takes(block.node, "fused") == Form("fused") and takes(block.node, "grouped") is None
    strike(block.node, "fused")
    assert takes(block.node, "grouped") == Form("grouped")
    strike(block.node, "grouped")
    assert takes(block.node, "branched") is None, "the last wish stays: nobody else is to take the block"
    want(block.node, [])
    assert WANTED_KEY not in block.node.metadata_props and takes(block.node, "branched") == Form("branched")


def test_default_request_and_measurement() -> None:
    model = layered_model(layers=2)
    assert choose(model, profile(), None) == [] and wishes(model) == [["grouped"], ["grouped"]]
    choose(model, profile(), Form("fused"))
    assert wishes(model) == [["fused", "grouped"]] * 2
    names = [block.name for block in neutral_blocks(model)]
    choose(model, profile(), None, {names[1]: Form.parse("branched:style=loop")})
    assert wishes(model) == [["grouped"], ["branched:style=loop", "grouped"]]


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        (Rule("fused", "", experts=4), True),
        (Rule("fused", "", experts=5), False),
        (Rule("fused", "", bits=0), True),
        (Rule("fused", "", bits=4), False),
        (Rule("fused", "", all_experts=8), True),
        (Rule("fused", "", all_experts=9), False),
        (Rule("fused", "", bits=0, experts=4, all_experts=8), True),
    ],
)
def test_rules_of_a_profile(rule: Rule, holds: bool) -> None:
    model = layered_model(Shape(experts=4), layers=2)
    choose(model, profile(rules=(rule, Rule("branched", "", experts=100))), None)
    assert wishes(model) == [["fused", "grouped"] if holds else ["grouped"]] * 2


def test_packed_forms_before_the_mappings_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layered_model(Shape(experts=4, hidden=64, inner=64), layers=3)
    assert choose(model, profile(), None) == []
    needed = 3 * 4 * 2 + sum(
        value.const_value.nbytes >= 1024 for value in model.graph.initializers.values() if value.const_value
    )
    monkeypatch.setattr(chooser, "MOST_MAPPINGS", needed)
    assert choose(model, profile(), None) == []
    monkeypatch.setattr(chooser, "MOST_MAPPINGS", needed - 1)
    [note] = choose(model, profile(), None)
    assert f"{needed} mapped weights" in note and wishes(model) == [["fused", "grouped"]] * 3
    assert choose(model, profile(), Form("grouped")) == [], "what is asked for is not second-guessed"


def test_forms_that_cannot_be_asked_for() -> None:
    cpu = targets.get("cpu")
    assert parse_form("auto", cpu) is None
    with pytest.raises(UsageError, match="unknown form 'x'"):
        parse_form("x", cpu)
    with pytest.raises(UsageError, match="is not NAME"):
        parse_form("grouped:x", cpu)
    with pytest.raises(UsageError, match="does not take the form 'branched'"):
        parse_form("branched", profile(forms=("grouped",)))


def test_wishes_do_not_stay_in_the_file(tmp_path) -> None:
    from builders import save_external

    import sparse_onnx
    from sparse_onnx.graph import io

    source = save_external(layered_model(Shape(experts=6, hidden=32, inner=48)), tmp_path / "in.onnx")
    sparse_onnx.optimize(source, tmp_path / "out.onnx", skip=["fuse_gating"])
    text = json.dumps([dict(node.metadata_props) for node in io.load(tmp_path / "out.onnx").graph])
    assert "sparse_onnx.block" in text and WANTED_KEY not in text
    assert np.array(wishes(io.load(tmp_path / "out.onnx")), object).tolist() == [[], []]

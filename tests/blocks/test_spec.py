"""The attributes of an expert as data."""

from __future__ import annotations

import math

import pytest
from moe_cases import label, specs

from sparse_onnx.blocks import Activation, ExpertSpec, GateLayout, WeightLayout
from sparse_onnx.blocks.spec import input_names

SILU, GATED, OUT_IN = Activation.SILU, GateLayout.CONCATENATED, WeightLayout.OUT_IN


def test_the_numbers_are_a_file_format() -> None:
    """They are written into models: a change of one makes old files mean something else."""
    assert [(a.label, int(a)) for a in Activation] == [
        ("silu", 0),
        ("gelu", 1),
        ("gelu_tanh", 2),
        ("relu", 3),
        ("relu2", 4),
        ("silu_softcap", 5),
    ]
    assert [(g.name, int(g)) for g in GateLayout][:3] == [
        ("NONE", 0),
        ("CONCATENATED", 1),
        ("INTERLEAVED", 2),
    ]
    assert [(w.name, int(w)) for w in WeightLayout] == [("OUT_IN", 0), ("IN_OUT", 1)]


def test_attributes() -> None:
    packed = ExpertSpec(SILU, GateLayout.INTERLEAVED, WeightLayout.IN_OUT, 7, 1.702, 1)
    assert packed.op == "MoE" and packed.gated and packed.name == "silu"
    assert packed.attributes() == {
        "activation": 0,
        "gate_layout": 2,
        "weight_layout": 1,
        "limit": 7.0,
        "alpha": 1.702,
        "beta": 1.0,
    }
    apart = ExpertSpec(Activation.RELU2, GateLayout.SEPARATE, OUT_IN)
    assert apart.op == "GatedMoE" and apart.gated
    assert list(apart.attributes()) == ["activation", "weight_layout", "limit", "alpha", "beta"]
    assert not ExpertSpec(Activation.RELU, GateLayout.NONE, OUT_IN).gated


@pytest.mark.parametrize("spec", list(specs()), ids=label)
def test_floats_of_attributes_are_exact(spec: ExpertSpec) -> None:
    assert all(type(value) in (int, float) for value in spec.attributes().values())
    again = ExpertSpec(**{"gate_layout": spec.gate_layout} | spec.attributes())
    assert again == spec and hash(again) == hash(spec)


def test_a_float_read_back_from_float32_is_the_one_written() -> None:
    import numpy as np

    written = ExpertSpec(SILU, GATED, OUT_IN, 0.1, 1.702, 0.3)
    read = ExpertSpec(SILU, GATED, OUT_IN, *(float(np.float32(x)) for x in (0.1, 1.702, 0.3)))
    assert read == written and written.alpha == 1.702


@pytest.mark.parametrize(
    "values",
    [
        {"limit": -1.0},
        {"limit": math.nan},
        {"alpha": math.inf},
        {"beta": 1e39},
        {"activation": 6},
        {"activation": 5, "alpha": 0.0},
        {"gate_layout": 4},
        {"weight_layout": 2},
        {"gate_layout": 0, "limit": 1.0},
        {"gate_layout": 0, "beta": 1.0},
    ],
    ids=str,
)
def test_refused(values: dict) -> None:
    with pytest.raises(ValueError):
        ExpertSpec(**{"activation": 0, "gate_layout": 1, "weight_layout": 0} | values)


def test_inputs_by_operator() -> None:
    routing = ("tokens", "expert_index", "expert_weight")
    assert input_names("MoE") == (*routing, "fc1", "fc1_bias", "fc2", "fc2_bias")
    assert input_names("GatedMoE") == (*routing, "gate", "gate_bias", "up", "up_bias", "down", "down_bias")

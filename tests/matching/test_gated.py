"""Gated layers are found in every spelling, and what cannot be proved is refused with the reason."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from dense_layers import dense_model, prepared
from gated_models import Net, gated_model

from sparse_onnx.matching.gated import GatedLayer, gated_layers
from sparse_onnx.matching.sites import sites


def found(model: onnx.ModelProto) -> tuple[list[GatedLayer], list[str]]:
    layers, refusals = gated_layers(sites(prepared(ir.from_proto(model))))
    return layers, [refusal.reason for refusal in refusals]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "erf", "relu"])
@pytest.mark.parametrize("spelling", ["matmul", "gemm", "transposed"])
@pytest.mark.parametrize("biases", [False, True])
def test_every_spelling(activation: str, spelling: str, biases: bool) -> None:
    net = Net(activation=activation, spelling=spelling, biases=biases)
    layers, reasons = found(gated_model(net))
    assert reasons == [] and len(layers) == 2
    for at, layer in enumerate(layers):
        names = [each.weight.names[0] for each in (layer.gate, layer.up, layer.down)]
        assert names == [f"layers.{at}.{role}.weight" for role in ("gate", "up", "down")]
        assert layer.activated.name == f"layers.{at}.a" and layer.product.name == f"layers.{at}.h"
        assert (layer.up_bias is not None) == biases and layer.units == 72
        assert layer.nbytes == 2 * 72 * 32 * 4
    assert len({layer.name for layer in layers}) == 2


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ("up is read", "up's result is read elsewhere"),
        ("the product is read", "read elsewhere"),
        ("clamped", "no known activation"),
        ("clamped both", "clamped or shifted"),
        ("other rows", "read different rows"),
        ("reshaped", "reshaped in front of it"),
    ],
)
def test_what_cannot_be_proved(spoil: str, reason: str) -> None:
    layers, reasons = found(gated_model(Net(spoil=spoil)))
    assert [layer.activated.name for layer in layers] == ["layers.0.a"], "the other layer is one"
    assert len(reasons) == 1 and reason in reasons[0] and "layers.1.down" in reasons[0]


def test_an_activation_that_is_not_known() -> None:
    layers, reasons = found(gated_model(Net(activation="odd")))
    assert layers == [] and len(reasons) == 2 and "no gate is found" in reasons[0]


def test_the_activation_may_be_read_by_others() -> None:
    model = gated_model(Net(layers=1))
    model.graph.output.append(onnx.helper.make_tensor_value_info("layers.0.a", 1, ["T", 72]))
    layers, reasons = found(model)
    assert len(layers) == 1 and reasons == []


def test_layers_without_a_gate_are_not_mentioned() -> None:
    assert found(dense_model()) == ([], [])

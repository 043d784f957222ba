"""`com.microsoft::QMoE` as onnxruntime-genai's model builder (0.18.0) writes it for CPU.

What its `Qwen35MoETextModel` does with ``precision=int4`` or ``int8`` and no other option, with the experts alone:

* block-wise along the inputs, 32 elements a block, symmetric: no zero points, ORT takes half of the range;
* the grid of ORT's own quantizer for MatMulNBits: a scale has a sign, so that the element of the largest magnitude is
  exact. Scales are rounded to float16, then written as float32, which is the model's type on CPU;
* gate and up rows interleaved (`swiglu_fusion` 1), biases of zeros, `normalize_routing_weights` 1;
* **no `accuracy_level`**: the builder's option of that name reaches MatMulNBits only, so QMoE runs with ORT's default;
* the router stays a float32 MatMul.

Importing this needs torch and transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from sparse_onnx.bench.layers import SparseLayers

BLOCK = 32


def build_qmoe(layers: SparseLayers, path: Path, bits: int) -> None:
    """Writes the layers with quantized experts, weights beside the file.

    Args:
        layers: the model; inputs of every expert matrix are a multiple of 32.
        path: of the .onnx file.
        bits: 4 or 8.
    """
    hidden = layers.config.hidden_size
    x = ir.val("hidden_states", ir.DataType.FLOAT, ("tokens", hidden))
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []

    def op(op_type: str, inputs: list[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        nodes.append(ir.node(op_type, inputs, attributes=attributes, domain=domain))
        return nodes[-1].outputs[0]

    def constant(name: str, array: np.ndarray) -> ir.Value:
        initializers.append(ir.val(name, const_value=ir.tensor(array, name=name)))
        return initializers[-1]

    current = x
    for number, block in enumerate(layers.parts):
        experts = block.experts
        count, double = experts.gate_up_proj.shape[:2]
        router = constant(f"router.{number}", block.gate.weight.T.contiguous().numpy())
        mixed = op(
            "QMoE",
            [
                *(current, op("MatMul", [current, router])),
                *(
                    constant(f"fc1.{number}.{part}", array)
                    for part, array in quantized(_Interleaved(experts), bits)
                ),
                constant(f"fc1.{number}.bias", np.zeros((count, double), np.float32)),
                *(
                    constant(f"fc2.{number}.{part}", array)
                    for part, array in quantized(experts.down_proj, bits)
                ),
                constant(f"fc2.{number}.bias", np.zeros((count, hidden), np.float32)),
            ],
            domain="com.microsoft",
            activation_alpha=1.0,
            activation_beta=0.0,
            activation_type="swiglu",
            block_size=BLOCK,
            expert_weight_bits=bits,
            k=layers.top_k,
            normalize_routing_weights=1,
            swiglu_fusion=1,
            use_sparse_mixer=0,
        )
        current = op("Add", [current, mixed])
    current.name, current.dtype, current.shape = "output", ir.DataType.FLOAT, x.shape
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph([x], [current], nodes=nodes, initializers=initializers, opset_imports=opsets)
    ir.save(ir.Model(graph, ir_version=10), path, external_data=f"{path.name}.data")


def quantized(weights: Any, bits: int) -> list[tuple[str, np.ndarray]]:
    """Matrices ``[E, N, K]`` as bytes ``[E, N, K * bits / 8]`` and scales ``[E, N, K / 32]``, one matrix at a time."""
    from onnxruntime.capi import _pybind_state as ort

    quantize = {4: ort.quantize_matmul_4bits, 8: ort.quantize_matmul_8bits}[bits]
    outputs, inputs = weights[0].shape
    blocks, remainder = divmod(inputs, BLOCK)
    if remainder:
        raise ValueError(f"{inputs} inputs are not whole blocks of {BLOCK}")
    data = np.empty((len(weights), outputs, blocks, BLOCK * bits // 8), np.uint8)
    scales = np.empty((len(weights), outputs, blocks), np.float32)
    unused: npt.NDArray[np.uint8] = np.zeros((outputs, -(-blocks * bits // 8)), np.uint8)
    for number in range(len(weights)):
        transposed = np.ascontiguousarray(weights[number].detach().numpy().T)
        quantize(data[number], transposed, scales[number], unused, BLOCK, outputs, inputs, True)
    scales = scales.astype(np.float16).astype(np.float32)
    return [("weight", data.reshape(len(weights), outputs, -1)), ("scales", scales)]


class _Interleaved:
    """Gate and up rows in turn, one expert's matrix at a time: no second copy of all weights."""

    def __init__(self, experts: Any) -> None:
        self._packed: Tensor = experts.gate_up_proj

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, number: int) -> Tensor:
        gate, up = self._packed[number].chunk(2)
        return torch.stack((gate, up), dim=1).flatten(0, 1)

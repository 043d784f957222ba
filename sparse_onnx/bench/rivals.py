"""What else runs the same layers: the exports and runtimes that a user would otherwise have had.

Each function writes or builds one rival with the weights of a `SparseLayers`. Importing this needs torch and
transformers.
"""

from __future__ import annotations

import contextlib
import io
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_onnx.bench.layers import SparseLayers
from sparse_onnx.export.translate import quiet

Array = npt.NDArray[np.float32]


#: Name under which the dense experts are registered with transformers.
DENSE = "dense"


class DenseLayers(nn.Module):
    """The layers with all experts run on all tokens by batched products, unchosen ones weighted with zero.

    The weights lie as MatMul reads them, so that nothing is transposed at run time.
    """

    def __init__(self, layers: SparseLayers) -> None:
        super().__init__()
        self.routers = nn.ModuleList(block.gate for block in layers.parts)
        self.gate, self.up, self.down = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for block in layers.parts:
            gate, up = block.experts.gate_up_proj.transpose(1, 2).chunk(2, dim=-1)
            down = block.experts.down_proj.transpose(1, 2)
            for held, weight in ((self.gate, gate), (self.up, up), (self.down, down)):
                held.append(nn.Parameter(weight.contiguous(), requires_grad=False))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for router, gate, up, down in zip(self.routers, self.gate, self.up, self.down, strict=True):
            _, weight, index = router(hidden_states)
            rows = hidden_states[None]
            inner = nn.functional.silu(rows @ gate) * (rows @ up)
            hidden_states = hidden_states + _mixed(inner @ down, index, weight)
        return hidden_states


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Exporters report their steps on standard output; what matters here is the table at the end."""
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        yield


def _mixed(outputs: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """``[E, T, D]`` of all experts, weighted and added up to ``[T, D]``."""
    spread = weight.new_zeros(outputs.shape[1], outputs.shape[0]).scatter(1, index, weight)
    return (outputs * spread.T[..., None]).sum(0)


def dense_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The same for one experts module of transformers or of the zoo, in the place of its forward."""
    inner = self._apply_gate(hidden_states[None] @ self.gate_up_proj.transpose(1, 2))
    return _mixed(inner @ self.down_proj.transpose(1, 2), top_k_index, top_k_weights)


def export_dense(
    model: nn.Module, sample: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]], path: Path
) -> None:
    """A module by torch.onnx.export, its experts in the dense form."""
    experts = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
    shapes = {name: dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC) for name, dynamic in axes.items()}
    for module in experts:
        module.forward = types.MethodType(dense_experts, module)
    try:
        with _silence():
            torch.onnx.export(model, (), path, kwargs=dict(sample), dynamic_shapes=shapes, external_data=True)
    finally:
        for module in experts:
            del module.forward


def export_transformers(
    model: PreTrainedModel,
    sample: Mapping[str, Tensor],
    axes: Mapping[str, Mapping[int, str]],
    path: Path,
    *,
    experts: str = "grouped_mm",
    fusions: Literal["cpu"] | None = None,
) -> None:
    """transformers' own exporter: `grouped_mm` is its default, unrolled over the experts; or `DENSE`.

    `fusions` makes it fuse the graph into ONNX Runtime's own operators for that provider.
    """
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS[DENSE] = dense_experts
    before = model.config._experts_implementation
    shapes = {name: dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC) for name, dynamic in axes.items()}
    model.set_experts_implementation(experts)
    try:
        with _silence():
            config = OnnxConfig(dynamic_shapes=shapes, ort_fusions=fusions)
            exported = OnnxExporter().export(model, dict(sample), config=config)
            OnnxExporter.save_program(exported.program, path)
    finally:
        model.set_experts_implementation(before)
        del ALL_EXPERTS_FUNCTIONS[DENSE]


def build_contrib_moe(layers: SparseLayers, path: Path) -> None:
    """`com.microsoft::MoE` in its only form that runs on CPU: SwiGLU with interleaved gate and up rows."""
    hidden = layers.config.hidden_size
    x = ir.val("hidden_states", ir.DataType.FLOAT, ("tokens", hidden))
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []

    def op(
        op_type: str, inputs: list[ir.Value | None], domain: str = "", **attributes: int | float | str
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain)
        nodes.append(node)
        return node.outputs[0]

    def weight(name: str, array: Array) -> ir.Value:
        initializers.append(ir.val(name, const_value=ir.tensor(array, name=name)))
        return initializers[-1]

    current = x
    for number, block in enumerate(layers.parts):
        gate, up = block.experts.gate_up_proj.chunk(2, dim=1)
        interleaved = torch.stack((gate, up), dim=2).flatten(1, 2)
        logits = op("MatMul", [current, weight(f"router.{number}", block.gate.weight.T.contiguous().numpy())])
        mixed = op(
            "MoE",
            [
                *(current, logits, weight(f"fc1.{number}", interleaved.numpy()), None),
                weight(f"fc2.{number}", block.experts.down_proj.detach().numpy()),
            ],
            domain="com.microsoft",
            k=layers.top_k,
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=1.0,
            activation_beta=0.0,
            normalize_routing_weights=1,
        )
        current = op("Add", [current, mixed])
    current.name, current.dtype, current.shape = "output", ir.DataType.FLOAT, x.shape
    opsets = {"": 20, "com.microsoft": 1}
    graph = ir.Graph([x], [current], nodes=nodes, initializers=initializers, opset_imports=opsets)
    ir.save(ir.Model(graph, ir_version=10), path, external_data=f"{path.name}.data")


def active_weights(layers: SparseLayers, x: Array) -> list[Array]:
    """The experts' and routers' weights that these tokens need, as views: what must be read at least."""
    views: list[Array] = []

    def record(block: Any) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            views.append(block.gate.weight.numpy())
            for expert in arguments[1].unique().tolist():
                views.extend(
                    (block.experts.gate_up_proj[expert].numpy(), block.experts.down_proj[expert].numpy())
                )

        return hook

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for block in layers.parts:
            hooks.enter_context(block.experts.register_forward_pre_hook(record(block)))
        layers(torch.from_numpy(x))
    return views

"""Where thresholds may act: what one or several linear layers read, and what the experts of a block read.

Layers that read the same value (query, key and value; gate and up) are one site: one threshold, one mask. The experts
of a neutral MoE block are two: ``<block>.up``, the tokens that they get, and ``<block>.down``, what lies between their
matrices. Routers, embeddings and output heads are left alone (`layer_roles`), so are blocks of other forms.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from sparse_onnx.blocks import MoEBlock, blocks, is_zero
from sparse_onnx.blocks.lowered import FORM_KEY
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.core.report import Refusal
from sparse_onnx.matching.layer_roles import Roles
from sparse_onnx.matching.layers import Layer, layers
from sparse_onnx.matching.layout import rows_of
from sparse_onnx.matching.naming import module_path
from sparse_onnx.matching.values import tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """Rows ``[..., K]`` which a threshold may make sparse.

    Attributes:
        name: stable for a model; the same before and after other passes.
        input: the value that is read; of experts' second matrix None, since no graph holds it.
        layers: that read it; none of a block's.
        names: of the layers, in their order.
        block: whose experts read it.
        roles: the block's matrices that read it: gate and up (or fc1), or down (or fc2).
        rows: K.
        columns: N of each matrix (of one expert's).
        nbytes: of all matrices as they are stored, all experts' together.
    """

    name: str
    input: ir.Value | None
    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    block: MoEBlock | None
    roles: tuple[str, ...]
    rows: int
    columns: tuple[int, ...]
    nbytes: int

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the matrices' initializers."""
        if self.block is None:
            return tuple(layer.weight.names[0] for layer in self.layers)
        return tuple(_stored_name(self.block.weights[role]) for role in self.roles)


def _stored_name(value: ir.Value) -> str:
    quantized = Quantized.of(value)
    return (value if quantized is None else quantized.values[0]).name or ""


@dataclasses.dataclass(frozen=True)
class Sites:
    """`found` in graph order, layers before blocks; `refusals` say what was left alone."""

    found: tuple[Site, ...]
    refusals: tuple[Refusal, ...]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.found)


def sites(model: ir.Model) -> Sites:
    """All places of a model, which was prepared and whose blocks are recognised.

    Raises:
        ModelError: a malformed block.
    """
    every = list(layers(model))
    kept, refusals = _kept(model, every)
    names = _names(kept)
    groups: dict[tuple[int, int], list[int]] = {}
    for at, layer in enumerate(kept):
        groups.setdefault((id(layer.node.graph), id(rows_of(layer.input))), []).append(at)
    taken: set[str] = set()
    found = [
        _of_layers([kept[at] for at in group], [names[at] for at in group], taken)
        for group in groups.values()
    ]
    for block in blocks(model):
        if _is_stored(block):
            found += _of_block(block, taken)
        else:
            reason = f"block '{block.name}': its experts' weights or sizes are not known from the graph"
            refusals.append(Refusal(reason, block.node.name or "", "", "calibrate"))
    return Sites(tuple(found), tuple(refusals))


def _kept(model: ir.Model, every: Sequence[Layer]) -> tuple[list[Layer], list[Refusal]]:
    reasons = Roles(model, every).reasons()
    kept, refusals = [], []
    for layer in every:
        reason = reasons.get(layer.node, "")
        if not reason and FORM_KEY in layer.node.metadata_props:
            reason = "part of a block that was lowered already"
        if not reason and layer.weight.outputs == 1:
            reason = "one result a token: a gate or a score"
        if reason:
            hint = "calibrate the model that was optimized" if "lowered" in reason else ""
            refusals.append(Refusal(reason, layer.node.name or "", hint, "calibrate"))
        else:
            kept.append(layer)
    return kept, refusals


def _names(found: Sequence[Layer]) -> list[str]:
    """Of each layer: its module, else its matrix, else its node; the same twice is told apart by a number."""
    modules = [module_path(layer.node) for layer in found]
    uses = collections.Counter(modules)
    names: list[str] = []
    taken: set[str] = set()
    for layer, module in zip(found, modules, strict=True):
        weight = layer.weight.names[0].removesuffix(".weight")
        name = module if module and uses[module] == 1 else weight or layer.node.name or "layer"
        names.append(_free(name, taken))
    return names


def _free(name: str, taken: set[str]) -> str:
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def _of_layers(group: Sequence[Layer], names: Sequence[str], taken: set[str]) -> Site:
    weights = [layer.weight for layer in group]
    return Site(
        name=_free(joined_name(names), taken),
        input=rows_of(group[0].input),
        layers=tuple(group),
        names=tuple(names),
        block=None,
        roles=(),
        rows=weights[0].inputs,
        columns=tuple(weight.outputs for weight in weights),
        nbytes=sum(weight.nbytes for weight in weights),
    )


def joined_name(names: Sequence[str]) -> str:
    """``self_attn.q_proj+k_proj+v_proj``: what the names have in common once."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(item) > shared + 1 and item[shared] == parts[0][shared] for item in parts):
        shared += 1
    head = "".join(f"{part}." for part in parts[0][:shared])
    return head + "+".join(".".join(item[shared:]) for item in parts)


def _is_stored(block: MoEBlock) -> bool:
    """Whether the matrices are constants, quantized or not, and the biases are, or are all zero."""
    known = None not in (block.experts, block.hidden, block.inner, block.hidden_out)
    return known and all(
        tensor(value) is not None
        or Quantized.of(value) is not None
        or (role.endswith("_bias") and is_zero(value))
        for role, value in block.weights.items()
    )


def _of_block(block: MoEBlock, taken: set[str]) -> Iterator[Site]:
    first, last = block.spec.roles[:-1], block.spec.roles[-1:]
    inner = block.inner
    assert block.hidden is not None and inner is not None and block.hidden_out is not None
    doubled = 2 if block.gated and len(first) == 1 else 1
    for name, value, roles, rows, columns in (
        ("up", block.tokens, first, block.hidden, (inner * doubled,) * len(first)),
        ("down", None, last, inner, (block.hidden_out,)),
    ):
        nbytes = sum(block.stored_bytes(role) for role in roles)
        yield Site(_free(f"{block.name}.{name}", taken), value, (), (), block, roles, rows, columns, nbytes)

"""Mixture-of-experts blocks of a torch model as one operator: `sparse_onnx::moe`.

An *experts module* is recognised by what it has, not by its class: packed weights `[E, ., .]` named
`gate_up_proj` (or `up_proj`) and `down_proj`, and a forward of `(tokens [T,D], expert_index [T,K],
expert_weight [T,K])`. That is the interface of transformers' decorated experts classes and of the zoo's. Each
is tried: its gate is classified by evaluation, and the operator must give what the module gives before it
takes the module's place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_onnx.blocks import Activation, ExpertSpec, GateLayout, WeightLayout
from sparse_onnx.export import gate
from sparse_onnx.export.chosen import by_expert, grouped_form, is_gated

_NAME = "sparse_onnx"
#: Largest accepted error of the operator against the module, relative to the largest output. Half precision
#: rounds the inner activations in other places.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
#: A row smaller than this part of the median one is measured by that.
_LEAST_SCALE = 1e-3
_PROBE_ROWS, _PROBE_BYTES = 64, 256 << 20


@torch.library.custom_op("sparse_onnx::moe", mutates_args=())
def moe(
    tokens: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_bias: Tensor | None,
    activation: int,
    gate_layout: int,
    weight_layout: int,
    limit: float,
    alpha: float,
    beta: float,
) -> Tensor:
    """The block in torch, so that an exported program still runs: `[T, D] -> [T, D_out]`."""
    spec = ExpertSpec(
        Activation(activation), GateLayout(gate_layout), WeightLayout(weight_layout), limit, alpha, beta
    )
    experts, width = fc2.shape[0], _outputs(fc2, weight_layout)
    combined = expert_weight.new_zeros(tokens.shape[0], width)
    for expert in range(experts):
        token, slot = torch.where(expert_index == expert)
        if token.numel() == 0:
            continue
        hidden = gate.evaluate(spec, _linear(tokens[token], fc1[expert], fc1_bias, expert, spec))
        rows = _linear(hidden, fc2[expert], fc2_bias, expert, spec)
        combined.index_add_(0, token, rows.to(combined.dtype) * expert_weight[token, slot, None])
    return combined.to(tokens.dtype)


@moe.register_fake
def _(
    tokens: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_bias: Tensor | None,
    activation: int,
    gate_layout: int,
    weight_layout: int,
    limit: float,
    alpha: float,
    beta: float,
) -> Tensor:
    return tokens.new_empty(tokens.shape[0], _outputs(fc2, weight_layout))


def _outputs(fc2: Tensor, weight_layout: int) -> int:
    return fc2.shape[1] if weight_layout == WeightLayout.OUT_IN else fc2.shape[2]


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, expert: int, spec: ExpertSpec) -> Tensor:
    product = rows @ (weight.T if spec.weight_layout == WeightLayout.OUT_IN else weight)
    return product if bias is None else product + bias[expert]


@dataclasses.dataclass(frozen=True)
class Experts:
    """One experts module and its neutral form; `spec` None means that it has none, and `reason` why.

    `plain`: it is computed expert by expert in plain operators then, on the rows that chose each; else it keeps its
    own forward.
    """

    path: str
    module: nn.Module
    spec: ExpertSpec | None
    reason: str = ""
    plain: bool = False


def is_part(model: nn.Module, entry: Experts) -> bool:
    """Whether the experts module is the model's own, and not one that an adapter put in its place."""
    return dict(model.named_modules()).get(entry.path) is entry.module


def find(model: nn.Module, groups: int | None = None) -> list[Experts]:
    """All experts modules of the model, each tried; one in several places is there once for each. Call it before the
    model's forward is touched.

    `groups`: of experts that are tried of each module; None for all of them.
    """
    found: dict[int, Experts] = {}
    entries = []
    for path, module in model.named_modules(remove_duplicate=False):
        if _is_experts(module):
            known = found.get(id(module)) or found.setdefault(id(module), _recognise(path, module, groups))
            entries.append(dataclasses.replace(known, path=path))
    return entries


def _is_experts(module: nn.Module) -> bool:
    if not hasattr(module, "down_proj"):
        return False
    return all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in _weights(module))


def _recognise(path: str, module: nn.Module, groups: int | None) -> Experts:
    if getattr(module, "has_post_expert_norm", False):
        return Experts(path, module, None, "each expert's output is normalised")
    if getattr(module, "_is_expert_parallel", False):
        return Experts(path, module, None, "its experts are distributed over processes")
    gated = is_gated(module)
    function = getattr(module, "_apply_gate", None) if gated else getattr(module, "act_fn", None)
    if function is None:
        return Experts(path, module, None, f"it has no {'_apply_gate' if gated else 'act_fn'}")
    layout = WeightLayout.IN_OUT if getattr(module, "is_transposed", False) else WeightLayout.OUT_IN
    spec = gate.classify(function, gated, layout)
    if spec is None:
        plain = not _dispatched(module) and _agrees(module, functools.partial(by_expert, module), groups)
        return Experts(path, module, None, "its gate has no neutral form", plain)
    if not _agrees(module, functools.partial(_call, module, spec), groups):
        return Experts(path, module, None, "it computes something else than its weights and gate say")
    return Experts(path, module, spec)


@torch.no_grad()
def _agrees(module: nn.Module, candidate: Callable[..., Tensor], groups: int | None) -> bool:
    """Whether the candidate gives the module's own answer for every expert, or for the first groups of them."""
    for values in itertools.islice(probes(module), groups):
        try:
            expected = module(*values)
        except Exception:  # whatever it raises: it is not called like this
            return False
        if not isinstance(expected, Tensor) or not same_rows(expected, candidate(*values)):
            return False
    return True


def probes(module: nn.Module, rows: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens `[T, D]`, expert_index `[T, 2]` and expert_weight `[T, 2]` that visit each expert of an experts module,
    and one expert twice with the same token. Few rows at a time: some implementations copy an expert's weights for
    each row. `rows`: at a time of transformers' modules in their plain form, which read an expert once for all rows."""
    first, second = _weights(module)
    count = first.shape[0]
    hidden = first.shape[1] if getattr(module, "is_transposed", False) else first.shape[2]
    per_row = 2 * (first.nbytes + second.nbytes) // count
    if rows is None or not _dispatched(module):
        rows = max(1, min(_PROBE_ROWS, _PROBE_BYTES // max(1, per_row)))
    generator = torch.Generator().manual_seed(0)
    expert = torch.cat([torch.arange(count), torch.tensor([min(1, count - 1)])])
    other = torch.cat([(expert[:-1] * 7 + 1) % count, expert[-1:]])
    for start in range(0, len(expert), rows):
        index = torch.stack([expert, other], dim=1)[start : start + rows]
        tokens = torch.randn(len(index), hidden, generator=generator)
        weight = torch.tensor([0.75, 0.375]).expand(len(index), 2).contiguous()
        yield tokens.to(first), index.to(first.device), weight.to(first)


def same_rows(expected: Tensor, actual: Tensor) -> bool:
    """Whether each row `[T, D]` is the same but for rounding: the largest magnitude of the row is the measure, so that
    no expert hides behind a larger one."""
    if expected.shape != actual.shape:
        return False
    return row_error(expected, actual) <= tolerance(expected.dtype)


def tolerance(dtype: torch.dtype) -> float:
    """Largest accepted `row_error` of another computation in this type."""
    return _TOLERANCE.get(dtype, 0.0)


def row_error(expected: Tensor, actual: Tensor) -> float:
    """The largest error of `[T, D]`, relative to the largest magnitude of its row; infinite where one side has no
    number and the other has."""
    if not expected.numel():
        return 0.0
    expected, actual = expected.double(), actual.double()
    scale = torch.where(expected.isfinite(), expected.abs(), 0.0).amax(-1)
    error = torch.where(expected == actual, 0.0, (actual - expected).abs()).amax(-1)
    error = torch.where(expected.isnan().any(-1) & (expected.isnan() == actual.isnan()).all(-1), 0.0, error)
    ratio = error / scale.clamp(min=float(scale.median()) * _LEAST_SCALE)
    return float(torch.where(error == 0, 0.0, ratio).nan_to_num(nan=float("inf")).max())


@torch.no_grad()
def make_callable(model: nn.Module) -> None:
    """Has transformers' experts modules run in their plain form where the chosen one refuses their sizes: the
    grouped one wants rows of weights aligned to 16 bytes."""
    for _, module in model.named_modules():
        if not (_is_experts(module) and _dispatched(module)):
            continue
        try:
            module(*next(probes(module)))
        except Exception:  # torch's complaints share no base class
            module.config._experts_implementation_internal = "eager"


def _weights(module: nn.Module) -> tuple[Any, Any]:
    """The two packed matrices, or what goes by their names."""
    return getattr(module, "gate_up_proj", getattr(module, "up_proj", None)), module.down_proj


def _first(spec: ExpertSpec) -> str:
    return "gate_up_proj" if spec.gated else "up_proj"


def _call(module: nn.Module, spec: ExpertSpec, tokens: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    first = _first(spec)
    bias = bool(getattr(module, "has_bias", hasattr(module, f"{first}_bias")))
    return moe(
        tokens,
        index,
        weight,
        getattr(module, first),
        getattr(module, f"{first}_bias") if bias else None,
        module.down_proj,
        module.down_proj_bias if bias else None,
        int(spec.activation),
        int(spec.gate_layout),
        int(spec.weight_layout),
        spec.limit,
        spec.alpha,
        spec.beta,
    )


@contextlib.contextmanager
def hooked(experts: list[Experts], *, grouped: bool = False) -> Iterator[None]:
    """Within the block the experts modules run as `sparse_onnx::moe`; those without a neutral form run in plain
    operators where these give the same, and compute no more than the chosen experts then. The others run as they did.

    Args:
        experts: of one model.
        grouped: whether plain operators are transformers' grouped form, which its own exporter can translate, and no
            other.
    """
    modules = {id(entry.module): entry for entry in experts}
    specs = {key: entry.spec for key, entry in modules.items() if entry.spec is not None}

    def forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _call(self, specs[id(self)], hidden_states, top_k_index, top_k_weights)

    plain = grouped_form if grouped else by_expert
    with contextlib.ExitStack() as stack:
        dispatched = {key: entry.module for key, entry in modules.items() if _dispatched(entry.module)}
        if dispatched:
            chosen = {key: forward if key in specs else plain for key in dispatched}
            stack.enter_context(_transformers_implementation(list(dispatched.values()), chosen))
        for key, entry in modules.items():
            if key not in dispatched and (key in specs or entry.plain):
                stack.enter_context(_bound(entry.module, forward if key in specs else plain))
        yield


def _dispatched(module: nn.Module) -> bool:
    """Whether transformers' own decorator chooses this module's implementation."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "config")


@contextlib.contextmanager
def _bound(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    signature, own = inspect.signature(module.forward), vars(module).get("forward")

    def bound(*args: Tensor, **kwargs: Tensor) -> Tensor:
        return forward(module, *signature.bind(*args, **kwargs).arguments.values())

    module.forward = bound
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextlib.contextmanager
def _transformers_implementation(
    modules: list[nn.Module], chosen: Mapping[int, Callable[..., Tensor]]
) -> Iterator[None]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def dispatch(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return chosen[id(self)](self, *args, **kwargs)

    configs: dict[int, Any] = {id(module.config): module.config for module in modules}
    before = [(config, config._experts_implementation) for config in configs.values()]
    ALL_EXPERTS_FUNCTIONS[_NAME] = dispatch
    try:
        for config, _ in before:
            config._experts_implementation_internal = _NAME
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation_internal = implementation
        del ALL_EXPERTS_FUNCTIONS[_NAME]

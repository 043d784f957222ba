"""Python loops over a sequence, as one `scan` that holds for every length.

Linear attention and state-space layers carry a state from token to token, or from chunk to chunk::

    for i in range(chunks):
        out[:, :, i] = query[:, :, i] @ state
        state = state * decay[:, :, i] + ...

torch.export unrolls such a loop for the traced length. Within `lifted` the functions of transformers that hold one
run a rewritten copy: a loop whose count is symbolic becomes `torch.ops.higher_order.scan`, and so ONNX Scan. Rewritten
is what can be read off the source:

- the loop's body is a sequence of assignments, and uses its variable only to index tensors at one full axis
  (`x[:, :, i]`), to write one element of a tensor that it does not read, or to append to a list that is stacked or
  concatenated afterwards;
- what the body reads before it assigns it, and what is read behind the loop, is carried.

Any other loop stays as it is, and torch.export's guard on its length is what refuses it.

A sequence that is padded to whole chunks gets one more: torch traces one chunk as a case of its own, and with two or
more there is none. Chunks of padding add nothing: their keys, values and decays are those of the last chunk's padding.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparse_onnx.export import substitution
from sparse_onnx.export.scan_source import CAT, FILL, IS_SYMBOLIC, PADDING, SCAN, STACK, Lift


@contextlib.contextmanager
def lifted(model: nn.Module) -> Iterator[list[str]]:
    """Within the block, the functions of the model's own source files run their rewritten copies; gives the names of
    those in which a loop was lifted while the block ran."""
    ran: list[str] = []
    before: list[tuple[types.FunctionType, types.CodeType]] = []
    namespaces: list[dict[str, Any]] = []
    try:
        for function in _functions(model):
            code = _rewritten(function)
            if code is not None:
                before.append((function, function.__code__))
                namespaces.append(function.__globals__)
                bound = {
                    SCAN: functools.partial(scan, ran),
                    PADDING: functools.partial(padding, ran),
                }
                function.__globals__.update(_HELPERS | bound)
                function.__code__ = code
        yield ran
    finally:
        for function, code in before:
            function.__code__ = code
        for namespace in namespaces:
            for name in (SCAN, PADDING, *_HELPERS):
                namespace.pop(name, None)


def _functions(model: nn.Module) -> Iterator[types.FunctionType]:
    """Functions and methods defined in transformers' modeling files of the model's parts."""
    names = {type(module).__module__ for module in model.modules()}
    seen = set[int]()
    for name in sorted(names):
        if ".modeling_" not in name:
            continue
        for value in list(vars(sys.modules[name]).values()):
            members = vars(value).values() if inspect.isclass(value) else (value,)
            for member in members:
                for function in _unwrapped(member):
                    if function.__module__ == name and id(function) not in seen:
                        seen.add(id(function))
                        yield function


def _unwrapped(value: Any) -> Iterator[types.FunctionType]:
    """The function behind decorators, wherever they keep it."""
    while isinstance(value, types.FunctionType):
        if not hasattr(value, "__wrapped__"):
            yield value
        value = getattr(value, "__wrapped__", None)


def _rewritten(function: types.FunctionType) -> types.CodeType | None:
    """None: it holds no such loop, and pads to no chunks."""
    code = function.__code__
    names = (*code.co_names, *code.co_varnames)
    if code.co_freevars or not ("range" in names or any("chunk" in name for name in names)):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        return None
    definition.decorator_list = []
    if not Lift(definition).run():
        return None
    namespace: dict[str, Any] = {}
    ast.fix_missing_locations(tree)
    exec(compile(tree, function.__code__.co_filename, "exec"), dict(function.__globals__), namespace)
    made = namespace[definition.name]
    return made.__code__ if not made.__code__.co_freevars else None


def scan(
    ran: list[str],
    body: Callable[..., tuple[tuple[Tensor, ...], tuple[Tensor, ...]]],
    length: Any,
    carried: list[Tensor],
    sliced: list[tuple[Tensor, int]],
    fixed: list[Any],
) -> tuple[list[Tensor], list[Tensor]]:
    """Runs the body for each index: last values of what is carried, and stacked outputs `[length, ...]`."""
    ran.append(body.__qualname__.partition(".")[0])
    columns = [tensor.movedim(axis, 0) for tensor, axis in sliced]
    for column in columns:
        torch._check(column.shape[0] == length)
    tensors = [value for value in fixed if isinstance(value, Tensor)]
    carried = _widened(body, carried, columns, fixed)

    def step(*values: Tensor) -> list[Tensor]:
        head, rest = values[: len(carried) + len(columns)], iter(values[len(carried) + len(columns) :])
        others = [next(rest) if isinstance(value, Tensor) else value for value in fixed]
        following, written = body(*head, *others)
        return [value.clone() for value in (*following, *written)]

    results = torch.ops.higher_order.scan(step, carried, columns, tuple(tensors))
    return list(results[: len(carried)]), list(results[len(carried) :])


def _widened(
    body: Callable[..., tuple[tuple[Tensor, ...], tuple[Tensor, ...]]],
    carried: list[Tensor],
    columns: list[Tensor],
    fixed: list[Any],
) -> list[Tensor]:
    """What is carried, in the types that it has from the second step on. A loop may begin with half precision and go on
    in float32; a scan has one type throughout."""
    if all(value.dtype not in (torch.float16, torch.bfloat16) for value in carried):
        return carried
    slices = [column.new_empty(column.shape[1:]) for column in columns]
    following, _ = body(*carried, *slices, *fixed)
    return [value.to(after.dtype) for value, after in zip(carried, following, strict=True)]


def _stack(values: Any, dim: int = 0) -> Tensor:
    """`torch.stack`, of a list or of what a scan stacked."""
    if isinstance(values, Tensor):
        return values.movedim(0, dim if dim >= 0 else values.dim() + dim)
    return torch.stack(values, dim=dim)


def _cat(values: Any, dim: int = 0) -> Tensor:
    """`torch.cat`, of a list or of what a scan stacked."""
    if not isinstance(values, Tensor):
        return torch.cat(values, dim=dim)
    axis = dim if dim >= 0 else values.dim() - 1 + dim
    return values.movedim(0, axis).flatten(axis, axis + 1)


def _fill(tensor: Tensor, values: Tensor, axis: int) -> Tensor:
    """The tensor with all its elements along the axis replaced."""
    torch._check(tensor.shape[axis] == values.shape[0])
    return values.movedim(0, axis).to(tensor.dtype)


def padding(ran: list[str], length: Any, size: int) -> Any:
    """To whole chunks of this size; and a chunk where the length is symbolic."""
    if _is_symbolic(length):
        ran.append("padding")
    return (size - length % size) % size + (size if _is_symbolic(length) else 0)


def _is_symbolic(length: Any) -> bool:
    return isinstance(length, torch.SymInt)


_HELPERS: dict[str, Any] = {
    STACK: _stack,
    CAT: _cat,
    FILL: _fill,
    IS_SYMBOLIC: _is_symbolic,
    substitution.NAME: substitution.substituted,
}

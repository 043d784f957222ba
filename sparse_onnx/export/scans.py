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
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparse_onnx.export import substitution

_SCAN, _STACK, _CAT, _FILL, _PADDING, _IS_SYMBOLIC = (
    f"_sparse_onnx_{name}" for name in ("scan", "stack", "cat", "fill", "padding", "is_symbolic")
)


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
                bound = {_SCAN: functools.partial(scan, ran), _PADDING: functools.partial(padding, ran)}
                function.__globals__.update(_HELPERS | bound)
                function.__code__ = code
        yield ran
    finally:
        for function, code in before:
            function.__code__ = code
        for namespace in namespaces:
            for name in (_SCAN, _PADDING, *_HELPERS):
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
    if not _Lift(definition).run():
        return None
    namespace: dict[str, Any] = {}
    ast.fix_missing_locations(tree)
    exec(compile(tree, function.__code__.co_filename, "exec"), dict(function.__globals__), namespace)
    made = namespace[definition.name]
    return made.__code__ if not made.__code__.co_freevars else None


class _Lift:
    """Rewrites the loops of one function definition in place."""

    def __init__(self, definition: ast.FunctionDef) -> None:
        self.definition = definition
        self.count = 0
        self.locals = {
            node.id for node in ast.walk(definition) if isinstance(node, ast.Name) and _stored(node)
        }
        self.locals |= {
            argument.arg for argument in ast.walk(definition.args) if isinstance(argument, ast.arg)
        }

    def run(self) -> bool:
        self._block(self.definition.body)
        chunks = _OneMoreChunk()
        chunks.visit(self.definition)
        return self.count > 0 or chunks.found

    def _block(self, statements: list[ast.stmt]) -> None:
        for position, statement in enumerate(statements):
            if isinstance(statement, ast.For):
                replacement = substitution.replaced(statement) or self._loop(statement)
                if replacement is not None:
                    statements[position] = replacement
                    self.count += 1
                    continue
            for field in ("body", "orelse"):
                if isinstance(inner := getattr(statement, field, None), list):
                    self._block(inner)

    def _loop(self, loop: ast.For) -> ast.stmt | None:
        body = _Body(loop, self.locals)
        if not body.readable():
            return None
        appended = [name for name in body.lists if self._collected(name) is None]
        if appended:
            return None
        outside = [node for node in ast.walk(self.definition) if isinstance(node, ast.Name)]
        inside = {id(node) for node in ast.walk(loop)}
        read_behind = {node.id for node in outside if id(node) not in inside and not _stored(node)}
        carried = [name for name in body.assigned if name in body.read_first]
        if ({body.index, *body.assigned} - set(carried)) & (
            read_behind - body.read_first_elsewhere(self.definition, loop)
        ):
            return None
        for name in body.lists:
            self._collect(name)
        name = f"_scanned_{self.count}"
        return ast.If(test=_call(_IS_SYMBOLIC, body.length), body=body.scanned(name, carried), orelse=[loop])

    def _collected(self, name: str) -> ast.Call | None:
        """The one `torch.stack(xs)` or `torch.cat(xs)` that reads the list."""
        found = None
        for node in ast.walk(self.definition):
            if isinstance(node, ast.Call) and any(
                isinstance(a, ast.Name) and a.id == name for a in node.args
            ):
                if found is not None or ast.unparse(node.func) not in (
                    "torch.stack",
                    "torch.cat",
                    _STACK,
                    _CAT,
                ):
                    return None
                found = node
        return found

    def _collect(self, name: str) -> None:
        call = self._collected(name)
        assert call is not None
        if isinstance(call.func, ast.Attribute):
            call.func = ast.Name(_STACK if call.func.attr == "stack" else _CAT, ast.Load())


class _OneMoreChunk(ast.NodeTransformer):
    """`(chunk_size - length % chunk_size) % chunk_size`, the padding to whole chunks, and a chunk."""

    found = False

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        size = ast.unparse(node.right)
        form = rf"\({re.escape(size)} - (\w+) % {re.escape(size)}\) % {re.escape(size)}"
        match = re.fullmatch(form, ast.unparse(node)) if "chunk" in size else None
        if match is None:
            return self.generic_visit(node)
        self.found = True
        return ast.parse(f"{_PADDING}({match[1]}, {size})", mode="eval").body


class _Body:
    """What the body of one loop reads and writes."""

    def __init__(self, loop: ast.For, locals_: set[str]) -> None:
        self.loop, self.locals = loop, locals_
        self.slices: dict[tuple[str, int], str] = {}
        self.writes: list[tuple[str, int, ast.expr]] = []
        self.lists: list[str] = []
        self.assigned: list[str] = []
        self.read_first: set[str] = set()
        self.reads: set[str] = set()
        self.statements: list[ast.stmt] = []

    def readable(self) -> bool:
        """Whether the loop is of the form that can be lifted; fills in the rest."""
        loop, call = self.loop, self.loop.iter
        if not isinstance(loop.target, ast.Name) or loop.orelse or not isinstance(call, ast.Call):
            return False
        if ast.unparse(call.func) != "range" or len(call.args) != 1 or call.keywords:
            return False
        self.index, self.length = loop.target.id, call.args[0]
        if not all(self._statement(_copied(statement)) for statement in loop.body):
            return False
        written = [tensor for tensor, _, _ in self.writes if tensor] + self.lists
        read = self.reads | {tensor for tensor, _ in self.slices} | set(self.assigned)
        return bool(written) and len(set(written)) == len(written) and not read & set(written)

    def _statement(self, statement: ast.stmt) -> bool:
        if isinstance(statement, ast.Expr) and isinstance(call := statement.value, ast.Call):
            if not (
                isinstance(call.func, ast.Attribute) and call.func.attr == "append" and len(call.args) == 1
            ):
                return False
            owner = call.func.value
            if not isinstance(owner, ast.Name) or owner.id in self.lists:
                return False
            value = self._expression(call.args[0])
            self.lists.append(owner.id)
            return value is not None and self._output(value)
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            return False
        target = statement.targets[0]
        value = self._expression(statement.value)
        if value is None:
            return False
        if isinstance(target, ast.Subscript):
            place = self._place(target)
            if place is None:
                return False
            self.writes.append((*place, ast.Name(self._named(value), ast.Load())))
            return True
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        if not all(isinstance(name, ast.Name) for name in names):
            return False
        for name in names:
            assert isinstance(name, ast.Name)
            if name.id not in self.assigned:
                self.assigned.append(name.id)
        self.statements.append(ast.Assign([target], value))
        return True

    def _output(self, value: ast.expr) -> bool:
        self.writes.append(("", 0, ast.Name(self._named(value), ast.Load())))
        return True

    def _named(self, value: ast.expr) -> str:
        name = f"_written_{len(self.writes)}"
        self.statements.append(ast.Assign([ast.Name(name, ast.Store())], value))
        return name

    def _expression(self, value: ast.expr) -> ast.expr | None:
        """With the slices at the loop's variable as names; None where it is used otherwise."""
        body = self

        class Slices(ast.NodeTransformer):
            def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
                place = body._place(node)
                if place is None:
                    return self.generic_visit(node)
                name = body.slices.setdefault(place, f"_slice_{len(body.slices)}")
                return ast.Name(name, ast.Load())

        changed = Slices().visit(value)
        names = [node.id for node in ast.walk(changed) if isinstance(node, ast.Name)]
        if self.index in names:
            return None
        for name in names:
            if name in self.locals:
                self.reads.add(name)
                if name not in self.assigned:
                    self.read_first.add(name)
        return changed

    def _place(self, node: ast.Subscript) -> tuple[str, int] | None:
        """Tensor and axis of `x[:, :, i]` and `x[:, i, :]`."""
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        at = [position for position, part in enumerate(parts) if _is_name(part, self.index)]
        full = all(_is_full(part) for position, part in enumerate(parts) if position not in at)
        if not isinstance(node.value, ast.Name) or len(at) != 1 or not full:
            return None
        return node.value.id, at[0]

    def read_first_elsewhere(self, definition: ast.FunctionDef, loop: ast.For) -> set[str]:
        """Names that are assigned outside the loop too before each read there, as far as lines tell."""
        found = set[str]()
        for name in (*self.assigned, self.index):
            reads = [n.lineno for n in ast.walk(definition) if _is_name(n, name) and not _stored(n)]
            behind = [line for line in reads if line > (loop.end_lineno or loop.lineno)]
            stores = [n.lineno for n in ast.walk(definition) if _is_name(n, name) and _stored(n)]
            again = [line for line in stores if line > (loop.end_lineno or loop.lineno)]
            if not behind or (again and min(again) <= min(behind)):
                found.add(name)
        return found

    def scanned(self, name: str, carried: list[str]) -> list[ast.stmt]:
        """The statements that stand for the loop."""
        sources = list(self.slices)
        written = {tensor for tensor, _, _ in self.writes if tensor}
        fixed = sorted((self.reads & self.read_first) - set(carried) - {self.index} - written)
        parameters = [*carried, *(self.slices[source] for source in sources), *fixed]
        results = ast.Tuple(
            [
                ast.Tuple([ast.Name(each, ast.Load()) for each in carried], ast.Load()),
                ast.Tuple([value for _, _, value in self.writes], ast.Load()),
            ],
            ast.Load(),
        )
        arguments = ast.arguments(
            posonlyargs=[],
            args=[ast.arg(each) for each in parameters],
            kwonlyargs=[],
            kw_defaults=[],
            defaults=[],
        )
        function = ast.FunctionDef(name, arguments, [*self.statements, ast.Return(results)], [])
        slices = [
            ast.Tuple([ast.Name(tensor, ast.Load()), ast.Constant(axis)], ast.Load())
            for tensor, axis in sources
        ]
        call = _call(
            _SCAN,
            ast.Name(name, ast.Load()),
            self.length,
            ast.List([ast.Name(each, ast.Load()) for each in carried], ast.Load()),
            ast.List(list(slices), ast.Load()),
            ast.List([ast.Name(each, ast.Load()) for each in fixed], ast.Load()),
        )
        outputs: list[ast.stmt] = []
        lists = iter(self.lists)
        for position, (tensor, axis, _) in enumerate(self.writes):
            value: ast.expr = ast.Subscript(
                ast.Name("_outputs", ast.Load()), ast.Constant(position), ast.Load()
            )
            target = tensor or next(lists)
            if tensor:
                value = _call(_FILL, ast.Name(tensor, ast.Load()), value, ast.Constant(axis))
            outputs.append(ast.Assign([ast.Name(target, ast.Store())], value))
        both = ast.Tuple(
            [
                ast.List([ast.Name(each, ast.Store()) for each in carried], ast.Store()),
                ast.Name("_outputs", ast.Store()),
            ],
            ast.Store(),
        )
        return [function, ast.Assign([both], call), *outputs]


def _stored(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", None), ast.Store)


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_full(node: ast.expr) -> bool:
    return isinstance(node, ast.Slice) and node.lower is node.upper is node.step is None


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])


def _copied(statement: ast.stmt) -> ast.stmt:
    return ast.parse(ast.unparse(statement)).body[0]


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

    def step(*values: Tensor) -> list[Tensor]:
        head, rest = values[: len(carried) + len(columns)], iter(values[len(carried) + len(columns) :])
        others = [next(rest) if isinstance(value, Tensor) else value for value in fixed]
        following, written = body(*head, *others)
        return [value.clone() for value in (*following, *written)]

    results = torch.ops.higher_order.scan(step, carried, columns, tuple(tensors))
    return list(results[: len(carried)]), list(results[len(carried) :])


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
    _STACK: _stack,
    _CAT: _cat,
    _FILL: _fill,
    _IS_SYMBOLIC: _is_symbolic,
    substitution.NAME: substitution.substituted,
}

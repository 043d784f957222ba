"""The loops of a function's source that `scans` runs as scans, and its padding to whole chunks, rewritten in place."""

from __future__ import annotations

import ast
import re

from sparse_onnx.export import substitution

#: What the rewritten source calls.
SCAN, STACK, CAT, FILL, PADDING, IS_SYMBOLIC = (
    f"_sparse_onnx_{name}" for name in ("scan", "stack", "cat", "fill", "padding", "is_symbolic")
)


class Lift:
    """Rewrites the loops of one function definition in place; `scans` says which."""

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
        return ast.If(test=_call(IS_SYMBOLIC, body.length), body=body.scanned(name, carried), orelse=[loop])

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
                    STACK,
                    CAT,
                ):
                    return None
                found = node
        return found

    def _collect(self, name: str) -> None:
        call = self._collected(name)
        assert call is not None
        if isinstance(call.func, ast.Attribute):
            call.func = ast.Name(STACK if call.func.attr == "stack" else CAT, ast.Load())


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
        return ast.parse(f"{PADDING}({match[1]}, {size})", mode="eval").body


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
            uses = [n for n in ast.walk(definition) if isinstance(n, ast.Name) and n.id == name]
            reads = [n.lineno for n in uses if not _stored(n)]
            behind = [line for line in reads if line > (loop.end_lineno or loop.lineno)]
            again = [
                line
                for line in (n.lineno for n in uses if _stored(n))
                if line > (loop.end_lineno or loop.lineno)
            ]
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
            SCAN,
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
                value = _call(FILL, ast.Name(tensor, ast.Load()), value, ast.Constant(axis))
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

"""Writes nodes with onnx.helper, and picks at random among ways to say the same thing."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from family import Case
from onnx import TensorProto, helper, numpy_helper

FLOAT = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


class Writer:
    """Nodes and initializers of a graph. Every helper takes and returns value names."""

    def __init__(self, case: Case, spoil: Mapping[str, Callable[..., Any]] | None = None) -> None:
        self.case, self.spoil = case, dict(spoil or {})
        self.expert = -1
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[str] = []
        self.random = random.Random(repr(case))
        self.forced = dict(case.force)
        self.picked: dict[str, str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.type = FLOAT[case.dtype]
        self.constants = self.pick("constants", "initializers", "nodes", "mixed")
        self._shared: dict[tuple, str] = {}
        self._count = 0

    def at(self, spot: str, value: Any) -> Any:
        """`value`, or what a near-miss puts in its place; `expert` says whose it is."""
        return self.spoil[spot](self, value) if spot in self.spoil else value

    def pick(self, name: str, *options: str) -> str:
        """One of the options: the forced one, or any. A choice is made once a name."""
        if name not in self.picked:
            self.picked[name] = self.forced.get(name) or self.random.choice(options)
            if self.picked[name] not in options:
                raise ValueError(f"{name}={self.picked[name]} is not one of {options}")
        return self.picked[name]

    def maybe(self, chance: float = 0.5) -> bool:
        return self.random.random() < chance

    def name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def weight(self, array: np.ndarray) -> str:
        """An initializer."""
        name = self.name()
        self.initializers.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def constant(self, array: np.ndarray) -> str:
        """Of any kind, and possibly shared with an equal one."""
        array = np.asarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key in self._shared and self.maybe():
            return self._shared[key]
        if self.constants == "initializers" or (self.constants == "mixed" and self.maybe()):
            name = self.weight(array)
        else:
            name = self.op("Constant", value=numpy_helper.from_array(array))
        self._shared[key] = name
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def int(self, value: int) -> str:
        return self.constant(np.array(value, np.int64))

    def number(self, value: float, dtype: Any = None) -> str:
        return self.constant(np.array(value, dtype or self.case.numpy))

    # Elementwise

    def both(self, kind: str, a: str, b: str) -> str:
        return self.op(kind, a, b) if self.maybe() else self.op(kind, b, a)

    def add(self, a: str, b: str) -> str:
        return self.both("Add", a, b)

    def mul(self, a: str, b: str) -> str:
        return self.both("Mul", a, b)

    def cast(self, value: str, to: int) -> str:
        return self.op("Cast", value, to=to)

    def sum(self, values: list[str]) -> str:
        """A chain of Add, a balanced tree, or one Sum."""
        how = self.pick("sum", "chain", "zero-chain", "tree", "Sum")
        if len(values) == 1:
            return values[0]
        if how == "Sum":
            return self.op("Sum", *values)
        if how == "tree":
            half = len(values) // 2
            return self.add(self.sum(values[:half]), self.sum(values[half:]))
        total = self.add(self.number(0.0), values[0]) if how == "zero-chain" else values[0]
        for value in values[1:]:
            total = self.add(total, value)
        return total

    # Layout

    def axis(self, axis: int, rank: int) -> int:
        """`axis` counted from either end."""
        axis %= rank
        return axis if self.maybe() else axis - rank

    def reshape(self, value: str, *shape: int) -> str:
        return self.op("Reshape", value, self.ints(*shape))

    def flat(self, value: str) -> str:
        return self.reshape(value, -1)

    def unsqueeze(self, value: str, axis: int, rank: int) -> str:
        """`rank` is the result's."""
        return self.op("Unsqueeze", value, self.ints(self.axis(axis, rank)))

    def squeeze(self, value: str, axis: int, rank: int) -> str:
        """`rank` is that of `value`."""
        return self.op("Squeeze", value, self.ints(self.axis(axis, rank)))

    def column(self, value: str) -> str:
        """``[n]`` as ``[n, 1]``."""
        return self.reshape(value, -1, 1) if self.maybe() else self.unsqueeze(value, 1, 2)

    def reduce_sum(self, value: str, axis: int, rank: int, keep: bool = False) -> str:
        if not keep and self.maybe(0.25):
            kept = self.op("ReduceSum", value, self.ints(self.axis(axis, rank)), keepdims=1)
            return self.squeeze(kept, axis, rank)
        return self.op("ReduceSum", value, self.ints(self.axis(axis, rank)), keepdims=int(keep))

    def reduce_max(self, value: str, axis: int, keep: bool) -> str:
        if self.case.opset < 18:
            return self.op("ReduceMax", value, axes=[axis], keepdims=int(keep))
        return self.op("ReduceMax", value, self.ints(axis), keepdims=int(keep))

    def slice(self, value: str, start: int, stop: int, axis: int, step: int = 1) -> str:
        inputs = [value, self.ints(start), self.ints(stop), self.ints(axis)]
        if step != 1 or self.maybe():
            inputs.append(self.ints(step))
        return self.op("Slice", *inputs)

    def split(self, value: str, sizes: list[int], axis: int) -> list[str]:
        if len(sizes) == 1:
            return [value]
        equal = len(set(sizes)) == 1
        if equal and self.case.opset >= 18 and self.maybe():
            return self.op("Split", value, outputs=len(sizes), axis=axis, num_outputs=len(sizes))
        if equal and self.case.opset < 18 and self.maybe():
            return self.op("Split", value, outputs=len(sizes), axis=axis)
        return self.op("Split", value, self.ints(*sizes), outputs=len(sizes), axis=axis)

    def shape(self, value: str) -> str:
        return self.op("Shape", value)

    def zeros(self, shape: str, dtype: Any = None) -> str:
        """Zeros of a shape that another value has."""
        dtype = dtype or self.case.numpy
        if self.maybe():
            zero = numpy_helper.from_array(np.zeros(1, dtype))
            return self.op("ConstantOfShape", shape, value=zero)
        return self.op("Expand", self.number(0.0, dtype), shape)

    def rows(self, data: str, index: str) -> str:
        """``data[index]`` for an index ``[n]``."""
        if self.maybe():
            return self.op("Gather", data, index, axis=0)
        return self.op("GatherND", data, self.column(index))

    def einsum(self, equation: str, *inputs: str) -> str:
        """With other letters, and now and then spaces."""
        old = sorted(set(equation) - set(",->"))
        new = self.random.sample("abcdefghijklmnopqrstuvwxyz", len(old))
        equation = equation.translate(str.maketrans("".join(old), "".join(new)))
        if self.maybe(0.3):
            equation = equation.replace(",", ", ").replace("->", " -> ")
        return self.op("Einsum", *inputs, equation=equation)

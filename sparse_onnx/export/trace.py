"""A torch model to an ONNX model whose experts are whole, by torch.export; Hugging Face models through
transformers' own export patches, which make their code traceable and its operators translatable."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.utils._sympy.symbol import SymT, symbol_is_type

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export import (
    cached_rows,
    experts,
    false_constants,
    guards,
    lifting,
    operators,
    patches,
    program_fixes,
    python_numbers,
    randomness,
    recurrent_layers,
    scans,
    torch_functions,
    translate,
)
from sparse_onnx.export.failure import root_line
from sparse_onnx.export.samples import Interface
from sparse_onnx.export.sources import Source, leaves
from sparse_onnx.export.users import place_of, users_code

_FIXED_AXIS = re.compile(
    r"You marked L\['(?P<name>\w+)'\]\.size\(\)\[(?P<axis>\d+)\] as dynamic "
    r"but your code specialized it to be a constant \((?P<size>\d+)\)"
)


@dataclasses.dataclass(frozen=True)
class Traced:
    """The result of one trace.

    `model` is neither tidied nor does it hold the neutral functions. `program` runs the traced graph in torch
    and raises where one of its assertions fails; `assumptions` are about sizes of its inputs. `lifted` names the
    functions of the model whose loops over a sequence became scans. `of_values`: Python code had numbers or sizes in
    its hands that depend on the values of tensors.
    """

    model: ir.Model
    program: Callable[..., Any]
    assumptions: list[guards.Guard]
    symbols: Mapping[str, str]
    notes: tuple[str, ...] = ()
    lifted: tuple[str, ...] = ()
    of_values: bool = False


def trace(source: Source, found: list[experts.Experts], opset: int, *, lift: bool = False) -> Traced:
    """Traces the source at sizes that are pairwise different and at least 2, all dynamic axes free.

    Args:
        source: what to trace.
        found: its experts modules.
        opset: version of the ONNX operators.
        lift: lift its data-dependent Python control flow.

    Raises:
        ImpossibleError: torch.export or torch.onnx cannot follow the model, or they fix the size of a dynamic
            axis.
    """
    inputs = source.interface.draw(source.interface.traced_sizes())
    free, derived = torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO
    shapes = {
        name: {
            axis: free if symbol in source.interface.symbols else derived
            for axis, symbol in spec.axes.items()
        }
        for name, spec in source.interface.inputs.items()
    }
    with (
        translate.quiet(),
        experts.hooked(found, grouped=source.is_transformers),
        _refused(source, inputs),
        false_constants.forgotten(),
    ):
        if source.is_transformers:
            flow = lifting.lifted(source.module) if lift else contextlib.nullcontext()
            with scans.lifted(source.module) as ran, flow as rewritten:
                traced, other = _trace_transformers(source, inputs, shapes, opset, rewritten=lift)
            notes = () if rewritten is None else tuple(rewritten.notes)
            return dataclasses.replace(traced, lifted=tuple(dict.fromkeys([*ran, *other])), notes=notes)
        if lift:
            with lifting.lifted(source.module) as lifted:
                traced = _trace_module(source, inputs, shapes, opset, rewritten=True)
            return dataclasses.replace(traced, notes=tuple(lifted.notes))
        return _trace_module(source, inputs, shapes, opset)


def _trace_module(
    source: Source, inputs: dict[str, Tensor], shapes: dict[str, Any], opset: int, *, rewritten: bool = False
) -> Traced:
    with torch.no_grad(), torch_functions.replaced(), recurrent_layers.replaced():
        program = torch.export.export(source.module, (), inputs, dynamic_shapes=shapes, strict=False)
    randomness.refuse(program.graph_module)
    runnable, assumptions = _runnable(program, source.interface), guards.guards_of(program, source.interface)
    symbols = _symbols(program, source.interface)
    of_values = _of_values(program)
    names = _output_names(source.forward(inputs), inputs)
    # With gradients torch traces each branch of a condition once more, and stumbles over sizes made in it.
    with torch.no_grad():
        program_fixes.apply(program.graph_module)
        python_numbers.refuse_others(program.graph_module, rewritten=rewritten)
        model = translate.to_onnx(
            program,
            opset=opset,
            input_names=list(inputs),
            output_names=names,
            table={**python_numbers.TABLE, **operators.TABLE, **recurrent_layers.TABLE},
        )
    python_numbers.retype(model)
    return Traced(model, runnable, assumptions, symbols, of_values=of_values)


def _trace_transformers(
    source: Source, inputs: dict[str, Tensor], shapes: dict[str, Any], opset: int, *, rewritten: bool = False
) -> tuple[Traced, list[str]]:
    """The steps of transformers' `OnnxExporter.export_program`, with our operator in its table and without
    optimizer; and the names of classes whose forward was another."""
    from transformers.exporters import exporter_onnx, utils
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter

    wanted: Any = source.module
    with (
        utils.patch_model_outputs(wanted) as (input_names, output_names, _),
        utils.apply_patches("onnx"),
        patches.replaced(source.module) as other,
        contextlib.nullcontext() if source.interface.cached else patches.own_windows(),
        # It would make position ids, computed from the sample, a further input; the model computes its own.
        utils.patch_attribute(utils, "precompute_export_inputs", lambda _: lambda model, inputs: None),
        utils.patch_attribute(utils, "module_dtype", _one_dtype),
    ):
        config = DynamoConfig(dynamic=True, dynamic_shapes=shapes)
        program, _ = DynamoExporter().export_program(wanted, dict(inputs), config)
        randomness.refuse(program.graph_module)
        runnable, assumptions = (
            _runnable(program, source.interface),
            guards.guards_of(program, source.interface),
        )
        symbols = _symbols(program, source.interface)
        input_names, output_names = utils.disambiguate_io_names(input_names, output_names)
        utils.apply_fx_node_fixes("onnx", program.graph_module)
        program_fixes.apply(program.graph_module)
        table = {**operators.TABLE, **exporter_onnx._ONNX_TRANSLATION_TABLE, **cached_rows.TABLE}
        if rewritten:
            python_numbers.refuse_others(program.graph_module, rewritten=True)
            table |= {**python_numbers.TABLE, **operators.TABLE}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not rewritten):
            model = translate.to_onnx(program, opset=opset, input_names=input_names, table=table)
        if rewritten:
            python_numbers.retype(model)
    exporter_onnx._name_graph_outputs(model.graph, output_names)
    bodies: list[Any] = [model.graph, *model.functions.values()]
    for fix in exporter_onnx._IR_FIXES:
        for body in bodies:
            fix(body)
    return Traced(model, runnable, assumptions, symbols), other


def _one_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers casts the inputs to the type of the model's first parameter. In a model of several types, such as
    one whose encoder of sound stays in float32, that may be another's than theirs: they are left as they are."""

    def dtype(model: Any) -> torch.dtype | None:
        kinds = {each.dtype for each in model.parameters() if each.is_floating_point()}
        return original(model) if len(kinds) == 1 else None

    return dtype


def _runnable(program: torch.export.ExportedProgram, interface: Interface) -> Callable[..., Any]:
    """The program in torch. It takes 2 for the least size of any axis and lets smaller ones pass, but asserts what
    follows for an axis that is the sum of others: such bounds are lowered to the 2 that passes."""
    program_fixes.drop_traced_bounds(program)
    ranges: Any = program.range_constraints
    for node in program.graph.nodes:
        spec = interface.inputs.get(node.name) if node.op == "placeholder" else None
        for axis, name in {} if spec is None else spec.axes.items():
            size = node.meta["val"].shape[axis]
            if name not in interface.symbols and isinstance(size, torch.SymInt):
                bounds = ranges[size.node.expr]
                ranges[size.node.expr] = type(bounds)(2, bounds.upper)
    return program.module()


def _of_values(program: torch.export.ExportedProgram) -> bool:
    """Whether the trace made numbers or sizes that depend on values; the program has no more those that nothing
    computes with."""
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    modes = [each.fake_mode for each in values if isinstance(each, torch._subclasses.FakeTensor)]
    known = modes[0].shape_env.var_to_range if modes and modes[0].shape_env is not None else {}
    kinds = (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)
    return any(symbol_is_type(symbol, kinds) for symbol in known)


def _symbols(program: torch.export.ExportedProgram, interface: Interface) -> dict[str, str]:
    """torch's symbol of each dynamic axis -> the axis's name."""
    names = {}
    for node in program.graph.nodes:
        spec = interface.inputs.get(node.name) if node.op == "placeholder" else None
        if spec is not None:
            for axis, name in spec.axes.items():
                names[str(node.meta["val"].shape[axis])] = name
    return names


@contextlib.contextmanager
def _refused(source: Source, inputs: dict[str, Tensor]) -> Iterator[None]:
    try:
        yield
    except ImpossibleError:
        raise
    except Exception as error:  # torch's export errors share no base class, and traced code raises anything
        with users_code(source.name, "the model"):  # such as one that its configuration does not go with
            source.forward(inputs)
        fixed = _FIXED_AXIS.search(str(error))
        if fixed is not None:
            raise ImpossibleError(
                f"the model's code fixes axis {fixed['axis']} of '{fixed['name']}' at {fixed['size']}",
                "make that axis static, or compute with tensor operations instead of Python loops over it",
            ) from error
        raise ImpossibleError(
            f"torch cannot export the model: {root_line(error)}{place_of(error)}", _hint(error)
        ) from error


def _hint(error: BaseException) -> str:
    text = str(error)
    if "data-dependent" in text or "DataDependent" in type(error).__name__:
        return "its Python code branches on tensor values: use tensor operations there"
    return "--debug shows where"


def _output_names(outputs: Any, taken: Mapping[str, Any]) -> list[str]:
    """Names for a plain module's outputs: dictionary keys, ``output``, or ``output_0``, ``output_1``, ..."""
    if isinstance(outputs, Tensor):
        names = ["output"]
    elif isinstance(outputs, Mapping) and all(isinstance(value, Tensor) for value in outputs.values()):
        names = [str(key) for key in outputs]
    else:
        names = [f"output_{index}" for index in range(len(leaves(outputs)))]
    return [f"{name}_out" if name in taken else name for name in names]

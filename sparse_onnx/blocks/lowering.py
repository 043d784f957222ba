"""What every lowering of a neutral block shares: which blocks it takes, how it refuses, what it leaves in the metadata.

Each block may carry the forms that it is wanted in, best first, as metadata of its node (`want`). A lowering takes the
blocks whose first wanted form is its own, and blocks without any. Where it refuses one, it strikes its form from that
block's list, and the lowering of the next form takes it.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.blocks.expert_thresholds import marked
from sparse_onnx.blocks.function import attach_functions
from sparse_onnx.blocks.lowered import FORM_KEY, NAME_KEY, LoweredBlock, record_lowered
from sparse_onnx.blocks.moe import MoEBlock, blocks
from sparse_onnx.blocks.rounding import rounding
from sparse_onnx.core.passes import Outcome, Pass, parse_options
from sparse_onnx.core.report import Refusal
from sparse_onnx.core.settings import parse_settings
from sparse_onnx.graph.build import Emitter, Namespace

WANTED_KEY = "sparse_onnx.wanted"
#: Metadata of a neutral node: `int8` where a lossy step allowed kernels that round activations to 8 bits.
ACTIVATIONS_KEY = "sparse_onnx.activations"

Problem = tuple[str, str]
"""Why something is refused, and what to do about it."""


@dataclasses.dataclass(frozen=True)
class Form:
    """An execution form with the options of its lowering, as in ``branched:style=group,group=8``."""

    name: str
    options: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def parse(text: str) -> Form:
        """
        Raises:
            ValueError: no ``name:option=value,option=value``.
        """
        name, options = parse_settings(text)
        return Form(name, tuple(options.items()))

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.name}:{options}" if options else self.name


def want(node: ir.Node, forms: Sequence[Form]) -> None:
    """Sets the forms that a neutral node is wanted in, best first; none leaves it to any lowering."""
    if forms:
        node.metadata_props[WANTED_KEY] = json.dumps([str(form) for form in forms])
    else:
        node.metadata_props.pop(WANTED_KEY, None)


def wanted(node: ir.Node) -> list[Form]:
    """The forms that a neutral node is wanted in, best first."""
    text = node.metadata_props.get(WANTED_KEY)
    return [] if text is None else [Form.parse(each) for each in json.loads(text)]


def takes(node: ir.Node, form: str) -> Form | None:
    """How a lowering to `form` is to take the node; None where it is not to."""
    forms = wanted(node)
    if not forms:
        return Form(form)
    return forms[0] if forms[0].name == form else None


def strike(node: ir.Node, form: str) -> None:
    """The node is not wanted in that form any more. A last one stays: nobody else is to take the block."""
    left = [each for each in wanted(node) if each.name != form]
    if left:
        want(node, left)


@dataclasses.dataclass(frozen=True)
class Lowering(Pass):
    """Base of the passes that rewrite `MoE` and `GatedMoE` nodes into one execution form."""

    form: ClassVar[str]
    opset: ClassVar[int] = 18
    """Oldest opset of the default domain that the form can be written in."""
    skips_inputs: ClassVar[bool] = False
    """Whether thresholds can act on the experts' layers."""

    def call(self, model: ir.Model) -> Outcome:
        version = model.opset_imports.get("", 0)
        names = Namespace(model)
        nodes = [block.node for block in blocks(model) if takes(block.node, self.form) is not None]
        skipping = any(marked(node) for node in nodes)
        refusals, lowered = [], []
        for node in nodes:
            block = MoEBlock.of(node)  # now, since rewriting the block before it may have replaced its tokens
            form = takes(node, self.form)
            assert block is not None and form is not None
            own = dataclasses.replace(self, **parse_options(type(self), dict(form.options)))
            problem = _common_problem(block, version, self.opset)
            if problem is None and marked(node) and not self.skips_inputs:
                problem = (
                    "thresholds act on experts' layers, which it has none of",
                    "take grouped, branched or gathered",
                )
            problem = problem or own.problem(block, version)
            if problem is not None:
                text, hint = problem
                refusals.append(Refusal(f"block '{block.name}': {text}", node.name or "", hint, self.name))
                strike(node, self.form)
                continue
            lowered.append(LoweredBlock.of(block, form=own.label))
            assert isinstance(node.graph, ir.Graph)
            emit = Emitter(node.graph, names, block.name, {NAME_KEY: block.name, FORM_KEY: own.label})
            for domain in own.rewrite(block, emit, version):
                model.opset_imports.setdefault(domain, 1)
            lowered[-1] = dataclasses.replace(lowered[-1], activations=rounding(emit.nodes))
        record_lowered(model, lowered)
        if skipping:
            attach_functions(model)
        return Outcome(model, bool(lowered), len(nodes), len(lowered), tuple(refusals))

    @property
    def label(self) -> str:
        """What reports call the form of a block that was lowered with these options."""
        return self.form

    def problem(self, block: MoEBlock, opset: int) -> Problem | None:
        """Why the block cannot take this form. Sizes and types are known, and the opset is new enough."""
        return None

    @abc.abstractmethod
    def rewrite(self, block: MoEBlock, emit: Emitter, opset: int) -> set[str]:
        """Puts the form in place of the block's node, by `emit.replace`.

        Returns:
            Domains of the operators that it uses beside the default one.
        """


def rounds_activations(block: MoEBlock) -> bool:
    """Whether a lossy step that the user asked for allows kernels that round this block's activations to 8 bits."""
    return block.node.metadata_props.get(ACTIVATIONS_KEY) == "int8"


def _common_problem(block: MoEBlock, opset: int, oldest: int) -> Problem | None:
    if opset < oldest:
        return f"opset {opset} lacks operators that this form needs", f"export at opset {oldest} or newer"
    sizes = {"experts": block.experts, "experts of a token": block.top_k, "outputs": block.hidden_out}
    for what, size in sizes.items():
        if not size:
            known = "zero" if size == 0 else "not known from the graph"
            return (
                f"the number of {what} is {known}",
                "shapes of weights and routing must be static but for the tokens",
            )
    if block.expert_weight.dtype is None:
        return (
            "the type of expert_weight is not known from the graph",
            "save the model with its inferred types",
        )
    return None

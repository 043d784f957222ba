"""Models whose answer is drawn at random: no file can agree with them, nor be compared."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export.users import is_library

#: Arguments of torch's operators without which they draw nothing.
_SWITCHES = ("train", "training", "dropout_p", "dropout")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def refuse(module: torch.nn.Module) -> None:
    """Of a traced program and the branches of its conditions.

    Raises:
        ImpossibleError: something is drawn, and used.
    """
    for each in module.modules():
        for node in each.graph.nodes if isinstance(each, fx.GraphModule) else ():
            if _draws(node) and (node.users or node.target._schema.is_mutable):
                raise ImpossibleError(
                    f"the model's answer is random: {node.target} draws numbers{_place(node)}",
                    "leave noise out where `self.training` is False, or take it as an input",
                )


def _draws(node: fx.Node) -> bool:
    target: Any = node.target
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    switches = []
    for place, argument in enumerate(target._schema.arguments):
        rate = argument.name == "p" and "dropout" in target._schema.name
        if rate or argument.name in _SWITCHES:
            given = node.args[place] if place < len(node.args) else argument.default_value
            switches.append(bool(node.kwargs.get(argument.name, given)))
    return all(switches)


def _place(node: fx.Node) -> str:
    frames = [
        found for found in _FRAME.findall(node.meta.get("stack_trace") or "") if not is_library(found[0])
    ]
    return f" at {frames[-1][0]}:{frames[-1][1]}" if frames else ""

"""The pass contract: a frozen dataclass on onnx-ir's `InPlacePass`, whose fields are its options.

A pass answers with an `Outcome`: what it matched, what it rewrote, and a `Refusal` for each thing that it had to
leave alone. `requires` and `ensures` are onnx-ir's: they raise when the model breaks the pass's contract.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, Literal, get_type_hints

import onnx_ir as ir

from sparse_onnx.core.errors import UsageError
from sparse_onnx.core.report import Refusal


@dataclasses.dataclass
class Outcome(ir.passes.PassResult):
    """Result of a pass. `notes` are what else its user must know, such as what a lossy pass lost."""

    matched: int = 0
    rewritten: int = 0
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pass(ir.passes.InPlacePass):
    """Base of all passes. A subclass is a frozen dataclass; each field is an option with ``metadata={"help": ...}``."""

    name: ClassVar[str]
    summary: ClassVar[str]
    kind: ClassVar[Literal["exact", "lossy"]] = "exact"

    @abc.abstractmethod
    def call(self, model: ir.Model) -> Outcome: ...


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a pass, as the command line shows it."""

    name: str
    type: type
    default: Any
    help: str


def options(pass_class: type[Pass]) -> list[Option]:
    hints = get_type_hints(pass_class)
    return [
        Option(field.name, hints[field.name], field.default, field.metadata.get("help", ""))
        for field in dataclasses.fields(pass_class)
    ]


def parse_options(pass_class: type[Pass], settings: dict[str, str]) -> dict[str, Any]:
    """Command-line text to typed option values.

    Raises:
        UsageError: an option that the pass does not have, or a value of another type.
    """
    known = {option.name: option for option in options(pass_class)}
    values: dict[str, Any] = {}
    for name, text in settings.items():
        if name not in known:
            names = ", ".join(known) or "none"
            raise UsageError(f"pass '{pass_class.name}' has no option '{name}'", f"its options: {names}")
        values[name] = _convert(pass_class, known[name], text)
    return values


def _convert(pass_class: type[Pass], option: Option, text: str) -> Any:
    if option.type is bool:
        lowered = text.lower()
        if lowered in ("true", "1", "yes", "on"):
            return True
        if lowered in ("false", "0", "no", "off"):
            return False
    else:
        try:
            return option.type(text)
        except ValueError:
            pass
    raise UsageError(f"pass '{pass_class.name}': {option.name}={text} is not {option.type.__name__}")

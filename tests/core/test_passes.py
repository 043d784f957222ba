from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir
import pytest

from sparse_onnx.core import registry
from sparse_onnx.core.errors import UsageError
from sparse_onnx.core.passes import Outcome, Pass, options, parse_options


@dataclasses.dataclass(frozen=True)
class Example(Pass):
    name: ClassVar[str] = "example"
    summary: ClassVar[str] = "does nothing"
    level: int = dataclasses.field(default=1, metadata={"help": "how much"})
    deep: bool = dataclasses.field(default=False, metadata={"help": "or not"})

    def call(self, model: ir.Model) -> Outcome:
        return Outcome(model, False)


def test_fields_are_options() -> None:
    assert [(o.name, o.type, o.default, o.help) for o in options(Example)] == [
        ("level", int, 1, "how much"),
        ("deep", bool, False, "or not"),
    ]
    assert parse_options(Example, {"level": "3", "deep": "yes"}) == {"level": 3, "deep": True}


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"depth": "1"}, "no option 'depth'"), ({"level": "much"}, "not int"), ({"deep": "2"}, "not bool")],
)
def test_wrong_options_name_what_is_wrong(setting: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_options(Example, setting)


def test_registry_is_lazy_and_helps() -> None:
    assert "fuse_gating" in registry.names()
    assert registry.get("fuse_gating").name == "fuse_gating"
    with pytest.raises(UsageError, match="unknown pass 'fuse_gatin'") as caught:
        registry.get("fuse_gatin")
    assert caught.value.hint == "did you mean 'fuse_gating'?"


@pytest.mark.parametrize("name", registry.names())
def test_every_pass_documents_itself(name: str) -> None:
    found = registry.get(name)
    assert found.name == name and found.summary and found.__doc__ and "Refused" in found.__doc__
    assert found.kind in ("exact", "lossy")

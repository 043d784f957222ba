"""SOURCE: whatever names a torch model, resolved to a module in eval mode and the inputs that it takes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_onnx.core.errors import ModelError, SparseOnnxError, UsageError
from sparse_onnx.export import calls, experts, settings
from sparse_onnx.export.checkpoint import stored
from sparse_onnx.export.samples import Interface, interface_of
from sparse_onnx.export.users import imported, users_code

OBJECT = re.compile(r"(?P<place>.+):(?P<name>[A-Za-z_]\w*)")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CONTRACT = "NAME is a function or class that gives (module, inputs) or (module, inputs, dynamic_axes)"
_AXES = "dynamic axes are {input: {axis: name}}, such as {'x': {0: 'batch'}}"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to export; `notes` say how it was made."""

    name: str
    module: nn.Module
    interface: Interface
    is_transformers: bool = False
    notes: tuple[str, ...] = ()
    owned: bool = False  #: whether nobody else has the module, so that its weights may be moved

    def forward(self, inputs: Mapping[str, Tensor]) -> Any:
        """What the module itself returns, untouched by the export."""
        kept = contextlib.nullcontext() if self.is_transformers else calls.leaving_as_is(self.module)
        with torch.no_grad(), kept:
            return self.module(**inputs)

    def widened(self) -> Source:
        """The same model with its weights as float32."""
        inputs = {
            name: dataclasses.replace(spec, example=_cast(spec.example, torch.float32))
            for name, spec in self.interface.inputs.items()
        }
        module = (
            stored.widened(self.module)
            if stored.is_stored(self.module)
            else copy.deepcopy(self.module).float()
        )
        return dataclasses.replace(
            self, module=module, interface=dataclasses.replace(self.interface, inputs=inputs)
        )


def leaves(outputs: Any) -> list[Tensor]:
    """All tensors of nested outputs, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def resolve(
    source: str,
    *,
    random_weights: bool = False,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    stream: bool | None = None,
) -> Source:
    """The model that SOURCE names.

    Args:
        source: a Hugging Face folder or hub id, ``zoo:NAME``, ``FILE.py:NAME`` or ``package.module:NAME``.
        random_weights: build it from its configuration; Hugging Face models only.
        dtype: element type of weights and floating-point inputs; None keeps the source's own.
        trust_remote_code: run Python that comes with a Hugging Face model.
        allow_pickle: load pickled weights, which can run code.
        stream: leave the weights of a Hugging Face folder in their files; None does so where they would not fit
            into memory.

    Raises:
        UsageError: nothing of that form or name.
        ModelError: the files are missing, unreadable or unsafe.
        OutsideError: the user's code, or the network, failed.
    """
    if os.path.isdir(source):
        return _hugging_face(source, random_weights, dtype, trust_remote_code, allow_pickle, stream)
    if source.startswith("zoo:"):
        found = _from_zoo(source.removeprefix("zoo:"))
    elif (match := OBJECT.fullmatch(source)) and (
        match["place"].endswith(".py") or _MODULE.fullmatch(match["place"])
    ):
        found = _from_code(match["place"], match["name"])
    elif os.path.exists(source) or source.endswith((".onnx", ".py", ".safetensors", ".bin", ".pt", ".pth")):
        raise _not_a_source(source)
    elif _HUB_ID.fullmatch(source):
        return _hugging_face(source, random_weights, dtype, trust_remote_code, allow_pickle, stream)
    else:
        raise ModelError(
            "no such folder", "give a Hugging Face folder, zoo:NAME or FILE.py:NAME", where=source
        )
    if random_weights:
        raise UsageError(f"--random-weights is for Hugging Face models; '{source}' makes its own weights")
    return _source(source, found, dtype)


def _not_a_source(source: str) -> SparseOnnxError:
    if not os.path.exists(source):
        return ModelError("no such file", "check the path", where=source)
    if source.endswith(".onnx"):
        return UsageError("this is ONNX already", "`sparse-onnx optimize` takes it", where=source)
    if source.endswith(".py"):
        return UsageError("say which object of the file is the model", f"{source}:NAME", where=source)
    return UsageError(
        "a weights file alone says not what the model is", "give the folder with config.json", where=source
    )


def _hugging_face(
    source: str,
    random_weights: bool,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    stream: bool | None,
) -> Source:
    try:
        from sparse_onnx.export import hugging_face
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "safetensors"):
            raise
        raise UsageError(
            f"a Hugging Face model needs {error.name}", "pip install 'sparse-onnx[hf]'"
        ) from error
    module, interface, notes = hugging_face.load(
        source,
        random_weights=random_weights,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        stream=stream,
    )
    if not stored.is_stored(module):  # those are in a form that takes any sizes
        experts.make_callable(module)
    return Source(source, module, interface, is_transformers=True, notes=notes, owned=True)


def _from_zoo(name: str) -> tuple[Any, ...]:
    from sparse_onnx import models

    module, inputs, axes = models.get(name).load()
    return module, inputs, axes


def _from_code(place: str, name: str) -> Any:
    """The object, called if it can be: this runs the user's code."""
    found = imported(place, name, _CONTRACT)
    if callable(found) and not isinstance(found, nn.Module):
        with users_code(f"{place}:{name}"):
            found = found()
    return found


def of_objects(found: tuple[Any, ...], dtype: torch.dtype | None = None) -> Source:
    """A module and its inputs, and maybe dynamic axes, given as objects. The module is put into eval mode.

    Raises:
        UsageError: they are something else.
        OutsideError: the module raises on its sample inputs.
    """
    if found and isinstance(found[0], nn.Module) and dtype is not None:
        found = (copy.deepcopy(found[0]), *found[1:])  # converted in place below
    return _source(type(found[0]).__name__ if found else "source", found, dtype)


def _source(name: str, found: Any, dtype: torch.dtype | None) -> Source:
    module, inputs, axes = _unpacked(name, found)
    module = module.eval()
    settings.without_cache(module)
    if dtype is not None:
        module = module.to(dtype)
    experts.make_callable(module)
    named = {key: _cast(value, dtype) for key, value in _named(name, module, inputs).items()}
    source = Source(name, module, interface_of(named, _named_axes(name, named, axes)))
    with users_code(name):
        outputs = source.forward(named)
    if not leaves(outputs):
        raise UsageError("its forward returns no tensor", "return what the ONNX model is to give", where=name)
    return source


def _unpacked(name: str, found: Any) -> tuple[nn.Module, Any, Any]:
    module, *rest = found if isinstance(found, tuple) and found else (found,)
    if not isinstance(module, nn.Module) or len(rest) > 2:
        raise UsageError(f"it gives {type(found).__name__}, not a torch module", _CONTRACT, where=name)
    inputs = rest[0] if rest else getattr(module, "example_inputs", None)
    axes = rest[1] if len(rest) == 2 else getattr(module, "dynamic_axes", None)
    if inputs is None:
        raise UsageError(
            "its sample inputs are not known", f"{_CONTRACT}; or give the module 'example_inputs'", where=name
        )
    if callable(inputs) and not isinstance(inputs, Tensor):
        with users_code(name):
            inputs = inputs()
    return module, inputs, axes


def _named(name: str, module: nn.Module, inputs: Any) -> dict[str, Tensor]:
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if isinstance(inputs, (tuple, list)):
        try:
            inputs = inspect.signature(module.forward).bind(*inputs).arguments
        except TypeError as error:
            raise UsageError(
                f"its sample inputs do not fit its forward: {error}", _CONTRACT, where=name
            ) from None
    if not isinstance(inputs, Mapping):
        raise UsageError(
            f"its sample inputs are {type(inputs).__name__}", "give a tensor, a tuple or a dict", where=name
        )
    for key, value in inputs.items():
        if not isinstance(key, str):
            raise UsageError(f"sample input {key!r} has no name", _CONTRACT, where=name)
        if not isinstance(value, Tensor):
            raise UsageError(
                f"sample input '{key}' is {type(value).__name__}, not a tensor", _CONTRACT, where=name
            )
    return dict(inputs)


def _named_axes(source: str, inputs: dict[str, Tensor], axes: Any) -> dict[str, dict[int, str]] | None:
    """`{input: {axis: name}}`, or the axes of each input in order."""
    if axes is None:
        return None
    if isinstance(axes, (tuple, list)):
        if len(axes) > len(inputs):
            raise UsageError(
                f"dynamic axes of {len(axes)} inputs, and it has {len(inputs)}", _AXES, where=source
            )
        axes = dict(zip(inputs, axes, strict=False))
    if not isinstance(axes, Mapping):
        raise UsageError(f"its dynamic axes are {type(axes).__name__}", _AXES, where=source)
    named: dict[str, dict[int, str]] = {}
    for key, value in axes.items():
        if value is not None and not isinstance(value, Mapping):
            raise UsageError(f"the dynamic axes of '{key}' are {type(value).__name__}", _AXES, where=source)
        for axis, symbol in (value or {}).items():
            if type(axis) is not int or not isinstance(symbol, str) or not symbol.isidentifier():
                raise UsageError(
                    f"dynamic axis {axis!r}: {symbol!r} of '{key}' is not a number and a name",
                    _AXES,
                    where=source,
                )
        named[str(key)] = dict(value or {})
    return named


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype) if dtype is not None and value.dtype.is_floating_point else value

"""Which architectures of the installed transformers hold experts: read from its own source files and registries,
so that a new release shows what it adds."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: The decorator of transformers' experts classes, or a class of that name.
_EXPERTS_CLASS = re.compile(r"^@use_experts_implementation|^class \w*Experts\(", re.MULTILINE)
_UNDECORATED = re.compile(r"(?<!use_experts_implementation\n)(?<!\)\n)^class \w*Experts\(", re.MULTILINE)
#: A configuration's field that counts experts: num_experts, n_routed_experts, moe_num_experts, num_local_experts ...
_EXPERTS_FIELD = re.compile(r"^    (moe_)?(num|n)_(local_|routed_)?experts\s*[:=]", re.MULTILINE)
#: Registries of model classes, in order of preference: what a published checkpoint names as its architecture.
_MAPPINGS = (
    ("multimodal", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    ("multimodal", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
    ("encoder-decoder", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    ("causal", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("classification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    ("vision", "MODEL_FOR_POSE_ESTIMATION_MAPPING_NAMES"),
    ("vision", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    ("vision", "MODEL_FOR_BACKBONE_MAPPING_NAMES"),
    ("other", "MODEL_MAPPING_NAMES"),
)
#: Tasks that a part of another model may have on its own: the text half of a multimodal model is published alone.
_OF_PARTS = frozenset({"causal", "encoder-decoder", "multimodal"})


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One model type with experts, and the model class that its checkpoints name."""

    name: str
    directory: str
    model_class: str
    task: str
    decorated: bool


def directories() -> dict[str, bool]:
    """Model directories whose source holds experts -> whether all of them go through transformers' decorator."""
    return {
        folder.name: decorated
        for folder in sorted(_models().iterdir())
        if (decorated := _held(folder)) is not None
    }


def architectures() -> list[Architecture]:
    """All of them, by name; a directory may give several: a multimodal model, and its text model alone."""
    found: list[Architecture] = []
    held = directories()
    for directory, decorated in held.items():
        rows = list(_of_directory(directory, decorated))
        found += [row for row in rows if row.task != "other"] or rows[:1]
    for directory, part in _around(held):
        found += _of_directory(directory, held[part])
    return sorted(found, key=lambda row: row.name)


def _around(held: dict[str, bool]) -> Iterator[tuple[str, str]]:
    """Directories without experts of their own whose configuration is built around one that has some."""
    for folder in sorted(_models().iterdir()):
        if folder.name in held:
            continue
        named = re.findall(r'^ +model_type="(\w+)"', _text(folder, "configuration_*.py"), re.MULTILINE)
        for part in sorted(held.keys() & set(named)):
            yield folder.name, part


def _models() -> Path:
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the coverage table needs transformers", name="transformers")
    return Path(spec.origin).parent / "models"


def _held(folder: Path) -> bool | None:
    """None: it holds no experts."""
    modeling = _text(folder, "modeling_*.py")
    if _EXPERTS_CLASS.search(modeling):
        return not _UNDECORATED.search(modeling)
    if _EXPERTS_FIELD.search(_text(folder, "configuration_*.py")):
        return not modeling  # a configuration alone goes with another directory's decorated model
    return None


def _text(folder: Path, pattern: str) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob(pattern)))


def _of_directory(directory: str, decorated: bool) -> Iterator[Architecture]:
    from transformers.models.auto import configuration_auto, modeling_auto

    types = [
        name
        for name in configuration_auto.CONFIG_MAPPING_NAMES
        if configuration_auto.model_type_to_module_name(name) == directory
    ]
    seen = set[str]()
    for name in sorted(types, key=lambda each: (_is_part(each), len(each), each)):
        task, model_class = _class_of(name, modeling_auto)
        if model_class is None or model_class in seen or (_is_part(name) and task not in _OF_PARTS):
            continue
        seen.add(model_class)
        yield Architecture(name, directory, model_class, task, decorated)


def _class_of(model_type: str, registries: Any) -> tuple[str, str | None]:
    for task, mapping in _MAPPINGS:
        found = getattr(registries, mapping, {}).get(model_type)
        if found is not None:
            return task, found if isinstance(found, str) else found[0]
    return "", None


def _is_part(model_type: str) -> bool:
    """Whether the configuration belongs into another one, as its text, vision or audio part."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return bool(getattr(CONFIG_MAPPING[model_type], "base_config_key", ""))

"""Every multimodal architecture with experts, tiny, with encoders that run; and what comes of exporting them whole.

``python -m sparse_onnx.bench.coverage.multimodal [NAME ...]`` prints the table of `docs/multimodal.md`.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomllib

from sparse_onnx.bench.coverage import registry, tiny
from sparse_onnx.bench.coverage.registry import Architecture
from sparse_onnx.core.errors import ImpossibleError, SparseOnnxError, UsageError

#: Height and width in pixels, of those that take any: patches of 4, merged by twos.
IMAGE = (16, 24)


def architectures() -> list[Architecture]:
    """Those whose checkpoints hold an encoder of images or of sound."""
    from transformers import AutoConfig

    found = []
    for each in registry.architectures():
        if each.task == "multimodal":
            parts = set(type(AutoConfig.for_model(each.name)).sub_configs)
            if parts & {"vision_config", "audio_config", "thinker_config"}:
                found.append(each)
    return found


def write(architecture: Architecture, folder: Path) -> Path:
    """A folder with config.json as users have it."""
    from transformers import AutoConfig

    config = tiny.shrunk(AutoConfig.for_model(architecture.name), _exceptions())
    config.architectures = [architecture.model_class]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The files that were written, whether the decoder has its cache, the largest relative error of any of them and of
    all together, whether these were compared with media of each kind, and what is missing and why."""

    name: str
    files: tuple[str, ...] = ()
    past: bool = False
    error: float | None = None
    chained: bool = False
    remarks: tuple[str, ...] = ()

    def row(self) -> str:
        error = "" if self.error is None else f"{self.error:.0e}"
        files = ", ".join(self.files) or "refused"
        cells = (f"`{self.name}`", files, "yes" if self.past else "", error, "; ".join(self.remarks))
        return "| " + " | ".join(cells) + " |"


def measure(architecture: Architecture) -> Outcome:
    """Exports it with its cache, or where that is refused without."""
    with tempfile.TemporaryDirectory() as place:
        folder = write(architecture, Path(place) / architecture.name)
        remarks: list[str] = []
        for past in (True, False):
            try:
                return _exported(architecture.name, folder, Path(place) / "out", past, remarks)
            except ImpossibleError as error:
                if error.message not in remarks:
                    remarks.append(error.message)
            except SparseOnnxError as error:
                return Outcome(architecture.name, remarks=(*remarks, f"failed: {error.message}"))
    return Outcome(architecture.name, remarks=tuple(remarks))


def _exported(name: str, folder: Path, out: Path, past: bool, remarks: list[str]) -> Outcome:
    from sparse_onnx import export

    arguments: dict[str, Any] = {"random_weights": True, "multimodal": True, "past": past}
    try:
        report = export(folder, out, **arguments, image_size=IMAGE)
    except UsageError:  # it takes one size only, or multiples of another one
        report = export(folder, out, **arguments)
    verify = report.verify
    assert verify is not None
    missing = [note for note in report.notes if note.startswith("no ")]
    return Outcome(
        name,
        tuple(sorted(path.stem for path in out.glob("*.onnx"))),
        past,
        verify.max_rel_error,
        not any("were compared on prompts without" in note for note in report.notes),
        (*remarks, *missing),
    )


def _exceptions() -> Mapping[str, Mapping[str, Any]]:
    own = tomllib.loads(Path(__file__).with_name("multimodal.toml").read_text())
    known = tiny.exceptions()
    return {name: {**known.get(name, {}), **own.get(name, {})} for name in known.keys() | own.keys()}


def main(names: list[str]) -> None:
    print("| architecture | files | cache | error | |\n| --- | --- | --- | ---: | --- |")
    for each in architectures():
        if not names or each.name in names:
            print(measure(each).row(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

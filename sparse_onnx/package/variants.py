"""The packaged model in several execution forms, over the same weights where a form does not lay them out anew."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from sparse_onnx.blocks import neutral_blocks
from sparse_onnx.core.errors import ImpossibleError, VerificationError
from sparse_onnx.graph import io
from sparse_onnx.optimize.api import optimize
from sparse_onnx.optimize.choose import parse_form
from sparse_onnx.package.contents import data_files
from sparse_onnx.package.smoke import Recorded, outputs_of
from sparse_onnx.targets import places
from sparse_onnx.targets.profile import TargetProfile

DEFAULT = "default"
OPERATORS = "required_operators.config"


@dataclasses.dataclass(frozen=True)
class Variant:
    """`data` are the weight files that the graph names, in the package."""

    name: str
    model: Path
    data: tuple[str, ...]


def build(
    main: Path,
    profile: TargetProfile,
    forms: Sequence[str],
    all_forms: bool,
    notes: list[str],
    say: Callable[[str], None],
) -> list[Variant]:
    """The model itself, lowered if it has neutral blocks, and a file beside it for each further form.

    Raises:
        ImpossibleError: no block of the model can have a form that was asked for.
    """
    for form in forms:
        parse_form(form, profile)  # a wrong name is said before anything is done
    wanted = list(dict.fromkeys([*forms, *(profile.forms if all_forms else ())]))
    made = []
    for form in wanted:
        say(f"making the variant {form}")
        path = main.with_name(f"{main.stem}.{re.sub(r'[^A-Za-z0-9]+', '-', form)}.onnx")
        try:
            report = optimize(main, path, target=profile.name, form=form)
            if not any(
                (block.form or "").partition(":")[0] == form.partition(":")[0] for block in report.blocks
            ):
                path.unlink()
                raise ImpossibleError(f"no block of the model can have the form '{form}'", "leave it out")
        except (ImpossibleError, VerificationError) as error:
            if form in forms:
                raise
            notes.append(f"no variant {form}: {error}")
            continue
        made.append((form, path))
    if neutral_blocks(io.load(main)):
        say(f"lowering for {profile.name}")
        record = optimize(main, main, target=profile.name).verify
        notes.append(f"the model was lowered for {profile.name} as `sparse-onnx optimize` does")
        if record is not None:
            parts = (each.partition(": ") for each in record.not_run)
            notes += [
                f"not to be run with {size}: {record.on} fails with the original as well: {why}"
                for size, _, why in parts
            ]
    same = [(form, path) for form, path in made if path.read_bytes() == main.read_bytes()]
    for _, path in same:
        path.unlink()
    default = same[0][0] if same else DEFAULT
    others = [each for each in made if each not in same]
    return [_variant(name, path) for name, path in [(default, main), *others]]


def _variant(name: str, path: Path) -> Variant:
    return Variant(name, path, tuple(sorted(data_files(io.load(path)))))


def to_ort(made: Sequence[Variant], folder: Path, recorded: Recorded, notes: list[str]) -> list[Variant]:
    """Each variant in ORT's own format, checked anew, in place of the .onnx files; with the operators that a build of
    ONNX Runtime needs for them.

    Raises:
        ImpossibleError: a model that does not fit into one file, or that ORT does not convert.
        VerificationError: a converted model gives something else.
    """
    converted = []
    for variant in made:
        work = folder / "convert"
        work.mkdir()
        try:
            single = Path(places.one_file(variant.model, work))
            path = variant.model.with_suffix(".ort")
            places.to_ort(single).rename(path)
        except places.Failed as error:
            raise ImpossibleError(f"cannot become an .ort file: {error}", where=variant.name) from error
        finally:
            for left in work.iterdir():
                left.unlink()
            work.rmdir()
        problem = recorded.differs(outputs_of(path, recorded.feeds, entries=recorded.entries))
        if problem:
            raise VerificationError(f"the .ort file of '{variant.name}' differs: {problem}")
        converted.append(Variant(variant.name, path, ()))
    for variant in made:
        variant.model.unlink()
    for name in {name for variant in made for name in variant.data}:
        (folder / name).unlink()
    try:
        _operators(converted, folder)
    except ImportError as error:
        notes.append(f"{OPERATORS} is left out: onnxruntime's tool cannot be loaded ({error})")
    return converted


def _operators(made: Sequence[Variant], folder: Path) -> None:
    """By ORT's own tool, the file that `build.py --include_ops_by_config` takes."""
    from onnxruntime.tools.ort_format_model import create_config_from_models

    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    path = folder / OPERATORS
    create_config_from_models([variant.model for variant in made], path, False)
    path.write_text(path.read_text().replace(f"{folder}/", ""))  # where it was made says nothing

"""`python -m sparse_onnx.bench.thresholded.models`: thresholds in whole models: quality, bytes skipped, and speed.

Models of `bench.thresholded.cases`, in the variants of `bench.thresholded.variants`: dense in each type of weights,
thresholded at 10 to 60 % by each centre, and by the recipes of others. `--json FILE` holds what was measured, and what
is there is not measured again; `--docs PAGE` writes the tables into the page, between its markers.

Needs torch and transformers, for SmolLM2 gguf and accelerate too (``pip install 'sparse-onnx[bench-real]'``).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sparse_onnx.bench.thresholded import speed
from sparse_onnx.bench.thresholded.cases import NAMES, Amounts, Case, Name, prepare
from sparse_onnx.bench.thresholded.variants import Variant, variants
from sparse_onnx.core.errors import ImpossibleError, UsageError
from sparse_onnx.core.report import tool_versions
from sparse_onnx.targets import machine

SCHEMA = 1


class Store:
    """What was measured, in a JSON file that is written whole behind each measurement.

    Raises:
        UsageError: the file is of another amount of text, or no such file.
    """

    def __init__(self, path: Path | None, amounts: Amounts) -> None:
        self.path = path
        self.found: dict[str, Any] = {
            "schema": SCHEMA,
            "tool": tool_versions(),
            "processor": machine.processor(),
            "amounts": dataclasses.asdict(amounts),
            "quality": {},
            "speed": {},
        }
        if path is not None and path.exists():
            try:
                held = json.loads(path.read_text())
            except ValueError as error:
                raise UsageError(f"it is no JSON: {error}", "take another --json", str(path)) from None
            if not isinstance(held, dict) or held.get("schema") != SCHEMA:
                raise UsageError("it holds no measurements of this command", "take another --json", str(path))
            if held["amounts"] != self.found["amounts"]:
                raise UsageError("it was measured on other amounts of text", "take another --json", str(path))
            self.found = held

    def quality(self, model: str) -> dict[str, Any]:
        """By variant: a `Quality`, or why there is none."""
        found: dict[str, Any] = self.found["quality"].setdefault(model, {})
        return found

    def speed(self, model: str) -> dict[str, Any]:
        """By threads: shapes with their times."""
        found: dict[str, Any] = self.found["speed"].setdefault(model, {})
        return found

    def keep(self) -> None:
        if self.path is None:
            return
        temporary = self.path.with_name(f".{self.path.name}.part")
        temporary.write_text(json.dumps(self.found, indent=1) + "\n")
        os.replace(temporary, self.path)


def measure_quality(
    case: Case, wanted: list[Variant], store: Store, threads: int, say: Callable[[str], None]
) -> None:
    """What is not in the store yet."""
    from sparse_onnx.bench.thresholded.quality import Examiner

    held = store.quality(case.name)
    missing = [variant for variant in wanted if variant.key not in held]
    if not missing:
        return
    examiner = Examiner(case, threads)
    keep = {variant.key for variant in speed.timed(wanted)}
    for variant in missing:
        try:
            found: dict[str, Any] = dataclasses.asdict(examiner(variant))
        except ImpossibleError as error:
            found = {"key": variant.key, "refused": str(error)}
        except UsageError as error:  # a calibration of before there was such a method
            say(f"{case.name}: {variant.key}: {error}")
            continue
        held[variant.key] = found
        store.keep()
        say(f"{case.name}: {found}")
        if variant.key not in keep:
            case.remove(variant)


def measure_speed(
    case: Case, wanted: list[Variant], store: Store, threads: int, rounds: int, say: Callable[[str], None]
) -> None:
    """Whole, where this many threads are not in the store yet; of what quality was measured of, if it was of any."""
    held = store.speed(case.name)
    if str(threads) in held:
        return
    quality = store.quality(case.name)
    chosen = [each for each in speed.timed(wanted) if not quality or "metrics" in quality.get(each.key, ())]
    say(f"{case.name}: timing {len(chosen)} variants with {threads} threads")
    found = speed.measure(case, chosen, threads, rounds=rounds)
    held[str(threads)] = {name: [dataclasses.asdict(row) for row in rows] for name, rows in found.items()}
    store.found["processor"] = machine.processor()
    store.keep()


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("out/real"), show_default=True)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Measurements, to go on from.")
@click.option("--model", "models", type=click.Choice(NAMES), multiple=True, help="[default: all]")
@click.option("--only", type=click.Choice(["prepare", "quality", "speed", "docs"]), help="One part.")
@click.option("--variant", "keys", multiple=True, help="Variants whose name holds this. [default: all]")
@click.option("--threads", type=int, multiple=True, default=(1, 2), show_default=True, help="Of speed.")
@click.option("--quality-threads", type=int, default=1, show_default=True)
@click.option("--rounds", type=int, default=9, show_default=True, help="Of speed, at least.")
@click.option("--amounts", help="NAME=NUMBER,...: fields of `Amounts`, for less text.")
@click.option("--docs", type=click.Path(exists=True, path_type=Path), help="The page that gets the tables.")
def main(
    folder: Path,
    path: Path | None,
    models: tuple[Name, ...],
    only: str | None,
    keys: tuple[str, ...],
    threads: tuple[int, ...],
    quality_threads: int,
    rounds: int,
    amounts: str | None,
    docs: Path | None,
) -> None:
    from sparse_onnx.bench.thresholded import tables

    size = parse_amounts(amounts)
    store = Store(path, size)

    def say(line: str) -> None:
        click.echo(line, err=True)

    for name in models or NAMES if only != "docs" else ():
        case = prepare(name, folder, size, say)
        every = variants(case.encoder, list(case.bases))
        wanted = [
            each for each in every if not keys or each.kind == "dense" or any(key in each.key for key in keys)
        ]
        if only in (None, "quality"):
            measure_quality(case, wanted, store, quality_threads, say)
        if only == "prepare":
            for variant in speed.timed(wanted):
                say(str(case.file(variant)))
        for count in threads if only in (None, "speed") else ():
            measure_speed(case, wanted, store, count, rounds, say)
    text = tables.section(store.found)
    if docs is not None:
        docs.write_text(tables.placed(docs.read_text(), text))
    click.echo(text)


def parse_amounts(text: str | None) -> Amounts:
    """
    Raises:
        UsageError: an unknown name, or no number.
    """
    known = {field.name for field in dataclasses.fields(Amounts)}
    found = {}
    for part in (text or "").split(",") if text else ():
        name, _, number = part.partition("=")
        if name not in known or not number.isdigit() or not int(number):
            raise UsageError(f"'{part}' is no amount", f"NAME=NUMBER, of: {', '.join(sorted(known))}")
        found[name] = int(number)
    return Amounts(**found)


if __name__ == "__main__":
    main()

"""The table of docs/targets.md: target x form x (runs, right, placed whole), on the targets that can be run here.

    python -m sparse_onnx.bench.targets [NAME ...] [--write docs/targets.md]

Rows of other targets stay as they are in the file. Needs torch for the language model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from sparse_onnx import targets
from sparse_onnx.bench.target_forms import FORMS, form_on, results, try_language_model
from sparse_onnx.core.errors import UsageError
from sparse_onnx.targets import TargetProfile, places, runtimes
from sparse_onnx.targets.profile import FormResult

BEGIN, END = "<!-- table: python -m sparse_onnx.bench.targets -->", "<!-- end of the table -->"
_HEAD = [
    "| target | form | blocks: run | right | whole | not on the provider | language model |",
    "| --- | --- | ---: | ---: | ---: | --- | --- |",
]
_LANGUAGE_MODEL = "zoo:byte-moe"
#: Tokens of the language model's run.
_TOKENS = 8


#: The CPU target once more, in the oldest onnxruntime that is supported.
_OLDEST = "cpu-oldest"


def find(name: str) -> tuple[TargetProfile, str]:
    """A target and the place that runs it.

    Raises:
        UsageError: no such target, or it cannot be run here.
    """
    if name == _OLDEST:
        if not runtimes.get(name).installed:
            raise UsageError(
                f"{name} is not installed", f"python -m sparse_onnx.targets.runtimes install {name}"
            )
        return targets.get("cpu"), f"runtime:{name}"
    target = targets.get(name)
    return target, places.require(target)


def rows(name: str, language_model: Path) -> list[str]:
    target, where = find(name)
    found: dict[str, list[FormResult | None]] = {}
    for form, block, result in results(target, where):
        found.setdefault(form, []).append(result)
        print(f"{name} {form} {block}: {result}", flush=True)
    lines = []
    for form in FORMS:
        taken = [result for result in found[form] if result is not None]
        left = sorted({op for result in taken for op in result.left})
        whole = try_language_model(language_model, form, target, where, _TOKENS)
        print(f"{name} {form} language model: {whole}", flush=True)
        lines.append(
            f"| {name} | `{form_on(target, form)}` | {_count(taken, 'runs')} | {_count(taken, 'right')} | "
            f"{_count(taken, 'whole')} | {', '.join(left)} | {_words(whole)} |"
        )
    return lines


def _count(found: list[FormResult], what: str) -> str:
    return f"{sum(getattr(result, what) for result in found)} of {len(found)}"


def _words(result: FormResult | None) -> str:
    if result is None or not result.runs:
        return "does not run" if result is not None else ""
    if not result.right:
        return f"**wrong**: {result.note}"
    return "right, whole" if result.whole else f"right; {', '.join(result.left)} on the CPU"


def merged(text: str, fresh: dict[str, list[str]]) -> str:
    """The document with the rows of some targets replaced."""
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    kept: dict[str, list[str]] = {}
    for line in old.splitlines():
        name = line.strip("| ").partition("|")[0].strip()
        if line.startswith("|") and name not in ("target", "---"):
            kept.setdefault(name, []).append(line)
    kept |= fresh
    body = [line for name in sorted(kept) for line in kept[name]]
    return before + "\n".join([BEGIN, *_HEAD, *body, END]) + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    here = [name for name in targets.names() if places.place(targets.get(name)) is not None]
    names = given.names or [*here, *([_OLDEST] if runtimes.get(_OLDEST).installed else [])]
    fresh = {}
    with tempfile.TemporaryDirectory() as folder:
        from sparse_onnx import export

        model = Path(folder) / "model.onnx"
        export(_LANGUAGE_MODEL, model)
        for name in names:
            fresh[name] = rows(name, model)
            if given.write is not None:
                given.write.write_text(merged(given.write.read_text(), {name: fresh[name]}))
    print("\n".join([*_HEAD, *(line for name in fresh for line in fresh[name])]))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Checks the package that it lies in, and runs its smoke input. Needs onnxruntime and numpy alone.

    python run.py                   files, version of ONNX Runtime, outputs
    python run.py --tune            times the variants here; later runs take the fastest
    python run.py --variant NAME    a variant by name

Exit codes: 0 right; 1 the model cannot be run; 2 usage; 3 a file is missing or damaged; 4 other outputs than expected;
5 this ONNX Runtime is too old, or lacks the provider.

Other programs call `session(folder)` of it, which checks the same and returns an `onnxruntime.InferenceSession`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

TUNED = "tuned.json"


class Failure(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def manifest(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Failure(3, f"manifest.json cannot be read: {error}") from None
    if found.get("schema") != 1:
        raise Failure(5, f"manifest.json has schema {found.get('schema')}, and this runner reads 1")
    return found


def check_files(folder: Path, package: dict[str, Any]) -> None:
    for name, known in package["files"].items():
        path, hasher = folder / name, hashlib.sha256()
        if not path.is_file():
            raise Failure(3, f"{name} is missing: copy the package again")
        if path.stat().st_size != known["bytes"]:
            raise Failure(
                3, f"{name} has {path.stat().st_size} bytes instead of {known['bytes']}: copy it again"
            )
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                hasher.update(block)
        if hasher.hexdigest() != known["sha256"]:
            raise Failure(3, f"{name} is damaged: its sha256 is not that of manifest.json; copy it again")


def check_runtime(package: dict[str, Any]) -> None:
    try:
        import onnxruntime
    except ImportError as error:
        raise Failure(5, f"onnxruntime is not installed: {error}") from None
    least = package["onnxruntime"]["minimum"]
    if _numbers(onnxruntime.__version__) < _numbers(least):
        raise Failure(5, f"onnxruntime {onnxruntime.__version__} is too old: {least} or newer is needed")
    provider = package["providers"]["python"][0]
    if package["plugin"]:
        try:
            plugin = importlib.import_module(package["plugin"])
        except ImportError as error:
            raise Failure(
                5, f"{provider} comes with {package['plugin']}, which is not installed: {error}"
            ) from None
        if plugin.get_ep_name() not in {each.ep_name for each in onnxruntime.get_ep_devices()}:
            onnxruntime.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
    elif provider not in onnxruntime.get_available_providers():
        raise Failure(
            5, f"this onnxruntime has no {provider}; --provider CPUExecutionProvider runs without it"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def create(folder: Path, package: dict[str, Any], variant: dict[str, Any]) -> Any:
    """A session of one variant, with the options and the native kernels of the package."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in package["session"].items():
        kinds = {"true": True, "false": False, "sequential": onnxruntime.ExecutionMode.ORT_SEQUENTIAL}
        setattr(options, key, kinds.get(value, value))
    for key, value in package["config"].items():
        options.add_session_config_entry(key, value)
    provider = package["providers"]["python"][0]
    try:
        kernels = package["kernels"]
        here = (platform.system().lower(), platform.machine().lower())
        if kernels and here == (kernels["system"], kernels["machine"]):
            options.register_custom_ops_library(str((folder / kernels["file"]).resolve()))
        elif kernels:
            print(
                f"note: the native kernels are not for {here[0]} on {here[1]}: running without",
                file=sys.stderr,
            )
        given = package["provider_options"] if provider != "CPUExecutionProvider" else {}
        if package["plugin"]:
            plugin = importlib.import_module(package["plugin"])
            devices = [each for each in onnxruntime.get_ep_devices() if each.ep_name == plugin.get_ep_name()]
            # `@NAME` is what the plugin's function NAME gives: where a library lies.
            given = {
                key: getattr(plugin, text[1:])() if text[:1] == "@" else text for key, text in given.items()
            }
            options.add_provider_for_devices(devices[:1], given)
            return onnxruntime.InferenceSession(str(folder / variant["model"]), options)
        return onnxruntime.InferenceSession(
            str(folder / variant["model"]), options, providers=[(provider, given)]
        )
    except Exception as error:  # onnxruntime's errors share no base class
        raise Failure(1, f"{variant['model']} cannot be loaded: {_first(error)}") from None


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def run(opened: Any, feeds: dict[str, Any]) -> list[Any]:
    try:
        return list(opened.run(None, feeds))
    except Exception as error:
        raise Failure(1, f"the model fails while running: {_first(error)}") from None


def load(folder: Path, package: dict[str, Any], file: str) -> tuple[dict[str, Any], list[Any]]:
    """Feeds by name, and expected outputs where the file has any."""
    import numpy as np

    with np.load(folder / file) as arrays:
        feeds = {item["name"]: arrays[f"input_{at}"] for at, item in enumerate(package["smoke"]["inputs"])}
        outputs = [
            arrays[f"output_{at}"] for at in range(len(package["outputs"])) if f"output_{at}" in arrays
        ]
    return feeds, outputs


def error(got: Any, want: Any) -> float:
    """The largest one, relative to the largest finite magnitude of `want`; integers must be equal."""
    import numpy as np

    if got.shape != want.shape or got.dtype != want.dtype:
        return math.inf
    if want.dtype.kind != "f" or not want.size:
        return 0.0 if np.array_equal(got, want) else math.inf
    one, two = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(two)
    if not np.array_equal(np.isfinite(one), finite) or not np.array_equal(
        one[~finite], two[~finite], equal_nan=True
    ):
        return math.inf
    if not finite.any():
        return 0.0
    scale = max(float(np.abs(two[finite]).max()), 1e-6)
    return float(np.abs(one[finite] - two[finite]).max()) / scale


def smoke(folder: Path, package: dict[str, Any], opened: Any) -> float:
    """The largest error; a Failure where it is too large."""
    feeds, expected = load(folder, package, package["smoke"]["arrays"])
    worst, allowed = 0.0, package["smoke"]["tolerance"]
    for item, got, want in zip(package["smoke"]["outputs"], run(opened, feeds), expected):  # noqa: B905
        found = error(got, want)
        if not found <= allowed:
            raise Failure(4, f"output '{item['name']}' is off by {found:.2g}, and {allowed:g} is allowed")
        worst = max(worst, found)
    return worst


def _here(package: dict[str, Any]) -> dict[str, Any]:
    import onnxruntime

    return {
        "onnxruntime": onnxruntime.__version__,
        "provider": package["providers"]["python"][0],
        "processor": f"{platform.machine()} {platform.processor()} {os.cpu_count()}",
        "models": [package["files"][each["model"]]["sha256"] for each in package["variants"]],
    }


def tune(folder: Path, package: dict[str, Any], rounds: int) -> str:
    """Times the variants in turn, checks each, and remembers the one with the least mean ratio to the first."""
    variants = package["variants"]
    if len(variants) == 1:
        raise Failure(2, "there is one variant, and nothing to choose among: package with --variant")
    opened = [create(folder, package, variant) for variant in variants]
    for each in opened:
        smoke(folder, package, each)
    scores = [0.0] * len(variants)
    for entry in package["smoke"]["timing"]:
        feeds, _ = load(folder, package, entry["arrays"])
        times: list[list[float]] = [[] for _ in variants]
        for turn in range(rounds + 2):  # the first two warm up
            for at in range(len(variants)):
                number = (at + turn) % len(variants)
                start = time.perf_counter()
                run(opened[number], feeds)
                if turn > 1:
                    times[number].append(time.perf_counter() - start)
        medians = [statistics.median(each) for each in times]
        for number, median in enumerate(medians):
            scores[number] += math.log(median / medians[0])
            print(f"{entry['tokens']:>6} tokens  {median * 1e3:10.3f} ms  {variants[number]['name']}")
    best: str = variants[scores.index(min(scores))]["name"]
    try:
        written = folder / f".{TUNED}.{os.getpid()}"
        written.write_text(json.dumps({"variant": best, "here": _here(package)}) + "\n", encoding="utf-8")
        written.replace(folder / TUNED)
    except OSError as problem:
        raise Failure(1, f"'{best}' is the fastest, which cannot be kept: {problem}") from None
    return best


def chosen(folder: Path, package: dict[str, Any], name: str | None) -> dict[str, Any]:
    """The variant by name, else what was tuned on this machine with this ONNX Runtime, else the first."""
    if name is None:
        try:
            kept = json.loads((folder / TUNED).read_text(encoding="utf-8"))
            name = kept["variant"] if kept["here"] == _here(package) else None
        except (OSError, ValueError, KeyError, TypeError):
            name = None
    known = {variant["name"]: variant for variant in package["variants"]}
    name = package["variants"][0]["name"] if name is None else name
    if name not in known:
        raise Failure(2, f"there is no variant '{name}': {', '.join(known)}")
    found: dict[str, Any] = known[name]
    return found


def session(
    folder: str | os.PathLike[str] = Path(__file__).parent, variant: str | None = None, check: bool = True
) -> Any:
    """A session of the package's model; raises `Failure` where the package is damaged or cannot run here."""
    place = Path(folder)
    package = manifest(place)
    if check:
        check_files(place, package)
    check_runtime(package)
    return create(place, package, chosen(place, package, variant))


def main() -> int:
    parser = argparse.ArgumentParser(description="Check this package and run its smoke input.")
    parser.add_argument("--tune", action="store_true", help="time the variants here and remember the fastest")
    parser.add_argument("--rounds", type=int, default=20, help="of --tune")
    parser.add_argument("--variant", help="the variant to run")
    parser.add_argument("--provider", help="another execution provider than the package's")
    given = parser.parse_args()
    folder = Path(__file__).resolve().parent
    try:
        package = manifest(folder)
        if given.provider:
            package["providers"]["python"], package["plugin"] = [given.provider], None
        check_files(folder, package)
        check_runtime(package)
        if given.tune:
            print(f"fastest here: {tune(folder, package, max(1, given.rounds))}")
            return 0
        variant = chosen(folder, package, given.variant)
        worst = smoke(folder, package, create(folder, package, variant))
        print(
            f"ok: {variant['name']} ({variant['model']}), error {worst:.2g}, on {_here(package)['onnxruntime']}"
        )
        return 0
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return failure.code


if __name__ == "__main__":
    sys.exit(main())

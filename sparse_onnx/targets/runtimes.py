"""Runtimes that targets are tried on: where they are, and how they get there.

Each lies in a folder of its own below `SPARSE_ONNX_RUNTIMES`, else the user's cache: a virtual environment, or npm's
packages. Nothing is installed but by

    python -m sparse_onnx.targets.runtimes install NAME ... | all
    python -m sparse_onnx.targets.runtimes list
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparse_onnx.core.errors import ImpossibleError, OutsideError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER_VARIABLE = "SPARSE_ONNX_RUNTIMES"
#: Written last: an installation that was cut off is none.
_DONE = "installed.json"


@dataclasses.dataclass(frozen=True)
class Runtime:
    """
    Attributes:
        packages: of PyPI, with versions.
        npm: packages of npm, with versions.
        debian: files by Debian package; nothing else of those packages is kept.
        finish: JavaScript that Node runs in the folder at the end.
        providers: what sessions are created with, as the runtime calls them; none where it runs no model by itself.
        simulates: whether the device is simulated in software; its runs say nothing of time, or of races on the device.
        plugin: module of a provider that is registered when a session is created.
        environment: variables of the process; `{folder}` is the runtime's.
    """

    name: str
    summary: str
    providers: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()
    debian: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    finish: str = ""
    simulates: bool = False
    plugin: str = ""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return root() / self.name

    @property
    def installed(self) -> bool:
        """Whether these very versions are there."""
        try:
            return json.loads((self.folder / _DONE).read_text()) == self._contents()
        except (OSError, ValueError):
            return False

    @property
    def versions(self) -> str:
        return ", ".join(re.sub(r"==|(?<=.)@", " ", package) for package in [*self.packages, *self.npm])

    @property
    def command(self) -> list[str]:
        """Of a process that runs models; see `worker`."""
        worker = Path(__file__).with_name("worker.mjs" if self.npm else "worker.py")
        if self.npm:
            return ["node", str(worker), str(self.folder), self.npm[0].split("@")[0]]
        return [str(self.folder / "bin" / "python"), str(worker), self.plugin]

    def variables(self) -> dict[str, str]:
        return {key: value.format(folder=self.folder) for key, value in self.environment.items()}

    def _contents(self) -> dict[str, list[str]]:
        return {"packages": list(self.packages), "npm": list(self.npm), "debian": sorted(self.debian)}


def root() -> Path:
    given = os.environ.get(FOLDER_VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(cache) / "sparse-onnx" / "runtimes"


@functools.cache
def known() -> dict[str, Runtime]:
    data = tomllib.loads(Path(__file__).with_name("runtimes.toml").read_text(encoding="utf-8"))
    lists = ("packages", "npm", "providers")

    def runtime(name: str, entry: dict[str, Any]) -> Runtime:
        given: dict[str, Any] = {key: tuple(value) if key in lists else value for key, value in entry.items()}
        return Runtime(name, **given)

    return {name: runtime(name, entry) for name, entry in data.items()}


def get(name: str) -> Runtime:
    """
    Raises:
        UsageError: no such runtime.
    """
    if name not in known():
        raise UsageError(f"unknown runtime '{name}'", f"known: {', '.join(known())}")
    return known()[name]


def install(name: str, say: Callable[[str], None] = print) -> Path:
    """Puts a runtime into its folder, unless these very versions are there.

    Raises:
        UsageError: no such runtime.
        ImpossibleError: a tool that installs it is missing: npm, apt-get.
        OutsideError: a package cannot be had.
    """
    runtime = get(name)
    folder = runtime.folder
    if runtime.installed:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if runtime.packages:
        say(f"{name}: {runtime.versions} from PyPI")
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *runtime.packages])
    if runtime.npm:
        say(f"{name}: {runtime.versions} from npm")
        (folder / "package.json").write_text('{"private": true}\n')
        # Without scripts: onnxruntime-node's downloads a CUDA build.
        _run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *runtime.npm], folder)
    for package, files in runtime.debian.items():
        say(f"{name}: {len(files)} files of Debian's {package}")
        _unpack(package, files, folder / "files")
    if runtime.finish:
        _run(["node", "--input-type=module", "--eval", runtime.finish], folder)
    (folder / _DONE).write_text(json.dumps(runtime._contents()))
    return folder


def _unpack(package: str, files: Sequence[str], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        place.chmod(0o755)  # apt-get downloads as another user
        _run(["apt-get", "download", "-qq", package], place)
        _run(["dpkg-deb", "-x", str(next(place.glob("*.deb"))), "x"], place)
        for file in files:
            shutil.copy(place / "x" / file, folder / Path(file).name)


def _run(command: Sequence[str], folder: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise ImpossibleError(f"there is no {command[0]} on this machine", "install it first") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise OutsideError(f"{' '.join(command[:3])} failed: {lines[-1] if lines else done.returncode}")


def main(arguments: Sequence[str]) -> None:
    match list(arguments):
        case ["install", *names] if names:
            for name in known() if names == ["all"] else names:
                install(name)
        case ["list"] | []:
            for runtime in known().values():
                state = "installed" if runtime.installed else "-"
                print(f"{runtime.name:12} {state:10} {runtime.versions}: {runtime.summary}")
        case _:
            raise UsageError("runtimes: install NAME ... | all, or list")


if __name__ == "__main__":
    from sparse_onnx.core.errors import SparseOnnxError

    try:
        main(sys.argv[1:])
    except SparseOnnxError as error:
        sys.exit(f"error: {error}")

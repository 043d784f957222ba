"""What exporting the larger demo model costs, in time and memory, by three exporters: each in a process of its own.

`python -m sparse_onnx.bench.export_cost` writes a Mixtral-shaped checkpoint of random weights, has each exporter load
and export it, and prints a table. Peak memory is the process's largest resident size, mapped files included; seconds
count from the imports to the file on disk, CPU seconds from the start of the process. What sparse-onnx does includes
running the result against PyTorch; the others check nothing. Needs transformers, 2 cores, 6 GB of memory and 4 GB of
disk.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sparse_onnx.bench.demo import _MIXTRAL as MIXTRAL
from sparse_onnx.bench.tables import markdown, number


def _load(checkpoint: Path) -> tuple[Any, dict[str, Any], dict[str, dict[int, str]]]:
    """The module, sample inputs and dynamic axes, as the other exporters want them."""
    from sparse_onnx.export import hugging_face

    module, interface, _ = hugging_face.load(
        str(checkpoint), random_weights=False, dtype=None, trust_remote_code=False, allow_pickle=False
    )
    axes = {name: dict(spec.axes) for name, spec in interface.inputs.items()}
    return module, interface.draw(interface.traced_sizes()), axes


def _ours(checkpoint: Path, out: Path, stream: bool = False) -> dict[str, float]:
    import sparse_onnx

    start, checking = time.perf_counter(), 0.0

    def note(step: str) -> None:
        nonlocal checking
        if step.startswith("comparing") and not checking:
            checking = time.perf_counter()

    sparse_onnx.export(checkpoint, out, stream=stream, progress=note)
    end = time.perf_counter()
    return {"seconds": end - start, "checking": end - checking}


def _streamed(checkpoint: Path, out: Path) -> dict[str, float]:
    return _ours(checkpoint, out, stream=True)


def _transformers(checkpoint: Path, out: Path) -> dict[str, float]:
    from sparse_onnx.bench import rivals

    start = time.perf_counter()
    module, sample, axes = _load(checkpoint)
    rivals.export_transformers(module, sample, axes, out)
    return {"seconds": time.perf_counter() - start}


def _torch(checkpoint: Path, out: Path) -> dict[str, float]:
    """The module as transformers loads it."""
    import torch

    from sparse_onnx.export.translate import quiet

    start = time.perf_counter()
    module, sample, axes = _load(checkpoint)
    shapes = {name: dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC) for name, dynamic in axes.items()}
    with quiet():
        torch.onnx.export(module, (), out, kwargs=sample, dynamic_shapes=shapes, external_data=True)
    return {"seconds": time.perf_counter() - start}


def _torch_dense(checkpoint: Path, out: Path) -> dict[str, float]:
    from sparse_onnx.bench import rivals

    start = time.perf_counter()
    module, sample, axes = _load(checkpoint)
    rivals.export_dense(module, sample, axes, out)
    return {"seconds": time.perf_counter() - start}


EXPORTERS: dict[str, Callable[[Path, Path], dict[str, float]]] = {
    "sparse-onnx": _ours,
    "sparse-onnx --stream": _streamed,
    "transformers OnnxExporter": _transformers,
    "torch.onnx.export": _torch,
    "torch.onnx.export, dense experts": _torch_dense,
}


def _write_checkpoint(folder: Path, dtype: str, layers: int) -> None:
    import torch
    import transformers

    from sparse_onnx.export import random_weights

    settings: dict[str, Any] = MIXTRAL | {"dtype": dtype, "num_hidden_layers": layers}
    config = transformers.MixtralConfig(**settings)
    model = transformers.MixtralForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    random_weights.fill(model)
    model.save_pretrained(folder)


def _child(*arguments: str) -> dict[str, Any]:
    """One step in a process of its own; what it answers, or the line that it fails with."""
    command = [sys.executable, "-m", __spec__.name, "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failure": lines[-1] if lines else f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _run_child(name: str, *arguments: str) -> None:
    if name == "write":
        folder, dtype, layers = arguments
        _write_checkpoint(Path(folder), dtype, int(layers))
        found: dict[str, float] = {}
    else:
        checkpoint, out = map(Path, arguments)
        try:
            found = EXPORTERS[name](checkpoint, out)
        except Exception as error:  # of any exporter, for any reason: it is what the table says then
            from sparse_onnx.export.failure import root_line

            print(json.dumps({"failure": root_line(error)}))
            return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found["peak_mb"] = usage.ru_maxrss / 1024  # kilobytes on Linux
    found["cpu"] = usage.ru_utime + usage.ru_stime
    print(json.dumps(found))


@click.command()
@click.option("--child", nargs=1, hidden=True)
@click.argument("arguments", nargs=-1)
@click.option("--layers", default=MIXTRAL["num_hidden_layers"], show_default=True)
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]))
@click.option("--folder", type=click.Path(path_type=Path), help="For the files; default: a temporary one.")
def main(child: str | None, arguments: tuple[str, ...], layers: int, dtype: str, folder: Path | None) -> None:
    """Time and peak memory of exporting one model by three exporters."""
    if child is not None:
        _run_child(child, *arguments)
        return
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        checkpoint = Path(scratch) / "model"
        _child("write", str(checkpoint), dtype, str(layers))
        size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
        rows = []
        for name in EXPORTERS:
            out = Path(scratch) / "out" / "model.onnx"
            out.parent.mkdir()
            found = _child(name, str(checkpoint), str(out))
            rows.append(
                [
                    name,
                    number(found.get("seconds"), ".1f"),
                    number(found.get("checking"), ".1f"),
                    number(found.get("cpu"), ".1f"),
                    number(found.get("peak_mb"), ".0f"),
                    found.get("failure", ""),
                ]
            )
            click.echo(", ".join(rows[-1]), err=True)
            for path in out.parent.iterdir():
                path.unlink()
            out.parent.rmdir()
    click.echo(f"{size / 1e6:.0f} MB of {dtype} weights, {layers} layers\n")
    click.echo(
        markdown(["exporter", "seconds", "of these checking", "CPU seconds", "peak MB", "fails with"], rows)
    )


if __name__ == "__main__":
    main()

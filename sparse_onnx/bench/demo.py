"""`make demo`: two real models exported, optimized, verified and measured; the gain in a closing table.

The commands are those that a user types; each is printed as it runs. Files go to `out/`. Needs torch and
transformers, 2 cores, 5 GB of memory, 3 GB of disk and a few minutes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from sparse_onnx.bench.tables import markdown, number
from sparse_onnx.core.errors import SparseOnnxError
from sparse_onnx.core.report import BenchRow

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime
    from rich.console import Console

    from sparse_onnx.bench.measure import Contestant

OURS = "sparse-onnx"
DENSE, TRANSFORMERS, FUSED, EAGER = (
    "dense export",
    "transformers OnnxExporter",
    "transformers OnnxExporter, ort_fusions=cpu",
    "PyTorch eager",
)
TOKENS = (1, 64, 256)
THREADS = 2

#: A decoder of Mixtral's shape: its hidden size, heads and vocabulary are smaller, its experts as wide as
#: they get on a laptop.
_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model: what it is, its rows, and how good it is in each form (held-out bits per byte)."""

    title: str
    rows: list[BenchRow]
    resident_mb: dict[str, float | None]
    quality: dict[str, float]


def run(out: Console, *arguments: str | Path) -> None:
    """A command of ours, as a user runs it."""
    words = [str(word) for word in arguments]
    out.print(f"\n$ sparse-onnx {' '.join(words)}")
    finished = subprocess.run([sys.executable, "-m", "sparse_onnx.cli", *words], check=False)
    if finished.returncode:
        raise SystemExit(finished.returncode)


def prepare(out: Console, source: str | Path, path: Path, *options: str) -> Path:
    """Exports, optimizes and verifies; the optimized model's path."""
    optimized = path.with_name(f"{path.stem}.cpu.onnx")
    run(out, "export", source, path, *options)
    run(out, "optimize", path, optimized, "--target", "cpu")
    run(out, "verify", path, optimized)
    return optimized


def byte_moe(out: Console, folder: Path, min_time: float) -> Measured:
    """The zoo's trained byte-level language model: the quality of each form, and its speed."""
    import torch

    from sparse_onnx import models
    from sparse_onnx.bench import contestants, rivals
    from sparse_onnx.models.quality import bits_per_byte, held_out_text

    exported = folder / "byte-moe.onnx"
    optimized = prepare(out, "zoo:byte-moe", exported)
    module, inputs, axes = models.get("byte-moe").load()
    dense = folder / "byte-moe.dense.onnx"
    out.print(f"\nexporting the dense form to {dense}")
    rivals.export_dense(module, inputs, axes, dense)

    out.print("measuring bits per byte of held-out text: PyTorch, exported, optimized")
    text = held_out_text()
    quality = {
        EAGER: bits_per_byte(lambda ids: _logits(module, ids), text),
        **{
            name: bits_per_byte(functools.partial(_run, session), text)
            for name, session in (
                ("exported", contestants.create(exported, THREADS)),
                (OURS, contestants.create(optimized, THREADS)),
                (DENSE, contestants.create(dense, THREADS)),
            )
        },
    }
    torch.set_num_threads(THREADS)
    rows, memory = measure(out, {OURS: optimized, DENSE: dense}, module, min_time)
    return Measured("byte-moe (trained, 8 experts, top-2, hidden 128, 4 layers)", rows, memory, quality)


def _run(session: onnxruntime.InferenceSession, ids: np.ndarray) -> np.ndarray:
    return session.run(None, {"input_ids": ids})[0]


def _logits(module: Any, ids: Any) -> Any:
    import torch

    with torch.inference_mode():
        return module(torch.from_numpy(ids.copy())).numpy()


def mixtral(out: Console, folder: Path, min_time: float) -> Measured:
    """A Mixtral-shaped decoder with random weights: its speed and memory against the other ways to run it."""
    import transformers

    from sparse_onnx.bench import rivals
    from sparse_onnx.export import hugging_face

    source = folder / "mixtral"
    source.mkdir(exist_ok=True)
    (source / "config.json").write_text(json.dumps(_MIXTRAL, indent=1))
    optimized = prepare(out, source, folder / "mixtral.onnx", "--random-weights")

    module, interface, _ = hugging_face.load(
        str(source), random_weights=True, dtype=None, trust_remote_code=False, allow_pickle=False
    )
    assert isinstance(module, transformers.PreTrainedModel)
    module.config.use_cache = False
    sample = interface.draw(interface.traced_sizes())
    axes = {name: dict(spec.axes) for name, spec in interface.inputs.items()}
    paths = {OURS: optimized}
    forms: list[tuple[str, str, str, Literal["cpu"] | None]] = [
        (DENSE, "dense", rivals.DENSE, None),
        (TRANSFORMERS, "hf", "grouped_mm", None),
        (FUSED, "hf-fused", "grouped_mm", "cpu"),
    ]
    for name, stem, form, fusions in forms:
        paths[name] = folder / f"mixtral.{stem}.onnx"
        fused = ", fused for the CPU" if fusions else ""
        out.print(f"exporting with transformers' OnnxExporter, {form} experts{fused}, to {paths[name]}")
        rivals.export_transformers(module, sample, axes, paths[name], experts=form, fusions=fusions)
    call = functools.partial(_first_output, module)
    rows, memory = measure(out, paths, call, min_time)
    return Measured("Mixtral-shaped (8 experts, top-2, hidden 1024, inner 2816, 2 layers)", rows, memory, {})


def _first_output(module: Any, **inputs: Any) -> Any:
    return module(**inputs, use_cache=False).logits


def measure(
    out: Console, paths: Mapping[str, Path], call: Callable[..., Any], min_time: float
) -> tuple[list[BenchRow], dict[str, float | None]]:
    """All forms, checked against PyTorch, then interleaved with it; and the resident memory of each form."""
    from sparse_onnx.bench import contestants, memory
    from sparse_onnx.bench.api import INPUTS
    from sparse_onnx.bench.measure import interleave, rows
    from sparse_onnx.graph import io
    from sparse_onnx.verify.inputs import sized_inputs

    out.print(f"measuring {', '.join([*paths, EAGER])} at {', '.join(map(str, TOKENS))} tokens, interleaved")
    resident = {name: memory.measure(path, THREADS, TOKENS).rss_mb for name, path in paths.items()}
    model = io.load(paths[OURS])
    sessions = {name: contestants.create(path, THREADS) for name, path in paths.items()}
    measured: list[BenchRow] = []
    for count in TOKENS:
        feeds = [sized_inputs(model, 1, count, seed=seed) for seed in range(INPUTS)]
        runs: list[Contestant] = [
            contestants.onnx(name, session, feeds) for name, session in sessions.items()
        ]
        eager = contestants.eager(EAGER, call, feeds)
        contestants.check(eager, runs, INPUTS)
        times = interleave([*runs, eager], INPUTS, min_time=min_time)
        measured += rows([run.name for run in (*runs, eager)], count, times)
    return measured, resident


def summary(model: Measured) -> str:
    """The closing table of one model: times relative to ours, memory, quality."""
    names = list(dict.fromkeys([*(row.model for row in model.rows), *model.quality]))
    ratios = {(row.model, row.tokens): row.ratio_to_first for row in model.rows}
    columns = ["time relative to sparse-onnx, tokens:", *map(str, TOKENS), "resident MB"]
    lines = []
    for name in names:
        times = [number(ratios.get((name, count)), ".2f") for count in TOKENS]
        lines.append([name, *times, number(model.resident_mb.get(name), ".0f")])
        if model.quality:
            lines[-1].append(number(model.quality.get(name), ".5f"))
    if model.quality:
        columns.append("bits per byte")
    return f"{model.title}\n\n{markdown(columns, lines)}\n"


@click.command()
@click.option("--out", "folder", type=click.Path(path_type=Path), default="out", show_default=True)
@click.option(
    "--min-time", type=float, default=1.5, show_default=True, help="Seconds a contestant and count."
)
def main(folder: Path, min_time: float) -> None:
    """Two real models from PyTorch to a fast ONNX graph, and what was gained."""
    from rich.console import Console

    from sparse_onnx.bench.suite import pin_threads

    pin_threads(THREADS, "sparse_onnx.bench.demo", sys.argv[1:])
    import torch

    torch.set_num_threads(THREADS)
    folder.mkdir(parents=True, exist_ok=True)
    out = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    try:
        measured = [byte_moe(out, folder, min_time), mixtral(out, folder, min_time)]
    except SparseOnnxError as error:
        raise click.ClickException(str(error)) from error
    for model in measured:
        out.print(f"\n{summary(model)}")
    out.print(f"float32, {THREADS} threads, one run of each in every round; medians of the rounds' ratios.")


if __name__ == "__main__":
    main()

"""Every execution form of a layer against each other, against what `--tune` takes, and against the peers.

One layer of each shape, in float32, float16, int8 and int4: every form as a file of its own, the form that tuning takes
at each token count, every peer that is installed, and for one token the reading of the active weights. All of them run
once in every round of one process. Nothing is timed whose answers are further from PyTorch's float32 than its precision
explains.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparse_onnx.bench.tables import markdown, number
from sparse_onnx.core.errors import VerificationError
from sparse_onnx.core.report import BenchModel, BenchRow

if TYPE_CHECKING:
    import numpy as np

    from sparse_onnx.bench.layers import SparseLayers
    from sparse_onnx.bench.measure import Contestant

Precision = Literal["float32", "float16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8", "int4")
LIMIT = "read active weights once"
TUNED = "tuned"

#: Largest relative error of a token that float16 explains; the other precisions' bounds are those of the peers.
_HALF_BOUND = 2e-2
#: That of the one form whose kernel rounds all activations of an expert by one scale: 0.048 and 0.054 were measured.
_DYNAMIC, _DYNAMIC_BOUND = "product=dynamic", 0.1

#: Inputs, and rounds at least: at a thousand tokens a round of everybody takes seconds.
_INPUTS, _FEWEST = 4, 5
#: A form that copies more than this is not run at that token count.
_LARGEST_COPY = 3e9
_BITS: dict[str, float] = {"float32": 32, "float16": 32, "int8": 8, "int4": 4}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer of Qwen3-MoE's kind."""

    experts: int
    top_k: int
    inner: int
    hidden: int = 1024

    @property
    def name(self) -> str:
        return f"{self.experts} experts, top-{self.top_k}, inner {self.inner}, hidden {self.hidden}"

    def build(self) -> SparseLayers:
        from sparse_onnx.bench.layers import qwen3_layers

        return qwen3_layers(
            hidden=self.hidden, experts=self.experts, top_k=self.top_k, inner=self.inner, layers=1
        )


SHAPES = (Shape(8, 2, 2816), Shape(32, 4, 1408), Shape(64, 8, 768), Shape(128, 8, 768))


@dataclasses.dataclass(frozen=True)
class Result:
    """One shape in one precision. `ratio_to_first` of each row is to the form that tuning took at that token count,
    `chosen`; `errors` are relative to PyTorch in float32."""

    case: str
    precision: str
    chosen: dict[int, str]
    rows: list[BenchRow]
    models: list[BenchModel]
    errors: dict[str, float]
    left_out: dict[str, str]


def run_case(
    shape: Shape,
    precision: Precision,
    tokens: Sequence[int],
    threads: int,
    folder: Path,
    *,
    rounds: int | None = None,
    min_time: float = 1.0,
    peers: bool = True,
) -> Result:
    """Builds, checks and times everything for one shape in one precision; files go to `folder`.

    Raises:
        VerificationError: one of our forms gives wrong answers. A peer that does is left out.
    """
    import numpy as np
    import torch

    from sparse_onnx.bench import contestants, memory
    from sparse_onnx.bench.measure import interleave, rows
    from sparse_onnx.bench.peers import largest_error

    torch.set_num_threads(threads)
    layers = shape.build()
    neutral = exported = export_layers(layers, precision, folder)
    if precision in ("int8", "int4"):
        neutral = quantized(exported, precision, folder)
    files, left_out = write_forms(neutral, precision, folder)
    costs = [
        dataclasses.replace(memory.measure(path, threads, (1, 64)), model=name)
        for name, path in files.items()
    ]
    sessions = {name: contestants.create(path, threads) for name, path in files.items()}
    rivals = _Rivals(layers, precision, folder, threads, exported) if peers else None
    chosen = tuned_forms(neutral, tokens, threads, folder)
    errors: dict[str, float] = {}
    measured: list[BenchRow] = []
    dtype = np.float16 if precision == "float16" else np.float32
    for count in tokens:
        inputs = [
            np.random.default_rng(seed).standard_normal((count, shape.hidden), dtype=np.float32).astype(dtype)
            for seed in range(_INPUTS)
        ]
        feeds = [{"hidden_states": array} for array in inputs]
        expected = _expected(layers, inputs[0])
        runs = []
        for name, session in sessions.items():
            if name.startswith("gathered") and _copied(shape, count) > _LARGEST_COPY:
                continue
            runs.append(contestants.onnx(name, session, feeds))
            answer = np.asarray(runs[-1].run(0)).astype(np.float32)
            error = largest_error(inputs[0].astype(np.float32), expected, answer)
            errors[name] = max(errors.get(name, 0.0), error)
            if error > _bound(precision, name):
                raise VerificationError(f"off by {error:.2g} at {count} tokens", where=name)
        if rivals is not None:
            runs += rivals.on(feeds, count, left_out)
        if count == 1:
            runs.append(limit(layers, inputs, precision, threads))
        runs.sort(key=lambda run: run.name != chosen[count])
        times = interleave(runs, _INPUTS, rounds=rounds, min_time=min_time, fewest=_FEWEST)
        measured += rows([run.name for run in runs], count, times)
    if rivals is not None:
        rivals.close()
    return Result(shape.name, precision, chosen, measured, costs, errors, left_out)


def export_layers(layers: SparseLayers, precision: Precision, folder: Path) -> Path:
    """The layers in neutral form, in float16 where that is asked for."""
    import torch

    from sparse_onnx.export.api import export

    path = folder / "neutral.onnx"
    sample = {"hidden_states": torch.randn(7, layers.config.hidden_size)}
    model = layers
    if precision == "float16":
        model = _half(layers)
        sample = {name: value.half() for name, value in sample.items()}
    export((model, sample, {"hidden_states": {0: "tokens"}}), path)
    return path


def write_forms(neutral: Path, precision: Precision, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """A file of each candidate form of the CPU target, and why a form has none."""
    from sparse_onnx import targets
    from sparse_onnx.optimize.api import optimize

    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    bits = str(int(_BITS[precision]) % 32)
    for index, form in enumerate(targets.get("cpu").candidates[bits]):
        path = folder / f"form{index}.onnx"
        report = optimize(neutral, path, form=form, verify="none")
        if (report.blocks[0].form or "").partition(":")[0] == form.partition(":")[0]:
            files[form] = path
        else:
            left_out[form] = next((item.reason for item in report.refusals), "refused")
    return files, left_out


def quantized(neutral: Path, precision: Literal["int8", "int4"], folder: Path) -> Path:
    """The layers in neutral form with quantized experts: every form starts from the same weights."""
    from sparse_onnx.optimize.api import optimize
    from sparse_onnx.passes import PIPELINE

    path = folder / "quantized.onnx"
    lowerings = [step.name for step in PIPELINE if step.forms]
    optimize(neutral, path, quantize=precision, skip=lowerings, verify="none")
    return path


def tuned_forms(neutral: Path, tokens: Sequence[int], threads: int, folder: Path) -> dict[int, str]:
    """The form that `--tune` measures as the fastest at each token count."""
    from sparse_onnx.optimize.api import optimize

    report = optimize(
        neutral,
        folder / "tuned.onnx",
        tune=True,
        tokens=tokens,
        threads=threads,
        verify="none",
        dry_run=True,
    )
    assert report.tuning is not None
    found = {}
    for count in tokens:
        rows = [row for row in report.tuning.rows if row.tokens == count]
        found[count] = min(rows, key=lambda row: row.ratio_to_default).form
    return found


class _Rivals:
    """The peers of a precision; there are none in float16."""

    def __init__(
        self, layers: SparseLayers, precision: Precision, folder: Path, threads: int, neutral: Path
    ) -> None:
        from sparse_onnx.bench.peers import Peers
        from sparse_onnx.optimize.api import optimize

        self.peers = None
        if precision != "float16":
            ours = folder / "ours.onnx"
            optimize(neutral, ours, form="grouped", verify="none")
            self.peers = Peers(layers, precision, folder, threads, ours=ours)

    def on(
        self, feeds: Sequence[Mapping[str, np.ndarray]], tokens: int, left_out: dict[str, str]
    ) -> list[Contestant]:
        if self.peers is None:
            return []
        found, reasons = self.peers.on(feeds)
        for name, reason in reasons.items():
            left_out.setdefault(name, f"{reason} ({tokens} tokens)")
        return found

    def close(self) -> None:
        if self.peers is not None:
            self.peers.close()
        gc.collect()


def limit(
    layers: SparseLayers, inputs: Sequence[np.ndarray], precision: Precision, threads: int
) -> Contestant:
    """Reads, for each input, as many bytes as its active experts have in that precision, scales included."""
    import numpy as np

    from sparse_onnx.bench.contestants import SETTLE_S
    from sparse_onnx.bench.limits import read_limit
    from sparse_onnx.bench.measure import Contestant
    from sparse_onnx.bench.rivals import active_weights

    stored: dict[int, np.ndarray] = {}
    share = (
        _BITS[precision] + (1.0 if precision == "int4" else 0.0)
    ) / 32  # a float32 scale for 32 weights of 4 bits

    def bytes_of(view: np.ndarray) -> np.ndarray:
        """Memory of its own in the place of an expert's matrix, for all inputs the same."""
        key = view.__array_interface__["data"][0]
        if len(view) == layers.config.num_experts or share == 1:  # the router stays as it is
            return view
        if key not in stored:
            stored[key] = np.ones(max(1, int(view.size * share)), np.float32)
        return stored[key]

    needed = []
    for array in inputs:
        needed.append([bytes_of(view) for view in active_weights(layers, array.astype(np.float32))])
    _, read = read_limit([view for views in needed for view in views], threads)
    return Contestant(LIMIT, lambda index: read(needed[index]), SETTLE_S)


def _half(layers: SparseLayers) -> SparseLayers:
    import copy

    return copy.deepcopy(layers).half()


def _expected(layers: SparseLayers, x: np.ndarray) -> np.ndarray:
    import numpy as np
    import torch

    with torch.inference_mode():
        return layers(torch.from_numpy(x.astype(np.float32))).numpy()


def _bound(precision: Precision, form: str) -> float:
    from sparse_onnx.bench.peers import BOUNDS

    if _DYNAMIC in form:
        return _DYNAMIC_BOUND
    return _HALF_BOUND if precision == "float16" else BOUNDS[precision]


def _copied(shape: Shape, tokens: int) -> float:
    return 4.0 * tokens * shape.top_k * 2 * shape.inner * shape.hidden


def as_text(result: Result) -> str:
    """The table: times relative to the tuned form, which heads it."""
    counts = list(dict.fromkeys(row.tokens for row in result.rows))
    names = list(dict.fromkeys(row.model for row in result.rows))
    ratios = {(row.model, row.tokens): row.ratio_to_first for row in result.rows}
    costs = {model.model: model for model in result.models}
    forms = [name for name in names if name in costs]
    best = {count: min(ratios[name, count] for name in forms if (name, count) in ratios) for count in counts}
    lines = [
        ["tuned: " + ", ".join(dict.fromkeys(result.chosen.values())), *("1.00" for _ in counts), "", "", ""],
        ["best form", *(f"{best[count]:.2f}" for count in counts), "", "", ""],
    ]
    for name in [*forms, *(name for name in names if name not in costs)]:
        cost = costs.get(name, BenchModel(name, None, None))
        times = [number(ratios.get((name, count)), ".2f") for count in counts]
        error = number(result.errors.get(name), ".1e")
        lines.append([name, *times, error, number(cost.create_s, ".2f"), number(cost.rss_mb, ".0f")])
    columns = ["time relative to tuned, tokens:", *map(str, counts), "error", "create s", "resident MB"]
    footer = "".join(f"\n\nleft out: {name}: {reason}" for name, reason in result.left_out.items())
    return f"{result.case}, {result.precision}\n\n{markdown(columns, lines)}{footer}\n"

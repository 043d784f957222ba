"""Forms measured on this machine: each kind of block in each candidate form, on its real weights.

Every candidate is timed against the target's default form, the two in turn in one process: token counts that the user
cares about, several routings (balanced and skewed), and caches emptied before each run, since in a model the layers
between two runs of a block do that. The fastest by the geometric mean over the token counts is measured once more, in
new sessions on new inputs, and kept if it wins there too. A ratio is that of the least times of each input, averaged
over the inputs (geometric mean): a busy machine adds to times and never takes from them.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.bench import contestants
from sparse_onnx.bench.measure import Contestant, interleave
from sparse_onnx.blocks import neutral_blocks
from sparse_onnx.blocks.lowering import Form
from sparse_onnx.core.errors import SparseOnnxError
from sparse_onnx.core.report import TuningRecord, TuningRow
from sparse_onnx.kernels import is_built
from sparse_onnx.optimize.candidates import Alone, Kind, NotBuilt, build, kinds
from sparse_onnx.optimize.choose import stored_bits
from sparse_onnx.optimize.runner import Planned
from sparse_onnx.optimize.spread import Spread, spread
from sparse_onnx.targets import TargetProfile, machine

#: Inputs of a token count; every other one has a skewed routing.
_INPUTS = 4
_ROUNDS = 12
#: A form must beat the default by this much, twice: below it is noise.
_WORTH = 0.97
#: Of the cache that is emptied: caches of servers are shared, and a machine of one tenant has not all of it.
_MOST_CACHE = 512 << 20


#: Whatever the weights are stored as: with thresholds one operator has all experts of a layer, and gathers nothing.
_OF_ALL = Form("gathered")

#: Bytes that a form may make for one run: with more it is no candidate, and measuring it could end the process.
_LARGEST_WORK = 2 << 30


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One kind of block: times in ms by form and token count, those relative to the default form, and the choice."""

    kind: Kind
    chosen: Form
    median_ms: dict[str, dict[int, float]]
    ratios: dict[str, dict[int, float]]
    left_out: dict[str, str]


def measure(
    model: ir.Model,
    profile: TargetProfile,
    planned: Sequence[Planned],
    *,
    tokens: Sequence[int],
    threads: int,
    folder: Path,
    known: Callable[[Kind], Measurement | None] = lambda kind: None,
    progress: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """The fastest form of each kind of block.

    Args:
        model: in neutral form; unchanged.
        profile: names the candidates.
        planned: the pipeline with the user's options.
        tokens: token counts, all equally important.
        threads: of the sessions.
        folder: where files may go for a while: the weights of one block for each of two forms.
        known: a measurement to be used again; None measures.
        progress: called with a line at each step.
    """
    found = []
    for kind in kinds(model):
        old = known(kind)
        if old is None:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".tuning-") as name:
                place = Path(name)
                old = _Tuner(model, profile, planned, tuple(tokens), threads, place, progress).tune(kind)
        found.append(dataclasses.replace(old, kind=kind))
    return found


def record(
    measurements: Sequence[Measurement], tokens: Sequence[int], threads: int, source: str | None = None
) -> TuningRecord:
    """What the report says."""
    rows = [
        TuningRow(
            item.kind.names[0],
            len(item.kind.names),
            form,
            count,
            round(item.median_ms[form][count], 4),
            round(ratio, 3),
            form == str(item.chosen),
        )
        for item in measurements
        for form, by_count in item.ratios.items()
        for count, ratio in by_count.items()
    ]
    left_out = [
        f"{item.kind.names[0]}: {form}: {reason}"
        for item in measurements
        for form, reason in item.left_out.items()
    ]
    return TuningRecord(list(tokens), threads, machine.processor(), source, rows, left_out)


class _Tuner:
    def __init__(
        self,
        model: ir.Model,
        profile: TargetProfile,
        planned: Sequence[Planned],
        tokens: tuple[int, ...],
        threads: int,
        folder: Path,
        progress: Callable[[str], None] | None,
    ) -> None:
        self.model, self.profile, self.planned = model, profile, planned
        self.tokens, self.threads, self.folder, self.progress = tokens, threads, folder, progress
        self.cold = Eviction()
        self.spread: Spread | None = None

    def tune(self, kind: Kind) -> Measurement:
        block = next(each for each in neutral_blocks(self.model) if each.name == kind.names[0])
        self.spread = spread(block, self.planned)
        bits = str(stored_bits(block))
        candidates = [Form.parse(text) for text in self.profile.candidates.get(bits, ())]
        if "thresholds" in kind.facts and _OF_ALL.name in self.profile.form_names:
            candidates += [] if _OF_ALL in candidates else [_OF_ALL]
        default = Form.parse(self.profile.forms[0])
        left_out: dict[str, str] = {}
        base = self._build(kind, default, "default", left_out)
        times = _Times(str(default), self.tokens)
        if base is None:
            return Measurement(kind, default, {}, {}, left_out)
        for number, form in enumerate(form for form in candidates if form != default):
            work = max(working_bytes(kind, form, count) for count in self.tokens)
            if work > _LARGEST_WORK:
                left_out[str(form)] = f"would work on {work / 1e9:.1f} GB at {max(self.tokens)} tokens"
                continue
            self._say(f"measuring {form} for {kind.names[0]}")
            built = self._build(kind, form, f"c{number}", left_out)
            if built is None:
                continue
            try:
                times.add(str(form), self._race(kind, base, built, seed=0))
            except SparseOnnxError as error:
                left_out[str(form)] = error.message
            finally:
                shutil.rmtree(built.path.parent)
        best = min(times.ratios, key=times.score)
        chosen = Form.parse(best)
        if chosen != default:
            self._say(f"confirming {chosen} for {kind.names[0]}")
            built = self._build(kind, chosen, "confirmed", left_out)
            assert built is not None
            again = _Times(str(default), self.tokens)
            again.add(best, self._race(kind, base, built, seed=1000))
            shutil.rmtree(built.path.parent)
            if max(times.score(best), again.score(best)) > _WORTH:
                chosen = default
        shutil.rmtree(base.path.parent)
        return Measurement(kind, chosen, times.median_ms, times.ratios, left_out)

    def _say(self, line: str) -> None:
        if self.progress is not None:
            self.progress(line)

    def _build(self, kind: Kind, form: Form, stem: str, left_out: dict[str, str]) -> Alone | None:
        place = self.folder / stem
        place.mkdir()
        try:
            return build(self.model, kind.names[0], form, self.planned, place / "block.onnx")
        except (NotBuilt, SparseOnnxError) as error:
            shutil.rmtree(place)
            left_out[str(form)] = str(error)
            return None

    def _race(self, kind: Kind, first: Alone, second: Alone, seed: int) -> dict[int, Any]:
        """Seconds ``[rounds, 2]`` by token count."""
        kernels = "thresholds" in kind.facts and is_built()
        sessions = [contestants.create(each.path, self.threads, kernels) for each in (first, second)]
        results = {}
        for count in self.tokens:
            feeds = [
                draw_feeds(kind, count, first.row, seed + number, self.spread) for number in range(_INPUTS)
            ]
            runs = []
            for name, built, session in zip("ab", (first, second), sessions, strict=True):
                own = [dict(zip(built.inputs, arrays, strict=True)) for arrays in feeds]
                run = contestants.onnx(name, session, own).run
                runs.append(Contestant(name, run, prepare=self.cold))
            results[count] = interleave(runs, _INPUTS, rounds=_ROUNDS)
        return results


class _Times:
    """Of one kind of block: the default form at 1, every other one relative to it."""

    def __init__(self, default: str, tokens: Sequence[int]) -> None:
        self.default = default
        self.ratios: dict[str, dict[int, float]] = {default: dict.fromkeys(tokens, 1.0)}
        self.median_ms: dict[str, dict[int, float]] = {default: dict.fromkeys(tokens, math.nan)}

    def add(self, form: str, seconds: dict[int, Any]) -> None:
        ratios, medians = {}, {}
        for count, times in seconds.items():
            # The least time of each input: what else the machine does only ever adds to it.
            least = np.array(
                [times[number::_INPUTS].min(axis=0) for number in range(min(_INPUTS, len(times)))]
            )
            ratios[count] = float(np.exp(np.mean(np.log(least[:, 1] / least[:, 0]))))
            base, medians[count] = (float(value) for value in np.median(times, axis=0) * 1e3)
            known = self.median_ms[self.default][count]
            self.median_ms[self.default][count] = base if math.isnan(known) else min(base, known)
        self.ratios[form], self.median_ms[form] = ratios, medians

    def score(self, form: str) -> float:
        """Geometric mean over the token counts."""
        return math.exp(float(np.mean([math.log(ratio) for ratio in self.ratios[form].values()])))


class Eviction:
    """Reads as much memory as the caches hold."""

    def __init__(self) -> None:
        self.memory = np.ones(min(machine.cache_bytes(), _MOST_CACHE) // 8, np.int64)

    def __call__(self) -> None:
        self.memory.max()


def working_bytes(kind: Kind, form: Form, tokens: int) -> int:
    """Roughly what a run makes beside the tokens' own rows: copies of weights, or rows of every expert."""
    sizes = (kind.facts.get(name) for name in ("experts", "top_k", "hidden", "inner"))
    experts, top_k, hidden, inner = (size if isinstance(size, int) else 0 for size in sizes)
    if form.name == "gathered" and "thresholds" not in kind.facts:
        return 4 * tokens * top_k * 3 * inner * hidden
    if form.name == "dense":
        return 4 * tokens * experts * (3 * inner + hidden)
    return 0


def draw_feeds(
    kind: Kind, tokens: int, row: Sequence[int], seed: int, inputs: Spread | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, distinct experts of each token, and weights that add up to 1; odd seeds favour a few experts. Tokens are
    spread as `inputs` says, standard normal without."""
    rng = np.random.default_rng(seed)
    facts = kind.facts
    experts, top_k = (int(str(facts[name])) for name in ("experts", "top_k"))
    scores = rng.gumbel(size=(tokens, experts))
    if seed % 2:
        scores -= 1.2 * np.log(1 + rng.permutation(experts))  # popularity by Zipf's law
    chosen = min(top_k, experts)
    index = np.argsort(-scores, axis=1)[:, :chosen]
    index = np.concatenate([index, index[:, : top_k - chosen]], axis=1)
    weight = rng.dirichlet(np.ones(top_k), size=tokens)
    numpy_types = [ir.DataType[str(facts[name])].numpy() for name in ("dtype", "weight_dtype")]
    shape = (tokens, *row)
    x = (rng.standard_normal(shape) if inputs is None else inputs.draw(rng, shape)).astype(numpy_types[0])
    return x, index.astype(np.int64), weight.astype(numpy_types[1])

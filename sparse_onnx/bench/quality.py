"""`python -m sparse_onnx.bench.quality`: what lossy steps cost the zoo's trained language model.

Bits per byte of text that it was not trained on, of the model as it would be deployed: exported, optimized with the
step, verified, and run by ONNX Runtime. Needs torch.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_onnx.bench.tables import markdown

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

MODEL = "zoo:byte-moe"
THREADS = 2
#: Bytes of the training text that thresholds are calibrated on.
_CALIBRATED = 60_000


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to optimize the model: the options of its lossy passes, the form of its blocks, and what has layers skip
    inputs."""

    title: str
    passes: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    form: str = "grouped"
    skipping: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Quality:
    """`experts` are those that a byte is sent to in a layer, on average."""

    title: str
    bits_per_byte: float
    weight_bytes: int
    experts: float


def _stored(title: str, form: str = "grouped", **options: object) -> Variant:
    return Variant(title, {"quantize_experts": {name: str(value) for name, value in options.items()}}, form)


def _adapted(**options: float) -> Variant:
    title = ", ".join(f"{name} {value:g}" for name, value in options.items())
    return Variant(
        f"experts by {title}", {"adapt_top_k": {name: str(value) for name, value in options.items()}}
    )


def variants() -> list[Variant]:
    found = [
        Variant("float32"),
        _stored("int8 rows, activations float32", bits=8, activations="float"),
        _stored("int8 rows, activations int8", bits=8),
        _stored("int8 rows, DynamicQuantizeMatMul", "grouped:product=dynamic", bits=8),
        _stored("int8 blocks of 32, activations int8", bits=8, block=32),
    ]
    for symmetric in (True, False):
        for block in (32, 64, 128):
            for activations, name in (("float", "float32"), ("int8", "int8")):
                points = "" if symmetric else " with zero points"
                found.append(
                    _stored(
                        f"int4 blocks of {block}{points}, activations {name}",
                        bits=4,
                        block=block,
                        symmetric=symmetric,
                        activations=activations,
                    )
                )
    for share in (0.2, 0.3, 0.4, 0.5):
        for method in ("scap", "teal"):
            title = f"all linear layers: {share:.0%} of weights skipped, {method}"
            found.append(Variant(title, skipping={"sparsity": share, "method": method}))
    # With two experts a token, top_p = 1 - threshold is the same.
    return found + [_adapted(threshold=value) for value in (0.1, 0.2, 0.3, 0.4)]


def measure(
    exported: Path,
    folder: Path,
    wanted: list[Variant],
    text: bytes,
    progress: Callable[[str], None] | None = None,
) -> list[Quality]:
    """Optimizes the model in each way and runs it over the text.

    Raises:
        SparseOnnxError: a variant cannot be made, or differs from its neutral form.
    """
    from sparse_onnx.graph import io
    from sparse_onnx.models.quality import bits_per_byte
    from sparse_onnx.optimize import optimize
    from sparse_onnx.targets import session as sessions
    from sparse_onnx.verify.routing import observed, routers

    found = []
    for index, variant in enumerate(wanted):
        if progress is not None:
            progress(variant.title)
        path = folder / f"{index}.onnx"
        options = dict(variant.skipping)
        if options:
            options["thresholds"] = _calibrated(exported, folder)
        report = optimize(exported, path, form=variant.form, passes=variant.passes, **options)
        assert report.output is not None
        model = io.load(path)
        watch = routers(model)
        session = sessions.create_session(observed(model, watch), threads=THREADS)
        experts = {router.index: router.experts or 0 for router in watch}
        seen = _Seen(session, experts)
        bits = bits_per_byte(seen, text)
        found.append(Quality(variant.title, bits, report.output.weight_bytes, seen.experts))
    return found


def _calibrated(exported: Path, folder: Path) -> Path:
    """Statistics of the model on a part of what it was trained on, made once."""
    from sparse_onnx.calibrate import calibrate
    from sparse_onnx.models.corpus import training_text

    path, text = folder / "calib.json", folder / "training.txt"
    if not path.exists():
        text.write_bytes(training_text()[:_CALIBRATED])
        calibrate(exported, text, path)
    return path


class _Seen:
    """Logits of a model whose routing can be watched, and how many experts its tokens were sent to."""

    def __init__(self, session: onnxruntime.InferenceSession, routers: Mapping[str, int]) -> None:
        self._run = functools.partial(session.run, [session.get_outputs()[0].name, *routers])
        self._routers, self._slots, self._tokens = routers, 0, 0

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        logits, *chosen = self._run({"input_ids": ids})
        for index, experts in zip(chosen, self._routers.values(), strict=True):
            self._slots += int((index < experts).sum())
            self._tokens += len(index.reshape(-1, index.shape[-1]))
        return logits

    @property
    def experts(self) -> float:
        return self._slots / self._tokens


def table(rows: list[Quality]) -> str:
    """All rows against the first."""
    lines = [
        [
            row.title,
            f"{row.bits_per_byte:.4f}",
            f"{row.bits_per_byte / rows[0].bits_per_byte - 1:+.2%}",
            f"{row.weight_bytes / 1e6:.2f}",
            f"{row.experts:.2f}",
        ]
        for row in rows
    ]
    return markdown(["experts", "bits per byte", "change", "weights, MB", "experts a byte"], lines)


@click.command()
def main() -> None:
    """Bits per byte of the zoo's language model, quantized and with fewer experts."""
    from sparse_onnx.export import export
    from sparse_onnx.models.quality import held_out_text

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exported = folder / "exported.onnx"
        export(MODEL, exported)
        rows = measure(
            exported,
            folder,
            variants(),
            held_out_text(),
            functools.partial(click.echo, err=True),
        )
    click.echo(table(rows))


if __name__ == "__main__":
    main()

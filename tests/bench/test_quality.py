"""What lossy steps cost the zoo's model: the measurement itself, on little text."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from sparse_onnx.bench.quality import MODEL, Quality, measure, table, variants
from sparse_onnx.export import export
from sparse_onnx.models.quality import held_out_text


@pytest.mark.slow
def test_the_model_as_it_is_deployed(tmp_path: Path) -> None:
    exported = tmp_path / "exported.onnx"
    export(MODEL, exported)
    wanted = {variant.title: variant for variant in variants()}
    chosen = [
        wanted["float32"],
        wanted["int8 rows, DynamicQuantizeMatMul"],
        wanted["int4 blocks of 32 with zero points, activations int8"],
        wanted["experts by threshold 0.4"],
        wanted["all linear layers: 30% of weights skipped, scap"],
    ]
    told: list[str] = []
    plain, dynamic, four, fewer, skipping = measure(
        exported, tmp_path, chosen, held_out_text()[:4096], told.append
    )
    assert told == [variant.title for variant in chosen]
    assert 1 < plain.bits_per_byte < 3 and plain.experts == 2
    for row in (dynamic, four):
        assert row.bits_per_byte != plain.bits_per_byte
        assert row.bits_per_byte == pytest.approx(plain.bits_per_byte, rel=0.02) and row.experts == 2
    assert four.weight_bytes < dynamic.weight_bytes < plain.weight_bytes / 2
    assert skipping.bits_per_byte != plain.bits_per_byte
    assert skipping.bits_per_byte == pytest.approx(plain.bits_per_byte, rel=0.01)
    assert fewer.experts < 1.5 and plain.bits_per_byte < fewer.bits_per_byte < plain.bits_per_byte * 1.1


def test_rows_are_told_against_the_first() -> None:
    lines = table([Quality("a", 2.0, 8_000_000, 2.0), Quality("b", 2.01, 2_500_000, 1.5)]).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["b", "2.0100", "+0.50%", "2.50", "1.50"]


def test_every_variant_has_a_title_of_its_own() -> None:
    titles = [variant.title for variant in variants()]
    assert len(set(titles)) == len(titles) and titles[0] == "float32"

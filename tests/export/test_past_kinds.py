"""Caches that hold more than keys and values: of recurrent layers, of compressed blocks, of tokens and positions."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from generating import by_onnxruntime, by_torch  # noqa: E402

import sparse_onnx  # noqa: E402
from sparse_onnx.bench.coverage import registry, tiny  # noqa: E402
from sparse_onnx.core.errors import ImpossibleError  # noqa: E402
from sparse_onnx.export import past, patches, sources  # noqa: E402
from sparse_onnx.export.past import compressed, own_caches  # noqa: E402
from sparse_onnx.export.past.source import PastRun  # noqa: E402
from sparse_onnx.verify.compare import difference  # noqa: E402

#: Architecture -> what its layers keep beside keys and values.
KEPT = {
    "granitemoehybrid": {"0.conv_state", "0.recurrent_state"},
    "jamba": {"0.conv_state", "0.recurrent_state"},
    "minimax": {"1.recurrent_state"},
    "qwen4_exp_text": {
        "0.conv_state",
        "0.recurrent_state",
        "1.indexer_key",
        "1.indexer_position",
    },
}
COMPRESSOR = {"compressor_compressed", "compressor_buffer", "compressor_gate"}
OVERLAP = {"compressor_overlap", "compressor_overlap_gate"}
INDEXER = {name.replace("compressor", "indexer") for name in COMPRESSOR | OVERLAP}


def with_past(name: str, folder: Path) -> past.PastSource:
    found = {each.name: each for each in registry.architectures()}
    if name not in found:
        pytest.skip(f"this transformers has no {name}")
    written = tiny.write(found[name], folder / name)
    return past.with_past(sources.resolve(str(written), random_weights=True))


def stepped(
    source: past.PastSource, ids: torch.Tensor, mask: torch.Tensor, ends: list[int], **first: torch.Tensor
) -> torch.Tensor:
    """Logits of a text that goes through the exported function, in torch, in these pieces; `first` are inputs that do
    not begin as zeros."""
    fed = source.interface.draw({"batch": len(ids), "sequence": 1, "past_sequence": 0})
    fed, start, logits = {slot.past: fed[slot.past] for slot in source.slots}, 0, []
    fed |= first
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    decoder = source.decoder
    for end in ends:
        fed |= {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
        if decoder.takes_positions:
            fed["position_ids"] = positions[:, start:end]
        with torch.no_grad(), patches.replaced(source.module):
            results = source.flat(decoder, fed)
        fed = {slot.past: results[slot.present] for slot in source.slots}
        logits.append(results["logits"])
        start = end
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", [*KEPT, "deepseek_v4", "glm5_next"])
def test_pieces_of_a_text_say_what_all_of_it_says(name: str, tmp_path: Path) -> None:
    """Whatever the pieces are: several tokens after a past, fewer than a block and more."""
    source = with_past(name, tmp_path)
    ids = torch.randint(3, 150, (2, 27), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = source.module(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for ends in ([27], [1, 2, 3, 4, 5, 6, 27], [5, 12, 13, 27], [11, 12, 13, 14, 15, 27]):
        actual = stepped(source, ids, mask, ends)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [*KEPT, "deepseek_v4", "glm5_next", "unlimited_ocr"])
def test_the_exported_function_is_the_models(name: str, tmp_path: Path) -> None:
    """After pasts of any content, padded or not; logits and all that is kept."""
    source = with_past(name, tmp_path)
    plan = (
        (2, 5, 0, "random"),
        (2, 1, 9, "random"),
        (2, 7, 13, "padded"),
        (1, 11, 3, "random"),
        (2, 1, 25, "padded"),
    )
    for batch, new, before, kind in plan:
        sizes = {"batch": batch, "sequence": new, "past_sequence": before}
        run = source.interface.run(kind, source.interface.draw(sizes, kind, 3), sizes)
        expected = [value.numpy() for value in source.forward(run.inputs)]
        with torch.no_grad(), patches.replaced(source.module):
            actual = [value.numpy() for value in source.flat(source.decoder, run.inputs).values()]
        for at, (left, right) in enumerate(zip(expected, actual, strict=True)):
            keep = run.kept(at, left.shape)
            scale = float(np.abs(left).max(initial=1e-9))
            np.testing.assert_allclose(right[keep], left[keep], rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("name", KEPT)
def test_names_of_what_is_kept(name: str, tmp_path: Path) -> None:
    source = with_past(name, tmp_path)
    names = {slot.past.removeprefix("past_key_values.") for slot in source.slots}
    beside = {each for each in names if not each.endswith((".key", ".value"))}
    # Qwen4 keeps the last tokens, and what is embedded of them, beside its linear attention.
    assert {each for each in beside if not re.search(r"conv_state_[12]$", each)} == KEPT[name]


def test_names_of_compressed_keys(tmp_path: Path) -> None:
    """DeepSeek-V4: a key each token and one each block, what an unfinished block has left, and no values."""
    source = with_past("deepseek_v4", tmp_path)
    for layer, kind in enumerate(source.decoder.text.layer_types):
        kept = {slot.kind: slot for slot in source.slots if slot.layer == layer}
        wanted = {
            "heavily_compressed_attention": {"key"} | COMPRESSOR,
            "compressed_sparse_attention": {"key"} | COMPRESSOR | OVERLAP | INDEXER,
            "sliding_attention": {"key", "value"},
        }
        assert set(kept) == wanted[kind]
        if "compressor_compressed" in kept:
            rate = source.decoder.text.compress_rates[kind]
            slot = kept["compressor_compressed"]
            assert (
                slot.axes == {0: "batch", 1: f"past_blocks_{rate}"} and slot.total == f"total_blocks_{rate}"
            )
            assert kept["compressor_buffer"].shape[1] == rate - 1 and kept["compressor_buffer"].fixed
    sizes = source.interface.complete({"batch": 1, "sequence": 3, "past_sequence": 11})
    assert (sizes["past_blocks_4"], sizes["past_blocks_10"]) == (2, 1)
    traced = source.interface.complete(source.interface.traced_sizes())
    assert len(set(traced.values())) == len(traced) and min(traced.values()) > 1


def test_a_note_says_where_transformers_forgets(tmp_path: Path) -> None:
    """Jamba of transformers 5.24 begins anew with several tokens; where it does not any more, the note goes too."""
    source = with_past("jamba", tmp_path)
    decoder = source.decoder
    assert source.stepwise is not decoder.continues(source.slots)
    assert any("one token after another" in note for note in source.notes) is source.stepwise
    with patches.replaced(source.module):
        assert decoder.continues(source.slots)


def test_a_model_that_forgets_its_state_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no forward that goes on from it."""
    monkeypatch.delitem(patches.FORWARDS, "JambaMambaMixer")
    with pytest.raises(ImpossibleError, match="forgets its state where several tokens follow"):
        with_past("jamba", tmp_path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma4_text", {"use_bidirectional_attention": "all"}),
        ("step3p7", {"use_bidirectional_attention": True}),
    ],
)
def test_a_model_that_looks_ahead_is_refused(name: str, changes: dict[str, object], tmp_path: Path) -> None:
    """What it keeps of a token would change with each that follows."""
    found = next(each for each in registry.architectures() if each.name == name)
    config = tiny.tiny(name)
    for each, value in changes.items():
        setattr(config.get_text_config(decoder=True), each, value)
    config.architectures = [found.model_class]
    config.save_pretrained(tmp_path)
    with pytest.raises(ImpossibleError, match="sees later tokens too"):
        past.with_past(sources.resolve(str(tmp_path), random_weights=True))
    assert with_past(name, tmp_path / "causal").slots


def test_a_router_that_mixes_tokens_is_no_such_attention(tmp_path: Path) -> None:
    """Doge's takes scores of other tokens, later ones too; what its cache holds stays."""
    assert with_past("doge", tmp_path).slots


def test_minimax_whose_first_layer_is_linear(tmp_path: Path) -> None:
    """As MiniMax-Text-01 is. transformers' own cache takes its past for empty then."""
    found = {each.name: each for each in registry.architectures()}["minimax"]
    config = transformers.AutoConfig.from_pretrained(tiny.write(found, tmp_path / "config"))
    config.layer_types = ["linear_attention", "full_attention"]
    config.save_pretrained(tmp_path / "config")
    source = past.with_past(sources.resolve(str(tmp_path / "config"), random_weights=True))
    assert [slot.past for slot in source.slots] == [
        "past_key_values.0.recurrent_state",
        "past_key_values.1.key",
        "past_key_values.1.value",
    ]
    assert source.decoder.gives_cache
    ids = torch.randint(3, 150, (2, 19), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = source.module(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    actual = stepped(source, ids, mask, [6, 7, 8, 19])
    torch.testing.assert_close(actual[mask == 1], expected.logits[mask == 1], rtol=0, atol=1e-4)
    empty = source.decoder.empty()
    assert own_caches.maker(type(source.module), config)[1] and empty.get_seq_length() == 0


def test_a_window_that_spares_the_prompt(tmp_path: Path) -> None:
    """UnlimitedOCR: the prompt is what comes first, or as long as is said where it comes in pieces."""
    source = with_past("unlimited_ocr", tmp_path)
    name = "past_key_values.0.reference_length"
    assert [slot.past for slot in source.slots if slot.fixed] == [name]
    module = source.module
    prompt = torch.randint(3, 150, (2, 7), generator=torch.Generator().manual_seed(5))
    module.generation_config = transformers.GenerationConfig(do_sample=False, max_new_tokens=24)
    with torch.no_grad():
        generated = module.generate(
            prompt, attention_mask=torch.ones_like(prompt), output_logits=True, return_dict_in_generate=True
        )
    assert generated.sequences.shape[1] - 7 > source.decoder.text.sliding_window
    text, mask = generated.sequences[:, :-1], torch.ones_like(generated.sequences[:, :-1])
    expected = torch.stack(generated.logits, dim=1)
    rest = list(range(8, text.shape[1] + 1))
    for actual in (
        stepped(source, text, mask, [7, *rest]),
        stepped(source, text, mask, [2, 7, *rest], **{name: torch.tensor([7, 7])}),
        stepped(source, text, mask, [7, 12, text.shape[1]]),
    ):
        torch.testing.assert_close(actual[:, 6:], expected, rtol=0, atol=1e-4)
    forgotten = stepped(source, text, mask, [2, 7, *rest])
    assert float((forgotten[:, -1] - expected[:, -1]).abs().max()) > 1e-3


def test_the_newest_keys_of_a_window_are_kept_for_comparison(tmp_path: Path) -> None:
    """DeepSeek-V4's window drops them; what is compared is all of them."""
    source = with_past("deepseek_v4", tmp_path)
    run = source.interface.draw({"batch": 1, "sequence": 20, "past_sequence": 6})
    results = dict(zip((slot.present for slot in source.slots), source.forward(run)[1:], strict=True))
    assert results["present.0.key"].shape[2] == 26 > source.decoder.text.sliding_window
    layer = source.decoder.empty().layers[0]
    kind = type(layer)
    assert isinstance(compressed.recording(layer), kind) and type(source.decoder.empty().layers[0]) is kind


@pytest.mark.parametrize("name", ["granitemoehybrid", pytest.param("deepseek_v4", marks=pytest.mark.slow)])
def test_it_generates_what_torch_generates(name: str, tmp_path: Path) -> None:
    source = with_past(name, tmp_path)
    module = source.module
    module.generation_config = transformers.GenerationConfig(pad_token_id=0)
    module.save_pretrained(tmp_path / "model")
    path = tmp_path / "model.onnx"
    report = sparse_onnx.export(tmp_path / "model", path, past=True)
    assert report.verify is not None and report.verify.max_rel_error is not None
    assert report.verify.max_rel_error < 1e-5
    prompts = [[11, 90, 3, 40, 2, 77, 31, 8, 1]]
    assert by_onnxruntime(path, prompts, 32) == by_torch(module, prompts, 32)
    names = {value.name for value in onnxruntime.InferenceSession(str(path)).get_inputs()}
    assert {slot.past for slot in source.slots} < names


def test_padding_is_no_part_of_a_state() -> None:
    """Whose width may be the length of the text."""
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    run = PastRun("run", {"attention_mask": mask}, {}, ("attention_mask",), states=frozenset({2}))
    assert run.kept(1, (2, 3, 4, 5)).shape == (2, 3, 4) and not run.kept(1, (2, 3, 4, 5))[0, 0, 0]
    state = np.zeros((2, 3, 4, 4), np.float32)
    keep = run.kept(2, state.shape)
    assert keep.all() and run.rows(2, state)[keep].shape == (2, 3, 16)


def test_a_wrong_head_of_a_state_is_seen(tmp_path: Path) -> None:
    """States are compared a head at a time: one that is off shows beside another a thousand times as large."""
    source = with_past("minimax", tmp_path)
    at = next(i for i, slot in enumerate(source.slots, start=1) if slot.kind == "recurrent_state")
    sizes = {"batch": 2, "sequence": 3, "past_sequence": 4}
    run = source.interface.run("any", source.interface.draw(sizes), sizes)
    state = np.ones((2, 3, 4, 5), np.float32)
    state[:, 0] *= 1000
    assert run.rows(at, state).shape == (2, 3, 20) and run.rows(0, state) is state
    wrong = state.copy()
    wrong[0, 1, 2, 3] += 0.01
    assert not difference(run.rows(at, state), run.rows(at, wrong), 1e-4).within

"""Every peer gives torch's answers on layers small enough for a test; what is absent, broken or wrong is left out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sparse_onnx.bench import layers, measure, peers  # noqa: E402
from sparse_onnx.bench.contestants import Feeds  # noqa: E402
from sparse_onnx.bench.measure import Contestant  # noqa: E402
from sparse_onnx.bench.peers.base import Setting  # noqa: E402
from sparse_onnx.core.errors import ImpossibleError  # noqa: E402

HIDDEN, INNER, EXPERTS, TOP_K = 256, 512, 8, 4
GGML = {"float32": (peers.GGML_F32,), "int8": (peers.GGML_Q8_0,), "int4": (peers.GGML_Q4_0, peers.GGML_Q4_K)}
NEEDS = {"openvino": "openvino", "nncf": "nncf", "llama_cpp": "llama-cpp-python"}


def needs(*modules: str) -> pytest.MarkDecorator:
    absent = [NEEDS[module] for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def build(count: int = 1, **sizes: int) -> layers.SparseLayers:
    taken = {"hidden": HIDDEN, "inner": INNER, "experts": EXPERTS, "top_k": TOP_K, **sizes}
    return layers.qwen3_layers(layers=count, **taken)


@pytest.fixture(scope="module")
def built() -> layers.SparseLayers:
    return build()


@pytest.fixture(scope="module")
def ours(built: layers.SparseLayers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Setting(built, "float32", tmp_path_factory.mktemp("ours"), 1).optimized()


def feeds_of(tokens: int, hidden: int = HIDDEN) -> list[Feeds]:
    random = [np.random.default_rng(seed) for seed in range(2)]
    return [{"hidden_states": each.standard_normal((tokens, hidden), dtype=np.float32)} for each in random]


def errors(
    model: layers.SparseLayers, found: Sequence[Contestant], feeds: Sequence[Feeds]
) -> dict[str, float]:
    """The worst relative error of each contestant over all feeds."""
    worst: dict[str, float] = {}
    for index, feed in enumerate(feeds):
        x = feed["hidden_states"]
        expected = model(torch.from_numpy(x)).numpy()
        for contestant in found:
            error = peers.largest_error(x, expected, np.asarray(contestant.run(index)))
            worst[contestant.name] = max(worst.get(contestant.name, 0.0), error)
    return worst


def run_all(
    model: layers.SparseLayers,
    precision: Any,
    folder: Path,
    only: Sequence[str],
    tokens: Sequence[int] = (1, 9),
    ours: Path | None = None,
) -> dict[str, float]:
    """Makes the peers, asserts that none is left out, and gives their worst errors."""
    worst: dict[str, float] = {}
    with peers.Peers(model, precision, folder, 1, ours=ours, only=only) as made:
        for count in tokens:
            feeds = feeds_of(count, model.config.hidden_size)
            found, left_out = made.on(feeds)
            assert not left_out
            assert [contestant.name for contestant in found] == list(only)
            for name, error in errors(model, found, feeds).items():
                worst[name] = max(worst.get(name, 0.0), error)
    return worst


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_operators_exports_and_torch(count: int, tmp_path: Path) -> None:
    only = (peers.MOE, peers.TRANSFORMERS, peers.MOBIUS, peers.EAGER, peers.GROUPED)
    worst = run_all(build(count), "float32", tmp_path, only)
    assert max(worst.values()) < 1e-5


@pytest.mark.slow
def test_compiled_torch(built: layers.SparseLayers, tmp_path: Path) -> None:
    only = (peers.COMPILED, peers.COMPILED_BATCHED)
    assert max(run_all(built, "float32", tmp_path, only).values()) < 1e-5


def test_compiled_gathering_is_left_out_where_it_does_not_fit(
    built: layers.SparseLayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_onnx.bench.peers.torch.FITS", 4.0 * TOP_K * 2 * INNER * HIDDEN - 1)
    with peers.Peers(built, "float32", tmp_path, 1, only=[peers.COMPILED_BATCHED]) as made:
        found, left_out = made.on(feeds_of(1))
    assert not found
    assert "GB of weights" in left_out[peers.COMPILED_BATCHED]


@needs("openvino")
def test_openvino(built: layers.SparseLayers, tmp_path: Path) -> None:
    worst = run_all(built, "float32", tmp_path, (peers.OPENVINO, peers.OPENVINO_OURS))
    assert max(worst.values()) < 1e-4


@needs("openvino", "nncf")
@pytest.mark.parametrize(("precision", "least", "most"), [("int8", 1e-3, 0.05), ("int4", 0.05, 0.3)])
def test_openvino_compressed(
    built: layers.SparseLayers, ours: Path, precision: str, least: float, most: float, tmp_path: Path
) -> None:
    worst = run_all(built, precision, tmp_path, [peers.OPENVINO_OURS], ours=ours)
    assert least < worst[peers.OPENVINO_OURS] < most, "compressed, and no more than that"


@needs("openvino", "nncf")
def test_compression_leaves_the_router_and_nothing_else(ours: Path) -> None:
    import openvino

    from sparse_onnx.bench.peers.openvino import compress

    model = openvino.Core().read_model(ours)
    router = {HIDDEN, EXPERTS}
    compressed = [
        op for op in compress(model, 4, (HIDDEN, EXPERTS)).get_ops() if op.get_type_name() == "Constant"
    ]
    sizes = dict.fromkeys(("i4", "f32"), 0)
    for op in compressed:
        kind, shape = op.get_element_type().get_type_name(), list(op.get_shape())
        sizes[kind] = sizes.get(kind, 0) + int(np.prod(shape))
        assert kind != "f32" or set(shape) == router or np.prod(shape) < HIDDEN * EXPERTS, shape
    assert sizes["i4"] == EXPERTS * 3 * HIDDEN * INNER
    assert sizes["f32"] >= HIDDEN * EXPERTS


@needs("openvino", "nncf")
def test_a_graph_without_weights_to_compress_is_refused(tmp_path: Path) -> None:
    import openvino

    from sparse_onnx.bench.peers.openvino import compress

    rows, result = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["tokens", size])
        for name, size in (("x", HIDDEN), ("y", EXPERTS))
    )
    weight = onnx.numpy_helper.from_array(np.ones((HIDDEN, EXPERTS), np.float32), "router")
    node = onnx.helper.make_node("MatMul", ["x", "router"], ["y"])
    graph = onnx.helper.make_graph([node], "router", [rows], [result], [weight])
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "router.onnx")
    with pytest.raises(ImpossibleError, match="no weights to compress"):
        compress(openvino.Core().read_model(tmp_path / "router.onnx"), 4, (HIDDEN, EXPERTS))


@needs("llama_cpp")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("top_k", [1, TOP_K])
def test_ggml(count: int, top_k: int, tmp_path: Path) -> None:
    worst = run_all(build(count, top_k=top_k), "float32", tmp_path, GGML["float32"], tokens=(1, 9, 70))
    assert max(worst.values()) < 1e-5


@needs("llama_cpp")
@pytest.mark.parametrize(("precision", "least", "most"), [("int8", 1e-3, 0.03), ("int4", 0.05, 0.25)])
def test_ggml_quantized(
    built: layers.SparseLayers, precision: str, least: float, most: float, tmp_path: Path
) -> None:
    worst = run_all(built, precision, tmp_path, GGML[precision], tokens=(1, 9, 70))
    assert all(least < error < most for error in worst.values()), worst


@needs("llama_cpp")
def test_ggml_reads_float_weights_in_place(tmp_path: Path) -> None:
    model = build()
    with peers.Peers(model, "float32", tmp_path, 1, only=GGML["float32"]) as made:
        feeds = feeds_of(3)
        (contestant,), _ = made.on(feeds)
        model.parts[0].experts.down_proj.zero_()
        np.testing.assert_array_equal(np.asarray(contestant.run(0)), feeds[0]["hidden_states"])


@needs("llama_cpp")
def test_ggml_takes_other_blocks_or_refuses(tmp_path: Path) -> None:
    short_rows = build(hidden=64, inner=32)  # Q4_K has blocks of 256, Q5_0 of 32
    worst = run_all(short_rows, "int4", tmp_path, [peers.GGML_Q4_K])
    assert 1e-2 < worst[peers.GGML_Q4_K] < 0.2
    with peers.Peers(build(hidden=48, inner=32), "int4", tmp_path, 1, only=GGML["int4"]) as made:
        _, left_out = made.on(feeds_of(1, 48))
    assert set(left_out) == set(GGML["int4"])
    assert all("whole blocks of 32" in reason for reason in left_out.values())


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.03), ("int4", 0.25)])
def test_qmoe(built: layers.SparseLayers, precision: str, most: float, tmp_path: Path) -> None:
    worst = run_all(built, precision, tmp_path, [peers.QMOE], tokens=(1, 9, 70))
    assert 1e-3 < worst[peers.QMOE] < most


def test_contestants_are_timed_together(built: layers.SparseLayers, tmp_path: Path) -> None:
    only = [peers.MOE, peers.GROUPED]
    with peers.Peers(built, "float32", tmp_path, 1, only=only) as made:
        feeds = feeds_of(3)
        found, _ = made.on(feeds)
        assert measure.interleave(found, len(feeds), rounds=2).shape == (2, 2)
    assert torch.get_num_threads() == 1


class Fake:
    """A peer whose answer is made from the right one."""

    def __init__(
        self, name: str, setting: Setting, change: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> None:
        self.name, self.layers, self.change, self.closed = name, setting.layers, change, False

    def on(self, feeds: Sequence[Feeds]) -> Contestant:
        def run(index: int) -> np.ndarray:
            x = feeds[index]["hidden_states"]
            return self.change(x, self.layers(torch.from_numpy(x)).numpy())

        return Contestant(self.name, run)

    def close(self) -> None:
        self.closed = True


def test_wrong_and_broken_peers_are_left_out_with_the_reason(
    built: layers.SparseLayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Fake] = []

    def broken(*_: object) -> np.ndarray:
        raise RuntimeError("out of luck\nand pages of advice")

    def entry(name: str, change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Any:
        def make(name: str, setting: Setting) -> Fake:
            made.append(Fake(name, setting, change))
            return made[-1]

        return peers._Entry(name, make)

    def unloadable(name: str, setting: Setting) -> Fake:
        raise ImpossibleError("no such kernel", "try another")

    entries = (
        entry("right", lambda x, y: y),
        entry("without experts", lambda x, y: x),
        entry("not finite", lambda x, y: np.where(y > 0, y, np.nan)),
        entry("another shape", lambda x, y: y[:1]),
        entry("broken", broken),
        peers._Entry("unloadable", unloadable),
    )
    monkeypatch.setattr(peers, "_PEERS", {"float32": entries})
    with peers.Peers(built, "float32", tmp_path, 1) as all_of_them:
        found, left_out = all_of_them.on(feeds_of(4))
    assert [contestant.name for contestant in found] == ["right"]
    assert left_out == {
        "without experts": "wrong answers: relative error 1 > 0.001",
        "not finite": "wrong answers: relative error inf > 0.001",
        "another shape": "wrong answers: relative error inf > 0.001",
        "broken": "RuntimeError: out of luck",
        "unloadable": "no such kernel (try another)",
    }
    assert len(made) == 5 and all(peer.closed for peer in made)


def test_what_is_not_installed_is_left_out(
    built: layers.SparseLayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_onnx.bench.peers import ggml_library

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in NEEDS else find(name))
    ggml_library.library.cache_clear()
    for precision, packages in (("float32", ("openvino",)), ("int8", ("openvino",)), ("int4", ("openvino",))):
        optional = [peers.OPENVINO_OURS, *GGML[precision]]
        with peers.Peers(built, precision, tmp_path, 1, only=optional) as made:  # type: ignore[arg-type]
            found, left_out = made.on(feeds_of(1))
        assert not found
        assert left_out[peers.OPENVINO_OURS] == f"not installed (pip install {packages[0]})"
        for name in GGML[precision]:
            assert left_out[name] == "not installed (pip install llama-cpp-python)"
    assert not list(tmp_path.iterdir()), "no graph is written for a runtime that is not there"


def test_peers_without_quantized_experts_say_so(built: layers.SparseLayers, tmp_path: Path) -> None:
    with peers.Peers(built, "int4", tmp_path, 1, only=[peers.TRANSFORMERS, peers.EAGER]) as made:
        found, left_out = made.on(feeds_of(1))
    assert not found
    assert set(left_out) == {peers.TRANSFORMERS, peers.EAGER}


def test_copies_share_weights_and_leave_the_original_alone(tmp_path: Path) -> None:
    model = build()
    before = model.config._experts_implementation
    other = Setting(model, "float32", tmp_path, 1).with_experts("eager")
    assert other.config._experts_implementation == "eager" != before
    assert model.config._experts_implementation == before
    assert all(a is b for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_the_error_is_of_the_worst_token_but_for_near_ties() -> None:
    x = np.zeros((250, 8), np.float32)
    expected = np.ones_like(x)
    actual = expected.copy()
    assert peers.largest_error(x, expected, actual) == 0
    actual[:2] = 3
    assert peers.largest_error(x, expected, actual) == 0
    actual[2] = 3
    assert peers.largest_error(x, expected, actual) == pytest.approx(2)
    assert peers.largest_error(x[:60], expected[:60], actual[:60]) == pytest.approx(2)
    assert peers.largest_error(x, expected, actual[:, :4]) == float("inf")
    actual[200, 3] = np.nan
    assert peers.largest_error(x, expected, actual) == float("inf")

"""The ways to skip inputs that `bench.thresholded.models` compares, as plans out of one calibration.

Our own rows skip the same share of each block and within it by error for bytes, with one centre for all layers, or
with the best of the four for each; `over all` is the latter by error for bytes over the whole model. Recipes are what
others published, with the thresholds of the same calibration:

    NNCF  docs of `nncf.sparsify_activations`   up and gate 30 %, down 50 %, around 0; encoders: q, k, v and up 20 %,
                                                down 30 %
    SCAP  arXiv 2412.07174, IntelLabs/SCAP      up and gate 35 %, down 55 %, or 30 and 70 %, around 0; GELU: down
                                                50 % around the mode
    TEAL  arXiv 2408.14690                      the same share for every block, within it greedy by error, around 0
    CATS  arXiv 2404.08763                      50 % of the smallest act(gate), for up and down together

TEAL takes the error of the block's result; here it is the sum of the errors of the block's layers. NNCF takes a moving
average of each batch's quantile, and SCAP a kernel density's peaks; here they are the calibration's quantile and mode.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from sparse_onnx.core.calibration import CENTRES, POINTS, SPARSITIES, Calibration, GatedRecord, SiteRecord
from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.sparsify.allocate import LEVELS, Curve, greedy
from sparse_onnx.sparsify.calibrated import METHODS, Allocation, Costs, make_plan
from sparse_onnx.sparsify.plan import Plan, SitePlan

Weights = Literal["float32", "int8", "int8-dynamic", "int4"]
WEIGHTS: tuple[Weights, ...] = ("float32", "int8", "int8-dynamic", "int4")
#: Of our own rows.
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
DENSE, BEST, OVER_ALL = "dense", "best", "over all"
#: Which sites a recipe means by a word, by what their names hold: of transformers' models and of the zoo's.
_ROLES = {
    "down": r"down|(?<!attention\.)output\.dense",
    "up": r"up|gate|intermediate",
    "query": r"q_proj|query|qkv",
    "out": r"o_proj|attention\.output",
}
_BLOCK = re.compile(r"(?:layers?|h|blocks)\.([0-9]+)\.")


@dataclasses.dataclass(frozen=True)
class Variant:
    """`share`: of the bytes of linear weights that our own rows and TEAL's are to skip, of the inputs of CATS's; `kind`
    is `dense`, a centre, `best` of them, `over all`, or a recipe. `shares` and `centre`: NNCF's and SCAP's."""

    weights: Weights
    kind: str
    share: float | None = None
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    centre: str = "zero"

    @property
    def key(self) -> str:
        parts = [f"{role} {share:.0%}" for role, share in self.shares.items()]
        if self.share is not None:
            parts.append(f"{self.share:.0%}")
        return " ".join([self.weights, self.kind, *parts])

    @property
    def is_recipe(self) -> bool:
        return self.kind not in (DENSE, BEST, OVER_ALL, *CENTRES)


def variants(encoder: bool, bases: Sequence[str]) -> list[Variant]:
    """All of them for a model, dense ones first. `bases` are the weights that it has; CATS's where it is a method."""
    found = [Variant(weights, DENSE) for weights in WEIGHTS if weights in bases]
    found += [Variant("float32", BEST, share) for share in SHARES]
    found += recipes(encoder)
    for weights in ("int8", "int4"):
        if weights in bases:
            found += [Variant(weights, BEST, share) for share in SHARES]
    return found + [Variant("float32", kind, share) for share in SHARES for kind in (*CENTRES, OVER_ALL)]


def recipes(encoder: bool) -> list[Variant]:
    if encoder:
        return [
            Variant("float32", "NNCF", shares={"query": 0.2, "up": 0.2, "down": 0.3}),
            Variant("float32", "SCAP", shares={"down": 0.5}, centre="mode"),
            *(Variant("float32", "TEAL", share) for share in (0.25, 0.4, 0.5)),
        ]
    return [
        Variant("float32", "NNCF", shares={"up": 0.3, "down": 0.5}),
        Variant("float32", "SCAP", shares={"up": 0.35, "down": 0.55}),
        Variant("float32", "SCAP", shares={"up": 0.3, "down": 0.7}),
        *(Variant("float32", "TEAL", share) for share in (0.25, 0.4, 0.5)),
        *(Variant("float32", "CATS", 0.5) for _ in range("cats" in METHODS)),
    ]


def plan_of(variant: Variant, calibration: Calibration) -> Plan:
    """
    Raises:
        ImpossibleError: so much cannot be skipped, or no layer is what a recipe is about.
    """
    if variant.kind == "TEAL":
        assert variant.share is not None
        return _by_block(calibration, variant.share)
    if variant.kind == "CATS":
        level = round(100 * (variant.share or 0))
        return make_plan(calibration, level=level, method="cats", allocation="uniform")  # type: ignore[arg-type]
    if variant.shares:
        return _fixed(calibration, variant.shares, variant.centre)
    if variant.kind in CENTRES:
        calibration = only(calibration, variant.kind)
    allocation: Allocation = "greedy" if variant.kind == OVER_ALL else "blocks"
    return make_plan(calibration, sparsity=variant.share, allocation=allocation)


def only(calibration: Calibration, centre: str) -> Calibration:
    """The calibration with all other centres worse by far, so that no layer gets them."""
    layers = []
    for site in calibration.layers:
        worse = {
            name: tuple(value + 1e3 * (at > 0) for at, value in enumerate(errors))
            for name, errors in site.errors.items()
            if name != centre
        }
        layers.append(dataclasses.replace(site, errors={**site.errors, **worse}))
    return dataclasses.replace(calibration, layers=tuple(layers))


def role(site: str) -> str:
    """What a site is in its block, by its name; nothing where that does not say."""
    return next((name for name, pattern in _ROLES.items() if re.search(pattern, site)), "")


def _fixed(calibration: Calibration, shares: Mapping[str, float], centre: str) -> Plan:
    """The same shares at every level but 0; sites that no share is named for stay dense, and no other."""
    plans = {}
    for site in calibration.layers:
        share = shares.get(role(site.name))
        if share is not None:
            plans[site.name] = _site(site, centre, np.where(np.arange(LEVELS) > 0, share, 0.0))
    if not plans:
        raise ImpossibleError(f"no layer is called {' or '.join(shares)}")
    return Plan(plans, 1, "native", False, 0.0)


def _by_block(calibration: Calibration, share: float) -> Plan:
    costs = Costs.of(calibration)
    blocks: dict[str, list[int]] = {}
    for at, site in enumerate(costs.sites):
        found = _BLOCK.search(site.name)
        if found is None:
            raise ImpossibleError(f"site '{site.name}' says of no block that it is part of it")
        blocks.setdefault(found[1], []).append(at)
    plans = {}
    for members in blocks.values():
        curves = [
            Curve(costs.reads[at], np.array(SPARSITIES), np.square(costs.sites[at].errors["zero"]))
            for at in members
        ]
        for at, path in zip(members, greedy(curves).T, strict=True):
            plans[costs.sites[at].name] = _site(costs.sites[at], "zero", path)
    return Plan(plans, round(100 * share), "native", False, 0.0)


def _site(site: SiteRecord | GatedRecord, centre: str, path: np.ndarray) -> SitePlan:
    value = np.atleast_1d(np.array(site.centre(centre), np.float32))
    quantiles = np.interp(path * (POINTS - 1), np.arange(POINTS), site.quantiles[centre])
    return SitePlan(site.name, value, np.where(path > 0, quantiles, -1.0), path, centre)

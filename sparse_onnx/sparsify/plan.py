"""What is to be done with each site of a model: its centre, and its threshold at every level."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from sparse_onnx.core.errors import UsageError
from sparse_onnx.sparsify.allocate import LEVELS

Mode = Literal["native", "gather", "simulate"]
MODES: tuple[Mode, ...] = ("native", "gather", "simulate")


@dataclasses.dataclass(frozen=True, eq=False)
class SitePlan:
    """
    Attributes:
        name: of the site, as `matching.sites` calls it.
        centre: ``[1]`` or ``[K]`` float32.
        table: ``[101]``: thresholds, -1 for nothing skipped; or of `top_k` how many inputs of a token are kept.
        sparsity: ``[101]``, the share of its inputs that calibration expects to be skipped.
        centring: how the centre was chosen, for reports.
    """

    name: str
    centre: np.ndarray
    table: np.ndarray
    sparsity: np.ndarray
    centring: str = "zero"

    def __post_init__(self) -> None:
        for what, array in (("table", self.table), ("sparsity", self.sparsity)):
            if array.shape != (LEVELS,) or not np.isfinite(array).all():
                raise ValueError(f"site '{self.name}': {what} is not {LEVELS} numbers")
        if self.centre.ndim != 1 or not np.isfinite(self.centre).all():
            raise ValueError(f"site '{self.name}': the centre is no vector of numbers")


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """
    Attributes:
        sites: by name.
        level: at which the model runs where its caller says nothing.
        mode: `native`: the thresholded operators; `gather`: standard operators on the rows that are kept;
            `simulate`: the inputs alone are changed, and nothing is faster.
        top_k: the tables count inputs instead of bounding them.
        least: sites that skip less than this share at `level` stay dense.
        gated: sites are gated feed-forward layers, as `matching.gated` calls them.
    """

    sites: Mapping[str, SitePlan] = dataclasses.field(default_factory=dict)
    level: int = 0
    mode: Mode = "native"
    top_k: bool = False
    least: float = 0.0
    gated: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.sites, str):
            raise ValueError("a plan comes from calibration")
        if self.mode not in MODES:
            raise UsageError(f"unknown mode '{self.mode}'", f"one of: {', '.join(MODES)}")
        if not 0 <= self.level < LEVELS:
            raise UsageError(f"level {self.level} is not from 0 to {LEVELS - 1}")

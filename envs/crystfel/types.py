"""Values of the tuning problem; units and shapes are documented here and nowhere else.

Shape letters: N frames, K tunables. A *frame* is an image of the detector; a *hit* is a frame with
enough peaks; an *indexed frame* is a hit in which at least one *crystal* (lattice) was found.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class TunableParameter:
    """One number that an agent may change; its bounds are hard."""

    name: str
    unit: str
    """Empty for a plain number."""
    low: float
    high: float
    step: float
    """Of one discrete change, in ``unit``."""
    is_integer: bool = False
    is_geometry: bool = False
    """An offset from the user's geometry file: the truth is nowhere in it."""

    def normalise(self, value: float) -> float:
        """Value to [0, 1]."""
        return (value - self.low) / (self.high - self.low)


TUNABLES: dict[str, TunableParameter] = {
    tunable.name: tunable
    for tunable in (
        TunableParameter(name="min_snr", unit="", low=3.0, high=12.0, step=0.5),
        TunableParameter(name="threshold_adu", unit="ADU", low=0.0, high=200.0, step=10.0),
        TunableParameter(name="min_pix_count", unit="px", low=1, high=8, step=1, is_integer=True),
        TunableParameter(name="min_peaks", unit="", low=0, high=100, step=5, is_integer=True),
        TunableParameter(
            name="clen_offset_percent", unit="%", low=-6.0, high=6.0, step=0.5, is_geometry=True
        ),
        TunableParameter(
            name="centre_x_offset_px", unit="px", low=-6.0, high=6.0, step=0.5, is_geometry=True
        ),
        TunableParameter(
            name="centre_y_offset_px", unit="px", low=-6.0, high=6.0, step=0.5, is_geometry=True
        ),
    )
}
"""Everything that may be tuned. The tolerance of the indexer never is: a wide one indexes junk."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What an indexer is told, in ``indexamajig``'s words; geometry relative to the ``.geom`` file.

    Integers stay integers: ``4.7`` peaks are refused, because indexamajig would read them as 4.
    """

    min_snr: float = 5.0
    """Peaks at least so many standard deviations above the background of their ring."""
    threshold_adu: float = 20.0
    """Pixels of a peak at least so bright, ADU."""
    min_pix_count: int = 2
    max_pix_count: int = 200
    local_bg_radius_px: int = 3
    min_res_px: int = 0
    max_res_px: int = 1200
    """Peaks between these radii only. Always passed on: CrystFEL 0.12 changed its default to 0."""
    min_peaks: int = 15
    """A frame is a hit with at least so many peaks."""
    clen_offset_percent: float = 0.0
    """Detector distance used = that of the geometry file x (1 + offset / 100)."""
    centre_x_offset_px: float = 0.0
    """Added to where the beam hits the detector, along x (CrystFEL's: ``corner_x - offset``)."""
    centre_y_offset_px: float = 0.0

    def __post_init__(self) -> None:
        """Coerces to the declared types and raises ParameterError with all problems."""
        if problems := list(_coerced(self)):
            raise ParameterError("; ".join(problems))

    def replace(self, **changes: float) -> Self:
        """The same with some values changed.

        Raises:
            ParameterError: an unknown name, or a value that is out of range.
        """
        for name in changes:
            if name not in _RANGES:
                raise ParameterError(
                    f"no parameter is called {name!r}; there are {', '.join(_RANGES)}"
                )
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, float]:
        """Name -> value."""
        return dataclasses.asdict(self)


class ParameterError(ValueError):
    """A parameter has a value that no indexer should be given."""


_RANGES: dict[str, tuple[float, float]] = {
    "min_snr": (0.1, 1000.0),
    "threshold_adu": (0.0, 1e6),
    "min_pix_count": (1, 1000),
    "max_pix_count": (1, 10_000),
    "local_bg_radius_px": (1, 50),
    "min_res_px": (0, 20_000),
    "max_res_px": (1, 20_000),
    "min_peaks": (0, 10_000),
    "clen_offset_percent": (-50.0, 50.0),
    "centre_x_offset_px": (-500.0, 500.0),
    "centre_y_offset_px": (-500.0, 500.0),
}
_INTEGERS = frozenset(
    (
        "min_pix_count",
        "max_pix_count",
        "local_bg_radius_px",
        "min_res_px",
        "max_res_px",
        "min_peaks",
    )
)


def _coerced(parameters: Parameters) -> Any:
    for name, (low, high) in _RANGES.items():
        raw = getattr(parameters, name)
        try:
            value = float(raw)
        except (TypeError, ValueError):
            yield f"{name} is {raw!r}, and must be a number"
            continue
        if not low <= value <= high:  # NaN as well
            yield f"{name} is {raw!r}, outside {low:g} to {high:g}"
        elif name in _INTEGERS and value != int(value):
            yield f"{name} is {raw!r}, and must be a whole number"
        else:
            object.__setattr__(parameters, name, int(value) if name in _INTEGERS else value)
    if not parameters.min_res_px < parameters.max_res_px:
        yield (
            f"min_res_px is {parameters.min_res_px!r}, not below "
            f"max_res_px {parameters.max_res_px!r}"
        )


@dataclass(frozen=True, kw_only=True, order=True)
class Frame:
    """One image: a line of a CrystFEL list file."""

    path: str
    """HDF5 file; relative paths are relative to the list file's folder and resolved on reading."""
    event: str = ""
    """CrystFEL's event, e.g. ``//3`` for the fourth image of the file; empty = the file's only."""

    def __str__(self) -> str:
        """As the list file has it."""
        return f"{self.path} {self.event}".rstrip()


@dataclass(frozen=True, kw_only=True)
class UnitCell:
    """Lattice parameters of a known crystal."""

    a_A: float
    b_A: float
    c_A: float
    alpha_deg: float = 90.0
    beta_deg: float = 90.0
    gamma_deg: float = 90.0
    lattice_type: str = "triclinic"
    centering: str = "P"
    unique_axis: str = "*"

    def as_array(self) -> FloatArray:
        """(6,) a, b, c in Å; alpha, beta, gamma in degrees."""
        return np.array(
            [self.a_A, self.b_A, self.c_A, self.alpha_deg, self.beta_deg, self.gamma_deg]
        )

    def allows(self, hkl: Any) -> BoolArray:
        """(...) which reflections (..., 3) the centering allows (H: hexagonal axes, obverse)."""
        h, k, l = np.moveaxis(np.asarray(hkl), -1, 0)  # noqa: E741
        if self.centering == "F":
            return ((h + k) % 2 == 0) & ((k + l) % 2 == 0)
        if self.centering == "H":
            return (-h + k + l) % 3 == 0
        sums = {"A": k + l, "B": h + l, "C": h + k, "I": h + k + l}
        return sums.get(self.centering, np.zeros_like(h)) % 2 == 0

    def reciprocal_per_A(self) -> FloatArray:
        """(3, 3) rows a*, b*, c* in 1/Å (no 2 pi); a lies along x and b in the xy plane.

        A reflection (h, k, l) of a crystal turned by R has q = (h, k, l) @ rows @ R.T.
        """
        alpha, beta, gamma = np.radians(self.as_array()[3:])
        cosine = (np.cos(alpha) - np.cos(beta) * np.cos(gamma)) / np.sin(gamma)
        c_axis = np.array([np.cos(beta), cosine, math.sqrt(1 - np.cos(beta) ** 2 - cosine**2)])
        direct = np.array(
            [
                [self.a_A, 0.0, 0.0],
                [self.b_A * np.cos(gamma), self.b_A * np.sin(gamma), 0.0],
                self.c_A * c_axis,
            ]
        )
        return np.linalg.inv(direct).T


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexingResult:
    """What an indexer made of N frames. The arrays are in the order of the frames asked for.

    Two results on the same frames can be compared frame by frame, which is far sharper than
    comparing two fractions (paired).
    """

    is_indexed: BoolArray
    """(N,) at least one crystal."""
    is_hit: BoolArray
    """(N,) at least ``min_peaks`` peaks."""
    num_peaks: IntArray
    """(N,) peaks found in each frame."""
    num_crystals: int
    mean_cell: FloatArray
    """(6,) mean of the crystals' cells, Å and degrees; NaN = no crystal."""
    cell_ratio: float
    """Mean fitted axis over reference axis (1.03 at 3 % too long a distance); NaN = no crystal."""
    residual_px: float
    """Mean distance of predicted from observed spots, px; NaN = no crystal or not reported."""
    spot_shift_px: FloatArray
    """(2,) mean observed minus predicted spot (x, y), px; NaN = no crystal or not reported."""
    cpu_s: float
    version: str
    argv: tuple[str, ...] = ()
    """The command, where there was one."""

    def __post_init__(self) -> None:
        """Freezes the arrays and raises ValueError where they contradict one another."""
        for name, dtype in (
            ("is_indexed", np.bool_),
            ("is_hit", np.bool_),
            ("num_peaks", np.int32),
            ("mean_cell", np.float64),
            ("spot_shift_px", np.float64),
        ):
            array = np.array(getattr(self, name), dtype=dtype)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        n = self.is_indexed.shape
        if len(n) != 1 or self.is_hit.shape != n or self.num_peaks.shape != n:
            raise ValueError("is_indexed, is_hit and num_peaks must be (N,) each")
        if self.mean_cell.shape != (6,) or self.spot_shift_px.shape != (2,):
            raise ValueError("mean_cell must be (6,) and spot_shift_px (2,)")
        if np.any(self.is_indexed & ~self.is_hit):
            raise ValueError("a frame is indexed without being a hit")
        if self.num_crystals < self.num_indexed:
            raise ValueError("fewer crystals than indexed frames")

    @cached_property
    def num_frames(self) -> int:
        """N."""
        return len(self.is_indexed)

    @cached_property
    def num_hits(self) -> int:
        """Frames with at least ``min_peaks`` peaks."""
        return int(self.is_hit.sum())

    @cached_property
    def num_indexed(self) -> int:
        """Frames with at least one crystal."""
        return int(self.is_indexed.sum())

    @property
    def indexed_fraction(self) -> float:
        """Indexed of **all** frames: divided by hits, raising min_peaks would always be a gain."""
        return self.num_indexed / self.num_frames if self.num_frames else float("nan")

    @property
    def hit_fraction(self) -> float:
        """Hits of all frames."""
        return self.num_hits / self.num_frames if self.num_frames else float("nan")

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the indexed fraction."""
        return wilson(self.num_indexed, self.num_frames)


def wilson(
    num_successes: int, num_trials: int, z: float = 1.959963984540054
) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, J. Am. Stat. Assoc. 22 (1927) 209).

    Returns (0, 1) where nothing was tried.

    Raises:
        ValueError: more successes than trials, or a negative number.
    """
    if not 0 <= num_successes <= num_trials:
        raise ValueError(f"{num_successes} successes in {num_trials} trials")
    if num_trials == 0:
        return 0.0, 1.0
    p, z2 = num_successes / num_trials, z * z
    centre = (p + z2 / (2 * num_trials)) / (1 + z2 / num_trials)
    half = (
        z * math.sqrt(p * (1 - p) / num_trials + z2 / (4 * num_trials**2)) / (1 + z2 / num_trials)
    )
    return max(0.0, centre - half), min(1.0, centre + half)


def concatenate(results: Sequence[IndexingResult]) -> IndexingResult:
    """Results on consecutive frames as one; means are weighted by crystals, CPU seconds add up.

    Raises:
        ValueError: nothing to join, or results of different versions.
    """
    if not results:
        raise ValueError("no results to join")
    if len(versions := {result.version for result in results}) > 1:
        raise ValueError(f"results of different versions: {', '.join(sorted(versions))}")
    weight = np.array([result.num_crystals for result in results], dtype=float)

    def mean(values: Sequence[Any]) -> Any:
        x = np.asarray(values, dtype=float)
        w = weight.reshape(-1, *[1] * (x.ndim - 1)) * np.isfinite(x)
        with np.errstate(invalid="ignore"):
            return (np.where(w > 0, x, 0.0) * w).sum(0) / w.sum(0)

    return IndexingResult(
        is_indexed=np.concatenate([r.is_indexed for r in results]),
        is_hit=np.concatenate([r.is_hit for r in results]),
        num_peaks=np.concatenate([r.num_peaks for r in results]),
        num_crystals=int(weight.sum()),
        mean_cell=mean([r.mean_cell for r in results]),
        cell_ratio=float(mean([r.cell_ratio for r in results])),
        residual_px=float(mean([r.residual_px for r in results])),
        spot_shift_px=mean([r.spot_shift_px for r in results]),
        cpu_s=float(sum(r.cpu_s for r in results)),
        version=results[0].version,
        argv=results[0].argv,
    )


def tunables(
    names: Sequence[str], table: Mapping[str, TunableParameter] = TUNABLES
) -> tuple[TunableParameter, ...]:
    """The named tunables, in the order given.

    Raises:
        ParameterError: a name that is unknown or stands twice, or none at all.
    """
    if not names or len(set(names)) < len(names):
        raise ParameterError("name at least one tunable, and none twice")
    for name in names:
        if name not in table:
            raise ParameterError(f"{name!r} cannot be tuned; there are {', '.join(table)}")
    return tuple(table[name] for name in names)


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """The rules of an episode."""

    tunables: tuple[str, ...] = tuple(TUNABLES)
    """Which parameters, in which order; the others stay the user's."""
    num_frames: int = 200
    """N, of the cached sample; every evaluation indexes all of them."""
    num_steps: int = 19
    """T, proposals in an episode: with the start, 20 evaluations."""
    action: Literal["continuous", "discrete"] = "continuous"
    """``continuous``: (K,) in -1..1, a joint change of the best parameters so far; ``discrete``:
    nothing, or one parameter up or down by its ``step``, from where the last action led."""
    max_change: float = 0.5
    """Of a continuous action: share of a parameter's range."""
    reward: Literal["best", "change"] = "best"
    """``best``: by how much the best indexed fraction rises; ``change``: change of the fraction,
    up or down (Ferreira de Lima et al. 2021)."""
    time_cost: float = 0.0
    """Subtracted from the reward for each CPU second that a frame takes."""
    is_free_seen: bool = True
    """What the pipeline tells for free is observed: hits, peaks, cell ratio, spot shift, residual,
    CPU time. False: the fraction only."""

    def __post_init__(self) -> None:
        """Raises ValueError, or ParameterError for the tunables, with the field's name."""
        object.__setattr__(self, "tunables", tuple(self.tunables))
        try:
            tunables(self.tunables)
        except ParameterError as error:
            raise ParameterError(f"tunables: {error}") from None
        for name in ("num_frames", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be 1 or more, found {getattr(self, name)}")
        if not 0 < self.max_change <= 1:
            raise ValueError(f"max_change: must be above 0, at most 1, found {self.max_change}")
        if not self.time_cost >= 0:
            raise ValueError(f"time_cost: must be 0 or more, found {self.time_cost}")
        for name, known in (("action", ("continuous", "discrete")), ("reward", ("best", "change"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: expected {' or '.join(known)}, found {getattr(self, name)!r}"
                )

"""Values of the navigation problem; units and shapes are documented here and nowhere else.

Shape letters: N holes, P patches, S squares, G grids, E episodes side by side, T sessions.
Hierarchy: grid > square > patch > hole (Leginon file names: ``gr``, ``sq``, ``hl``, ``en``).
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]
BoolArray = NDArray[np.bool_]


class Switch(enum.IntEnum):
    """The highest level of the hierarchy that a move changes; indexes minutes and rewards."""

    HOLE = 0
    PATCH = 1
    SQUARE = 2
    GRID = 3


class HoleTableError(ValueError):
    """A hole table breaks its own rules; ``problems`` lists every one of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        """Keeps the list and joins it into one message."""
        self.problems = tuple(problems)
        super().__init__("invalid hole table:\n  " + "\n  ".join(self.problems))


@dataclass(frozen=True, kw_only=True, eq=False)
class HoleTable:
    """One microscope session: a row per hole, in the order of the file it came from.

    Arrays are read-only. ``grid_id``, ``square_id`` and ``patch_id`` are consecutive codes from
    zero that index ``grid_name``, ``square_name`` and ``patch_name``; every patch lies in one
    square, every square in one grid. Two tables are equal where ``content_hash`` is.
    """

    hole_name: NDArray[np.str_]
    """(N,) unique names."""
    grid_id: IntArray
    """(N,) int32, 0..G-1."""
    square_id: IntArray
    """(N,) int32, 0..S-1."""
    patch_id: IntArray
    """(N,) int32, 0..P-1."""
    grid_name: NDArray[np.str_]
    """(G,)"""
    square_name: NDArray[np.str_]
    """(S,)"""
    patch_name: NDArray[np.str_]
    """(P,)"""
    x: FloatArray
    """(N,) float64, position as the source gives it (image pixels, stage units); NaN = unknown."""
    y: FloatArray
    """(N,) float64, like ``x``."""
    ctf_max_resolution_A: FloatArray
    """(N,) float64, Å, lower is better; NaN = not measured."""
    predicted_ctf_A: FloatArray
    """(N,) float64, Å, as a regressor predicted it from the hole's image; NaN = none."""
    p_low_ctf: FloatArray
    """(N,) float64 in [0, 1]: predicted probability that the hole is low-CTF."""
    is_labelled: BoolArray
    """(N,) True where ``ctf_max_resolution_A`` may be used for training; needs a finite value."""

    def __post_init__(self) -> None:
        """Coerces dtypes, freezes the arrays, and raises HoleTableError with all problems."""
        for name, dtype in _DTYPES.items():
            array = np.array(
                getattr(self, name), dtype=dtype
            )  # a copy: nobody else may write to it
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if problems := _problems(self):
            raise HoleTableError(problems)

    def __len__(self) -> int:
        """N, the number of holes."""
        return len(self.hole_name)

    @classmethod
    def from_names(
        cls,
        *,
        hole_name: Sequence[str] | NDArray[np.str_],
        grid: Sequence[str] | NDArray[np.str_],
        square: Sequence[str] | NDArray[np.str_],
        patch: Sequence[str] | NDArray[np.str_],
        x: FloatArray | None = None,
        y: FloatArray | None = None,
        ctf_max_resolution_A: FloatArray | None = None,
        predicted_ctf_A: FloatArray | None = None,
        p_low_ctf: FloatArray | None = None,
        is_labelled: BoolArray | None = None,
    ) -> Self:
        """Builds a table from the parents' names, (N,) each; codes follow first appearance.

        What is left out is NaN; ``p_low_ctf`` then is 0.5; ``is_labelled`` is where CTF is finite.
        """
        n = len(hole_name)
        nan = np.full(n, np.nan)
        codes = {}
        for level, names in (("grid", grid), ("square", square), ("patch", patch)):
            codes[f"{level}_name"], codes[f"{level}_id"] = _factorize(
                np.asarray(names, dtype=np.str_)
            )
        ctf = nan if ctf_max_resolution_A is None else np.asarray(ctf_max_resolution_A, dtype=float)
        return cls(
            hole_name=np.asarray(hole_name, dtype=np.str_),
            x=nan if x is None else x,
            y=nan if y is None else y,
            ctf_max_resolution_A=ctf,
            predicted_ctf_A=nan if predicted_ctf_A is None else predicted_ctf_A,
            p_low_ctf=np.full(n, 0.5) if p_low_ctf is None else p_low_ctf,
            is_labelled=np.isfinite(ctf) if is_labelled is None else is_labelled,
            **codes,
        )

    @cached_property
    def patch_square(self) -> IntArray:
        """(P,) the square of each patch."""
        return _parent(self.patch_id, self.square_id, len(self.patch_name))

    @cached_property
    def square_grid(self) -> IntArray:
        """(S,) the grid of each square."""
        return _parent(self.square_id, self.grid_id, len(self.square_name))

    @cached_property
    def content_hash(self) -> str:
        """16 hex digits of SHA-256 over every column: the identity of this session's data."""
        digest = hashlib.sha256()
        for name in _DTYPES:
            array = getattr(self, name)
            digest.update(f"{name}:{array.shape}:".encode())
            digest.update("\0".join(array).encode() if array.dtype.kind == "U" else array.tobytes())
        return digest.hexdigest()[:16]

    def replace(self, **columns: Any) -> HoleTable:
        """A copy with some columns exchanged."""
        return dataclasses.replace(self, **columns)

    def select(self, rows: BoolArray | IntArray) -> HoleTable:
        """The table of the given rows only; codes are made consecutive again."""
        index = np.flatnonzero(rows) if np.asarray(rows).dtype == np.bool_ else np.asarray(rows)
        columns: dict[str, Any] = {
            name: getattr(self, name)[index]
            for name in _DTYPES
            if name.rsplit("_")[-1] != "id"
            and name not in ("grid_name", "square_name", "patch_name")
        }
        return HoleTable.from_names(
            grid=self.grid_name[self.grid_id[index]],
            square=self.square_name[self.square_id[index]],
            patch=self.patch_name[self.patch_id[index]],
            **columns,
        )


_DTYPES: dict[str, Any] = {
    "hole_name": np.str_,
    "grid_id": np.int32,
    "square_id": np.int32,
    "patch_id": np.int32,
    "grid_name": np.str_,
    "square_name": np.str_,
    "patch_name": np.str_,
    "x": np.float64,
    "y": np.float64,
    "ctf_max_resolution_A": np.float64,
    "predicted_ctf_A": np.float64,
    "p_low_ctf": np.float64,
    "is_labelled": np.bool_,
}


def _factorize(names: NDArray[np.str_]) -> tuple[NDArray[np.str_], IntArray]:
    """Unique names in order of first appearance, and the (N,) codes into them."""
    unique, first, inverse = np.unique(names, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return unique[order], rank[inverse]


def _parent(child: IntArray, parent: IntArray, num_children: int) -> IntArray:
    """(num_children,) the parent's code of each child."""
    out = np.zeros(num_children, np.int32)
    out[child] = parent
    return out


def _problems(table: HoleTable) -> list[str]:
    """Everything that is wrong with a table, in words."""
    n = len(table.hole_name)
    problems = []
    if n == 0:
        return ["no holes: at least one row is needed"]
    for name in _DTYPES:
        array = getattr(table, name)
        if array.ndim != 1:
            problems.append(f"{name}: expected one dimension, found shape {array.shape}")
        elif name not in ("grid_name", "square_name", "patch_name") and len(array) != n:
            problems.append(f"{name}: {len(array)} values for {n} holes")
    if problems:
        return problems
    unique, counts = np.unique(table.hole_name, return_counts=True)
    if (counts > 1).any():
        problems.append(
            f"hole_name: {int((counts > 1).sum())} duplicated, first {unique[counts > 1][0]!r}"
        )
    for level in ("grid", "square", "patch"):
        codes, names = getattr(table, f"{level}_id"), getattr(table, f"{level}_name")
        if codes.min() < 0 or codes.max() >= len(names) or len(np.unique(codes)) != len(names):
            problems.append(
                f"{level}_id: codes must cover 0..{len(names) - 1} ({level}_name has {len(names)})"
            )
        elif len(np.unique(names)) != len(names):
            problems.append(f"{level}_name: names are not unique")
    if problems:
        return problems
    for child, parent in (("patch", "square"), ("square", "grid")):
        child_id, parent_id = getattr(table, f"{child}_id"), getattr(table, f"{parent}_id")
        first = _parent(child_id, parent_id, len(getattr(table, f"{child}_name")))
        if (wrong := np.flatnonzero(first[child_id] != parent_id)).size:
            name = getattr(table, f"{child}_name")[child_id[wrong[0]]]
            problems.append(f"{child} {name!r} lies in more than one {parent}")
    p = table.p_low_ctf
    if (wrong := np.flatnonzero(~((p >= 0) & (p <= 1)))).size:
        problems.append(
            f"p_low_ctf: row {wrong[0]} is {p[wrong[0]]}, outside [0, 1] ({wrong.size} rows)"
        )
    ctf = table.ctf_max_resolution_A
    if (wrong := np.flatnonzero((ctf <= 0) | np.isinf(ctf))).size:
        problems.append(
            f"ctf_max_resolution_A: row {wrong[0]} is {ctf[wrong[0]]} Å ({wrong.size} rows)"
        )
    if (wrong := np.flatnonzero(table.is_labelled & ~np.isfinite(ctf))).size:
        problems.append(f"is_labelled: row {wrong[0]} has no CTF value ({wrong.size} rows)")
    return problems


Preset = Literal["paper", "cryorl", "leginon-2021"]
FeatureSet = Literal["paper", "cryorl", "rates"]
ActionLevel = Literal["hole", "patch"]


@dataclass(frozen=True, kw_only=True)
class NavigationConfig:
    """The rules of one session: minutes, rewards, budget, and what the agent sees and chooses.

    Build one with ``NavigationConfig.preset(name, **changes)``.
    """

    minutes: tuple[float, float, float, float]
    """Minutes of a move by ``Switch`` (hole, patch, square, grid)."""
    reward: tuple[float, float, float, float]
    """Reward of a move by ``Switch`` if the target hole is low-CTF, else 0."""
    low_ctf_threshold_A: float = 6.0
    """Å; a hole is low-CTF below it (SSL²-RL, section 4)."""
    is_threshold_inclusive: bool = False
    """True: a value equal to the threshold is low-CTF too (CryoRL's ``<=``)."""
    budget_min: float = 480.0
    """Minutes; the move that goes past it counts in full and ends the episode (``terminated``)."""
    action_level: ActionLevel = "hole"
    """``hole``: any unvisited hole; ``patch``: a patch, its best unvisited hole by prediction."""
    feature_set: FeatureSet = "paper"
    """``paper``, ``cryorl``: compact observation, expanded later; ``rates``: candidate rows."""
    num_past_steps: int = 3
    """Steps of features stacked by the expander, the current one included."""
    reward_rule: Literal["switch", "dynamic"] = "switch"
    """``dynamic`` is CryoRL's max(r (1.2 exp(-1.7 (ctf - threshold) / 2) - 0.2), 0)."""
    high_ctf_penalty: float = 0.0
    """CryoRL's penalty variant: -penalty per consecutive high-CTF hole in a patch, floor -1."""
    num_candidates: int = 12
    """Rows of the ``rates`` observation: this patch, others in the square, the grid, elsewhere."""

    def __post_init__(self) -> None:
        """Raises ValueError with the name of the field that is wrong."""
        for name, allowed in (("action_level", ActionLevel), ("feature_set", FeatureSet)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"{name}: {getattr(self, name)!r} is not one of {get_args(allowed)}"
                )
        if len(self.minutes) != 4 or len(self.reward) != 4:
            raise ValueError("minutes and reward: four values each, for hole, patch, square, grid")
        if min(self.minutes) <= 0 or not np.isfinite(self.minutes).all():
            raise ValueError(f"minutes: every move takes time, found {self.minutes}")
        if not np.isfinite(self.reward).all():
            raise ValueError(f"reward: four numbers, found {self.reward}")
        if not self.low_ctf_threshold_A > 0:
            raise ValueError(
                f"low_ctf_threshold_A: must be positive, found {self.low_ctf_threshold_A}"
            )
        if not self.budget_min > 0:  # not `<=`: with NaN an episode would never end
            raise ValueError(f"budget_min: must be positive, found {self.budget_min}")
        if self.num_past_steps < 1:
            raise ValueError(f"num_past_steps: at least 1, found {self.num_past_steps}")
        if self.num_candidates < 4:
            raise ValueError(
                f"num_candidates: at least 4 (one a level), found {self.num_candidates}"
            )

    @classmethod
    def preset(cls, name: Preset = "paper", **changes: Any) -> NavigationConfig:
        """The named preset (``rewards.PRESETS``, each constant with its source) with changes."""
        from envs.cryoem.rewards import PRESETS

        if name not in PRESETS:
            raise ValueError(f"preset: {name!r} is not one of {tuple(PRESETS)}")
        return dataclasses.replace(PRESETS[name], **changes)


@dataclass(frozen=True, kw_only=True)
class RandomEffects:
    """Spread of what grids, squares and patches share beyond the prediction, in logits.

    logit P(low) = base + u_grid + u_square + u_patch with u ~ N(0, sd²). Defaults are the values
    fitted on the Aldolase training half (CryoRL's public data) by the calibration of this project.
    """

    sd_grid: float = 0.29
    sd_square: float = 0.34
    sd_patch: float = 0.52

    @property
    def variance(self) -> float:
        """Sum of the three variances."""
        return self.sd_grid**2 + self.sd_square**2 + self.sd_patch**2


SessionSource = Callable[[np.random.Generator], HoleTable]
"""Draws one session; ``envs.cryoem.synthetic`` has some."""

"""From predicted CTF resolution to the probability that a hole is low-CTF.

Mixed-effects logistic model, fitted on labelled holes and brought along to any other session:

    logit P(low) = a + b min(x, clip) + c (mean of min(x, clip) in the patch)
                   + u_grid + u_square + u_patch

with x the predicted resolution (Å) and u ~ N(0, sd²): what the holes of a group share beyond
their predictions, so that measured neighbours carry information. The form of the fixed part won
the leave-one-grid-out comparison on the Aldolase training half (CryoRL's public data): -422.5 nats
for a line in x, -411.3 with the patch mean, -389.2 with the clip, -380.4 with both
(``tests/test_calibration.py``; effects fitted too: -381.9).
How it is fitted: ``mixed_logit``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from scipy.special import expit, log_expit, logit

from envs.cryoem.mixed_logit import Tree, fit_mixed_logit
from envs.cryoem.rewards import is_low_ctf
from envs.cryoem.types import FloatArray, HoleTable, NavigationConfig, RandomEffects

InputKind = Literal["predicted_ctf_A", "logit_p_low_ctf"]

PROBABILITY_FLOOR = 1e-4
"""Probabilities are held this far from 0 and 1 before a logit is taken (1/1 would be infinite)."""
# Slopes on standardised inputs ~ N(0, 5²): no force on real data (the fitted one is near -2), but
# perfectly separated labels keep a finite slope.
_SLOPE_SD = 5.0


def uncalibrated_p(predicted_ctf_A: FloatArray) -> FloatArray:
    """CryoRL's own mapping, 1 / (1 + exp(predicted - 6 Å)); NaN where there is no prediction."""
    return expit(6.0 - np.asarray(predicted_ctf_A, dtype=np.float64))


def base_logit_of(p_low_ctf: FloatArray, effects: RandomEffects) -> FloatArray:
    """The fixed effect m whose marginal probability is ``p_low_ctf``; inverse of ``marginal_p``."""
    p = np.clip(p_low_ctf, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return logit(p) * np.sqrt(1 + np.pi / 8 * effects.variance)


def marginal_p(base_logit: FloatArray, effects: RandomEffects) -> FloatArray:
    """E[sigmoid(m + u)], u ~ N(0, v), as sigmoid(m / sqrt(1 + pi v / 8)) (MacKay 1992, eq. 10)."""
    return expit(np.asarray(base_logit) / np.sqrt(1 + np.pi / 8 * effects.variance))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A fitted model; a plain value that is stored with a policy or a dataset."""

    intercept: float
    """a, logit."""
    slope: float
    """b, logits per Å (per logit where ``input`` is ``logit_p_low_ctf``)."""
    clip_A: float
    """Å; predictions above it are all the same. For logits: the largest magnitude."""
    patch_mean_slope: float
    """c, in the unit of ``slope``."""
    effects: RandomEffects
    fitted_on: str
    """``content_hash`` of the table it was fitted on; a name for one that was not fitted."""
    num_holes: int
    """Labelled holes it was fitted on."""
    log_likelihood: float
    """Laplace-approximated log marginal likelihood of their labels, nats, priors left out."""
    input: InputKind = "predicted_ctf_A"
    """x: the predicted Å, or the logit of ``p_low_ctf`` where a table brings only probabilities."""

    def base_logit(self, table: HoleTable) -> FloatArray:
        """(N,) the fixed effect a + b x + c mean x.

        A hole without a prediction takes its patch's mean, a patch without any the table's.
        Raises ValueError where the table has no prediction at all.
        """
        x, patch_mean = _inputs(table, self.input, self.clip_A)
        return self.intercept + self.slope * x + self.patch_mean_slope * patch_mean

    def apply(self, table: HoleTable) -> HoleTable:
        """The table with ``p_low_ctf``, the marginal probability (effects integrated out).

        With predicted Å this may be repeated without harm; with ``logit_p_low_ctf`` it reads the
        column that it replaces, and belongs to the table as imported.
        """
        return table.replace(p_low_ctf=marginal_p(self.base_logit(table), self.effects))

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for ``json.dumps``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Inverse of ``to_json``; raises ValueError that names unknown and missing keys."""
        values = dict(values)
        check_keys("calibration", values, cls)
        check_keys("calibration.effects", values["effects"], RandomEffects)
        return cls(**{**values, "effects": RandomEffects(**values["effects"])})


def fit_calibration(
    table: HoleTable,
    config: NavigationConfig,
    *,
    clip_A: float | None = None,
    is_patch_mean_used: bool = True,
    effects: RandomEffects | None = None,
) -> Calibration:
    """Fits the model on the labelled holes of a table (never the session that is evaluated).

    Args:
        table: labels count where ``is_labelled``; low-CTF follows the config's threshold.
        config: its threshold, and whether it is inclusive.
        clip_A: Å above which predictions are all the same, default 9 (5 for logits).
        is_patch_mean_used: False fixes the patch-mean slope at 0.
        effects: sds that are known; None fits them. All zero is plain logistic regression.

    Raises:
        ValueError: no labelled hole, no prediction, or labels that are all equal.
    """
    kind: InputKind = (
        "predicted_ctf_A" if np.isfinite(table.predicted_ctf_A).any() else "logit_p_low_ctf"
    )
    clip_A = (9.0 if kind == "predicted_ctf_A" else 5.0) if clip_A is None else clip_A
    x, patch_mean = _inputs(table, kind, clip_A)
    rows = table.is_labelled
    low = is_low_ctf(table.ctf_max_resolution_A[rows], config)
    if not rows.any() or low.all() or not low.any():
        found = "no labelled hole" if not rows.any() else f"{low.sum()} of {low.size} are low-CTF"
        raise ValueError(
            f"cannot calibrate: labels of both kinds are needed, {found} at "
            f"{config.low_ctf_threshold_A} Å; fit on a session with both and bring it along"
        )
    tree = Tree.of(table, rows)
    design = np.stack([np.ones(low.size), x[rows], patch_mean[rows]][: 2 + is_patch_mean_used])
    centre, scale = design.mean(axis=1), design.std(axis=1)
    centre[0], scale[0], scale[scale < 1e-9] = 0.0, 1.0, 1.0
    design = (design - centre[:, None]) / scale[:, None]
    precision = np.diag([0.0, *[_SLOPE_SD**-2] * (len(design) - 1)])
    fitted = fit_mixed_logit(
        design, low, tree, prior_mean=np.zeros(len(design)), precision=precision, effects=effects
    )
    slopes = fitted.coefficients / scale
    return Calibration(
        intercept=float(slopes[0] - slopes[1:] @ centre[1:]),
        slope=float(slopes[1]),
        clip_A=float(clip_A),
        patch_mean_slope=float(slopes[2]) if is_patch_mean_used else 0.0,
        effects=fitted.effects,
        fitted_on=table.content_hash,
        num_holes=int(low.size),
        log_likelihood=fitted.log_likelihood,
        input=kind,
    )


def leave_one_grid_out_log_likelihood(
    table: HoleTable, config: NavigationConfig, **options: Any
) -> float:
    """Sum of log P(label) over labelled holes, each by a model fitted without its grid (nats).

    Args:
        table: at least two grids with labels.
        config: the threshold.
        options: passed on to ``fit_calibration``.
    """
    if len(table.grid_name) < 2:
        raise ValueError("leave-one-grid-out needs at least two grids; this table has one")
    total = 0.0
    for grid in range(len(table.grid_name)):
        held_out = table.select(table.grid_id == grid)
        fitted = fit_calibration(table.select(table.grid_id != grid), config, **options)
        m = fitted.base_logit(held_out) / np.sqrt(1 + np.pi / 8 * fitted.effects.variance)
        sign = np.where(is_low_ctf(held_out.ctf_max_resolution_A, config), 1.0, -1.0)
        total += float(log_expit(sign * m)[held_out.is_labelled].sum())
    return total


def check_keys(where: str, values: dict[str, Any], cls: type) -> None:
    """Raises ValueError where the keys are not exactly the fields of a dataclass."""
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where}: unknown keys {unknown}; known are {sorted(known)}")
    if missing := sorted(known - set(values)):
        raise ValueError(f"{where}: missing keys {missing}")


def _inputs(table: HoleTable, kind: InputKind, clip_A: float) -> tuple[FloatArray, FloatArray]:
    """(N,) x after the clip, and (N,) the mean of it over the hole's patch."""
    if kind == "predicted_ctf_A":
        x = np.minimum(table.predicted_ctf_A, clip_A)
    else:
        p = np.clip(table.p_low_ctf, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
        x = np.clip(logit(p), -clip_A, clip_A)
    is_known = np.isfinite(x)
    if not is_known.any():
        raise ValueError(
            "this calibration reads predicted_ctf_A, and the table has none: import predictions"
        )
    count = np.bincount(table.patch_id[is_known], minlength=len(table.patch_name))
    total = np.bincount(table.patch_id, np.where(is_known, x, 0.0), len(table.patch_name))
    patch_mean = np.where(count > 0, total / np.maximum(count, 1), x[is_known].mean())
    patch_mean = patch_mean[table.patch_id]
    return np.where(is_known, x, patch_mean), patch_mean

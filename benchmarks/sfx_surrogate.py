"""How well does the surrogate speak for the embedded pipeline?

Run: ``python benchmarks/sfx_surrogate.py [--data DIR] [--frames 200]`` (some minutes on one core;
without --data frames of preset ``lysozyme`` are simulated). The embedded pipeline indexes the same
frames at settings where one parameter at a time is changed; the numbers of the surrogate's one
experiment are fitted to those (as they differ between crystals and detectors, while the model's
shape is what is tested), and it is judged on settings where several are changed at once, which
nothing was fitted to: error and correlation of the indexed fraction, and how well the free outputs
that an agent goes by are foreseen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np

from envs.crystfel.env import Outcome
from envs.crystfel.experiment import Experiment, read_experiment
from envs.crystfel.sfx.pipeline import EmbeddedIndexer
from envs.crystfel.sfx.simulate import simulate
from envs.crystfel.surrogate import (
    BatchResult,
    Experiments,
    Sample,
    nominal_experiment,
    respond,
)
from envs.crystfel.types import TUNABLES, FloatArray, Parameters

NAMES = tuple(TUNABLES)
ONE_AT_A_TIME: tuple[dict[str, float], ...] = (
    {},
    *({"min_snr": v} for v in (3.5, 4.0, 4.5, 5.5, 6.0, 7.0, 8.0, 10.0)),
    *({"threshold_adu": v} for v in (0.0, 40.0, 60.0, 100.0, 200.0)),
    *({"min_pix_count": v} for v in (1, 3, 4, 6)),
    *({"min_peaks": v} for v in (0, 30, 40, 60, 100)),
    *({"clen_offset_percent": v} for v in (-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0)),
    *({"centre_x_offset_px": v} for v in (-3.0, -1.0, 1.0, 2.0)),
    *({"centre_y_offset_px": v} for v in (-2.0, 1.0)),
)
FITTED = (
    "crystal_share", "log_peaks", "log_peaks_sd", "peaks_power", "log_peaks_needed",
    "log_adu_per_snr", "pixel_loss", "log_junk", "junk_fall", "log_flicker", "log_blobs",
    "log_junk_tolerance", "log_tolerance_sd", "clen_window_percent", "clen_asymmetry",
    "clen_window_sd", "centre_window_px", "centre_window_sd", "optimum_clen_percent",
)  # fmt: skip
OF_CELL_AND_SHIFT = ("cell_slope", "cell_bias_percent", "shift_gain")


def joint_settings(num: int) -> tuple[dict[str, float], ...]:
    """Several parameters at once, where a tuner goes."""
    rng = np.random.default_rng(5)
    return tuple(
        {
            "min_snr": float(rng.uniform(4, 9)),
            "threshold_adu": float(rng.uniform(0, 60)),
            "min_pix_count": int(rng.integers(2, 5)),
            "min_peaks": int(rng.integers(0, 30)),
            "clen_offset_percent": float(rng.uniform(-3, 3)),
            "centre_x_offset_px": float(rng.uniform(-1.5, 1.5)),
            "centre_y_offset_px": float(rng.uniform(-1.5, 1.5)),
        }
        for _ in range(num)
    )


def embedded(
    experiment: Experiment, settings: tuple[dict[str, float], ...], num_frames: int
) -> tuple[FloatArray, Outcome]:
    """(S, V) values, and what the embedded pipeline says of them."""
    indexer = EmbeddedIndexer(experiment)
    nominal = Parameters(min_snr=5, threshold_adu=20, min_pix_count=2, min_peaks=15)
    asked = [nominal.replace(**setting) for setting in settings]
    results = [indexer.run(parameters, experiment.frames[:num_frames]) for parameters in asked]
    values = np.array([[getattr(parameters, name) for name in NAMES] for parameters in asked])
    return values, Outcome.of(BatchResult.of(results))


def surrogate(experiments: Experiments, values: FloatArray, num_frames: int = 1000) -> Outcome:
    """One simulated experiment at (S, V) values."""
    rows = np.zeros(len(values), dtype=int)
    sample = Sample.draw(np.random.default_rng(1), 1, num_frames).select(rows, slice(None))
    return Outcome.of(respond(experiments.select(rows), sample, values))


def fit(values: FloatArray, outcome: Outcome, num_rounds: int = 600) -> Experiments:
    """The experiment that repeats fractions, hits, peaks, cells and shifts best."""
    rng = np.random.default_rng(2)
    best, spread = nominal_experiment(), 0.3
    names = (*FITTED, *OF_CELL_AND_SHIFT)

    def error(e: Experiments) -> float:
        got = surrogate(e, values, 400)
        cell = np.nan_to_num(100 * (got.cell_ratio - outcome.cell_ratio))[outcome.num_indexed > 5]
        shift = np.nan_to_num(got.spot_shift_px - outcome.spot_shift_px)[outcome.num_indexed > 5]
        peaks = np.log1p(got.peak_quantiles) - np.log1p(outcome.peak_quantiles)
        return float(
            np.mean((got.indexed_fraction - outcome.indexed_fraction) ** 2)
            + 0.02 * np.mean((got.hit_fraction - outcome.hit_fraction) ** 2)
            + 3e-4 * np.mean(peaks**2)
            + 1e-3 * np.mean(cell**2)
            + 1e-3 * np.mean(shift**2)
        )

    lowest = error(best)
    for i in range(num_rounds):
        changes = {}
        for name in rng.choice(names, size=rng.integers(1, 5), replace=False):
            old = getattr(best, name)
            new = old + spread * rng.standard_normal() * np.maximum(np.abs(old), 0.2)
            is_positive = not name.startswith(("log", "clen_a", "optimum", "cell_b"))
            changes[name] = np.maximum(new, 1e-3) if is_positive else new
        if "crystal_share" in changes:
            changes["crystal_share"] = np.clip(changes["crystal_share"], 0, 1)
        candidate = dataclasses.replace(best, **changes)
        if (found := error(candidate)) < lowest:
            best, lowest = candidate, found
        spread = 0.3 * 0.1 ** (i / num_rounds)
    return best


def judge(truth: Outcome, got: Outcome) -> dict[str, float]:
    """Errors over settings."""
    a, b = truth.indexed_fraction, got.indexed_fraction
    seen = (truth.num_indexed > 5) & np.isfinite(got.cell_ratio)
    cell = 100 * (got.cell_ratio - truth.cell_ratio)[seen]
    shift = np.hypot(*(got.spot_shift_px - truth.spot_shift_px)[seen].T)
    return {
        "fraction_rms": float(np.sqrt(np.mean((a - b) ** 2))),
        "fraction_correlation": float(np.corrcoef(a, b)[0, 1]),
        "hit_fraction_rms": float(np.sqrt(np.mean((truth.hit_fraction - got.hit_fraction) ** 2))),
        "cell_percent_rms": float(np.sqrt(np.mean(cell**2))),
        "shift_px_rms": float(np.sqrt(np.mean(shift**2))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="data folder with the right geometry")
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--settings", type=int, default=30, help="that nothing is fitted to")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        experiment = (
            read_experiment(args.data)
            if args.data
            else simulate("lysozyme", args.frames, 1, Path(scratch) / "data")
        )
        values, truth = embedded(experiment, ONE_AT_A_TIME, args.frames)
        joint_values, joint = embedded(experiment, joint_settings(args.settings), args.frames)
    found = fit(values, truth)
    result = {
        "one at a time, fitted": judge(truth, surrogate(found, values)),
        "several at once, not fitted": judge(joint, surrogate(found, joint_values)),
        "several at once, CrystFEL's curves": judge(
            joint, surrogate(nominal_experiment(), joint_values)
        ),
    }
    sampling = np.sqrt(np.mean(joint.indexed_fraction * (1 - joint.indexed_fraction)) / args.frames)
    print(f"{args.frames} frames; a fraction of them has a sampling error of {sampling:.3f}")
    print(f"{'':<38}{'fraction':>9}{'corr.':>8}{'hits':>8}{'cell %':>8}{'shift px':>10}")
    for name, row in result.items():
        print(
            f"{name:<38}{row['fraction_rms']:>9.3f}{row['fraction_correlation']:>8.3f}"
            f"{row['hit_fraction_rms']:>8.3f}{row['cell_percent_rms']:>8.2f}"
            f"{row['shift_px_rms']:>10.2f}"
        )
    if args.json:
        fitted = {name: float(getattr(found, name)[0]) for name in (*FITTED, *OF_CELL_AND_SHIFT)}
        args.json.write_text(json.dumps(result | {"fitted": fitted}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Our Y3 beside the paper's: variance by level, CTF near the threshold, what classifiers reach.

    python benchmarks/synthetic_calibration.py --only anova          # a second
    python benchmarks/synthetic_calibration.py --seeds 5 --processes 4

A seed is another data set, split by squares, choice of labels and network; intervals are 95 % over
seeds. Classifiers: the CNN of 60,000 weights under the schedule of SSL²-RL, appendix B.2 (SGD,
lr 0.01, 200 epochs of the labelled images); accuracies on the held-out squares, at the end of
training (no best epoch is chosen). The paper's come from a ResNet-18 on images that are not public.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np

from envs.cryoem.images import IMAGE_PRESETS, ImagePreset, draw_images
from envs.cryoem.nested import sums_of_squares
from envs.cryoem.synthetic import CtfLaw, draw_session, draw_visible_components
from envs.cryoem.types import BoolArray, FloatArray, HoleTable
from ssl2rl_ray.config import PerceptionTrainingConfig
from ssl2rl_ray.data.splits import choose_labelled, split_by_square
from ssl2rl_ray.stats import paired_difference, summarize

THRESHOLD_A = 6.0
VALIDATION_SHARE = 2164 / 8653
"""SSL²-RL, table 1."""
PAPER_SUMS = (5393.9, 17167.2, 31570.4, 62604.0)
"""SSL²-RL, table 3: grid, square, patch, hole."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    labelled_fraction: float
    paper: float | None
    """Accuracy in SSL²-RL (section 4), where it has this arm."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the training section of a perception run."""


SUPERVISED = {"method": "supervised"}
ARMS = (
    Arm("SL 5 %", 0.05, 0.571, SUPERVISED),
    Arm("SL 10 %", 0.10, 0.619, SUPERVISED),
    Arm("SL 20 %", 0.20, 0.630, SUPERVISED),
    Arm("SL 100 %", 1.0, 0.652, SUPERVISED),
    Arm("SL 5 %, well trained (lr 0.03)", 0.05, None, {**SUPERVISED, "learning_rate": 0.03}),
    Arm("FixMatch 5 %", 0.05, 0.623),
    Arm("FixMatch 5 %, lr 0.03", 0.05, 0.623, {"learning_rate": 0.03}),
    Arm("FixMatch 5 %, weight 5", 0.05, 0.623, {"unsupervised_weight": 5.0}),
)


WELL_TRAINED = {"learning_rate": 0.03}
SEARCH = (
    ARMS[0],
    ARMS[4],
    *(
        Arm(f"FixMatch 5 %, lr 0.03, {what}", 0.05, 0.623, {**WELL_TRAINED, **changes})
        for what, changes in (
            ("tau 0.7", {"confidence_threshold": 0.7}),
            ("aligned", {"is_aligned": True}),
            ("100 epochs supervised first", {"num_warmup_epochs": 100}),
            ("strong view only moved", {"augmentation_strength": 0.0}),
            ("weight 3", {"unsupervised_weight": 3.0}),
        )
    ),
)
"""Around the shipped recipe (FixMatch, lr 0.03, tau 0.8, weight 1), one change each."""


@dataclass(frozen=True)
class Sample:
    """One seed's data."""

    table: HoleTable
    images: np.ndarray
    score: FloatArray
    """(N,) the visible score, high = bad: all that the images can tell."""
    is_validation: BoolArray

    @property
    def is_low(self) -> BoolArray:
        """(N,) the truth."""
        return self.table.ctf_max_resolution_A < THRESHOLD_A


def draw(seed: int, preset: str, image_preset: ImagePreset) -> Sample:
    table = draw_session(np.random.default_rng([seed, 0]), preset)
    images = draw_images(np.random.default_rng([seed, 1]), table, image_preset)
    # the first that ``draw_images`` draws: the same generator state, the same score
    visible = draw_visible_components(
        np.random.default_rng([seed, 1]), table, image_preset.visible_fraction
    )
    held_out = split_by_square(table, VALIDATION_SHARE, np.random.default_rng([seed, 2]))
    return Sample(table, images, visible.sum(axis=0), held_out)


def trained(sample: Sample, seed: int, arm: Arm) -> dict[str, float]:
    """Accuracy and AUC on the held-out squares after the last epoch."""
    import torch

    from ssl2rl_ray.perception.classifier import make_classifier
    from ssl2rl_ray.perception.fit import Examples, Fit

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    training, holdout = np.flatnonzero(~sample.is_validation), np.flatnonzero(sample.is_validation)
    # from one permutation: fewer labels are a part of more labels
    labelled = choose_labelled(training, arm.labelled_fraction, np.random.default_rng([seed, 3]))
    pixels = sample.images[training]
    classifier = make_classifier("cnn", pixels.shape[1])
    classifier.standardise_by(float(pixels.mean()) / 255, float(pixels.std()) / 255)
    fit = Fit(
        PerceptionTrainingConfig(**arm.changes),
        classifier,
        Examples(
            images=sample.images,
            labelled=labelled,
            is_low=sample.is_low,
            unlabelled=np.setdiff1d(training, labelled),
            validation=holdout,
            truth=sample.is_low.astype(np.float64),
        ),
        seed=seed,
    )
    while fit.epochs_done < fit.num_epochs:
        fit.epoch()
    figures = fit.validate()
    return {name: figures[f"validation/{name}"] for name in ("accuracy", "auc")}


def one_seed(
    seed: int, preset: str, image_preset: ImagePreset, arms: tuple[Arm, ...]
) -> list[dict[str, float]]:
    """The limit first, then each arm."""
    from ssl2rl_ray.perception.metrics import classifier_metrics

    sample = draw(seed, preset, image_preset)
    held_out = sample.is_validation
    p = 1 / (1 + np.exp(sample.score[held_out]))
    limit = classifier_metrics(sample.is_low[held_out], p)
    return [{name: limit[name] for name in ("accuracy", "auc")}] + [
        trained(sample, seed, arm) for arm in arms
    ]


def anova(num_seeds: int, preset: str) -> None:
    tables = [draw_session(np.random.default_rng([s, 0]), preset) for s in range(num_seeds)]
    ctf = [t.ctf_max_resolution_A for t in tables]
    sums = np.array([sums_of_squares(t, c) for t, c in zip(tables, ctf, strict=True)])
    shares, paper = sums / sums.sum(axis=1, keepdims=True), np.array(PAPER_SUMS)
    print(f"{preset}, {num_seeds} draws of {len(tables[0])} holes (paper: 8653), mean")
    print("| level | units, ours | sum of squares | paper | share | paper | off by |")
    print("|---|---|---|---|---|---|---|")
    names = ("grid_name", "square_name", "patch_name", "hole_name")
    for level, name in enumerate(names):
        mean, published = shares[:, level].mean(), paper[level] / paper.sum()
        print(
            f"| {name[:-5]} | {len(getattr(tables[0], name))} | {sums[:, level].mean():.1f} "
            f"| {paper[level]:.1f} | {mean:.4f} | {published:.4f} | {mean - published:+.4f} |"
        )
    print(f"| all | | {sums.sum(axis=1).mean():.1f} | {paper.sum():.1f} | | | |")
    below = np.mean([(c < THRESHOLD_A).mean() for c in ctf])
    near = np.mean([((c >= 5) & (c <= 7)).mean() for c in ctf])
    print(f"CTF below {THRESHOLD_A:g} Å: {below:.3f}; from 5 to 7 Å: {near:.3f} (aims .50, .30)")
    guess = np.mean(
        [
            ((t.p_low_ctf > 0.5) == (c < THRESHOLD_A)).mean()
            for t, c in zip(tables, ctf, strict=True)
        ]
    )
    law = CtfLaw()
    aim = 0.5 + np.arcsin(np.sqrt(law.predicted_fraction)) / np.pi
    print(f"accuracy of the sessions' own p_low_ctf: {guess:.3f} (aim {aim:.3f})\n")


def accuracies(seeds: int, preset: str, arms: tuple[Arm, ...], processes: int) -> None:
    began = time.perf_counter()
    image_preset = IMAGE_PRESETS[preset]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(one_seed, seed, preset, image_preset, arms) for seed in range(seeds)]
        for done, _ in enumerate(as_completed(futures), start=1):
            took = time.perf_counter() - began
            print(f"{done} of {seeds} seeds after {took:.0f} s", file=sys.stderr, flush=True)
        rows = [future.result() for future in futures]
    accuracy = np.array([[run["accuracy"] for run in row] for row in rows])
    auc = np.array([[run["auc"] for run in row] for row in rows])
    side = image_preset.size_px
    print(f"{preset}, images of {side} px, {seeds} seeds, CNN, held-out squares, mean ± 95 %")
    print("| | accuracy | paper | off by | AUC |")
    print("|---|---|---|---|---|")
    for column, (name, paper) in enumerate(
        [("limit: the visible score", None), *((arm.name, arm.paper) for arm in arms)]
    ):
        a, b = summarize(accuracy[:, column]), summarize(auc[:, column])
        beside = "| | |" if paper is None else f"| {paper:.3f} | {a.mean - paper:+.3f} |"
        print(
            f"| {name} | {a.mean:.3f} ± {a.half_width:.3f} {beside} "
            f"{b.mean:.3f} ± {b.half_width:.3f} |"
        )
    by_name = {arm.name: column for column, arm in enumerate(arms, start=1)}
    for ours in (name for name in by_name if name.startswith("FixMatch")):
        for theirs in ("SL 5 %", "SL 5 %, well trained (lr 0.03)"):
            if theirs in by_name:
                gain = paired_difference(accuracy[:, by_name[ours]], accuracy[:, by_name[theirs]])
                print(f"{ours} less {theirs}, paired: {gain.mean:+.3f} ± {gain.half_width:.3f}")
    took = time.perf_counter() - began
    print(f"{took:.0f} s in {processes} processes on {os.cpu_count()} cores")


def main() -> None:
    parser = argparse.ArgumentParser(description="see the top of this file")
    parser.add_argument("--preset", choices=("y3", "y3-mini"), default="y3-mini")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--only", choices=("anova", "supervised", "fixmatch", "search"))
    args = parser.parse_args()
    if args.only in (None, "anova"):
        anova(args.seeds, args.preset)
    if args.only != "anova":
        arms = (
            SEARCH
            if args.only == "search"
            else tuple(
                arm
                for arm in ARMS
                if args.only is None
                or (arm.changes.get("method") == "supervised") == (args.only == "supervised")
                or (args.only == "fixmatch" and arm.labelled_fraction == 0.05)
            )
        )
        accuracies(args.seeds, args.preset, arms, args.processes)


if __name__ == "__main__":
    main()

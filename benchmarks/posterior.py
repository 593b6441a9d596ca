"""What labelled neighbours add to a classifier: the hierarchical posterior on Y3-like samples.

    python benchmarks/posterior.py --seeds 5 --processes 4

A seed is another sample, split, choice of labels and network. Classifiers are supervised, under the
schedule of SSL²-RL's appendix B.2, cross-fitted in five folds; figures are of validation squares'
holes whose label nobody knows, ``blind`` with no label in those squares, ``with neighbours`` with
the same share of labels known there as in training, as in a session under way. Intervals are 95 %
over seeds, differences paired. Bars: with 10 % of the labels, accuracy at least that of the
classifier that had all labels; AUC at least .02 above the classifier, .005 blind.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from ssl2rl_ray.stats import paired_difference, summarize

FRACTIONS = (0.05, 0.10)
JUDGED = ("classifier", "calibrated", "posterior_blind", "posterior")


def one_seed(seed: int, num_epochs: int) -> dict[str, float]:
    """``FRACTION/WHAT/FIGURE`` and, on the same holes, ``FRACTION/all labels/FIGURE``."""
    import torch

    from ssl2rl_ray.config import PerceptionRunConfig, load_config
    from ssl2rl_ray.perception.cross_fit import Training, judge, model_of
    from ssl2rl_ray.perception.metrics import classifier_metrics
    from ssl2rl_ray.perception.sample import sample_of, truth_of

    torch.set_num_threads(1)

    def trained(fraction: float, num_folds: int) -> Training:
        known = fraction if num_folds else 0
        config = load_config(
            None,
            [
                "kind=perception",
                f"seed={seed}",
                "classifier.network=cnn",
                f"data.labelled_fraction={fraction}",
                f"data.validation_labelled_fraction={known}",
                "training.method=supervised",
                f"training.num_epochs={num_epochs}",
                f"training.num_folds={num_folds}",
                f"training.evaluation_interval_epochs={num_epochs}",
            ],
        )
        assert isinstance(config, PerceptionRunConfig)
        training = Training(config, sample_of(config))
        for _ in training.epochs():
            pass
        return training

    everything = trained(1.0, 0)
    p_everything = 1 / (1 + np.exp(-everything.finished["main"]["logits"].numpy()))
    found = {}
    for fraction in FRACTIONS:
        training = trained(fraction, 5)
        model, logit = model_of(training)
        figures, _ = judge(training, model, logit)
        rows = training.split.validation
        is_low = truth_of(training.config, training.sample.table)[rows] == 1
        figures["all labels"] = classifier_metrics(is_low, p_everything[rows])
        for what, values in figures.items():
            for name in ("accuracy", "auc", "ece"):
                found[f"{fraction}/{what}/{name}"] = values[name]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="see the top of this file")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=200, help="of each classifier (%(default)s)")
    args = parser.parse_args()
    began = time.perf_counter()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(one_seed, seeds, [args.epochs] * args.seeds))
    values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    print(f"y3-mini, CNN, {args.epochs} epochs, {args.seeds} seeds, mean ± 95 %")
    print("| labels | | accuracy | AUC | ECE |")
    print("|---|---|---|---|---|")
    for fraction in FRACTIONS:
        for what in ("all labels", *JUDGED):
            cells = []
            for name in ("accuracy", "auc", "ece"):
                summary = summarize(values[f"{fraction}/{what}/{name}"])
                cells.append(f"{summary.mean:.3f} ± {summary.half_width:.3f}")
            label = "classifier with all labels" if what == "all labels" else what
            print(f"| {fraction:.0%} | {label} | {' | '.join(cells)} |")
    for fraction in FRACTIONS:
        for ours, theirs, name, bar in (
            ("posterior", "classifier", "auc", 0.02),
            ("posterior_blind", "classifier", "auc", 0.005),
            ("posterior", "all labels", "accuracy", 0.0),
        ):
            difference = paired_difference(
                values[f"{fraction}/{ours}/{name}"], values[f"{fraction}/{theirs}/{name}"]
            )
            print(
                f"{fraction:.0%}: {name} of {ours} less {theirs}, paired: {difference.mean:+.3f} ± "
                f"{difference.half_width:.3f} (bar: at least {bar:+.3f})"
            )
    print(
        f"{time.perf_counter() - began:.0f} s, {args.processes} processes, {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()

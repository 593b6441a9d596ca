"""Around SSL²-RL: do other settings make visit orders better labels than the classifier's own?

Run: ``python benchmarks/loop_search.py RUN... [--only N_C exploration]`` on finished runs of
``tune_configs/ssl2rl_mini.yaml`` (one data set each; a minute a setting and run on one core).

Every setting plays one round again from what the run left: f_0, the policy that was trained on it,
its belief. Roll-outs, labels and f_1 are the setting's own. Printed, as mean ± 95 % interval over
the runs: what the labels are worth on the unlabelled holes (AUC of the score; accuracy less that of
the classifier's own ranking at the same N_C), and AUC and accuracy of f_1 on the test squares less
those of iterative FixMatch's f_1, from the same f_0 in as many steps. ``rounds`` prints what the
runs themselves came to, round after round. These are settings tried side by side on data sets that
are looked at: a choice made here has to be confirmed on others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit, logit

from ssl2rl_ray.config import METHODS, SSL2RLRunConfig
from ssl2rl_ray.loop.diagnostics import label_quality
from ssl2rl_ray.loop.pseudo_labels import Evidence, pseudo_labels
from ssl2rl_ray.loop.stages import (
    Belief,
    Task,
    believe,
    finetune,
    judge_classifier,
    navigate,
    navigation_key,
    pretraining_of,
    session_of,
    visit_all,
    write_labels,
)
from ssl2rl_ray.runs import RunDirectory
from ssl2rl_ray.stats import summarize

METHOD = "ssl2rl-480"
RIVAL = "iterative-fixmatch"
SETTINGS: dict[str, dict[str, Any]] = {
    "as configured": {},
    "N_C .25": {"positive_cutoff": 0.25},
    "N_C .35": {"positive_cutoff": 0.35},
    "N_C .6": {"positive_cutoff": 0.6},
    "exploration 0": {"exploration": 0.0},
    "exploration 1": {"exploration": 1.0},
    "M 1": {"num_rollouts": 1},
    "M 15": {"num_rollouts": 15},
    "temperature .5": {"temperature": 0.5},
    "temperature 2": {"temperature": 2.0},
    "confidence unused": {"power": 0.0},
    "confidence ^8": {"power": 8.0},
    "weight 1": {"unsupervised_weight": 1.0},
    "3 x the steps": {"steps": 3},
}
"""Of a round: of the loop, of the policy's predictions (temperature), of the fine-tuning."""


def play(task: Task, run: Path, change: dict[str, Any], folder: Path) -> dict[str, float]:
    """One round of ``METHOD`` from a run's f_0 under changed settings."""
    change, method, config = dict(change), METHODS[METHOD], task.config
    temperature, power = change.pop("temperature", 1.0), change.pop("power", 1.0)
    weight = change.pop("unsupervised_weight", config.finetuning.unsupervised_weight)
    steps = change.pop("steps", 1) * (config.loop.finetuning_steps or 0)
    config = dataclasses.replace(
        config,
        loop=dataclasses.replace(config.loop, **change, finetuning_steps=steps or None),
        finetuning=dataclasses.replace(config.finetuning, unsupervised_weight=weight),
    )
    task = dataclasses.replace(task, config=config)
    f_0 = run / "f0" / pretraining_of(task, method)
    belief = believe(task, f_0, f_0)
    tempered: Belief = dataclasses.replace(
        belief, p_classifier=expit(logit(belief.p_classifier) / temperature)
    )
    navigator = navigate(task, method, belief, run / "f0" / navigation_key(task, method), _quiet)
    roll = visit_all(task, method, tempered, navigator, 0, folder, _quiet)
    rows = task.train
    labels = pseudo_labels(
        "visit-order",
        Evidence(
            table=session_of(task, method, belief),
            p_low_ctf=belief.p_classifier[rows],
            is_low=(task.truth == 1)[rows] & task.is_labelled[rows],
            is_labelled=task.is_labelled[rows],
            visit_order=roll.visit_order,
        ),
        config.loop.positive_cutoff,
    )
    assert labels is not None
    unlabelled = np.flatnonzero(~task.is_labelled[rows])
    quality = label_quality(
        "visit-order", labels, task.truth[rows], belief.p_classifier[rows], unlabelled
    )
    confidence = np.where(labels.confidence > 0, labels.confidence, 0.0)
    confidence[unlabelled] **= power
    write_labels(
        task, dataclasses.replace(labels, confidence=confidence), folder / "labels.parquet"
    )
    f_1 = finetune(task, f_0, folder / "labels.parquet", folder / "classifier", _quiet)
    test = judge_classifier(task, believe(task, f_0, f_1))["classifier"]["test"]
    own = quality["own_ranking"]["accuracy"]
    return {
        "label AUC": quality["labels"]["auc"],
        "label accuracy less own ranking's": quality["labels"]["accuracy"] - own,
        "auc": test["auc"],
        "accuracy": test["accuracy"],
    }


def main() -> None:
    """Plays and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--only", nargs="+", default=[""], help="settings that begin so")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    wanted = {
        name: change for name, change in SETTINGS.items() if name.startswith(tuple(asked.only))
    }
    found: dict[float, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for number, run in enumerate(asked.runs, 1):
        config = RunDirectory.open(run).config
        assert isinstance(config, SSL2RLRunConfig)
        task, table = Task.of(config), found[config.data.labelled_fraction]
        rival = [_test(run, RIVAL, k) for k in range(config.loop.num_rounds + 1)]
        for k in range(1, config.loop.num_rounds + 1):
            if (own := _test(run, METHOD, k)) is not None and rival[k] is not None:
                table[f"round {k}"].append({f: own[f] - rival[k][f] for f in ("auc", "accuracy")})
        for name, change in wanted.items():
            with tempfile.TemporaryDirectory() as folder:
                row = play(task, run, change, Path(folder))
            table[name].append(row | {f: row[f] - rival[1][f] for f in ("auc", "accuracy")})
            print(f"run {number} of {len(asked.runs)}: {name}", file=sys.stderr, flush=True)
    for fraction, table in sorted(found.items()):
        print(f"\n{METHOD} with {fraction:.0%} labels; f_1's test figures less {RIVAL}'s")
        for name, rows in table.items():
            words = []
            for key in rows[0]:
                each = summarize([row[key] for row in rows])
                sign = "" if key == "label AUC" else "+"
                words.append(f"{key} {each.mean:{sign}.3f} ± {each.half_width:.3f}")
            print(f"  {name:<18} {'; '.join(words)}  ({len(rows)} data sets)")


def _test(run: Path, method: str, k: int) -> Any:
    """Test figures of a round's classifier; None where the run has not that round."""
    path = run / "methods" / method / f"round-{k:02d}" / "round.json"
    return json.loads(path.read_text())["classifier"]["test"] if path.exists() else None


def _quiet(what: str, share: float) -> None:
    pass


if __name__ == "__main__":
    main()

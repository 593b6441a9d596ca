"""The whole of it in minutes: SSL²-RL's loop on a synthetic session, its report, a plan's map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ssl2rl_ray.config import SSL2RLRunConfig, from_dict, navigation_config
from ssl2rl_ray.data.folder import read_dataset
from ssl2rl_ray.evaluate import contestant, draw_tour
from ssl2rl_ray.launch import run_config
from ssl2rl_ray.loop.ssl2rl import format_summary
from ssl2rl_ray.report import report, write_report

METHOD = "ssl2rl-480"
"""Whose policy draws the map."""
CONFIG: dict[str, Any] = {
    "kind": "ssl2rl",
    "data": {
        "preset": "demo",
        "labelled_fraction": 0.2,
        "validation_labelled_fraction": 0.2,
        "validation_share": 0.4,
    },
    "classifier": {"network": "cnn"},
    "pretraining": {"learning_rate": 0.03, "unlabelled_ratio": 2, "num_folds": 2},
    "finetuning": {"learning_rate": 0.01, "unlabelled_ratio": 2, "unsupervised_weight": 4.0},
    "env": {"preset": "paper", "budget_min": 480, "feature_set": "rates", "action_level": "patch"},
    "algorithm": {
        "n_step": 1,
        "discount_per_min": 0.97,
        "batch_size": 256,
        "buffer_capacity": 20000,
        "learning_starts": 500,
        "epsilon_initial": 0.05,
        "epsilon_steps": 2000,
    },
    "rl": {
        "num_env_steps": 3000,
        "num_envs_per_runner": 16,
        "num_validation_sessions": 8,
        "evaluation_interval_steps": 1500,
        "num_torch_threads": 2,
    },
    "loop": {
        "methods": ["fixmatch", "iterative-fixmatch", "ssl2rl-480", "posterior"],
        "num_rounds": 2,
        "num_rollouts": 5,
        "num_starts": 20,
        "pretraining_steps": 200,
        "finetuning_steps": 60,
    },
    "compute": {"num_torch_threads": 2},
}
"""``tune_configs/ssl2rl_demo.yaml`` says the same; it is here because a wheel has no configs."""


def config(seed: int) -> SSL2RLRunConfig:
    """The demonstration's config."""
    chosen = from_dict({**CONFIG, "seed": seed}, "demo")
    assert isinstance(chosen, SSL2RLRunConfig)
    return chosen


def demo(
    out: Path,
    seed: int,
    *,
    argv: list[str],
    on_step: Callable[[str, float, str], None] | None = None,
) -> dict[str, Any]:
    """Runs the loop and reports; called again it goes on where it was, or shows the result again.

    Args:
        out: folder for the run, the report and the map.
        seed: of everything.
        argv: the command line, for the run's manifest.
        on_step: told of what, the share done, and what is under way.

    Returns:
        ``summary`` of the run, the paths ``run``, ``report``, ``tensorboard``, ``session`` (what RL
        saw) and ``policy``, and ``image``, the map of that policy's tour (H, W, 3) uint8.
    """
    chosen, folder = config(seed), out / "run"

    def bar(row: dict[str, Any]) -> None:
        assert on_step is not None
        on_step("the loop", row["share"], f"{row['stage']} ({row['stage_share']:.0%})")

    summary = run_config(
        chosen,
        folder,
        resume=(folder / "manifest.json").exists(),
        argv=argv,
        progress=bar if on_step else None,
    )
    page = write_report(report([folder]), out / "report")
    policy = folder / summary["methods"][METHOD]["recommended"]["policy"]
    session = policy.parent / "session"
    table = read_dataset(session).table
    image = draw_tour(contestant(str(policy)), table, navigation_config(chosen.env))
    return {
        "summary": summary,
        "run": str(folder),
        "report": str(page),
        "tensorboard": str(folder / "tensorboard"),
        "session": str(session),
        "policy": str(policy),
        "image": np.asarray(image),
    }


def format_result(result: dict[str, Any]) -> str:
    """What the demonstration says at its end."""
    return "\n".join(
        [
            format_summary(result["summary"]),
            "",
            "This is one seed of a small session, trained for minutes: it shows that everything "
            "works and ranks nothing.",
            f"report       {result['report']}",
            f"map          {result['map']}",
            f"TensorBoard  tensorboard --logdir {result['tensorboard']}",
            f"a plan       ssl2rl plan {result['policy']} --data {result['session']} "
            "--budget-min 480 --out plan.csv",
        ]
    )

"""The whole of it in minutes: train on synthetic sessions, compare on others, draw the tour."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssl2rl_ray.config import NavigationRunConfig, from_dict, navigation_config
from ssl2rl_ray.data.commands import import_synthetic_command
from ssl2rl_ray.data.folder import read_dataset
from ssl2rl_ray.evaluate import contestant, draw_tour, evaluate, format_report
from ssl2rl_ray.runs import RunDirectory
from ssl2rl_ray.tensorboard import TensorBoard
from ssl2rl_ray.train import train

AGAINST = ("random", "predict-rank", "snowball", "rate-index", "lagrange", "oracle")
NUM_SESSIONS = 40

CONFIG: dict[str, Any] = {
    "kind": "navigation",
    "sessions": {"synthetic": 1.0, "unlabelled": 1.0, "preset": "demo"},
    "env": {
        "preset": "cryorl",
        "budget_min": 120.0,
        "feature_set": "rates",
        "action_level": "patch",
    },
    "algorithm": {
        "margin": 1.0,
        "discount_per_min": 0.97,
        "n_step": 1,
        "batch_size": 256,
        "buffer_capacity": 30_000,
        "learning_starts": 1_000,
        "epsilon_initial": 0.05,
        "epsilon_steps": 10_000,
    },
    "training": {
        "num_env_steps": 40_000,
        "num_validation_sessions": 32,
        "evaluation_interval_steps": 10_000,
    },
}
"""``tune_configs/demo.yaml`` says the same; it is here too because a wheel holds no configs."""


def config(seed: int) -> NavigationRunConfig:
    """The demonstration's config."""
    chosen = from_dict({**CONFIG, "seed": seed}, "demo")
    assert isinstance(chosen, NavigationRunConfig)
    return chosen


def demo(
    out: Path, seed: int, *, argv: list[str], on_step: Callable[[str, float], None] | None = None
) -> dict[str, Any]:
    """Trains, compares and draws; called again it goes on where it was, or shows the result again.

    Args:
        out: folder for the session, the run and the map.
        seed: of everything.
        argv: the command line, for the run's manifest.
        on_step: told what is under way and its share done.

    Returns:
        ``report`` (the JSON of ``evaluate``), the paths ``session``, ``run``, ``tensorboard``, and
        ``image``, the map of the policy's tour (H, W, 3) uint8.
    """
    chosen = config(seed)
    session, folder = out / "session", out / "run"
    dataset = (
        read_dataset(session)
        if session.exists()
        else import_synthetic_command("demo", seed, session)
    )
    start = RunDirectory.resume if (folder / "manifest.json").exists() else RunDirectory.create
    with start(folder, chosen, argv=argv) as run:
        total = chosen.training.num_env_steps
        train(
            chosen,
            run,
            progress=lambda row: (
                on_step("training", row["num_env_steps"] / total) if on_step else None
            ),
        )
    rules = navigation_config(chosen.env)
    report = evaluate(
        str(folder),
        data=session,
        budget_min=rules.budget_min,
        num_sessions=NUM_SESSIONS,
        session_kind="synthetic",
        synthetic_preset="demo",
        seed=seed + 1,
        against=AGAINST,
        on_step=on_step,
    )
    image = draw_tour(contestant(str(folder)), dataset.table, rules)
    with TensorBoard(folder / "tensorboard") as board:
        board.image("map", image, chosen.training.num_env_steps)
    return {
        "report": report,
        "session": str(session),
        "run": str(folder),
        "tensorboard": str(folder / "tensorboard"),
        "image": image,
    }


def format_result(result: dict[str, Any]) -> str:
    """What the demonstration says at its end."""
    return "\n".join(
        [
            format_report(result["report"]),
            "",
            "This is one training seed, trained for a minute: it shows that everything works and "
            "ranks nothing.",
            f"map          {result['map']}",
            f"run          {result['run']}",
            f"TensorBoard  tensorboard --logdir {result['tensorboard']}",
            f"a plan       ssl2rl plan {result['run']} --data {result['session']} "
            "--budget-min 120 --out plan.csv",
        ]
    )

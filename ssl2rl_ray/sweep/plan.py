"""What ``ssl2rl sweep --dry-run`` says: everything that would run, and nothing started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssl2rl_ray.sweep.file import Sweep
from ssl2rl_ray.sweep.folder import trial_status
from ssl2rl_ray.sweep.room import find_room, in_words, need_of, num_concurrent


def plan(sweep: Sweep, out: Path) -> dict[str, Any]:
    """What ``run_sweep`` would do: of each trial its needs and how far it is.

    Raises ValueError where a trial does not fit.
    """
    room = find_room()
    return {
        "num_trials": len(sweep.trials),
        "num_concurrent": num_concurrent(sweep, room),
        "where": room.where,
        "num_cpus": room.num_cpus,
        "trials": {
            name: {
                "kind": config.kind,
                "needs": in_words(need_of(config, sweep.tune)),
                "status": trial_status(out / name),
            }
            for name, config in sweep.trials.items()
        },
    }

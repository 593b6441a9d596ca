"""What ``ssl2rl sfx`` does. Each command is a function of its arguments that returns its result.

``add_commands`` is read whenever a parser is made: nothing heavy is imported at the top.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

Result = tuple[dict[str, Any], str]
"""For ``--json``, and for a reader."""
Progress = Callable[..., None]
"""``progress(what, share)``: ``what`` is done to a share of 0 to 1."""
Run = Callable[[argparse.Namespace, Progress], Result]


def add_commands(add: Callable[[str, Run, str], argparse.ArgumentParser]) -> None:
    """Adds the subcommands of ``sfx``.

    Args:
        add: makes the parser of one: its name, what it runs, what its help says.
    """
    sub = add("simulate", simulate, "make frames of a known crystal, for trying things out")
    sub.add_argument(
        "--preset",
        default="lysozyme",
        help="clean, lysozyme, weak, hard, bad-geometry, modules, modules-bad-geometry or drift "
        "(%(default)s)",
    )
    sub.add_argument("--frames", type=int, default=1000, help="(%(default)s)")
    sub.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    sub.add_argument("--out", required=True, metavar="DIR", help="data folder to write")
    sub.add_argument(
        "--dtype", default="int16", help="of the frames: int16, uint16 or float32 (%(default)s)"
    )
    sub.add_argument("--processes", type=int, default=1, help="that share the work (%(default)s)")
    sub.add_argument("--force", action="store_true", help="replace an earlier simulation")


def simulate(args: argparse.Namespace, progress: Progress) -> Result:
    """``sfx simulate``: see ``envs.crystfel.sfx.simulate.simulate``."""
    from envs.crystfel.sfx import simulate as simulator

    experiment = simulator.simulate(
        args.preset,
        args.frames,
        args.seed,
        args.out,
        dtype=args.dtype,
        frames_per_file=min(250, -(-args.frames // max(args.processes, 1))) or 1,
        num_processes=args.processes,
        force=args.force,
        on_step=progress,
    )
    result = {
        "folder": str(experiment.folder),
        "preset": args.preset,
        "seed": args.seed,
        "num_frames": len(experiment.frames),
        "geometry": experiment.geometry_path.name,
        "cell": experiment.cell_path.name,
        "frames": experiment.frames_path.name,
        "parameters": experiment.nominal.as_dict(),
        "digest": experiment.digest,
    }
    text = (
        f"{experiment.folder}: {len(experiment.frames)} frames of preset {args.preset}, "
        f"seed {args.seed}; `ssl2rl sfx index --data {args.out}` indexes them"
    )
    return result, text

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

    sub = add("index", index, "find peaks and index the frames of a data folder")
    add_data(sub)
    sub.add_argument("--frames", type=int, metavar="N", help="the first N of the list (all)")
    sub.add_argument("--memo", metavar="DIR", help="remembers what was indexed")
    sub.add_argument(
        "--stream", metavar="OUT", help="write peaks and lattices for CrystFEL (embedded only)"
    )

    sub = add("compare", compare, "let tuners reach what they can with equally many frames")
    add_data(sub, without="simulated experiments")
    sub.add_argument(
        "--kind", choices=("normal", "harder"), help="of simulated experiments (normal)"
    )
    sub.add_argument("--budget-frames", type=int, default=20_000, help="(%(default)s)")
    sub.add_argument(
        "--seeds", type=int, default=10, help="samples of frames, or experiments (%(default)s)"
    )
    sub.add_argument("--frames", type=int, default=200, help="of a cached sample (%(default)s)")
    sub.add_argument("--judge-frames", type=int, default=200, help="that judge it (%(default)s)")
    sub.add_argument(
        "--race-frames", type=int, default=50, help="looked at first; 0 = no racing (%(default)s)"
    )
    sub.add_argument("--against", metavar="NAME,NAME", help="rivals (a choice of them)")
    sub.add_argument(
        "--policy", action="append", default=[], metavar="RUN", help="trained policy; repeatable"
    )
    sub.add_argument("--tunables", metavar="NAME,NAME", help="what is tuned (all)")
    sub.add_argument("--memo", metavar="DIR", help="remembers what was indexed")
    sub.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    sub.add_argument("--figure", metavar="PNG", help="draw the curves")
    sub.add_argument("--tensorboard", metavar="DIR", help="write the curves for TensorBoard")


def add_data(sub: argparse.ArgumentParser, without: str = "") -> None:
    """Options of a data folder and of what indexes it; ``without``: what happens without one."""
    text = f"data folder; without it, {without}" if without else "data folder"
    sub.add_argument("--data", required=not without, metavar="DIR", help=text)
    sub.add_argument(
        "--backend", choices=("embedded", "crystfel"), default="embedded", help="(%(default)s)"
    )
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="parameter other than the folder's nominal one, such as min_snr=5; repeatable",
    )
    sub.add_argument("--geometry", metavar="GEOM", help="instead of the folder's")
    sub.add_argument("--cell", metavar="CELL", help="instead of the folder's")
    sub.add_argument("--list", metavar="LST", help="frames, instead of the folder's")
    sub.add_argument(
        "--processes", type=int, default=1, help="that share the indexing (%(default)s)"
    )


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


def index(args: argparse.Namespace, progress: Progress) -> Result:
    """``sfx index``: one setting on the frames of a data folder, see ``Indexer.run``."""
    import contextlib

    from envs.crystfel.indexer import IndexerError, innermost

    if args.frames is not None and args.frames < 1:
        raise ValueError(f"--frames: must be 1 or more, found {args.frames}")
    if args.stream and args.backend != "embedded":
        raise ValueError("--stream: of the embedded pipeline only; indexamajig writes its own")
    try:
        with contextlib.ExitStack() as stack:
            indexer, experiment = _indexer(args, stack)
            parameters = experiment.nominal.replace(**assignments(args.set))
            progress("indexing", 0.0)
            result = indexer.run(parameters, experiment.frames[: args.frames])
            progress("indexing", 1.0)
            if args.stream:
                frames = experiment.frames[: args.frames]
                innermost(indexer).write_stream(args.stream, parameters, frames)
    except IndexerError as error:
        raise ValueError(str(error)) from error
    document = {
        "num_frames": result.num_frames,
        "num_hits": result.num_hits,
        "num_indexed": result.num_indexed,
        "num_crystals": result.num_crystals,
        "indexed_fraction": {"value": result.indexed_fraction, "ci95": list(result.ci95)},
        "is_indexed": result.is_indexed.tolist(),
        "is_hit": result.is_hit.tolist(),
        "num_peaks": result.num_peaks.tolist(),
        "cell_ratio": _finite(result.cell_ratio),
        "mean_cell": [_finite(value) for value in result.mean_cell],
        "residual_px": _finite(result.residual_px),
        "spot_shift_px": [_finite(value) for value in result.spot_shift_px],
        "cpu_s": result.cpu_s,
        "backend": args.backend,
        "version": result.version,
        "argv": list(result.argv),
        "parameters": parameters.as_dict(),
    }
    low, high = result.ci95
    lines = [
        f"{result.num_indexed} of {result.num_frames} frames indexed: "
        f"{result.indexed_fraction:.1%} (95 % interval {low:.1%} to {high:.1%})",
        f"{result.num_hits} hits with at least {parameters.min_peaks} peaks, "
        f"{result.num_peaks.mean():.1f} peaks a frame, {result.num_crystals} crystals",
    ]
    if result.num_crystals:
        x, y = result.spot_shift_px
        lines.append(
            f"fitted cell / reference {result.cell_ratio:.4f}; spots {result.residual_px:.2f} px "
            f"off their prediction, {x:+.2f} and {y:+.2f} px in x and y on the mean"
        )
    else:
        lines.append("nothing indexed: `ssl2rl sfx diagnose --data DIR` looks for the reason")
    lines.append(f"{result.cpu_s:.1f} s of CPU time; {result.version}")
    return document, "\n".join(lines)


def compare(args: argparse.Namespace, progress: Progress) -> Result:
    """``sfx compare``: see ``ssl2rl_ray.tuning.compare``."""
    import contextlib
    from pathlib import Path

    from envs.crystfel.indexer import IndexerError
    from envs.crystfel.types import TUNABLES, TuningConfig
    from ssl2rl_ray.tuning import compare as comparing

    names = comparing.DEFAULT if args.against is None else _names(args.against)
    makes = comparing.contestants(names, args.policy)
    tuned = tuple(TUNABLES) if args.tunables is None else _names(args.tunables)
    config = TuningConfig(tunables=tuned, num_frames=args.frames)
    if args.seeds < 1:
        raise ValueError(f"--seeds: must be 1 or more, found {args.seeds}")
    best = None
    with contextlib.ExitStack() as stack:
        if args.data is None:
            for option in ("set", "geometry", "cell", "list"):
                if getattr(args, option):
                    raise ValueError(f"--{option}: is of a data folder; name one by --data")
            kind = args.kind or "normal"
            arenas = comparing.simulated(kind, args.seeds, args.frames, args.seed)
            best = comparing.best_of_simulated(arenas)
        else:
            if args.kind:
                raise ValueError("--kind: is of simulated experiments, and --data names a folder")
            indexer, experiment = _indexer(args, stack)
            arenas = comparing.real(
                indexer,
                experiment.frames,
                experiment.nominal.replace(**assignments(args.set)),
                num_seeds=args.seeds,
                num_frames=args.frames,
                num_judged=args.judge_frames,
                seed=args.seed,
            )
        try:
            found = comparing.compare(
                arenas,
                makes,
                config,
                budget_frames=args.budget_frames,
                num_first_frames=args.race_frames or None,
                best=best,
                seed=args.seed,
                policies=[name for name in makes if name not in names],
                on_step=progress,
            ).as_json()
        except IndexerError as error:
            raise ValueError(str(error)) from error
    text = comparing.format_comparison(found)
    if args.figure:
        Path(args.figure).write_bytes(comparing.draw_comparison(found))
        text += f"\n{args.figure}: the curves"
    if args.tensorboard:
        from ssl2rl_ray.tensorboard import TensorBoard

        with TensorBoard(Path(args.tensorboard)) as board:
            comparing.log_comparison(found, board)
        text += f"\n{args.tensorboard}: for TensorBoard, the band under custom scalars"
    return {"data": args.data, "budget_frames": args.budget_frames, **found}, text


def assignments(texts: list[str], option: str = "--set") -> dict[str, float]:
    """``["a=1", "b=2"]`` -> values by name. Raises ValueError."""
    values = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            values[name.strip()] = float(value)
        except ValueError:
            raise ValueError(f"{option} {text}: expected NAME=NUMBER, such as min_snr=5") from None
    return values


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if value == value else None


def _names(text: str) -> tuple[str, ...]:
    """``a,b`` -> (a, b)."""
    return tuple(name for part in text.split(",") if (name := part.strip()))


def _indexer(args: argparse.Namespace, stack: Any) -> tuple[Any, Any]:
    """The backend on the data folder, spread over Ray tasks and remembered as asked for."""
    import tempfile
    from pathlib import Path

    from envs.crystfel.experiment import read_experiment
    from envs.crystfel.indexer import Memo

    experiment = read_experiment(
        args.data,
        geometry=args.geometry,
        cell=args.cell,
        frames=args.list,
    )
    if args.processes < 1:
        raise ValueError(f"--processes: must be 1 or more, found {args.processes}")
    folder = Path(args.memo) / "peaks" if args.memo else None
    is_spread = args.backend == "embedded" and args.processes > 1
    if is_spread and folder is None:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sfx-peaks-"))
    indexer = backend(args.backend, experiment, args.processes, folder)
    if is_spread:
        from ssl2rl_ray.local_ray import local_ray
        from ssl2rl_ray.tuning.spread import SpreadIndexer

        stack.enter_context(local_ray(args.processes))
        indexer = SpreadIndexer(indexer, num_tasks=args.processes)
    return (Memo(indexer, args.memo) if args.memo else indexer), experiment


def backend(name: str, experiment: Any, num_processes: int, cache: Any) -> Any:
    """The indexer of a backend; ``cache``: folder for peaks that are found, or None."""
    if name == "crystfel":
        from envs.crystfel.indexamajig import Indexamajig

        return Indexamajig(experiment=experiment, num_processes=num_processes)
    from envs.crystfel.sfx.pipeline import EmbeddedIndexer

    return EmbeddedIndexer(experiment, cache=cache)

"""What ``ssl2rl sfx online`` and ``ssl2rl sfx diagnose`` do; see ``ssl2rl_ray.tuning.commands``.

Nothing heavy is imported at the top.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ssl2rl_ray.tuning.commands import Progress, Result, Run, add_data, assignments, backend


def add_commands(add: Callable[[str, Run, str], argparse.ArgumentParser]) -> None:
    """Adds both; ``add`` makes a parser of a name, what it runs, what its help says."""
    sub = add("online", online, "index frames as they come, and tune while they do")
    add_data(sub)
    sub.add_argument(
        "--out", required=True, metavar="DIR", help="state, audit log, files to paste; goes on"
    )
    sub.add_argument(
        "--watch",
        metavar="DIR",
        help="folder where HDF5 files appear (without it: the list, which may grow)",
    )
    sub.add_argument(
        "--tuner",
        default="gp-warm-free",
        metavar="NAME",
        help="rival by name, or a trained policy's folder (%(default)s)",
    )
    sub.add_argument(
        "--tunables", metavar="NAME,NAME", help="what is tuned (all, or what the policy learned)"
    )
    sub.add_argument("--xwiz", metavar="TOML", help="EXtra-Xwiz configuration to start from")
    sub.add_argument("--batch", type=int, default=50, metavar="N", help="frames (%(default)s)")
    sub.add_argument("--max-frames", type=int, metavar="N", help="end after so many (never)")
    sub.add_argument(
        "--idle-s", type=float, metavar="S", help="end when no frame has come for S seconds (never)"
    )
    sub.add_argument("--poll-s", type=float, default=1.0, metavar="S", help="(%(default)s)")
    sub.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="rule of online tuning, such as num_steps=30; repeatable",
    )
    sub.add_argument("--no-ray", action="store_true", help="in this process, one after the other")

    sub = add("diagnose", diagnose, "say what is wrong where little or nothing indexes")
    add_data(sub)
    sub.add_argument("--frames", type=int, default=60, metavar="N", help="to look at (%(default)s)")
    sub.add_argument("--figure", metavar="PNG", help="draw a frame with its peaks")


def online(args: argparse.Namespace, progress: Progress) -> Result:
    """``sfx online``: see ``ssl2rl_ray.online.run.serve``."""
    import contextlib
    import dataclasses
    import json
    import sys
    from pathlib import Path

    from envs.crystfel.indexer import IndexerError
    from envs.crystfel.rivals import RIVALS
    from envs.crystfel.xwiz import read_xwiz
    from ssl2rl_ray.local_ray import local_ray
    from ssl2rl_ray.online.decide import OnlineConfig, check_start
    from ssl2rl_ray.online.run import InlineWorkers, RayWorkers, Until, serve
    from ssl2rl_ray.online.store import Store
    from ssl2rl_ray.runs import on_interrupt
    from ssl2rl_ray.tensorboard import TensorBoard
    from ssl2rl_ray.tuning.spread import SpreadIndexer

    for name in ("batch", "processes", "poll_s"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')}: must be above 0")
    fields = {f.name: f.type for f in dataclasses.fields(OnlineConfig)}
    rules: dict[str, Any] = {}
    for name, value in assignments(args.rule, "--rule").items():
        if name not in fields or name == "tunables":
            raise ValueError(f"--rule {name}: no such rule; there are {', '.join(fields)}")
        rules[name] = int(value) if fields[name] == "int" else value
    if args.tunables:
        rules["tunables"] = tuple(name.strip() for name in args.tunables.split(","))
    if args.tuner in RIVALS:
        config, make = OnlineConfig(**rules), RIVALS[args.tuner]
    else:
        from ssl2rl_ray.tuning.policy import TuningPolicy

        if not Path(args.tuner).exists():
            raise ValueError(
                f"--tuner {args.tuner}: neither a folder nor one of {', '.join(RIVALS)}"
            )
        policy = TuningPolicy.load(args.tuner)
        rules.setdefault("tunables", policy.config.tunables)
        config = OnlineConfig(**rules)
        policy.check_tunes(config.tuning)
        make = policy.make
    xwiz = None
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store(args.out))
        experiment, source = _stream(args, store.folder)
        initial = experiment.nominal
        if args.xwiz:
            initial = read_xwiz(args.xwiz).parameters
            xwiz = Path(args.xwiz).read_text(errors="replace")
        initial = initial.replace(**assignments(args.set))
        try:
            check_start(config, initial)
        except ValueError as error:  # a bad start is what this command is for
            print(
                f"note: {error}; frames are indexed with it until another setting gains, and the "
                "tuner looks from the nearest bound on",
                file=sys.stderr,
            )
        indexer = backend(args.backend, experiment, args.processes, store.folder / "peaks")
        if args.no_ray:
            workers: Any = InlineWorkers(indexer)
        else:
            stack.enter_context(local_ray(2 + 2 * (args.processes > 1) * args.processes))
            if args.processes > 1 and args.backend == "embedded":
                indexer = SpreadIndexer(indexer, num_tasks=args.processes)
            workers = RayWorkers(indexer)
            stack.callback(workers.close)
        state = store.state()
        board = stack.enter_context(
            TensorBoard(
                store.folder / "tensorboard",
                first_step=state.num_processed + 1 if state is not None else 0,
            )
        )
        stop = stack.enter_context(on_interrupt())
        try:
            result = serve(
                config,
                make,
                workers,
                source,
                store,
                experiment=experiment,
                initial=initial,
                until=Until(num_frames=args.max_frames, idle_s=args.idle_s),
                xwiz=xwiz,
                batch_frames=args.batch,
                poll_s=args.poll_s,
                stop=stop,
                curves=board.log,
                say=lambda line: print(line, file=sys.stderr, flush=True),
                header={"argv": sys.argv, "backend": indexer.version, "tuner": args.tuner},
            )
        except IndexerError as error:
            raise ValueError(str(error)) from error
        command = (store.folder / "command.txt").read_text().strip()
    result |= {
        "folder": str(store.folder),
        "geometry": str(store.folder / "tuned.geom"),
        "command": command,
        "xwiz": str(store.folder / "xwiz.toml") if xwiz is not None else None,
    }
    control = result["control"]
    lines = [
        f"{result['num_processed']} frames processed, {result['num_indexed']} indexed; "
        f"{result['num_searches']} searches ({result['num_searched']} frames), "
        f"{result['num_deployed']} changes of parameters, {result['num_refused']} refused",
        f"version {result['version']}: {json.dumps(result['changed']) or 'as the start'}",
    ]
    if control["num_frames"]:
        lines.append(
            f"on the same {control['num_frames']} frames: {control['fraction_tuned']:.1%} tuned, "
            f"{control['fraction_initial']:.1%} with the initial parameters"
        )
    lines.append(
        f"the tuner thought for {result['agent_s']:.2f} s, {result['agent_share']:.2%} of its steps"
    )
    lines += ["to paste:", f"  {command}", f"geometry: {result['geometry']}"]
    return result, "\n".join(lines)


def _stream(args: argparse.Namespace, folder: Any) -> tuple[Any, Any]:
    """The experiment, and where its frames come from. Waits for the first frame."""
    import sys
    import time
    from pathlib import Path

    from envs.crystfel.experiment import FRAMES_FILE, GEOMETRY_FILE, read_experiment
    from ssl2rl_ray.online.source import GrowingFolder, GrowingList

    deadline = None if args.idle_s is None else time.monotonic() + args.idle_s
    data = Path(args.data)
    for option, folder_asked in (("--data", args.data), ("--watch", args.watch)):
        if folder_asked and not Path(folder_asked).is_dir():
            raise ValueError(f"{option}: {folder_asked}: there is no such folder")
    found = sorted(data.glob("*.geom"))
    geometry = args.geometry or (found[0] if len(found) == 1 else data / GEOMETRY_FILE)
    if args.watch:
        if not Path(geometry).exists():
            raise ValueError(f"{data} has {len(found)} .geom files: name one by --geometry")
        path = folder / FRAMES_FILE
        source: Any = GrowingFolder(args.watch, geometry, path)
    else:
        path = Path(args.list) if args.list else data / FRAMES_FILE
        source = GrowingList(path, geometry)
    source.poll()
    if not source.frames:
        print(f"waiting for the first frame in {args.watch or path}", file=sys.stderr, flush=True)
    said: set[str] = set()
    while not source.frames:
        for path_, reason in source.unreadable.items():
            if reason not in said:
                print(f"{path_} cannot be read yet: {reason}", file=sys.stderr, flush=True)
        said |= set(source.unreadable.values())
        if deadline is not None and time.monotonic() >= deadline:
            raise ValueError(f"no frame has come to {args.watch or path} within {args.idle_s:g} s")
        time.sleep(args.poll_s)
        source.poll()
    experiment = read_experiment(data, geometry=args.geometry, cell=args.cell, frames=path)
    return experiment, source


def diagnose(args: argparse.Namespace, progress: Progress) -> Result:
    """``sfx diagnose``: see ``ssl2rl_ray.online.diagnose``."""
    from pathlib import Path

    import numpy as np

    from envs.crystfel.experiment import read_experiment
    from envs.crystfel.indexer import IndexerError
    from envs.crystfel.sfx.pipeline import EmbeddedIndexer
    from ssl2rl_ray.online import diagnose as diagnosing
    from ssl2rl_ray.online.picture import draw_frame

    if args.frames < 1:
        raise ValueError(f"--frames: must be 1 or more, found {args.frames}")
    experiment = read_experiment(
        args.data, geometry=args.geometry, cell=args.cell, frames=args.list
    )
    parameters = experiment.nominal.replace(**assignments(args.set))
    at = np.unique(np.linspace(0, len(experiment.frames) - 1, args.frames).astype(int))
    frames = [experiment.frames[i] for i in at]
    search = EmbeddedIndexer(experiment)
    is_embedded = args.backend == "embedded"
    indexer: Any = (
        search if is_embedded else backend(args.backend, experiment, args.processes, None)
    )
    try:
        found = diagnosing.diagnose(
            indexer, experiment, parameters, frames, search=search, on_step=progress
        )
        text = diagnosing.format_diagnosis(found, args.data)
        if args.figure:
            best = int(np.argmax(found.after.num_peaks * (1 + 1000 * found.after.is_indexed)))
            png = draw_frame(search, experiment, found.proposed, frames[best])
            Path(args.figure).write_bytes(png)
            text += f"\n{args.figure}: {frames[best]} with its peaks"
    except IndexerError as error:
        raise ValueError(str(error)) from error
    result = found.as_json() | {"figure": args.figure, "backend": args.backend}
    return result, text

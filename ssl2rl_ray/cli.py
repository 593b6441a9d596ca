"""The ``ssl2rl`` command: each subcommand parses, calls one function, prints what it returns.

Exit codes: 0 done; 1 failure; 2 a mistake in the usage, a config or the data, told in one message
without a traceback (``--debug`` shows it); 130 interrupted. Everything heavy is imported inside the
handlers, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PRESETS = ("paper", "cryorl", "leginon-2021")

# What a user can mend: our own errors are ValueErrors with a message that says how.
_USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = _parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        is_file = args.command in ("plan", "predict")
        for path in (args.json, getattr(args, "map", None), is_file and args.out):
            if path and path != "-":
                _check_can_be_written(Path(path))
        return args.handler(args) or 0
    except KeyboardInterrupt:
        hint = getattr(args, "resume_hint", None)
        print("\ninterrupted" + (f"; resume with\n  {hint}" if hint else ""), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        is_mendable = isinstance(error, _USER_ERRORS) or (
            isinstance(error, OSError) and error.errno in _NO_ROOM
        )
        kind = "" if is_mendable else f"{type(error).__name__}: "
        print(f"ssl2rl {args.command}: {kind}{error}", file=sys.stderr)
        if not is_mendable and not args.debug:
            print("this looks like a bug; `ssl2rl --debug ...` shows where", file=sys.stderr)
        return 2 if is_mendable else 1


def _import(args: argparse.Namespace) -> None:
    from ssl2rl_ray.data.commands import import_cryorl_command, import_synthetic_command

    if args.source == "cryorl":
        with _Progress() as progress:
            dataset = import_cryorl_command(
                args.labels,
                args.predictions,
                args.hierarchy,
                args.timestamps,
                args.out,
                args.calibration,
                images=args.images,
                image_size_px=args.image_size,
                force=args.force,
                on_step=progress,
            )
    else:
        dataset = import_synthetic_command(args.preset, args.seed, args.out, force=args.force)
    manifest = dataset.manifest
    counts, rejected = manifest["counts"], manifest["rejected"]
    lines = [
        f"{args.out}: " + ", ".join(f"{number} {what}" for what, number in counts.items()),
        f"content hash {manifest['content_hash']}"
        + ("; calibration stored for other sessions" if dataset.calibration else ""),
    ]
    if "images" in counts:  # by the header: their bytes need not be verified for this
        size = manifest["image_size_px"]
        lines.append(f"{counts['images']} of {counts['holes']} holes have an image, {size} px")
    if rejected["rows"]:
        by_file = ", ".join(f"{number} of {name}" for name, number in rejected["by_file"].items())
        where = Path(args.out) / "rejected.csv"
        what = "rows and images" if "images" in counts else "rows"
        lines.append(
            f"{rejected['rows']} {what} kept out ({by_file}); each with its reason in {where}"
        )
    lines += [f"note: {note}" for note in manifest["provenance"]["notes"]]
    _emit(args.json, manifest, "\n".join(lines))


def _run(args: argparse.Namespace) -> None:
    from ssl2rl_ray.config import load_config
    from ssl2rl_ray.launch import run_config

    overrides = args.set if args.seed is None else [*args.set, f"seed={args.seed}"]
    config = load_config(args.config, overrides)
    if args.resume and not args.run_dir:
        raise ValueError("--resume needs --run-dir: the folder of the run to go on with")
    folder = Path(args.run_dir or _new_run_dir(args.config))
    argv = ["ssl2rl", *args.argv]
    bar, text = _RUN_WORDS[config.kind]
    try:
        with _Progress() as progress:
            summary = run_config(
                config,
                folder,
                resume=args.resume,
                argv=argv,
                progress=bar(config, progress) if progress.is_terminal else None,
            )
    except KeyboardInterrupt:
        if (folder / "manifest.json").exists():
            again = [a for a in argv if a != "--resume"]
            again += [] if args.run_dir else ["--run-dir", str(folder)]
            args.resume_hint = shlex.join([*again, "--resume"])
        raise
    _emit(args.json, summary, text(folder.resolve(), summary))


def _policy_bar(config: Any, progress: _Progress) -> Callable[[dict[str, Any]], None]:
    def bar(row: dict[str, Any]) -> None:
        found = f"training (validation {row['validation/episode_return']:.1f})"
        progress("training", row["num_env_steps"] / config.training.num_env_steps, found)

    return bar


def _policy_text(folder: Path, summary: dict[str, Any]) -> str:
    return f"{folder}: done; `ssl2rl evaluate {folder} --data DIR` plays it"


def _classifier_bar(config: Any, progress: _Progress) -> Callable[[dict[str, Any]], None]:
    found = ""

    def bar(row: dict[str, Any]) -> None:
        nonlocal found
        if "validation/accuracy" in row:
            found = f" (validation accuracy {row['validation/accuracy']:.3f})"
        progress("training", row["epoch"] / row["num_epochs"], f"training {row['fit']}{found}")

    return bar


def _classifier_text(folder: Path, summary: dict[str, Any]) -> str:
    lines = [
        f"{summary['num_labelled']} labelled and {summary['num_unlabelled']} unlabelled holes, "
        f"judged on {summary['num_validation']} of other squares:",
        f"{'':<34}accuracy    AUC    ECE",
    ]
    for name, what in _JUDGED.items():
        if name in summary:
            accuracy, auc, ece = (_figure(summary[name][key]) for key in ("accuracy", "auc", "ece"))
            lines.append(f"{what:<34}{accuracy:>8} {auc:>6} {ece:>6}")
    if summary["is_collapsed"]:
        lines.append("warning: the classifier calls nearly all holes one thing (collapse)")
    use = f"ssl2rl predict {folder} --data DIR --out p_low_ctf.parquet"
    lines.append(f"{folder}: done; `{use}` uses it")
    return "\n".join(lines)


def _loop_bar(config: Any, progress: _Progress) -> Callable[[dict[str, Any]], None]:
    def bar(row: dict[str, Any]) -> None:
        progress("rounds", row["share"], f"{row['stage']} ({row['stage_share']:.0%})")

    return bar


def _loop_text(folder: Path, summary: dict[str, Any]) -> str:
    from ssl2rl_ray.loop.ssl2rl import format_summary

    return f"{format_summary(summary)}\n{folder}: done; `ssl2rl report {folder} --out DIR` draws it"


def _tuner_bar(config: Any, progress: _Progress) -> Callable[[dict[str, Any]], None]:
    def bar(row: dict[str, Any]) -> None:
        found = f"training (validation {row['validation/share_of_best']:.3f} of the best)"
        progress("training", row["num_env_steps"] / config.training.num_env_steps, found)

    return bar


def _tuner_text(folder: Path, summary: dict[str, Any]) -> str:
    return (
        f"{folder}: done, {summary['best_share_of_best']:.3f} of the best on simulated "
        f"experiments; `ssl2rl sfx compare --data DIR --policy {folder}` tunes with it"
    )


_RUN_WORDS: dict[str, tuple[Callable[..., Any], Callable[[Path, dict[str, Any]], str]]] = {
    "navigation": (_policy_bar, _policy_text),
    "perception": (_classifier_bar, _classifier_text),
    "ssl2rl": (_loop_bar, _loop_text),
    "crystfel": (_tuner_bar, _tuner_text),
}
"""Of each kind of run: its bar on a terminal, and what is said at its end."""
_JUDGED = {
    "classifier": "classifier",
    "calibrated": "classifier, by temperature",
    "posterior_blind": "posterior, no label in the square",
    "posterior": "posterior, with known neighbours",
}


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _new_run_dir(config: str) -> Path:
    """``runs/NAME-TIME``."""
    from datetime import datetime

    return Path("runs") / f"{Path(config).stem}-{datetime.now():%Y%m%d-%H%M%S}"


def _sweep(args: argparse.Namespace) -> int:
    from ssl2rl_ray.sweep import Event, load_sweep, plan, run_sweep

    sweep, out = load_sweep(args.sweep, args.set), Path(args.out)
    if args.dry_run:
        found = plan(sweep, out, resume=args.resume)
        width = max(map(len, found["trials"]))
        lines = [
            f"{name:<{width}}  {trial['needs']}  {trial['status']}"
            for name, trial in found["trials"].items()
        ]
        lines.append(
            f"{found['num_trials']} trials, {found['num_concurrent']} at once on the "
            f"{found['num_cpus']:g} CPUs of {found['where']}; nothing was started"
        )
        lines.append(_sweep_estimate(found["estimate"]))
        _emit(args.json, found, "\n".join(lines))
        return 0
    argv = ["ssl2rl", *args.argv]
    with _Progress() as progress:

        def on_event(event: Event) -> None:
            done = f"{event.num_finished} of {event.num_trials} finished"
            reason = f": {event.reason}" if event.reason else ""
            progress.say(f"{event.status:<11} {event.trial} ({done}){reason}")
            if progress.is_terminal:
                progress("trials", event.num_finished / event.num_trials, done)

        try:
            result = run_sweep(sweep, out, resume=args.resume, argv=argv, on_event=on_event)
        except KeyboardInterrupt:
            if (out / "sweep.yaml").exists():
                again = [a for a in argv if a != "--resume"]
                args.resume_hint = shlex.join([*again, "--resume"])
            raise
    is_done = ("finished", "stopped")
    failed = {n: t for n, t in result["trials"].items() if t["status"] not in is_done}
    done = f"{result['out']}: {result['num_finished']} of {result['num_trials']} trials finished"
    done += f", {result['num_stopped']} stopped early" * bool(result["num_stopped"])
    lines = [done if result["num_run"] else f"{done} already; nothing to do"]
    for name, trial in failed.items():
        lines.append(f"{trial['status']} {name}: {trial.get('reason', 'see its manifest.json')}")
        if args.debug and "where" in trial:
            lines.append(trial["where"].rstrip())
    _emit(args.json, result, "\n".join(lines))
    return 1 if failed else 0


def _submit(args: argparse.Namespace) -> int:
    from ssl2rl_ray.submit import (
        command_line,
        connect,
        describe,
        follow,
        how_to_go_on,
        job_of,
        submit,
    )

    job = job_of(
        args.config,
        args.out,
        overrides=args.set,
        resume=args.resume,
        num_gpus=args.num_gpus,
        python=args.python,
        archive=args.archive,
    )
    command = command_line(job, args.address)
    result: dict[str, Any] = {"archive": str(job.archive), "command": command, "out": job.out}
    talk = sys.stderr if args.json == "-" else sys.stdout
    print(describe(job), command, sep="\n", file=talk, flush=True)
    if args.dry_run:
        _emit(args.json, result, "nothing was sent")
        return 0
    client = connect(args.address)
    job_id = result["job_id"] = submit(job, client)
    print(f"job {job_id} at {args.address}", file=talk, flush=True)
    if args.no_wait:
        _emit(args.json, result, how_to_go_on(job_id, args.address))
        return 0
    try:
        result |= follow(client, job_id, lambda text: print(text, end="", file=talk, flush=True))
    except (KeyboardInterrupt, OSError) as error:
        is_left = isinstance(error, KeyboardInterrupt)
        why = "left alone" if is_left else f"out of reach ({error})"
        print(f"\n{why}, the job goes on:\n{how_to_go_on(job_id, args.address)}", file=sys.stderr)
        return 130 if is_left else 1
    _emit(args.json, result, result["message"])
    return result["exit_code"]


def _doctor(args: argparse.Namespace) -> int:
    from ssl2rl_ray.doctor import doctor, format_report

    report = doctor(args.address, storage=args.storage, num_nodes=args.nodes, python=args.python)
    _emit(args.json, report, format_report(report))
    return 1 if report["num_problems"] else 0


def _sweep_estimate(found: dict[str, Any]) -> str:
    from ssl2rl_ray.sweep.plan import in_bytes, in_minutes

    done = "by the trials that are finished"
    minutes, size = found["minutes"], found["bytes"]
    time = (
        "time not known before a trial is finished (or set tune.trial_min)"
        if minutes is None
        else f"about {in_minutes(minutes)}, " + (done if found["num_measured"] else "by trial_min")
    )
    disk = "disk not known before a trial is finished"
    if size is not None:
        disk = f"about {in_bytes(size)} of disk"
    free = in_bytes(found["bytes_free"])
    return f"{found['num_left']} left: {time}; {disk}, {free} are free"


def _evaluate(args: argparse.Namespace) -> None:
    from ssl2rl_ray.evaluate import evaluate, format_report

    if args.session_kind and not args.sessions:
        raise ValueError("--session-kind needs --sessions K: how many are to be drawn")
    if args.synthetic_preset and args.session_kind != "synthetic":
        raise ValueError("--synthetic-preset needs --session-kind synthetic")
    _note_unused_calibration(args.calibration, [args.policy, *args.against])
    with _Progress() as progress:
        report = evaluate(
            args.policy,
            data=args.data,
            preset=args.preset,
            budget_min=args.budget_min,
            num_episodes=args.episodes,
            seed=args.seed,
            calibration=args.calibration,
            num_sessions=args.sessions,
            session_kind=args.session_kind or "redrawn",
            synthetic_preset=args.synthetic_preset or "aldolase",
            against=args.against,
            allow_in_sample=args.allow_in_sample,
            on_step=progress,
        )
    _emit(args.json, report, format_report(report))


def _note_unused_calibration(calibration: str | None, policies: Sequence[str]) -> None:
    from envs.cryoem.planners import NAMES

    if calibration and not set(policies) & set(NAMES):
        print(
            "note: a trained policy has its own calibration, --calibration is not used",
            file=sys.stderr,
        )


def _report(args: argparse.Namespace) -> None:
    from ssl2rl_ray.report import check_out, format_report, report, write_report

    check_out(args.out, force=args.force)
    document = report(args.runs)
    written = write_report(document, args.out, force=args.force)
    _emit(args.json, document, f"{format_report(document)}\n{written}: open it in a browser")


def _compare(args: argparse.Namespace) -> None:
    from ssl2rl_ray.report.compare import compare
    from ssl2rl_ray.report.compare_page import check_out, format_comparison, write_comparison

    check_out(args.out, force=args.force)
    document = compare(
        args.runs,
        metric=args.metric,
        threshold=args.threshold,
        tasks=args.task,
        has_unfinished=args.unfinished,
    )
    written = write_comparison(document, args.out, force=args.force)
    _emit(args.json, document, f"{format_comparison(document)}\n{written}: open it in a browser")


def _plan(args: argparse.Namespace) -> None:
    from ssl2rl_ray.data.commands import read_calibration
    from ssl2rl_ray.data.folder import read_dataset
    from ssl2rl_ray.evaluate import contestant, rules_of
    from ssl2rl_ray.plan import as_json, draw, find_hole, make_plan, to_csv

    table = read_dataset(args.data).table
    brought = read_calibration(args.calibration) if args.calibration else None
    chosen = contestant(args.policy, brought)
    _note_unused_calibration(args.calibration, [args.policy])
    _, config = rules_of(chosen, args.preset, args.budget_min)
    plan = make_plan(
        chosen.make,
        chosen.sees(table),
        config,
        start_hole=None if args.start_hole is None else find_hole(table, args.start_hole),
        is_visited_labelled=args.visited_labelled,
        seed=args.seed,
    )
    result = as_json(plan)
    write_text(Path(args.out), to_csv(result["holes"]))
    lines = [
        f"{args.out}: {result['num_holes']} holes in {result['minutes']:g} of "
        f"{args.budget_min:g} min, {result['expected_low_ctf']:.1f} expected low-CTF",
        f"starts at {result['holes'][0]['hole']}",
    ]
    if args.map:
        write_bytes(Path(args.map), _png(draw(plan)))
        lines.append(f"map: {args.map}")
    _emit(args.json, result, "\n".join(lines))


def _predict(args: argparse.Namespace) -> None:
    from ssl2rl_ray.perception.predict import predict

    if args.out == "-":
        raise ValueError("--out: a parquet file is not for the terminal; name a file")
    with _Progress() as progress:
        result = predict(
            args.run,
            args.data,
            args.out,
            labels=args.labels,
            dataset=args.dataset,
            force=args.force,
            on_step=progress,
        )
    lines = [
        f"{args.out}: p_low_ctf of {result['num_holes']} holes, {result['num_inputs']} with "
        f"{result['input']}; {result['num_known']} labels used for their neighbours"
    ]
    if args.dataset:
        lines.append(f"{args.dataset}: the session with these probabilities, for `ssl2rl plan`")
    for name, what in (("classifier", "classifier"), ("posterior", "posterior")):
        if figures := result.get(name):
            lines.append(
                f"{what}: accuracy {_figure(figures['accuracy'])}, AUC {_figure(figures['auc'])} "
                f"on {figures['num_holes']:.0f} labelled holes that nothing was learned from"
            )
    lines += [f"note: {note}" for note in result["notes"]]
    _emit(args.json, result, "\n".join(lines))


def _sfx(args: argparse.Namespace) -> None:
    with _Progress() as progress:
        result, text = args.run(args, progress)
    _emit(args.json, result, text)


def _png(image: Any) -> bytes:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def _config_show(args: argparse.Namespace) -> None:
    from ssl2rl_ray.config import describe, load_config
    from ssl2rl_ray.schema import to_dict

    config = load_config(args.config, args.set)
    _emit(args.json, to_dict(config), describe(config).rstrip())


def _config_check(args: argparse.Namespace) -> None:
    from ssl2rl_ray.config import load_config

    config = load_config(args.config, args.set)
    result = {"config": args.config, "kind": config.kind, "is_valid": True}
    _emit(args.json, result, f"{args.config}: a valid config of kind {config.kind}")


def _demo(args: argparse.Namespace) -> None:
    from ssl2rl_ray.demo import demo, format_result

    out = Path(args.out)
    command = ["ssl2rl", *args.argv]
    args.resume_hint = shlex.join(command)
    with _Progress() as progress:
        result = demo(out, args.seed, argv=command, on_step=progress)
    result["map"] = str(out / "map.png")
    write_bytes(out / "map.png", _png(result.pop("image")))
    _emit(args.json, result, format_result(result))


class _Progress:
    """How far long work has come, on stderr: bars on a terminal, elsewhere a line now and then."""

    _SECONDS = 10.0

    def __enter__(self) -> _Progress:
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._next_line = time.monotonic() + self._SECONDS
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bars = Progress(console=Console(stderr=True), transient=True)
            self._bars.start()
        return self

    @property
    def is_terminal(self) -> bool:
        """True where bars are drawn."""
        return self._bars is not None

    def __call__(self, what: str, share: float, text: str | None = None) -> None:
        """``what`` is done to the share (0 to 1); ``text`` says more than its name."""
        if self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=1.0)
            self._bars.update(self._tasks[what], completed=share, description=text or what)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + self._SECONDS
            print(f"{text or what}: {share:.0%} done", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """A line that stays, above the bars."""
        if self._bars is not None:
            self._bars.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def __exit__(self, *_: Any) -> None:
        if self._bars is not None:
            self._bars.stop()


def _emit(json_path: str | None, result: dict[str, Any], text: str) -> None:
    """Prints the text; ``--json OUT`` writes the result too, ``--json`` prints it instead."""
    document = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if json_path == "-":
        sys.stdout.write(document)
        return
    print(text)
    if json_path:
        write_text(Path(json_path), document)


def _check_can_be_written(path: Path) -> None:
    """Raises ValueError where a result could not be written, before any work is done for it."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"cannot write {path}: {above} is a file, not a folder")
    if not os.access(above, os.W_OK):
        raise ValueError(f"cannot write {path}: the folder {above} is read-only for you")


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: under a temporary name in its folder, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _positive(kind: type[int] | type[float]) -> Any:
    """An argparse type: a finite number above zero."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a positive number, found {text!r}")
        return value

    return convert


def _names(text: str) -> tuple[str, ...]:
    """``a,b`` -> (a, b)."""
    return tuple(name for part in text.split(",") if (name := part.strip()))


def _parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    from ssl2rl_ray.online.commands import add_commands as add_online_commands
    from ssl2rl_ray.tuning.commands import add_commands

    root = argparse.ArgumentParser(
        prog="ssl2rl",
        description="Reinforcement learning beside the instrument: which hole to image next.",
    )
    root.add_argument("--version", action=_Version, help="show the version and exit")
    root.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, handler: Any, text: str, parent: Any = commands) -> Any:
        sub = parent.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(handler=handler)
        return sub

    def with_json(sub: Any) -> None:
        sub.add_argument(
            "--json",
            nargs="?",
            const="-",
            metavar="OUT",
            help="write the result as JSON to OUT too; without OUT print it instead of the text",
        )

    def with_out(sub: Any) -> None:
        sub.add_argument("--out", required=True, metavar="DIR", help="dataset folder to write")
        sub.add_argument("--force", action="store_true", help="replace an earlier dataset folder")
        with_json(sub)

    def with_rules(sub: Any) -> None:
        sub.add_argument("--data", required=True, metavar="DIR", help="dataset folder")
        sub.add_argument(
            "--preset",
            choices=PRESETS,
            help="minutes, rewards, threshold (the policy's own; cryorl for planners)",
        )
        sub.add_argument(
            "--calibration",
            metavar="TRAIN_DIR",
            help="dataset folder of another session, whose calibration the planners use "
            "(a trained policy has its own)",
        )

    sub = command("demo", _demo, "train, compare and draw on a synthetic session in minutes")
    sub.add_argument("--out", default="runs/demo", metavar="DIR", help="(%(default)s)")
    sub.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    with_json(sub)

    sub = commands.add_parser("import", help="make a dataset folder")
    kinds = sub.add_subparsers(dest="source", required=True, metavar="SOURCE")
    sub = command("cryorl", _import, "label and prediction files as CryoRL has them", kinds)
    sub.add_argument("--labels", metavar="CSV", help="name, x, y, CTF (Å), confidence")
    sub.add_argument("--predictions", metavar="TXT", help="name, predicted CTF (Å)")
    sub.add_argument("--hierarchy", metavar="CSV", help="every target of the session")
    sub.add_argument("--timestamps", metavar="CSV", help="name, time of acquisition")
    sub.add_argument(
        "--calibration",
        metavar="TRAIN_DIR",
        help="dataset folder of another session; its calibration gives the probabilities",
    )
    sub.add_argument(
        "--images", metavar="DIR", help="hole images, PNG, MRC or TIFF, each named by its hole"
    )
    sub.add_argument(
        "--image-size",
        type=_positive(int),
        metavar="PX",
        help="side of the images as kept (their own where square and at most 256, else 64)",
    )
    with_out(sub)
    sub = command("synthetic", _import, "a session drawn from the synthetic model", kinds)
    sub.add_argument(
        "--preset", default="aldolase", help="aldolase, demo, y3 or y3-mini (%(default)s)"
    )
    sub.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    with_out(sub)

    sub = command("run", _run, "train as a config says")
    sub.add_argument("config", metavar="CONFIG")
    sub.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="change a value; repeatable"
    )
    sub.add_argument("--run-dir", metavar="DIR", help="where it is kept (runs/NAME-TIME)")
    sub.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    sub.add_argument("--seed", type=int, help="the config's seed")
    with_json(sub)

    sub = command("sweep", _sweep, "train as a config says, many times over what a file varies")
    sub.add_argument("sweep", metavar="SWEEP", help="file with base, space and tune")
    sub.add_argument("--out", required=True, metavar="DIR", help="each trial is a run in it")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="change base.a.b, space.a.b or tune.a; repeatable",
    )
    sub.add_argument("--dry-run", action="store_true", help="say what would run, start nothing")
    sub.add_argument("--resume", action="store_true", help="run what is not finished yet")
    with_json(sub)

    sub = command("submit", _submit, "run or sweep on a cluster, as a Ray job")
    sub.add_argument("config", metavar="CONFIG", help="of a run or a sweep")
    sub.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"),
        metavar="URL",
        help="dashboard (%(default)s)",
    )
    sub.add_argument(
        "--out",
        metavar="DIR",
        help="which every node sees, or a name below the cluster's storage_path (NAME-TIME)",
    )
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="change a value, of a sweep base.a.b, space.a.b or tune.a; repeatable",
    )
    sub.add_argument("--resume", action="store_true", help="go on with what is in DIR")
    sub.add_argument("--num-gpus", type=float, default=0, help="of a run (%(default)s)")
    sub.add_argument("--python", default="python", help="of the nodes (%(default)s)")
    sub.add_argument(
        "--archive", metavar="ZIP", help="what is sent is kept there (runs/submitted/NAME-HASH.zip)"
    )
    sub.add_argument("--no-wait", action="store_true", help="do not follow the job")
    sub.add_argument("--dry-run", action="store_true", help="say what would be sent, send nothing")
    with_json(sub)

    sub = command("doctor", _doctor, "say whether this machine or a cluster is fit for runs")
    sub.add_argument(
        "--address", metavar="URL", help="dashboard (the cluster of RAY_ADDRESS, or this machine)"
    )
    sub.add_argument(
        "--storage", metavar="DIR", help="for results, seen by every node (storage_path)"
    )
    sub.add_argument(
        "--nodes", type=_positive(int), metavar="N", help="that there should be; waits for them"
    )
    sub.add_argument("--python", metavar="PYTHON", help="of the nodes of URL (python)")
    with_json(sub)

    sub = command("evaluate", _evaluate, "play a policy and say what it earned")
    sub.add_argument(
        "policy", metavar="POLICY", help="run directory, exported artefact, or a planner's name"
    )
    with_rules(sub)
    sub.add_argument("--budget-min", type=_positive(float), default=480.0, help="(%(default)s)")
    sub.add_argument(
        "--episodes",
        type=_positive(int),
        help="starts (50; with --sessions: in each session, 1)",
    )
    sub.add_argument("--seed", type=int, default=0, help="of starts and redrawn labels")
    sub.add_argument(
        "--sessions",
        type=_positive(int),
        metavar="K",
        help="play K sessions drawn afresh instead",
    )
    sub.add_argument(
        "--session-kind",
        choices=("redrawn", "synthetic"),
        help="DIR with its labels drawn again, or wholly synthetic ones (redrawn)",
    )
    sub.add_argument("--synthetic-preset", metavar="NAME", help="(aldolase)")
    sub.add_argument(
        "--against",
        type=_names,
        default=(),
        metavar="NAME,NAME",
        help="policies to compare with, paired on the same sessions and starts",
    )
    sub.add_argument(
        "--allow-in-sample",
        action="store_true",
        help="accept a calibration fitted on the evaluated session; recorded in the JSON",
    )
    with_json(sub)

    sub = command("report", _report, "make tables, figures and a page of runs of the loop")
    sub.add_argument(
        "runs", nargs="+", metavar="RUN", help="run of kind ssl2rl, or a folder that holds some"
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="folder for the page and all")
    sub.add_argument("--force", action="store_true", help="write beside what is there already")
    with_json(sub)

    sub = command("compare", _compare, "say which of several ways to train is better, over seeds")
    sub.add_argument(
        "runs", nargs="+", metavar="RUN", help="run, or a folder that holds some (of a sweep)"
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="folder for the page and all")
    sub.add_argument(
        "--metric", metavar="NAME", help="column of metrics.jsonl (what validation goes by)"
    )
    sub.add_argument(
        "--threshold", type=float, metavar="X", help="also say when runs first scored X"
    )
    sub.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="a.b",
        help="a setting that tells tasks apart: compare within each of its values; repeatable",
    )
    sub.add_argument(
        "--unfinished", action="store_true", help="take unfinished runs as far as they came"
    )
    sub.add_argument("--force", action="store_true", help="write beside what is there already")
    with_json(sub)

    sub = command("plan", _plan, "write the list of holes to image")
    sub.add_argument(
        "policy", metavar="POLICY", help="run directory, exported artefact, or a planner's name"
    )
    with_rules(sub)
    sub.add_argument("--budget-min", type=_positive(float), required=True)
    sub.add_argument("--out", required=True, metavar="CSV")
    sub.add_argument("--map", metavar="PNG", help="draw the tour")
    sub.add_argument("--start-hole", metavar="HOLE", help="name or row (the best prediction)")
    sub.add_argument(
        "--visited-labelled",
        action="store_true",
        help="a session under way: labelled holes are done, and what they were is known",
    )
    sub.add_argument("--seed", type=int, default=0)
    with_json(sub)

    sub = command("predict", _predict, "tell the probability of every hole from its image")
    sub.add_argument("run", metavar="RUN", help="run of kind perception, or a model folder")
    sub.add_argument(
        "--data", required=True, metavar="DIR", help="dataset folder with images (or predictions)"
    )
    sub.add_argument("--out", required=True, metavar="PARQUET")
    sub.add_argument(
        "--labels",
        choices=("data", "run", "none"),
        default="data",
        help="whose labels tell about neighbours: all of DIR, those of DIR that the run used, "
        "none (%(default)s)",
    )
    sub.add_argument(
        "--dataset",
        metavar="OUT_DIR",
        help="write DIR again with these probabilities, for evaluate and plan",
    )
    sub.add_argument("--force", action="store_true", help="replace an earlier OUT_DIR")
    with_json(sub)

    sub = commands.add_parser("sfx", help="tune the indexing of serial crystallography")
    sfx_kinds = sub.add_subparsers(dest="sfx_command", required=True, metavar="SFX_COMMAND")

    def sfx_command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = command(name, _sfx, text, sfx_kinds)
        sub.set_defaults(run=run)
        with_json(sub)
        return sub

    add_commands(sfx_command)
    add_online_commands(sfx_command)

    sub = commands.add_parser("config", help="look at a config")
    kinds = sub.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, handler, text in (
        ("show", _config_show, "print the config with every default filled in"),
        ("check", _config_check, "say whether a config is valid"),
    ):
        sub = command(name, handler, text, kinds)
        sub.add_argument("config", metavar="CONFIG")
        sub.add_argument("--set", action="append", default=[], metavar="a.b=c")
        with_json(sub)
    return root


class _Version(argparse.Action):
    """``--version``, looked up only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from ssl2rl_ray.config import own_version

        print("ssl2rl-ray", own_version())
        parser.exit()

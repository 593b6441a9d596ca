"""Sweeps whose driver, workers and nodes are killed at random moments: is a round lost or doubled?

    python benchmarks/sweep_chaos.py --sweeps 30

A Ray cluster of three nodes on this host: one for the driver, two of one CPU for trials. Of each
kind (navigation, perception, the loop of SSL²-RL) one sweep of two or three trials is left alone
and looked at. Then others of the same trials get one or two kills (SIGKILL) each: of the driver,
which is then resumed by ``ssl2rl sweep --resume``; of a worker process; of a node, in whose place a
new one comes. A moment is drawn from the time until the first trial begins (one in four), or from
the rows of metrics that the trials leave, plus a part of a second.

At the end every run directory is read, those of the loop's stages, too: each round must be there
once, and the values be those of the sweep that was left alone, times left out. (A policy's training
that was cut goes on with other episodes: of those the rounds count, not the values.)
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ssl2rl_ray.runs import RunDirectory

ROOT = Path(__file__).parents[1]
VICTIMS = ("driver", "worker", "node")
SWEEPS: dict[str, dict[str, Any]] = {
    "navigation": {
        "base": {
            "kind": "navigation",
            "sessions": {"synthetic": 1, "preset": "demo"},
            "env": {
                "preset": "cryorl",
                "budget_min": 30,
                "feature_set": "rates",
                "action_level": "patch",
            },
            "algorithm": {"hidden_sizes": [16], "batch_size": 16, "learning_starts": 100},
            "training": {
                "num_env_steps": 2_000,
                "num_envs_per_runner": 8,
                "evaluation_interval_steps": 500,
                "num_validation_sessions": 4,
            },
        },
        "space": {"seed": [0, 1, 2]},
        "tune": {"num_cpus": 1},
    },
    "perception": {
        "base": {
            "kind": "perception",
            "data": {"preset": "demo", "labelled_fraction": 0.5},
            "classifier": {"network": "cnn"},
            "training": {
                "method": "fixmatch",
                "num_epochs": 12,
                "num_folds": 0,
                "evaluation_interval_epochs": 3,
            },
        },
        "space": {"seed": [0, 1, 2]},
        "tune": {"num_cpus": 1},
    },
    "ssl2rl": {
        "base": {
            "kind": "ssl2rl",
            "data": {
                "preset": "demo",
                "labelled_fraction": 0.2,
                "validation_labelled_fraction": 0.2,
                "validation_share": 0.4,
            },
            "classifier": {"network": "cnn"},
            "pretraining": {"unlabelled_ratio": 2, "num_folds": 2},
            "finetuning": {"unlabelled_ratio": 2},
            "env": {
                "preset": "paper",
                "budget_min": 60,
                "feature_set": "rates",
                "action_level": "patch",
            },
            "algorithm": {"batch_size": 16, "learning_starts": 100},
            "rl": {
                "num_env_steps": 240,
                "num_envs_per_runner": 8,
                "num_validation_sessions": 2,
                "evaluation_interval_steps": 120,
            },
            "loop": {
                "methods": ["planner", "ssl2rl-120"],
                "num_rounds": 1,
                "durations_min": [60],
                "num_rollouts": 2,
                "num_starts": 2,
                "pretraining_steps": 6,
                "finetuning_steps": 6,
            },
        },
        "space": {"seed": [0, 1]},
        "tune": {"num_cpus": 1},
    },
}


# ---- what a sweep left ---------------------------------------------------------------------------


def without_times(value: Any) -> Any:
    """Plain values without seconds (``_s`` ends their names), moments and attempts."""
    if isinstance(value, dict):
        return {
            k: without_times(v)
            for k, v in value.items()
            if not (k in ("attempt", "time") or k.endswith("_s") or k.startswith("wall_s/"))
        }
    return [without_times(item) for item in value] if isinstance(value, list) else value


def rounds_of(run: RunDirectory) -> list[Any]:
    """The rounds in a run's metrics, in their order: epochs, validations, or the loop's."""
    rows = run.metrics()
    if "round" in rows:
        return list(zip(rows["method"], rows["round"], strict=True))
    if "epoch" in rows:
        return rows["epoch"].tolist()
    interval = run.config.training.evaluation_interval_steps  # type: ignore[union-attr]
    return (rows["num_env_steps"] // interval).tolist()  # the very step depends on the episodes


def results_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Of every run below a folder, those within runs included: its rounds, values and status."""
    found: dict[str, dict[str, Any]] = {}
    for manifest in sorted(folder.rglob("manifest.json")):
        if "session" in manifest.parts:  # a dataset of the loop
            continue
        run = RunDirectory.open(manifest.parent)
        rows = run.metrics().to_dict("records")
        found[str(manifest.parent.relative_to(folder))] = {
            "status": run.status,
            "rounds": rounds_of(run),
            "values": repr(without_times([rows, run.summary])),  # where NaN equals NaN
            "is_cut_policy": run.config.kind not in ("perception", "ssl2rl")
            and len(run.manifest["attempts"]) > 1,
        }
    return found


def leftovers(folder: Path) -> list[str]:
    """What nobody will read."""
    found = [p for p in folder.rglob("*") if p.name.startswith((".new-", "train-", ".tune"))]
    return sorted(str(p.relative_to(folder)) for p in found)


@dataclass
class Verdict:
    """What is wrong with a sweep, against one that was left alone."""

    lost: int = 0
    doubled: int = 0
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, expected: dict[str, dict[str, Any]]) -> Verdict:
        """Compares ``results_of``."""
        verdict, found = cls(), results_of(folder)
        for name in sorted(expected.keys() | found.keys()):
            if name not in found or name not in expected:
                verdict.problems.append(f"{name}: only {'here' if name in found else 'alone'}")
                verdict.lost += len(expected.get(name, {"rounds": ()})["rounds"])
                continue
            here, alone = found[name], expected[name]
            missing = Counter(alone["rounds"]) - Counter(here["rounds"])
            surplus = Counter(here["rounds"]) - Counter(alone["rounds"])
            verdict.lost += missing.total()
            verdict.doubled += surplus.total()
            if missing or surplus or here["rounds"] != alone["rounds"]:
                verdict.problems.append(f"{name}: rounds {here['rounds']}")
            if here["status"] != "finished":
                verdict.problems.append(f"{name}: {here['status']}")
            if not here["is_cut_policy"] and here["values"] != alone["values"]:
                verdict.problems.append(f"{name}: other values")
        verdict.problems += [f"left over: {name}" for name in leftovers(folder)]
        return verdict


# ---- who is killed -------------------------------------------------------------------------------


class Hosts:
    """A cluster on this host: a head without CPUs, where drivers connect, and nodes for trials."""

    def __init__(self, num_nodes: int, *, object_store_mb: int = 80) -> None:
        """Starts it; 80 MB is about the least that Ray takes."""
        from ray.cluster_utils import Cluster

        self._store_bytes = object_store_mb * 2**20
        self._folder = tempfile.mkdtemp(prefix="ray-")
        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": self._folder}
        head |= {"object_store_memory": self._store_bytes}
        with _ray_address_in(self._folder):
            self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self._new() for _ in range(num_nodes)]

    def _new(self) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=self._store_bytes)

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return self._cluster.address

    def trials(self) -> list[Any]:
        """The processes (psutil) that trials run in."""
        import ray  # noqa: F401  (brings psutil)
        import psutil  # isort: skip

        found = []
        for node in self.nodes:
            for raylet in node.all_processes["raylet"]:
                with contextlib.suppress(psutil.Error):
                    for process in psutil.Process(raylet.process.pid).children(recursive=True):
                        if "ray::ImplicitFunc" in " ".join(process.cmdline()):
                            found.append(process)
        return found

    def replace(self, number: int) -> None:
        """Kills a node; a new one comes in its place."""
        self._cluster.remove_node(self.nodes[number], allow_graceful=False)
        self.nodes[number] = self._new()

    def close(self) -> None:
        """Ends all of it."""
        with _ray_address_in(self._folder):
            self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def _ray_address_in(folder: str) -> Iterator[None]:
    """Where Ray writes and removes its note of the latest cluster on this host: not others'."""
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder
    (Path(folder) / "ray").mkdir(exist_ok=True)
    try:
        yield
    finally:
        del os.environ["RAY_TMPDIR"]
        if before is not None:
            os.environ["RAY_TMPDIR"] = before


def begin(file: Path, out: Path, address: str) -> subprocess.Popen[str]:
    """``ssl2rl sweep`` in a process group of its own; resumed where there is something."""
    words = [sys.executable, "-m", "ssl2rl_ray", "sweep", str(file), "--out", str(out)]
    words += ["--resume"] * (out / "sweep.yaml").exists()
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill(driver: subprocess.Popen[str]) -> None:
    """At once, with whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()


@dataclass(frozen=True)
class Kill:
    """Who, and when: so many seconds after so many rows of metrics are on disk."""

    victim: str
    num_rows: int
    delay_s: float


def num_rows(out: Path) -> int:
    """Rows of metrics that all runs below a folder have."""
    found = [Path(folder) for folder, _, names in os.walk(out) if "metrics.jsonl" in names]
    return sum((folder / "metrics.jsonl").read_bytes().count(b"\n") for folder in found)


def disturb(
    file: Path, out: Path, hosts: Hosts, kills: list[Kill], rng: np.random.Generator
) -> tuple[list[str], str, int | None]:
    """A sweep with kills: who was killed, what the last driver said, and its exit code."""
    done: list[str] = []
    driver = begin(file, out, hosts.address)
    for planned in kills:
        while driver.poll() is None and num_rows(out) < planned.num_rows:
            time.sleep(0.05)
        try:
            driver.wait(planned.delay_s)
            break  # it is over
        except subprocess.TimeoutExpired:
            pass
        rows = num_rows(out)
        if planned.victim == "worker":
            trials = hosts.trials()
            if not trials:
                continue
            with contextlib.suppress(Exception):  # it may have ended just now
                trials[rng.integers(len(trials))].kill()
        elif planned.victim == "node":
            hosts.replace(int(rng.integers(len(hosts.nodes))))
        else:
            kill(driver)
            driver = begin(file, out, hosts.address)
        done.append(f"{planned.victim} after {rows} rows")
    try:
        said, _ = driver.communicate(timeout=400)
        return done, said, driver.returncode
    except subprocess.TimeoutExpired:
        kill(driver)
        return done, "stuck for 400 s", None


def draw_kills(rng: np.random.Generator, most: int, rows: int, first_s: float) -> list[Kill]:
    """One in four before the first row; the others anywhere until the last."""
    kills = []
    for _ in range(int(rng.integers(1, most + 1))):
        is_early = rng.random() < 0.25
        kills.append(
            Kill(
                victim=str(rng.choice(VICTIMS)),
                num_rows=0 if is_early else int(rng.integers(1, rows)),
                delay_s=float(rng.uniform(0, first_s if is_early else 1.0)),
            )
        )
    return sorted(kills, key=lambda planned: planned.num_rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="see the top of this file")
    parser.add_argument("--sweeps", type=int, default=30, help="that are killed (%(default)s)")
    parser.add_argument("--most", type=int, default=2, help="kills of one sweep (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments (%(default)s)")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    verdicts: list[Verdict] = []
    killed: Counter[str] = Counter()
    hosts = Hosts(2)
    with tempfile.TemporaryDirectory() as scratch, contextlib.closing(hosts):
        files, alone, sizes = {}, {}, {}
        for kind, values in SWEEPS.items():
            files[kind] = Path(scratch) / f"{kind}.yaml"
            files[kind].write_text(yaml.safe_dump(values))
            out, began = Path(scratch) / f"{kind}-alone", time.perf_counter()
            driver, first_s = begin(files[kind], out, hosts.address), 0.0
            while driver.poll() is None and not first_s:
                time.sleep(0.05)
                if list(out.glob("*/manifest.json")):
                    first_s = time.perf_counter() - began
            said, _ = driver.communicate()
            if driver.returncode:
                raise RuntimeError(f"a sweep that was left alone ended with:\n{said}")
            sizes[kind] = (num_rows(out), first_s)
            alone[kind] = results_of(out)
            num = sum(len(found["rounds"]) for found in alone[kind].values())
            print(
                f"{kind} alone: {time.perf_counter() - began:.0f} s, first trial after "
                f"{first_s:.0f} s, {num} rounds in {len(alone[kind])} runs",
                flush=True,
            )
        i = 0
        while len(verdicts) < args.sweeps:
            kind = list(SWEEPS)[len(verdicts) % len(SWEEPS)]
            out, i = Path(scratch) / f"{i}", i + 1
            kills = draw_kills(rng, args.most, *sizes[kind])
            done, said, code = disturb(files[kind], out, hosts, kills, rng)
            if not done and code == 0:
                continue  # nobody was there to be killed
            killed.update(what.split()[0] for what in done)
            verdict = Verdict.of(out, alone[kind])
            if code != 0:
                verdict.problems.append(f"exit code {code}: {said[-1500:]}")
            verdicts.append(verdict)
            what = "; ".join(verdict.problems) or "complete"
            print(f"{len(verdicts):2d} {kind}: {', '.join(done)}: {what}", flush=True)
    num_complete = sum(not verdict.problems for verdict in verdicts)
    print(
        f"{num_complete} of {len(verdicts)} complete, lost {sum(v.lost for v in verdicts)}, "
        f"doubled {sum(v.doubled for v in verdicts)} rounds; {killed.total()} kills ("
        + ", ".join(f"{number} of a {victim}" for victim, number in sorted(killed.items()))
        + f"); seed {args.seed}"
    )


if __name__ == "__main__":
    main()

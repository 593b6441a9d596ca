"""The same seed gives the same result twice on one machine, for every kind of run and command.

Everything runs twice with runners of its own process: in processes with other hashes of strings,
the second time in the opposite order, so that nothing hangs on what ran before. Files are compared
as bytes, JSON and metrics without times. What is not deterministic: docs/decisions/0013.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sweep_chaos import results_of, without_times

NAVIGATION = [
    "kind=navigation",
    "sessions.synthetic=1",
    "sessions.preset=demo",
    "env.preset=cryorl",
    "env.budget_min=30",
    "env.feature_set=rates",
    "env.action_level=patch",
    "algorithm.hidden_sizes=[16]",
    "training.num_env_steps=300",
    "training.num_envs_per_runner=4",
    "training.evaluation_interval_steps=150",
    "training.num_validation_sessions=2",
    "training.num_torch_threads=1",
]
REPLAY = ["algorithm.batch_size=16", "algorithm.learning_starts=100"]
PERCEPTION = [
    "kind=perception",
    "data.preset=demo",
    "data.labelled_fraction=0.5",
    "classifier.network=cnn",
    "training.num_epochs=2",
    "compute.num_torch_threads=1",
]
TUNING = [
    "kind=crystfel",
    "env.num_steps=5",
    "env.num_frames=40",
    "experiments.pool_size=8",
    "training.num_envs=8",
    "training.num_env_steps=120",
    "training.evaluation_interval_steps=80",
    "training.num_validation_experiments=4",
    "algorithm.hidden_sizes=[16, 16]",
]
LOOP = [
    "kind=ssl2rl",
    "data.preset=demo",
    "data.labelled_fraction=0.2",
    "data.validation_labelled_fraction=0.2",
    "data.validation_share=0.4",
    "classifier.network=cnn",
    "pretraining.num_folds=2",
    "env.preset=paper",
    "env.budget_min=30",
    "env.feature_set=rates",
    "env.action_level=patch",
    *REPLAY,
    "rl.num_env_steps=200",
    "rl.evaluation_interval_steps=100",
    "rl.num_envs_per_runner=4",
    "rl.num_validation_sessions=2",
    "rl.num_torch_threads=1",
    "loop.methods=[ssl2rl-120]",
    "loop.num_rounds=1",
    "loop.durations_min=[30]",
    "loop.num_rollouts=2",
    "loop.num_starts=2",
    "loop.pretraining_steps=4",
    "loop.finetuning_steps=4",
    "compute.num_torch_threads=1",
]
RUNS = {
    "dqn": [*NAVIGATION, "algorithm.name=dqn", *REPLAY],
    "rainbow": [*NAVIGATION, "algorithm.name=rainbow", *REPLAY],
    "a2c": [*NAVIGATION, "algorithm.name=a2c"],
    "acktr": [*NAVIGATION, "algorithm.name=acktr"],
    "ppo": [*NAVIGATION, "algorithm.name=ppo"],
    "perception": [*PERCEPTION, "training.method=supervised", "training.num_folds=0"],
    "fixmatch": [*PERCEPTION, "training.method=fixmatch", "training.num_folds=2"],
    "ssl2rl": LOOP,
    "crystfel-ppo": [*TUNING, "algorithm.name=ppo"],
    "crystfel-dqn": [*TUNING, "algorithm.name=dqn", "env.action=discrete", *REPLAY],
}
COMMANDS = {
    "plan": (
        "import synthetic --preset demo --seed {seed} --out session",
        "plan lagrange --data session --seed {seed} --budget-min 60 --out plan.csv",
        "evaluate rate-index --data session --seed {seed} --budget-min 60 --sessions 2 "
        "--session-kind synthetic --synthetic-preset demo --against random --json evaluate.json",
    ),
    "sfx": (
        "sfx simulate --preset clean --frames 12 --seed {seed} --out frames",
        "sfx index --data frames --json index.json",
        "sfx compare --seeds 1 --frames 30 --budget-frames 100 --race-frames 10 --seed {seed} "
        "--against rules,gp-warm-free --json compare.json",
    ),
}
ONE_OF_A_KIND = ("dqn", "perception", "ssl2rl", "crystfel-ppo", "plan", "sfx")
PLAY = """
import json, os, sys
from pathlib import Path
from ssl2rl_ray.cli import main
from ssl2rl_ray.local_ray import local_ray

with local_ray(1):
    for folder, commands in json.load(sys.stdin):
        Path(folder).mkdir()
        os.chdir(folder)
        for words in commands:
            if main(words):
                sys.exit(f"failed: {words}")
        os.chdir("..")
"""


def commands_of(name: str, seed: int) -> list[list[str]]:
    """What is done, in a folder of its own."""
    if name in COMMANDS:
        return [line.format(seed=seed).split() for line in COMMANDS[name]]
    settings = [word for setting in RUNS[name] for word in ("--set", setting)]
    return [["run", "../empty.yaml", *settings, "--run-dir", "run", "--seed", str(seed)]]


def play(folder: Path, hash_seed: int, jobs: list[tuple[str, int]]) -> subprocess.Popen[str]:
    """Starts a process that does them one after the other, each in ``NAME-SEED/``."""
    folder.mkdir()
    (folder / "empty.yaml").write_text("{}")
    tasks = [(f"{name}-{seed}", commands_of(name, seed)) for name, seed in jobs]
    environment = {
        **os.environ,
        "PYTHONHASHSEED": str(hash_seed),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PLAY],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(tasks))
    process.stdin.close()
    process.stdin = None
    return process


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> Path:
    """Everything in ``a/`` (and with another seed, too) and ``b/``."""
    folder = tmp_path_factory.mktemp("played")
    names = [*RUNS, *COMMANDS]
    jobs = [(name, 0) for name in names] + [(name, 1) for name in ONE_OF_A_KIND]
    with (
        play(folder / "a", 1, jobs) as a,
        play(folder / "b", 2, [(name, 0) for name in reversed(names)]) as b,
    ):
        for process in (a, b):
            said, _ = process.communicate()
            assert process.returncode == 0, said[-3000:]
    return folder


def contents(folder: Path) -> dict[str, str]:
    """What each file says, by its path; of a run's records what they tell without times."""
    found = {f"run {name}": repr(run) for name, run in results_of(folder).items()}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        is_record = path.name in ("manifest.json", "metrics.jsonl", ".lock", "state.pt")
        if path.is_dir() or is_record or "tfevents" in name:
            continue
        data = path.read_bytes().replace(os.fsencode(folder), b".")
        if path.suffix == ".json":
            data = json.dumps(without_times(json.loads(data))).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", [*RUNS, *COMMANDS])
def test_the_same_seed_gives_the_same_result(played, name):
    once, again = (contents(played / part / f"{name}-0") for part in "ab")
    assert len(once) >= 3 and once == again


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_another_seed_gives_another_result(played, name):
    once, other = (contents(played / "a" / f"{name}-{seed}") for seed in (0, 1))
    results = {"run run", "plan.csv", "evaluate.json", "index.json", "compare.json"} & once.keys()
    assert results and all(once[result] != other[result] for result in results)

"""What is killed, full or read-only, and what a sweep or a run then ends as: as if it had not been.

On a real Ray of several nodes on this host. ``benchmarks/sweep_chaos.py`` kills at random moments,
many times; here each failure has its moment, awaited, not slept for.
"""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.sweep_chaos import Hosts, begin, kill, leftovers, results_of
from ssl2rl_ray.cli import main
from ssl2rl_ray.config import PerceptionRunConfig
from ssl2rl_ray.launch import run_config
from ssl2rl_ray.runs import RunDirectory
from ssl2rl_ray.sweep import load_sweep

pytestmark = pytest.mark.filterwarnings("default")

CLASSIFIER = {
    "kind": "perception",
    "data": {"preset": "demo", "labelled_fraction": 0.5},
    "classifier": {"network": "cnn"},
    "training": {
        "method": "supervised",
        "num_epochs": 60,
        "num_folds": 0,
        "evaluation_interval_epochs": 5,
    },
}
POLICY = {
    "kind": "navigation",
    "sessions": {"synthetic": 1, "preset": "demo"},
    "env": {"preset": "cryorl", "budget_min": 30, "feature_set": "rates", "action_level": "patch"},
    "algorithm": {"hidden_sizes": [16], "batch_size": 16, "learning_starts": 100},
    "training": {
        "num_env_steps": 1500,
        "num_env_runners": 1,
        "num_envs_per_runner": 8,
        "evaluation_interval_steps": 250,
        "num_validation_sessions": 2,
    },
}


def write(folder: Path, base: dict, seeds: list[int], **tune: object) -> Path:
    """A sweep file."""
    path = folder / "sweep.yaml"
    values = {"base": base, "space": {"seed": seeds}, "tune": {"num_cpus": 1, **tune}}
    path.write_text(yaml.safe_dump(values))
    return path


def await_that(is_so: Callable[[], object], driver: subprocess.Popen[str]) -> None:
    """Looks until it is so; fails where the driver ends before."""
    while not is_so():
        if driver.poll() is not None:
            raise AssertionError(f"it ended too early:\n{driver.communicate()[0]}")
        time.sleep(0.02)


def num_under_way(folder: Path) -> int:
    """Trials that run and have a checkpoint to go on from."""
    found = [RunDirectory.open(path.parent) for path in folder.glob("*/manifest.json")]
    return sum(run.status == "running" and run.latest is not None for run in found)


def plain(path: Path, folder: Path) -> dict[str, dict]:
    """Results of the same trials without sweep, cluster and failures."""
    for name, config in load_sweep(path).trials.items():
        run_config(config, folder / name, progress=lambda row: None)
    return results_of(folder)


# ---- several nodes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """A head and two nodes of one CPU, with as small an object store as Ray takes."""
    cluster = Hosts(2)
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_worker_node_and_driver_killed_one_after_the_other(hosts, tmp_path):
    """Each when a trial has a checkpoint: it goes on from there, elsewhere, and ends the same."""
    path, out = write(tmp_path, CLASSIFIER, [0, 1, 2]), tmp_path / "out"
    with begin(path, out, hosts.address) as driver:
        await_that(lambda: num_under_way(out), driver)
        hosts.trials()[0].kill()
        await_that(lambda: num_under_way(out) == 2, driver)
        hosts.replace(1)
        await_that(lambda: num_under_way(out), driver)
        kill(driver)
    with begin(path, out, hosts.address) as driver:
        said, _ = driver.communicate()
    assert driver.returncode == 0 and "3 of 3 trials finished" in said, said
    assert results_of(out) == plain(path, tmp_path / "plain")
    attempts = [len(RunDirectory.open(out / f"seed-{i}").manifest["attempts"]) for i in range(3)]
    assert sum(attempts) > 3  # a kill may hit a process whose trial has just ended
    assert not leftovers(out)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_policy_outlives_the_node_of_its_env_runner(hosts, tmp_path):
    """Its fragments pass through an object store of 80 MB; rounds are whole, values may differ."""
    path, out = write(tmp_path, POLICY, [0]), tmp_path / "out"
    with begin(path, out, hosts.address) as driver:
        await_that(lambda: num_under_way(out), driver)
        hosts.replace(0)  # the trial's or its runner's: each node holds one of them
        said, _ = driver.communicate()
    assert driver.returncode == 0, said
    (found,) = results_of(out).values()
    assert found["status"] == "finished" and found["rounds"] == list(range(7))


def test_a_cluster_that_is_gone_is_said_at_once(tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # a port that was free a moment ago
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    words = ["sweep", str(write(tmp_path, CLASSIFIER, [0])), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert f"no Ray cluster answers at RAY_ADDRESS 127.0.0.1:{port}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- storage -------------------------------------------------------------------------------------


class Disk:
    """A file system of its own, whose size and mode can be changed; needs to be root."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._mount("-t", "tmpfs", "-o", "size=64m", "tmpfs")

    def _mount(self, *words: str) -> None:
        done = subprocess.run(
            ["mount", *words, str(self.folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no file system of our own: {done.stderr.strip()}")

    def resize(self, kilobytes: int) -> None:
        self._mount("-o", f"remount,size={kilobytes}k")

    def forbid_writing(self) -> None:
        self._mount("-o", "remount,ro")

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], capture_output=True, check=False)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    """Empty, of 64 MB."""
    with contextlib.ExitStack() as stack:
        try:
            found = Disk(tmp_path / "disk")
        except FileNotFoundError:
            pytest.skip("no mount command here")
        stack.callback(found.close)
        yield found


def trial(**changes: object) -> PerceptionRunConfig:
    from ssl2rl_ray.config import from_dict

    training = {**CLASSIFIER["training"], "num_epochs": 6, "evaluation_interval_epochs": 2}
    config = from_dict({**CLASSIFIER, "training": {**training, **changes}})
    assert isinstance(config, PerceptionRunConfig)
    return config


@pytest.mark.slow
def test_wherever_a_disk_fills_up_the_run_says_so_and_goes_on_with_room(disk, tmp_path):
    config = trial(num_epochs=2, evaluation_interval_epochs=1)
    run_config(config, tmp_path / "plain", progress=lambda row: None)
    expected = results_of(tmp_path / "plain")
    used = sum(f.stat().st_size for f in (tmp_path / "plain").rglob("*") if f.is_file()) // 1024
    path, ends = disk.folder / "run", set()
    for kilobytes in (1, 16, used // 2, used - 20):
        disk.resize(kilobytes)
        with pytest.raises((OSError, ValueError), match="No space left on device") as caught:
            run_config(config, path, progress=lambda row: None)
        assert str(caught.value).count(str(path)) == 1  # where, once
        disk.resize(65536)
        is_begun = (path / "manifest.json").exists()
        ends.add(RunDirectory.open(path).latest is not None if is_begun else None)
        run_config(config, path, resume=is_begun, progress=lambda row: None)
        assert results_of(disk.folder) == {"run": expected["."]}
        assert not leftovers(path)
        subprocess.run(["rm", "-r", str(path)], check=True)
    assert ends == {None, False, True}  # before the run was there, before a checkpoint, after


def test_where_nothing_can_be_written_it_is_said_before_anything_is_trained(disk, tmp_path, capsys):
    run_config(trial(num_epochs=2), disk.folder / "run", progress=lambda row: None)
    before = results_of(disk.folder)
    mode = os.environ.get("RAY_AUTH_MODE")
    disk.forbid_writing()
    assert results_of(disk.folder) == before  # who only reads is not kept away
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CLASSIFIER))
    sweep = write(tmp_path, CLASSIFIER, [0])
    for words in (
        ["run", tmp_path / "run.yaml", "--run-dir", disk.folder / "new"],
        ["run", disk.folder / "run" / "config.yaml", "--run-dir", disk.folder / "run", "--resume"],
        ["sweep", sweep, "--out", disk.folder / "out"],
    ):
        assert main([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert "Read-only file system" in said and str(disk.folder) in said, said
    # nor does the Ray that was started for it leave its token's mode to what is started next
    assert os.environ.get("RAY_AUTH_MODE") == mode


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_sweep_whose_storage_is_full_ends_as_if_there_had_been_room(hosts, disk, tmp_path):
    base = {**CLASSIFIER, "training": {**CLASSIFIER["training"], "num_epochs": 8}}
    path, out = write(tmp_path, base, [0, 1]), disk.folder / "out"
    disk.resize(200)
    with begin(path, out, hosts.address) as driver:
        said, _ = driver.communicate()
    assert driver.returncode == 1, said
    assert "failed seed-0: " in said and "No space left on device" in said
    disk.resize(65536)
    with begin(path, out, hosts.address) as driver:
        said, _ = driver.communicate()
    assert driver.returncode == 0 and "2 of 2 trials finished" in said, said
    assert results_of(out) == plain(path, tmp_path / "plain")
    assert not leftovers(out)

"""The run directory: whole after any kill, and nobody else's files are touched."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl2rl_ray.config import NavigationRunConfig, load_config
from ssl2rl_ray.runs import RunDirectory, RunError, on_interrupt

CONFIG = NavigationRunConfig(seed=3)
ROOT = Path(__file__).parents[1]


def fill(text: str):
    return lambda folder: (folder / "weights").write_text(text)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------ a life


def test_a_run_from_begin_to_end(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one"
    with RunDirectory.create(path, CONFIG, argv=["run", "x"], data_hashes={"d": "ab"}) as run:
        assert run.status == "running" and RunDirectory.open(path).status == "running"
        assert run.latest is None and run.best is None and run.policy is None
        assert run.summary is None and run.calibration is None and run.metrics().empty
        run.log({"num_env_steps": 10, "loss": np.float32(0.5), "note": "a", "count": np.int64(2)})
        run.log({"num_env_steps": 20, "loss": math.nan, "value": math.inf})
        run.save_checkpoint(20, fill("w"), value=np.float64(1.5))
        run.write_artefact("policy", fill("old"))
        run.write_artefact("policy", fill("new"))
        run.write_calibration({"slope": np.float64(-1.0)})
        run.write_summary({"return": {"values": np.arange(3)}})
    read = RunDirectory.open(path)
    assert read.status == "finished" and read.config == CONFIG and not read.is_writer
    metrics = read.metrics()
    assert metrics["num_env_steps"].tolist() == [10, 20]
    assert metrics["loss"][0] == 0.5 and math.isnan(metrics["loss"][1])
    assert metrics["count"][0] == 2 and metrics["attempt"].tolist() == [0, 0]
    assert read.latest == read.best and read.latest is not None
    assert (read.latest / "weights").read_text() == "w"
    assert read.policy is not None and (read.policy / "weights").read_text() == "new"
    assert read.calibration == {"slope": -1.0}
    assert read.summary == {"return": {"values": [0, 1, 2]}}
    manifest = read.manifest
    assert (manifest["seed"], manifest["data_hashes"]) == (3, {"d": "ab"})
    (attempt,) = manifest["attempts"]
    assert attempt["argv"] == ["run", "x"] and attempt["started"] <= attempt["finished"]
    assert attempt["versions"]["numpy"] == np.__version__
    expected = {"config.yaml", "manifest.json", "metrics.jsonl", "checkpoints", "policy"}
    assert names(path) - {".lock"} == expected | {"calibration.json", "summary.json"}
    for write in (lambda: read.log({}), lambda: read.write_summary({})):
        with pytest.raises(RunError, match="open for reading"):
            write()


def test_how_it_ended_is_noted(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunDirectory.create(tmp_path / "a", CONFIG):
        _ = 1 / 0
    failed = RunDirectory.open(tmp_path / "a")
    assert failed.status == "failed"
    assert failed.manifest["attempts"][0]["error"] == "ZeroDivisionError: division by zero"
    with pytest.raises(KeyboardInterrupt), RunDirectory.create(tmp_path / "b", CONFIG):
        raise KeyboardInterrupt
    assert RunDirectory.open(tmp_path / "b").status == "interrupted"


# ------------------------------------------------------------ who may write


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match=r"not empty \('thesis.tex'\) and not a run"):
        RunDirectory.create(tmp_path, CONFIG)
    with pytest.raises(RunError, match="cannot make the run directory"):
        RunDirectory.create(tmp_path / "thesis.tex", CONFIG)
    for path in (tmp_path, tmp_path / "none", tmp_path / "thesis.tex"):
        with pytest.raises(RunError, match="not a run directory"):
            RunDirectory.open(path)
        with pytest.raises(RunError, match="not a run directory"):
            RunDirectory.resume(path, CONFIG)
    assert names(tmp_path) == {"thesis.tex"}


def test_a_run_is_resumed_only_as_it_was_begun(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDirectory.create(path, CONFIG, data_hashes={"d": "ab"}) as run:
        with pytest.raises(RunError, match="another process"):
            RunDirectory.resume(path, CONFIG)
        run.log({"num_env_steps": 1})
    with pytest.raises(RunError, match="--resume"):
        RunDirectory.create(path, CONFIG)
    other = load_config(None, ["seed=4", "env.preset=cryorl"])
    with pytest.raises(RunError, match=r"seed: 3, now 4\n  env.preset: 'paper', now 'cryorl'"):
        RunDirectory.resume(path, other)
    with pytest.raises(RunError, match="other data"):
        RunDirectory.resume(path, CONFIG, data_hashes={"d": "cd"})
    with RunDirectory.resume(path, CONFIG, data_hashes={"d": "ab"}, argv=["again"]) as run:
        run.log({"num_env_steps": 2})
    assert RunDirectory.open(path).metrics()["attempt"].tolist() == [0, 1]
    assert [a["argv"] for a in run.manifest["attempts"]] == [[], ["again"]]


def test_damaged_and_newer_runs_say_so(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDirectory.create(path, CONFIG) as run:
        run.write_summary({})
    (path / "summary.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        _ = RunDirectory.open(path).summary
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 9}))
    with pytest.raises(RunError, match="update ssl2rl-ray"):
        RunDirectory.open(path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="not a run directory"):
        RunDirectory.open(path)


# ------------------------------------------------------------ metrics


def test_a_half_written_row_is_left_out_and_mended(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDirectory.create(path, CONFIG) as run:
        run.log({"num_env_steps": 10})
    with (path / "metrics.jsonl").open("a") as stream:
        stream.write('{"num_env_steps": 2')
    assert RunDirectory.open(path).metrics()["num_env_steps"].tolist() == [10]
    with RunDirectory.resume(path, CONFIG) as run:
        run.log({"num_env_steps": 20})
    assert run.metrics()["num_env_steps"].tolist() == [10, 20]
    lines = (path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["num_env_steps"] for line in lines] == [10, 20]


def test_rows_that_a_resumed_run_went_over_again_are_superseded(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDirectory.create(path, CONFIG) as run:
        for steps in (10, 20, 30):
            run.log({"num_env_steps": steps})
        run.log({"event": "no steps"})
    with RunDirectory.resume(path, CONFIG) as run:
        run.log({"num_env_steps": 20})
    with RunDirectory.resume(path, CONFIG) as run:
        run.log({"num_env_steps": 40})
    rows = run.metrics().dropna(subset="num_env_steps")
    found = list(zip(rows["attempt"], rows["num_env_steps"], strict=True))
    assert found == [(0, 10), (1, 20), (2, 40)]


def test_a_row_without_its_checkpoint_gives_way_to_that_of_the_resumed_run(tmp_path: Path) -> None:
    """Killed between the two; other episodes then make the steps others: 1,041 and 1,044."""
    path = tmp_path / "run"
    with RunDirectory.create(path, CONFIG) as run:
        for steps in (0, 548):
            run.log({"num_env_steps": steps})
            run.save_checkpoint(steps, fill("x"), value=1.0)
        run.log({"num_env_steps": 1041})
    with RunDirectory.resume(path, CONFIG) as run:
        pass  # killed before its first row
    assert run.metrics()["num_env_steps"].tolist() == [0, 548]
    with RunDirectory.resume(path, CONFIG) as run:
        run.log({"num_env_steps": 1044})
    assert run.metrics()["num_env_steps"].tolist() == [0, 548, 1044]


# ------------------------------------------------------------ a disk that takes nothing more


def test_a_disk_that_takes_half_a_row_keeps_the_rows_before_it(tmp_path: Path, monkeypatch) -> None:
    """As a disk does whose last block is nearly full: a part is written, then nothing."""
    write, calls = os.write, []

    def full(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) == 1:
            return write(descriptor, data[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as caught, RunDirectory.create(tmp_path / "run", CONFIG) as run:
        run.log({"num_env_steps": 10})
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            run.log({"num_env_steps": 20})
    assert caught.value.errno == errno.ENOSPC and calls[1] == calls[0] - 7
    assert f"while writing {tmp_path / 'run'}; what is there is whole, and --resume" in str(
        caught.value
    )
    run = RunDirectory.open(tmp_path / "run")
    assert run.status == "failed" and run.metrics()["num_env_steps"].tolist() == [10]
    with RunDirectory.resume(tmp_path / "run", CONFIG) as run:
        run.log({"num_env_steps": 20})
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2


def test_where_the_manifest_cannot_be_written_the_run_is_let_go(tmp_path, monkeypatch) -> None:
    """The process may live on, as a trial's does: the lock must not."""
    path = tmp_path / "run"

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "_write_manifest", full)
        with pytest.raises(RunError, match=r"cannot write to .*No space left on device"):
            RunDirectory.create(path, CONFIG)
    with pytest.raises(ZeroDivisionError), RunDirectory.create(path, CONFIG) as run:  # begun anew
        monkeypatch.setattr(RunDirectory, "_write_manifest", full)
        _ = 1 / 0  # told, whatever becomes of the manifest
    assert not run.is_writer and RunDirectory.open(path).status == "interrupted"
    with pytest.raises(RunError, match=r"cannot write to .*No space left on device"):
        RunDirectory.resume(path, CONFIG)
    monkeypatch.undo()
    with pytest.raises(OSError, match="while writing"), RunDirectory.resume(path, CONFIG):
        monkeypatch.setattr(RunDirectory, "_write_manifest", full)
    monkeypatch.undo()
    with RunDirectory.resume(path, CONFIG):
        pass
    assert RunDirectory.open(path).status == "finished"


def test_who_only_looks_keeps_no_writer_away(tmp_path: Path) -> None:
    """A reader of the status holds the lock for a moment; a file that is not ours stays."""
    with RunDirectory.create(tmp_path / "run", CONFIG):
        pass
    reader = os.open(tmp_path / "run" / ".lock", os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    timer = threading.Timer(0.03, os.close, [reader])
    timer.start()
    with RunDirectory.resume(tmp_path / "run", CONFIG):
        pass
    timer.join()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").touch()
    with pytest.raises(RunError, match="not empty"):
        RunDirectory.create(tmp_path / "mine", CONFIG)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400), noise=st.binary(max_size=20))
def test_any_cut_of_the_metrics(
    tmp_path_factory: pytest.TempPathFactory, cut: int, noise: bytes
) -> None:
    path = tmp_path_factory.mktemp("run") / "run"
    with RunDirectory.create(path, CONFIG) as run:
        for steps in range(5):
            run.log({"num_env_steps": steps})
    data = (path / "metrics.jsonl").read_bytes()
    (path / "metrics.jsonl").write_bytes(data[:cut] + noise)
    num_whole = data[:cut].count(b"\n")
    steps = RunDirectory.open(path).metrics().get("num_env_steps", [])
    assert list(steps)[:num_whole] == list(range(num_whole))
    with RunDirectory.resume(path, CONFIG) as run:
        run.log({"num_env_steps": 99})
    assert run.metrics()["num_env_steps"].tolist()[-1] == 99


# ------------------------------------------------------------ checkpoints


def test_latest_best_and_a_bounded_number(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", CONFIG) as run:
        for steps, value in ((10, 1.0), (20, 3.0), (30, math.nan), (40, 3.0), (50, 2.0)):
            path = run.save_checkpoint(steps, fill(str(steps)), value=value)
            assert run.latest == path and (path / "weights").read_text() == str(steps)
        assert run.best is not None and (run.best / "weights").read_text() == "20"
        assert [entry["step"] for entry in run.checkpoints] == [20, 40, 50]
        assert names(tmp_path / "run" / "checkpoints") == {
            "index.json",
            *(f"step-0000000{steps}" for steps in (20, 40, 50)),
        }
        again = run.save_checkpoint(50, fill("again"), num_kept=1)  # the same steps once more
        assert run.latest == again and (again / "weights").read_text() == "again"
        assert len(run.checkpoints) == 2
        shutil.rmtree(again)  # by a user, because it was damaged
        assert run.latest == path.parent / run.checkpoints[0]["name"]


def test_a_failed_checkpoint_or_policy_leaves_the_earlier_one(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with RunDirectory.create(tmp_path / "run", CONFIG) as run:
        run.save_checkpoint(10, fill("whole"), value=1)
        run.write_artefact("policy", fill("whole"))
        for write in (
            lambda: run.save_checkpoint(20, fail),
            lambda: run.write_artefact("policy", fail),
        ):
            with pytest.raises(OSError, match="No space left"):
                write()
        assert run.latest is not None and run.policy is not None
        for path in (run.latest, run.policy):
            assert (path / "weights").read_text() == "whole"
        assert names(run.path / "checkpoints") == {"index.json", "step-000000010"}
        assert not list(run.path.glob(".new-*"))


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any
from ssl2rl_ray.config import NavigationRunConfig
from ssl2rl_ray.runs import RunDirectory

def half(folder):
    (folder / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

run = RunDirectory.create(sys.argv[1], NavigationRunConfig(seed=3))
run.log({"num_env_steps": 10})
run.save_checkpoint(10, lambda folder: (folder / "weights").write_text("whole"), value=1.0)
run.save_checkpoint(20, half)
"""


def test_a_killed_run_is_interrupted_and_can_be_resumed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    run = RunDirectory.open(path)
    assert run.status == "interrupted" and run.manifest["status"] == "running"
    assert run.latest is not None and (run.latest / "weights").read_text() == "whole"
    with RunDirectory.resume(path, CONFIG) as run:
        assert names(path / "checkpoints") == {"index.json", "step-000000010"}
        run.log({"num_env_steps": 20})
    assert RunDirectory.open(path).status == "finished"
    assert run.metrics()["num_env_steps"].tolist() == [10, 20]


def test_no_torch_and_no_ray_behind_data_config_and_runs() -> None:
    code = (
        "import sys, ssl2rl_ray.data, ssl2rl_ray.config, ssl2rl_ray.runs; "
        "assert not {'torch', 'ray', 'matplotlib'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_ctrl_c_in_the_middle_of_a_print_is_noted(monkeypatch, capfd):
    """A handler that printed would write to a stream within its own write: a RuntimeError."""

    class Terminal(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any, /) -> int:
            if not event.is_set():
                signal.raise_signal(signal.SIGINT)
            return len(data)

    stream = io.TextIOWrapper(io.BufferedWriter(Terminal()), line_buffering=True)
    monkeypatch.setattr("sys.stderr", stream)
    with on_interrupt() as event:
        print("a row of progress", file=stream, flush=True)
        assert event.is_set()
    assert "interrupted: saving a checkpoint" in capfd.readouterr().err

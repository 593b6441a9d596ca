"""The command line as a user meets it: exit codes, messages, files, Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ssl2rl_ray.cli import main, write_bytes

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "tune_configs" / "smoke_run.yaml"
HOLE = "s_00001gr_00001sq_v01_0000{patch}hl_v01_0000{hole}en-a"


def start(*argv: str | Path, **options) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "ssl2rl_ray", *map(str, argv)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **options,
    )


def call(*argv: str | Path) -> int:
    return main([str(arg) for arg in argv])


def usage(*argv: str | Path) -> int:
    """The exit code of what argparse refuses."""
    with pytest.raises(SystemExit) as exit_:
        call(*argv)
    return int(exit_.value.code or 0)


@pytest.fixture
def cryorl_files(tmp_path: Path) -> tuple[Path, Path]:
    """Labels and predictions of 12 holes, and a broken row."""
    names = [HOLE.format(patch=p, hole=h) for p in (1, 2) for h in range(1, 7)]
    labels, predictions = tmp_path / "labels.csv", tmp_path / "predictions.txt"
    rows = [f"{name},{i},{i},{4 + 6 * (i % 3 == 0)},0.9" for i, name in enumerate(names)]
    labels.write_text("\n".join([*rows, "broken,row"]) + "\n")
    predictions.write_text("".join(f"{n} {4.5 + 4 * (i % 4 == 0)}\n" for i, n in enumerate(names)))
    return labels, predictions


# ---- help ----------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from ssl2rl_ray.cli import _parser; _parser().format_help(); "
        "print(*sorted({'numpy', 'torch', 'ray', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["evaluate", "--help"]])
def test_help_and_version_answer_and_end_well(words, capsys):
    assert usage(*words) == 0
    assert capsys.readouterr().out


def test_no_command_is_a_usage_error(capsys):
    assert usage() == 2
    assert "COMMAND" in capsys.readouterr().err


# ---- import --------------------------------------------------------------------------------------


def test_import_cryorl_keeps_the_good_rows_and_names_the_bad(cryorl_files, tmp_path, capsys):
    labels, predictions = cryorl_files
    out = tmp_path / "session"
    words = ["import", "cryorl", "--labels", labels, "--predictions", predictions, "--out", out]
    assert call(*words) == 0
    said = capsys.readouterr().out
    assert "12 holes" in said and "1 rows kept out" in said
    assert "13," in (out / "rejected.csv").read_text()
    assert call(*words) == 2  # the same command again
    assert "--force" in capsys.readouterr().err
    assert call(*words, "--force", "--json") == 0
    assert json.loads(capsys.readouterr().out)["counts"]["holes"] == 12


def test_import_synthetic_is_told_apart_by_its_seed(tmp_path, capsys):
    hashes = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = ["--preset", "demo", "--seed", seed, "--out", tmp_path / name, "--json"]
        assert call("import", "synthetic", *words) == 0
        hashes.append(json.loads(capsys.readouterr().out)["content_hash"])
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\x00\xff\xfe", b"name,x,y\n"])
def test_files_without_a_single_hole_are_data_errors(tmp_path, capsys, content):
    (tmp_path / "labels.csv").write_bytes(content)
    out = tmp_path / "out"
    assert call("import", "cryorl", "--labels", tmp_path / "labels.csv", "--out", out) == 2
    error = capsys.readouterr().err
    assert "labels" in error and "Traceback" not in error
    assert not out.exists()


# ---- config --------------------------------------------------------------------------------------


def test_config_show_can_be_loaded_again(tmp_path, capsys):
    assert call("config", "show", SMOKE, "--set", "algorithm.n_step=7") == 0
    (tmp_path / "all.yaml").write_text(capsys.readouterr().out)
    assert call("config", "show", tmp_path / "all.yaml", "--json") == 0
    assert json.loads(capsys.readouterr().out)["algorithm"]["n_step"] == 7


def test_config_check_says_everything_that_is_wrong(tmp_path, capsys):
    assert call("config", "check", SMOKE) == 0
    bad = tmp_path / "bad.yaml"
    bad.write_text("env: {presett: cryorl}\ntraining: {num_env_steps: many}\n")
    assert call("config", "check", bad) == 2
    error = capsys.readouterr().err
    assert "env.presett" in error and "preset" in error and "training.num_env_steps" in error


@pytest.mark.parametrize(
    "words",
    [
        ["run", "nowhere.yaml"],
        ["run", SMOKE, "--set", "algorithm.learning_rat=1"],
        ["run", SMOKE, "--resume"],
        ["run", SMOKE, "--resume", "--run-dir", "nowhere"],
        ["run", SMOKE, "--set", "data.train=[nowhere]", "--run-dir", "RUN"],
        ["evaluate", "snowball", "--data", "nowhere"],
        ["evaluate", "snowbal", "--data", "DATA"],
        ["evaluate", "DATA", "--data", "DATA"],
        ["evaluate", "snowball", "--data", SMOKE],
        ["evaluate", "snowball", "--data", "DATA", "--session-kind", "synthetic"],
        ["evaluate", "snowball", "--data=DATA", "--sessions=2", "--synthetic-preset", "demo"],
        ["plan", "snowball", "--data", "DATA", "--budget-min", "9", "--out", "/dev/null/plan.csv"],
        ["plan", "oracle", "--data", "DATA", "--budget-min", "9", "--out", "RUN"],
        ["plan", "snowball", "--data=DATA", "--budget-min=9", "--out=RUN", "--start-hole=x"],
    ],
    ids=lambda words: " ".join(str(word) for word in words[:4]).replace(str(ROOT), ""),
)
def test_mistakes_end_with_2_and_one_message(words, demo_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"DATA": str(demo_dir), "RUN": str(tmp_path / "run")}
    for name, place in places.items():
        words = [str(word).replace(name, place) for word in words]
    assert call(*words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"ssl2rl {words[0]}: ")
    assert len(captured.err.strip().splitlines()[0]) > 20
    assert "Traceback" not in captured.err and not captured.out


@pytest.mark.parametrize("value", ["0", "-3", "nan", "inf", "much"])
def test_impossible_budgets_are_refused_at_once(value, demo_dir, capsys):
    assert usage("evaluate", "snowball", "--data", demo_dir, f"--budget-min={value}") == 2
    assert "positive number" in capsys.readouterr().err


def test_debug_shows_where(capsys):
    assert call("--debug", "evaluate", "snowball", "--data", "nowhere") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_not_blamed_on_the_user(monkeypatch, capsys):
    def broken(args):
        raise KeyError("inner")

    monkeypatch.setattr("ssl2rl_ray.cli._config_check", broken)
    assert call("config", "check", SMOKE) == 1
    assert "looks like a bug" in capsys.readouterr().err


# ---- evaluate and plan ---------------------------------------------------------------------------


def test_evaluate_prints_a_table_and_writes_json(demo_dir, tmp_path, capsys):
    out = tmp_path / "result.json"
    words = ["evaluate", "rate-index", "--data", demo_dir, "--budget-min", 60, "--episodes", 3]
    assert call(*words, "--against", "random,snowball", "--json", out) == 0
    said = capsys.readouterr().out
    assert re.search(r"^rate-index .* 0\.\d{3}", said, re.MULTILINE)
    assert all(name in said for name in ("random", "snowball", "exact optimum"))
    written = json.loads(out.read_text())
    assert call(*words, "--against", "random,snowball", "--json") == 0
    assert json.loads(capsys.readouterr().out) == written
    assert written["budget_min"] == 60 and set(written["against"]) == {"random", "snowball"}


def test_plan_writes_csv_map_and_json(demo_dir, tmp_path, capsys):
    out, picture = tmp_path / "plan.csv", tmp_path / "map.png"
    words = ["plan", "lagrange", "--data", demo_dir, "--budget-min", 30, "--out", out]
    assert call(*words, "--map", picture, "--start-hole", 0, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    lines = out.read_text().splitlines()
    assert len(lines) == 1 + len(result["holes"]) == 2 + result["num_holes"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert call(*words) == 0  # again: the file is replaced
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.png", "plan.csv"]


@pytest.mark.parametrize("option", ["--json", "--map", "--out"])
def test_where_nothing_can_be_written_nothing_is_begun(demo_dir, tmp_path, capsys, option):
    words = ["plan", "lagrange", "--data", demo_dir, "--budget-min", 30]
    words += [] if option == "--out" else ["--out", tmp_path / "plan.csv"]
    file = tmp_path / "file"
    file.touch()
    assert call(*words, option, file / "x") == 2
    assert f"{file} is a file, not a folder" in capsys.readouterr().err
    assert call(*words, option, tmp_path) == 2
    assert f"{tmp_path} is a folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]
    assert call(*words, option, tmp_path / "new" / "below" / "x") == 0  # folders are made
    assert (tmp_path / "new" / "below" / "x").stat().st_size > 0


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.csv"
    path.write_text("old")

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---- run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.train=[nowhere]"], "nowhere does not exist"),
        (["data.train=[{demo}]", "data.validation_grids=[g]"], "no grid 'g' in data.train"),
        (["data.calibration={toy}"], "cannot calibrate"),
        (["data.validation=[{toy}]"], "only one hole"),
    ],
)
def test_a_mistake_in_the_data_leaves_no_run_behind(demo_dir, tmp_path, capsys, settings, message):
    toy = tmp_path / "toy"
    labels = tmp_path / "labels.csv"
    labels.write_text(HOLE.format(patch=1, hole=1) + ",1,1,4,0.9\n")
    assert call("import", "cryorl", "--labels", labels, "--out", toy) == 0
    words = [w for s in settings for w in ("--set", s.format(demo=demo_dir, toy=toy))]
    assert call("run", SMOKE, *words, "--run-dir", tmp_path / "run") == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_the_hash_of_all_data_goes_into_the_manifest(demo_dir, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise ValueError("far enough")

    monkeypatch.setattr("ssl2rl_ray.train.train", stop)
    words = ["run", SMOKE, "--run-dir", tmp_path / "run", "--set", f"data.train=[{demo_dir}]"]
    assert call(*words) == 2
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    expected = json.loads((demo_dir / "manifest.json").read_text())["content_hash"]
    assert manifest["data_hashes"] == {str(demo_dir): expected}


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_from_start_to_plan(demo_dir, tmp_path, capsys):
    """The smoke config trains; what it leaves behind evaluates, plans, and is left alone."""
    run = tmp_path / "run"
    process = start("run", SMOKE, "--run-dir", run, "--seed", "5", "--json")
    out, err = process.communicate(timeout=110)
    assert process.returncode == 0, err
    assert json.loads(out)["num_env_steps"] >= 1000
    assert "env steps" in err and "Traceback" not in err
    assert "seed: 5" in (run / "config.yaml").read_text()
    assert list((run / "tensorboard").glob("events.*"))

    words = ["--data", demo_dir, "--budget-min", 30]
    assert call("evaluate", run, *words, "--episodes", 2, "--against", "snowball", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["policy"] == str(run) and report["preset"] == "cryorl"
    assert 0 < report["fraction_of_optimum"]["mean"] <= 1
    assert call("evaluate", run / "policy", *words, "--episodes", 2, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["episode_return"] == report["episode_return"]
    assert call("plan", run, *words, "--out", tmp_path / "plan.csv") == 0
    assert len((tmp_path / "plan.csv").read_text().splitlines()) > 2
    capsys.readouterr()
    assert call("run", SMOKE, "--run-dir", run, "--seed", 5) == 2  # the same command again
    assert "--resume" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_ctrl_c_saves_and_resume_finishes(tmp_path):
    run = tmp_path / "run"
    words = ["run", SMOKE, "--run-dir", run, "--set", "training.num_env_steps=20000"]
    process = start(*words)
    assert process.stderr is not None
    for line in process.stderr:  # the first line of progress: training is under way
        if "env steps" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    assert "resume with" in err and "--resume" in err and "Traceback" not in err
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"

    shorter = [*words[:-1], "training.num_env_steps=9000"]
    process = start(*shorter, "--resume")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "training.num_env_steps" in err  # another config: named

    process = start(*words, "--resume", "--json")
    out, err = process.communicate(timeout=110)
    assert process.returncode == 0, err
    assert json.loads(out)["num_env_steps"] >= 20000
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"

"""Sweeps: what a file says, what fits, and trials on a real local Ray that outlive their driver."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ssl2rl_ray.cli import main
from ssl2rl_ray.config import PerceptionRunConfig
from ssl2rl_ray.launch import run_config
from ssl2rl_ray.runs import RunDirectory, RunError, Stop, acquire_lock, stopped_by
from ssl2rl_ray.schema import ConfigError
from ssl2rl_ray.sweep import (
    Need,
    Room,
    Sweep,
    TuneConfig,
    load_sweep,
    need_of,
    num_concurrent,
    plan,
    run_sweep,
    trial_status,
)
from ssl2rl_ray.sweep.file import CRITERIA, rungs, trial_names
from ssl2rl_ray.sweep.folder import held
from ssl2rl_ray.sweep.halving import halving, reporter
from ssl2rl_ray.sweep.plan import check_disk, estimate, in_bytes, in_minutes
from ssl2rl_ray.sweep.points import draw
from ssl2rl_ray.sweep.room import _fitting
from ssl2rl_ray.sweep.suggest import Try, ask, best_of, config_of, told
from ssl2rl_ray.sweep.trials import _trial

BASE = {
    "kind": "perception",
    "data": {"preset": "demo", "labelled_fraction": 0.5},
    "classifier": {"network": "cnn"},
    "training": {"method": "supervised", "num_epochs": 2, "num_folds": 0},
}


def write(folder: Path, **parts) -> Path:
    """A sweep file; None leaves a part out."""
    values = {"base": BASE, "space": {"seed": [0, 1]}, "tune": {"num_cpus": 1}, **parts}
    path = folder / "asked.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return path


# ---- what a file says ----------------------------------------------------------------------------


def test_the_trials_are_all_combinations_in_order(tmp_path):
    space = {"data.labelled_fraction": [0.05, 0.1], "seed": [3, 1]}
    sweep = load_sweep(write(tmp_path, space=space))
    assert list(sweep.trials) == [
        "labelled_fraction-0.05_seed-3",
        "labelled_fraction-0.05_seed-1",
        "labelled_fraction-0.1_seed-3",
        "labelled_fraction-0.1_seed-1",
    ]
    config = sweep.trials["labelled_fraction-0.1_seed-3"]
    assert isinstance(config, PerceptionRunConfig)
    assert (config.data.labelled_fraction, config.seed) == (0.1, 3)
    assert config.training.num_epochs == 2 and config.compute.num_torch_threads == 1


def test_a_value_may_be_a_section_laid_over_that_of_the_base(tmp_path):
    space = {
        "algorithm": [{"name": "dqn", "n_step": 1}, {"name": "a2c"}, {"name": "a2c", "n_step": 5}],
        "seed": [0],
    }
    base = {"kind": "navigation", "algorithm": {"hidden_sizes": [8]}}
    sweep = load_sweep(write(tmp_path, base=base, space=space))
    assert list(sweep.trials) == [  # two of a name are told apart by their number
        "0_algorithm-dqn_seed-0",
        "1_algorithm-a2c_seed-0",
        "2_algorithm-a2c_seed-0",
    ]
    found = [trial.algorithm for trial in sweep.trials.values()]  # type: ignore[union-attr]
    assert [(a.name, a.n_step) for a in found] == [("dqn", 1), ("a2c", None), ("a2c", 5)]
    assert all(a.hidden_sizes == (8,) for a in found)
    space["algorithm"].pop()
    sweep = load_sweep(write(tmp_path, base=base, space=space))
    assert list(sweep.trials) == ["algorithm-dqn_seed-0", "algorithm-a2c_seed-0"]
    assert base == {"kind": "navigation", "algorithm": {"hidden_sizes": [8]}}


def test_the_base_may_be_a_file_beside_the_sweep(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    path = write(tmp_path / "below", base="../base.yaml")
    (tmp_path / "here").mkdir()
    in_place = load_sweep(write(tmp_path / "here"))
    assert load_sweep(path) == in_place


def test_overrides_reach_all_three_parts(tmp_path):
    overrides = ["base.training.num_epochs=5", "space.training.learning_rate=[0.1, 1e-3]"]
    overrides += ["space.seed=[4]", "tune.max_concurrent=1", "tune.num_cpus=2"]
    sweep = load_sweep(write(tmp_path), overrides)
    assert list(sweep.trials) == ["seed-4_learning_rate-0.1", "seed-4_learning_rate-0.001"]
    assert all(c.training.num_epochs == 5 for c in sweep.trials.values())
    assert (sweep.tune.max_concurrent, sweep.tune.num_cpus) == (1, 2)


@pytest.mark.parametrize(
    ("num_cpus", "base_threads", "space", "threads", "cpus"),
    [
        (3, 1, {"seed": [0]}, 3, 3),  # the base's threads follow the trial's CPUs
        (None, 1, {"seed": [0]}, 1, 1),  # and the other way round
        (2, 2, {"compute.num_torch_threads": [1]}, 1, 2),  # what is varied on purpose stands
    ],
)
def test_threads_and_cpus_agree(tmp_path, num_cpus, base_threads, space, threads, cpus):
    base = {**BASE, "compute": {"num_torch_threads": base_threads}}
    sweep = load_sweep(write(tmp_path, base=base, space=space, tune={"num_cpus": num_cpus}))
    (config,) = sweep.trials.values()
    assert isinstance(config, PerceptionRunConfig)
    assert config.compute.num_torch_threads == threads
    assert need_of(config, sweep.tune).num_cpus == cpus


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"bases": {}}, "bases: unknown key; a sweep has base, space, tune"),
        ({"base": None}, "base: expected a config"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
        ({"space": None}, "for a single run there is `ssl2rl run`"),
        ({"space": {}}, "space: expected lines"),
        ({"space": [1]}, "space: expected lines"),
        ({"space": {"seed": 3}}, "space.seed: expected a list of values"),
        ({"space": {"seed": []}}, "space.seed: expected a list of values"),
        ({"space": {"seed": [1, 1]}}, "space.seed: a value is there twice"),
        (
            {"space": {"data.preset": ["demo"], "data": [{"preset": "demo"}]}},
            "space.data.preset: data.preset is varied by space.data, too",
        ),
        ({"space": {"seed": [{"of": 1}]}}, "every trial: seed: expected"),
        ({"space": {"seed": list(range(10_001))}}, "10001 combinations"),
        ({"space": {"kind.of": [1]}}, "every trial: space.kind.of: kind is not a section"),
        ({"space": {"training.num_epoch": [1, 2]}}, "every trial: training.num_epoch: unknown"),
        (
            {"space": {"compute.num_torch_threads": [1, 4]}, "tune": {"num_cpus": 2}},
            "num_torch_threads-4: compute.num_torch_threads: 4 is more than tune.num_cpus 2",
        ),
        ({"tune": {"num_cpu": 1}}, "tune.num_cpu: unknown key; did you mean tune.num_cpus"),
        ({"tune": {"num_cpus": 0}}, "tune.num_cpus: must be above 0"),
        ({"tune": {"num_gpus": -1}}, "tune.num_gpus: must be 0 or more"),
        ({"tune": 3}, "tune: expected a section"),
    ],
)
def test_mistakes_are_named(tmp_path, parts, message):
    with pytest.raises(ConfigError) as caught:
        load_sweep(write(tmp_path, **parts))
    assert message in str(caught.value)


def test_all_problems_of_all_trials_are_told_at_once(tmp_path):
    space = {"data.labelled_fraction": [0.1, 2, -1], "seed": [0, -1]}
    with pytest.raises(ConfigError) as caught:
        load_sweep(write(tmp_path, space=space))
    assert set(caught.value.problems) == {
        "labelled_fraction-0.1_seed--1, labelled_fraction-2_seed--1, labelled_fraction--1_seed--1: "
        "seed: must be 0 or more and below 2**32, found -1",
        "labelled_fraction-2_seed-0, labelled_fraction-2_seed--1: "
        "data.labelled_fraction: must be at most 1, found 2.0",
        "labelled_fraction--1_seed-0, labelled_fraction--1_seed--1: "
        "data.labelled_fraction: must be above 0, found -1.0",
    }


@pytest.mark.parametrize("override", ["training.num_epochs=1", "seed=1", "base", "space=3"])
def test_an_override_of_nothing_is_refused(tmp_path, override):
    with pytest.raises(ConfigError, match=r"expected (base\.a\.b=value|a\.b=value)"):
        load_sweep(write(tmp_path), [override])


names = st.lists(
    st.sampled_from(["seed", "a.b", "c.b", "a.c.b", "training.x"]), min_size=1, unique=True
)
words = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(-9, 9), st.text(max_size=80))


@given(names.flatmap(lambda keys: st.fixed_dictionaries(dict.fromkeys(keys, words))), st.data())
def test_names_of_trials_are_different_names_of_folders(point, data):
    other = {key: data.draw(words) for key in point}
    points = [point] if list(map(repr, point.values())) == list(map(repr, other.values())) else [
        point, other
    ]  # fmt: skip
    found = trial_names(points)
    assert len(set(found)) == len(points)
    for name in found:
        assert name and "/" not in name and not name.startswith((".", "-"))
        assert len(name.encode()) <= 200 and name.isascii()


def test_names_say_as_much_as_they_need():
    points = [{"data.preset": "y3 mini", "sessions.preset": None}]
    assert trial_names(points) == ["data.preset-y3-mini_sessions.preset-null"]
    assert trial_names([{"x": [1, 2]}, {"x": []}, {"x": "runs/a"}]) == [
        "x-1-2",
        "x-none",
        "x-runs-a",
    ]
    assert trial_names([{"x": "a/b"}, {"x": "a-b"}]) == ["0_x-a-b", "1_x-a-b"]


# ---- points that are not all combinations --------------------------------------------------------

SPACE = {
    "training.learning_rate": {"loguniform": [1e-4, 1e-1]},
    "training.weight_decay": {"uniform": [0, 0.01]},
    "training.num_epochs": {"randint": [1, 3]},
    "data.labelled_fraction": {"choice": [0.1, 0.5]},
}
DRAWN = {"search": "random", "num_samples": 12, "num_cpus": 1}


def test_random_points_are_the_same_for_a_seed_and_first_ones_of_more(tmp_path):
    def points(**changes) -> list[tuple[float, float, int, float]]:
        trials = load_sweep(write(tmp_path, space=SPACE, tune={**DRAWN, **changes})).trials
        return [
            (
                trial.training.learning_rate,
                trial.training.weight_decay,
                trial.training.num_epochs,
                trial.data.labelled_fraction,
            )
            for trial in trials.values()
        ]  # type: ignore[union-attr]

    found = points()
    assert len(set(found)) == 12 and found == points() == points(seed=0)
    assert points(num_samples=40)[:12] == found and points(seed=1) != found
    assert {n for _, _, n, _ in points(num_samples=40)} == {1, 2, 3}  # both ends
    for rate, decay, _, fraction in found:
        assert 1e-4 <= rate <= 1e-1 and 0 <= decay <= 0.01 and fraction in (0.1, 0.5)
        assert float(f"{rate:.4g}") == rate  # what the name says is what is run


def test_lists_are_run_in_full_beside_what_is_drawn(tmp_path):
    space = {"training.learning_rate": {"loguniform": [0.01, 0.1]}, "seed": [0, 1, 2]}
    sweep = load_sweep(write(tmp_path, space=space, tune={**DRAWN, "num_samples": 2}))
    rates = [trial.training.learning_rate for trial in sweep.trials.values()]  # type: ignore[union-attr]
    assert [trial.seed for trial in sweep.trials.values()] == [0, 1, 2, 0, 1, 2]
    assert len(set(rates)) == 2 and rates[0] == rates[1] == rates[2]
    assert next(iter(sweep.trials)) == f"seed-0_learning_rate-{rates[0]}"


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(0, 99))
def test_drawn_numbers_stay_within_their_ends(low, width, seed):
    high = low + width
    if low < high:
        points = draw({"a": {"uniform": [low, high]}}, 1, seed)
        assert low <= points[0]["a"] <= high


@pytest.mark.parametrize(
    ("space", "tune", "message"),
    [
        (SPACE, {}, "space.training.learning_rate: a distribution is drawn from by tune.search"),
        ({"seed": [0]}, DRAWN, "search random draws from distributions, and here are only lists"),
        (SPACE, {"search": "random"}, "tune.num_samples: says how many points"),
        ({"seed": [0]}, {"num_samples": 3}, "tune.num_samples: is of search random and optuna"),
        ({"seed": [0]}, {"seed": 3}, "tune.seed: is of search random and optuna"),
        (
            {"seed": [0]},
            {"metric": "x"},
            "tune.metric: is read by search optuna and scheduler asha",
        ),
        ({"seed": [0]}, {"grace": 1}, "tune.grace: is of scheduler asha"),
        ({"seed": [0]}, {"scheduler": "pbt"}, "tune.scheduler: pbt is not offered"),
        ({"seed": [0]}, {"scheduler": "asha", "grace": 2}, "tune.grace: 2, and no trial is longer"),
        ({"seed": [0]}, {"scheduler": "asha", "reduction_factor": 1}, "must be 2 or more"),
        ({"seed": [0]}, {"search": "hyperband"}, "expected one of grid, random, optuna"),
        ({"seed": [0]}, {**DRAWN, "search": "optuna"}, "write {choice: [...]}"),
        ({"seed": {"randint": [0, 3]}}, DRAWN, "hardly more than 4 different points"),
        ({"seed": {"randint": [0.5, 3]}}, DRAWN, "randint: expected two whole numbers"),
        ({"seed": {"randint": [3, 3]}}, DRAWN, "randint: expected two whole numbers [low, high]"),
        ({"seed": {"uniform": [0]}}, DRAWN, "uniform: expected two numbers [low, high]"),
        ({"seed": {"loguniform": [0, 1]}}, DRAWN, "loguniform: must be above 0"),
        ({"seed": {"normal": [0, 1]}}, DRAWN, "one of uniform, loguniform, randint, choice"),
        ({"seed": {"choice": []}}, DRAWN, "choice: expected a list"),
        ({"seed": {"choice": [1, 1]}}, DRAWN, "a value is there twice"),
        (
            {"compute.num_workers": {"randint": [0, 2]}},
            {**DRAWN, "search": "optuna"},
            "says what a trial needs",
        ),
        (
            {"data.labelled_fraction": {"uniform": [0.5, 2]}},
            {**DRAWN, "search": "optuna"},
            "at data.labelled_fraction 2: data.labelled_fraction: must be at most 1",
        ),
        ({".": [1]}, {}, "space..: each value is laid over the whole base: expected sections"),
        ({".": [{"seed": 1}], "seed": [2]}, {}, "space.seed: seed is varied by space.., too"),
    ],
)
def test_what_makes_no_sense_together_is_refused(tmp_path, space, tune, message):
    with pytest.raises(ConfigError) as caught:
        load_sweep(write(tmp_path, space=space, tune=tune))
    assert message in str(caught.value)


def test_without_optuna_another_search_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ssl2rl-ray\[bo\]', or search random"):
        load_sweep(write(tmp_path, space=SPACE, tune={**DRAWN, "search": "optuna"}))


def test_a_loop_has_no_single_curve(tmp_path):
    path = write(tmp_path, base={"kind": "ssl2rl"}, tune={"scheduler": "asha"})
    with pytest.raises(ConfigError, match="kind ssl2rl has one for each of its methods"):
        load_sweep(path)
    space = {"finetuning.learning_rate": {"loguniform": [1e-3, 1e-2]}}
    tune = {**DRAWN, "search": "optuna"}
    path = write(tmp_path, base={"kind": "ssl2rl"}, space=space, tune=tune)
    with pytest.raises(ConfigError, match=r"tune\.metric: kind ssl2rl has several criteria"):
        load_sweep(path)
    assert len(load_sweep(path, ["tune.metric=selection/accuracy"]).trials) == 12


def test_choices_of_several_settings_have_names(tmp_path):
    few = {"data": {"labelled_fraction": 0.1}, "training": {"num_epochs": 1}}
    space = {".": [few, {}, {"name": "much of it", "seed": 7}], "training.momentum": [0.8]}
    trials = load_sweep(write(tmp_path, space=space)).trials
    assert list(trials) == [
        "data-labelled_fraction-0.1_training-num_epochs-1_momentum-0.8",
        "none_momentum-0.8",
        "much-of-it_momentum-0.8",
    ]
    assert [trial.seed for trial in trials.values()] == [0, 0, 7]
    first = next(iter(trials.values()))
    assert isinstance(first, PerceptionRunConfig)
    assert (first.data.labelled_fraction, first.data.preset) == (0.1, "demo")


def test_a_base_may_be_layers_and_that_of_another_sweep(tmp_path):
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"base": BASE, "space": {"seed": [9]}}))
    layers = ["other.yaml", {"training": {"num_epochs": 7}}]
    config = load_sweep(write(tmp_path, base=layers)).trials["seed-1"]
    plain = load_sweep(write(tmp_path), ["base.training.num_epochs=7"]).trials["seed-1"]
    assert config == plain
    with pytest.raises(ConfigError, match="is a sweep whose base is this one"):
        load_sweep(write(tmp_path, base="asked.yaml"))
    with pytest.raises(ConfigError, match="base: expected a config"):
        load_sweep(write(tmp_path, base=["other.yaml", 3]))


def test_each_command_names_the_other(tmp_path, capsys):
    path = write(tmp_path)
    assert main(["run", str(path)]) == 2
    assert f"`ssl2rl sweep {path} --out DIR`" in capsys.readouterr().err
    path.write_text(yaml.safe_dump(BASE))
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    assert f"`ssl2rl run {path}`" in capsys.readouterr().err


# ---- points that are asked for -------------------------------------------------------------------


def tried(point: dict, value: float | None) -> Try:
    return Try(point=point, value=value)


def test_optuna_goes_where_values_are_high():
    space = {"x": {"uniform": [0, 10]}, "y": {"choice": ["bad", {"is": "good"}]}}
    tries: list[Try] = []
    for number in range(40):
        point = ask(space, tries, (0, number), mode="max")
        tries.append(tried(point, -abs(point["x"] - 7) - 5 * (point["y"] == "bad")))
    late = [known.point for known in tries[25:]]
    assert sum(abs(point["x"] - 7) < 1.5 for point in late) >= 10  # by chance: 4 or 5 of 15
    assert sum(point["y"] != "bad" for point in late) >= 10
    low = [tried(known.point, -known.value if known.value else 0) for known in tries]
    assert ask(space, tries, (0, 99), mode="max") == ask(space, low, (0, 99), mode="min")


def test_an_answer_depends_on_what_is_known_alone():
    space = {"n": {"randint": [1, 1000]}, "choice": {"choice": [1, True, None, [2]]}}
    tries = [tried({"n": 3, "choice": True}, 0.5), tried({"n": 9, "choice": [2]}, None)]
    asked = ask(space, tries, (1, 2), mode="max")
    assert asked == ask(space, tries, (1, 2), mode="max") != ask(space, tries, (1, 3), mode="max")
    assert ask(space, [*tries, tried(asked, None)], (1, 2), mode="max") is not None


def optuna_folder(tmp_path: Path) -> tuple[Sweep, Path]:
    """A search of which one trial is finished, one has failed, one was killed, none is run."""
    space = {"algorithm.learning_rate": {"loguniform": [1e-4, 1e-2]}}
    tune = {"search": "optuna", "num_samples": 4, "scheduler": "asha"}
    sweep = load_sweep(write(tmp_path, base={"kind": "navigation"}, space=space, tune=tune))
    out = tmp_path / "out"
    out.mkdir()
    for i, status in enumerate(["finished", "failed", "interrupted"]):
        config = config_of(sweep, out, f"trial-{i}")
        with (
            contextlib.suppress(RuntimeError, KeyboardInterrupt),
            RunDirectory.create(out / f"trial-{i}", config) as run,
        ):
            for step, value in ((0, 90.0), (100, 10.0 + i), (300, 5.0 + i)):
                run.log({"num_env_steps": step, "validation/episode_return": value})
            if status != "finished":
                raise RuntimeError if status == "failed" else KeyboardInterrupt
    return sweep, out


def test_a_point_is_on_disk_before_its_trial_begins_and_stays(tmp_path):
    sweep, out = optuna_folder(tmp_path)
    before = {path.name: path.read_bytes() for path in (out / "points").glob("*.json")}
    assert sorted(before) == ["trial-0.json", "trial-1.json", "trial-2.json"]
    for name in ("trial-0", "trial-1", "trial-2"):
        config = config_of(sweep, out, name)
        assert config == RunDirectory.open(out / name).config
        point = json.loads(before[f"{name}.json"])
        assert point == {"algorithm.learning_rate": config.algorithm.learning_rate}  # type: ignore[union-attr]
    assert {path.name: path.read_bytes() for path in (out / "points").glob("*.json")} == before
    assert best_of(out / "trial-0", "validation/episode_return", "max") == 10  # not the untrained
    assert best_of(out / "trial-0", "validation/episode_return", "min") == 5
    config = config_of(sweep, out, "trial-0")
    with RunDirectory.create(tmp_path / "diverged", config) as run:
        run.log({"num_env_steps": 100, "validation/episode_return": float("nan")})
    assert best_of(run.path, "validation/episode_return", "max") is None


def test_where_trials_fail_is_not_asked_again():
    """Of two choices one always fails; forgotten, it would be asked for 17 to 20 times of 20."""
    space = {"x": {"uniform": [0, 1]}, "kind": {"choice": ["fails", "works"]}}
    tries: list[Try] = []
    for number in range(40):
        point = ask(space, tries, (0, number), mode="max")
        tries.append(tried(point, None if point["kind"] == "fails" else point["x"]))
    assert sum(known.point["kind"] == "fails" for known in tries[20:]) <= 8


def test_a_finished_trial_without_the_metric_is_told(tmp_path):
    sweep, out = optuna_folder(tmp_path)
    tune = dataclasses.replace(sweep.tune, metric="validation/episode_retrun")
    with pytest.raises(ValueError, match="the metrics of trial-0 have no 'validation/episode_retr"):
        config_of(dataclasses.replace(sweep, tune=tune), out, "trial-3")


# ---- who is behind -------------------------------------------------------------------------------


def halving_sweep(tmp_path: Path, num_trials: int) -> Sweep:
    base = {"kind": "navigation", "training": {"num_env_steps": 9_000}}
    space = {"seed": list(range(num_trials))}
    return load_sweep(write(tmp_path, base=base, space=space, tune={"scheduler": "asha"}))


def told_to_stop(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("stop-*"))


def test_those_behind_at_a_rung_are_told_to_stop(tmp_path):
    """By hand: rungs at 1000 and 3000 steps, where the best third of those that came goes on."""
    sweep = halving_sweep(tmp_path, 5)
    assert rungs(sweep) == (1000, 3, 9000)
    scheduler = halving(sweep, tmp_path / "out", tmp_path / "stop")

    def report(seed: int, step: float, value: float) -> list[str]:
        trial = SimpleNamespace(trial_id=f"any-{seed}", config={"trial": f"seed-{seed}"})
        assert scheduler.on_trial_result(None, trial, {"step": step, "value": value}) == "CONTINUE"
        return told_to_stop(tmp_path)

    assert report(0, 500, 1.0) == []  # before the first rung
    assert report(0, 1000, 5.0) == []  # the first one to come
    assert report(1, 1000, 4.0) == ["stop-seed-1"]
    assert report(2, 1200, 6.0) == ["stop-seed-1"]  # the first look behind the rung counts
    assert report(3, 1000, 5.2) == ["stop-seed-1", "stop-seed-3"]  # two thirds of 4, 5, 6: 5.33
    assert report(0, 3000, 5.5) == ["stop-seed-1", "stop-seed-3"]
    assert report(2, 3000, 5.4) == ["stop-seed-1", "stop-seed-2", "stop-seed-3"]
    scheduler.on_trial_result(None, SimpleNamespace(config={"trial": "seed-0"}), {"status": "x"})
    assert report(0, 9000, 0.0) == [
        "stop-seed-1",
        "stop-seed-2",
        "stop-seed-3",
    ]  # no rung at the end


def test_a_trial_that_is_complete_is_not_stopped(tmp_path):
    """Its last look is the first behind a rung: what the rung says comes too late."""
    sweep = halving_sweep(tmp_path, 2)
    scheduler = halving(sweep, tmp_path / "out", tmp_path / "stop")
    for seed, step, value in ((0, 9000, 5.0), (1, 9010, 4.0)):
        trial = SimpleNamespace(config={"trial": f"seed-{seed}"})
        scheduler.on_trial_result(None, trial, {"step": step, "value": value})
    assert told_to_stop(tmp_path) == []


def test_a_resumed_sweep_remembers_the_rungs(tmp_path):
    sweep, out = halving_sweep(tmp_path, 3), tmp_path / "out"
    for seed, value in ((0, 5.0), (1, 4.0)):
        with (
            contextlib.suppress(KeyboardInterrupt),
            RunDirectory.create(out / f"seed-{seed}", sweep.trials[f"seed-{seed}"]) as run,
        ):
            run.log({"num_env_steps": 1000, "validation/episode_return": value})
            raise KeyboardInterrupt
    scheduler = halving(sweep, out, tmp_path / "stop")
    assert told_to_stop(tmp_path) == ["stop-seed-1"]  # as it was decided before the kill
    trial = SimpleNamespace(config={"trial": "seed-2"})
    scheduler.on_trial_result(None, trial, {"step": 1000, "value": 4.5})
    assert told_to_stop(tmp_path) == ["stop-seed-1", "stop-seed-2"]
    stopping = Stop()
    reporter(sweep, tmp_path / "stop", "seed-1", stopping)
    assert stopping.is_set() and stopping.status == "stopped"


def test_a_stopped_trial_is_complete_and_not_run_again(tmp_path):
    sweep, out = halving_sweep(tmp_path, 2), tmp_path / "out"
    stopping = Stop()
    stopping.status = "stopped"
    with held(sweep, out):
        pass
    for name, config in sweep.trials.items():
        with (
            contextlib.suppress(KeyboardInterrupt),
            stopped_by(stopping),
            RunDirectory.create(out / name, config) as run,
        ):
            if name == "seed-1":
                raise KeyboardInterrupt
            run.write_summary({})
    result = run_sweep(sweep, out, resume=True)
    assert (result["num_run"], result["num_finished"], result["num_stopped"]) == (0, 1, 1)
    assert result["trials"]["seed-1"] == {"run": str(out / "seed-1"), "status": "stopped"}


def test_what_counts_of_a_row():
    metric = "validation/accuracy"
    assert told({"epoch": 3, metric: 0.5, "time": "now"}, metric) == (3.0, 0.5, "now")
    for row in (
        {"epoch": 3},
        {"epoch": 0, metric: 0.5},  # nothing learned yet
        {"epoch": 3, metric: None},
        {"epoch": 3, metric: float("nan")},
        {"epoch": 3, metric: 0.5, "fit": "fold-0"},
    ):
        assert told(row, metric) is None


def test_criteria_are_what_runs_are_compared_by():
    from ssl2rl_ray.report import compare

    assert {kind: asked.metric for kind, asked in compare._KINDS.items()} == CRITERIA


# ---- what fits -----------------------------------------------------------------------------------


def room(*node_cpus: float, num_gpus: float = 0) -> Room:
    return Room(where="here", node_cpus=node_cpus, num_gpus=num_gpus)


def sweep_of(tmp_path: Path, base: dict, **tune) -> Sweep:
    return load_sweep(write(tmp_path, base=base, space={"seed": list(range(8))}, tune=tune))


def test_inner_workers_count(tmp_path):
    train = {**BASE, "compute": {"num_workers": 2, "num_torch_threads": 3}}
    sweep = sweep_of(tmp_path, train, num_cpus=1)
    need = need_of(sweep.trials["seed-0"], sweep.tune)
    assert (need.num_cpus, need.num_worker_cpus, need.total_cpus) == (1, 2, 3)
    assert num_concurrent(sweep, room(8)) == 2  # 3 would hold 9 CPUs: Train would wait for ever
    runners = {"kind": "navigation", "training": {"num_env_runners": 3, "num_torch_threads": 2}}
    sweep = sweep_of(tmp_path, runners)
    assert need_of(sweep.trials["seed-0"], sweep.tune).total_cpus == 5
    assert num_concurrent(sweep, room(16)) == 3


def test_as_many_at_once_as_fit_and_as_asked(tmp_path):
    assert num_concurrent(sweep_of(tmp_path, BASE, num_cpus=1), room(4)) == 4
    assert num_concurrent(sweep_of(tmp_path, BASE, num_cpus=1), room(64)) == 8
    assert num_concurrent(sweep_of(tmp_path, BASE, num_cpus=1, max_concurrent=3), room(64)) == 3
    shared = sweep_of(tmp_path, BASE, num_cpus=1, num_gpus=0.5)
    assert num_concurrent(shared, room(64, num_gpus=2)) == 4


@pytest.mark.parametrize(
    ("num_workers", "threads", "nodes", "expected"),
    [
        (1, 1, (2,), 1),
        (1, 1, (2, 2), 2),
        (1, 3, (4, 4), 2),  # 4 CPUs each; one trial on each node leaves 3 there
        (1, 2, (3, 3), 2),
        (1, 4, (5, 5, 5), 3),
        (2, 2, (3, 3), 1),  # two places, which a trial leaves
        (1, 3, (3, 3), 1),  # a trial takes one of two places
        (3, 3, (5, 5), None),  # 10 CPUs in all, but only two places of 3
        (2, 3, (4, 4), 1),
        (2, 3, (4, 3), None),  # a trial on the second node leaves one place of the two
    ],
)
def test_workers_find_a_place_wherever_the_trials_are(
    tmp_path, num_workers, threads, nodes, expected
):
    base = {**BASE, "compute": {"num_workers": num_workers}}
    base["training"] = {**BASE["training"], "batch_size": 6}
    space = {"seed": list(range(8)), "compute.num_torch_threads": [threads]}
    path = write(tmp_path, base=base, space=space, tune={"num_cpus": 9})
    sweep = load_sweep(path)  # threads that are varied stand
    sweep = dataclasses.replace(sweep, tune=TuneConfig(num_cpus=1))
    if expected is None:
        with pytest.raises(ValueError, match="CPUs may not hold them beside it"):
            num_concurrent(sweep, room(*nodes))
    else:
        assert num_concurrent(sweep, room(*nodes)) == expected


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 2),
    st.data(),
)
def test_no_placing_of_trials_starves_all_workers(nodes, threads, num_workers, data):
    """Against every placing that chance finds: a group of workers fits beside those admitted."""
    need = Need(
        num_cpus=1, num_gpus=0, num_runners=0, num_workers=num_workers,
        cpus_per_worker=threads, device="cpu",
    )  # fmt: skip
    try:
        admitted = _fitting(need, "a", room(*nodes))
    except ValueError:
        return
    free = list(nodes)
    for _ in range(admitted):
        free[data.draw(st.sampled_from([i for i, cpus in enumerate(free) if cpus]))] -= 1
    assert sum(cpus // threads for cpus in free) >= num_workers


def test_workers_on_gpus_count(tmp_path):
    base = {**BASE, "compute": {"num_workers": 2}}
    sweep = sweep_of(tmp_path, base, num_cpus=1)
    assert num_concurrent(sweep, room(64, num_gpus=4)) == 2  # auto: a GPU each
    assert num_concurrent(sweep, room(64, num_gpus=1)) == 8  # auto: too few, on CPUs
    assert num_concurrent(sweep, room(64, num_gpus=float("nan"))) == 8
    sweep = sweep_of(tmp_path, {**base, "compute": {"num_workers": 2, "device": "cuda"}})
    with pytest.raises(ValueError, match="needs 2 GPUs; here has 1"):
        num_concurrent(sweep, room(64, num_gpus=1))


@pytest.mark.parametrize(
    ("there", "tune", "message"),
    [
        (room(4), {"num_cpus": 5}, "seed-0 needs 5 CPUs; here has 4 CPUs"),
        (room(4, 4), {"num_cpus": 5}, "4 on its largest node: lower tune.num_cpus"),
        (room(8), {"num_cpus": 1, "num_gpus": 1}, "needs 1 GPUs; here has 0"),
    ],
)
def test_what_cannot_fit_is_refused(tmp_path, there, tune, message):
    with pytest.raises(ValueError, match=message):
        num_concurrent(sweep_of(tmp_path, BASE, **tune), there)


# ---- the folder ----------------------------------------------------------------------------------


def test_a_dry_run_starts_nothing(tmp_path, capsys):
    words = ["sweep", str(write(tmp_path)), "--out", str(tmp_path / "out"), "--dry-run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "seed-0  1 CPU  missing" in said and "2 trials, 2 at once" in said
    assert "2 left: time not known before a trial is finished (or set tune.trial_min)" in said
    assert not (tmp_path / "out").exists()
    assert main([*words, "--resume"]) == 2
    assert "holds no sweep (no sweep.yaml): leave --resume out" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([*words[:3], str(tmp_path / "file" / "out"), "--dry-run"]) == 2
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err
    assert main([*words, "--set", "tune.num_cpus=4096"]) == 2
    assert "seed-0 needs 4096 CPUs; this machine has" in capsys.readouterr().err


def test_a_plan_of_a_thousand_trials_is_quick(tmp_path):
    path = write(tmp_path, space={"seed": list(range(1000))})
    begun = time.process_time()  # whatever else the machine does
    assert plan(load_sweep(path), tmp_path / "out")["num_trials"] == 1000
    assert time.process_time() - begun < 5  # of the issue; about 0.4 s


def begun_folder(tmp_path: Path) -> tuple[Sweep, Path]:
    """A sweep whose trials are all finished, without training any."""
    sweep = load_sweep(write(tmp_path))
    out = tmp_path / "out"
    with held(sweep, out):
        pass
    for name, config in sweep.trials.items():
        with RunDirectory.create(out / name, config) as run:
            run.write_summary({})
    return sweep, out


def test_an_estimate_is_of_what_is_left_and_from_what_is_done(tmp_path):
    sweep = load_sweep(write(tmp_path, space={"seed": list(range(7))}), ["tune.trial_min=2"])
    out, missing = tmp_path / "out", dict.fromkeys(sweep.trials, "missing")
    found = estimate(sweep, out, missing, 3)  # the folder is not there yet
    assert (found["num_left"], found["minutes"], found["bytes"]) == (7, 6.0, None)
    assert found["num_measured"] == 0 and found["bytes_free"] > 0
    for name, minutes in (("seed-0", 3), ("seed-1", 5)):
        with RunDirectory.create(out / name, sweep.trials[name]) as run:
            run.write_summary({})
        manifest = json.loads((out / name / "manifest.json").read_text())
        manifest["attempts"][0] |= {
            "started": "2026-01-01T10:00:00.000+00:00",
            "finished": f"2026-01-01T10:{minutes:02}:00.000+00:00",
        }
        manifest["attempts"].insert(0, {**manifest["attempts"][0], "finished": None})  # a kill
        (out / name / "manifest.json").write_text(json.dumps(manifest))
    (out / "seed-0" / "large").write_bytes(bytes(10_000_000))
    statuses = {**missing, "seed-0": "finished", "seed-1": "finished", "seed-2": "stopped"}
    found = estimate(sweep, out, statuses, 3)
    assert (found["num_left"], found["num_measured"]) == (4, 2)
    assert found["minutes"] == 2 * 4  # two turns of three places, 4 minutes each
    assert 4 * 5_000_000 < found["bytes"] < 4 * 5_100_000
    check_disk(found, out)
    with pytest.raises(
        ValueError, match=r"4 trials leave about 20\.0 MB, by the 2 that are finish"
    ):
        check_disk({**found, "bytes_free": 19_000_000}, out)


def test_quantities_in_words():
    sizes = (0, 999, 1000, 2_340_000, 5e9, 7e15)
    words = ["0 B", "999 B", "1.0 kB", "2.3 MB", "5.0 GB", "7000.0 TB"]
    assert [in_bytes(size) for size in sizes] == words
    spans = [in_minutes(minutes) for minutes in (0.0, 0.5, 12, 89, 150)]
    assert spans == ["1 s", "30 s", "12 min", "89 min", "2.5 h"]


def test_a_finished_sweep_resumed_does_nothing(tmp_path, capsys):
    sweep, out = begun_folder(tmp_path)
    result = run_sweep(sweep, out, resume=True)
    assert (result["num_run"], result["num_finished"]) == (0, 2)
    assert main(["sweep", str(tmp_path / "asked.yaml"), "--out", str(out), "--resume"]) == 0
    assert "2 of 2 trials finished already; nothing to do" in capsys.readouterr().out
    changed = ["sweep", str(tmp_path / "asked.yaml"), "--out", str(out), "--dry-run"]
    assert main([*changed, "--set", "base.training.num_epochs=3"]) == 2
    assert "base.training.num_epochs: 2, now 3" in capsys.readouterr().err


def test_means_that_a_kill_left_out_come_with_the_next_resume(tmp_path, monkeypatch):
    sweep, out = begun_folder(tmp_path)
    asked: list[Path] = []
    monkeypatch.setattr("ssl2rl_ray.aggregate.write_aggregate", asked.append)
    run_sweep(sweep, out, resume=True)
    assert asked == [out]
    (out / "tensorboard").mkdir()
    run_sweep(sweep, out, resume=True)
    assert asked == [out]


def test_leftovers_of_a_killed_driver_are_removed(tmp_path):
    sweep, out = begun_folder(tmp_path)
    (out / ".new-means").mkdir()
    (out / ".new-means" / "a").touch()
    with held(sweep, out):
        assert not (out / ".new-means").exists()


@pytest.mark.parametrize("status", ["finished", "stopped"])
def test_a_trial_that_came_to_its_end_meanwhile_is_left_as_it_is(tmp_path, status):
    """The trial of a killed driver ended while that of the next one was waiting for it."""
    sweep, out = begun_folder(tmp_path)
    manifest = out / "seed-0" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"finished"', f'"{status}"'))
    before = manifest.read_bytes()
    task = {"sweep": sweep, "stop": tmp_path / "stop", "cwd": Path.cwd(), "folder": out, "argv": []}
    assert _trial({"trial": "seed-0"}, task) == {"status": status}
    assert manifest.read_bytes() == before


def test_another_sweep_is_refused_with_the_differences(tmp_path):
    _, out = begun_folder(tmp_path)
    path = tmp_path / "asked.yaml"
    overrides = ["base.training.num_epochs=3", "space.seed=[0, 2]", "tune.num_cpus=2"]
    with pytest.raises(RunError) as caught:
        run_sweep(load_sweep(path, overrides), out, resume=True)
    said = str(caught.value)
    assert "base.training.num_epochs: 2, now 3" in said
    assert "space.seed: [0, 1], now [0, 2]" in said and "tune.num_cpus: 1, now 2" in said
    # how many run at once makes no other sweep
    run_sweep(load_sweep(path, ["tune.max_concurrent=1"]), out, resume=True)


def test_what_was_asked_is_kept_as_a_sweep_file(tmp_path):
    sweep, out = begun_folder(tmp_path)
    assert load_sweep(out / "sweep.yaml") == sweep


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    sweep, out = begun_folder(tmp_path)
    with pytest.raises(RunError, match="holds a sweep already: add --resume"):
        run_sweep(sweep, out)
    with pytest.raises(RunError, match="holds no sweep"):
        run_sweep(sweep, tmp_path / "nowhere", resume=True)
    with pytest.raises(RunError, match="is not empty"):
        run_sweep(sweep, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot use the folder"):
        run_sweep(sweep, tmp_path / "file")
    lock = acquire_lock(out)
    with pytest.raises(RunError, match="another process is writing"), held(sweep, out):
        pass
    os.close(lock)


# ---- on a real Ray -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A home directory of our own: nothing may be left in it."""
    return tmp_path_factory.mktemp("home")


@contextlib.contextmanager
def command(home: Path, *words: object) -> Iterator[subprocess.Popen[str]]:
    """``ssl2rl`` in a process (and process group) of its own; killed at the end."""
    environment = {**os.environ, "HOME": str(home)}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "ssl2rl_ray", *map(str, words)],
        cwd=Path(__file__).parents[1],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    """Reads what the process says until a text comes."""
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(f"{text!r} was not said:\n{said}")


def kill_trial(driver: subprocess.Popen[str]) -> None:
    """Kills the process of the one trial that runs."""
    import ray  # noqa: F401  (brings psutil)
    import psutil  # isort: skip

    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ray::ImplicitFunc" in " ".join(process.cmdline()):
                process.kill()
                return
    raise AssertionError("no trial runs")


def plain_summary(config: PerceptionRunConfig, folder: Path) -> dict:
    """Of the same config run by itself, as ``ssl2rl run`` does."""
    return run_config(config, folder, progress=lambda row: None)


def read_summary(folder: Path) -> dict:
    summary = RunDirectory.open(folder).summary
    assert summary is not None
    return summary


def test_a_trial_that_ends_while_ray_starts_is_not_run_again(tmp_path, monkeypatch):
    """That of a killed driver: unfinished when looked at first, finished when Ray is there."""
    from ssl2rl_ray.sweep import trials as module

    sweep = load_sweep(write(tmp_path))
    looks = iter([["seed-0"], []])
    monkeypatch.setattr(module, "unfinished", lambda *_: next(looks))
    monkeypatch.setattr(module, "local_ray", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(module, "cluster_room", module.find_room)
    result = run_sweep(sweep, tmp_path / "out")
    assert result["num_run"] == 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sweep_outlives_its_driver_and_ends_as_plain_runs(tmp_path, home):
    """Killed when one trial is finished and one runs; stopped by Ctrl-C; then the trial killed."""
    changes = {"num_epochs": 200, "evaluation_interval_epochs": 20}
    path = write(tmp_path, base={**BASE, "training": {**BASE["training"], **changes}})
    out = tmp_path / "out"
    words = ["--debug", "sweep", path, "--out", out, "--set", "tune.max_concurrent=1"]
    with command(home, *words) as first:
        wait_for(first, "running     seed-1")
    assert trial_status(out / "seed-0") == "finished"
    before = (out / "seed-0" / "manifest.json").read_bytes()

    with command(home, *words, "--resume") as second:
        wait_for(second, "running     seed-1 (1 of 2 finished)")
        os.killpg(second.pid, signal.SIGINT)
        said, _ = second.communicate()
    assert second.returncode == 130 and f"{out} --set tune.max_concurrent=1 --resume" in said
    assert trial_status(out / "seed-1") == "interrupted"

    with command(home, *words, "--resume") as third:
        wait_for(third, "running     seed-1 (1 of 2 finished)")
        kill_trial(third)
        said, _ = third.communicate()
    assert third.returncode == 0 and "2 of 2 trials finished" in said, said
    assert (out / "seed-0" / "manifest.json").read_bytes() == before  # left alone
    for name, config in load_sweep(path).trials.items():
        assert isinstance(config, PerceptionRunConfig)
        assert read_summary(out / name) == plain_summary(config, tmp_path / name)
        epochs = RunDirectory.open(out / name).metrics()["epoch"]
        assert epochs.tolist() == list(range(1, 201))  # none lost, none twice
        assert len(list((out / name / "checkpoints").glob("step-*"))) == 2  # of ten and more
    left = {".lock", "seed-0", "seed-1", "sweep.yaml", "tensorboard"}
    assert {entry.name for entry in out.iterdir()} == left
    assert len(list((out / "tensorboard").iterdir())) == 1  # the mean over both seeds
    assert not (home / "ray_results").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_failing_trial_does_not_stop_the_others(tmp_path, home, demo_images):
    space = {"data.dataset": [str(tmp_path / "nowhere"), str(demo_images)], "seed": [0]}
    base = {**BASE, "data": {"labelled_fraction": 0.5}}
    path, out = write(tmp_path, base=base, space=space), tmp_path / "out"
    words = ["sweep", path, "--out", out, "--json", tmp_path / "result.json"]
    with command(home, *words) as process:
        said, _ = process.communicate()
    assert process.returncode == 1, said
    bad, good = load_sweep(path).trials
    trials = json.loads((tmp_path / "result.json").read_text())["trials"]
    assert trials[good]["status"] == "finished" and "accuracy" in str(read_summary(out / good))
    assert trials[bad]["status"] == "failed" and "does not exist" in trials[bad]["reason"]
    assert not (out / bad).exists()
    lines = said.splitlines()
    assert f"failed      {bad}" in said and f"failed {bad}: dataset folder" in lines[-1]
    assert all(line.startswith(("running ", "finished ", "failed ", str(out))) for line in lines)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_search_whose_driver_is_killed_tries_the_same_points(tmp_path, home):
    """Optuna asks and ASHA stops; one place, so that both know the same at each moment."""
    training = {"num_epochs": 18, "evaluation_interval_epochs": 1}
    path = write(
        tmp_path,
        base={**BASE, "training": {**BASE["training"], **training}},
        space={"training.learning_rate": {"loguniform": [1e-4, 1]}},
        tune={
            "num_cpus": 1,
            "max_concurrent": 1,
            "search": "optuna",
            "num_samples": 5,
            "scheduler": "asha",
            "metric": "train/loss_supervised",  # accuracies on so few holes are all alike
            "mode": "min",
        },
    )
    with command(home, "sweep", path, "--out", tmp_path / "whole") as process:
        said, _ = process.communicate()
    assert process.returncode == 0, said
    with command(home, "sweep", path, "--out", tmp_path / "killed") as process:
        wait_for(process, "running     trial-2")
    with command(home, "sweep", path, "--out", tmp_path / "killed", "--resume") as process:
        said, _ = process.communicate()
    assert process.returncode == 0, said

    def outcome(out: Path) -> dict[str, tuple]:
        runs = {name: RunDirectory.open(out / name) for name in load_sweep(path).trials}
        return {
            name: (
                run.status,
                run.config.training.learning_rate,  # type: ignore[union-attr]
                run.metrics()["train/loss_supervised"].tolist(),
            )
            for name, run in runs.items()
        }

    whole = outcome(tmp_path / "whole")
    assert whole == outcome(tmp_path / "killed")
    assert whole["trial-0"][0] == "finished"  # the first at every rung
    assert any(status == "stopped" for status, _, _ in whole.values())
    for status, _, losses in whole.values():  # rungs at 2 and 6 epochs
        assert (len(losses), status) in ((18, "finished"), (2, "stopped"), (6, "stopped"))
    assert "trials finished" in said.splitlines()[-1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="CPUs cannot be chosen here")
def test_workers_of_trials_get_their_cpus(tmp_path, home):
    """On two CPUs: two trials would hold both, and their workers wait for ever."""
    path = write(tmp_path, base={**BASE, "compute": {"num_workers": 1, "num_torch_threads": 1}})
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:2])  # inherited
    try:
        with command(home, "sweep", path, "--out", tmp_path / "out") as process:
            said, _ = process.communicate()
    finally:
        os.sched_setaffinity(0, before)
    assert process.returncode == 0, said
    assert [line.split("(")[0].split() for line in said.splitlines()[:-1]] == [
        ["running", "seed-0"],
        ["finished", "seed-0"],
        ["running", "seed-1"],
        ["finished", "seed-1"],
    ]


@pytest.fixture(scope="module")
def demo_images(tmp_path_factory) -> Path:
    """A small session with images."""
    import numpy as np

    from envs.cryoem.images import draw_images
    from envs.cryoem.synthetic import draw_session
    from ssl2rl_ray.data.folder import write_dataset

    rng = np.random.default_rng(4)
    table = draw_session(rng, "demo")
    folder = tmp_path_factory.mktemp("data") / "session"
    write_dataset(table, folder, provenance={"notes": []}, images=draw_images(rng, table, "demo"))
    return folder

"""Every file in tune_configs is valid; the demonstration's says what the command trains."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ssl2rl_ray.config import (
    CrystFELRunConfig,
    NavigationRunConfig,
    SSL2RLRunConfig,
    load_config,
    navigation_config,
)
from ssl2rl_ray.schema import read_yaml, to_yaml
from ssl2rl_ray.sweep import Room, load_sweep, num_concurrent

FOLDER = Path(__file__).parents[1] / "tune_configs"
SWEEPS = sorted(p for p in FOLDER.glob("*.yaml") if "space" in read_yaml(str(p)))
FILES = sorted(set(FOLDER.glob("*.yaml")) - set(SWEEPS))


def test_there_are_configs():
    assert {path.stem for path in FILES} >= {
        "fixmatch",
        "fixmatch_paper",
        "navigation_dqn",
        "navigation_dqn_paper",
        "smoke_run",
        "ssl2rl_demo",
        "ssl2rl_paper",
    }
    assert {path.stem for path in SWEEPS} >= {
        "algorithms",
        "crystfel",
        "crystfel_search",
        "duration",
        "labeled_fraction",
        "rounds",
        "smoke",
        "ssl2rl_algorithms",
        "ssl2rl_mini",
        "table1",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_is_valid_and_survives_a_round_trip(path, tmp_path):
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
    if isinstance(config, NavigationRunConfig):
        navigation_config(config.env)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_is_valid_and_fits_on_four_cores(path):
    room = Room(where="a laptop", node_cpus=(4,), num_gpus=0)
    assert num_concurrent(load_sweep(path), room) >= 1


def trials_of(name: str) -> dict[str, Any]:
    return dict(load_sweep(FOLDER / f"{name}.yaml").trials)


def test_the_smoke_sweep_is_of_the_smoke_run():
    run = load_config(FOLDER / "smoke_run.yaml")
    seeds = [dataclasses.replace(run, seed=seed) for seed in (0, 1)]
    assert trials_of("smoke") == {"seed-0": seeds[0], "seed-1": seeds[1]}


def test_labelled_fractions_are_of_the_same_data_sets():
    trials = trials_of("labeled_fraction")
    assert len(trials) == 4 * 5
    for percent in (5, 10, 20, 100):
        trial = trials[f"{percent}-percent_seed-4"]
        assert (trial.data.labelled_fraction, trial.seed) == (percent / 100, 4)
        assert trial.data.preset == "y3-mini"
    assert trials["20-percent_seed-0"].loop.methods[-1] == "ssl2rl-480"
    assert trials["100-percent_seed-0"].loop.methods == ("full-labels",)
    rest = dataclasses.replace(trials["5-percent_seed-2"], data=trials["20-percent_seed-2"].data)
    assert rest == trials["20-percent_seed-2"]  # nothing else differs


def test_durations_differ_in_the_budget_alone():
    trials = trials_of("duration")
    assert len(trials) == 4 * 5
    base = trials_of("algorithms")["name-dqn_seed-3"]
    for minutes in (120.0, 240.0, 360.0, 480.0):
        env = dataclasses.replace(base.env, budget_min=minutes)
        assert trials[f"budget_min-{minutes:.0f}_seed-3"] == dataclasses.replace(base, env=env)


def test_rounds_go_to_ten_and_do_not_end_early():
    trials = trials_of("rounds")
    assert list(trials) == [f"seed-{i}" for i in range(5)]
    loop = trials["seed-0"].loop
    assert (loop.num_rounds, loop.max_fall) == (10, 1.0)
    each = [f"space.loop.num_rounds={list(range(1, 11))}"]  # as the file says
    assert len(load_sweep(FOLDER / "rounds.yaml", each).trials) == 5 * 10


def test_table_1_is_the_papers_methods_and_fractions():
    trials = trials_of("table1")
    assert len(trials) == 5 * 3
    paper = load_sweep(FOLDER / "ssl2rl_paper_mini.yaml").trials
    trial = trials["seed-2_labelled_fraction-0.1"]
    assert trial.loop.methods == load_config(FOLDER / "ssl2rl_paper.yaml").loop.methods
    loop = dataclasses.replace(
        trial.loop, methods=paper["seed-2_labelled_fraction-0.1"].loop.methods
    )
    assert dataclasses.replace(trial, loop=loop) == paper["seed-2_labelled_fraction-0.1"]


def test_algorithms_tune_the_same_experiments_for_as_long():
    trials = trials_of("crystfel")
    assert len(trials) == 5 * 5
    for name in ("ppo", "a2c", "acktr", "dqn", "rainbow"):
        trial = trials[f"{name}_seed-1"]
        assert (trial.algorithm.name, trial.seed) == (name, 1)
        assert trial.training.num_env_steps == 800_000
        assert (trial.env.action == "discrete") == (name in ("dqn", "rainbow"))
    single = load_config(FOLDER / "crystfel_dqn.yaml")
    assert dataclasses.replace(trials["dqn_seed-0"], seed=single.seed) == single


def test_a_search_asks_for_twenty_points():
    sweep = load_sweep(FOLDER / "crystfel_search.yaml")
    assert (len(sweep.trials), sweep.tune.search, sweep.tune.scheduler) == (20, "optuna", "asha")
    assert len(load_sweep(FOLDER / "crystfel_search.yaml", ["tune.search=random"]).trials) == 20


def tiny(config: Any) -> Any:
    """The same in everything that is not size."""
    if isinstance(config, SSL2RLRunConfig):
        loop = dataclasses.replace(
            config.loop,
            methods=config.loop.methods[-1:],
            num_rounds=min(config.loop.num_rounds, 1),
            num_rollouts=1,
            num_starts=1,
            pretraining_steps=None,
            finetuning_steps=None,
        )
        stages = {
            stage: dataclasses.replace(
                getattr(config, stage), num_epochs=1, evaluation_interval_epochs=1
            )
            for stage in ("pretraining", "finetuning")
        }
        data = dataclasses.replace(config.data, preset="demo")
        config = dataclasses.replace(config, loop=loop, data=data, **stages)
    section = "rl" if isinstance(config, SSL2RLRunConfig) else "training"
    training, algorithm = getattr(config, section), config.algorithm
    small: dict[str, Any] = {"num_env_steps": 512, "evaluation_interval_steps": 64}
    if isinstance(config, CrystFELRunConfig):
        small |= {"num_env_steps": 1_000, "num_envs": 8, "num_validation_experiments": 2}
        experiments = dataclasses.replace(config.experiments, pool_size=2)
        config = dataclasses.replace(config, experiments=experiments)
    else:
        small |= {"num_envs_per_runner": 8, "num_validation_sessions": 1}
    if hasattr(algorithm, "learning_starts"):
        changes = {"learning_starts": 64, "batch_size": 16, "buffer_capacity": 2_000}
        algorithm = dataclasses.replace(algorithm, **changes)
    changed = {section: dataclasses.replace(training, **small), "algorithm": algorithm}
    return dataclasses.replace(config, **changed)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "trial",
    [
        *(f"crystfel/{name}_seed-0" for name in ("ppo", "a2c", "acktr", "dqn", "rainbow")),
        "crystfel_search/trial-00",
        "duration/budget_min-120_seed-0",
        "labeled_fraction/100-percent_seed-0",
        "table1/seed-0_labelled_fraction-0.05",
    ],
)
def test_trials_of_shipped_sweeps_run(trial, tmp_path, local_ray):
    """Those of algorithms.yaml, rounds.yaml and ssl2rl_*.yaml hold nothing that others do not."""
    from ssl2rl_ray.launch import run_config

    file, name = trial.split("/")
    assert run_config(tiny(trials_of(file)[name]), tmp_path / "run", progress=lambda row: None)
    kept = [list(folder.glob("step-*")) for folder in tmp_path.rglob("checkpoints")]
    assert kept and all(len(steps) <= 3 for steps in kept)  # the last two and the best


def test_table_4_differs_from_the_mini_sweep_in_how_policies_learn_alone():
    mini = load_sweep(FOLDER / "ssl2rl_mini.yaml").trials["seed-3_labelled_fraction-0.1"]
    sweep = load_sweep(FOLDER / "ssl2rl_algorithms.yaml").trials
    assert isinstance(mini, SSL2RLRunConfig) and len(sweep) == 5 * 4
    for name in ("dqn", "rainbow", "a2c", "ppo"):
        trial = sweep[f"algorithm-{name}_seed-3"]
        assert isinstance(trial, SSL2RLRunConfig) and trial.algorithm.name == name
        loop = dataclasses.replace(mini.loop, methods=trial.loop.methods)
        assert dataclasses.replace(mini, loop=loop, algorithm=trial.algorithm, rl=trial.rl) == trial
        assert trial.algorithm.is_residual is False  # no network begins as the planner


def test_the_papers_fixmatch_is_the_papers():
    config = load_config(FOLDER / "fixmatch_paper.yaml")
    training = config.training
    assert config.classifier.network == "resnet18" and config.classifier.dropout == 0.5
    assert (training.unsupervised_weight, training.unlabelled_ratio, training.batch_size) == (
        5,
        4,
        64,
    )
    assert (training.confidence_threshold, training.num_epochs) == (0.8, None)
    ours = load_config(FOLDER / "fixmatch.yaml").training
    assert (ours.unsupervised_weight, ours.method) == (1, training.method)


def test_the_accepted_figures_are_trained_under_the_rules_they_are_measured_under():
    rules = navigation_config(load_config(FOLDER / "navigation_dqn.yaml").env)
    assert (rules.budget_min, rules.minutes) == (480, (1, 2, 6, 8))
    assert rules.feature_set == "rates"
    paper = navigation_config(load_config(FOLDER / "navigation_dqn_paper.yaml").env)
    assert (paper.budget_min, paper.minutes) == (480, (1, 2, 6, 8))
    assert (paper.feature_set, paper.action_level) == ("paper", "hole")


def test_the_demonstration_trains_its_config():
    from ssl2rl_ray.demo import config

    assert config(1) == load_config(FOLDER / "ssl2rl_demo.yaml")

"""Every file in tune_configs is valid; the demonstration's says what the command trains."""

import dataclasses
from pathlib import Path

import pytest

from ssl2rl_ray.config import (
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
        "smoke",
        "ssl2rl_demo",
        "ssl2rl_paper",
    }
    assert {path.stem for path in SWEEPS} >= {"smoke_sweep", "ssl2rl_algorithms", "ssl2rl_mini"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_is_valid_and_survives_a_round_trip(path, tmp_path):
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
    if isinstance(config, NavigationRunConfig):
        navigation_config(config.env)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_is_valid_and_fits_on_four_cores(path):
    room = Room(where="a laptop", num_cpus=4, num_gpus=0, largest_node_cpus=4)
    assert num_concurrent(load_sweep(path), room) >= 1


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

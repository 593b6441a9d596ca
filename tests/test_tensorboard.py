"""What TensorBoard shows of every kind of run, read back from the event files."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context

from ssl2rl_ray.aggregate import write_aggregate
from ssl2rl_ray.config import load_config
from ssl2rl_ray.launch import run_config
from ssl2rl_ray.local_ray import local_ray
from ssl2rl_ray.logger import TensorBoardLogger
from ssl2rl_ray.runs import RunDirectory
from ssl2rl_ray.schema import to_dict
from ssl2rl_ray.stats import curve_over_runs
from ssl2rl_ray.tensorboard import TensorBoard, hyperparameters, read_curves
from ssl2rl_ray.tuning.figures import draw_traces

torch.set_num_threads(1)

DOCS = Path(__file__).parents[1] / "docs" / "tensorboard.md"
ALGORITHMS = ("dqn", "rainbow", "a2c", "acktr", "ppo", "async_a2c")
VALUES = {"batch_size": 16, "buffer_capacity": 2000, "learning_starts": 64}
NAVIGATION = {
    "kind": "navigation",
    "sessions.synthetic": 1,
    "sessions.preset": "demo",
    "env.preset": "cryorl",
    "env.budget_min": 30,
    "env.feature_set": "rates",
    "env.action_level": "patch",
    "algorithm.hidden_sizes": [16],
    "training.num_env_steps": 256,
    "training.num_envs_per_runner": 8,
    "training.evaluation_interval_steps": 128,
    "training.num_validation_sessions": 2,
}
CRYSTFEL = {
    "kind": "crystfel",
    "env.action": "discrete",
    "env.num_frames": 40,
    "env.num_steps": 5,
    "experiments.pool_size": 8,
    "algorithm.hidden_sizes": [16],
    "training.num_env_steps": 400,
    "training.num_envs": 16,
    "training.evaluation_interval_steps": 200,
    "training.num_validation_experiments": 4,
}
PERCEPTION = {
    "kind": "perception",
    "data.preset": "demo",
    "classifier.network": "cnn",
    "data.labelled_fraction": 0.5,
    "training.method": "fixmatch",
    "training.num_epochs": 2,
    "training.num_folds": 2,
    "training.unlabelled_ratio": 1,
}
LOOP = {
    "kind": "ssl2rl",
    "seed": 2,
    "data.preset": "demo",
    "data.labelled_fraction": 0.5,
    "data.validation_share": 0.4,
    "classifier.network": "cnn",
    "pretraining.method": "supervised",
    "pretraining.num_folds": 0,
    "env.feature_set": "rates",
    "algorithm.hidden_sizes": [16],
    "algorithm.batch_size": 16,
    "algorithm.learning_starts": 64,
    "rl.num_env_steps": 128,
    "rl.num_envs_per_runner": 8,
    "rl.evaluation_interval_steps": 128,
    "rl.num_validation_sessions": 2,
    "loop.methods": ["ssl2rl-120"],
    "loop.num_rounds": 1,
    "loop.num_rollouts": 2,
    "loop.num_starts": 2,
    "loop.durations_min": [30, 60],
    "loop.max_fall": 1,
    "loop.pretraining_steps": 20,
    "loop.finetuning_steps": 2,
}


def configured(values: dict[str, Any], changes: dict[str, Any] | None = None) -> Any:
    words = {**values, **(changes or {})}
    return load_config(None, [f"{name}={value}" for name, value in words.items()])


def by(kind: dict[str, Any], algorithm: str, seed: int = 0) -> Any:
    """A config of a kind with the settings that an algorithm needs to learn in so few steps."""
    changes: dict[str, Any] = {"algorithm.name": algorithm, "seed": seed}
    if algorithm in ("dqn", "rainbow"):
        changes |= {f"algorithm.{name}": value for name, value in VALUES.items()}
    if algorithm == "async_a2c":
        changes["training.num_env_runners"] = 1
    return configured(kind, changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Runs of every kind, of tuning by every algorithm, by ``kind: algorithm``."""
    folder = tmp_path_factory.mktemp("runs")
    chosen = {f"navigation: {name}": by(NAVIGATION, name) for name in ("dqn", "a2c")}
    chosen |= {f"crystfel: {name}": by(CRYSTFEL, name) for name in ALGORITHMS}
    chosen |= {"perception": configured(PERCEPTION), "ssl2rl": configured(LOOP)}
    with local_ray(2):
        for name, config in chosen.items():
            run_config(config, folder / name, progress=lambda row: None)
    return {name: folder / name for name in chosen}


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


# ---- one tree of tags ----------------------------------------------------------------------------


def documented(kind: str, algorithm: str = "") -> dict[str, bool]:
    """Tags (as regular expressions) that a run may write; True: it must."""
    found = {}
    for line in DOCS.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or "`" not in cells[0]:
            continue
        for writer in cells[3].split(";"):
            name, _, condition = writer.strip().partition(" (")
            name, _, algorithms = name.partition(":")
            if name != kind or (
                algorithms and algorithm not in re.split(", *", algorithms.strip())
            ):
                continue
            what = next((f"{word} " for word in ("image", "text") if cells[0].startswith(word)), "")
            for tag in re.findall("`([^`]+)`", cells[0]):
                found[what + re.sub("<[^>]+>", ".+", re.escape(tag))] = not condition
    return found


def written(folder: Path) -> set[str]:
    """Tags of a folder's events, named as in the table."""
    tags = events_of(folder).Tags()
    texts = {tag.removesuffix("/text_summary") for tag in tags["tensors"]}
    return {
        *tags["scalars"],
        *(f"image {t}" for t in tags["images"]),
        *(f"text {t}" for t in texts),
    }


def mismatch(tags: set[str], table: dict[str, bool]) -> tuple[set[str], set[str]]:
    """Tags that the table lacks, and rows that must be written and are not."""
    unknown = {tag for tag in tags if not any(re.fullmatch(pattern, tag) for pattern in table)}
    missing = {
        pattern
        for pattern, is_due in table.items()
        if is_due and not any(re.fullmatch(pattern, tag) for tag in tags)
    }
    return unknown, missing


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_table_of_the_documentation_is_what_runs_write(runs):
    for name, folder in runs.items():
        kind, _, algorithm = name.partition(": ")
        if kind != "ssl2rl":
            table = documented(kind, algorithm)
            assert table and mismatch(written(folder / "tensorboard"), table) == (set(), set()), (
                name
            )
    methods = configured(LOOP).loop.methods
    found = set().union(*(written(runs["ssl2rl"] / "tensorboard" / name) for name in methods))
    assert mismatch(found, documented("ssl2rl")) == (set(), set())


@pytest.mark.ray
@pytest.mark.slow
def test_algorithms_say_the_same_thing_by_the_same_name(runs):
    own = {name: written(runs[f"crystfel: {name}"] / "tensorboard") for name in ALGORITHMS}
    common = set.intersection(*own.values())
    assert {"criterion/best", "train/episode_return", "train/loss", "wall_s"} <= common
    assert own["a2c"] == own["ppo"] == own["acktr"] & own["async_a2c"]
    assert own["dqn"] == own["rainbow"] - {"train/support_ends"}
    for name in ("dqn", "a2c"):
        other = written(runs[f"navigation: {name}"] / "tensorboard")
        assert {tag for tag in own[name] ^ other if tag.startswith(("train", "criterion"))} == set()


@pytest.mark.ray
@pytest.mark.slow
def test_the_step_is_env_steps_and_relative_time_the_wall_clock(runs):
    for name in ("navigation: dqn", "crystfel: a2c"):
        metrics = RunDirectory.open(runs[name]).metrics()
        curves = read_curves(runs[name] / "tensorboard")
        steps = metrics["num_env_steps"].tolist()
        assert curves["criterion/last"].step.tolist() == steps
        assert curves["train/loss"].step.tolist() == steps[1:]
        elapsed_s = np.diff(curves["wall_s"].time_s)
        between = np.diff(metrics["wall_s"].dropna()) + metrics["validation/wall_s"].iloc[2:]
        assert elapsed_s == pytest.approx(between, abs=0.5)
        best = metrics["train/num_updates"].gt(0) * curves["criterion/last"].value
        assert curves["criterion/best"].value[-1] == pytest.approx(best.max())


# ---- pictures and stages -------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
def test_pictures_come_more_rarely_and_at_the_end(runs):
    for name, tag in (("navigation: a2c", "map"), ("crystfel: dqn", "trace")):
        events = events_of(runs[name] / "tensorboard")
        steps = [image.step for image in events.Images(tag)]
        last = int(RunDirectory.open(runs[name]).metrics()["num_env_steps"].iloc[-1])
        assert steps == sorted(set(steps)) and steps[-1] == last
        assert events.Images(tag)[0].width >= 300
    # nothing but these: a stage of a loop has none
    assert not any("image" in tag for tag in written(policy_stage(runs["ssl2rl"])))


def policy_stage(run: Path) -> Path:
    (folder,) = run.glob("methods/ssl2rl-120/round-01/policy/tensorboard")
    return folder


@pytest.mark.ray
@pytest.mark.slow
def test_the_stages_of_a_loop_write_as_runs_of_their_kind_do(runs):
    run = runs["ssl2rl"]
    classifiers = [
        *run.glob("f0/supervised/tensorboard"),
        *run.glob("methods/*/*/classifier/tens*"),
    ]
    assert len(classifiers) == 2
    policies = [policy_stage(run), *run.glob("f0/*/policy/tensorboard")]
    assert len(policies) == 2
    stages = [(folder, documented("perception")) for folder in classifiers]
    stages += [(folder, documented("navigation", "dqn")) for folder in policies]
    by_chance = {"fold/.+", "train/episode_return"}  # no folds, or no episode that ended
    for folder, table in stages:
        of_runs = {tag for tag in table if tag.startswith(("criterion", "image", "text"))}
        unknown, missing = mismatch(written(folder), table)
        assert not unknown and of_runs <= missing <= of_runs | by_chance
    assert sessions(run) == {
        f"tensorboard/{name}": api_pb2.STATUS_SUCCESS for name in configured(LOOP).loop.methods
    }


# ---- hyperparameters -----------------------------------------------------------------------------


def hparams_tab(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """What the tab HPARAMS is given: columns (those that differ), and its groups by run."""
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    context = Context(TBContext(data_provider=provider))
    request = RequestContext()
    experiment = context.experiment_from_metadata(
        request, "", True, context.hparams_metadata(request, ""), []
    )
    every = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS]
    found = list_session_groups.Handler(
        request,
        context,
        "",
        api_pb2.ListSessionGroupsRequest(slice_size=100, allowed_statuses=every),
    ).run()
    differing = [info.name for info in experiment.hparam_infos if info.differs]
    return differing, {group.name: group for group in found.session_groups}


def sessions(folder: Path) -> dict[str, int]:
    return {name: group.sessions[0].status for name, group in hparams_tab(folder)[1].items()}


def metric(group: Any, tag: str) -> float:
    return next(value.value for value in group.metric_values if value.name.tag == tag)


def test_hyperparameters_of_all_algorithms_with_live_results(tmp_path):
    with TensorBoard(tmp_path / "dqn") as dqn, TensorBoard(tmp_path / "a2c") as a2c:
        dqn.begin({"algorithm": {"name": "dqn", "n_step": 3, "gamma": 1.0}, "seed": 0}, "a: 1")
        a2c.begin({"algorithm": {"name": "a2c", "entropy": 0.1, "gamma": 1.0}, "seed": 0}, "a: 1")
        differing, groups = hparams_tab(tmp_path)
        assert differing == ["algorithm"]
        assert set(groups["a2c"].hparams) == {
            "algorithm", "algorithm.entropy", "algorithm.gamma", "seed"
        }  # fmt: skip
        for step, value in ((0, 1.0), (100, 5.0), (200, 4.0)):
            dqn.log({"criterion/last": value}, step)
            _, groups = hparams_tab(tmp_path)
            assert metric(groups["dqn"], "criterion/last") == value
            assert groups["dqn"].sessions[0].status == api_pb2.STATUS_UNKNOWN
    assert sessions(tmp_path) == {"dqn": api_pb2.STATUS_SUCCESS, "a2c": api_pb2.STATUS_SUCCESS}


def test_a_run_that_may_be_resumed_has_no_end(tmp_path):
    with pytest.raises(KeyboardInterrupt), TensorBoard(tmp_path / "run") as board:
        board.begin({"seed": 0}, "seed: 0")
        board.log({"a": 1.0}, 10)
        raise KeyboardInterrupt
    assert sessions(tmp_path) == {"run": api_pb2.STATUS_UNKNOWN}
    with TensorBoard(tmp_path / "run", first_step=11) as board:
        board.log({"a": 2.0}, 20)
    assert sessions(tmp_path) == {"run": api_pb2.STATUS_SUCCESS}


@pytest.mark.parametrize(
    "config",
    [by(NAVIGATION, "dqn"), by(CRYSTFEL, "ppo"), configured(PERCEPTION), configured(LOOP)],
    ids=lambda config: config.kind,
)
def test_only_what_is_worth_comparing_is_a_hyperparameter(config):
    found = hyperparameters(to_dict(config))
    assert len(found) < 90 and "seed" in found
    for name, value in found.items():
        assert isinstance(value, bool | int | float | str) and value != "None"
        assert not name.startswith(("compute", "kind", "data.dataset", "data.train"))
        assert "num_torch_threads" not in name


# ---- resumed runs --------------------------------------------------------------------------------


def test_a_resumed_run_has_no_pause_and_no_point_twice(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("ssl2rl_ray.tensorboard.time.time", lambda: now)
    with TensorBoard(tmp_path) as board:
        for step in (0, 100, 200, 300):
            board.log({"a": float(step), "wall_s": step / 10}, step)
            now += 10
    for _ in range(2):  # started again before the next point, too
        now = 9000.0
        with TensorBoard(tmp_path, first_step=201) as board:
            pass
        assert read_curves(tmp_path)["a"].step.tolist() == [0, 100, 200]
    with TensorBoard(tmp_path, first_step=201) as board:
        now += 5
        board.log({"a": 7.0, "wall_s": 5.0}, 250)
        now += 5
        board.log({"a": 8.0, "wall_s": 10.0}, 350)
    curves = read_curves(tmp_path)
    assert curves["a"].step.tolist() == [0, 100, 200, 250, 350]
    assert curves["a"].value.tolist() == [0, 100, 200, 7, 8]
    assert (curves["a"].time_s - 1000).tolist() == [0, 10, 20, 25, 30]
    assert curves["wall_s"].value.tolist() == [0, 10, 20, 25, 30]


def test_a_run_that_is_begun_anew_takes_its_old_points_out(tmp_path):
    for values in ((1.0, 2.0, 3.0), (4.0, 5.0)):
        with TensorBoard(tmp_path) as board:
            for step, value in enumerate(values):
                board.log({"a": value}, step)
    assert read_curves(tmp_path)["a"].value.tolist() == [4, 5]


def test_a_torn_event_file_is_gone_on_with(tmp_path):
    with TensorBoard(tmp_path) as board:
        board.log({"a": 1.0}, 1)
        board.log({"a": 2.0}, 2)
    (file,) = tmp_path.glob("events.*")
    file.write_bytes(file.read_bytes()[:-7])
    with TensorBoard(tmp_path, first_step=2) as board:
        board.log({"a": 3.0}, 3)
    assert read_curves(tmp_path)["a"].step.tolist() == [1, 3]


def test_only_finite_numbers_are_points(tmp_path):
    row = {"a": 1, "b": np.float32(2), "c": float("nan"), "d": None, "e": "text", "f": True}
    with TensorBoard(tmp_path) as board:
        board.log({**row, "num_env_steps": 3, "epoch": 3}, 3)
    assert set(read_curves(tmp_path)) == {"a", "b"}


# ---- means over seeds ----------------------------------------------------------------------------


def finished(folder: Path, config: Any, curve: dict[int, float], tag: str) -> None:
    """A run that says a curve and is finished."""
    with RunDirectory.create(folder, config) as run, TensorBoard(run.path / "tensorboard") as board:
        for step, value in curve.items():
            board.log({tag: value, "train/loss": value / 2}, step)


CURVES = (
    {0: 0.0, 100: 10.0, 200: 20.0},
    {0: 2.0, 110: 14.0, 205: 28.0},
    {0: 4.0, 90: 9.0, 201: 9.0},
)


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Three seeds of two algorithms, as a sweep leaves them, and one run under way."""
    for name in ("dqn", "a2c"):
        for seed, curve in enumerate(CURVES):
            config = by(NAVIGATION, name, seed=seed)
            finished(tmp_path / f"{name}-{seed}", config, curve, "validation/episode_return")
    config = by(NAVIGATION, "a2c", seed=9)
    with pytest.raises(KeyboardInterrupt), RunDirectory.create(tmp_path / "a2c-9", config) as run:
        with TensorBoard(run.path / "tensorboard") as board:
            board.log({"validation/episode_return": 1e9}, 0)
        raise KeyboardInterrupt
    return tmp_path


def test_a_sweep_has_a_run_for_each_group_with_mean_and_band(sweep):
    folders = write_aggregate(sweep)
    assert [folder.relative_to(sweep).as_posix() for folder in folders] == [
        "tensorboard/a2c",
        "tensorboard/dqn",
    ]
    curves = read_curves(folders[1])
    mean = curves["validation/episode_return"]
    # the last look of each stands until its next; all end together, within 5 %
    by_hand = {0: 2.0, 90: 11 / 3, 100: 7.0, 110: 11.0, 200: 43 / 3, 201: 43 / 3, 205: 19.0}
    assert dict(zip(mean.step, mean.value, strict=True)) == pytest.approx(by_hand)
    low, high = (
        curves[f"validation_band/episode_return/{end}"].value for end in ("lower", "upper")
    )
    pairs = [(list(curve), list(curve.values())) for curve in CURVES]
    rng = np.random.default_rng(20210831)
    _, *expected = curve_over_runs(pairs, mean.step, rng, np.mean)
    np.testing.assert_allclose([low, high], expected, rtol=1e-5)
    assert (low <= mean.value).all() and (mean.value <= high).all()
    assert {tag for tag in curves if "_band/" in tag} == {
        "validation_band/episode_return/lower",
        "validation_band/episode_return/upper",
    }
    assert curves["train/loss"].value == pytest.approx(mean.value / 2)
    events = events_of(folders[0])
    text = events.Tensors("group/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "a2c-0" in text and "a2c-9" not in text
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_writing_means_again_replaces_them(sweep):
    first = {folder.name: read_curves(folder) for folder in write_aggregate(sweep)}
    config = by(NAVIGATION, "dqn", seed=3)
    finished(sweep / "dqn-3", config, {0: 6.0}, "validation/episode_return")
    again = {folder.name: read_curves(folder) for folder in write_aggregate(sweep)}
    tag = "validation/episode_return"
    assert again["a2c"][tag].value.tolist() == first["a2c"][tag].value.tolist()
    assert again["dqn"][tag].value.tolist() == [3.0]  # to where the shortest run ends
    assert sorted(path.name for path in sweep.iterdir() if path.name[0] == ".") == []
    assert all(len(list((sweep / "tensorboard" / name).iterdir())) == 1 for name in again)


def test_groups_of_several_kinds_and_of_single_runs(tmp_path):
    single = by(NAVIGATION, "ppo")
    finished(tmp_path / "ppo", single, CURVES[0], "validation/episode_return")
    assert write_aggregate(tmp_path) == [] and not (tmp_path / "tensorboard").exists()
    for seed in (0, 1):
        config = configured(PERCEPTION, {"seed": seed})
        finished(tmp_path / f"fixmatch-{seed}", config, {1: 0.5, 2: 0.75}, "validation/accuracy")
    names = [folder.name for folder in write_aggregate(tmp_path)]
    assert names == ["perception-fixmatch", "navigation-ppo"]
    alone = read_curves(tmp_path / "tensorboard" / "navigation-ppo")
    assert alone["validation/episode_return"].value.tolist() == [0, 10, 20]
    assert not any("_band" in tag for tag in alone)
    (tmp_path / "fixmatch-1" / "manifest.json").write_text("{")  # damaged: nobody's run
    assert write_aggregate(tmp_path) == []


@pytest.mark.ray
@pytest.mark.slow
def test_methods_of_a_loop_are_groups(runs, tmp_path):
    import shutil

    for seed in (0, 1):
        shutil.copytree(runs["ssl2rl"], tmp_path / f"seed-{seed}")
        config = tmp_path / f"seed-{seed}" / "config.yaml"
        config.write_text(config.read_text().replace("seed: 2", f"seed: {seed}"))
    folders = write_aggregate(tmp_path)
    assert [folder.name for folder in folders] == list(configured(LOOP).loop.methods)
    curves = read_curves(folders[0])
    assert curves["test/accuracy"].step.tolist() == [0, 1]
    assert {"criterion/last", "test_band/accuracy/lower"} <= set(curves)


def test_a_mean_is_over_many(sweep):
    with pytest.raises(ValueError, match="is a run"):
        write_aggregate(sweep / "dqn-0")
    with pytest.raises(ValueError, match="not a folder"):
        write_aggregate(sweep / "nowhere")


# ---- trials of others' Tune experiments ----------------------------------------------------------


def trial(folder: Path, **params: Any) -> Any:
    """What Tune tells its callbacks of a trial."""
    folder.mkdir(parents=True, exist_ok=True)
    return SimpleNamespace(
        trial_id=folder.name,
        trainable_name="PPO",
        local_path=str(folder),
        evaluated_params=params,
        config={"lr": 0.1, "model": {"a": object}},
        init_local_path=lambda: None,
    )


def ppo_result(step: int, **more: Any) -> dict[str, Any]:
    """The numbers of RLlib's new stack that matter, in their places."""
    return {
        "num_env_steps_sampled_lifetime": step,
        "training_iteration": 1,
        "time_total_s": step / 100,
        "env_runners": {"episode_return_mean": step / 10, "episode_len_mean": 3.0},
        "learners": {
            "default_policy": {"entropy": np.float64(0.5), "vf_loss": 2.0, "total_loss": 1.0},
            "__all_modules__": {"total_loss": 9.0},
        },
        "timers": {"sample": 1.0},
        "config": {"lr": 0.1},
        **more,
    }


def test_results_of_rllib_become_our_tags_against_env_steps(tmp_path):
    logger, one = TensorBoardLogger(), trial(tmp_path / "one", lr=np.float64(0.1), layers=[8, 8])
    logger.log_trial_start(one)
    differing, groups = hparams_tab(tmp_path)
    assert dict(groups["one"].hparams).keys() == {"trainable", "lr", "layers"} and not differing
    for step in (400, 800):
        logger.log_trial_result(1, one, ppo_result(step))
    assert metric(hparams_tab(tmp_path)[1]["one"], "criterion/best") == 80
    # restarted from its first checkpoint
    logger.log_trial_start(one)
    logger.log_trial_result(1, one, ppo_result(600))
    logger.log_trial_end(one)
    curves = read_curves(tmp_path / "one")
    assert set(curves) == {
        "train/episode_return", "train/env_steps_per_s", "train/entropy", "train/value_loss",
        "train/loss", "wall_s", "criterion/last", "criterion/best",
    }  # fmt: skip
    assert curves["train/episode_return"].step.tolist() == [400, 600]
    assert curves["train/episode_return"].value.tolist() == [40, 60]
    assert curves["train/loss"].value.tolist() == [1, 1]
    assert curves["train/env_steps_per_s"].value[0] == 100
    assert "text config" in written(tmp_path / "one")
    assert sessions(tmp_path) == {"one": api_pb2.STATUS_SUCCESS}


def test_the_rest_of_rllibs_results_is_there_if_asked_for(tmp_path):
    logger, one = TensorBoardLogger(has_rest=True), trial(tmp_path / "one")
    logger.log_trial_start(one)
    logger.log_trial_result(1, one, ppo_result(400, evaluation={"env_runners": {"x": 1.0}}))
    logger.log_trial_end(one, failed=True)
    tags = set(read_curves(tmp_path / "one"))
    assert {"rllib/env_runners/episode_len_mean", "rllib/evaluation/env_runners/x"} <= tags
    assert not any("timers" in tag for tag in tags)
    assert sessions(tmp_path) == {"one": api_pb2.STATUS_UNKNOWN}


def test_a_mode_is_max_or_min(tmp_path):
    logger, one = TensorBoardLogger(metric="loss", mode="min"), trial(tmp_path / "one")
    logger.log_trial_start(one)
    for iteration, loss in enumerate((3.0, 1.0, 2.0), 1):
        logger.log_trial_result(iteration, one, {"training_iteration": iteration, "loss": loss})
    logger.log_trial_end(one)
    curves = read_curves(tmp_path / "one")
    assert curves["criterion/best"].value.tolist() == [3, 1, 1]
    assert curves["loss"].step.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="max or min"):
        TensorBoardLogger(mode="best")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("default")
def test_a_tuner_of_a_users_own(tmp_path, monkeypatch):
    """A function trainable and RLlib's own PPO, as Tune runs them."""
    from ray import tune
    from ray.rllib.algorithms.ppo import PPOConfig

    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")

    def experiment(point: dict[str, Any]) -> None:
        for i in range(3):
            score = point["lr"] * i
            tune.report({"num_env_steps": 100 * (i + 1), "validation/episode_return": score})

    def fit(trainable: Any, space: Any, name: str, **stop: int) -> dict[str, set[str]]:
        settings = tune.RunConfig(
            name=name,
            storage_path=str(tmp_path),
            verbose=0,
            stop=stop,
            callbacks=[TensorBoardLogger()],
        )
        results = tune.Tuner(trainable, param_space=space, run_config=settings).fit()
        assert not results.errors
        return {result.path: written(Path(result.path)) for result in results}

    with local_ray(2):
        found = fit(experiment, {"lr": tune.grid_search([1.0, 2.0])}, "own")
        ppo = PPOConfig().environment("CartPole-v1").env_runners(num_env_runners=0)
        ppo = ppo.training(train_batch_size_per_learner=200, minibatch_size=100, num_epochs=1)
        of_ppo = fit("PPO", ppo.to_dict(), "ppo", training_iteration=2)
    assert len(found) == 2 and len(of_ppo) == 1
    for path, tags in found.items():
        assert tags == {"validation/episode_return", "criterion/last", "criterion/best", "wall_s",
                        "train/env_steps_per_s", "text config"}  # fmt: skip
        assert read_curves(Path(path))["criterion/last"].step.tolist() == [100, 200, 300]
    assert hparams_tab(tmp_path / "own")[0] == ["lr"]
    (path, tags), *_ = of_ppo.items()
    expected = {
        "train/episode_return",
        "train/loss",
        "train/policy_loss",
        "train/entropy",
        "wall_s",
    }
    assert expected <= tags and not any(tag.startswith("ray/") for tag in tags)
    assert read_curves(Path(path))["train/loss"].step.tolist() == [200, 400]


def test_traces_are_drawn_within_their_axes():
    fraction = np.array([[0.0, 0.2], [0.1, 0.2], [0.1, 0.5]])
    image = draw_traces(fraction, np.array([0.3, 0.6]))
    assert image.shape == (400, 600, 3) and image.dtype == np.uint8
    blue = (image == np.array([0x00, 0x72, 0xB2])).all(-1)  # the first experiment's line
    assert 300 < blue.sum() < 20_000
    assert draw_traces(np.zeros((1, 1)), np.zeros(1)).shape == image.shape

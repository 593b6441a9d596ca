"""DQN on RLlib: learns, counts, restores, repeats itself, stops when asked."""

import dataclasses
import functools
import json
import os
import shutil
import signal

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.cryoem.stack import SessionStack
from envs.cryoem.synthetic import draw_session
from ssl2rl_ray.algorithms.networks import CandidateNetwork, make_network
from ssl2rl_ray.algorithms.policy import Artefact
from ssl2rl_ray.checkpoint import weights_hash
from ssl2rl_ray.config import (
    EnvConfig,
    NavigationRunConfig,
    SessionsConfig,
    TrainingConfig,
    navigation_config,
)
from ssl2rl_ray.recipes import DQNConfig
from ssl2rl_ray.runs import RunDirectory

ray = pytest.importorskip("ray")
from ssl2rl_ray import train as training_room  # noqa: E402
from ssl2rl_ray.algorithms import dqn  # noqa: E402
from ssl2rl_ray.algorithms.runner import ColumnarEnvRunner  # noqa: E402
from ssl2rl_ray.train import train  # noqa: E402

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.usefixtures("local_ray"),
]


class Rows(VectorEnv):
    """Ten moves of one or two minutes; a row's second feature is its reward."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs, seed):
        self.num_envs, self.rng = num_envs, np.random.default_rng(seed)
        self.single_observation_space = spaces.Dict(
            {
                "rows": spaces.Box(-9, 9, (5, 3), np.float32),
                "action_mask": spaces.Box(0, 1, (5,), np.int8),
                "elapsed_min": spaces.Box(0, 99, (1,), np.float32),
            }
        )
        self.single_action_space = spaces.Discrete(5)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def observe(self):
        self.rows = self.rng.random((self.num_envs, 5, 3), np.float32)
        mask = (self.rng.random((self.num_envs, 5)) < 0.7).astype(np.int8)
        mask[:, 0] = 1
        self.mask = mask
        return {
            "rows": self.rows,
            "action_mask": mask,
            "elapsed_min": self.elapsed[:, None].astype(np.float32),
        }

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.count = np.zeros(self.num_envs, int)
        self.elapsed = np.zeros(self.num_envs)
        self.is_over = np.zeros(self.num_envs, bool)
        return self.observe(), {}

    def step(self, actions):
        at = np.arange(self.num_envs)
        assert self.mask[at, actions].all(), "a masked action was chosen"
        reward = np.where(self.is_over, 0, self.rows[at, actions, 1])
        self.count = np.where(self.is_over, 0, self.count + 1)
        self.elapsed = np.where(self.is_over, 0, self.elapsed + 1 + actions % 2)
        self.is_over = self.count == 10
        return self.observe(), reward, self.is_over.copy(), np.zeros(self.num_envs, bool), {}


def rows_env(*, num_envs, seed):
    return Rows(num_envs, seed)


def rows_network():
    return CandidateNetwork(3, (16, 16))


def build(recipe=None, training=None, seed=0, potential=None):
    recipe = {"learning_starts": 64, "updates_per_env_step": 0.2, "n_step": 2, **(recipe or {})}
    recipe = {"batch_size": 32, "epsilon_steps": 1000, "learning_rate": 3e-3, **recipe}
    training = {"num_env_steps": 2000, "num_envs_per_runner": 8, **(training or {})}
    return dqn.build(
        DQNConfig(**recipe),
        TrainingConfig(**training),
        make_env=rows_env,
        make_network=rows_network,
        seed=seed,
        potential=potential,
    )


def until(algorithm, num_env_steps):
    while algorithm.num_env_steps < num_env_steps:
        result = algorithm.train()
    return result


@pytest.mark.parametrize("recipe", [{}, {"is_prioritized": True}, {"double_q": False}])
def test_it_learns_to_take_the_row_that_pays(recipe):
    algorithm = build(recipe)
    first = None
    try:
        while algorithm.num_env_steps < 2000:
            result = algorithm.train()
            first = first or algorithm.mean_return
        assert first < 6 and algorithm.mean_return > 6.7  # by chance 5; always the best 7.3
        learner = result["learners"]["default_policy"]
        assert np.isfinite(learner["loss"])
        assert learner["default_optimizer_learning_rate"] == pytest.approx(1e-5, rel=0.1)
        assert algorithm.num_updates == pytest.approx(0.2 * (algorithm.num_env_steps - 64), abs=14)
        assert result["env_runners"]["num_env_steps_sampled_lifetime"] == algorithm.num_env_steps
    finally:
        algorithm.stop()


def of_elapsed(observation):
    return 100 - observation["elapsed_min"][:, 0] ** 2


def test_a_potential_moves_reward_within_an_episode_and_nothing_else():
    fragments = []
    for potential in (None, of_elapsed):
        algorithm = build({"epsilon_initial": 1.0, "epsilon_final": 1.0}, potential=potential)
        runner = algorithm.env_runner_group.local_env_runner
        fragments.append(runner.sample(num_timesteps=8 * 24))  # two episodes of 10 and resets
        algorithm.stop()
    plain, shaped = fragments
    assert plain["episode_returns"] == shaped["episode_returns"]  # logged as the env pays
    np.testing.assert_array_equal(plain["action"], shaped["action"])
    begins = of_elapsed({"elapsed_min": plain["observation"]["elapsed_min"][0]})
    for episode in (slice(0, 10), slice(11, 21)):
        assert plain["is_terminated"][episode][-1].all()
        difference = (shaped["reward"] - plain["reward"])[episode].sum(0)
        np.testing.assert_allclose(difference, -begins, rtol=1e-4)  # it telescopes, the end is 0
    elapsed = plain["observation"]["elapsed_min"][:10, 0, 0]
    np.testing.assert_allclose(
        (shaped["reward"] - plain["reward"])[:9, 0], -np.diff(elapsed**2), rtol=1e-4
    )


def test_the_policy_that_is_kept_may_be_the_average():
    algorithm = build(
        {"target_update_interval": 1, "target_update_rate": 0.02, "is_averaged": True}
    )
    until(algorithm, 600)
    kept, state = algorithm.network_state(), algorithm.checkpoint()["module"]
    for name, value in kept.items():
        torch.testing.assert_close(value, state[f"target_network.{name}"])
    assert any((value != state[f"network.{name}"]).any() for name, value in kept.items())
    algorithm.stop()


def test_one_seed_gives_the_same_weights_twice_and_another_seed_others():
    hashes = []
    for seed in (1, 1, 2):
        algorithm = build(seed=seed)
        until(algorithm, 600)
        hashes.append(weights_hash(algorithm.network_state()))
        algorithm.stop()
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_checkpoint_goes_on_where_it_was(tmp_path):
    first = build(training={"is_buffer_saved": True})
    until(first, 800)
    torch.save(first.checkpoint(has_replay=True), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = build(seed=5)
    second.restore_checkpoint(state)
    again = second.checkpoint(has_replay=True)
    assert _differences(state, again) == []
    assert (second.num_env_steps, second.num_updates) == (first.num_env_steps, first.num_updates)
    runner = second.env_runner_group.local_env_runner
    assert runner.num_env_steps_sampled_lifetime == first.num_env_steps  # epsilon goes on
    for name, value in runner.module.network.state_dict().items():
        torch.testing.assert_close(value, first.network_state()[name])
    # the same batch moves both the same way: optimiser, target and schedules went along
    for algorithm in (first, second):
        algorithm._update(is_last=True)
    assert weights_hash(first.network_state()) == weights_hash(second.network_state())
    rate = until(second, 2000)["learners"]["default_policy"]["default_optimizer_learning_rate"]
    assert rate == pytest.approx(1e-5, rel=0.1) and second.mean_return > 6.7
    for algorithm in (first, second):
        algorithm.stop()


def _differences(a, b, path=""):
    if isinstance(a, dict):
        return [d for k in a.keys() | b.keys() for d in _differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, (list, tuple)):
        return [
            d
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for d in _differences(x, y, f"{path}.{i}")
        ]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same or path == ".weights_seq_no" else [path]


def test_without_its_replay_a_run_gathers_steps_again_on_other_sessions():
    first = build({"learning_starts": 300})
    until(first, 400)
    second = build({"learning_starts": 300})
    second.restore_checkpoint(first.checkpoint())
    played = second.num_env_steps
    until(second, played + 200)
    assert second.num_updates == first.num_updates > 0  # too little to sample from, as at first
    begun, again = (a.replay.observation["rows"][:16] for a in (first, second))
    assert (again == begun).mean() < 0.01
    until(second, played + 300)
    assert second.num_updates > first.num_updates
    for algorithm in (first, second):
        algorithm.stop()


def test_a_checkpoint_of_another_network_is_refused():
    algorithm = build()
    state = algorithm.checkpoint()
    state["module"]["network.advantage.weight"] = torch.zeros(1, 7)
    with pytest.raises(ValueError, match=r"another network: \['network\.advantage\.weight'\]"):
        algorithm.restore_checkpoint(state)
    algorithm.stop()


def test_remote_runners_fill_streams_of_their_own():
    config = run_config()
    algorithm = dqn.build(
        config.algorithm,
        dataclasses.replace(config.training, num_env_runners=2),
        make_env=functools.partial(training_room.training_env, config),
        make_network=functools.partial(training_room.training_network, config),
        seed=0,
    )
    until(algorithm, 400)
    replay = algorithm.replay
    assert replay.num_streams == 8
    rows = replay.observation["rows"][: replay.num_pushed_rows]
    assert not np.array_equal(rows[:, :4], rows[:, 4:])  # seeds of their own
    known = replay.is_move[: replay.num_pushed_rows]
    assert known.mean() > 0.85 and known.sum() == algorithm.num_env_steps
    steps = algorithm.env_runner_group.foreach_env_runner(
        lambda runner: (runner.num_env_steps_sampled_lifetime, runner._seed),
        local_env_runner=False,
    )
    assert all(count == algorithm.num_env_steps for count, _ in steps)
    assert len({seed for _, seed in steps}) == 2
    algorithm.stop()


def test_a_runner_that_does_not_answer_leaves_empty_rows():
    columns = {
        "observation": {"x": np.ones((2, 3, 1))},
        **{k: np.ones((2, 3)) for k in ("action", "reward", "minutes")},
        **{k: np.ones((2, 3), bool) for k in ("is_terminated", "is_truncated", "is_move")},
        "is_continued": np.ones(3, bool),
        "worker_index": 2,
        "episode_returns": [],
    }
    merged = dqn.side_by_side([columns], 2)
    assert merged["is_move"].tolist() == [[False] * 3 + [True] * 3] * 2
    assert merged["is_continued"].tolist() == [False] * 3 + [True] * 3
    assert merged["observation"]["x"].shape == (2, 6, 1)


def test_settings_that_make_no_sense_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"buffer_capacity: 40 steps are 5 rows"):
        build({"buffer_capacity": 40})
    config = run_config(priority_exponent=0.7)  # test_config.py has them all
    with RunDirectory.create(tmp_path / "run", config) as run:
        with pytest.raises(ValueError, match=r"priority_exponent: is ignored .*is_prioritized"):
            train(config, run, progress=lambda row: None)
        assert run.calibration is None and run.latest is None


def test_the_runner_refuses_what_it_would_ignore():
    algorithm = build()
    with pytest.raises(ValueError, match="whole episodes"):
        algorithm.env_runner_group.local_env_runner.sample(num_episodes=3)
    assert isinstance(algorithm.env_runner_group.local_env_runner, ColumnarEnvRunner)
    algorithm.stop()


# ---- the whole run -------------------------------------------------------------------------------


def run_config(feature_set="rates", num_env_steps=600, **algorithm):
    return NavigationRunConfig(
        seed=3,
        env=EnvConfig(preset="cryorl", budget_min=40, feature_set=feature_set),
        sessions=SessionsConfig(pool_size=3),
        algorithm=DQNConfig(learning_starts=64, batch_size=32, buffer_capacity=2000, **algorithm),
        training=TrainingConfig(
            num_env_steps=num_env_steps,
            num_envs_per_runner=4,
            evaluation_interval_steps=300,
            num_validation_sessions=3,
            num_torch_threads=1,
        ),
    )


@pytest.mark.parametrize("feature_set", ["rates", "paper", "cryorl"])
def test_a_run_leaves_all_that_is_needed(tmp_path, feature_set):
    config = run_config(feature_set)
    rows = []
    with RunDirectory.create(tmp_path / "run", config) as run:
        summary = train(config, run, progress=rows.append)
        assert summary == run.summary and summary["num_env_steps"] >= 600
        assert rows[0]["num_env_steps"] == 0 and len(rows) >= 3
        metrics = run.metrics()
        assert metrics["num_env_steps"].is_monotonic_increasing
        for name in ("loss", "q_mean", "epsilon", "learning_rate", "gradient_norm"):
            assert np.isfinite(metrics[f"train/{name}"].iloc[-1])
        assert list((run.path / "tensorboard").glob("events.*"))
        best = max(e["value"] for e in run.checkpoints if e["value"] is not None)
        learned = metrics[metrics["num_env_steps"] > 0]  # untrained it is a planner, not a result
        assert (
            summary["best_validation_return"] == best == learned["validation/episode_return"].max()
        )
        assert summary["best_num_env_steps"] > 0
    # the exported policy plays sessions of other sizes with the same weights
    loaded = Artefact.load(run.policy)
    rules = navigation_config(config.env)
    rng = np.random.default_rng(11)
    stack = SessionStack.of([draw_session(rng) for _ in range(2)], rules)
    network = make_network(rules, stack)
    network.load_state_dict(loaded.weights)
    env = training_room.CryoEMVectorEnv(stack, rules, 2, effects=loaded.calibration.effects)
    assert (training_room.play(env, network) > 0).all()
    assert json.loads((run.path / "calibration.json").read_text())["effects"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path, number):
    config = run_config(num_env_steps=900)
    interrupt = [number]

    def progress(row):
        if row["num_env_steps"] and interrupt:
            os.kill(os.getpid(), interrupt.pop())

    with pytest.raises(KeyboardInterrupt), RunDirectory.create(tmp_path / "run", config) as run:
        train(config, run, progress=progress)
    stopped = RunDirectory.open(tmp_path / "run")
    assert stopped.status == "interrupted"
    at = stopped.checkpoints[-1]["step"]
    assert 300 <= at < 900
    rows = []
    with RunDirectory.resume(tmp_path / "run", config) as run:
        summary = train(config, run, progress=rows.append)
    assert rows[0]["num_env_steps"] > at and summary["num_env_steps"] >= 900
    metrics = run.metrics()
    assert metrics["num_env_steps"].is_monotonic_increasing
    assert (metrics["train/learning_rate"].dropna().diff().dropna() < 0).all()
    assert (metrics["train/epsilon"].dropna().diff().dropna() <= 0).all()
    updates = metrics["train/num_updates"].dropna()
    assert updates.is_monotonic_increasing and updates.iloc[-1] == summary["num_updates"]


def test_the_policy_is_that_of_the_best_checkpoint_and_never_untrained(tmp_path):
    config = run_config()
    config = dataclasses.replace(
        config,
        algorithm=dataclasses.replace(config.algorithm, learning_starts=400),
        training=dataclasses.replace(config.training, evaluation_interval_steps=200),
    )
    found = []
    with RunDirectory.create(tmp_path / "run", config) as run:

        def progress(row):
            found.append((row.get("train/num_updates", 0), run.policy is not None))

        train(config, run, progress=progress)
        assert [has for updates, has in found if updates == 0] == [False, False]
        assert all(has for updates, has in found if updates > 0)
        assert run.best is not None
        best = (run.best / "policy" / "policy.safetensors").read_bytes()
        assert (run.policy / "policy.safetensors").read_bytes() == best
    (run.policy / "policy.safetensors").write_bytes(b"an earlier one")  # killed in between
    with RunDirectory.resume(tmp_path / "run", config) as run:
        train(config, run, progress=lambda row: None)
    assert (run.policy / "policy.safetensors").read_bytes() == best


def test_a_run_that_cannot_learn_says_so(tmp_path):
    config = run_config(updates_per_env_step=1e-4)
    with (
        pytest.raises(ValueError, match="nothing was learned"),
        RunDirectory.create(tmp_path / "run", config) as run,
    ):
        train(config, run, progress=lambda row: None)


def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path):
    config = run_config()
    with RunDirectory.create(tmp_path / "run", config) as run:
        train(config, run, progress=lambda row: None)
        latest = run.latest
    state = latest / "state.pt"
    for damaged in (state.read_bytes()[:400], b"", b"nothing of the kind"):
        state.write_bytes(damaged)
        with (
            pytest.raises(ValueError, match=r"step-\d+ is damaged .*remove that folder"),
            RunDirectory.resume(tmp_path / "run", config) as run,
        ):
            train(config, run, progress=lambda row: None)
    shutil.rmtree(latest)
    with RunDirectory.resume(tmp_path / "run", config) as run:
        assert train(config, run, progress=lambda row: None)["num_env_steps"] >= 600


def test_tables_of_other_sessions_are_noticed():
    config = run_config("paper")
    other = dataclasses.replace(config, seed=4)  # another pool of sessions
    with pytest.raises(Exception, match="the network's tables and the env's sessions differ"):
        dqn.build(
            config.algorithm,
            config.training,
            make_env=functools.partial(training_room.training_env, config),
            make_network=functools.partial(training_room.training_network, other),
            seed=0,
        )


def test_the_toy_env_is_one():
    env = Rows(3, 0)
    observation, _ = env.reset()
    assert isinstance(env, gym.vector.VectorEnv)
    assert env.observation_space.contains(observation)


def test_sessions_without_labels_are_a_share_of_the_training_and_none_of_the_validation():
    config = dataclasses.replace(
        run_config(), sessions=SessionsConfig(unlabelled=0.5, pool_size=40, preset="demo")
    )
    pool = training_room.session_pool(config)
    outcome = [pool.outcome[row, :n] for row, n in enumerate(pool.num_holes)]
    share = np.mean([bool(((o > 0) & (o < 1)).all()) for o in outcome])
    assert 0.2 < share < 0.8
    stack = training_room.validation_stack(config)
    assert np.isin(stack.outcome, (0, 1)).all()


def test_validation_plays_as_the_policy_does_with_its_margin():
    plain, sure = run_config(), run_config(margin=1e6)
    untrained = training_room.Validation(plain)
    weights = untrained.network.state_dict()
    other = {name: torch.randn_like(value) for name, value in weights.items()}
    planner = untrained.play(weights)  # the values begin as the planner's
    assert training_room.Validation(sure).play(other) == planner
    assert untrained.play(other) != planner

"""A2C and PPO on RLlib: what is sampled, what is learned from it, masks, files, going on."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.cryoem.env import CryoEMVectorEnv
from envs.cryoem.stack import SessionStack, unpack_visited
from envs.cryoem.synthetic import draw_session
from ssl2rl_ray.algorithms import policy_losses
from ssl2rl_ray.algorithms.actor_critic import CandidateActorCritic, VectorActorCritic
from ssl2rl_ray.algorithms.policy import Artefact
from ssl2rl_ray.checkpoint import weights_hash
from ssl2rl_ray.config import (
    EnvConfig,
    NavigationRunConfig,
    SessionsConfig,
    TrainingConfig,
    navigation_config,
)
from ssl2rl_ray.recipes import NavigationA2CConfig, NavigationPPOConfig
from ssl2rl_ray.runs import RunDirectory

ray = pytest.importorskip("ray")
from ray.rllib.core import DEFAULT_MODULE_ID  # noqa: E402
from ray.rllib.core.columns import Columns  # noqa: E402
from test_dqn import Rows, _differences, until  # noqa: E402

from ssl2rl_ray import train as training_room  # noqa: E402
from ssl2rl_ray.algorithms import a2c, ppo  # noqa: E402
from ssl2rl_ray.algorithms.policy_module import ActorCriticModule  # noqa: E402
from ssl2rl_ray.algorithms.registry import ALGORITHMS  # noqa: E402
from ssl2rl_ray.train import train  # noqa: E402

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.usefixtures("local_ray"),
]
RECIPES = {"a2c": NavigationA2CConfig, "ppo": NavigationPPOConfig}


def rows_env(*, num_envs, seed):
    return Rows(num_envs, seed)


def rows_network():
    return CandidateActorCritic(3, (16, 16))


def build(name="a2c", recipe=None, training=None, seed=0, env=rows_env, network=rows_network):
    recipe = {"learning_rate": 3e-3, "hidden_sizes": (16, 16), **(recipe or {})}
    training = {"num_env_steps": 4000, "num_envs_per_runner": 8, **(training or {})}
    return ALGORITHMS[name](
        RECIPES[name](**recipe),
        TrainingConfig(**training),
        make_env=env,
        make_network=network,
        seed=seed,
    )


def learner_of(algorithm):
    return algorithm.learner_group._learner


def runner_of(algorithm):
    return algorithm.env_runner_group.local_env_runner


# ---- what is sampled -----------------------------------------------------------------------------


class Pushes(VectorEnv):
    """Episodes of four steps, cut off or over by turns; the reward is minus the action squared."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs, seed):
        self.num_envs, self.rng = num_envs, np.random.default_rng(seed)
        self.single_observation_space = spaces.Box(-9, 9, (3,), np.float32)
        self.single_action_space = spaces.Box(-1, 1, (2,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.played = []

    def observe(self):
        return self.rng.normal(size=(self.num_envs, 3)).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        self.count, self.is_over = 0, False
        return self.observe(), {}

    def step(self, actions):
        assert self.action_space.contains(actions)
        self.played.append(actions)
        reward = np.zeros(self.num_envs) if self.is_over else -np.square(actions).sum(1)
        self.count = 0 if self.is_over else self.count + 1
        self.is_over = self.count == 4
        ends = np.full(self.num_envs, self.is_over)
        is_cut = ends & (np.arange(self.num_envs) % 2 == 1)
        return self.observe(), reward, ends & ~is_cut, is_cut, {}


def pushes_env(*, num_envs, seed):
    return Pushes(num_envs, seed)


def pushes_network():
    return VectorActorCritic(3, 4, (16, 16), is_gaussian=True)


def test_continuous_actions_are_recorded_as_drawn_and_played_within_bounds():
    algorithm = build(env=pushes_env, network=pushes_network, training={"rollout_length": 10})
    runner = runner_of(algorithm)
    with torch.no_grad():
        runner.module.network.policy[-1].bias[2:] = 1.0  # wide: many beyond the bounds
    fragment = runner.sample()
    algorithm.stop()
    assert fragment["observation"].shape == (10, 8, 3) and fragment["action"].shape == (10, 8, 2)
    assert (np.abs(fragment["action"]) > 1).mean() > 0.3
    np.testing.assert_array_equal(np.stack(runner.env.played), fragment["action"].clip(-1, 1))
    output = torch.as_tensor(fragment[Columns.ACTION_DIST_INPUTS])
    logp = policy_losses.gaussian_log_prob(output, torch.as_tensor(fragment["action"]))
    torch.testing.assert_close(torch.as_tensor(fragment[Columns.ACTION_LOGP]), logp)
    assert (fragment["minutes"] == 1).all()
    is_move = np.ones((10, 8), bool)
    is_move[[4, 9]] = False
    np.testing.assert_array_equal(fragment["is_move"], is_move)
    assert fragment["is_terminated"][3].tolist() == [True, False] * 4
    assert fragment["is_truncated"][3].tolist() == [False, True] * 4


def test_a_plain_gymnasium_task_needs_nothing_of_ours():
    def cartpole(*, num_envs, seed):
        return gym.make_vec("CartPole-v1", num_envs, vectorization_mode="sync")

    algorithm = build(env=cartpole, network=lambda: VectorActorCritic(4, 2, (16, 16)))
    first, second = (runner_of(algorithm).sample() for _ in range(2))
    np.testing.assert_array_equal(first["last_observation"], second["observation"][0])
    assert not first["is_continued"].any() and second["is_continued"].all()
    algorithm.train()
    assert algorithm.num_updates == 1 and algorithm.num_env_steps > 50
    algorithm.stop()


# ---- what is learned from it ---------------------------------------------------------------------


def by_hand(fragment, value, logits, recipe, entropy_weight):
    """The loss of a fragment, in loops: advantages summed from their definition."""
    num_steps, num_envs = fragment["reward"].shape
    policy, critic, entropy, num_moves = 0.0, 0.0, 0.0, 0
    for e in range(num_envs):
        for t in range(num_steps):
            if not fragment["is_move"][t, e]:
                continue
            advantage, weight = 0.0, 1.0
            for k in range(t, num_steps):
                discount = recipe.discount ** float(fragment["minutes"][k, e])
                after = 0.0 if fragment["is_terminated"][k, e] else float(value[k + 1, e])
                reward = recipe.reward_scale * float(fragment["reward"][k, e])
                advantage += weight * (reward + discount * after - float(value[k, e]))
                weight *= discount * recipe.trace_decay
                if fragment["is_terminated"][k, e] or fragment["is_truncated"][k, e]:
                    break
            logp = torch.log_softmax(logits[t, e], -1)
            policy -= float(logp[fragment["action"][t, e]]) * advantage
            critic += advantage**2  # the target less the value
            entropy -= float((logp.exp() * logp.masked_fill(logp.isneginf(), 0)).sum())
            num_moves += 1
    return (policy + recipe.value_weight * critic - entropy_weight * entropy) / num_moves


def test_the_loss_of_a_fragment_is_that_of_its_definition():
    recipe = {"is_standardized": False, "entropy_weight": 0.02, "trace_decay": 0.8}
    algorithm = build(recipe={**recipe, "discount_per_min": 0.9}, training={"rollout_length": 13})
    fragment = a2c.beside([runner_of(algorithm).sample()])
    learner, recipe = learner_of(algorithm), algorithm.config.recipe
    batch = a2c.fragment_batch(fragment, recipe.reward_scale, recipe.discount)
    tensors = {
        k: {n: torch.as_tensor(v) for n, v in column.items()}
        if isinstance(column, dict)
        else torch.as_tensor(column)
        for k, column in batch.items()
    }
    module = learner.module[DEFAULT_MODULE_ID]
    out = module.forward_train(tensors)
    loss = learner.compute_loss_for_module(
        module_id=DEFAULT_MODULE_ID, config=algorithm.config, batch=tensors, fwd_out=out
    )
    value = out[Columns.EMBEDDINGS].detach().view(14, 8)
    logits = out[Columns.ACTION_DIST_INPUTS].detach().view(14, 8, 5)
    expected = by_hand(fragment, value, logits, recipe, 0.02)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    # rows of no move are not learned from
    ends = torch.as_tensor(~fragment["is_move"])
    assert ends.any()
    tensors[Columns.REWARDS].view(14, 8)[:-1][ends] = 1e6
    again = learner.compute_loss_for_module(
        module_id=DEFAULT_MODULE_ID, config=algorithm.config, batch=tensors, fwd_out=out
    )
    assert again.item() == pytest.approx(loss.item())
    algorithm.stop()


def test_n_step_returns_take_the_place_of_the_trace():
    algorithm = build(recipe={"n_step": 1})
    learner = learner_of(algorithm)
    no = torch.zeros(2, 1, dtype=torch.bool)
    fragment = {
        Columns.REWARDS: torch.tensor([[1.0], [2.0]]),
        "discount": torch.tensor([[0.5], [0.25]]),
        "is_terminated": no,
        "is_truncated": no,
    }
    values = torch.tensor([[10.0], [4.0], [8.0]])
    advantage, target = learner.advantage_and_target(fragment, values, torch.zeros(2, 1))
    assert target.flatten().tolist() == [1 + 0.5 * 4, 2 + 0.25 * 8]
    assert advantage.flatten().tolist() == [3.0 - 10, 4.0 - 4]
    algorithm.stop()


def test_the_weight_of_the_entropy_falls_with_the_steps():
    algorithm = build(recipe={"entropy_weight": 0.1, "final_entropy_weight": 0.02})
    learner = learner_of(algorithm)
    seen = []
    for num_env_steps in (0, 2000, 4000, 9000):
        learner.before_gradient_based_update(
            timesteps={"num_env_steps_sampled_lifetime": num_env_steps}
        )
        seen.append(learner.entropy_weight)
    assert seen == pytest.approx([0.1, 0.06, 0.02, 0.02])
    algorithm.stop()


@pytest.mark.parametrize("name", ["a2c", "ppo"])
def test_it_learns_to_take_the_row_that_pays(name):
    """``Rows`` asserts that no action of the 4000 was masked."""
    training = {"rollout_length": 4 if name == "a2c" else 32}
    algorithm = build(name, {"learning_rate": 2e-2, "discount_per_min": 0.5}, training)
    result = until(algorithm, 4000)
    learner = result["learners"][DEFAULT_MODULE_ID]
    assert algorithm.mean_return > 6.5  # by chance 5; always the best 7.3
    for told in ("policy_loss", "vf_loss", "vf_explained_var", "entropy", "curr_entropy_coeff"):
        assert np.isfinite(learner[told])
    assert learner["entropy"] < 1.0  # of at most log 5
    assert learner["default_optimizer_learning_rate"] == pytest.approx(1e-4, rel=0.2)
    assert result["env_runners"]["num_env_steps_sampled_lifetime"] == algorithm.num_env_steps
    algorithm.stop()


def test_a_continuous_policy_learns_to_hold_still():
    algorithm = build(
        "a2c",
        {"learning_rate": 1e-2, "entropy_weight": 0.0, "discount_per_min": 0.5},
        {"rollout_length": 5, "num_envs_per_runner": 16},
        env=pushes_env,
        network=pushes_network,
    )
    begins = -runner_of(algorithm).sample()["reward"].mean()
    until(algorithm, 4000)
    assert -algorithm.mean_return / 4 < 0.5 * begins * 1.25
    algorithm.stop()


def test_forbidden_actions_are_never_drawn_in_100_000():
    """Networks far from their start; the env asserts every single one."""
    algorithm = build(training={"num_envs_per_runner": 500, "rollout_length": 220})
    runner = runner_of(algorithm)
    with torch.no_grad():
        for parameter in runner.module.network.parameters():
            parameter.mul_(20)
    fragment = runner.sample()
    assert fragment["is_move"].sum() >= 100_000
    allowed = np.take_along_axis(
        fragment["observation"]["action_mask"], fragment["action"][..., None], 2
    )
    assert allowed.all()
    assert np.isfinite(fragment[Columns.ACTION_LOGP]).all()
    algorithm.stop()


# ---- runners, settings, going on -----------------------------------------------------------------


def test_remote_runners_play_sessions_of_their_own():
    config = run_config("a2c")
    algorithm = a2c.build(
        config.algorithm,
        dataclasses.replace(config.training, num_env_runners=2),
        make_env=functools.partial(training_room.training_env, config),
        make_network=functools.partial(training_room.training_network, config),
        seed=0,
    )
    until(algorithm, 200)
    steps = algorithm.env_runner_group.foreach_env_runner(
        lambda runner: (runner.num_env_steps_sampled_lifetime, runner._seed),
        local_env_runner=False,
    )
    assert all(count == algorithm.num_env_steps for count, _ in steps)
    assert len({seed for _, seed in steps}) == 2
    theirs = algorithm.env_runner_group.foreach_env_runner(
        lambda runner: runner.module.network.policy[0].weight, local_env_runner=False
    )
    ours = algorithm.network_state()["policy.0.weight"]
    assert all(torch.equal(weight, ours) for weight in theirs)
    algorithm.stop()


@pytest.mark.parametrize(
    ("config", "change", "says"),
    [
        (a2c.A2CAlgorithmConfig, {"num_epochs": 3}, "num_epochs: would be ignored; .* use ppo"),
        (a2c.A2CAlgorithmConfig, {"minibatch_size": 8}, "minibatch_size: would be ignored"),
        (a2c.A2CAlgorithmConfig, {"num_learners": 2}, "num_learners: would be ignored"),
        (ppo.PPOAlgorithmConfig, {"batch_mode": "complete_episodes"}, "batch_mode: would be"),
        (ppo.PPOAlgorithmConfig, {"evaluation_interval": 1}, "validated by `ssl2rl run`"),
        (ppo.PPOAlgorithmConfig, {"use_gae": False}, "use_gae: would be ignored"),
        (
            a2c.A2CAlgorithmConfig,
            {"_learner_connector": lambda *_: None},
            "learner_connector: would be ignored",
        ),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(config, change, says):
    made = config()
    for name, value in change.items():
        setattr(made, name, value)
    with pytest.raises(ValueError, match=says):
        made.validate()


def test_actions_without_a_distribution_are_refused():
    class Unbounded(Pushes):
        def __init__(self, num_envs, seed):
            super().__init__(num_envs, seed)
            self.single_action_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def env(*, num_envs, seed):
        return Unbounded(num_envs, seed)

    with pytest.raises(Exception, match="expected Discrete or a bounded Box"):
        build(env=env, network=pushes_network)


@pytest.mark.parametrize("name", ["a2c", "ppo"])
def test_one_seed_gives_the_same_weights_twice_and_another_seed_others(name):
    hashes = []
    for seed in (1, 1, 2):
        algorithm = build(name, seed=seed)
        until(algorithm, 200)
        hashes.append(weights_hash(algorithm.network_state()))
        algorithm.stop()
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("name", ["a2c", "ppo"])
def test_a_checkpoint_goes_on_where_it_was(tmp_path, name):
    recipe = {"entropy_weight": 0.1}
    first = build(name, recipe)
    until(first, 600)
    torch.save(first.checkpoint(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = build(name, recipe, seed=5)
    second.restore_checkpoint(state)
    assert _differences(state, second.checkpoint()) == []
    assert (second.num_env_steps, second.num_updates) == (first.num_env_steps, first.num_updates)
    runner = runner_of(second)
    assert runner.num_env_steps_sampled_lifetime == first.num_env_steps
    for weight_name, value in runner.module.network.state_dict().items():
        torch.testing.assert_close(value, first.network_state()[weight_name])
    # the same fragment moves both the same way: optimiser, schedules and shuffling went along
    fragment = a2c.beside([runner_of(first).sample()])
    hashes, begun = [], weights_hash(second.network_state())
    for algorithm in (first, second, first):
        algorithm.restore_checkpoint(state)
        algorithm.learn(fragment)
        hashes.append(weights_hash(algorithm.network_state()))
    assert hashes == [hashes[0]] * 3 and hashes[0] != begun
    result = until(second, 4000)["learners"][DEFAULT_MODULE_ID]
    assert result["default_optimizer_learning_rate"] == pytest.approx(1e-4, rel=0.2)
    assert result["curr_entropy_coeff"] < 0.01
    for algorithm in (first, second):
        algorithm.stop()


def test_a_checkpoint_of_another_network_is_refused():
    algorithm = build()
    state = algorithm.checkpoint()
    state["module"]["network.policy.0.weight"] = torch.zeros(1, 7)
    with pytest.raises(ValueError, match=r"another network: \['network\.policy\.0\.weight'\]"):
        algorithm.restore_checkpoint(state)
    algorithm.stop()


# ---- the whole run -------------------------------------------------------------------------------


def run_config(name, feature_set="rates", num_env_steps=600, action_level=None, **algorithm):
    return NavigationRunConfig(
        seed=3,
        env=EnvConfig(
            preset="cryorl", budget_min=40, feature_set=feature_set, action_level=action_level
        ),
        sessions=SessionsConfig(pool_size=3, preset="demo"),
        algorithm=RECIPES[name](**algorithm),
        training=TrainingConfig(
            num_env_steps=num_env_steps,
            num_envs_per_runner=4,
            evaluation_interval_steps=300,
            num_validation_sessions=3,
            num_torch_threads=1,
        ),
    )


@pytest.mark.parametrize(
    ("name", "feature_set", "action_level"),
    [
        ("a2c", "rates", None),
        ("a2c", "paper", "hole"),
        ("a2c", "cryorl", "hole"),
        ("a2c", "paper", "patch"),
        ("ppo", "rates", None),
        ("ppo", "paper", "hole"),
    ],
)
def test_a_run_leaves_all_that_is_needed(tmp_path, name, feature_set, action_level):
    config = run_config(name, feature_set, action_level=action_level)
    rows = []
    with RunDirectory.create(tmp_path / "run", config) as run:
        summary = train(config, run, progress=rows.append)
        assert summary == run.summary and summary["num_env_steps"] >= 600
        assert rows[0]["num_env_steps"] == 0 and len(rows) >= 3
        metrics = run.metrics()
        for told in ("loss", "policy_loss", "value_loss", "entropy", "learning_rate"):
            assert np.isfinite(metrics[f"train/{told}"].iloc[-1])
        assert "train/epsilon" not in metrics and "train/q_mean" not in metrics
        best = metrics[metrics["num_env_steps"] > 0]["validation/episode_return"].max()
        assert summary["best_validation_return"] == best
    # the exported policy acts as the module does, on sessions of another size
    loaded = Artefact.load(run.policy)
    assert (loaded.name, loaded.has_values) == (name, False)
    rules = navigation_config(config.env)
    stack = SessionStack.of([draw_session(np.random.default_rng(11), "demo")] * 2, rules)
    policy = loaded.make(stack)
    env = CryoEMVectorEnv(stack, rules, 2, effects=loaded.calibration.effects, seed=1)
    module = ActorCriticModule(
        observation_space=env.single_observation_space,
        action_space=env.single_action_space,
        model_config={"make_network": lambda: training_room.network_for(config, stack)},
    )
    module.network.load_state_dict(loaded.weights)
    observation, _ = env.reset()
    for _ in range(6):
        batch = {Columns.OBS: {key: torch.as_tensor(v) for key, v in observation.items()}}
        action = module.forward_inference(batch)[Columns.ACTIONS].numpy()
        compact = env.compact_observation()
        hole, value = policy.decide(compact, np.random.default_rng(0))
        assert np.isnan(value).all()
        assert not unpack_visited(compact, stack.shape.num_holes)[[0, 1], hole].any()
        observation, *_ = env.step(action)
        np.testing.assert_array_equal(env.compact_observation()["recent"][:, 0], hole)


def test_an_interrupted_run_goes_on(tmp_path):
    config = run_config("a2c")

    def stop(row):
        if row["num_env_steps"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), RunDirectory.create(tmp_path / "run", config) as run:
        train(config, run, progress=stop)
    with RunDirectory.resume(tmp_path / "run", config) as run:
        summary = train(config, run, progress=lambda row: None)
    assert summary["num_env_steps"] >= 600
    metrics = run.metrics()
    assert metrics["num_env_steps"].is_monotonic_increasing
    for falls in ("learning_rate", "entropy_weight"):
        assert (metrics[f"train/{falls}"].dropna().diff().dropna() < 0).all()
    assert metrics["train/num_updates"].dropna().iloc[-1] == summary["num_updates"]


def test_a_policy_acts_without_ray(tmp_path):
    config = run_config("a2c", num_env_steps=64)
    with RunDirectory.create(tmp_path / "run", config) as run:
        train(config, run, progress=lambda row: None)
    code = (
        "import sys; from pathlib import Path\n"
        "from ssl2rl_ray.algorithms.policy import Artefact\n"
        "from envs.cryoem.stack import SessionStack\n"
        "from envs.cryoem.synthetic import draw_session\n"
        "import numpy as np\n"
        f"artefact = Artefact.load(Path({str(run.policy)!r}))\n"
        "table = draw_session(np.random.default_rng(0), 'demo')\n"
        "artefact.make(SessionStack.of([table], artefact.rules))\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=100, cwd=Path(__file__).parents[1]
    )


def test_tables_of_other_sessions_are_noticed():
    config = run_config("a2c", "paper")
    other = dataclasses.replace(config, seed=4)  # another pool of sessions
    with pytest.raises(Exception, match="the network's tables and the env's sessions differ"):
        a2c.build(
            config.algorithm,
            config.training,
            make_env=functools.partial(training_room.training_env, config),
            make_network=functools.partial(training_room.training_network, other),
            seed=0,
        )

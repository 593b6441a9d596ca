"""Rainbow on RLlib: each part on and off, learning, masks, files, actions without Ray."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from envs.cryoem.env import CryoEMVectorEnv
from envs.cryoem.stack import SessionStack, unpack_visited
from envs.cryoem.synthetic import draw_session
from envs.crystfel.env import num_features
from envs.crystfel.types import TuningConfig
from ssl2rl_ray.algorithms.networks import CandidateNetwork, VectorNetwork, make_network
from ssl2rl_ray.algorithms.noisy import NoisyLinear
from ssl2rl_ray.algorithms.policy import Artefact
from ssl2rl_ray.checkpoint import weights_hash
from ssl2rl_ray.config import (
    CrystFELRunConfig,
    EnvConfig,
    ExperimentsConfig,
    NavigationRunConfig,
    SessionsConfig,
    TrainingConfig,
    TuningTrainingConfig,
    check,
    from_dict,
    navigation_config,
)
from ssl2rl_ray.recipes import RainbowConfig, TuningDQNConfig, TuningRainbowConfig
from ssl2rl_ray.runs import RunDirectory
from ssl2rl_ray.schema import ConfigError
from ssl2rl_ray.tuning.policy import TuningPolicy

ray = pytest.importorskip("ray")
from ray.rllib.core.columns import Columns  # noqa: E402
from test_dqn import Rows, _differences, until  # noqa: E402

from ssl2rl_ray import train as training_room  # noqa: E402
from ssl2rl_ray.algorithms import dqn, rainbow  # noqa: E402
from ssl2rl_ray.algorithms.module import Q_TM1, V_T  # noqa: E402
from ssl2rl_ray.train import train  # noqa: E402
from ssl2rl_ray.tuning import train as tuning_room  # noqa: E402

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.usefixtures("local_ray"),
]


def rows_env(*, num_envs, seed):
    return Rows(num_envs, seed)


def rows_network(recipe):
    return CandidateNetwork(
        3,
        (16, 16),
        is_dueling=recipe.dueling is not False,
        support=(0.0, 1.0, recipe.num_atoms) if recipe.is_distributional else None,
        initial_noise=recipe.initial_noise if recipe.is_noisy else None,
    )


def recipe_of(**changes):
    defaults = {"learning_starts": 64, "updates_per_env_step": 0.2, "n_step": 2, "num_atoms": 21}
    defaults |= {"batch_size": 32, "learning_rate": 3e-3, "target_update_interval": 50}
    return RainbowConfig(**defaults | changes)


def build(seed=0, make_network=None, **changes):
    recipe = recipe_of(**changes)
    return rainbow.build(
        recipe,
        TrainingConfig(num_env_steps=2000, num_envs_per_runner=8),
        make_env=rows_env,
        make_network=make_network or functools.partial(rows_network, recipe),
        seed=seed,
    )


# ---- the module ----------------------------------------------------------------------------------


def module_of(**changes):
    recipe = recipe_of(**changes)
    env = Rows(1, 0)
    module = rainbow.RainbowModule(
        observation_space=env.single_observation_space,
        action_space=env.single_action_space,
        model_config={
            "make_network": functools.partial(rows_network, recipe),
            "is_double": recipe.double_q,
            "epsilon": (recipe.epsilon_initial, recipe.epsilon_final, recipe.epsilon_steps),
        },
    )
    module.make_target_networks()
    return module


def observations(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, 5, generator=generator) < 0.5
    mask[torch.arange(batch), torch.randint(5, (batch,), generator=generator)] = True
    return {
        "rows": torch.rand(batch, 5, 3, generator=generator),
        "action_mask": mask.to(torch.int8),
    }


def batch_of(size=8):
    return {
        Columns.OBS: observations(size),
        Columns.NEXT_OBS: observations(size, 1),
        Columns.ACTIONS: observations(size)["action_mask"].argmax(1),
    }


def test_noise_is_drawn_for_every_step_and_every_pass_and_never_for_evaluation():
    module = module_of()
    noisy = [m for m in module.network.modules() if isinstance(m, NoisyLinear)]
    assert len(noisy) == 4  # all but the first: body, advantage, two of the value
    obs = {Columns.OBS: observations(64)}
    module.forward_exploration(obs, t=0)
    first = [layer.noise[0] for layer in noisy]
    module.forward_exploration(obs, t=0)
    assert not any(torch.equal(a, layer.noise[0]) for a, layer in zip(first, noisy, strict=True))
    seen = []
    hooks = [
        network.advantage.register_forward_hook(
            lambda layer, *_, who=who: seen.append((who, layer.noise[0]))
        )
        for who, network in (("online", module.network), ("target", module.target_network))
    ]
    module.forward_train(batch_of())
    assert [who for who, _ in seen] == ["online", "target", "online"]  # choose, judge, learn
    assert not torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[0][1], seen[2][1])
    for hook in hooks:
        hook.remove()
    chosen = module.forward_inference(obs)[Columns.ACTIONS]
    assert all(layer.noise is None for layer in noisy)
    module.train()
    assert torch.equal(chosen, module.forward_inference(obs)[Columns.ACTIONS])
    assert torch.equal(chosen, module.network.score(obs[Columns.OBS]).argmax(1))


@pytest.mark.parametrize("double_q", [True, False])
def test_double_is_who_chooses(double_q):
    module = module_of(double_q=double_q, is_noisy=False)
    torch.manual_seed(5)
    for parameter in module.target_network.parameters():
        parameter.copy_(torch.randn_like(parameter))
    batch = batch_of(64)
    outputs, _ = module.forward_train(batch)[rainbow.REACHED]
    after = batch[Columns.NEXT_OBS]
    by_online, by_target = (
        network.score(after).argmax(1) for network in (module.network, module.target_network)
    )
    assert not torch.equal(by_online, by_target)
    expected, _ = module.target_network.at(after, by_online if double_q else by_target)
    torch.testing.assert_close(outputs, expected)


def test_parts_that_are_off_are_off():
    plain = module_of(is_noisy=False, is_distributional=False, dueling=False, epsilon_initial=0.2)
    assert not any(name.endswith("_noise") for name in plain.network.state_dict())
    assert plain.network.support is None and plain.network.value is None
    outputs, _ = plain.forward_train(batch_of())[rainbow.TAKEN]
    assert outputs.shape == (8, 1)
    full = module_of()
    assert sum(name.endswith("_noise") for name in full.network.state_dict()) == 7
    assert full.network.value is not None
    assert full.forward_train(batch_of())[rainbow.TAKEN][0].shape == (8, 21)


def test_it_is_dqn_where_all_is_off():
    module = module_of(is_noisy=False, is_distributional=False, epsilon_initial=0.2)
    with torch.no_grad():
        for parameter in module.target_network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    batch = batch_of(64)
    batch[Columns.NEXT_OBS]["action_mask"][3] = 0
    out = module.forward_train(batch)
    of_dqn = dqn.NavigationModule._forward_train(module, batch)
    (taken, offset), (reached, offset_t) = out[rainbow.TAKEN], out[rainbow.REACHED]
    torch.testing.assert_close(taken[:, 0] + offset, of_dqn[Q_TM1])
    value = (reached[:, 0] + offset_t) * out[rainbow.HAS_ACTION]
    torch.testing.assert_close(value, of_dqn[V_T])


@pytest.mark.parametrize("variant", [{}, {"is_noisy": False, "epsilon_initial": 0.5}])
def test_a_forbidden_action_is_never_chosen(variant):
    module = module_of(**variant)
    num = 0
    for seed in range(60):
        obs = observations(1024, seed)
        for forward in (module.forward_exploration, module.forward_inference):
            action = forward({Columns.OBS: obs})[Columns.ACTIONS]
            assert obs["action_mask"].gather(1, action[:, None]).all()
            num += len(action)
    assert num > 100_000


@pytest.mark.parametrize("action_level", ["hole", "patch"])
def test_a_visited_hole_is_never_chosen(action_level):
    config = run_config("paper")
    rules = dataclasses.replace(navigation_config(config.env), action_level=action_level)
    stack = SessionStack.of([draw_session(np.random.default_rng(5)) for _ in range(2)], rules)
    env = CryoEMVectorEnv(stack, rules, 64)
    module = rainbow.RainbowModule(
        observation_space=env.single_observation_space,
        action_space=env.single_action_space,
        model_config={
            "make_network": lambda: make_network(
                rules, stack, support=(0.0, 5.0, 11), initial_noise=2.0
            ),
            "epsilon": (0.5, 0.5, 1),
        },
    )
    observation, _ = env.reset(seed=3)
    has_ended, at = np.zeros(64, bool), np.arange(64)
    for step in range(40):
        forward = module.forward_exploration if step % 2 else module.forward_inference
        batch = {Columns.OBS: {key: torch.as_tensor(v) for key, v in observation.items()}}
        before = unpack_visited(env.compact_observation(), stack.shape.num_holes)
        action = forward(batch)[Columns.ACTIONS].numpy()
        observation, _, terminated, _, _ = env.step(action)
        hole = env.compact_observation()["recent"][:, 0]
        assert not before[at, hole][~has_ended].any()
        has_ended = terminated


def test_a_state_with_nothing_left_is_worth_nothing():
    module = module_of()
    batch = batch_of()
    batch[Columns.NEXT_OBS]["action_mask"][3] = 0
    out = module.forward_train(batch)
    assert out[rainbow.HAS_ACTION].tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    assert all(t.isfinite().all() for key in (rainbow.TAKEN, rainbow.REACHED) for t in out[key])


# ---- the algorithm -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    [{}, {"is_distributional": False}, {"is_noisy": False, "epsilon_initial": 0.2}],
)
def test_it_learns_to_take_the_row_that_pays(variant):
    algorithm = build(**variant)
    try:
        result = until(algorithm, 2000)
        assert algorithm.mean_return > 6.2  # by chance 5; always the best 7.3, noise apart
        learner = result["learners"]["default_policy"]
        assert np.isfinite(learner["loss"])
        assert ("support_ends" in learner) == variant.get("is_distributional", True)
        replay = algorithm.replay
        drawn = replay.priority[replay.is_start]
        assert drawn.std() > 0  # priorities came back from the learner
        assert not any(name.endswith("_noise") for name in algorithm.network_state())
    finally:
        algorithm.stop()


def test_replay_is_uniform_and_returns_of_one_step_where_asked():
    algorithm = build(is_prioritized=False, n_step=1)
    until(algorithm, 200)
    assert algorithm.replay.n_step == 1 and algorithm.replay.priority.size == 0
    assert (algorithm.replay.sample(9, np.random.default_rng(0))["weight"] == 1).all()
    algorithm.stop()


def test_a_checkpoint_goes_on_where_it_was(tmp_path):
    first = build()
    until(first, 800)
    torch.save(first.checkpoint(has_replay=True), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert any(name.endswith("_noise") for name in state["module"])
    second = build(seed=5)
    second.restore_checkpoint(state)
    assert _differences(state, second.checkpoint(has_replay=True)) == []
    # the same batch with the same noise moves both the same way
    for algorithm in (first, second):
        torch.manual_seed(7)
        algorithm._update(is_last=True)
    assert weights_hash(first.network_state()) == weights_hash(second.network_state())
    until(second, 2000)
    assert second.mean_return > 6.5
    for algorithm in (first, second):
        algorithm.stop()


def test_a_network_without_the_parts_asked_for_is_refused():
    for missing in ({"is_noisy": False}, {"is_distributional": False}):
        other = recipe_of(**missing)
        with pytest.raises(Exception, match=rf"algorithm\.{next(iter(missing))} is True and the"):
            build(make_network=functools.partial(rows_network, other))


@pytest.mark.parametrize(
    ("setting", "instead"),
    [
        ({"noisy": True}, "rainbow with is_noisy"),
        ({"num_atoms": 51}, "is_distributional"),
        ({"adam_epsilon": 1e-4}, "learning_rate"),
        ({"hiddens": [64]}, "hidden_sizes"),
        ({"store_buffer_in_checkpoints": True}, "is_buffer_saved"),
        ({"dueling": False}, "dueling of the recipe"),
    ],
)
def test_what_rllib_would_ignore_is_named(setting, instead):
    config = dqn.NavigationDQNConfig()
    config.training(**setting)
    with pytest.raises(ValueError, match=rf"{next(iter(setting))}: is ignored by DQN; .*{instead}"):
        config.validate()


# ---- the whole run -------------------------------------------------------------------------------


def run_config(feature_set="rates", num_env_steps=600, **algorithm):
    algorithm = {"learning_starts": 64, "batch_size": 32, "buffer_capacity": 2000, **algorithm}
    return NavigationRunConfig(
        seed=3,
        env=EnvConfig(preset="cryorl", budget_min=40, feature_set=feature_set),
        sessions=SessionsConfig(pool_size=3),
        algorithm=RainbowConfig(**algorithm),
        training=TrainingConfig(
            num_env_steps=num_env_steps,
            num_envs_per_runner=4,
            evaluation_interval_steps=300,
            num_validation_sessions=3,
            num_torch_threads=1,
        ),
    )


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"is_noisy": False}, "algorithm.epsilon_initial: is 0, and without is_noisy nothing"),
        (
            {"is_noisy": False, "epsilon_initial": 0.1, "initial_noise": 0.2},
            "algorithm.initial_noise: is ignored without noise; set is_noisy too",
        ),
        ({"is_distributional": False, "v_max": 3.0}, "algorithm.v_max: is ignored by values"),
        ({"is_distributional": False, "num_atoms": 11}, "algorithm.num_atoms: is ignored"),
        ({"num_atoms": 1}, "algorithm.num_atoms: a distribution needs 2 or more"),
        ({"v_min": 3.0, "v_max": 2.0}, "algorithm.v_min: expected below v_max, found 3 and 2"),
        ({"is_prioritized": False, "priority_exponent": 0.7}, "is ignored by uniform replay"),
        ({"epsilon_steps": 10}, "algorithm.epsilon_steps: is ignored by an epsilon that does not"),
        ({"adam_epsilon": 1e-4}, "algorithm.adam_epsilon: unknown key"),
    ],
)
def test_settings_that_nothing_reads_are_named(said, problem):
    with pytest.raises(ConfigError, match=problem):
        from_dict({"algorithm": {"name": "rainbow", **said}})


def test_dueling_per_hole_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"algorithm\.dueling: .* feature_set rates"):
        check(run_config("paper", dueling=True))


def test_the_support_comes_from_the_task():
    config = run_config(discount_per_min=0.97)
    low, high, num = training_room.support_for(config)
    # shaped: 1 a minute, discounted, times reward_scale, can be lost, and a quarter of it won
    assert low == pytest.approx(-0.1 * (1 - 0.97**48) / 0.03) and num == 51
    assert high == pytest.approx(-low / 4)
    plain = run_config("paper", discount_per_min=1.0)
    assert training_room.support_for(plain) == (0.0, pytest.approx(4.8), 51)
    asked = run_config(v_min=-1.0, v_max=2.0, num_atoms=11)
    assert training_room.support_for(asked) == (-1.0, 2.0, 11)
    assert training_room.support_for(run_config(is_distributional=False)) is None
    with pytest.raises(ValueError, match="is no range; where one is null"):
        training_room.support_for(run_config(v_min=99.0))


@pytest.mark.parametrize("feature_set", ["rates", "paper"])
def test_a_run_leaves_a_policy_that_acts_as_the_module_does(tmp_path, feature_set):
    config = run_config(feature_set)
    with RunDirectory.create(tmp_path / "run", config) as run:
        summary = train(config, run, progress=lambda row: None)
        state = torch.load(run.best / "state.pt", weights_only=True)
    assert summary["num_updates"] > 0
    loaded = Artefact.load(run.policy)
    assert loaded.name == "rainbow" and loaded.support == training_room.support_for(config)
    assert not any(name.endswith("_noise") for name in loaded.weights)
    # sessions of other sizes: the module with the learner's weights, and the policy from the files
    rules = navigation_config(config.env)
    rng = np.random.default_rng(11)
    stack = SessionStack.of([draw_session(rng) for _ in range(2)], rules)
    env = CryoEMVectorEnv(stack, rules, 4, effects=loaded.calibration.effects)
    module = rainbow.RainbowModule(
        observation_space=env.single_observation_space,
        action_space=env.single_action_space,
        model_config={
            "make_network": lambda: training_room.network_for(config, stack, 0.5),
            "epsilon": (0, 0, 1),
        },
    )
    prefix = "network."
    module.network.load_state_dict(
        {
            name.removeprefix(prefix): torch.as_tensor(value)
            for name, value in state["module"].items()
            if name.startswith(prefix)
        }
    )
    policy = loaded.make(stack)
    observation, _ = env.reset(seed=3)
    has_ended = np.zeros(4, bool)
    for _ in range(25):
        batch = {Columns.OBS: {key: torch.as_tensor(v) for key, v in observation.items()}}
        action = module.forward_inference(batch)[Columns.ACTIONS].numpy()
        compact = env.compact_observation()
        hole = policy.act(compact, np.random.default_rng(0))
        visited = unpack_visited(compact, stack.shape.num_holes)
        assert not visited[np.arange(4), hole][~has_ended].any()
        observation, _, terminated, _, _ = env.step(action)
        reached = env.compact_observation()["recent"][:, 0]
        assert np.array_equal(reached[~has_ended], hole[~has_ended])
        has_ended = terminated
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_RAY, str(run.policy)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr


_WITHOUT_RAY = """
import sys
from pathlib import Path
sys.modules["ray"] = None  # importing it raises ImportError
import numpy as np
from envs.cryoem.stack import SessionStack
from envs.cryoem.synthetic import draw_session
from envs.crystfel.env import num_features
from envs.crystfel.types import TuningConfig
from ssl2rl_ray.algorithms.policy import Artefact
loaded = Artefact.load(Path(sys.argv[1]))
table = draw_session(np.random.default_rng(1))
visited = np.zeros((1, len(table)), bool)
visited[0, 5] = True
observation = {
    "visited": np.packbits(visited, axis=1, bitorder="little"),
    "recent": np.array([[5, -1, -1, -1]], np.int32),
    "elapsed_min": np.zeros((1, 1), np.float32),
    "session": np.zeros((1, 1), np.int32),
}
stack = SessionStack.of([table], loaded.rules)
assert loaded.make(stack).act(observation, np.random.default_rng(0))[0] != 5
"""


def test_a_run_goes_on_after_it_was_stopped(tmp_path):
    config = run_config(num_env_steps=900)
    stopped_at = []

    def progress(row):
        stopped_at.append(row["num_env_steps"])
        if row["num_env_steps"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), RunDirectory.create(tmp_path / "run", config) as run:
        train(config, run, progress=progress)
    rows = []
    with RunDirectory.resume(tmp_path / "run", config) as run:
        summary = train(config, run, progress=rows.append)
    assert rows[0]["num_env_steps"] > stopped_at[-1] and summary["num_env_steps"] >= 900


# ---- tuning --------------------------------------------------------------------------------------


def tuning_config(algorithm, **env):
    rules = {"tunables": ("min_snr", "clen_offset_percent"), "num_frames": 30, "num_steps": 4}
    return CrystFELRunConfig(
        env=TuningConfig(**{"action": "discrete", **rules, **env}),
        experiments=ExperimentsConfig(pool_size=32),
        algorithm=algorithm,
        training=TuningTrainingConfig(
            num_env_steps=800,
            num_envs=16,
            evaluation_interval_steps=400,
            num_validation_experiments=8,
        ),
    )


SMALL = {"hidden_sizes": (8,), "learning_starts": 100, "batch_size": 32, "buffer_capacity": 2000}


@pytest.mark.parametrize("make", [TuningDQNConfig, TuningRainbowConfig])
def test_tuning_by_action_values_leaves_a_policy_that_tunes(tmp_path, make):
    config = tuning_config(make(**SMALL))
    check(config)
    with RunDirectory.create(tmp_path / "run", config) as run:
        summary = tuning_room.train(config, run, progress=lambda row: None)
        state = torch.load(run.best / "state.pt", weights_only=True)
    assert summary["num_updates"] > 0 and 0 < summary["best_share_of_best"] <= 1.2
    policy = TuningPolicy.load(run.policy)
    assert policy.values == tuning_room.values_of(config) and policy.name == config.algorithm.name
    # the same actions as the module's
    observation = torch.randn(64, num_features(config.env))
    module = rainbow.RainbowModule(
        observation_space=gym.spaces.Box(-9, 9, observation.shape[1:]),
        action_space=gym.spaces.Discrete(5),
        model_config={
            "make_network": functools.partial(tuning_room.network_of, config),
            "epsilon": (0, 0, 1),
        },
    )
    module.network.load_state_dict(
        {
            name.removeprefix("network."): torch.as_tensor(value)
            for name, value in state["module"].items()
            if name.startswith("network.")
        }
    )
    action = module.forward_inference({Columns.OBS: observation})[Columns.ACTIONS].numpy()
    assert np.array_equal(policy.act(observation.numpy()), action)
    rng = np.random.default_rng(0)
    assert np.array_equal(policy.act(observation.numpy(), rng), action)
    stuck = policy.act(observation.numpy(), rng, np.full((64, 1), 0.1))
    assert 0.5 < (stuck != action).mean() < 1


def test_the_support_of_tuning_is_what_can_be_gained():
    config = tuning_config(TuningRainbowConfig())
    low, high, num = tuning_room.values_of(config).support
    assert (low, num) == (0, 51) and high == pytest.approx(1.05**0.5 - 0.02**0.5)
    change = tuning_config(TuningRainbowConfig(), reward="change")
    assert tuning_room.values_of(change).support == (-1, 1, 51)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (tuning_config(TuningDQNConfig(), action="continuous"), "env.action: dqn learns what disc"),
        (tuning_config(TuningRainbowConfig(), time_cost=1.0), "algorithm.v_min: set it; env.time"),
        (
            tuning_config(TuningDQNConfig(**SMALL | {"buffer_capacity": 120})),
            "buffer_capacity: 16 epis",
        ),
    ],
)
def test_tuning_settings_that_do_not_go_together_are_named(config, problem):
    with pytest.raises(ConfigError, match=problem):
        check(config)


def test_action_values_of_continuous_actions_are_refused():
    with pytest.raises(ValueError, match="a2c and ppo learn continuous ones"):
        rainbow.RainbowModule(
            observation_space=gym.spaces.Box(-1, 1, (4,)),
            action_space=gym.spaces.Box(-1, 1, (2,)),
            model_config={"make_network": lambda: None, "epsilon": (0, 0, 1)},
        )


def cartpole(*, num_envs, seed):
    return gym.make_vec("CartPole-v1", num_envs, vectorization_mode="sync")


def cartpole_network():
    return VectorNetwork(4, 2, (16,), support=(0.0, 99.0, 21), initial_noise=0.5)


def test_any_task_of_gymnasium_is_learned():
    algorithm = rainbow.build(
        recipe_of(reward_scale=1.0, learning_rate=2e-3),
        TrainingConfig(num_env_steps=4000, num_envs_per_runner=4),
        make_env=cartpole,
        make_network=cartpole_network,
        seed=0,
    )
    until(algorithm, 3000)
    returns = []
    while algorithm.num_env_steps < 4000:  # a mean of four episodes says little
        algorithm.train()
        returns.append(algorithm.mean_return)
    assert np.mean(returns) > 30  # by chance 22; seeds reach 50 to 100
    assert algorithm.replay.observation[""].shape[2:] == (4,)
    algorithm.stop()


def test_networks_of_flat_observations_serve_too():
    network = VectorNetwork(4, 2, (8,), support=(-1, 1, 5), initial_noise=0.5)
    assert network(torch.zeros(3, 4)).shape == (3, 2)

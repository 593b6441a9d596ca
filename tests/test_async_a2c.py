"""Asynchronous A2C on RLlib: V-trace in its learner, fragments as they come, runners that die."""

import types

import pytest
import torch

ray = pytest.importorskip("ray")
from ray.rllib.core import DEFAULT_MODULE_ID  # noqa: E402
from ray.rllib.core.columns import Columns  # noqa: E402
from test_dqn import Rows, until  # noqa: E402

from ssl2rl_ray.algorithms import async_a2c  # noqa: E402
from ssl2rl_ray.algorithms.actor_critic import CandidateActorCritic  # noqa: E402
from ssl2rl_ray.config import TrainingConfig  # noqa: E402
from ssl2rl_ray.recipes import NavigationAsyncA2CConfig  # noqa: E402

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
]


def build(recipe=None, training=None):
    recipe = {"learning_rate": 2e-2, "hidden_sizes": (16, 16), "discount_per_min": 0.5} | (
        recipe or {}
    )
    training = {"num_env_runners": 2, "num_envs_per_runner": 8, "rollout_length": 4} | (
        training or {}
    )
    return async_a2c.build(
        NavigationAsyncA2CConfig(**recipe),
        TrainingConfig(num_env_steps=6000, **training),
        make_env=lambda *, num_envs, seed: Rows(num_envs, seed),
        make_network=lambda: CandidateActorCritic(3, (16, 16)),
        seed=0,
    )


def test_the_learner_corrects_for_actions_that_have_become_less_likely():
    # The numbers of test_returns.py: pi/mu = 2, 0.5, 1, and a fourth row that is no move.
    logged = {}
    metrics = types.SimpleNamespace(
        log_value=lambda key, value, **_: logged.update({key[-1]: value})
    )
    config = types.SimpleNamespace(
        recipe=NavigationAsyncA2CConfig(trace_decay=1.0, max_rho=1.0, max_c=1.0)
    )
    learner = types.SimpleNamespace(config=config, metrics=metrics)

    def column(*numbers):
        return torch.tensor(numbers)[:, None]

    logp = column(0.8, 0.2, 0.5, 0.3).log()
    fragment = {
        Columns.ACTION_LOGP: column(0.4, 0.4, 0.5, 1e-30).log(),
        Columns.REWARDS: column(1.0, 2.0, 23.0, 5.0),
        "discount": column(0.5, 0.5, 0.5, 0.5),
        "is_terminated": column(False, False, True, False),
        "is_truncated": column(False, False, False, False),
        "is_move": column(True, True, True, False),
    }
    values = column(10.0, 20.0, 30.0, 7.0, 9.0)
    advantage, target = async_a2c.AsyncA2CTorchLearner.advantage_and_target(
        learner, fragment, values, logp
    )
    assert target[:3].flatten().tolist() == pytest.approx([9.375, 16.75, 23.0])
    assert advantage[:3].flatten().tolist() == pytest.approx([-0.625, -3.25, -7.0])
    # log 2, log 2 and 0 over three moves
    assert float(logged["log_ratio"]) == pytest.approx(2 * 0.6931472 / 3)


def test_without_a_runner_there_is_nothing_asynchronous():
    with pytest.raises(ValueError, match=r"num_env_runners: .* at least 1 .* use a2c"):
        build(training={"num_env_runners": 0})


def test_it_learns_to_take_the_row_that_pays(local_ray):
    """``Rows`` asserts on the runners that no action was masked."""
    algorithm = build()
    lags = []
    while algorithm.num_env_steps < 6000:
        before = algorithm.num_env_steps, algorithm.num_updates
        result = algorithm.train()
        num_fragments = algorithm.num_updates - before[1]
        assert num_fragments in (1, 2)
        assert 0 < algorithm.num_env_steps - before[0] <= num_fragments * 32
        lags.append(algorithm.policy_lag)
    learner = result["learners"][DEFAULT_MODULE_ID]
    assert algorithm.mean_return > 6.5  # by chance 5; always the best 7.3
    assert learner["log_ratio"] > 0  # fragments are older than the weights that they change
    assert max(lags) >= 1
    played = result["env_runners"]["num_env_steps_sampled_lifetime"]
    assert played == algorithm.num_env_steps
    algorithm.stop()


def test_a_runner_that_dies_is_replaced_and_learning_goes_on(local_ray):
    algorithm = build()
    until(algorithm, 300)
    group = algorithm.env_runner_group
    (victim, *_) = group._worker_manager.actors().values()
    ray.kill(victim, no_restart=False)
    until(algorithm, algorithm.num_env_steps + 600)
    num_rounds = 0
    while group.num_remote_worker_restarts() < 1 and num_rounds < 2000:  # until it is missed
        algorithm.train()
        num_rounds += 1
    while group.num_healthy_remote_workers() < 2 and num_rounds < 4000:  # until it is back
        algorithm.train()
        num_rounds += 1
    assert group.num_healthy_remote_workers() == 2
    assert group.num_remote_worker_restarts() == 1
    until(algorithm, algorithm.num_env_steps + 300)
    algorithm.stop()


def test_a_checkpoint_goes_on_where_it_was(local_ray, tmp_path):
    first = build()
    until(first, 400)
    torch.save(first.checkpoint(), tmp_path / "state.pt")
    second = build()
    second.restore_checkpoint(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (second.num_env_steps, second.num_updates) == (first.num_env_steps, first.num_updates)
    for name, value in first.network_state().items():
        assert torch.equal(value, second.network_state()[name])
    until(second, second.num_env_steps + 200)
    for algorithm in (first, second):
        algorithm.stop()

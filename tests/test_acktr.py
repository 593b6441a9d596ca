"""ACKTR on RLlib: what its Fisher matrix is of, how far a step goes, going on."""

import pytest
import torch

ray = pytest.importorskip("ray")
from ray.rllib.core import DEFAULT_MODULE_ID  # noqa: E402
from test_dqn import Rows, _differences, until  # noqa: E402

from ssl2rl_ray.algorithms import a2c, acktr, policy_losses  # noqa: E402
from ssl2rl_ray.algorithms.actor_critic import CandidateActorCritic  # noqa: E402
from ssl2rl_ray.algorithms.kfac import KFAC  # noqa: E402
from ssl2rl_ray.algorithms.policy import Artefact  # noqa: E402
from ssl2rl_ray.algorithms.policy_module import Gaussian, MaskedCategorical  # noqa: E402
from ssl2rl_ray.checkpoint import weights_hash  # noqa: E402
from ssl2rl_ray.config import (  # noqa: E402
    EnvConfig,
    NavigationRunConfig,
    SessionsConfig,
    TrainingConfig,
)
from ssl2rl_ray.recipes import NavigationACKTRConfig, NavigationAsyncA2CConfig  # noqa: E402
from ssl2rl_ray.runs import RunDirectory  # noqa: E402
from ssl2rl_ray.train import train  # noqa: E402

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
]


def build(recipe=None, seed=0):
    return acktr.build(
        NavigationACKTRConfig(
            **{"hidden_sizes": (16, 16), "discount_per_min": 0.5, **(recipe or {})}
        ),
        TrainingConfig(num_env_steps=4000, num_envs_per_runner=8, rollout_length=16),
        make_env=lambda *, num_envs, seed: Rows(num_envs, seed),
        make_network=lambda: CandidateActorCritic(3, (16, 16)),
        seed=seed,
    )


def optimizer_of(algorithm):
    return algorithm.learner_group._learner.get_optimizer(DEFAULT_MODULE_ID)


# ---- the Fisher matrix ---------------------------------------------------------------------------


def outer_mean(gradient):
    return gradient.T @ gradient / len(gradient)


def test_the_fisher_matrix_of_a_masked_policy_and_its_value():
    torch.manual_seed(0)
    # probabilities 0.2, 0.8 of the two allowed actions: diag(p) - p p^T is 0.16 (1 -1; -1 1)
    logits = (
        torch.tensor([0.2, 0.8, 1.0]).log().masked_fill(torch.tensor([0, 0, 1]) > 0, -torch.inf)
    )
    logits = logits.repeat(40_000, 1).requires_grad_()
    value = torch.full((40_000,), 3.0, requires_grad=True)
    loss = acktr.fisher_loss(MaskedCategorical.from_logits(logits), value)
    of_logits, of_value = torch.autograd.grad(loss, [logits, value])
    expected = torch.tensor([[0.16, -0.16, 0.0], [-0.16, 0.16, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(outer_mean(of_logits), expected, atol=0.005, rtol=0)
    # a Gaussian of variance 1: 1; and what is drawn of one says nothing of the other
    assert of_value.square().mean().item() == pytest.approx(1, abs=0.03)
    assert (of_value * of_logits[:, 0]).mean().item() == pytest.approx(0, abs=0.01)


def test_the_fisher_matrix_of_a_gaussian_policy():
    torch.manual_seed(1)
    # sd 0.5: 1 / sd^2 = 4 of the mean, 2 of the log of the sd
    output = torch.tensor([[0.3, torch.log(torch.tensor(0.5))]]).repeat(40_000, 1).requires_grad_()
    loss = acktr.fisher_loss(Gaussian.from_logits(output), torch.zeros(40_000))
    (gradient,) = torch.autograd.grad(loss, [output])
    expected = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(outer_mean(gradient), expected, atol=0.15, rtol=0)


def test_a_state_in_which_nothing_is_allowed_has_no_gradient():
    logits = torch.full((2, 3), -torch.inf)
    logits[1, 0] = 0.0
    logits.requires_grad_()
    loss = acktr.fisher_loss(MaskedCategorical.from_logits(logits), torch.zeros(2))
    (gradient,) = torch.autograd.grad(loss, [logits])
    assert gradient.eq(0).all()


# ---- on RLlib ------------------------------------------------------------------------------------


def test_a_step_stays_within_its_trust_region(local_ray):
    algorithm = build({"max_kl": 1e-3, "learning_rate": 1e3, "final_learning_rate": 1e3})
    learner = algorithm.learner_group._learner
    network = learner.module[DEFAULT_MODULE_ID].unwrapped().network
    until(algorithm, 500)  # the factors' averages are those of many fragments
    divergences = []
    for _ in range(5):
        fragment = a2c.beside([algorithm.env_runner_group.local_env_runner.sample()])
        observation = {
            name: torch.as_tensor(rows).flatten(0, 1)
            for name, rows in fragment["observation"].items()
        }
        before = network.score(network.expand(observation)).detach()
        algorithm.learn(fragment)
        after = network.score(network.expand(observation)).detach()
        divergences.append(policy_losses.categorical_kl(before, after).mean().item())
        assert 0 < optimizer_of(algorithm).last_lr < 1e3
    assert 0 < max(divergences) < 4e-3
    algorithm.stop()


def test_it_learns_to_take_the_row_that_pays(local_ray):
    """``Rows`` asserts that no action of the 4000 was masked."""
    algorithm = build({"max_kl": 0.02})
    result = until(algorithm, 4000)
    learner = result["learners"][DEFAULT_MODULE_ID]
    assert algorithm.mean_return > 6.5  # by chance 5; always the best 7.3
    assert learner["default_optimizer_learning_rate"] == pytest.approx(0.025, rel=0.3)
    assert 0 < learner["step_size"] <= 0.25
    optimizer = optimizer_of(algorithm)
    assert isinstance(optimizer, KFAC)
    assert all("input_moment" in optimizer.state[layer.weight] for layer in optimizer.layers)
    algorithm.stop()


def test_a_checkpoint_goes_on_where_it_was(local_ray, tmp_path):
    first = build()
    until(first, 600)
    torch.save(first.checkpoint(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = build(seed=5)
    second.restore_checkpoint(state)
    assert _differences(state, second.checkpoint()) == []
    # the same fragment moves both the same way: factors, inverses and random state went along
    fragment = a2c.beside([first.env_runner_group.local_env_runner.sample()])
    hashes = []
    for algorithm in (first, second):
        algorithm.restore_checkpoint(state)
        algorithm.learn(fragment)
        hashes.append(weights_hash(algorithm.network_state()))
    assert hashes[0] == hashes[1]
    until(second, 1000)
    for algorithm in (first, second):
        algorithm.stop()


def test_one_seed_gives_the_same_weights_twice(local_ray):
    hashes = []
    for seed in (1, 1, 2):
        algorithm = build(seed=seed)
        until(algorithm, 400)
        hashes.append(weights_hash(algorithm.network_state()))
        algorithm.stop()
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("recipe", "num_env_runners", "feature_set"),
    [
        (NavigationACKTRConfig(), 0, "rates"),
        (NavigationACKTRConfig(), 0, "paper"),  # its policy's first layer is Adam's
        (NavigationAsyncA2CConfig(), 1, "rates"),
    ],
)
def test_a_run_leaves_a_policy(local_ray, tmp_path, recipe, num_env_runners, feature_set):
    config = NavigationRunConfig(
        env=EnvConfig(preset="cryorl", budget_min=40, feature_set=feature_set),
        sessions=SessionsConfig(pool_size=3, preset="demo"),
        algorithm=recipe,
        training=TrainingConfig(
            num_env_steps=300,
            num_env_runners=num_env_runners,
            num_envs_per_runner=4,
            evaluation_interval_steps=300,
            num_validation_sessions=3,
            num_torch_threads=1,
        ),
    )
    with RunDirectory.create(tmp_path / "run", config) as run:
        summary = train(config, run, progress=lambda row: None)
    assert summary["num_env_steps"] >= 300 and summary["num_updates"] > 5
    assert run.metrics()["train/policy_loss"].notna().any()
    loaded = Artefact.load(run.policy)
    assert (loaded.name, loaded.has_values) == (recipe.name, False)

"""Networks with a policy and a value: masks, the planner at the start, any session size."""

import numpy as np
import pytest
import torch

from envs.cryoem.env import CryoEMVectorEnv
from envs.cryoem.rates import PRIOR_COLUMN
from envs.cryoem.stack import SessionStack, unpack_visited
from envs.cryoem.synthetic import draw_session
from envs.cryoem.types import NavigationConfig
from ssl2rl_ray.algorithms.actor_critic import (
    INITIAL_SPREAD,
    CandidateActorCritic,
    VectorActorCritic,
    make_actor_critic,
    pool,
)
from ssl2rl_ray.algorithms.networks import choose


def rules(feature_set, action_level="hole", **changes):
    return NavigationConfig.preset(
        "cryorl", feature_set=feature_set, action_level=action_level, budget_min=60, **changes
    )


def sessions(config, num=2, seed=0):
    rng = np.random.default_rng(seed)
    return SessionStack.of([draw_session(rng, "demo") for _ in range(num)], config)


def tensors(observation):
    return {key: torch.as_tensor(value) for key, value in observation.items()}


def allowed(observation, stack, config):
    if config.feature_set == "rates":
        return observation["action_mask"].astype(bool)
    session = observation["session"][:, 0]
    patch = stack.patch_id[session]
    is_left = ~unpack_visited(observation, stack.shape.num_holes) & (patch >= 0)
    if config.action_level == "hole":
        return is_left
    return np.array(
        [
            np.bincount(p[left], minlength=stack.shape.num_patches) > 0
            for p, left in zip(patch, is_left, strict=True)
        ]
    )


CASES = [("rates", "hole"), ("paper", "hole"), ("paper", "patch"), ("cryorl", "hole")]


@pytest.mark.parametrize(("feature_set", "action_level"), CASES)
def test_logits_are_forbidden_where_actions_are_and_the_value_is_always_finite(
    feature_set, action_level
):
    config = rules(feature_set, action_level)
    stack = sessions(config)
    torch.manual_seed(0)
    network = make_actor_critic(config, stack)
    env = CryoEMVectorEnv(stack, config, 4, seed=0)
    observation, _ = env.reset()
    for _ in range(8):
        expanded = network.expand(tensors(observation))
        logits, value = network.score(expanded), network.value(expanded)
        is_allowed = torch.as_tensor(allowed(observation, stack, config))
        assert torch.equal(~logits.isneginf(), is_allowed)
        assert value.shape == (4,) and value.isfinite().all()
        spread = logits.masked_fill(~is_allowed, 0.0).amax(1) - logits.masked_fill(
            ~is_allowed, 0.0
        ).amin(1)
        if feature_set != "rates":
            assert (spread < 0.5).all()  # nearly all actions are as likely at first
        observation, *_ = env.step(choose(network, observation))
    policy = torch.distributions.Categorical(logits=logits)
    (policy.log_prob(policy.sample()).sum() + value.sum()).backward()
    for parameter in network.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.parametrize(("feature_set", "action_level"), CASES)
def test_the_same_weights_serve_a_session_of_another_size(feature_set, action_level):
    config = rules(feature_set, action_level)
    network = make_actor_critic(config, sessions(config))
    other = sessions(config, num=3, seed=5)
    assert other.shape.num_holes != sessions(config).shape.num_holes
    again = make_actor_critic(config, other)
    again.load_state_dict(network.state_dict())
    env = CryoEMVectorEnv(other, config, 3, seed=0)
    observation, _ = env.reset()
    assert again.value(again.expand(tensors(observation))).shape == (3,)
    assert choose(again, observation).shape == (3,)


def test_a_residual_policy_begins_as_the_planner():
    network = CandidateActorCritic(30, prior_column=PRIOR_COLUMN, prior_scale=4.0)
    rows = torch.rand(6, 5, 30)
    mask = torch.ones(6, 5, dtype=torch.int8)
    mask[:, 3:] = 0
    observation = {"rows": rows, "action_mask": mask}
    logits = network.score(observation)
    torch.testing.assert_close(logits[:, :3], 4 * rows[:, :3, PRIOR_COLUMN])
    with pytest.raises(ValueError, match="prior_column: 30"):
        CandidateActorCritic(30, prior_column=30)


def test_the_value_looks_at_allowed_rows_only():
    network = CandidateActorCritic(3)
    rows, mask = torch.rand(1, 4, 3), torch.tensor([[1, 0, 1, 0]])
    before = network.value({"rows": rows, "action_mask": mask})
    rows[:, [1, 3]] = 99.0
    assert torch.equal(network.value({"rows": rows, "action_mask": mask}), before)
    nothing = network.value({"rows": rows, "action_mask": mask * 0})
    assert nothing.isfinite().all()
    hidden = torch.tensor([[[1.0, 2.0], [5.0, 6.0], [9.0, 9.0]]])
    pooled = pool(hidden, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(pooled, torch.tensor([[3.0, 4.0]]))


def test_the_value_of_a_hole_network_hangs_on_the_time():
    config = rules("paper")
    stack = sessions(config)
    network = make_actor_critic(config, stack)
    observation, _ = CryoEMVectorEnv(stack, config, 2, seed=0).reset()
    early = network.value(network.expand(tensors(observation)))
    observation["elapsed_min"] = observation["elapsed_min"] + 30
    late = network.value(network.expand(tensors(observation)))
    assert (early != late).all()


def test_a_gaussian_begins_wide_and_its_spread_is_cut_off():
    torch.manual_seed(0)
    network = VectorActorCritic(7, 4, is_gaussian=True)
    mean, log_sd = network.score(torch.randn(5, 7)).chunk(2, -1)
    assert mean.abs().max() < 0.2
    torch.testing.assert_close(log_sd.exp(), torch.full((5, 2), INITIAL_SPREAD), atol=0.1, rtol=0)
    with torch.no_grad():
        network.policy[-1].bias[2:] = -100.0
    assert (network.score(torch.randn(5, 7))[:, 2:] == -2.6).all()


def test_holes_need_the_sessions_tables():
    with pytest.raises(ValueError, match="needs the sessions' tables"):
        make_actor_critic(rules("paper"), None)

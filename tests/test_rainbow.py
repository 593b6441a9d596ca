"""Rainbow: pure losses by hand, each part really on and really off, learning, files."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from envs.cryoem.rewards import highest_return
from envs.cryoem.stack import SessionStack
from envs.cryoem.synthetic import draw_session
from envs.cryoem.types import NavigationConfig
from ssl2rl_ray.algorithms.losses import (
    categorical_target,
    cross_entropy,
    kl_divergence,
    make_support,
    project,
)
from ssl2rl_ray.algorithms.networks import (
    CandidateNetwork,
    HoleNetwork,
    VectorNetwork,
    expectation,
    make_network,
)
from ssl2rl_ray.algorithms.noisy import NoisyLinear, resample, silence, without_noise

FIVE = make_support(-2.0, 2.0, 5)  # -2 -1 0 1 2


def row(*values):
    return torch.tensor([values], dtype=torch.float32)


# ---- the projection ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("z", "p", "expected"),
    [
        ((0.0, 0.0, 0.0, 0.0, 0.0), (0.2, 0.2, 0.2, 0.2, 0.2), (0, 0, 1, 0, 0)),  # on an atom
        ((0.25,) * 5, (0.2,) * 5, (0, 0, 0.75, 0.25, 0)),  # between two
        ((-9.0, -9, -9, -9, -9), (0.2,) * 5, (1, 0, 0, 0, 0)),  # below the support
        ((9.0, 9, 9, 9, 9), (0.2,) * 5, (0, 0, 0, 0, 1)),  # above it
        ((-2.0, -1, 0, 1, 2), (0.1, 0.2, 0.3, 0.4, 0), (0.1, 0.2, 0.3, 0.4, 0)),  # stays
        ((2.0, 2, 2, 2, 2), (0.5, 0.5, 0, 0, 0), (0, 0, 0, 0, 1)),  # exactly the last
        ((-2.0, -2, -2, -2, -2), (0.5, 0.5, 0, 0, 0), (1, 0, 0, 0, 0)),  # exactly the first
        # r = 0.5, discount 0.5: -0.5, 0, 0.5, 1, 1.5
        (
            (-0.5, 0.0, 0.5, 1.0, 1.5),
            (0.0, 0.0, 1.0, 0.0, 0.0),
            (0, 0, 0.5, 0.5, 0),
        ),
        ((-0.5, 0.0, 0.5, 1.0, 1.5), (0.2,) * 5, (0, 0.1, 0.4, 0.4, 0.1)),
    ],
)
def test_the_projection_by_hand(z, p, expected):
    torch.testing.assert_close(project(row(*z), row(*p), FIVE), row(*expected))


def test_an_end_is_a_point_whatever_the_distribution_after_it():
    target = categorical_target(
        torch.tensor([1.5, 1.5]),
        torch.tensor([0.0, 1.0]),  # the end, and another step
        torch.tensor([7.0, 0.0]),
        torch.tensor([[50.0, 0, 0, 0, 0], [50.0, 0, 0, 0, 0]]),
        torch.zeros(2),
        FIVE,
    )
    torch.testing.assert_close(target[0], torch.tensor([0, 0, 0, 0.5, 0.5]))
    torch.testing.assert_close(target[1], torch.tensor([0, 0.5, 0.5, 0, 0]))  # -2 + 1.5


def test_offsets_move_the_support_of_each_state():
    # here 1 + {-2 .. 2}, there 0.5 + {-2 .. 2}, certainly its middle: 2 + 0.5 (0 + 0.5) = 2.25
    target = categorical_target(
        torch.tensor([2.0]),
        torch.tensor([0.5]),
        torch.tensor([0.5]),
        torch.tensor([[0.0, 0, 99, 0, 0]]),
        torch.tensor([1.0]),
        FIVE,
    )
    torch.testing.assert_close(target, row(0, 0, 0, 0.75, 0.25))  # 1.25 beyond 1


def test_rounding_never_leads_past_the_last_atom():
    # in float32 (10 - v_min) / delta is above 50 for this support: a ceiling would be atom 51
    support = make_support(-10.0, 10.0, 51)
    for v_max in (10.0, 0.7, 3.3, 1 / 3, 33.3, 7e5):
        support = make_support(-v_max / 3, v_max, 51)
        above = torch.nextafter(support[-1:], torch.tensor([torch.inf]))
        below = torch.nextafter(support[-1:], torch.tensor([-torch.inf]))
        for value in (above, support[-1:], below):
            got = project(value.expand(1, 51), torch.full((1, 51), 1 / 51), support)
            assert got[0, -1].item() == pytest.approx(1, abs=2e-4)
            assert got.sum().item() == pytest.approx(1, abs=1e-5)


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=11, max_size=11),
    st.floats(0.0625, 20, width=32),
    st.integers(2, 60),
    st.integers(0, 2**31),
)
def test_the_projection_keeps_mass_and_within_the_support_the_mean(z, half, num_atoms, seed):
    support = make_support(-half, half, num_atoms)
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(1, 11, generator=generator) + 1e-3
    p = p / p.sum()
    z_t = torch.tensor([z])
    got = project(z_t, p, support) if num_atoms == 11 else _general(z_t, p, support)
    assert (got >= 0).all()
    assert got.sum().item() == pytest.approx(1, abs=1e-4)
    inside = z_t.clamp(support[0], support[-1])
    mean = (p * inside).sum().item()
    assert (got @ support).item() == pytest.approx(mean, abs=1e-4 * max(1, half))


def _general(z_t, p, support):
    """Of more or fewer values than atoms: one value at a time, as all of the mass."""
    num = len(support)
    rows = project(z_t.T.expand(-1, num), torch.full((z_t.shape[1], num), 1 / num), support)
    return p @ rows


@pytest.mark.parametrize(
    ("v_min", "v_max", "num"), [(1, 1, 5), (2, 1, 5), (0, 1, 1), (0, math.nan, 5), (0, math.inf, 5)]
)
def test_what_is_no_support_is_refused(v_min, v_max, num):
    with pytest.raises(ValueError, match="expected v_min < v_max and 2 or more atoms"):
        make_support(v_min, v_max, num)


def test_cross_entropy_and_divergence_by_hand():
    logits = torch.log(row(0.5, 0.25, 0.25))
    target = row(0.5, 0.5, 0.0)
    # -(0.5 ln 0.5 + 0.5 ln 0.25) = 1.5 ln 2; the target's entropy is ln 2
    assert cross_entropy(logits, target).item() == pytest.approx(1.5 * math.log(2))
    assert kl_divergence(logits, target).item() == pytest.approx(0.5 * math.log(2))
    same = torch.tensor([[0.2, 0.3, 0.5]])
    assert kl_divergence(torch.log(same), same).item() == pytest.approx(0, abs=1e-6)
    assert (
        cross_entropy(torch.log(same), same).item() > 1
    )  # the floor that priorities must not have


def test_shapes_and_types_are_asserted():
    with pytest.raises(ValueError, match="z_t: expected rank 2"):
        project(torch.zeros(5), torch.zeros(1, 5), FIVE)
    with pytest.raises(ValueError, match="support: expected one of"):
        project(torch.zeros(1, 5), torch.zeros(1, 5), FIVE.double())
    with pytest.raises(ValueError, match="r_t: expected rank 1"):
        categorical_target(row(1), *(torch.zeros(1),) * 2, row(0, 0), torch.zeros(1), FIVE)


# ---- noise ---------------------------------------------------------------------------------------


def test_a_noisy_layer_by_hand():
    layer = NoisyLinear(2, 2, 0.5)
    assert layer.weight_noise[0, 0].item() == pytest.approx(0.5 / math.sqrt(2))
    assert layer.weight.abs().max() <= 1 / math.sqrt(2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2], [3, 4]]))
        layer.weight_noise.copy_(torch.tensor([[1.0, 1], [2, 2]]))
        layer.bias.copy_(torch.tensor([10.0, 20]))
        layer.bias_noise.copy_(torch.tensor([1.0, 1]))
    x = row(1, 1)
    assert layer(x).tolist() == [[13, 27]]
    layer.noise = torch.tensor([1.0, -2]), torch.tensor([1.0, 3])
    # weights + noise * out in^T: [[2, 0], [9, -8]], biases 11 and 23
    assert layer(x).tolist() == [[13, 24]]
    silence(nn.Sequential(layer))
    assert layer(x).tolist() == [[13, 27]]


def test_noise_has_the_size_that_factorised_noise_has():
    torch.manual_seed(0)
    layer = NoisyLinear(300, 300, 0.5, bias=False)
    resample(nn.Sequential(layer))
    e_in, e_out = layer.noise
    product = e_out[:, None] * e_in
    assert abs(product.mean()) < 0.1
    # E f(e)^2 = E |e| = sqrt(2 / pi), of each factor
    assert product.square().mean().item() == pytest.approx(2 / math.pi, rel=0.15)


def test_noise_does_not_hang_on_the_mode_of_the_module():
    network = CandidateNetwork(3, (8, 8), initial_noise=0.5)
    observation = rows_observation()
    silent = network.eval().score(observation)
    torch.testing.assert_close(network.train().score(observation), silent)
    resample(network)
    noisy = network.eval().score(observation)
    assert not torch.equal(noisy, silent)
    torch.testing.assert_close(network.train().score(observation), noisy)
    resample(network)
    assert not torch.equal(network.score(observation), noisy)
    silence(network)
    torch.testing.assert_close(network.score(observation), silent)


def test_new_noise_does_not_spoil_a_gradient_under_way():
    network = VectorNetwork(3, 2, (8,), initial_noise=0.5, support=(-1, 1, 5))
    resample(network)
    outputs, _ = network.at(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))
    expected = torch.autograd.grad(outputs.sum(), list(network.parameters()), retain_graph=True)
    resample(network)
    got = torch.autograd.grad(outputs.sum(), list(network.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_without_its_noise_a_network_is_a_plain_one():
    noisy = CandidateNetwork(3, (8, 8), initial_noise=0.5, support=(-1, 1, 5))
    plain = CandidateNetwork(3, (8, 8), support=(-1, 1, 5))
    plain.load_state_dict(without_noise(noisy.state_dict()))
    observation = rows_observation()
    torch.testing.assert_close(plain.score(observation), noisy.score(observation))
    assert not any(isinstance(layer, NoisyLinear) for layer in plain.modules())


# ---- networks ------------------------------------------------------------------------------------


def rows_observation(batch=6, candidates=5, features=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(batch, candidates, generator=generator) < 0.6).to(torch.int8)
    mask[:, 1] = 1
    return {
        "rows": torch.randn(batch, candidates, features, generator=generator),
        "action_mask": mask,
    }


VARIANTS = [
    {"is_dueling": d, "support": s, "prior_column": p}
    for d in (True, False)
    for s in (None, (-3.0, 3.0, 7))
    for p in (None, 1)
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_of_one_action_are_those_of_all(variant):
    torch.manual_seed(0)
    network = CandidateNetwork(3, (8, 8), initial_noise=0.5, **variant)
    resample(network)
    observation = rows_observation()
    q = network.score(observation)
    for action in range(5):
        chosen = torch.full((6,), action)
        is_allowed = observation["action_mask"][:, action].bool()
        taken = network.taken(observation, chosen)
        torch.testing.assert_close(taken[is_allowed], q[is_allowed, action])
    assert q.isneginf().equal(~observation["action_mask"].bool())


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_forbidden_is_in_no_value(variant):
    network = CandidateNetwork(3, (8, 8), **variant)
    observation = rows_observation()
    changed = {**observation, "rows": observation["rows"].clone()}
    changed["rows"][~observation["action_mask"].bool()] = 1e4
    torch.testing.assert_close(network.score(changed), network.score(observation))
    one = torch.ones(6, dtype=torch.int64)
    torch.testing.assert_close(network.taken(changed, one), network.taken(observation, one))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_with_nothing_left_has_no_nan(variant):
    network = CandidateNetwork(3, (8, 8), **variant)
    observation = rows_observation()
    observation["action_mask"][2] = 0
    q = network.score(observation)
    assert q[2].isneginf().all() and not q.isnan().any()
    taken = network.taken(observation, torch.zeros(6, dtype=torch.int64))
    assert taken.isfinite().all()
    taken.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_advantages_are_centred_over_actions_and_not_over_atoms():
    torch.manual_seed(1)
    network = CandidateNetwork(3, (8, 8), support=(-3, 3, 7))
    observation = rows_observation()
    allowed = observation["action_mask"].bool()
    logits = torch.stack(
        [network.at(observation, torch.full((6,), action))[0] for action in range(5)], 1
    )  # (B, C, Z)
    hidden = network.body(observation["rows"])
    for b in range(6):
        value = network.value(hidden[b, allowed[b]].mean(0))
        torch.testing.assert_close(logits[b, allowed[b]].mean(0), value)
        assert value.std() > 0  # the value has a shape of its own over the atoms
    # and it learns: in RLlib's module its gradient vanishes
    loss = cross_entropy(logits[:, 1], torch.eye(7)[:6]).sum()
    loss.backward()
    assert network.value[0].weight.grad.norm() > 1e-3


def test_vector_networks_centre_over_actions():
    torch.manual_seed(1)
    network = VectorNetwork(3, 4, (8,), support=(-3, 3, 7))
    x = torch.randn(5, 3)
    torch.testing.assert_close(network.outputs(x).mean(1), network.value(network.body(x)))
    assert VectorNetwork(3, 4, (8,), is_dueling=False).value is None


def test_a_residual_distribution_begins_as_the_planner():
    network = CandidateNetwork(3, (8, 8), support=(-3, 3, 7), prior_column=2, prior_scale=0.1)
    observation = rows_observation()
    q = network.score(observation)
    prior = observation["rows"][..., 2]
    allowed = observation["action_mask"].bool()
    for b in range(6):
        difference = q[b, allowed[b]] - 0.1 * prior[b, allowed[b]]
        torch.testing.assert_close(difference, difference[:1].expand_as(difference))
    assert "prior_scale" in network.state_dict()
    assert "prior_scale" not in dict(network.named_parameters())  # nothing would move it


@pytest.mark.parametrize("action_level", ["hole", "patch"])
@pytest.mark.parametrize("support", [None, (0.0, 9.0, 11)])
def test_the_network_per_hole_pays_for_the_rows_it_needs(action_level, support):
    rules = NavigationConfig.preset("cryorl", feature_set="paper", action_level=action_level)
    rng = np.random.default_rng(0)
    stack = SessionStack.of([draw_session(rng) for _ in range(2)], rules)
    torch.manual_seed(0)
    network = make_network(rules, stack, support=support, initial_noise=0.5)
    assert isinstance(network, HoleNetwork)
    resample(network)
    from envs.cryoem.env import CryoEMVectorEnv

    env = CryoEMVectorEnv(stack, rules, 4)
    observation, _ = env.reset(seed=1)
    tensors = {key: torch.as_tensor(value) for key, value in observation.items()}
    expanded = network.expand(tensors)
    q = network.score(expanded)
    action = q.argmax(1)
    outputs, offset = network.at(expanded, action)
    assert outputs.shape == (4, 1 if support is None else 11) and not offset.any()
    torch.testing.assert_close(
        expectation(outputs, network.support), q.gather(1, action[:, None])[:, 0]
    )
    torch.testing.assert_close(network.taken(tensors, action), q.max(1).values)


def test_the_highest_return_by_hand():
    rules = NavigationConfig.preset("cryorl")  # a hole a minute pays 1
    assert highest_return(rules, 10, 1.0) == pytest.approx(10 + 8)  # the last move takes 8
    assert highest_return(rules, 1e6, 0.97) == pytest.approx(1 / 0.03)
    short = highest_return(rules, 10, 0.97)
    assert sum(0.97**k for k in range(10)) < short < sum(0.97**k for k in range(19))
    paper = NavigationConfig.preset("paper")  # a hole in two minutes
    assert highest_return(paper, 120, 1.0) == pytest.approx((120 + 15) / 2)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.floats(0.8, 1), st.floats(1, 99))
def test_no_session_returns_more(moves, discount, budget):
    rules = NavigationConfig.preset("paper")
    elapsed = total = 0.0
    for move in moves:
        if elapsed >= budget:
            break
        total += discount**elapsed * rules.reward[move]
        elapsed += rules.minutes[move]
    assert total <= highest_return(rules, budget, discount) * (1 + 1e-6)

"""The expander and the per-hole network against features per hole through the plain MLP."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.cryoem.env import CryoEMVectorEnv
from envs.cryoem.features import hole_features
from envs.cryoem.stack import SessionStack, unpack_visited
from envs.cryoem.types import HoleTable, NavigationConfig
from ssl2rl_ray.algorithms.expander import P_STEP, Expander, unpack_bits
from ssl2rl_ray.algorithms.module import epsilon_greedy
from ssl2rl_ray.algorithms.networks import CandidateNetwork, HoleNetwork, make_network


def session(num_holes=60, seed=0, num_labelled=None):
    """Holes scattered over patches of squares of grids, in no particular order."""
    rng = np.random.default_rng(seed)
    patch = rng.integers(0, max(2, num_holes // 6), num_holes)
    p = rng.random(num_holes)
    ctf = np.where(rng.random(num_holes) < p, 4.0, 9.0)
    if num_labelled is not None:
        ctf[num_labelled:] = np.nan
    return HoleTable.from_names(
        hole_name=[f"h{i}" for i in range(num_holes)],
        grid=(patch // 6).astype(str),
        square=(patch // 3).astype(str),
        patch=patch.astype(str),
        p_low_ctf=p,
        ctf_max_resolution_A=ctf,
    )


def rules(feature_set, **changes):
    changes = {"budget_min": 1000, **changes}
    return NavigationConfig.preset("cryorl", feature_set=feature_set, **changes)


def tensors(observation):
    return {key: torch.as_tensor(value) for key, value in observation.items()}


def played(stack, config, num_steps, seed=0, num_envs=5):
    """An env after random moves, and what it shows."""
    rng = np.random.default_rng(seed)
    env = CryoEMVectorEnv(stack, config, num_envs)
    observation, _ = env.reset(seed=seed)
    for _ in range(num_steps):
        mask = env.action_mask()
        observation, *_ = env.step((rng.random(mask.shape) * mask).argmax(1))
    return env, observation


def plain(network, stack, observation, config):
    """(E, N) values of the same weights on the reference features; visited holes -inf."""
    visited = unpack_visited(observation, stack.shape.num_holes)
    at = observation["session"][:, 0]
    recent = observation["recent"]
    features = hole_features(stack, at, visited, recent[:, 0], recent, config)
    with torch.no_grad():
        q = network.mlp(torch.as_tensor(features)).squeeze(-1)
    allowed = ~visited & (stack.patch_id[at] >= 0)
    return q.masked_fill(~torch.as_tensor(allowed), -torch.inf)


@settings(max_examples=25, deadline=None)
@given(
    feature_set=st.sampled_from(["paper", "cryorl"]),
    sizes=st.lists(st.integers(12, 90), min_size=1, max_size=3),
    num_steps=st.integers(0, 40),
    num_past_steps=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_equals_the_plain_mlp_on_the_reference_features(
    feature_set, sizes, num_steps, num_past_steps, seed
):
    config = rules(feature_set, num_past_steps=num_past_steps)
    tables = [session(n, seed + i, num_labelled=n // 2) for i, n in enumerate(sizes)]
    stack = SessionStack.of(tables, config)
    _, observation = played(stack, config, num_steps, seed)
    torch.manual_seed(seed)
    network = HoleNetwork(Expander(stack, config, p_step=0))
    expected = plain(network, stack, observation, config)
    with torch.no_grad():
        found = network(tensors(observation))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("feature_set", ["paper", "cryorl"])
@pytest.mark.parametrize("num_left", [1, 30, 398])
def test_features_stay_exact_until_little_is_left(feature_set, num_left):
    # Sums over what was visited nearly cancel the totals at the end of a roll-out.
    config = rules(feature_set, num_past_steps=3)
    stack = SessionStack.of([session(400), session(400, 1)], config)
    order = np.stack([np.random.default_rng(i).permutation(400) for i in range(4)])
    visited = np.ones((4, 400), bool)
    np.put_along_axis(visited, order[:, :num_left], False, 1)
    at, recent = np.array([0, 1, 1, 0]), order[:, num_left:][:, :3]
    recent = np.pad(recent, ((0, 0), (0, 3 - recent.shape[1])), constant_values=-1)
    expander = Expander(stack, config)
    packed = np.packbits(visited, axis=1, bitorder="little")
    found = expander(tensors({"visited": packed, "recent": recent, "session": at[:, None]}))
    row, hole = np.nonzero(~visited)
    group = found.group[row, stack.patch_id[at[row], hole]]
    features = hole_features(stack, at, visited, recent[:, 0], recent, config)[row, hole]
    expected = torch.as_tensor(features)[:, expander.group_columns]
    torch.testing.assert_close(group, expected, atol=1e-6, rtol=0)


def test_own_p_is_rounded_under_paper_and_exact_under_cryorl():
    table = session(80)
    for feature_set, step in (("paper", P_STEP), ("cryorl", 0)):
        config = rules(feature_set)
        stack = SessionStack.of([table], config)
        _, observation = played(stack, config, 7)
        network = make_network(config, stack)
        p = stack.p_low_ctf.copy()
        if step:
            # the group sums keep the exact p: only the hole's own column is rounded
            own = torch.as_tensor(np.round(p / step) * step - p, dtype=torch.float32)
            weight = network.mlp[0].weight[:, network.expander.own_columns].sum(1)
            visited = unpack_visited(observation, stack.shape.num_holes)
            features = torch.as_tensor(
                hole_features(
                    stack,
                    observation["session"][:, 0],
                    visited,
                    observation["recent"][:, 0],
                    observation["recent"],
                    config,
                )
            )
            with torch.no_grad():
                hidden = network.mlp[0](features) + own[:, :, None] * weight
                for layer in network.mlp[1:]:
                    hidden = layer(hidden)
            expected = hidden.squeeze(-1).masked_fill(torch.as_tensor(visited), -torch.inf)
        else:
            expected = plain(network, stack, observation, config)
        with torch.no_grad():
            torch.testing.assert_close(network(tensors(observation)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("action_level", ["hole", "patch"])
def test_taken_is_the_same_value_with_the_gradient_of_that_row_alone(action_level):
    config = rules("paper", action_level=action_level)
    stack = SessionStack.of([session(70), session(40, 1)], config)
    env, observation = played(stack, config, 9)
    network = make_network(config, stack)
    action = torch.as_tensor(env.action_mask().argmax(1))
    q = network(tensors(observation))
    taken = network.taken(tensors(observation), action)
    torch.testing.assert_close(taken, q.gather(1, action[:, None])[:, 0])
    weights = list(network.parameters())
    through_all = torch.autograd.grad(q.gather(1, action[:, None]).sum(), weights)
    through_row = torch.autograd.grad(taken.sum(), weights)
    for a, b in zip(through_all, through_row, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_patch_is_worth_its_best_unvisited_hole():
    config = rules("cryorl", action_level="patch")
    stack = SessionStack.of([session(50)], config)
    env, observation = played(stack, config, 20, num_envs=3)
    by_patch = make_network(config, stack)
    by_hole = HoleNetwork(by_patch.expander)
    by_hole.load_state_dict(by_patch.state_dict())
    with torch.no_grad():
        of_patch, of_hole = by_patch(tensors(observation)), by_hole(tensors(observation))
    assert np.array_equal(of_patch.isfinite().numpy(), env.action_mask())
    visited = unpack_visited(observation, 50)
    for episode in range(3):
        for patch in range(stack.shape.num_patches):
            left = [h for h in stack.slot_hole[0, patch] if h >= 0 and not visited[episode, h]]
            expected = of_hole[episode, left[0]] if left else -torch.inf
            assert of_patch[episode, patch] == pytest.approx(float(expected), abs=1e-6)


def test_weights_load_into_any_session_and_nothing_else_is_stored():
    config = rules("paper")
    small = make_network(config, SessionStack.of([session(30)], config))
    large = make_network(config, SessionStack.of([session(90, 5)], config))
    assert set(small.state_dict()) == {
        f"mlp.{i}.{w}" for i in (0, 2, 4) for w in ("weight", "bias")
    }
    large.load_state_dict(small.state_dict())
    _, observation = played(SessionStack.of([session(90, 5)], config), config, 3)
    assert large(tensors(observation)).shape == (5, 90)
    assert small.expander.table_hash != large.expander.table_hash


def test_a_target_network_shares_the_tables():
    config = rules("paper")
    network = make_network(config, SessionStack.of([session(30)], config))
    copied = copy.deepcopy(network, memo={id(network.expander): network.expander})
    assert copied.expander is network.expander and copied.mlp is not network.mlp


def test_equal_unvisited_holes_of_a_patch_share_a_cell():
    table = HoleTable.from_names(
        hole_name=list("abcdef"),
        grid=["g"] * 6,
        square=["s"] * 6,
        patch=["p", "p", "q", "p", "q", "q"],
        p_low_ctf=np.array([0.5, 0.501, 0.5, 0.9, 0.9, 0.9]),
    )
    config = rules("paper")
    expander = Expander(SessionStack.of([table], config), config)
    cell = expander.hole_cell[0].tolist()
    assert cell[0] == cell[1] and cell[4] == cell[5] and len(set(cell)) == 4
    exact = Expander(SessionStack.of([table], config), config, p_step=0)
    assert exact.cell_p.shape[1] == 5


@given(st.integers(1, 70), st.integers(0, 2**31))
def test_bits_are_unpacked_in_little_order(num_holes, seed):
    visited = np.random.default_rng(seed).random((3, num_holes)) < 0.3
    packed = np.packbits(visited, axis=1, bitorder="little")
    assert np.array_equal(visited, unpack_bits(torch.as_tensor(packed), num_holes))


def test_no_visited_hole_is_chosen_in_100000_sampled_actions():
    config = rules("paper")
    stack = SessionStack.of([session(40)], config)
    network = make_network(config, stack)
    torch.manual_seed(0)
    for num_steps in (1, 20, 38):
        env, observation = played(stack, config, num_steps, num_envs=100)
        q = network(tensors(observation)).detach().repeat(400, 1)
        allowed = np.tile(env.action_mask(), (400, 1))
        action = epsilon_greedy(q, 0.7).numpy()
        assert allowed[np.arange(len(action)), action].all()
        if num_steps == 20:  # exploration reaches all that is allowed, and evenly
            counts = np.bincount(
                epsilon_greedy(q[:1].repeat(40_000, 1), 1.0).numpy(), minlength=40
            )[allowed[0]]
            assert np.abs(counts - counts.mean()).max() < 5 * np.sqrt(counts.mean())


def test_epsilon_greedy_where_nothing_is_allowed_gives_some_action():
    assert epsilon_greedy(torch.full((2, 3), -torch.inf), 1.0).tolist() == [0, 0]


def test_untrained_residual_candidates_play_the_prior():
    torch.manual_seed(0)
    network = CandidateNetwork(6, prior_column=2)
    rows = torch.randn(50, 7, 6)
    mask = (torch.rand(50, 7) < 0.6).to(torch.int8)
    mask[:, 0] = 1
    q = network({"rows": rows, "action_mask": mask})
    assert torch.equal(q.isfinite(), mask.bool())
    prior = rows[..., 2].masked_fill(~mask.bool(), -torch.inf)
    assert torch.equal(q.argmax(1), prior.argmax(1))
    free = CandidateNetwork(6)({"rows": rows, "action_mask": mask})
    assert not torch.equal(free.argmax(1), prior.argmax(1))


def test_the_planners_move_is_left_only_for_one_that_is_worth_more_than_the_margin():
    torch.manual_seed(0)
    network = CandidateNetwork(6, prior_column=2, margin=0.3)
    torch.nn.init.normal_(network.advantage.weight)
    rows = torch.randn(200, 7, 6)
    mask = (torch.rand(200, 7) < 0.6).to(torch.int8)
    mask[0] = 0
    observation = {"rows": rows, "action_mask": mask}
    q, preference = network(observation), network.preference(observation)
    assert torch.equal(preference.isfinite(), mask.bool()) and preference[0].isneginf().all()
    q, preference, rows, mask = q[1:], preference[1:], rows[1:], mask[1:].bool()
    keep = mask.any(1)
    q, preference, prior = (
        q[keep],
        preference[keep],
        rows[keep, :, 2].masked_fill(~mask[keep], -torch.inf),
    )
    planned = prior.argmax(1, keepdim=True)
    gain = q.max(1).values - q.gather(1, planned)[:, 0]
    assert torch.equal(preference.argmax(1) == planned[:, 0], gain <= 0.3)
    assert (gain > 0.3).any() and ((gain > 0) & (gain <= 0.3)).any()
    network.margin = 0.0
    greedy = network.preference(observation)
    assert torch.equal(greedy, network(observation))


def test_dueling_advantages_are_centred_over_allowed_rows():
    torch.manual_seed(0)
    network = CandidateNetwork(4)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    rows = torch.randn(2, 3, 4)
    q = network({"rows": rows, "action_mask": mask})
    other = rows.clone()
    other[0, 2], other[1, 0] = 99, -99  # rows that are not allowed must not matter
    assert torch.equal(q, network({"rows": other, "action_mask": mask}))
    hidden = network.body(rows)
    for episode in range(2):
        allowed = mask[episode].bool()
        value = network.value(hidden[episode, allowed].mean(0))
        assert q[episode, allowed].mean().item() == pytest.approx(value.item(), abs=1e-5)
    (q[mask.bool()] ** 2).sum().backward()
    grads = [p.grad for p in network.parameters()]
    assert all(g is not None and torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)


def test_a_state_without_candidates_gives_no_nan():
    network = CandidateNetwork(4)
    q = network({"rows": torch.randn(1, 3, 4), "action_mask": torch.zeros(1, 3)})
    assert q.isneginf().all()


def test_what_is_not_served_is_said():
    config = rules("paper")
    stack = SessionStack.of([session(30)], config)
    with pytest.raises(ValueError, match=r"algorithm\.dueling"):
        make_network(config, stack, is_dueling=True)
    with pytest.raises(ValueError, match="needs the sessions' tables"):
        make_network(config, None)
    with pytest.raises(ValueError, match="hidden_sizes"):
        make_network(config, stack, hidden_sizes=())
    with pytest.raises(ValueError, match="has no features per hole"):
        Expander(stack, dataclasses.replace(config, feature_set="rates"))
    with pytest.raises(ValueError, match="prior_column: 9"):
        CandidateNetwork(4, prior_column=9)

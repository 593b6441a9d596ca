"""Returns and advantages against numbers worked out by hand; what holds for any fragment."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl2rl_ray.algorithms.returns import gae, n_step_returns, next_values, v_trace


def column(*numbers, dtype=torch.float32):
    return torch.tensor(numbers, dtype=dtype)[:, None]


def flags(*numbers):
    return column(*numbers, dtype=torch.bool)


NONE = flags(0, 0, 0)
REWARD = column(1.0, 2.0, 3.0)
VALUE = column(10.0, 20.0, 30.0)
NEXT = column(20.0, 30.0, 40.0)


def test_next_values_are_one_row_later():
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert next_values(value, torch.tensor([5.0, 6.0])).tolist() == [[3.0, 4.0], [5.0, 6.0]]


def test_returns_to_the_end_of_the_fragment_by_hand():
    # 3 + 0.5*40 = 23; 2 + 0.5*23 = 13.5; 1 + 0.5*13.5 = 7.75
    result = n_step_returns(REWARD, NEXT, NONE, NONE, 0.5)
    assert result.flatten().tolist() == [7.75, 13.5, 23.0]


def test_returns_of_one_and_two_steps_by_hand():
    one = n_step_returns(REWARD, NEXT, NONE, NONE, 0.5, num_steps=1)
    assert one.flatten().tolist() == [11.0, 17.0, 23.0]
    # 1 + 0.5*2 + 0.25*30; 2 + 0.5*3 + 0.25*40; the last has one step
    two = n_step_returns(REWARD, NEXT, NONE, NONE, 0.5, num_steps=2)
    assert two.flatten().tolist() == [9.5, 13.5, 23.0]


def test_a_terminated_step_is_worth_its_reward_and_a_truncated_one_its_bootstrap_too():
    # terminated at the second: 2; then 1 + 0.5*2 = 2
    assert n_step_returns(REWARD, NEXT, flags(0, 1, 0), NONE, 0.5).flatten().tolist() == [2, 2, 23]
    # truncated at the second: 2 + 0.5*30 = 17; then 1 + 0.5*17 = 9.5
    result = n_step_returns(REWARD, NEXT, NONE, flags(0, 1, 0), 0.5)
    assert result.flatten().tolist() == [9.5, 17.0, 23.0]


def test_both_flags_mean_terminated():
    result = n_step_returns(REWARD, NEXT, flags(0, 1, 0), flags(0, 1, 0), 0.5)
    assert result.flatten().tolist() == [2.0, 2.0, 23.0]


def test_gae_by_hand():
    # errors: 1+10-10 = 1; 2+15-20 = -3; 3+20-30 = -7; decay 0.5*0.8 = 0.4
    # -7; -3 + 0.4*-7 = -5.8; 1 + 0.4*-5.8 = -1.32
    result = gae(REWARD, VALUE, NEXT, NONE, NONE, 0.5, 0.8)
    assert result.flatten().tolist() == pytest.approx([-1.32, -5.8, -7.0])


def test_gae_across_ends_by_hand():
    # terminated at the second: error 2 - 20 = -18, nothing comes back over it: 1 + 0.4*-18 = -6.2
    result = gae(REWARD, VALUE, NEXT, flags(0, 1, 0), NONE, 0.5, 0.8)
    assert result.flatten().tolist() == pytest.approx([-6.2, -18.0, -7.0])
    # truncated: error -3 as before, but the third's -7 does not come back: 1 + 0.4*-3 = -0.2
    result = gae(REWARD, VALUE, NEXT, NONE, flags(0, 1, 0), 0.5, 0.8)
    assert result.flatten().tolist() == pytest.approx([-0.2, -3.0, -7.0])


def test_discounts_per_step_by_hand():
    # errors: 1 + 0.5*20 - 10 = 1; 2 + 0.1*30 - 20 = -15; 3 + 1*40 - 30 = 13
    # 13; -15 + 0.1*13 = -13.7; 1 + 0.5*-13.7 = -5.85
    discount = column(0.5, 0.1, 1.0)
    result = gae(REWARD, VALUE, NEXT, NONE, NONE, discount, 1.0)
    assert result.flatten().tolist() == pytest.approx([-5.85, -13.7, 13.0])
    returns = n_step_returns(REWARD, NEXT, NONE, NONE, discount)
    assert returns.flatten().tolist() == pytest.approx([4.15, 6.3, 43.0])


def test_episodes_side_by_side_do_not_mix():
    both = [torch.cat([REWARD, REWARD], 1), torch.cat([VALUE, 0 * VALUE], 1)]
    end = torch.cat([NONE, flags(0, 0, 1)], 1)
    result = gae(*both, torch.cat([NEXT, NEXT], 1), end, torch.zeros_like(end), 0.5, 0.8)
    assert result[:, 0].tolist() == pytest.approx([-1.32, -5.8, -7.0])
    # errors 1+10, 2+15, 3: 3; 17+1.2; 11 + 0.4*18.2
    assert result[:, 1].tolist() == pytest.approx([18.28, 18.2, 3.0])


def test_v_trace_by_hand():
    # pi/mu = 2, 0.5, 1: rho = c = 1, 0.5, 1; errors 1, -3, -7 as above
    # corrections: -7; 0.5*-3 + 0.5*0.5*-7 = -3.25; 1*1 + 0.5*1*-3.25 = -0.625
    logp = torch.log(column(0.8, 0.2, 0.5))
    behaviour = torch.log(column(0.4, 0.4, 0.5))
    result = v_trace(logp, behaviour, REWARD, VALUE, NEXT, NONE, NONE, 0.5)
    assert result.value_target.flatten().tolist() == pytest.approx([9.375, 16.75, 23.0])
    # rho (r + 0.5 v_next - V): 1 + 0.5*16.75 - 10; 0.5 (2 + 0.5*23 - 20); 3 + 0.5*40 - 30
    assert result.advantage.flatten().tolist() == pytest.approx([-0.625, -3.25, -7.0])


def test_v_trace_clips_rho_and_c_apart_by_hand():
    # pi/mu = 4 everywhere, max_rho 2, max_c 1, trace_decay 0.5: rho 2, c 0.5
    # corrections: -14; -6 + 0.5*0.5*-14 = -9.5; 2 + 0.25*-9.5 = -0.375
    logp = torch.log(column(0.8, 0.8, 0.8))
    behaviour = torch.log(column(0.2, 0.2, 0.2))
    result = v_trace(
        logp, behaviour, REWARD, VALUE, NEXT, NONE, NONE, 0.5, trace_decay=0.5, max_rho=2.0
    )
    assert result.value_target.flatten().tolist() == pytest.approx([9.625, 10.5, 16.0])
    # 2 (1 + 0.5*10.5 - 10); 2 (2 + 0.5*16 - 20); 2 (3 + 20 - 30)
    assert result.advantage.flatten().tolist() == pytest.approx([-7.5, -20.0, -14.0])


def test_v_trace_across_ends_by_hand():
    logp = column(0.0, 0.0, 0.0)
    result = v_trace(logp, logp, REWARD, VALUE, NEXT, NONE, flags(0, 1, 0), 0.5)
    assert result.value_target.flatten().tolist() == pytest.approx([9.5, 17.0, 23.0])
    assert result.advantage.flatten().tolist() == pytest.approx([-0.5, -3.0, -7.0])
    result = v_trace(logp, logp, REWARD, VALUE, NEXT, flags(0, 1, 0), NONE, 0.5)
    assert result.value_target.flatten().tolist() == pytest.approx([2.0, 2.0, 23.0])


def test_v_trace_does_not_overflow_where_an_action_has_become_likely():
    behaviour = column(-1000.0, -1000.0, -1000.0)
    result = v_trace(0 * behaviour, behaviour, REWARD, VALUE, NEXT, NONE, NONE, 0.5)
    assert torch.isfinite(result.value_target).all() and torch.isfinite(result.advantage).all()


def test_returns_are_targets_without_gradient():
    value = VALUE.clone().requires_grad_()
    logp = torch.zeros_like(VALUE).requires_grad_()
    results = (
        gae(REWARD, value, NEXT, NONE, NONE, 0.5, 0.8),
        n_step_returns(REWARD, value, NONE, NONE, 0.5),
        *v_trace(logp, logp, REWARD, value, NEXT, NONE, NONE, 0.5),
    )
    assert not any(result.requires_grad for result in results)


@st.composite
def fragments(draw):
    """A fragment of float64 columns, ends anywhere, discounts per step."""
    num_steps, num_episodes = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = num_steps, num_episodes
    end = rng.random(shape)
    value, next_value = rng.normal(size=(2, *shape))
    goes_on = (end[:-1] >= 0.15) & (end[:-1] <= 0.85)
    next_value[:-1] = np.where(goes_on, value[1:], next_value[:-1])
    return {
        "reward": torch.from_numpy(rng.normal(size=shape)),
        "value": torch.from_numpy(value),
        "next_value": torch.from_numpy(next_value),
        "is_terminated": torch.from_numpy(end < 0.15),
        "is_truncated": torch.from_numpy(end > 0.85),
        "discount": torch.from_numpy(rng.uniform(0, 1, shape)),
    }


def slow_returns(reward, next_value, is_terminated, is_truncated, discount, num_steps):
    """Number by number, as the definition says."""
    result = torch.empty_like(reward)
    for t, e in np.ndindex(*reward.shape):
        total, factor = 0.0, 1.0
        for k in range(t, min(t + num_steps, len(reward))):
            total += factor * float(reward[k, e])
            factor *= float(discount[k, e])
            if is_terminated[k, e]:
                factor = 0.0
            if is_terminated[k, e] or is_truncated[k, e]:
                break
        result[t, e] = total + factor * float(next_value[k, e])
    return result


@settings(deadline=None)
@given(fragments(), st.integers(1, 12))
def test_n_step_returns_are_the_definition(fragment, num_steps):
    del fragment["value"]
    expected = slow_returns(**fragment, num_steps=num_steps)
    torch.testing.assert_close(n_step_returns(**fragment, num_steps=num_steps), expected)


@settings(deadline=None)
@given(fragments())
def test_gae_without_decay_and_value_is_the_whole_return(fragment):
    advantage = gae(**fragment, trace_decay=1.0)
    value = fragment.pop("value")
    torch.testing.assert_close(advantage + value, n_step_returns(**fragment))


@settings(deadline=None)
@given(fragments(), st.floats(0, 1))
def test_v_trace_on_policy_is_gae(fragment, trace_decay):
    logp = torch.full_like(fragment["reward"], -1.3)
    result = v_trace(logp, logp, **fragment, trace_decay=trace_decay)
    advantage = gae(**fragment, trace_decay=trace_decay)
    torch.testing.assert_close(result.value_target, advantage + fragment["value"])


@settings(deadline=None)
@given(fragments(), st.integers(0, 2**32 - 1))
def test_v_trace_is_the_sum_of_equation_1(fragment, seed):
    rng = np.random.default_rng(seed)
    shape = fragment["reward"].shape
    logp = torch.from_numpy(rng.normal(size=shape))
    behaviour = torch.from_numpy(rng.normal(size=shape))
    result = v_trace(logp, behaviour, **fragment, max_rho=1.5, max_c=0.7)
    for s, e in np.ndindex(*shape):
        total, factor = float(fragment["value"][s, e]), 1.0
        for t in range(s, shape[0]):
            ratio = math.exp(logp[t, e] - behaviour[t, e])
            here, there = (float(fragment[k][t, e]) for k in ("value", "next_value"))
            discount = float(fragment["discount"][t, e])
            there = 0.0 if fragment["is_terminated"][t, e] else there
            error = float(fragment["reward"][t, e]) + discount * there - here
            total += factor * min(1.5, ratio) * error
            if fragment["is_terminated"][t, e] or fragment["is_truncated"][t, e]:
                break
            factor *= discount * min(0.7, ratio)
        assert float(result.value_target[s, e]) == pytest.approx(total)


@settings(deadline=None)
@given(fragments())
def test_what_follows_an_end_changes_nothing_before_it(fragment):
    before = gae(**fragment, trace_decay=0.9)
    has_end = fragment["is_terminated"] | fragment["is_truncated"]
    last = torch.where(has_end.any(0), has_end.int().argmax(0), len(has_end))
    is_after = torch.arange(len(has_end))[:, None] > last
    for name in ("reward", "value", "next_value"):
        fragment[name] = torch.where(is_after, 1e6, fragment[name])
    after = gae(**fragment, trace_decay=0.9)
    assert torch.equal(before[~is_after], after[~is_after])


@settings(deadline=None)
@given(fragments())
def test_float32_gives_float32_and_the_same_numbers(fragment):
    single = {k: v.float() if v.is_floating_point() else v for k, v in fragment.items()}
    result = gae(**single, trace_decay=0.9)
    assert result.dtype == torch.float32
    expected = gae(**fragment, trace_decay=0.9).float()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": REWARD[:, 0]}, r"reward: expected floats \(T, E\)"),
        ({"value": VALUE[:2]}, r"value: expected torch.float32 \(3, 1\)"),
        ({"next_value": NEXT.double()}, "next_value: expected torch.float32"),
        ({"is_truncated": REWARD}, "is_truncated: expected torch.bool"),
    ],
)
def test_wrong_shapes_and_dtypes_are_named(change, message):
    fragment = {
        "reward": REWARD,
        "value": VALUE,
        "next_value": NEXT,
        "is_terminated": NONE,
        "is_truncated": NONE,
    }
    with pytest.raises(ValueError, match=message):
        gae(**fragment | change, discount=0.5, trace_decay=0.8)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="num_steps: must be at least 1, is 0"):
        n_step_returns(REWARD, NEXT, NONE, NONE, 0.5, num_steps=0)
    with pytest.raises(ValueError, match="max_c: must be in"):
        v_trace(REWARD, REWARD, REWARD, VALUE, NEXT, NONE, NONE, 0.5, max_c=2.0)
    with pytest.raises(ValueError, match=r"bootstrap_value \(E,\)"):
        next_values(VALUE, VALUE)

"""Masked categorical, bounded Gaussian and the losses of policy gradients, by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal, kl_divergence

from ssl2rl_ray.algorithms import policy_losses as losses

NO = -torch.inf
LOG3 = math.log(3)


def test_the_categorical_by_hand():
    """1 : 3 and nothing; one allowed; none allowed."""
    logits = torch.tensor([[0.0, LOG3, NO], [NO, 7.0, NO], [NO, NO, NO]])
    probs = losses.categorical_log_probs(logits).exp()
    torch.testing.assert_close(probs[:2], torch.tensor([[0.25, 0.75, 0.0], [0.0, 1.0, 0.0]]))
    logp = losses.categorical_log_prob(logits, torch.tensor([1, 1, 2]))
    torch.testing.assert_close(logp, torch.tensor([math.log(0.75), 0.0, 0.0]))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    torch.testing.assert_close(losses.categorical_entropy(logits), torch.tensor([entropy, 0, 0]))
    assert losses.categorical_log_prob(logits, torch.tensor([2, 0, 0]))[:2].isneginf().all()
    uniform = torch.tensor([[0.0, 0.0, NO]] * 2 + [[NO] * 3])
    uniform[1] = torch.tensor([NO, 0.0, NO])
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    torch.testing.assert_close(losses.categorical_kl(logits, uniform), torch.tensor([kl, 0, 0]))


def test_gradients_are_finite_where_one_or_none_is_allowed():
    logits = torch.tensor([[0.0, LOG3, NO], [NO, 7.0, NO], [NO, NO, NO]], requires_grad=True)
    chosen = losses.categorical_log_prob(logits, torch.tensor([1, 1, 0]))
    (chosen + losses.categorical_entropy(logits)).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    # of log p: 1 - p and -p; of the entropy: -p (log p + H)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    expected = [-0.25 - 0.25 * (math.log(0.25) + entropy), 0.25 - 0.75 * (math.log(0.75) + entropy)]
    torch.testing.assert_close(logits.grad[0], torch.tensor([*expected, 0.0]))
    assert (logits.grad[1:] == 0).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_the_categorical_is_torchs_over_what_is_allowed(seed, num_actions):
    torch.manual_seed(seed)
    logits = torch.randn(4, num_actions) * 5
    is_allowed = torch.rand(4, num_actions) < 0.6
    is_allowed[:, 0] = True
    masked = logits.masked_fill(~is_allowed, NO)
    for row in range(4):
        theirs = Categorical(logits=logits[row][is_allowed[row]])
        ours = losses.categorical_log_probs(masked[row : row + 1])[0][is_allowed[row]]
        torch.testing.assert_close(ours, theirs.logits)
        entropy = losses.categorical_entropy(masked[row : row + 1])[0]
        torch.testing.assert_close(entropy, theirs.entropy(), atol=1e-5, rtol=1e-5)


def test_a_forbidden_action_is_never_drawn():
    """A million draws, of logits that differ by up to 100 between allowed and forbidden ones."""
    torch.manual_seed(0)
    for _ in range(25):
        scale = float(torch.rand(1)) * 20
        logits = torch.randn(40_000, 12) * scale
        is_allowed = torch.rand(40_000, 12) < torch.rand(40_000, 1)
        drawn = losses.categorical_sample(logits.masked_fill(~is_allowed, NO))
        is_open = is_allowed.any(1)
        assert is_allowed[is_open].gather(1, drawn[is_open][:, None]).all()
        assert (drawn[~is_open] == 0).all()


def test_actions_are_drawn_as_often_as_they_are_likely():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, LOG3, NO, 0.0]).expand(50_000, 4)
    share = torch.bincount(losses.categorical_sample(logits), minlength=4) / 50_000
    torch.testing.assert_close(share, torch.tensor([0.2, 0.6, 0.0, 0.2]), atol=0.01, rtol=0)


def test_the_gaussian_is_torchs():
    torch.manual_seed(0)
    output, other, action = torch.randn(5, 6), torch.randn(5, 6), torch.randn(5, 3)
    p, q = (Normal(o[:, :3], o[:, 3:].exp()) for o in (output, other))
    torch.testing.assert_close(losses.gaussian_log_prob(output, action), p.log_prob(action).sum(-1))
    torch.testing.assert_close(losses.gaussian_entropy(output), p.entropy().sum(-1))
    torch.testing.assert_close(losses.gaussian_kl(output, other), kl_divergence(p, q).sum(-1))
    # one standard normal at its mean: -log sqrt(2 pi)
    assert losses.gaussian_log_prob(torch.zeros(1, 2), torch.zeros(1, 1)).item() == pytest.approx(
        -0.918939, abs=1e-6
    )
    drawn = losses.gaussian_sample(torch.tensor([1.0, math.log(0.5)]).expand(50_000, 2))
    assert drawn.mean().item() == pytest.approx(1, abs=0.01)
    assert drawn.std().item() == pytest.approx(0.5, abs=0.01)


IS_MOVE = torch.tensor([[True, True], [True, False]])


def test_the_losses_by_hand():
    """Three moves; the fourth row is none, whatever stands there."""
    logp = torch.tensor([[-1.0, -2.0], [-3.0, NO]], requires_grad=True)
    advantage = torch.tensor([[1.0, 2.0], [-1.0, 99.0]], requires_grad=True)
    loss = losses.policy_gradient_loss(logp, advantage, IS_MOVE)
    assert loss.item() == pytest.approx((1 + 4 - 3) / 3)
    loss.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[-1.0, -2.0], [1.0, 0.0]]) / 3)
    assert advantage.grad is None
    value = torch.tensor([[1.0, 1.0], [0.0, 7.0]], requires_grad=True)
    target = torch.tensor([[2.0, 1.0], [3.0, -9.0]])
    loss = losses.value_loss(value, target, IS_MOVE)
    assert loss.item() == pytest.approx((1 + 0 + 9) / 3)
    loss.backward()
    torch.testing.assert_close(value.grad, torch.tensor([[-2.0, 0.0], [-6.0, 0.0]]) / 3)


def test_advantages_are_standardised_over_moves():
    advantage = torch.tensor([[1.0, 2.0], [3.0, 50.0]])
    found = losses.standardized(advantage, IS_MOVE)[IS_MOVE]
    sd = math.sqrt(2 / 3)
    torch.testing.assert_close(found, torch.tensor([-1 / sd, 0.0, 1 / sd]))
    same = losses.standardized(torch.full((2, 2), 5.0), IS_MOVE)
    assert (same == 0).all()
    assert losses.mean_over(advantage, torch.zeros(2, 2, dtype=torch.bool)).item() == 0


def test_shapes_and_types_are_checked():
    with pytest.raises(ValueError, match=r"is_move: expected torch\.bool"):
        losses.mean_over(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"advantage: expected torch.float32 \(2, 2\)"):
        losses.policy_gradient_loss(torch.zeros(2, 2), torch.zeros(2), IS_MOVE)
    with pytest.raises(ValueError, match=r"target: expected torch\.float32"):
        losses.value_loss(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.float64), IS_MOVE)

"""Losses of value learning, pure functions of tensors.

Shape letters: B batch, A actions. An action that is not allowed has the value -inf; a state in
which nothing is allowed is worth 0. ``q_tm1`` belongs to the state in which ``a_tm1`` was taken,
``r_t`` and ``discount_t`` to the way from there, ``q_t`` to the state that was reached.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import huber_loss


def _check(name: str, value: Tensor, rank: int, *dtypes: torch.dtype) -> None:
    if value.ndim != rank:
        raise ValueError(f"{name}: expected rank {rank}, found shape {tuple(value.shape)}")
    if value.dtype not in dtypes:
        raise ValueError(f"{name}: expected one of {dtypes}, found {value.dtype}")


def take(q: Tensor, action: Tensor) -> Tensor:
    """(B,) the values of the actions (B,) int64 in ``q`` (B, A) float32."""
    _check("q", q, 2, torch.float32, torch.float64)
    _check("action", action, 1, torch.int64)
    return q.gather(1, action[:, None]).squeeze(1)


def bootstrap_value(q_t: Tensor, q_t_selector: Tensor) -> Tensor:
    """(B,) value of the reached state: ``q_t`` (B, A) at the best action by ``q_t_selector``.

    With two networks this is double Q-learning (van Hasselt et al. 2016, arXiv:1509.06461, eq. 4);
    with the same tensor twice it is Q-learning. Both are -inf where an action is not allowed;
    the value is 0 where no action is. No gradient passes.
    """
    _check("q_t", q_t, 2, torch.float32, torch.float64)
    _check("q_t_selector", q_t_selector, 2, q_t.dtype)
    with torch.no_grad():
        best, action = q_t_selector.max(dim=1)
        return torch.where(best.isneginf(), torch.zeros_like(best), take(q_t, action))


def td_error(q_tm1: Tensor, r_t: Tensor, discount_t: Tensor, v_t: Tensor) -> Tensor:
    """(B,) r_t + discount_t v_t - q_tm1, all (B,); the end of an episode has discount 0."""
    _check("q_tm1", q_tm1, 1, torch.float32, torch.float64)
    for name, value in (("r_t", r_t), ("discount_t", discount_t), ("v_t", v_t)):
        _check(name, value, 1, q_tm1.dtype)
    return (r_t + discount_t * v_t).detach() - q_tm1


def weighted_huber(error: Tensor, weight: Tensor, delta: float = 1.0) -> Tensor:
    """Scalar: mean over B of weight times Huber's loss of the error (Huber 1964), both (B,)."""
    _check("error", error, 1, torch.float32, torch.float64)
    _check("weight", weight, 1, error.dtype)
    loss = huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)
    return (weight * loss).mean()


# ---- distributions on a support of Z equally spaced values --------------------------------------


def make_support(v_min: float, v_max: float, num_atoms: int) -> Tensor:
    """(Z,) float32, ``v_min`` to ``v_max``; raises ValueError where that is no range."""
    if num_atoms < 2 or not -float("inf") < v_min < v_max < float("inf"):
        raise ValueError(
            f"expected v_min < v_max and 2 or more atoms, found {num_atoms} from {v_min} to {v_max}"
        )
    return torch.linspace(v_min, v_max, num_atoms)


def project(z_t: Tensor, p_t: Tensor, support: Tensor) -> Tensor:
    """(B, Z) probabilities on ``support`` (Z,) of values ``z_t`` with probabilities ``p_t`` (B, Z).

    Each value's probability is shared by the two atoms beside it, so that the mean stays; values
    beyond the support count as its ends (Bellemare et al. 2017, arXiv:1707.06887, eq. 7).
    """
    _check("z_t", z_t, 2, torch.float32, torch.float64)
    _check("p_t", p_t, 2, z_t.dtype)
    _check("support", support, 1, z_t.dtype)
    last = len(support) - 1
    position = (z_t - support[0]) * (last / (support[-1] - support[0]))
    # Rounding may lead past the last atom, so there is no ceiling: each atom but the last has a
    # right neighbour, and the last one is reached as all of the way to it.
    position = position.clamp(0, last)
    left = position.floor().clamp(max=last - 1)
    share = position - left
    index = left.long()
    result = torch.zeros_like(p_t)
    result.scatter_add_(1, index, p_t * (1 - share))
    return result.scatter_add_(1, index + 1, p_t * share)


def categorical_target(
    r_t: Tensor,
    discount_t: Tensor,
    offset_t: Tensor,
    logits_t: Tensor,
    offset_tm1: Tensor,
    support: Tensor,
) -> Tensor:
    """(B, Z) how r_t + discount_t (support + offset_t) lies on support + offset_tm1; no gradient.

    ``logits_t`` (B, Z) are of the state reached. An offset (B,) moves the support of a state as a
    whole: what is known of it beforehand.
    """
    _check("logits_t", logits_t, 2, torch.float32, torch.float64)
    for name, value in (
        ("r_t", r_t),
        ("discount_t", discount_t),
        ("offset_t", offset_t),
        ("offset_tm1", offset_tm1),
    ):
        _check(name, value, 1, logits_t.dtype)
    with torch.no_grad():
        z_t = discount_t[:, None] * (support + offset_t[:, None])
        return project((r_t - offset_tm1)[:, None] + z_t, logits_t.softmax(1), support)


def cross_entropy(logits_tm1: Tensor, p_target: Tensor) -> Tensor:
    """(B,) -sum p log softmax(logits), both (B, Z) (Bellemare et al. 2017, algorithm 1)."""
    _check("logits_tm1", logits_tm1, 2, torch.float32, torch.float64)
    _check("p_target", p_target, 2, logits_tm1.dtype)
    return -(p_target * logits_tm1.log_softmax(1)).sum(1)


def kl_divergence(logits_tm1: Tensor, p_target: Tensor) -> Tensor:
    """(B,) cross entropy minus the entropy of the target: 0 where nothing is left to learn.

    The priority of a distributional error (Hessel et al. 2018, arXiv:1710.02298, sec. 4).
    """
    entropy = -torch.special.xlogy(p_target, p_target).sum(1)
    return (cross_entropy(logits_tm1, p_target) - entropy).clamp(min=0)

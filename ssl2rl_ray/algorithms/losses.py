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

"""Distributions and losses of policy gradients, pure functions of tensors.

Shape letters: B any leading axes, A actions, K components of a continuous action. Logits are -inf
where an action is not allowed; a state in which nothing is allowed (an episode is over) has one
imagined action: log-probability 0, entropy 0, no gradient. A Gaussian is given by (..., 2 K):
means, then logs of standard deviations. Actions beyond their bounds are cut off by whoever plays
them and learned from as they were drawn (Fujita and Maeda 2018, arXiv:1802.07564, discuss it).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def categorical_log_probs(logits: Tensor) -> Tensor:
    """(B, A) log-probabilities of all actions, -inf where one is not allowed."""
    is_over = logits.isneginf().all(-1, keepdim=True)
    return torch.log_softmax(logits.masked_fill(is_over, 0.0), -1).masked_fill(
        logits.isneginf() & ~is_over, -torch.inf
    )


def categorical_log_prob(logits: Tensor, action: Tensor) -> Tensor:
    """(B,) log-probability of the actions (B,); -inf for one that is not allowed."""
    logp = categorical_log_probs(logits).gather(-1, action.long().unsqueeze(-1)).squeeze(-1)
    return logp.masked_fill(logits.isneginf().all(-1), 0.0)


def categorical_entropy(logits: Tensor) -> Tensor:
    """(B,) nats, over the allowed actions."""
    is_forbidden = logits.isneginf()
    logp = categorical_log_probs(logits)
    # filled before the product: 0 times -inf would be nan, in the gradient too
    entropy = -(logp.exp() * logp.masked_fill(is_forbidden, 0.0)).sum(-1)
    return entropy.masked_fill(is_forbidden.all(-1), 0.0)


def categorical_kl(logits: Tensor, other: Tensor) -> Tensor:
    """(B,) KL divergence of ``logits`` from ``other``, which allow the same actions."""
    is_forbidden = logits.isneginf() | other.isneginf()
    logp, logq = categorical_log_probs(logits), categorical_log_probs(other)
    difference = logp.masked_fill(is_forbidden, 0.0) - logq.masked_fill(is_forbidden, 0.0)
    kl = (logp.exp() * difference).sum(-1)
    return kl.masked_fill(is_forbidden.all(-1), 0.0)


@torch.no_grad()
def categorical_sample(logits: Tensor) -> Tensor:
    """(B,) int64 drawn actions, only allowed ones; 0 where none is.

    The largest of logit plus Gumbel noise: a logit of -inf never is, whatever the noise.
    """
    noise = torch.empty_like(logits).exponential_().clamp_(min=torch.finfo(logits.dtype).tiny)
    return (logits - noise.log_()).argmax(-1)


def gaussian_log_prob(output: Tensor, action: Tensor) -> Tensor:
    """(B,) log-density of the actions (B, K), as they were drawn."""
    mean, log_sd = output.chunk(2, -1)
    z = (action - mean) * (-log_sd).exp()
    return -(0.5 * z**2 + log_sd + 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(output: Tensor) -> Tensor:
    """(B,) nats, before actions are cut off at their bounds."""
    log_sd = output.chunk(2, -1)[1]
    return (log_sd + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def gaussian_kl(output: Tensor, other: Tensor) -> Tensor:
    """(B,) KL divergence of ``output`` from ``other``."""
    mean_p, log_p = output.chunk(2, -1)
    mean_q, log_q = other.chunk(2, -1)
    ratio = ((2 * log_p).exp() + (mean_p - mean_q) ** 2) * (-2 * log_q).exp()
    return (log_q - log_p + 0.5 * (ratio - 1)).sum(-1)


@torch.no_grad()
def gaussian_sample(output: Tensor) -> Tensor:
    """(B, K) drawn actions, which may be beyond their bounds."""
    mean, log_sd = output.chunk(2, -1)
    return mean + log_sd.exp() * torch.randn_like(mean)


def mean_over(value: Tensor, is_move: Tensor) -> Tensor:
    """Scalar: mean of ``value`` where ``is_move``, both of one shape; 0 where nothing is."""
    _check("is_move", is_move, value.shape, torch.bool)
    kept = torch.where(is_move, value, torch.zeros_like(value))
    return kept.sum() / is_move.sum().clamp(min=1)


@torch.no_grad()
def standardized(advantage: Tensor, is_move: Tensor, least_sd: float = 1e-4) -> Tensor:
    """The advantages less their mean over moves, in units of their standard deviation."""
    mean = mean_over(advantage, is_move)
    sd = mean_over((advantage - mean) ** 2, is_move).sqrt()
    return (advantage - mean) / sd.clamp(min=least_sd)


def policy_gradient_loss(logp: Tensor, advantage: Tensor, is_move: Tensor) -> Tensor:
    """Scalar whose descent is the policy gradient (Mnih et al. 2016, arXiv:1602.01783, section 4).

    All of one shape; no gradient passes through ``advantage``.
    """
    _check("advantage", advantage, logp.shape, logp.dtype)
    return mean_over(-logp * advantage.detach(), is_move)


def value_loss(value: Tensor, target: Tensor, is_move: Tensor) -> Tensor:
    """Scalar: mean square of the errors of the value function; ``target`` has no gradient."""
    _check("target", target, value.shape, value.dtype)
    return mean_over((target.detach() - value) ** 2, is_move)


def _check(name: str, value: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    if value.shape != shape or value.dtype != dtype:
        raise ValueError(
            f"{name}: expected {dtype} {tuple(shape)}, found {value.dtype} {tuple(value.shape)}"
        )

"""Returns and advantages of fragments: n-step, generalised advantages, V-trace (torch alone).

Shape letters: T steps of a fragment, E episodes side by side. Row t holds the reward of the step
that is taken in state t, ``value`` of that state and ``next_value`` of the state that the step
reached. Where a step ends its episode that is the last state, not the first of the next episode:

- ``is_terminated``: the task is over and what follows is worth nothing; ``next_value`` is unused.
- ``is_truncated``: the episode was cut off; ``next_value`` stands for what would have followed.

Nothing passes from one episode to another; within one, ``next_value`` is the next row's ``value``.
An env that resets in the step after (gymnasium's ``AutoresetMode.NEXT_STEP``, as ours do) has the
last state in the row after an end, so ``next_values(value, bootstrap_value)`` is right for it; that
row is no move, what comes out for it means nothing, and a loss leaves it out. ``discount`` is a
number, or (T, E) where steps take unequally long (discount_per_min ** minutes). Torch and not
numpy, because V-trace needs the learner's own probabilities and values are born on its device;
arrays become tensors at no cost (``torch.as_tensor``). Nothing has a gradient: returns are targets.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def next_values(value: Tensor, bootstrap_value: Tensor) -> Tensor:
    """(T, E) the value one row later; after the last row ``bootstrap_value`` (E,)."""
    if value.ndim != 2 or bootstrap_value.shape != value.shape[1:]:
        raise ValueError(
            f"value must be (T, E) and bootstrap_value (E,): {tuple(value.shape)} and "
            f"{tuple(bootstrap_value.shape)}"
        )
    return torch.cat([value[1:], bootstrap_value[None]])


@torch.no_grad()
def n_step_returns(
    reward: Tensor,
    next_value: Tensor,
    is_terminated: Tensor,
    is_truncated: Tensor,
    discount: float | Tensor,
    num_steps: int | None = None,
) -> Tensor:
    """(T, E) r_t + d_t r_t+1 + ... and the value after ``num_steps`` steps.

    Without ``num_steps``, and near the fragment's end, as many steps as there are: the returns of
    A3C (Mnih et al. 2016, arXiv:1602.01783, algorithm S3). All others (T, E), flags bool. Raises
    ValueError for other shapes and dtypes or if ``num_steps`` is less than 1.
    """
    _check(reward, next_value=next_value, is_terminated=is_terminated, is_truncated=is_truncated)
    if num_steps is not None and num_steps < 1:
        raise ValueError(f"num_steps: must be at least 1, is {num_steps}")
    goes_on = ~(is_terminated | is_truncated)
    bootstrap = torch.where(is_terminated, torch.zeros_like(next_value), next_value)
    result = reward + discount * bootstrap
    for _ in range(min(num_steps or len(reward), len(reward)) - 1):
        following = torch.where(goes_on[:-1], result[1:], bootstrap[:-1])
        following = torch.cat([following, bootstrap[-1:]])
        result = reward + discount * following
    return result


@torch.no_grad()
def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    is_terminated: Tensor,
    is_truncated: Tensor,
    discount: float | Tensor,
    trace_decay: float,
) -> Tensor:
    """(T, E) generalised advantages (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

    Add ``value`` for the targets of a value function (TD(lambda)); ``trace_decay`` 1 gives
    ``n_step_returns(...) - value``, 0 the error of one step. All others (T, E), flags bool. Raises
    ValueError for other shapes and dtypes.
    """
    _check(
        reward,
        value=value,
        next_value=next_value,
        is_terminated=is_terminated,
        is_truncated=is_truncated,
    )
    error = _one_step_error(reward, value, next_value, is_terminated, discount)
    goes_on = (~(is_terminated | is_truncated)).to(reward.dtype)
    return _discounted_sum(error, discount * trace_decay * goes_on)


class VTrace(NamedTuple):
    """What ``v_trace`` gives, both (T, E)."""

    value_target: Tensor
    """v_s of eq. 1: what the value function should learn."""
    advantage: Tensor
    """rho_s (r_s + d_s v_s+1 - V(x_s)): what the policy gradient is weighted with."""


@torch.no_grad()
def v_trace(
    target_logp: Tensor,
    behaviour_logp: Tensor,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    is_terminated: Tensor,
    is_truncated: Tensor,
    discount: float | Tensor,
    *,
    trace_decay: float = 1.0,
    max_rho: float = 1.0,
    max_c: float = 1.0,
) -> VTrace:
    """Off-policy targets of IMPALA (Espeholt et al. 2018, arXiv:1802.01561, eq. 1, section 4.2).

    ``target_logp`` and ``behaviour_logp`` (T, E): log-probabilities of the taken actions by the
    policy that learns and by the one that acted. rho = min(max_rho, pi / mu) decides what is
    learned, c = trace_decay min(max_c, pi / mu) how fast. On-policy the targets are
    ``n_step_returns`` and, with ``trace_decay``, ``gae + value``. In a row that is no move the
    probabilities may be anything finite. All others (T, E), flags bool. Raises ValueError for other
    shapes and dtypes or if max_c is greater than max_rho (section 4.1 needs max_rho >= max_c).
    """
    _check(
        reward,
        target_logp=target_logp,
        behaviour_logp=behaviour_logp,
        value=value,
        next_value=next_value,
        is_terminated=is_terminated,
        is_truncated=is_truncated,
    )
    if not 0 < max_c <= max_rho:
        raise ValueError(f"max_c: must be in (0, max_rho = {max_rho}], is {max_c}")
    # clamped before exp: an action that has become likely must not overflow
    log_ratio = target_logp - behaviour_logp
    rho = log_ratio.clamp(max=math.log(max_rho)).exp()
    c = trace_decay * log_ratio.clamp(max=math.log(max_c)).exp()
    error = _one_step_error(reward, value, next_value, is_terminated, discount)
    goes_on = (~(is_terminated | is_truncated)).to(reward.dtype)
    correction = _discounted_sum(rho * error, discount * c * goes_on)
    following = torch.cat([correction[1:], torch.zeros_like(correction[:1])]) * goes_on
    return VTrace(value + correction, rho * (error + discount * following))


def _one_step_error(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    is_terminated: Tensor,
    discount: float | Tensor,
) -> Tensor:
    """(T, E) r + discount V(reached) - V(here)."""
    return reward + discount * next_value.masked_fill(is_terminated, 0.0) - value


def _discounted_sum(error: Tensor, decay: Tensor) -> Tensor:
    """(T, E) s_t = error_t + decay_t s_t+1, the one loop over time, for all episodes at once."""
    result = torch.empty_like(error)
    total = torch.zeros_like(error[0])
    for t in reversed(range(len(error))):
        total = torch.addcmul(error[t], decay[t], total)
        result[t] = total
    return result


def _check(reward: Tensor, **others: Tensor) -> None:
    if reward.ndim != 2 or not len(reward) or not reward.is_floating_point():
        raise ValueError(
            f"reward: expected floats (T, E) with T > 0, found {reward.dtype} {tuple(reward.shape)}"
        )
    for name, value in others.items():
        dtype = torch.bool if name.startswith("is_") else reward.dtype
        if value.shape != reward.shape or value.dtype != dtype:
            raise ValueError(
                f"{name}: expected {dtype} {tuple(reward.shape)} as reward has, found "
                f"{value.dtype} {tuple(value.shape)}"
            )

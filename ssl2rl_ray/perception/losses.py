"""Losses of the training stages, one pure function each.

Two classes need one logit: P(low-CTF) = sigmoid(logit), and the confidence of a prediction is
max(p, 1 - p). Shape letters: B labelled, U unlabelled (or pseudo-labelled) images of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def supervised_loss(logit: Tensor, is_low: Tensor) -> Tensor:
    """Mean cross-entropy of labelled images.

    Args:
        logit: (B,) float.
        is_low: (B,) float, 1 = low-CTF.
    """
    _check(logit, is_low)
    return binary_cross_entropy_with_logits(logit, is_low)


def fixmatch_loss(
    weak_logit: Tensor, strong_logit: Tensor, confidence_threshold: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the strong view against the confident predictions on the weak view.

    FixMatch (Sohn et al. 2020, arXiv:2001.07685, eq. 4; SSL²-RL, eq. 1). The mean is over all U
    images, so that few accepted ones weigh little. No gradient flows through the weak view.

    Args:
        weak_logit: (U,) float.
        strong_logit: (U,) float, the same images.
        confidence_threshold: tau, at least 0.5.

    Returns:
        The loss, and (U,) bool: whose pseudo label was accepted (confidence at least tau).
    """
    _check(weak_logit, strong_logit)
    p = torch.sigmoid(weak_logit.detach())
    label = (p >= 0.5).to(strong_logit.dtype)
    is_accepted = torch.maximum(p, 1 - p) >= confidence_threshold
    each = binary_cross_entropy_with_logits(strong_logit, label, reduction="none")
    return (each * is_accepted).mean(), is_accepted


def align(weak_logit: Tensor, share_low: Tensor | float, mean_p: Tensor | float) -> Tensor:
    """Predictions moved so that their mean odds are those of the labelled images.

    Distribution alignment (Berthelot et al. 2020, arXiv:1911.09785, sec. 3.1) of two classes:
    p is multiplied by share_low / mean_p and 1 - p by the same of the other class, then normalised.

    Args:
        weak_logit: (U,) float.
        share_low: of the labelled images, strictly between 0 and 1.
        mean_p: running mean of the predictions on weak views, likewise.
    """
    share_low, mean_p = torch.as_tensor(share_low), torch.as_tensor(mean_p)
    return weak_logit + torch.logit(share_low) - torch.logit(mean_p)


def finetuning_loss(
    logit: Tensor, is_low: Tensor, pseudo_logit: Tensor, pseudo_is_low: Tensor, weight: float
) -> Tensor:
    """Truth, and pseudo labels of sampled images: l = l_sup + lambda l_U (SSL²-RL, section 3).

    The confidence of a pseudo label acts through the sampling (holes are drawn in proportion to
    it), so it does not appear again as a weight.

    Args:
        logit: (B,) float, labelled images.
        is_low: (B,) float.
        pseudo_logit: (U,) float.
        pseudo_is_low: (U,) float, pseudo labels.
        weight: lambda.
    """
    return supervised_loss(logit, is_low) + weight * supervised_loss(pseudo_logit, pseudo_is_low)


def entropy(logit: Tensor) -> Tensor:
    """(B,) entropy of each prediction, nats; its fall to 0 is a sign of collapse."""
    p = torch.sigmoid(logit)
    return -(p * logsigmoid(logit) + (1 - p) * logsigmoid(-logit))


def _check(a: Tensor, b: Tensor) -> None:
    assert a.ndim == 1 and a.shape == b.shape, f"expected two (B,), found {a.shape}, {b.shape}"
    assert a.is_floating_point() and b.is_floating_point(), f"found {a.dtype}, {b.dtype}"

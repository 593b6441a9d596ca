"""The losses of the training stages, against numbers worked out by hand."""

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from ssl2rl_ray.perception.losses import (
    align,
    entropy,
    finetuning_loss,
    fixmatch_loss,
    supervised_loss,
)

LOG2 = math.log(2)


def test_supervised_loss_by_hand():
    # log(1 + e^0) = log 2; p = 3/4 (logit log 3) of a low one: -log(3/4), of another: -log(1/4)
    logit = tensor([0.0, math.log(3), math.log(3)])
    loss = supervised_loss(logit, tensor([1.0, 1.0, 0.0]))
    assert_close(loss, tensor((LOG2 + math.log(4 / 3) + math.log(4)) / 3))


def test_fixmatch_accepts_confident_predictions_of_either_class():
    # p = .9, .1, .75, .8: with tau .8 the third is left out; labels low, high, low
    p = tensor([0.9, 0.1, 0.75, 0.8])
    strong = tensor([0.0, math.log(3), 5.0, -math.log(3)])
    loss, is_accepted = fixmatch_loss(torch.logit(p), strong, 0.8 - 1e-6)
    assert is_accepted.tolist() == [True, True, False, True]
    # -log(1/2), -log(1 - 3/4), -log(1/4), over all four images
    assert_close(loss, tensor((LOG2 + math.log(4) + math.log(4)) / 4))


def test_no_gradient_reaches_the_weak_view():
    weak = tensor([3.0, -3.0], requires_grad=True)
    strong = tensor([0.5, 0.5], requires_grad=True)
    fixmatch_loss(weak, strong, 0.8)[0].backward()
    assert weak.grad is None
    assert strong.grad is not None
    assert strong.grad[0] < 0 < strong.grad[1]


def test_nothing_accepted_is_no_loss():
    loss, is_accepted = fixmatch_loss(torch.zeros(5), torch.randn(5), 0.8)
    assert loss == 0 and not is_accepted.any()


def test_alignment_moves_mean_odds_to_the_labelled_ones():
    # mean p = .8 where the labelled share is .5: odds are divided by 4
    weak = torch.logit(tensor([0.8, 0.5]))
    assert_close(torch.sigmoid(align(weak, 0.5, tensor(0.8))), tensor([0.5, 0.2]))
    # the same as two classes multiplied and normalised (Berthelot et al. 2020)
    p, share, mean = tensor([0.3, 0.9]), 0.2, 0.6
    low, high = p * share / mean, (1 - p) * (1 - share) / (1 - mean)
    assert_close(torch.sigmoid(align(torch.logit(p), share, mean)), low / (low + high))


def test_finetuning_loss_adds_the_pseudo_labels():
    labelled = (tensor([0.0]), tensor([1.0]))
    pseudo = (tensor([math.log(3), 0.0]), tensor([0.0, 0.0]))
    loss = finetuning_loss(*labelled, *pseudo, 0.5)
    assert_close(loss, tensor(LOG2 + 0.5 * (math.log(4) + LOG2) / 2))


def test_entropy_of_a_coin_and_of_certainty():
    assert_close(entropy(tensor([0.0, 40.0, -40.0])), tensor([LOG2, 0.0, 0.0]))


def test_shapes_are_checked():
    with pytest.raises(AssertionError, match="expected two"):
        supervised_loss(torch.zeros(3, 1), torch.zeros(3, 1))
    with pytest.raises(AssertionError, match="found"):
        supervised_loss(torch.zeros(3), torch.zeros(3, dtype=torch.int64))

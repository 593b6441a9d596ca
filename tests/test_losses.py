"""Losses against numbers worked out by hand."""

import pytest
import torch

from ssl2rl_ray.algorithms.losses import bootstrap_value, take, td_error, weighted_huber

INF = float("inf")


def test_take_gathers_one_value_a_row():
    q = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert take(q, torch.tensor([2, 0])).tolist() == [3.0, 4.0]


def test_double_q_takes_the_selectors_choice_at_the_targets_value():
    q_t = torch.tensor([[10.0, 20.0, 30.0]])
    selector = torch.tensor([[1.0, 3.0, 2.0]])
    assert bootstrap_value(q_t, selector).tolist() == [20.0]
    assert bootstrap_value(q_t, q_t).tolist() == [30.0]


def test_masked_actions_are_never_chosen_even_where_all_values_are_negative():
    q_t = torch.tensor([[-5.0, -INF, -7.0]])
    selector = torch.tensor([[-4.0, -INF, -3.0]])
    assert bootstrap_value(q_t, selector).tolist() == [-7.0]


def test_a_state_with_nothing_allowed_is_worth_zero_and_not_nan():
    q_t = torch.full((2, 3), -INF)
    q_t[1, 0] = 2.0
    value = bootstrap_value(q_t, q_t)
    assert value.tolist() == [0.0, 2.0]
    error = td_error(torch.zeros(2), torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.5]), value)
    assert error.tolist() == [1.0, 2.0]


def test_td_error_by_hand():
    error = td_error(
        torch.tensor([1.0, 2.0]),
        torch.tensor([0.5, 1.0]),
        torch.tensor([0.9, 0.0]),
        torch.tensor([10.0, 99.0]),
    )
    assert error.tolist() == pytest.approx([0.5 + 9.0 - 1.0, 1.0 - 2.0])


def test_only_the_prediction_gets_a_gradient():
    q_tm1 = torch.tensor([1.0], requires_grad=True)
    r_t = torch.tensor([0.0], requires_grad=True)
    weighted_huber(td_error(q_tm1, r_t, torch.ones(1), torch.ones(1) * 3), torch.ones(1)).backward()
    assert q_tm1.grad is not None and q_tm1.grad.tolist() == [-1.0]  # |error| 2 > delta: slope 1
    assert r_t.grad is None


def test_weighted_huber_by_hand():
    # |0.5| < 1: 0.125; |-3| > 1: 3 - 0.5 = 2.5; weights 2 and 1: (0.25 + 2.5) / 2
    loss = weighted_huber(torch.tensor([0.5, -3.0]), torch.tensor([2.0, 1.0]))
    assert loss.item() == pytest.approx(1.375)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: take(torch.zeros(3), torch.zeros(3, dtype=torch.int64)), "q: expected rank 2"),
        (lambda: take(torch.zeros(1, 3), torch.zeros(1)), "action: expected one of"),
        (lambda: bootstrap_value(torch.zeros(1, 2), torch.zeros(2)), "q_t_selector: expected rank"),
        (
            lambda: td_error(torch.zeros(1), torch.zeros(1, 1), torch.zeros(1), torch.zeros(1)),
            "r_t: expected rank 1",
        ),
        (
            lambda: td_error(
                torch.zeros(1), torch.zeros(1).double(), torch.zeros(1), torch.zeros(1)
            ),
            "r_t: expected one of",
        ),
        (lambda: weighted_huber(torch.zeros(1), torch.zeros(1, 1)), "weight: expected rank 1"),
    ],
)
def test_wrong_ranks_and_dtypes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""K-FAC against Fisher matrices of whole networks, dense solves and numbers worked out by hand."""

import copy
import io

import pytest
import torch
from torch import nn

from ssl2rl_ray.algorithms.kfac import KFAC


def gaussian_loss(output, noise):
    """Sum of -log p of samples ``output + noise`` of a Gaussian of variance 1, but a constant."""
    return 0.5 * (output - (output + noise).detach()).square().sum()


def categorical_loss(logits, generator=None):
    probability = logits.detach().softmax(-1)
    action = torch.multinomial(probability, 1, replacement=True, generator=generator)
    return -logits.log_softmax(-1).gather(-1, action).sum()


def homogeneous_gradients(module, loss_of_sample, num_samples):
    """Per layer (num_samples, O I) gradients with the bias as last column, sample by sample."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    rows = {layer: [] for layer in layers}
    for sample in range(num_samples):
        module.zero_grad()
        loss_of_sample(sample).backward()
        for layer in layers:
            joint = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            rows[layer].append(joint.flatten().clone())
    module.zero_grad()
    return {layer: torch.stack(values) for layer, values in rows.items()}


def kronecker(state):
    """The Fisher block for W flattened row by row."""
    return torch.kron(state["output_moment"], state["input_moment"])


def test_factors_of_one_layer_by_hand():
    layer = nn.Linear(2, 2)
    optimizer = KFAC(layer)
    output = layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    # at the outputs the gradient is minus the noise: (-1, -2) and (0, -4)
    optimizer.collect(gaussian_loss(output, torch.tensor([[1.0, 2.0], [0.0, 4.0]])), 2)
    state = optimizer.state[layer.weight]
    # inputs (1 2 1) and (3 4 1): sums of products over 2
    assert state["input_moment"].tolist() == [[5, 7, 2], [7, 10, 3], [2, 3, 1]]
    expected = torch.tensor([[0.5, 1.0], [1.0, 10.0]])
    torch.testing.assert_close(state["output_moment"], expected)


def test_factors_are_a_plain_average_first_and_a_running_one_later():
    layer = nn.Linear(1, 1, bias=False)
    optimizer = KFAC(layer, moment_decay=0.75)
    found = []
    for value in (1.0, 3.0, 2.0, 0.0, 4.0):
        optimizer.collect(gaussian_loss(layer(torch.tensor([[value]])), torch.ones(1, 1)), 1)
        found.append(float(optimizer.state[layer.weight]["input_moment"]))
    # squares 1 9 4 0 16: averages 1, 5, 14/3, 14/4; then 0.75 * 3.5 + 0.25 * 16
    assert found == pytest.approx([1.0, 5.0, 14 / 3, 3.5, 6.625])


def test_one_sample_of_a_two_layer_net_gives_the_explicit_fisher_exactly():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, noise = torch.randn(1, 3).double(), torch.randn(1, 2).double()
    optimizer = KFAC(module)
    optimizer.collect(gaussian_loss(module(inputs), noise), 1)
    explicit = homogeneous_gradients(module, lambda _: gaussian_loss(module(inputs), noise), 1)
    for layer, rows in explicit.items():
        torch.testing.assert_close(kronecker(optimizer.state[layer.weight]), rows.T @ rows)


def test_a_linear_gaussian_model_has_its_explicit_fisher_exactly():
    torch.manual_seed(1)
    layer = nn.Linear(3, 2).double()
    # every input with every noise sqrt(2) e_k: the noise has covariance 1 and fits every input
    inputs = torch.randn(4, 3).double().repeat_interleave(2, 0)
    noise = (2**0.5 * torch.eye(2).double()).repeat(4, 1)
    optimizer = KFAC(layer)
    optimizer.collect(gaussian_loss(layer(inputs), noise), 8)
    explicit = homogeneous_gradients(
        layer, lambda n: gaussian_loss(layer(inputs[n]), noise[n]), len(inputs)
    )[layer]
    fisher = explicit.T @ explicit / len(inputs)
    torch.testing.assert_close(kronecker(optimizer.state[layer.weight]), fisher)
    joint = torch.cat([inputs, torch.ones(8, 1).double()], 1)
    torch.testing.assert_close(fisher, torch.kron(torch.eye(2).double(), joint.T @ joint / 8))


def test_a_two_layer_net_has_the_kronecker_approximation_of_its_explicit_fisher():
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    inputs, generator = torch.randn(1024, 3), torch.Generator().manual_seed(3)
    optimizer = KFAC(module)
    logits = module(inputs)
    action = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)

    def loss(logits, at):
        return -logits.log_softmax(1).gather(1, action[at]).sum()

    optimizer.collect(loss(logits, slice(None)), 1024)
    explicit = homogeneous_gradients(
        module, lambda n: loss(module(inputs[n : n + 1]), slice(n, n + 1)), 1024
    )
    for layer, rows in explicit.items():
        fisher = rows.T @ rows / 1024
        found = kronecker(optimizer.state[layer.weight])
        error = (found - fisher).norm() / fisher.norm()
        assert 0.001 < error < 0.3  # an approximation, and a good one
        # its diagonal is right within what a and g have to do with each other
        assert float(found.trace() / fisher.trace()) == pytest.approx(1, abs=0.1)


def test_rows_that_share_a_layer_by_hand():
    layer = nn.Linear(1, 1, bias=False)
    optimizer = KFAC(layer)
    # two samples with two candidates each: inputs 1 2 | 3 4, gradients -1 -2 | -3 0
    output = layer(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))
    noise = torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]])
    optimizer.collect(gaussian_loss(output, noise), 2)
    state = optimizer.state[layer.weight]
    # inputs of the three rows that count: (1 + 4 + 9) / 3; gradients per sample: (1 + 4 + 9) / 2
    assert float(state["input_moment"]) == pytest.approx(14 / 3)
    assert float(state["output_moment"]) == pytest.approx(7)


def test_padding_changes_nothing():
    torch.manual_seed(4)
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    twin = copy.deepcopy(module)
    rows, is_allowed = torch.randn(6, 3, 3), torch.ones(6, 3, dtype=torch.bool)
    padded = torch.cat([rows, torch.full((6, 5, 3), 1e3)], 1)
    is_padded_allowed = torch.cat([is_allowed, torch.zeros(6, 5, dtype=torch.bool)], 1)
    states = []
    for model, inputs, mask in ((module, rows, is_allowed), (twin, padded, is_padded_allowed)):
        optimizer = KFAC(model)
        logits = model(inputs).squeeze(-1).masked_fill(~mask, -torch.inf)
        action = torch.tensor([0, 1, 2, 2, 1, 0])[:, None]
        optimizer.collect(-logits.log_softmax(1).gather(1, action).sum(), 6)
        states.append(optimizer.state_dict()["state"])
    for parameter, state in states[0].items():
        for name, value in state.items():
            torch.testing.assert_close(states[1][parameter][name], value)


def test_a_layer_that_is_called_twice_counts_both_calls_and_overwriting_does_not_matter():
    def factors(module, forward):
        optimizer = KFAC(module)
        optimizer.collect(gaussian_loss(forward(module), torch.ones(4, 2)), 4)
        return [dict(optimizer.state[layer.weight]) for layer in (module[0], module[1])]

    torch.manual_seed(6)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    inputs = torch.randn(4, 3)
    expected = factors(copy.deepcopy(module), lambda m: m[1](m[0](inputs).relu()))
    halves = factors(
        copy.deepcopy(module),
        lambda m: torch.cat([m[1](m[0](half).relu_()) for half in inputs.split(2)]),
    )
    torch.testing.assert_close(halves, expected)


def test_the_step_is_the_damped_natural_gradient_of_a_dense_solve():
    torch.manual_seed(7)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, target = torch.randn(32, 3).double(), torch.randn(32, 2).double()
    optimizer = KFAC(module, lr=0.1, max_kl=1e9, damping=0.04, momentum=0.0)
    output = module(inputs)
    optimizer.collect(gaussian_loss(output, torch.randn(32, 2).double()), 32)
    (0.5 * (output - target).square().sum(1).mean()).backward()
    before = copy.deepcopy(module)
    optimizer.step()
    for layer, old in ((module[0], before[0]), (module[2], before[2])):
        state = optimizer.state[layer.weight]
        a, g = state["input_moment"], state["output_moment"]
        pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
        dense = torch.kron(g + 0.2 / pi * torch.eye(len(g)), a + 0.2 * pi * torch.eye(len(a)))
        gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        natural = torch.linalg.solve(dense, gradient.flatten()).view_as(gradient)
        moved = torch.cat([layer.weight - old.weight, (layer.bias - old.bias)[:, None]], 1)
        torch.testing.assert_close(moved, -0.1 * natural)


def test_damping_by_hand():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = KFAC(layer, lr=1.0, max_kl=1e9, damping=0.25, momentum=0.0)
    # A = 4, G = 1, pi = 2: (4 + 2 * 0.5) (1 + 0.5 / 2) = 6.25; the gradient is 2 * (0 - 5) = -10
    optimizer.collect(gaussian_loss(layer(torch.tensor([[2.0]])), torch.ones(1, 1)), 1)
    (0.5 * (layer(torch.tensor([[2.0]])) - 5).square()).sum().backward()
    optimizer.step()
    assert layer.weight.item() == pytest.approx(1.6)


def test_trust_region_and_momentum_by_hand():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = KFAC(layer, lr=1.0, max_kl=0.02, damping=1e-12, momentum=0.5)
    moved = []
    for _ in range(2):
        before = layer.weight.item()
        optimizer.collect(gaussian_loss(layer(torch.tensor([[2.0]])), torch.ones(1, 1)), 1)
        layer.weight.grad = torch.tensor([[-8.0]])
        optimizer.step()
        moved.append(layer.weight.item() - before)
    # F = 4: v = -2, v F v = 16, eta = sqrt(0.04 / 16) = 0.05, a whole step 0.1; half of it, then
    # half of that and half of a whole one. A whole one has F step^2 / 2 = 0.02 = max_kl.
    assert optimizer.last_lr == pytest.approx(0.05)
    assert moved == pytest.approx([0.05, 0.075])


def kl_of_a_step(module, max_kl, spread, generator):
    """Mean KL divergence between the policies before and after, on the states of the step."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    inputs = torch.randn(2048, 4, generator=generator)
    advantage = torch.randn(2048, 5, generator=generator) + torch.arange(5.0)
    optimizer = KFAC(module, lr=1e9, max_kl=max_kl, damping=1e-4, momentum=0.0)
    for _ in range(8):
        optimizer.collect(categorical_loss(module(inputs), generator), 2048)
    before = module(inputs)
    old = before.detach().log_softmax(1)
    (-(before.softmax(1) * advantage).sum(1).mean()).backward()
    optimizer.step()
    new = module(inputs).detach().log_softmax(1)
    return float((old.exp() * (old - new)).sum(1).mean())


@pytest.mark.parametrize("max_kl", [1e-4, 1e-3, 1e-2])
def test_the_kl_of_a_step_is_close_to_what_was_asked(max_kl):
    generator = torch.Generator().manual_seed(8)
    # One layer, and policies that hardly depend on the state: K-FAC is nearly exact.
    kl = kl_of_a_step(nn.Linear(4, 5), max_kl, 0.05, generator)
    assert 0.9 * max_kl < kl < 1.1 * max_kl
    # Policies that do; and layers that pull together, whose blocks know nothing of each other.
    kl = kl_of_a_step(nn.Linear(4, 5), max_kl, 0.5, generator)
    assert 0.6 * max_kl < kl < 1.5 * max_kl
    deep = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 5))
    kl = kl_of_a_step(deep, max_kl, 0.5, generator)
    assert 0.5 * max_kl < kl < 4 * max_kl


def test_ill_conditioned_least_squares_in_far_fewer_steps_than_sgd():
    generator = torch.Generator().manual_seed(9)
    scale = torch.logspace(0, -2, 8)  # curvatures from 1 to 10^-4
    inputs = torch.randn(256, 8, generator=generator) * scale
    target = inputs @ (torch.randn(8, 1, generator=generator) / scale[:, None])

    def steps_to_a_thousandth(make):
        layer = nn.Linear(8, 1, bias=False)
        nn.init.zeros_(layer.weight)
        optimizer = make(layer)
        first = float(target.square().mean())
        for step in range(600):
            output = layer(inputs)
            loss = (output - target).square().mean()
            if loss.item() < 1e-3 * first:
                return step
            optimizer.zero_grad()
            if isinstance(optimizer, KFAC):
                noise = torch.randn(256, 1, generator=generator)
                optimizer.collect(gaussian_loss(output, noise), 256)
            (0.5 * loss).backward()
            optimizer.step()
        return 600

    def kfac(layer):
        return KFAC(layer, lr=0.5, max_kl=1e9, damping=1e-8, momentum=0.0)

    best_sgd = min(
        steps_to_a_thousandth(lambda m, lr=lr: torch.optim.SGD(m.parameters(), lr=lr))
        for lr in (0.3, 1.0, 1.5)
    )
    assert steps_to_a_thousandth(kfac) < 20
    assert best_sgd == 600


def test_other_parameters_are_adams():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1)
            self.scale = nn.Parameter(torch.ones(1))
            self.by_hand = nn.Linear(1, 1, bias=False)  # its weight is used, it is never called

        def forward(self, inputs):
            return self.scale * (self.linear(inputs) @ self.by_hand.weight)

    torch.manual_seed(10)
    module = Scaled()
    twin = copy.deepcopy(module)
    optimizer = KFAC(module, other_lr=0.01)
    adam = torch.optim.Adam([twin.scale, twin.by_hand.weight], lr=0.01)
    for _ in range(3):
        # the same gradients for both: those of K-FAC's
        output = module(torch.ones(4, 2))
        optimizer.zero_grad()
        optimizer.collect(gaussian_loss(output, torch.randn(4, 1)), 4)
        output.square().mean().backward()
        twin.scale.grad = module.scale.grad.clone()
        twin.by_hand.weight.grad = module.by_hand.weight.grad.clone()
        optimizer.step()
        adam.step()
    torch.testing.assert_close(module.scale, twin.scale)
    torch.testing.assert_close(module.by_hand.weight, twin.by_hand.weight)
    assert "input_moment" not in optimizer.state[module.by_hand.weight]


def test_a_stored_state_goes_on_as_if_nothing_had_happened():
    torch.manual_seed(11)

    def make():
        return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))

    def train(module, optimizer, num_steps, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(num_steps):
            output = module(torch.randn(16, 3, generator=generator))
            optimizer.zero_grad()
            noise = torch.randn(16, 2, generator=generator)
            optimizer.collect(gaussian_loss(output, noise), 16)
            output.square().mean().backward()
            optimizer.step()

    module = make()
    optimizer = KFAC(module, inverse_interval=4)
    train(module, optimizer, 13, seed=0)
    file = io.BytesIO()
    torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(module, optimizer, 7, seed=1)

    file.seek(0)
    stored = torch.load(file, weights_only=True)
    twin = make()
    twin.load_state_dict(stored["module"])
    restored = KFAC(twin, inverse_interval=4)
    restored.load_state_dict(stored["optimizer"])
    train(twin, restored, 7, seed=1)
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_misuse_is_named():
    with pytest.raises(ValueError, match=r"no nn\.Linear layer"):
        KFAC(nn.Conv1d(1, 1, 1))
    with pytest.raises(ValueError, match="max_kl: 0 is out of range"):
        KFAC(nn.Linear(1, 1), max_kl=0)
    layer = nn.Linear(1, 1)
    optimizer = KFAC(layer)
    output = layer(torch.ones(1, 1))
    output.sum().backward()
    with pytest.raises(RuntimeError, match="call collect first"):
        optimizer.step()
    loss = gaussian_loss(layer(torch.ones(1, 1)), torch.ones(1, 1))
    optimizer.collect(loss, 1)
    with pytest.raises(RuntimeError, match="collect once"):
        optimizer.collect(loss, 1)
    with torch.no_grad():
        layer(torch.ones(1, 1))
    assert not optimizer._calls[layer]


def test_calls_that_are_no_part_of_the_loss_are_left_out():
    layer = nn.Linear(1, 1, bias=False)
    optimizer = KFAC(layer)
    layer(torch.tensor([[7.0]]))
    optimizer.collect(gaussian_loss(layer(torch.tensor([[2.0]])), torch.ones(1, 1)), 1)
    assert float(optimizer.state[layer.weight]["input_moment"]) == 4.0

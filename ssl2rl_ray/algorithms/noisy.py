"""Linear layers whose weights carry noise of a learned size (torch alone).

Fortunato et al. 2018, arXiv:1706.10295, with factorised noise (eqs. 10 and 11). A layer is without
noise until ``resample`` draws some, which then stays the same until it is drawn again or taken away
by ``silence``; whether a module is in training or evaluation mode makes no difference.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

NOISE_SUFFIX = "_noise"
"""Ends the names of the weights that only noise uses: without them a state dict is that of plain
linear layers."""


class NoisyLinear(nn.Module):
    """y = (W + W_noise * e_out e_in^T) x + b + b_noise * e_out; without noise ``nn.Linear``."""

    def __init__(self, num_in: int, num_out: int, initial_noise: float, bias: bool = True) -> None:
        """``initial_noise`` is sigma_0; raises ValueError if it is not positive."""
        super().__init__()
        if not initial_noise > 0:
            raise ValueError(f"initial_noise: must be positive, found {initial_noise}")
        self.in_features, self.out_features = num_in, num_out
        bound, size = 1 / sqrt(num_in), initial_noise / sqrt(num_in)
        self.weight = nn.Parameter(torch.empty(num_out, num_in).uniform_(-bound, bound))
        self.weight_noise = nn.Parameter(torch.full((num_out, num_in), size))
        if bias:
            self.bias = nn.Parameter(torch.empty(num_out).uniform_(-bound, bound))
            self.bias_noise = nn.Parameter(torch.full((num_out,), size))
        else:
            self.bias = self.bias_noise = None
        self.noise: tuple[Tensor, Tensor] | None = None
        """(in,) and (out,), or None: there is none."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., out) of (..., in)."""
        if self.noise is None:
            return linear(x, self.weight, self.bias)
        e_in, e_out = self.noise
        weight = self.weight + self.weight_noise * (e_out[:, None] * e_in)
        if self.bias is None or self.bias_noise is None:
            return linear(x, weight)
        return linear(x, weight, self.bias + self.bias_noise * e_out)


def make_linear(
    num_in: int, num_out: int, initial_noise: float | None, bias: bool = True
) -> nn.Linear | NoisyLinear:
    """A plain layer where ``initial_noise`` is None."""
    if initial_noise is None:
        return nn.Linear(num_in, num_out, bias=bias)
    return NoisyLinear(num_in, num_out, initial_noise, bias=bias)


@torch.no_grad()
def resample(network: nn.Module) -> None:
    """Draws new noise for every noisy layer; the old is not overwritten, a graph may need it."""
    for layer in network.modules():
        if isinstance(layer, NoisyLinear):
            sizes = (layer.in_features, layer.out_features)
            drawn = [torch.randn(size, device=layer.weight.device) for size in sizes]
            e_in, e_out = (x.sign() * x.abs().sqrt() for x in drawn)
            layer.noise = e_in, e_out


def silence(network: nn.Module) -> None:
    """Takes the noise away: what is left is the mean, which is what was learned."""
    for layer in network.modules():
        if isinstance(layer, NoisyLinear):
            layer.noise = None


def without_noise(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the same network made of plain layers."""
    return {k: v for k, v in weights.items() if not k.endswith(NOISE_SUFFIX)}

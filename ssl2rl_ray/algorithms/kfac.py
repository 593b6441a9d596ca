"""K-FAC, the optimiser of ACKTR: natural gradients with a trust region (torch alone).

Martens & Grosse 2015 (arXiv:1503.05671) for the factors, their damping and running averages; Wu et
al. 2017 (arXiv:1708.05144) for reinforcement learning: the Fisher information is that of the
policy and of a Gaussian around the value, and the step is cut where it would change them too much.

    optimizer = KFAC(module)
    output = module(batch)                                    # hooks see every nn.Linear
    optimizer.collect(fisher_loss(output), num_samples)       # sum of -log p of SAMPLED outputs
    loss(output).backward()                                   # mean over the samples, as always
    optimizer.step()

Shape letters: B samples, R rows that a layer sees (B, or B times the candidates that share it), I
inputs of a layer and 1 for its bias, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge


class KFAC(torch.optim.Optimizer):
    """Natural gradient for the ``nn.Linear`` layers of a module, Adam for its other parameters.

    The Fisher block of a layer with weight and bias W (O, I) is taken for the Kronecker product of
    ``input_moment`` (I, I), the mean of a a^T over the inputs a with a 1 for the bias, and
    ``output_moment`` (O, O), that of g g^T over gradients g of -log p at the outputs. That is exact
    for one sample, and where a and g g^T are independent.

    Weight sharing: where R > B rows of a sample go through one layer, products of different rows
    are neglected (the "expand" setting of Eschenhagen et al. 2023, arXiv:2311.00636, the
    uncorrelated derivatives of Grosse & Martens 2016, arXiv:1602.01407): inputs are averaged over
    rows, g g^T is summed over the rows of a sample. Rows without a gradient (padding, candidates
    that are not allowed, moves that are not learned from) contribute nothing to the Fisher block
    and so nothing to either factor.

    Other parameters (scales, noisy layers, a Linear whose weight is used without calling it) are
    Adam's (Kingma & Ba 2015) with ``other_lr``, outside the trust region. Layers are those that are
    exactly ``nn.Linear``: a subclass may compute something else. One process: the factors of
    several learners are not averaged.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float = 0.25,
        max_kl: float = 0.001,
        damping: float = 0.01,
        momentum: float = 0.9,
        moment_decay: float = 0.95,
        inverse_interval: int = 10,
        other_lr: float = 1e-3,
    ) -> None:
        """Watches the module's layers from now on.

        ``lr`` is eta_max and ``max_kl`` delta of Wu et al. (step-size selection): a step is
        min(eta_max, sqrt(2 delta / (v^T F v))) times the natural gradient v, F with its damping.
        ``damping`` is lambda of (F + lambda I). ``moment_decay`` is epsilon of Martens & Grosse,
        section 5, its first updates a plain average. Inverses are computed anew every
        ``inverse_interval`` steps, and each of the first ten. With ``momentum`` m a step is m times
        the last one and 1 - m times the new one, so it stays within the region. Raises ValueError
        for settings out of range and if there is no Linear layer.
        """
        for name, value, is_right in (
            ("lr", lr, lr > 0),
            ("max_kl", max_kl, max_kl > 0),
            ("damping", damping, damping > 0),
            ("momentum", momentum, 0 <= momentum < 1),
            ("moment_decay", moment_decay, 0 <= moment_decay < 1),
            ("inverse_interval", inverse_interval, inverse_interval >= 1),
            ("other_lr", other_lr, other_lr >= 0),
        ):
            if not is_right:
                raise ValueError(f"{name}: {value} is out of range")
        self.layers = [
            layer
            for layer in module.modules()
            if type(layer) is nn.Linear and layer.weight.requires_grad
        ]
        if not self.layers:
            raise ValueError("module: no nn.Linear layer to train; use another optimiser")
        defaults = {
            "lr": lr,
            "max_kl": max_kl,
            "damping": damping,
            "momentum": momentum,
            "moment_decay": moment_decay,
            "inverse_interval": inverse_interval,
            "other_lr": other_lr,
        }
        super().__init__(module.parameters(), defaults)
        self.last_lr = 0.0
        """What the trust region left of ``lr`` in the last step."""
        self._calls: dict[nn.Module, list[tuple[Tensor, GradientEdge]]] = {
            layer: [] for layer in self.layers
        }
        for layer in self.layers:
            layer.register_forward_hook(self._watch)

    def _watch(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # The edge and not the tensor: what follows may overwrite the output in place.
        if output.requires_grad:
            self._calls[layer].append((inputs[0].detach(), get_gradient_edge(output)))

    def collect(self, fisher_loss: Tensor, num_samples: int) -> None:
        """Takes the factors from one more backward pass through the calls since the last step.

        ``fisher_loss`` is the SUM over ``num_samples`` samples of -log p of outputs that were
        sampled from the model itself: actions by the policy, values by a Gaussian around the
        prediction. With the actions that were taken or the returns that came of them the result
        would be the empirical Fisher, which is something else. The graph is kept for the loss's
        own backward pass.
        """
        calls = [(layer, *call) for layer in self.layers for call in self._calls[layer]]
        self._forget()
        if not calls:
            raise RuntimeError(
                "no Linear layer was called with gradients since the last step: compute the "
                "output that fisher_loss is made of after the last step, and collect once"
            )
        gradients = torch.autograd.grad(
            fisher_loss, [edge for _, _, edge in calls], retain_graph=True, allow_unused=True
        )
        rows: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        for (layer, inputs, _), gradient in zip(calls, gradients, strict=True):
            if gradient is not None:  # None: the output is no part of the loss
                rows.setdefault(layer, []).append((inputs.flatten(0, -2), gradient.flatten(0, -2)))
        for layer, parts in rows.items():
            inputs, gradient = (torch.cat(column) for column in zip(*parts, strict=True))
            is_used = gradient.ne(0).any(dim=1)
            if bool(is_used.any()):
                self._average(layer, inputs[is_used], gradient[is_used], num_samples)

    @torch.no_grad()
    def _average(self, layer: Any, inputs: Tensor, gradient: Tensor, num_samples: int) -> None:
        """Running averages over inputs (R, I) and gradients (R, O) of the rows that count."""
        if layer.bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
        state = self.state[layer.weight]
        if "num_moments" not in state:  # it may have been Adam's while nothing flowed through it
            state["num_moments"] = torch.zeros((), device=inputs.device)
            state["input_moment"] = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
            state["output_moment"] = gradient.new_zeros(gradient.shape[1], gradient.shape[1])
            state["last_step"] = gradient.new_zeros(gradient.shape[1], inputs.shape[1])
        state["num_moments"] += 1
        keep = min(1 - 1 / float(state["num_moments"]), self.param_groups[0]["moment_decay"])
        moments = inputs.T @ inputs / len(inputs), gradient.T @ gradient / num_samples
        for name, moment in zip(("input_moment", "output_moment"), moments, strict=True):
            state[name].lerp_(moment, 1 - keep)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Moves all parameters that have a gradient; ``collect`` comes before the first step."""
        if closure is not None:
            raise ValueError("closure: K-FAC takes one step on the gradients that are there")
        self._forget()
        (settings,) = self.param_groups
        natural: list[tuple[nn.Linear, dict[str, Any], Tensor]] = []
        curvature = 0.0
        seen: set[Tensor] = set()
        for layer in self.layers:
            state = self.state.get(layer.weight, {})
            if layer.weight.grad is None or "input_moment" not in state:
                continue
            seen.update(layer.parameters())
            gradient = layer.weight.grad
            if layer.bias is not None:
                assert layer.bias.grad is not None
                gradient = torch.cat([gradient, layer.bias.grad[:, None]], dim=1)
            if self._is_stale(state, settings["inverse_interval"]):
                _invert(state, settings["damping"])
            direction = state["output_inverse"] @ gradient @ state["input_inverse"]
            natural.append((layer, state, direction))
            curvature += float((direction * gradient).sum())  # v^T F v, because F v = gradient
        if not natural:
            raise RuntimeError("no Linear layer has factors and a gradient: call collect first")
        self.last_lr = settings["lr"]
        if curvature > 0:
            self.last_lr = min(self.last_lr, math.sqrt(2 * settings["max_kl"] / curvature))
        momentum = settings["momentum"]
        for layer, state, direction in natural:
            step = state["last_step"].mul_(momentum)
            step.add_(direction, alpha=-self.last_lr * (1 - momentum))
            layer.weight.add_(step[:, : layer.in_features])
            if layer.bias is not None:
                layer.bias.add_(step[:, -1])
        for parameter in settings["params"]:
            if parameter not in seen and parameter.grad is not None:
                _adam(parameter, self.state[parameter], settings["other_lr"])

    @staticmethod
    def _is_stale(state: dict[str, Any], inverse_interval: int) -> bool:
        num_steps = state.setdefault("step", torch.zeros(()))
        num_steps += 1
        return float(num_steps) <= 10 or float(num_steps) % inverse_interval == 0

    def _forget(self) -> None:
        for calls in self._calls.values():
            calls.clear()


def _invert(state: dict[str, Any], damping: float) -> None:
    """(F + lambda I)^-1 as a Kronecker product (Martens & Grosse, factored Tikhonov damping).

    lambda is split by pi = sqrt(mean eigenvalue of the inputs' factor / of the outputs').
    Computed in float64: what is small beside the largest eigenvalue counts here.
    """
    names = "input_moment", "output_moment"
    moments = [state[name].to(torch.float64, copy=True) for name in names]
    mean = [float(moment.trace()) / len(moment) for moment in moments]
    pi = math.sqrt(mean[0] / mean[1]) if min(mean) > 0 else 1.0
    root = math.sqrt(damping)
    for name, moment, share in zip(
        ("input", "output"), moments, (pi * root, root / pi), strict=True
    ):
        moment.diagonal().add_(share)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
        state[f"{name}_inverse"] = inverse.to(state[f"{name}_moment"].dtype)


def _adam(parameter: Tensor, state: dict[str, Any], lr: float) -> None:
    """One step of Adam with its paper's constants."""
    if not state:
        state["step"] = torch.zeros(())
        state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["step"] += 1
    num_steps = float(state["step"])
    gradient = parameter.grad
    assert gradient is not None
    state["mean"].lerp_(gradient, 1 - 0.9)
    state["square"].lerp_(gradient.square(), 1 - 0.999)
    scale = (state["square"] / (1 - 0.999**num_steps)).sqrt_().add_(1e-8)
    parameter.addcdiv_(state["mean"], scale, value=-lr / (1 - 0.9**num_steps))

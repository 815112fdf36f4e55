"""Reference implementation of the LM head by float64 autograd, and random inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opo_megatron.kernels.lm_head import (
    VocabularyShard,
)

WHOLE = VocabularyShard(0)


@dataclass
class Inputs:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor

    @staticmethod
    def random(n: int, hidden: int, rows: int, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        return Inputs(
            torch.randn(n, hidden, generator=generator),
            torch.randn(rows, hidden, generator=generator),
            torch.randint(rows, (n,), generator=generator),
            torch.randn(n, generator=generator),
        )


def likelihood_and_square(log_prob: Tensor, advantages: Tensor) -> Tensor:
    """A per-token loss whose derivative depends on the log-probability."""
    return -advantages * log_prob + 0.1 * log_prob**2


def reference(inputs: Inputs, temperature: float) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Per-token outputs, d_hidden and d_weight by float64 autograd of the definition."""
    hidden = inputs.hidden.double().requires_grad_()
    weight = inputs.weight.double().requires_grad_()
    log_pi = torch.log_softmax(hidden @ weight.T / temperature, -1)
    log_prob = log_pi[torch.arange(len(hidden)), inputs.targets]
    loss = likelihood_and_square(log_prob, inputs.advantages.double())
    d_hidden, d_weight = torch.autograd.grad(loss.sum(), (hidden, weight))
    tokens = {
        "log_prob": log_prob.detach(),
        "entropy": -(log_pi.exp() * log_pi).sum(-1).detach(),
        "sum_squares": log_pi.exp().square().sum(-1).detach(),
        "loss": loss.detach(),
    }
    return tokens, d_hidden, d_weight


def assert_near(got: Tensor | None, expected: Tensor, relative: float = 1e-5) -> None:
    """Bounds the largest absolute error relative to the largest absolute value."""
    assert got is not None and got.shape == expected.shape
    error = float((got.double() - expected).abs().max() / expected.abs().max())
    assert error <= relative

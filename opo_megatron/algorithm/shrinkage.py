"""James–Stein: a prompt's baseline shrunken towards the mean of the other prompts (arXiv 2511.03710).

With few responses per prompt the leave-one-out mean b₋ᵢ is noisy, and the mean m of the other prompts'
rewards, although it is another prompt's, may be closer to the expected reward:

    b = (1 − λ) b₋ᵢ + λ m        λ = v / (v + s + 1e-6)

v is the mean, over the other prompts, of the squared standard error of a prompt's mean; s is the mean squared
distance of these means from m.  This λ is that of the authors' code.  Both λ and m are functions of other
prompts alone, so b does not depend on the sample's own response, and the gradient stays unbiased.

With weights w a prompt's mean is μ = Σ w r / Σ w, and its squared standard error is
K/(K − 1) · Σ w² (r − μ)² / (Σ w)², which for w = 1 is the sample variance over K.  A sample without others to
compare with has b = m; with a single prompt there is nothing to shrink towards, and λ = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6


def shrunken(advantages: Tensor, rewards: Tensor, weights: Tensor, scope: Tensor, lone: Tensor) -> Tensor:
    """[n] r − b from leave-one-out advantages r − b₋ᵢ.

    Args:
        weights: [n] w of each sample.
        scope: [n] int64, the prompt of each sample, from 0.
        lone: [n] bool: samples without others, whose b₋ᵢ is undefined.
    """
    size = torch.bincount(scope).double()
    total = torch.zeros_like(size).index_add_(0, scope, weights)
    weights = torch.where((total == 0)[scope], torch.ones_like(weights), weights)
    total = torch.zeros_like(size).index_add_(0, scope, weights)
    means = torch.zeros_like(size).index_add_(0, scope, weights * rewards) / total
    squares = (weights * (rewards - means[scope])).square()
    errors = torch.zeros_like(size).index_add_(0, scope, squares) / total.square()
    errors = errors * size / (size - 1).clamp(min=1)
    prompts = len(size)
    if prompts < 2:
        return torch.where(lone, rewards, advantages)
    target, share = (values[scope] for values in _from_others(means, errors))
    share = torch.where(lone, 1.0, share)
    kept = torch.where(lone, 0.0, advantages)
    return (1 - share) * kept + share * (rewards - target)


def _from_others(means: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """([P] m, [P] λ) of every prompt, each from all other prompts."""
    others = len(means) - 1
    # Row p holds the other prompts' values: no difference of sums, whose rounding would depend on prompt p.
    index = torch.arange(others).expand(len(means), others)
    index = index + (index >= torch.arange(len(means)).unsqueeze(1))
    target = means[index].mean(1)
    noise = errors[index].mean(1)
    spread = (means[index] - target.unsqueeze(1)).square().mean(1)
    return target, noise / (noise + spread + EPSILON)

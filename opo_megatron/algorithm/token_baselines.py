"""A baseline for each token: the optimal token baseline (OTB, arXiv 2602.07078).

The gradient's term of token t has the factor r − b_t, and its variance is least where b_t weights a response
by the squared norm of its score up to t.  With the energies e (`energy.py`) as proxy,

    W_{i,t} = Σ_{u≤t} e_{i,u}        b_t = Σ_i rᵢ W_{i,t} / (Σ_i W_{i,t} + 1e-8)

over the K responses to one prompt that have a token t.  `otb` includes the sample's own reward, and has no
baseline where only one response is left.  That is a bias: E over t of E[W_{i,t}/ΣW (r − b₋ᵢ) ∇log π].

`otb_loo` takes the *other* responses that have a token t, and b_t = 0 where there is none, so that A = r.
Whether there is one depends on the others alone, so b_t does not depend on the response itself: the gradient
is unbiased.  (A = 0 instead of A = r would leave out late tokens of long responses.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from opo_megatron.algorithm.config import AlgorithmConfig

EPSILON = 1e-8


def token_advantages(
    config: AlgorithmConfig, rewards: Tensor, lengths: Tensor, groups: Tensor, energies: Tensor
) -> Tensor:
    """[Σl] float64 advantages of all tokens of a batch, sample by sample.

    Args:
        rewards: [n].
        lengths: [n] int64 response tokens.
        groups: [n] int64, equal for samples of the same prompt.
        energies: [Σl] of each token.
    """
    result = torch.empty(energies.numel(), dtype=torch.float64)
    starts = lengths.cumsum(0) - lengths
    index = torch.unique(groups, return_inverse=True)[1]
    order = torch.argsort(index, stable=True)
    for members in order.split(torch.bincount(index).tolist()):
        longest = int(lengths[members].max())
        alive = torch.arange(longest) < lengths[members].unsqueeze(1)
        places = (starts[members].unsqueeze(1) + torch.arange(longest))[alive]
        padded = torch.zeros(len(members), longest, dtype=torch.float64)
        padded[alive] = energies[places].double()
        own = rewards[members].double().unsqueeze(1)
        baselines = _baselines(padded.cumsum(1) * alive, own, alive, bool(config.leave_one_out))
        advantages = own - baselines
        if not config.keep_lone:
            advantages = advantages.masked_fill(alive.sum(0) == 1, 0.0)
        result[places] = advantages[alive]
    return result


def _baselines(weights: Tensor, rewards: Tensor, alive: Tensor, leave_one_out: bool) -> Tensor:
    """[K, longest] b of each response and token.

    Args:
        weights: [K, longest] W, 0 where the response has ended.
        rewards: [K, 1].
        alive: [K, longest] bool.
    """
    if not leave_one_out:
        count = alive.sum(0)
        mean = (weights * rewards).sum(0) / (weights.sum(0) + EPSILON)
        return torch.where(count > 1, mean, 0.0).expand_as(weights)
    # Summed over the others directly: a difference of sums would cancel.
    others = 1 - torch.eye(len(weights), dtype=torch.float64)
    total, weighted = others @ weights, others @ (weights * rewards)
    plain = others @ alive.double()
    mean = (others @ (alive * rewards)) / plain.clamp(min=1)
    return torch.where(total > 0, weighted / total, mean)

"""Sampling tokens: stateless uniform numbers and the inverse of the cumulative distribution.

The uniform number of a token is a hash of (run seed, step, prompt id, sample index, position).  So a
response does not depend on its neighbours in the batch, on the number of ranks, or on whether the
run was interrupted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opo_megatron.algorithm.energy import energy
from opo_megatron.kernels.exact import log_softmax
from opo_megatron.rollout.engine import Sampling
from opo_megatron.utils.hashing import GOLDEN, mix_tensor, shift_right, signed


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """[n] float64 in [0, 1): the number of each (key, position), both int64."""
    x = mix_tensor(keys + (positions + 1) * signed(GOLDEN))
    return shift_right(x, 11).double() * 2.0**-53


def sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor | None]:
    """Next tokens, their log π_T and, where `sampling` asks for them, their energies ‖onehot − π_T‖², each
    [n], from logits [n, V].

    Log-probability and energy are those of π_T, also where top_k, top_p or greedy decoding sample from
    another distribution.
    """
    log_probs = log_softmax(logits, sampling.temperature)
    if sampling.greedy:
        tokens = log_probs.argmax(-1)
    else:
        cumulative = _truncate(log_probs.exp(), sampling).double().cumsum_(-1)
        threshold = uniform.unsqueeze(1) * cumulative[:, -1:]
        # The first token whose cumulative probability exceeds the threshold: never one of probability 0.
        tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)
    log_prob = log_probs.gather(1, tokens.unsqueeze(1))[:, 0]
    if not (sampling.energies or sampling.token_energies):
        return tokens, log_prob, None
    return tokens, log_prob, energy(log_prob, log_probs.exp().square_().sum(1))


def _truncate(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Set what top_k and top_p exclude to zero; at least the most likely token stays."""
    if sampling.top_k > 0:
        kept = probabilities.topk(min(sampling.top_k, probabilities.shape[1])).values[:, -1:]
        probabilities = torch.where(probabilities >= kept, probabilities, 0.0)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        beyond = before >= sampling.top_p * ordered.sum(-1, keepdim=True)
        probabilities = torch.zeros_like(probabilities).scatter(1, index, ordered.masked_fill(beyond, 0.0))
    return probabilities

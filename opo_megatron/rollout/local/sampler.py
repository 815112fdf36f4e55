"""Sampling one token of each row from its logits; the operations are those of `kernels/exact_sampling.py`."""

from __future__ import annotations

from torch import Tensor

from opo_megatron.algorithm.energy import energy
from opo_megatron.kernels.exact import log_softmax
from opo_megatron.kernels.exact_sampling import inverse_cdf, probabilities, truncate
from opo_megatron.rollout.engine import Sampling


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
        tokens = inverse_cdf(truncate(probabilities(log_probs), sampling.top_k, sampling.top_p), uniform)
    log_prob = log_probs.gather(1, tokens.unsqueeze(1))[:, 0]
    if not (sampling.energies or sampling.token_energies):
        return tokens, log_prob, None
    return tokens, log_prob, energy(log_prob, log_probs.exp().square_().sum(1))

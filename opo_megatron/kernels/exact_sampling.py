"""Sampling tokens: stateless uniform numbers and the inverse of the cumulative distribution.

The uniform number of a token is a hash of (run seed, step, prompt id, sample index, position).  So a
response does not depend on its neighbours in the batch, on the number of ranks or servers, or on whether
the run was interrupted.  Every operation acts on each row by itself.

The local engine and, in exact mode, SGLang's process use this file, so it needs nothing but torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opo_megatron.kernels.exact import uses_triton
from opo_megatron.utils.hashing import GOLDEN, MASK, mix_tensor, shift_right, signed

ALIGNMENT = 32
"""Exponentials are taken of rows of a multiple of this: the remainder of a vector loop rounds differently."""


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """[n] float64 in [0, 1): the number of each (key, position), both int64."""
    x = mix_tensor(keys + (positions + 1) * signed(GOLDEN))
    return shift_right(x, 11).double() * 2.0**-53


def key_at(key: int, offset: int) -> int:
    """The key whose number at position p + offset is that of `key` at p."""
    return signed((key - offset * GOLDEN) & MASK)


def probabilities(log_probs: Tensor) -> Tensor:
    """[n, V] → their exponentials."""
    width = log_probs.shape[-1]
    if width % ALIGNMENT:
        log_probs = F.pad(log_probs, (0, -width % ALIGNMENT))
    return log_probs.exp()[..., :width]


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """[n, V], not necessarily normalized, and uniform numbers [n] → tokens [n].

    The first token whose cumulative probability exceeds the threshold: never one of probability 0.
    """
    if uses_triton(probabilities):
        from opo_megatron.kernels import triton_exact_rows as rows

        return rows.inverse_cdf(probabilities, uniform)
    cumulative = probabilities.double().cumsum_(-1)
    threshold = uniform.unsqueeze(1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return tokens.clamp_(max=probabilities.shape[1] - 1)


def truncate(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set what top_k (0: off) and top_p (1: off) exclude to zero; at least the most likely token stays."""
    if 0 < top_k < probabilities.shape[1]:
        kept = probabilities.topk(top_k).values[:, -1:]
        probabilities = torch.where(probabilities >= kept, probabilities, 0.0)
    if top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        beyond = before >= top_p * ordered.sum(-1, keepdim=True)
        probabilities = torch.zeros_like(probabilities).scatter(1, index, ordered.masked_fill(beyond, 0.0))
    return probabilities

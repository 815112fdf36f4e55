"""Gram matrix of per-sample gradients with respect to the output matrix, without storing a gradient.

For token t with hidden state h_t the gradient of log π_T(y_t) with respect to the output matrix is
d_t h_tᵀ / T with d_t = onehot(y_t) − π_t, and a sample's gradient is the sum over its tokens, so

    ⟨g_i, g_j⟩ = Σ_{t∈i} Σ_{s∈j} (d_t · d_s) (h_t · h_s) / T²

takes two small matrix products per pair of token blocks: N² (V + H) multiply-adds for N tokens.  n
gradients of size V × H would not fit into memory.  With a factor per token the same products give the inner
products of weighted sums of token gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron.kernels.lm_head import VocabularyShard


@dataclass
class OutputGram:
    """Partial sums of this rank's vocabulary shard and token blocks, to be summed over ranks."""

    gram: Tensor
    """[n, n] float64 ⟨g_i, g_j⟩."""
    energy: Tensor
    """[n] float64 Σ_t ‖d_t‖²."""
    energy_hidden: Tensor
    """[n] float64 Σ_t ‖d_t‖² ‖h_t‖²."""
    weighted: Tensor
    """[E, n, n] float64: as `gram`, each token's gradient multiplied by each of E factors."""


Weigh = Callable[[Tensor], Tensor]
"""Energies ‖d_t‖² [N] float64 of all tokens → E factors of each, [E, N] float64."""


def output_gram(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    owners: Tensor,
    count: int,
    vocabulary: VocabularyShard,
    temperature: float,
    chunk_tokens: int,
    part: tuple[int, int] = (0, 1),
    weigh: Weigh | None = None,
) -> OutputGram:
    """This rank's part of the inner products between `count` samples.

    Args:
        hidden: [N, H] hidden states that predict `targets`.
        weight: [V, H] this rank's rows of the output matrix, without padding.
        targets: [N] token ids of the whole vocabulary.
        owners: [N] sample index of each token.
        part: (i, n): this rank computes the row blocks i, i + n, …
        weigh: gives the factors of `weighted`; without it there are none.
    """
    blocks = [slice(b, min(b + chunk_tokens, len(hidden))) for b in range(0, len(hidden), chunk_tokens)]
    factors = torch.empty(0, len(hidden), dtype=torch.float64, device=hidden.device)
    if weigh is not None:
        sizes = [torch.empty(0, dtype=torch.float64, device=hidden.device)]
        for block in blocks:
            gradients = _logit_gradients(hidden[block], weight, targets[block], vocabulary, temperature)
            size = gradients.double().square().sum(1)
            _reduce(size, vocabulary, dist.ReduceOp.SUM)
            sizes.append(size)
        factors = weigh(torch.cat(sizes).cpu()).to(hidden.device)
    zeros = torch.zeros(count, dtype=torch.float64, device=hidden.device)
    gram = torch.zeros(count, count, dtype=torch.float64, device=hidden.device)
    total = OutputGram(gram, zeros, zeros.clone(), gram.repeat(len(factors), 1, 1))
    for i in range(part[0], len(blocks), part[1]):
        rows = blocks[i]
        left = _logit_gradients(hidden[rows], weight, targets[rows], vocabulary, temperature)
        size = left.double().square().sum(1)
        total.energy.index_add_(0, owners[rows], size)
        total.energy_hidden.index_add_(0, owners[rows], size * hidden[rows].double().square().sum(1))
        for j in range(i, len(blocks)):
            columns = blocks[j]
            right = left
            if j > i:
                right = _logit_gradients(hidden[columns], weight, targets[columns], vocabulary, temperature)
            products = (left @ right.T).mul_(hidden[rows].float() @ hidden[columns].float().T).double()
            pair = (owners[rows], owners[columns])
            total.gram += _by_sample(products, *pair, count, mirror=j > i)
            for weighted, factor in zip(total.weighted, factors, strict=True):
                scaled = products * factor[rows].unsqueeze(1) * factor[columns]
                weighted += _by_sample(scaled, *pair, count, mirror=j > i)
    total.gram /= temperature**2
    total.weighted /= temperature**2
    return total


def _by_sample(products: Tensor, rows: Tensor, columns: Tensor, count: int, mirror: bool) -> Tensor:
    """[n, n] sums of products between tokens over the samples `rows` and `columns` that own them.

    Args:
        mirror: also the products with rows and columns exchanged.
    """
    by_row = products.new_zeros(count, products.shape[1]).index_add_(0, rows, products)
    block = products.new_zeros(count, count).index_add_(1, columns, by_row)
    return block + block.T if mirror else block


def _logit_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: VocabularyShard, temperature: float
) -> Tensor:
    """[m, V] float32: onehot(y) − π_T of this vocabulary shard."""
    logits = (hidden.to(weight.dtype) @ weight.t()).float().div_(temperature)
    highest = logits.amax(1, keepdim=True)
    _reduce(highest, vocabulary, dist.ReduceOp.MAX)
    gradients = logits.sub_(highest).exp_()
    total = gradients.sum(1, keepdim=True)
    _reduce(total, vocabulary, dist.ReduceOp.SUM)
    gradients.div_(-total)
    local = targets - vocabulary.start
    owned = (local >= 0) & (local < weight.shape[0])
    row = local.clamp(0, weight.shape[0] - 1).unsqueeze(1)
    return gradients.scatter_add_(1, row, owned.to(gradients.dtype).unsqueeze(1))


def _reduce(values: Tensor, vocabulary: VocabularyShard, operation: dist.ReduceOp.RedOpType) -> None:
    if vocabulary.group is not None:
        dist.all_reduce(values, op=operation, group=vocabulary.group)

"""The head: hidden states → log-probabilities, loss and both gradients, without storing logits.

For a chunk of tokens with hidden states h [m, H] and this rank's rows W [V, H] of the output matrix:

    z  = h Wᵀ / T                          1st matrix product
    ℓ  = z_y − logsumexp(z)                log π_T of the sampled token
    dz = c ⊙ (onehot(y) − π) / T           c = ∂L/∂ℓ, from the objective
    dh = dz W,   dW += dzᵀ h               2nd and 3rd

The gradient is written in the forward pass, so nothing of size tokens × vocabulary outlives its
chunk and nothing is computed twice.  Under vocabulary parallelism the maximum and four sums are
reduced over the tensor-parallel group; dh is left for the caller to reduce, once.  Entropy and Σπ²
come from the same sums.  Rows of a padded vocabulary are not part of W.

Only response tokens are passed in: prompts and padding have no loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron.kernels.exact import linear, log_softmax

Coefficient = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(log π [m], place in the batch) → (loss [m], ∂loss/∂log π [m])."""


@dataclass
class HeadOutput:
    """Per token of the sweep, float32."""

    log_prob: Tensor
    """[n]: log π_T(y)."""
    entropy: Tensor
    """[n]: −Σ π log π."""
    sum_squares: Tensor
    """[n]: Σ π²."""
    loss: Tensor | None = None
    """[n]; None without an objective."""
    d_hidden: Tensor | None = None
    """[n, H]: this vocabulary shard's part of the gradient."""


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's part of the output rows."""

    start: int
    """First token id of the shard."""
    group: Any = None
    """Tensor-parallel process group; None where the vocabulary is whole."""


ROOM_BYTES = 64 * 2**20
FEWEST_TOKENS, MOST_TOKENS = 512, 1024
CACHED_BYTES = 2**22
"""On a CPU exponentials are computed so many bytes at a time, which stay in its cache."""


def default_chunk_tokens(rows: int) -> int:
    """Tokens of a chunk for `rows` of the vocabulary on this rank: as many logits as `ROOM_BYTES` hold.

    With fewer than 512 the matrix products get slow; with more than 1024 they do not get faster.
    """
    return min(MOST_TOKENS, max(FEWEST_TOKENS, ROOM_BYTES // (4 * rows)))


def sweep(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocabulary: VocabularyShard,
    temperature: float,
    chunk_tokens: int,
    coefficient: Coefficient | None = None,
    d_weight: Tensor | None = None,
    exact: bool = False,
) -> HeadOutput:
    """Run the head over `hidden` in chunks.

    Args:
        hidden: [n, H] hidden states that predict `targets`.
        weight: [V, H] this rank's valid rows of the output matrix.
        targets: [n] token ids of the whole vocabulary.
        coefficient: the objective; without it nothing is differentiated.
        d_weight: [V, H] to which the weight's gradient is added.
        exact: log-probabilities bit for bit those of the engine in exact mode; the vocabulary is whole.
    """
    n = hidden.shape[0]
    output = HeadOutput(*(hidden.new_empty(n, dtype=torch.float32) for _ in range(3)))
    if coefficient is not None:
        output.loss = hidden.new_empty(n, dtype=torch.float32)
        output.d_hidden = torch.empty_like(hidden)
    room = hidden.new_empty(0 if exact else min(n, chunk_tokens), weight.shape[0], dtype=torch.float32)
    softmax = _exact_softmax if exact else partial(_softmax, room)
    for begin in range(0, n, chunk_tokens):
        part = slice(begin, min(begin + chunk_tokens, n))
        exponentials, total, local_target, owned = softmax(
            output, part, hidden, weight, targets, vocabulary, temperature
        )
        if coefficient is None or output.loss is None or output.d_hidden is None:
            continue
        output.loss[part], d_log_prob = coefficient(output.log_prob[part], part)
        scaled = d_log_prob / temperature
        d_logits = exponentials.mul_((-scaled / total).unsqueeze(1))
        d_logits.scatter_add_(1, local_target.unsqueeze(1), torch.where(owned, scaled, 0.0).unsqueeze(1))
        d_logits = d_logits.to(weight.dtype)
        torch.mm(d_logits, weight, out=output.d_hidden[part])
        if d_weight is not None:
            _add_product(d_weight, d_logits, hidden[part])
    return output


def _softmax(
    room: Tensor,
    output: HeadOutput,
    part: slice,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocabulary: VocabularyShard,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fill `output[part]`.

    Args:
        room: [≥ m, V] float32, written over: on a CPU all that is as large as a chunk's logits.

    Returns:
        e^(z − max z) of this shard [m, V], its sum over the whole vocabulary [m], the target's local row
        and whether it is here.
    """
    logits = room[: part.stop - part.start]
    if weight.dtype == logits.dtype:
        torch.mm(hidden[part], weight.t(), out=logits)
    else:
        logits.copy_(torch.mm(hidden[part], weight.t()))
    if temperature != 1.0:
        logits.div_(temperature)
    rows = weight.shape[0]
    local_target = targets[part] - vocabulary.start
    owned = (local_target >= 0) & (local_target < rows)
    local_target = local_target.clamp(0, rows - 1)
    highest = logits.amax(1)
    _reduce(highest, vocabulary, dist.ReduceOp.MAX)
    target_logit = logits.gather(1, local_target.unsqueeze(1))[:, 0] - highest
    sums = torch.cat((torch.where(owned, target_logit, 0.0).unsqueeze(0), _exponentiate(logits, highest)))
    _reduce(sums, vocabulary, dist.ReduceOp.SUM)
    target_logit, total, weighted, squares = sums
    log_total = total.log()
    output.log_prob[part] = target_logit - log_total
    output.entropy[part] = log_total - weighted / total
    output.sum_squares[part] = squares / total.square()
    return logits, total, local_target, owned


def _exponentiate(logits: Tensor, highest: Tensor) -> Tensor:
    """z [m, V] → e^(z − max z) in place; returns Σ e, Σ e·(z − max z) and Σ e² [3, m] of each row."""
    rows, width = logits.shape
    block = max(1, rows if logits.is_cuda else CACHED_BYTES // (4 * width))
    sums, scratch = logits.new_empty(3, rows), logits.new_empty(min(block, rows), width)
    for z, high, found in zip(logits.split(block), highest.split(block), sums.split(block, 1), strict=True):
        z.sub_(high.unsqueeze(1))
        e = torch.exp(z, out=scratch[: z.shape[0]])
        torch.sum(e, 1, out=found[0])
        torch.sum(z.mul_(e), 1, out=found[1])
        torch.linalg.vector_norm(e, dim=1, out=found[2]).square_()
        z.copy_(e)
    return sums


def _exact_softmax(
    output: HeadOutput,
    part: slice,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocabulary: VocabularyShard,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_softmax` by the product and the logarithm that the engine uses in exact mode."""
    log_probs = log_softmax(linear(hidden[part], weight), temperature)
    probabilities, target = log_probs.exp(), targets[part]
    output.log_prob[part] = log_probs.gather(1, target.unsqueeze(1))[:, 0]
    output.entropy[part] = -(probabilities * log_probs).sum(1)
    output.sum_squares[part] = probabilities.square().sum(1)
    total = torch.ones_like(output.log_prob[part])
    return probabilities, total, target, torch.ones_like(target, dtype=torch.bool)


def _reduce(values: Tensor, vocabulary: VocabularyShard, operation: Any) -> None:
    if vocabulary.group is not None:
        dist.all_reduce(values, op=operation, group=vocabulary.group)


def _add_product(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """total += d_logitsᵀ · hidden, summed in total's own precision."""
    if total.dtype == d_logits.dtype:
        total.addmm_(d_logits.t(), hidden)
    elif total.device.type == "cuda":
        total.add_(torch.mm(d_logits.t(), hidden, out_dtype=total.dtype))
    else:
        total.addmm_(d_logits.t().to(total.dtype), hidden.to(total.dtype))

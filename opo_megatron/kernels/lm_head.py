"""The LM head: hidden states → log-probabilities, loss and both gradients, without storing all logits.

For a chunk of tokens with hidden states h [m, H] and this rank's rows W [V, H] of the output matrix:

    z  = h Wᵀ / T                          1st matrix product
    ℓ  = z_y − logsumexp(z)                log π_T of the sampled token
    dz = c ⊙ (onehot(y) − π) / T           c = ∂L/∂ℓ, from the objective
    dh = dz W,   dW += dzᵀ h               2nd and 3rd

The gradient is computed in the forward pass, so nothing of size tokens × vocabulary outlives its
chunk and nothing is computed twice.  Under vocabulary parallelism the maximum and four sums are
reduced over the tensor-parallel group; the caller reduces dh, once.  Entropy and Σπ² come from the
same sums.  Padding rows of the vocabulary are not part of W.

Only response tokens are passed in: prompts and padding have no loss.

On GPUs softmax and gradient are two Triton passes over the logits (`kernels/triton_softmax.py`), stored
in the weight's type: in bf16 a logit takes 2 bytes and has the engine's rounding.  Elsewhere logits are
float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron import kernels
from opo_megatron.errors import OpoWarning
from opo_megatron.kernels import exact as exact_kernels

Coefficient = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(log π [m], slice of the tokens) → (loss [m], ∂loss/∂log π [m])."""


@dataclass
class HeadOutput:
    """Per token, float32."""

    log_prob: Tensor
    """[n]: log π_T(y)."""
    entropy: Tensor
    """[n]: −Σ π log π."""
    sum_squares: Tensor
    """[n]: Σ π²."""
    loss: Tensor | None = None
    """[n]; None without an objective."""
    d_hidden: Tensor | None = None
    """[n, H]: the gradient's part from this vocabulary shard."""


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's rows of the output matrix."""

    start: int
    """First token id of the shard."""
    group: Any = None
    """Tensor-parallel process group; None where the vocabulary is not sharded."""


Gradient = Callable[[Tensor], Tensor]
"""∂loss/∂log π [m] → ∂loss/∂z [m, V] of this vocabulary shard, in the weight's type."""

BUFFER_BYTES = 64 * 2**20
FEWEST_TOKENS, MOST_TOKENS = 512, 1024
CACHED_BYTES = 2**22
"""Block size of exponentials on a CPU: fits into its cache."""
GPU_BUFFER_BYTES = 2**29
"""2,048 tokens of 131,072 rows in bf16.  With fewer, dW, 4 bytes a weight, is read and written more often,
and SMs idle in dh: 2,048 × 4,096 results are 256 tiles of 128 × 256, two waves of an H100's 132 SMs."""
GPU_MOST_TOKENS, GPU_MULTIPLE = 8192, 128
LINE_BYTES = 128
"""Alignment of rows of logits on a GPU; matrix products are slow without it."""


def default_chunk_tokens(
    rows: int, weight_type: torch.dtype = torch.float32, device: torch.device | None = None
) -> int:
    """Tokens per chunk for `rows` of the vocabulary on this rank, as many as fit into the buffer.

    On a CPU matrix products are slow below 512 tokens and not faster above 1024.  On a GPU every chunk
    reads and writes the whole weight gradient, so chunks are as large as the buffer allows, in whole
    tiles of the product.
    """
    if device is None or not kernels.uses_triton(device):
        return min(MOST_TOKENS, max(FEWEST_TOKENS, BUFFER_BYTES // (4 * rows)))
    fits = GPU_BUFFER_BYTES // (weight_type.itemsize * rows) // GPU_MULTIPLE * GPU_MULTIPLE
    return min(GPU_MOST_TOKENS, max(FEWEST_TOKENS, fits))


def chunked_logprobs(
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
    """Run the LM head over `hidden` in chunks.

    Args:
        hidden: [n, H] hidden states that predict `targets`.
        weight: [V, H] this rank's rows of the output matrix, without padding.
        targets: [n] token ids of the whole vocabulary.
        coefficient: the objective; None: forward only.
        d_weight: [V, H], accumulates the weight's gradient.
        exact: log-probabilities bit for bit as the engine's in exact mode.
    """
    n = hidden.shape[0]
    output = HeadOutput(*(hidden.new_empty(n, dtype=torch.float32) for _ in range(3)))
    if coefficient is not None:
        output.loss = hidden.new_empty(n, dtype=torch.float32)
        output.d_hidden = torch.empty_like(hidden)
    if exact:
        softmax: Callable[..., Gradient] = _exact_softmax
    elif kernels.uses_triton(hidden.device):
        softmax = partial(_triton_softmax, _aligned_buffer(min(n, chunk_tokens), weight))
    else:
        buffer = hidden.new_empty(min(n, chunk_tokens), weight.shape[0], dtype=torch.float32)
        softmax = partial(_softmax, buffer)
    for begin in range(0, n, chunk_tokens):
        part = slice(begin, min(begin + chunk_tokens, n))
        gradient = softmax(output, part, hidden, weight, targets, vocabulary, temperature)
        if coefficient is None or output.loss is None or output.d_hidden is None:
            continue
        output.loss[part], d_log_prob = coefficient(output.log_prob[part], part)
        d_logits = gradient(d_log_prob)
        torch.mm(d_logits, weight, out=output.d_hidden[part])
        if d_weight is not None:
            _add_product(d_weight, d_logits, hidden[part])
    return output


def _aligned_buffer(tokens: int, weight: Tensor) -> Tensor:
    """[tokens, V] in the weight's type, with rows aligned to `LINE_BYTES`."""
    multiple = LINE_BYTES // weight.dtype.itemsize
    rows = weight.shape[0]
    return weight.new_empty(tokens, -(-rows // multiple) * multiple)[:, :rows]


def _triton_softmax(
    buffer: Tensor,
    output: HeadOutput,
    part: slice,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocabulary: VocabularyShard,
    temperature: float,
) -> Gradient:
    """`_softmax` in one launch and its gradient, in place, in another; `buffer` has the weight's type."""
    from opo_megatron.kernels.triton_softmax import gradient_in_place, row_statistics

    logits = torch.mm(hidden[part], weight.t(), out=buffer[: part.stop - part.start])
    stats = row_statistics(logits, targets[part], vocabulary.start, temperature)
    highest, sums = stats.highest, torch.stack((stats.target, stats.total, stats.weighted, stats.squares))
    if vocabulary.group is not None:
        highest = stats.highest.clone()
        _reduce(highest, vocabulary, dist.ReduceOp.MAX)
        shift = (stats.highest - highest) / temperature
        scale = shift.exp()
        sums[2] = scale * (stats.weighted + shift * stats.total)
        sums[1].mul_(scale)
        sums[3].mul_(scale.square())
        _reduce(sums, vocabulary, dist.ReduceOp.SUM)
    _set_output(output, part, (sums[0] - highest) / temperature, *sums[1:])
    return partial(gradient_in_place, logits, targets[part], vocabulary.start, temperature, highest, sums[1])


def _set_output(
    output: HeadOutput, part: slice, target: Tensor, total: Tensor, weighted: Tensor, squares: Tensor
) -> None:
    """Set `output[part]` from x_y, Σ e, Σ e·x and Σ e², with x = (z − max z)/T and e = exp x."""
    log_total = total.log()
    torch.sub(target, log_total, out=output.log_prob[part])
    torch.addcdiv(log_total, weighted, total, value=-1, out=output.entropy[part])
    torch.div(squares, total.square(), out=output.sum_squares[part])


def _softmax(
    buffer: Tensor,
    output: HeadOutput,
    part: slice,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocabulary: VocabularyShard,
    temperature: float,
) -> Gradient:
    """Set `output[part]`; the reference implementation of `kernels/triton_softmax.py`.

    Args:
        buffer: [≥ m, V] float32, overwritten: on a CPU the only memory of the size of a chunk's logits.

    Returns:
        The function that computes the chunk's gradient, in `buffer`.
    """
    logits = buffer[: part.stop - part.start]
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
    _set_output(output, part, *sums)
    return partial(_gradient, logits, sums[1], local_target, owned, temperature, weight.dtype)


def _gradient(
    exponentials: Tensor,
    total: Tensor,
    local_target: Tensor,
    owned: Tensor,
    temperature: float,
    result_type: torch.dtype,
    d_log_prob: Tensor,
) -> Tensor:
    """c/T ⊙ (onehot(y) − π) [m, V], in place of the exponentials.

    Args:
        exponentials: e^(z − max z) of this shard [m, V].
        total: its sum over the whole vocabulary [m].
        local_target, owned: the target's row in this shard, and whether it is in it, [m].
    """
    scaled = d_log_prob / temperature
    d_logits = exponentials.mul_((-scaled / total).unsqueeze(1))
    d_logits.scatter_add_(1, local_target.unsqueeze(1), torch.where(owned, scaled, 0.0).unsqueeze(1))
    return d_logits.to(result_type)


def _exponentiate(logits: Tensor, highest: Tensor) -> Tensor:
    """z [m, V] → e^(z − max z) in place; returns Σ e, Σ e·(z − max z) and Σ e² of each row, [3, m]."""
    rows, width = logits.shape
    block = max(1, rows if logits.is_cuda else CACHED_BYTES // (4 * width))
    sums, scratch = logits.new_empty(3, rows), logits.new_empty(min(block, rows), width)
    for z, high, out in zip(logits.split(block), highest.split(block), sums.split(block, 1), strict=True):
        z.sub_(high.unsqueeze(1))
        e = torch.exp(z, out=scratch[: z.shape[0]])
        torch.sum(e, 1, out=out[0])
        torch.sum(z.mul_(e), 1, out=out[1])
        torch.linalg.vector_norm(e, dim=1, out=out[2]).square_()
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
) -> Gradient:
    """`_softmax` with the matrix product and log-softmax of the engine's exact mode."""
    logits = gather_logits(exact_kernels.logits(hidden[part], weight), vocabulary)
    log_probs = exact_kernels.log_softmax(logits, temperature)
    probabilities, target = log_probs.exp(), targets[part]
    output.log_prob[part] = log_probs.gather(1, target.unsqueeze(1))[:, 0]
    output.entropy[part] = -(probabilities * log_probs).sum(1)
    output.sum_squares[part] = probabilities.square().sum(1)
    total = torch.ones_like(output.log_prob[part])
    own = probabilities[:, vocabulary.start : vocabulary.start + weight.shape[0]]
    local_target = target - vocabulary.start
    owned = (local_target >= 0) & (local_target < own.shape[1])
    local_target = local_target.clamp(0, own.shape[1] - 1)
    return partial(_gradient, own.contiguous(), total, local_target, owned, temperature, weight.dtype)


def gather_logits(logits: Tensor, vocabulary: VocabularyShard) -> Tensor:
    """[m, V of this shard] → [m, V], on every rank of the tensor-parallel group."""
    group = vocabulary.group
    if group is None:
        return logits
    own = torch.tensor([logits.shape[1]], device=logits.device)
    widths = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(widths, own, group=group)
    widest = max(int(width) for width in widths)
    padded = torch.nn.functional.pad(logits, (0, widest - logits.shape[1]))
    shards = [torch.empty_like(padded) for _ in widths]
    dist.all_gather(shards, padded, group=group)
    return torch.cat([shard[:, : int(width)] for shard, width in zip(shards, widths, strict=True)], 1)


def _reduce(values: Tensor, vocabulary: VocabularyShard, operation: Any) -> None:
    if vocabulary.group is not None:
        dist.all_reduce(values, op=operation, group=vocabulary.group)


def _add_product(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """total += d_logitsᵀ · hidden, accumulated in total's precision."""
    if total.dtype == d_logits.dtype:
        total.addmm_(d_logits.t(), hidden)
    elif total.device.type != "cuda":
        total.addmm_(d_logits.t().to(total.dtype), hidden.to(total.dtype))
    elif _adds_in_float32(total.device, d_logits.dtype):
        torch.addmm(total, d_logits.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(d_logits.t(), hidden, out_dtype=total.dtype))


@cache
def _adds_in_float32(device: torch.device, factors: torch.dtype) -> bool:
    """Whether this torch adds products of `factors` to float32 in place; older ones need a buffer."""
    total, factor = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device, dtype=factors)
    try:
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError) as error:
        reason = str(error)
    else:
        if bool((total == 17).all()):
            return True
        reason = "its sum is wrong"
    warnings.warn(
        f"torch {torch.__version__} cannot add a product of {factors} to float32 in place ({reason}), so the "
        "LM head's gradient needs another buffer of its size",
        OpoWarning,
        stacklevel=2,
    )
    return False

"""The LM head as the loss function of Megatron's schedule, with gradients computed in the forward pass.

`kernels/lm_head.py` works on matrices; this file gets them from Megatron.  The forward pass accumulates
the weight's gradient in DDP's `main_grad` and keeps the hidden states' gradient for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron.batch.micro_batch import MicroBatch
from opo_megatron.distributed.process_groups import Parallel
from opo_megatron.kernels.lm_head import HeadOutput, VocabularyShard, chunked_logprobs
from opo_megatron.policy.token_loss import TokenLoss


@dataclass(frozen=True)
class LMHead:
    """What all head passes of one policy share."""

    parallel: Parallel
    vocab_size: int
    chunk_tokens: int
    sequence_parallel: bool
    exact: bool = False

    def vocabulary(self, weight: Tensor) -> tuple[VocabularyShard, Tensor]:
        """This rank's shard of the vocabulary, and its rows without padding."""
        start = weight.shape[0] * self.parallel.tp_rank
        rows = max(0, min(weight.shape[0], self.vocab_size - start))
        group = self.parallel.tp_group if self.parallel.tp_size > 1 else None
        return VocabularyShard(start, group), weight.detach()[:rows]

    def gather(self, hidden: Tensor) -> Tensor:
        """[b, s, H] of this rank's shard of the sequence → of the whole sequence."""
        if not self.sequence_parallel:
            return hidden
        parts = [torch.empty_like(hidden) for _ in range(self.parallel.tp_size)]
        dist.all_gather(parts, hidden.contiguous(), group=self.parallel.tp_group)
        return torch.cat(parts, 1)

    def select(self, hidden: Tensor, micro: MicroBatch) -> Tensor:
        """[b, s, H] → [n, H]: the hidden states that predict response tokens, detached."""
        return self.gather(hidden.detach()).flatten(0, 1)[micro.loss_positions]

    def reduce(self, d_hidden: Tensor) -> Tensor:
        """All-reduce the gradient [b, s, H] over vocabulary shards; returns this rank's part of it."""
        if self.parallel.tp_size == 1:
            return d_hidden
        dist.all_reduce(d_hidden, group=self.parallel.tp_group)
        if self.sequence_parallel:
            return d_hidden.chunk(self.parallel.tp_size, 1)[self.parallel.tp_rank].contiguous()
        return d_hidden


def log_probs(
    head: LMHead, hidden: Tensor, weight: Tensor, micro: MicroBatch, temperature: float
) -> HeadOutput:
    """A forward-only head pass over the response tokens of a micro-batch."""
    vocabulary, rows = head.vocabulary(weight)
    flat = head.select(hidden, micro).to(weight.dtype)
    return chunked_logprobs(
        flat, rows, micro.targets, vocabulary, temperature, head.chunk_tokens, exact=head.exact
    )


class LMHeadLoss(torch.autograd.Function):
    """hidden [b, s, H], weight [V, H] → the micro-batch's part of the loss, a scalar.

    The incoming gradient is 1 (the normaliser is in the coefficients), so the gradients computed in the
    forward pass are final.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        head: LMHead,
        micro: MicroBatch,
        token_loss: TokenLoss,
        shares_embedding: bool,
    ) -> Tensor:
        assert token_loss.objective is not None
        vocabulary, rows = head.vocabulary(weight)
        whole = head.gather(hidden.detach())
        selected = whole.flatten(0, 1)[micro.loss_positions].to(weight.dtype)
        output = chunked_logprobs(
            selected,
            rows,
            micro.targets,
            vocabulary,
            token_loss.objective.temperature,
            head.chunk_tokens,
            token_loss,
            d_weight=weight.main_grad[: rows.shape[0]],  # type: ignore[attr-defined]
            exact=head.exact,
        )
        assert output.d_hidden is not None and output.loss is not None
        d_whole = torch.zeros_like(whole).flatten(0, 1)
        d_whole[micro.loss_positions] = output.d_hidden.to(whole.dtype)
        ctx.d_hidden = head.reduce(d_whole.view_as(whole))
        ctx.weight, ctx.shares_embedding = weight, shares_embedding
        output.d_hidden = None
        token_loss.finish(output)
        return output.loss.sum()

    @staticmethod
    def backward(ctx: Any, *d_loss: Tensor) -> tuple[Tensor | None, ...]:
        # DDP's hook must not add the placeholder to `main_grad`; where the parameter is also the
        # embedding, the hook must still add the embedding's gradient.
        ctx.weight.grad_added_to_main_grad = not ctx.shares_embedding
        placeholder = ctx.weight.new_zeros(()).expand_as(ctx.weight)
        return ctx.d_hidden, placeholder, None, None, None, None

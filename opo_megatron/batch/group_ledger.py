"""Which samples of a step have ended, on all ranks, and which groups are to be trained on next.

A step has N = P·K samples, numbered by (group, sample); a rank generates a contiguous block of them, so a
group may be on several ranks.  A group is complete when all its K samples have ended.  Every rank enters the
same events in the same order and so derives the same parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats, check_rewards
from opo_megatron.config.choices import OverlapOrder
from opo_megatron.distributed.process_groups import rank_range


class Ended(NamedTuple):
    """Samples that have ended, [n] each."""

    samples: Tensor
    """Their numbers in the step; −1 in the ledger for one that has not ended."""
    prompt_ids: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    finish_reasons: Tensor
    rewards: Tensor

    @staticmethod
    def of(samples: Sequence[int], rollouts: Rollouts) -> Ended:
        assert rollouts.rewards is not None
        assert rollouts.given_lengths is None, "rollout.overlap is refused with conversations"
        return Ended(
            torch.tensor(samples, dtype=torch.int64), rollouts.prompt_ids, rollouts.prompt_lengths,
            rollouts.response_lengths, rollouts.finish_reasons, rollouts.rewards,
        )  # fmt: skip


class GroupLedger:
    """The samples of one step, the same on every rank."""

    def __init__(self, groups: int, samples_per_prompt: int, world_size: int) -> None:
        self._groups, self._group_size = groups, samples_per_prompt
        total = groups * samples_per_prompt
        self.blocks = [rank_range(total, rank, world_size) for rank in range(world_size)]
        """By rank, the samples that it generates."""
        ids, prompts, responses, reasons = torch.zeros(4, total, dtype=torch.int64)
        rewards = torch.zeros(total, dtype=torch.float64)
        self._columns = Ended(torch.full((total,), -1), ids, prompts, responses, reasons, rewards)
        self._is_taken = torch.zeros(groups, dtype=torch.bool)

    def enter(self, ended: Ended) -> None:
        """Note samples that have ended on a rank.

        Raises:
            ValueError: for one that is there already.
        """
        if bool((self._columns.samples[ended.samples] >= 0).any()):
            raise ValueError(f"a sample ended twice: {ended.samples.tolist()}")
        for column, values in zip(self._columns, ended, strict=True):
            column[ended.samples] = values

    def check_rewards(self) -> None:
        """Raise NonFiniteError for a reward that is NaN or infinite."""
        check_rewards(self._columns.prompt_ids, self._columns.rewards)

    @property
    def is_complete(self) -> bool:
        """Whether all samples have ended."""
        return bool((self._columns.samples >= 0).all())

    def next_part(self, order: OverlapOrder, least_tokens: int) -> list[int]:
        """The groups to train on next, which are then taken; empty where more have to end first.

        Args:
            least_tokens: of a part, prompts included; the last one has what is left.
        """
        ended = (self._columns.samples >= 0).view(self._groups, self._group_size).all(1)
        tokens = self._sequence_lengths().view(self._groups, self._group_size).sum(1)
        if order is OverlapOrder.arrival:
            part = (ended & ~self._is_taken).nonzero()[:, 0].tolist()
            if not bool(ended.all()) and int(tokens[part].sum()) < least_tokens:
                part = []
        else:
            part = self._next_in_order(ended, tokens, least_tokens)
        self._is_taken[part] = True
        return part

    def _next_in_order(self, ended: Tensor, tokens: Tensor, least_tokens: int) -> list[int]:
        """Where parts begin and end depends on lengths alone, not on when a group has ended."""
        part: list[int] = []
        for group in (~self._is_taken).nonzero()[:, 0].tolist():
            if not ended[group]:
                return []
            part.append(group)
            if int(tokens[part].sum()) >= least_tokens:
                return part
        return part

    def samples_of(self, groups: Sequence[int]) -> list[int]:
        """Numbers of the samples of these groups, in their order."""
        return [group * self._group_size + i for group in groups for i in range(self._group_size)]

    def stats(self, groups: Sequence[int] | None = None) -> BatchStats:
        """The statistics of whole groups, numbered from 0; default all."""
        chosen = range(self._groups) if groups is None else groups
        samples = torch.tensor(self.samples_of(chosen), dtype=torch.int64)
        _, _, prompts, responses, reasons, rewards = (column[samples] for column in self._columns)
        renumbered = torch.arange(len(chosen)).repeat_interleave(self._group_size)
        return BatchStats(renumbered, prompts, responses, reasons, rewards)

    def _sequence_lengths(self) -> Tensor:
        return self._columns.prompt_lengths + self._columns.response_lengths

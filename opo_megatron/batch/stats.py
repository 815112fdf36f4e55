"""Statistics of all samples of a step, gathered to every rank: lengths, rewards, finish reasons.

A group may be split over ranks, so every rank computes advantages from the statistics of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opo_megatron.algorithm.energy import EnergySums
from opo_megatron.batch.rollouts import Rollouts, is_truncated
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.errors import NonFiniteError


@dataclass(frozen=True)
class BatchStats:
    """Statistics of all N samples of a step, in the order of the requests."""

    groups: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    finish_reasons: Tensor
    rewards: Tensor
    energies: EnergySums | None = None
    """None where the engine returned none."""
    token_energies: Tensor | None = None
    """[Σl] float32 of all tokens, sample by sample; None where the engine returned none."""
    greedy_rewards: Tensor | None = None
    """[N] reward of the greedy response to each sample's prompt; None where none was sampled."""

    given_lengths: Tensor | None = None
    """[N] tokens that environments gave; None where no sample is a conversation."""
    turns: Tensor | None = None
    """[N] turns of each conversation."""

    sampled_groups: int | None = None
    """Groups sampled to fill the batch with groups that have a signal; None where it is not filled."""
    sampled_reward: float = 0.0
    """Mean reward of all their samples."""
    rounds: int = 1
    """Rounds of generation."""

    @property
    def sequence_lengths(self) -> Tensor:
        """[N]: prompt, response and given tokens."""
        own = self.prompt_lengths + self.response_lengths
        return own if self.given_lengths is None else own + self.given_lengths

    @property
    def truncated(self) -> float:
        """Share of responses that a limit cut, of tokens or of turns."""
        return float(is_truncated(self.finish_reasons).double().mean())


def gather_stats(parallel: Parallel, rollouts: Rollouts) -> BatchStats:
    """Gather the statistics of all ranks' samples.

    Raises:
        NonFiniteError: on all ranks, for a reward that is NaN or infinite.
    """
    assert rollouts.rewards is not None
    columns = (
        rollouts.prompt_ids,
        rollouts.groups,
        rollouts.prompt_lengths,
        rollouts.response_lengths,
        rollouts.finish_reasons,
        rollouts.rewards,
    )
    energies = None if rollouts.energy is None else (rollouts.energy, rollouts.energy_hidden)
    given = None if rollouts.given_lengths is None else (rollouts.given_lengths, rollouts.turns)
    gathered = all_gather_objects(parallel, (columns, energies, rollouts.token_energy, given))
    ids, groups, prompts, responses, reasons, rewards = _concat(columns for columns, _, _, _ in gathered)
    check_rewards(ids, rewards)
    stats = BatchStats(groups, prompts, responses, reasons, rewards)
    if energies is not None:
        stats = replace(stats, energies=EnergySums(*_concat(energies for _, energies, _, _ in gathered)))
    if rollouts.token_energy is not None:
        stats = replace(stats, token_energies=torch.cat([energies for _, _, energies, _ in gathered]))
    if given is not None:
        given_lengths, turns = _concat(given for _, _, _, given in gathered)
        stats = replace(stats, given_lengths=given_lengths, turns=turns)
    return stats


def check_rewards(prompt_ids: Tensor, rewards: Tensor) -> None:
    """Raise NonFiniteError for a reward that is NaN or infinite."""
    nonfinite = (~torch.isfinite(rewards)).nonzero()
    if nonfinite.numel():
        i = int(nonfinite[0])
        raise NonFiniteError(
            f"the reward of prompt {int(prompt_ids[i])} is {float(rewards[i])}",
            "a verifier must return a finite number",
        )


def _concat(ranks: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Each column, concatenated over ranks."""
    return [torch.cat(parts) for parts in zip(*ranks, strict=True)]

"""From prompts to a training batch: who draws what, who learns which reward, who trains on which sample.

Every rank draws a contiguous block of the step's responses.  Then every rank learns all rewards and
lengths, because a group may be split over ranks, and each data-parallel rank receives the tokens of
its own samples only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opo_megatron.algorithm.energy import EnergySums
from opo_megatron.batch.micro_batch import MicroBatchPlan
from opo_megatron.batch.rollouts import FINISH_LENGTH, Rollouts
from opo_megatron.distributed.process_groups import (
    Parallel,
    all_gather_objects,
    all_to_all_objects,
    rank_range,
)
from opo_megatron.errors import NonFiniteError, UserError
from opo_megatron.rollout.engine import GenerationRequest
from opo_megatron.tasks import Prompt, Task


def requests_for(
    prompts: Sequence[Prompt], samples_per_prompt: int, parallel: Parallel
) -> list[GenerationRequest]:
    """This rank's share of prompts × samples.

    A prompt that stands in the batch twice goes on counting its samples, so that none is drawn twice.

    Raises:
        UserError: for a prompt without tokens.
    """
    share = rank_range(len(prompts) * samples_per_prompt, parallel.rank, parallel.world_size)
    seen: Counter[int] = Counter()
    requests = []
    for group, prompt in enumerate(prompts):
        if not prompt.tokens:
            raise UserError(
                f"prompt {prompt.id} ({prompt.text!r}) has no tokens; give it some text or drop it"
            )
        first = seen[prompt.id] * samples_per_prompt
        seen[prompt.id] += 1
        for sample in range(samples_per_prompt):
            if group * samples_per_prompt + sample in share:
                requests.append(GenerationRequest(prompt.id, group, first + sample, prompt.tokens))
    return requests


def rewards_of(task: Task, prompts: Sequence[Prompt], rollouts: Rollouts) -> Tensor:
    """[n] float64: the task's reward of each response; `gather_stats` checks them on all ranks alike."""
    asked = [prompts[group] for group in rollouts.groups.tolist()]
    return torch.tensor(task.rewards(asked, rollouts.responses()), dtype=torch.float64)


@dataclass(frozen=True)
class BatchStats:
    """What every rank knows of all N samples of a step, in the order of the requests."""

    groups: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    finish_reasons: Tensor
    rewards: Tensor
    energies: EnergySums | None = None
    """None where the engine returned none."""

    @property
    def sequence_lengths(self) -> Tensor:
        """[N]: prompt and response."""
        return self.prompt_lengths + self.response_lengths

    @property
    def truncated(self) -> float:
        """Share of responses that were cut."""
        return float((self.finish_reasons == FINISH_LENGTH).double().mean())


def gather_stats(parallel: Parallel, rollouts: Rollouts) -> BatchStats:
    """Lengths and rewards of all ranks' samples.

    Raises:
        BadNumbers: on all ranks, for a reward that is not a finite number.
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
    gathered = all_gather_objects(parallel, (columns, energies))
    ids, groups, prompts, responses, reasons, rewards = _joined(known for known, _ in gathered)
    wrong = (~torch.isfinite(rewards)).nonzero()
    if wrong.numel():
        i = int(wrong[0])
        raise NonFiniteError(
            f"the reward of prompt {int(ids[i])} is {float(rewards[i])}",
            "a verifier must return a finite number",
        )
    summary = BatchStats(groups, prompts, responses, reasons, rewards)
    if energies is None:
        return summary
    return replace(summary, energies=EnergySums(*_joined(found for _, found in gathered)))


def _joined(ranks: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Each column of all ranks, one behind the other."""
    return [torch.cat(parts) for parts in zip(*ranks, strict=True)]


def local_slice(parallel: Parallel, total: int) -> slice:
    """Where this rank's samples stand among all `total` samples of a step."""
    share = rank_range(total, parallel.rank, parallel.world_size)
    return slice(share.start, share.stop)


def redistribute_to_dp(
    parallel: Parallel, rollouts: Rollouts, schedule: MicroBatchPlan, total: int
) -> Rollouts:
    """Each rank's block of `total` samples in, the samples of this data-parallel rank out, as planned."""
    blocks = [rank_range(total, r, parallel.world_size) for r in range(parallel.world_size)]
    mine = blocks[parallel.rank]
    dp_ranks = all_gather_objects(parallel, parallel.dp_rank)
    send_chunks = [
        rollouts.select([i - mine.start for i in schedule.samples_of(dp_rank) if i in mine])
        for dp_rank in dp_ranks
    ]
    received = Rollouts.concatenate(all_to_all_objects(parallel, send_chunks))
    wanted = schedule.samples_of(parallel.dp_rank)
    arrived = [i for block in blocks for i in wanted if i in block]
    place = {sample: position for position, sample in enumerate(arrived)}
    return received.select([place[sample] for sample in wanted])


def gather_to_rank0(parallel: Parallel, rollouts: Rollouts) -> Rollouts | None:
    """All ranks' samples on rank 0, None elsewhere."""
    parts = all_to_all_objects(parallel, [rollouts if r == 0 else None for r in range(parallel.world_size)])
    return Rollouts.concatenate(parts) if parallel.rank == 0 else None

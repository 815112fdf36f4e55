"""The audit record of a step, a row of `audit.jsonl` that another machine can verify.

Each OPO step records a digest per column of its rollouts (among them the experts that the engine took, where
they are replayed, and what environments gave, where samples are conversations), digest and norm per tensor of
its new weights, and a chain: a hash of these digests and the previous chain, so that one number tells whether
two runs are equal up to this step.  Digests do not depend on the parallel layout (`audit/digest.py`).  Engine
log-probabilities are left out: their rounding depends on the layout.  A step that overlapped with generation
records the order of its sums: `arrival` is not repeatable bit for bit.  Warm-start steps are not recorded;
step 0 has the weights after the warm start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opo_megatron.audit.digest import digest_rows, digest_weights
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config import Config
from opo_megatron.config.choices import Packing
from opo_megatron.distributed.process_groups import Parallel, all_reduce
from opo_megatron.observe.metrics_file import MetricsRow
from opo_megatron.policy.policy import Policy
from opo_megatron.utils.hashing import MASK, hash_of, mix_tensor

CHAIN = "audit_chain"
"""Key of the last chain in the run's state."""
ORDER = "overlap_order"
"""Key of the order in which groups were trained on, of steps that overlapped with generation."""
PER_SAMPLE = ("prompt_ids", "response_lengths", "finish_reasons", "rewards")
PER_TOKEN = {"prompt_tokens": "prompt_lengths", "response_tokens": "response_lengths"}
GIVEN_LENGTHS = "given_lengths"
PER_GIVEN_TOKEN = {"given_tokens": GIVEN_LENGTHS, "given_after": GIVEN_LENGTHS}
"""Only of conversations."""
EXPERTS = "routed_experts"


def audit_row(
    policy: Policy, config: Config, state: dict[str, Any], step: int, rollouts: Rollouts | None
) -> MetricsRow:
    """The row of a step; updates the chain in `state`.  A collective of all ranks.

    Args:
        rollouts: this rank's part; None for a step without rollouts.
    """
    weights = digest_weights(policy.chunks, policy.param_mapping, policy.parallel)
    columns = digest_rollouts(policy.parallel, rollouts)
    weights_sum, rollouts_sum = (
        sum(values) & MASK for values in ((one.sum for one in weights.values()), columns.values())
    )
    chain = hash_of((int(state.get(CHAIN, "0"), 16), weights_sum, rollouts_sum))
    state[CHAIN] = in_hex(chain)
    overlapped = config.rollout.overlap and rollouts is not None
    return {
        "step": step,
        **({ORDER: config.rollout.overlap_order.value} if overlapped else {}),
        "chain": in_hex(chain),
        "weights": in_hex(weights_sum),
        "rollouts": in_hex(rollouts_sum),
        "layout": layout_of(config, policy.parallel),
        "columns": {name: in_hex(value) for name, value in columns.items()},
        "tensors": {name: [in_hex(one.sum), one.norm] for name, one in weights.items()},
    }


def layout_of(config: Config, parallel: Parallel) -> str:
    """All settings that affect the rounding of sums."""
    policy, rollout = config.policy, config.rollout
    return (
        f"{parallel.world_size} ranks, tensor {policy.tensor_model_parallel_size}, pipeline "
        f"{policy.pipeline_model_parallel_size}×{policy.virtual_pipeline_model_parallel_size or 1}, "
        f"{f'context {policy.context_parallel_size}, ' if policy.context_parallel_size > 1 else ''}expert "
        f"{policy.expert_model_parallel_size}×{policy.expert_tensor_parallel_size}, sequence parallel "
        f"{policy.sequence_parallel}, {policy.max_tokens_per_micro_batch} tokens"
        f"{' packed' if policy.packing is Packing.thd else ''}, head "
        f"{policy.head_chunk_tokens}, {rollout.local.slots} slots, {parallel.device.type}"
        f"{f', parts of {rollout.overlap_micro_batches} micro-batches' if rollout.overlap else ''}"
    )


def digest_rollouts(parallel: Parallel, rollouts: Rollouts | None) -> dict[str, int]:
    """Signed 64-bit digest of each column over all ranks; a collective."""
    own = dict.fromkeys((*PER_SAMPLE, *PER_TOKEN), 0) if rollouts is None else column_digests(rollouts)
    sums = all_reduce(parallel, torch.tensor(list(own.values()), dtype=torch.int64))
    return dict(zip(own, sums.tolist(), strict=True))


def column_digests(rollouts: Rollouts) -> dict[str, int]:
    """Signed 64-bit digest of each column of these samples."""
    return {name: digest_rows(name, keys, values) for name, keys, values in _columns(rollouts)}


def _columns(rollouts: Rollouts) -> list[tuple[str, Tensor, Tensor]]:
    """(name, keys, values); the key of an element does not depend on its rank."""
    samples = mix_tensor(rollouts.groups * (1 << 32) + rollouts.sample_indices)
    columns = [(name, samples, getattr(rollouts, name)) for name in PER_SAMPLE]
    per_token = PER_TOKEN
    if rollouts.given_lengths is not None:
        columns.append((GIVEN_LENGTHS, samples, rollouts.given_lengths))
        per_token = PER_TOKEN | PER_GIVEN_TOKEN
    for name, lengths_name in per_token.items():
        keys = _token_keys(samples, getattr(rollouts, lengths_name))
        columns.append((name, keys, getattr(rollouts, name)))
    if rollouts.routed_experts is not None:
        keys = _token_keys(samples, rollouts.input_lengths)
        columns.append((EXPERTS, keys, _hash_of_experts(rollouts.routed_experts)))
    return columns


def _token_keys(samples: Tensor, lengths: Tensor) -> Tensor:
    """Keys of the tokens of samples with these keys and lengths."""
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return torch.repeat_interleave(samples, lengths) + torch.arange(int(lengths.sum())) - starts


def _hash_of_experts(experts: Tensor) -> Tensor:
    """[tokens] int64: one hash of all experts of a token; eight bytes for each of them would be too much."""
    columns = experts.flatten(1).T
    factors = mix_tensor(torch.arange(1, len(columns) + 1)) | 1
    total = torch.zeros(experts.shape[0], dtype=torch.int64)
    for factor, column in zip(factors, columns, strict=True):
        total += mix_tensor(column.long() + 1) * factor
    return total


def in_hex(value: int) -> str:
    """16 hexadecimal digits."""
    return f"{value & MASK:016x}"

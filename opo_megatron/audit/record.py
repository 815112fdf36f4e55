"""What a step was, in a row that another machine can check: `audit.jsonl`.

Each OPO step has a digest of its rollouts, column by column, and of the weights that it made, tensor by
tensor with its norm, and a chain: a hash of both and of the chain before it, so that one number says
whether two runs were the same up to here.  Digests are sums over elements and do not depend on how these
are spread over ranks (`audit/digest.py`); log-probabilities of the engine, which another layout rounds
otherwise, are left out.  Warm-start steps have none: step 0 has the weights that they made.
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
"""Name of the last chain in the run's state."""
PER_SAMPLE = ("prompt_ids", "response_lengths", "finish_reasons", "rewards")
PER_TOKEN = {"prompt_tokens": "prompt_lengths", "response_tokens": "response_lengths"}


def audit_row(
    policy: Policy, config: Config, state: dict[str, Any], step: int, rollouts: Rollouts | None
) -> MetricsRow:
    """The row of a step, of which `state` gets the chain; a collective of all ranks.

    Args:
        rollouts: this rank's part; None for a step without any.
    """
    weights = digest_weights(policy.chunks, policy.param_mapping, policy.parallel)
    columns = digest_rollouts(policy.parallel, rollouts)
    of_weights, of_rollouts = (
        sum(values) & MASK for values in ((one.sum for one in weights.values()), columns.values())
    )
    chain = hash_of((int(state.get(CHAIN, "0"), 16), of_weights, of_rollouts))
    state[CHAIN] = in_hex(chain)
    return {
        "step": step,
        "chain": in_hex(chain),
        "weights": in_hex(of_weights),
        "rollouts": in_hex(of_rollouts),
        "layout": layout_of(config, policy.parallel),
        "columns": {name: in_hex(value) for name, value in columns.items()},
        "tensors": {name: [in_hex(one.sum), one.norm] for name, one in weights.items()},
    }


def layout_of(config: Config, parallel: Parallel) -> str:
    """All that decides how sums are rounded."""
    policy = config.policy
    return (
        f"{parallel.world_size} ranks, tensor {policy.tensor_model_parallel_size}, pipeline "
        f"{policy.pipeline_model_parallel_size}×{policy.virtual_pipeline_model_parallel_size or 1}, "
        f"{f'context {policy.context_parallel_size}, ' if policy.context_parallel_size > 1 else ''}expert "
        f"{policy.expert_model_parallel_size}×{policy.expert_tensor_parallel_size}, sequence parallel "
        f"{policy.sequence_parallel}, {policy.max_tokens_per_micro_batch} tokens"
        f"{' packed' if policy.packing is Packing.thd else ''}, head "
        f"{policy.head_chunk_tokens}, {config.rollout.local.slots} slots, {parallel.device.type}"
    )


def digest_rollouts(parallel: Parallel, rollouts: Rollouts | None) -> dict[str, int]:
    """Signed 64 bits for each column, over all ranks; a collective."""
    mine = dict.fromkeys((*PER_SAMPLE, *PER_TOKEN), 0) if rollouts is None else sums_of(rollouts)
    sums = all_reduce(parallel, torch.tensor(list(mine.values()), dtype=torch.int64))
    return dict(zip(mine, sums.tolist(), strict=True))


def sums_of(rollouts: Rollouts) -> dict[str, int]:
    """Signed 64 bits for each column of these samples."""
    return {name: digest_rows(name, keys, values) for name, keys, values in _columns(rollouts)}


def _columns(rollouts: Rollouts) -> list[tuple[str, Tensor, Tensor]]:
    """(name, which element it is wherever its sample lies, value)."""
    samples = mix_tensor(rollouts.groups * (1 << 32) + rollouts.sample_indices)
    columns = [(name, samples, getattr(rollouts, name)) for name in PER_SAMPLE]
    for name, lengths_name in PER_TOKEN.items():
        lengths = getattr(rollouts, lengths_name)
        starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        place = torch.arange(int(lengths.sum())) - starts
        columns.append((name, torch.repeat_interleave(samples, lengths) + place, getattr(rollouts, name)))
    return columns


def in_hex(value: int) -> str:
    """16 digits."""
    return f"{value & MASK:016x}"

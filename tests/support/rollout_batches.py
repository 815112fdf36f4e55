"""Random rollouts with all columns, their comparison, and one rank without process groups."""

from __future__ import annotations

from dataclasses import fields

import torch

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.distributed.process_groups import Parallel


def random_rollouts(count: int, seed: int = 0, optional: bool = True) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, n: int) -> torch.Tensor:
        return torch.randint(low, high, (n,), generator=generator)

    prompt_lengths, response_lengths = integers(1, 7, count), integers(0, 9, count)
    tokens = int(response_lengths.sum())
    inputs = int((prompt_lengths + response_lengths - 1).sum())
    optional_columns = {
        "weight_versions": integers(0, 5, tokens),
        "engine_log_prob": -torch.rand(tokens, generator=generator),
        "rewards": torch.rand(count, generator=generator, dtype=torch.float64),
        "advantages": torch.randn(count, generator=generator, dtype=torch.float64),
        "routed_experts": integers(0, 256, inputs * 3 * 2).to(torch.uint8).view(inputs, 3, 2),
    }
    return Rollouts(
        prompt_ids=integers(0, 10**12, count),
        groups=torch.arange(count) // 4,
        sample_indices=torch.arange(count) % 4,
        prompt_lengths=prompt_lengths,
        prompt_tokens=integers(0, 100, int(prompt_lengths.sum())),
        response_lengths=response_lengths,
        response_tokens=integers(0, 100, tokens),
        finish_reasons=integers(0, 2, count),
        **(optional_columns if optional else {}),
    )


def assert_same(got: Rollouts, expected: Rollouts) -> None:
    for field in fields(expected):
        left, right = getattr(got, field.name), getattr(expected, field.name)
        if isinstance(right, torch.Tensor):
            assert left.dtype == right.dtype and torch.equal(left, right), field.name
        else:
            assert left == right, field.name


def alone() -> Parallel:
    """One rank without process groups."""
    ones = {f.name: 1 if f.name.endswith("size") else 0 for f in fields(Parallel) if f.type == "int"}
    groups = {f.name: None for f in fields(Parallel) if f.name.endswith("group")}
    return Parallel(device=torch.device("cpu"), **ones, **groups)

"""Benchmarks advantages against a Python loop over groups, the usual implementation → records/advantage.json

    python tools/bench_advantage.py             # 4,096 samples in 256 groups, at most 1,024 tokens each

Two comparisons with equal results, on one thread, interleaved, the minimum of 9 rounds.  Like for like:
rewards and mask [B, T] in, advantages [B, T] out.  At sample level: rewards, lengths and groups [B] in,
advantages [B] out, as this package uses them (the head expands them to packed tokens).
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from bench.record import write_record
from torch import Tensor

from opo_megatron.algorithm.advantages import compute_advantages
from opo_megatron.algorithm.config import AlgorithmConfig, Baseline
from opo_megatron.algorithm.presets import PRESETS
from opo_megatron.utils.terminal import prepare_terminal

GROUPS, SAMPLES_PER_GROUP, LONGEST, ROUNDS = 256, 16, 1024, 9


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    count = GROUPS * SAMPLES_PER_GROUP
    lengths = torch.randint(1, LONGEST + 1, (count,), generator=generator)
    rewards = (torch.rand(count, generator=generator) < 0.5).float()
    groups = torch.arange(GROUPS).repeat_interleave(SAMPLES_PER_GROUP)
    mask = (torch.arange(LONGEST) < lengths.unsqueeze(1)).float()
    token_rewards = torch.zeros(count, LONGEST)
    token_rewards[torch.arange(count), lengths - 1] = rewards  # at the last token of the response
    config = AlgorithmConfig(Baseline.opo, **PRESETS[Baseline.opo]._asdict())

    def ours(rewards: Tensor, lengths: Tensor) -> Tensor:
        return compute_advantages(config, rewards, lengths, groups).float()

    results: dict[str, Any] = {
        "samples": count,
        "groups": GROUPS,
        "longest": LONGEST,
        "like for like, [B, T]": compare(
            lambda: ours(token_rewards.sum(1), mask.sum(1)).unsqueeze(1) * mask,
            lambda: by_loop(token_rewards.sum(1), mask.sum(1), groups).unsqueeze(1) * mask,
        ),
        "sample level, [B]": compare(
            lambda: ours(rewards, lengths), lambda: by_loop(rewards, lengths.float(), groups)
        ),
    }
    print(json.dumps(results, indent=2))
    if not options.no_record:
        print(f"written to {write_record('advantage', results)}")
    return 0


def by_loop(rewards: Tensor, lengths: Tensor, groups: Tensor) -> Tensor:
    """A = r − b with b = Σ l·r / Σ l of each group, by a dictionary of groups and loops over samples."""
    members: dict[int, list[int]] = {}
    for i in range(len(rewards)):
        members.setdefault(int(groups[i]), []).append(i)
    baselines = {
        group: (lengths[indices] * rewards[indices]).sum() / lengths[indices].sum()
        for group, indices in members.items()
    }
    advantages = rewards.clone()
    for i in range(len(rewards)):
        advantages[i] = rewards[i] - baselines[int(groups[i])]
    return advantages


def compare(ours: Callable[[], Tensor], loop: Callable[[], Tensor]) -> dict[str, float]:
    """Seconds of both, and their ratio."""
    torch.testing.assert_close(ours(), loop(), rtol=1e-5, atol=1e-5)
    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS):
        for i, work in enumerate((ours, loop)):
            started = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - started)
    return {"seconds, ours": best[0], "seconds, loop": best[1], "loop / ours": best[1] / best[0]}


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())

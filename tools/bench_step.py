"""Benchmarks OPO's training step against GRPO's, and skipped zero-advantage samples → records/step.json

    python tools/bench_step.py                  # one thread, about five minutes
    python tools/bench_step.py --no-record --rounds 2
    python tools/bench_step.py --against HEAD~20 --rounds 40   # only OPO's step → records/step_against.json

Same model, same samples, same Megatron, one process; rollouts and weight sync, equal for all, are left out.
`usual GRPO` runs a pass for old log-probabilities, one for reference log-probabilities, and one clipped
update with a KL term; `GRPO, one update, no KL` omits the second; `the same, old log-probabilities free` also
the first, as implementations do that get them from the update itself.  Interleaved, the minimum of each.
Then OPO with increasing shares of zero-advantage samples, which run forward-only; one share is measured on
the quickstart where its reward is about 0.9.  Exit code 1 where a limit is not met.

`--against COMMIT` times advantages and update of a plain OPO step in the working tree and in a commit,
interleaved (`bench/against.py`).
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from bench.against import NEW, OLD, compare, serve
from bench.record import write_record
from compare_commits import checkout

from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config import Config, load_config
from opo_megatron.distributed.process_groups import initialize, shutdown
from opo_megatron.kernels.advantages import compute_advantages
from opo_megatron.policy.policy import Policy
from opo_megatron.utils.terminal import prepare_terminal
from opo_megatron.weights.random_init import random_weights

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "quickstart.yaml"
MODEL = {"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 704, "max_sequence_length": 512}
VOCABULARY, SAMPLES, PROMPT, LONGEST = 8192, 32, 32, 160
SHARES = (0.0, 0.25, 0.5, 0.75)
LIMITS = {"OPO / usual GRPO": 0.65, "OPO / GRPO, one update, no KL": 1.0}
QUICKSTART_STEPS = 100
NEAR = (0.87, 0.93)
"""Mean rewards that count as about 0.9."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each arm (default: 5)")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--against", metavar="COMMIT", help="compare OPO's step with that of a commit")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work()
    if options.against is not None:
        return against(options.against, options.rounds, not options.no_record)
    zero_share = zero_advantage_share()
    print(f"quickstart at a reward of 0.9: {zero_share:.0%} of the samples have advantage 0", flush=True)
    seconds = time_arms(options.rounds, (*SHARES, zero_share))
    opo = seconds["OPO"]
    results: dict[str, Any] = {
        "model": MODEL | {"vocabulary": VOCABULARY},
        "samples": SAMPLES,
        "seconds": seconds,
        **{f"OPO / {name}": opo / seconds[name] for name in seconds if "GRPO" in name},
        "share without signal at a reward of 0.9": zero_share,
        "with skipping at a reward of 0.9 / usual GRPO": seconds[skipping(zero_share)]
        / seconds["usual GRPO"],
        "time by share skipped, of OPO's without": {
            f"{share:.2f}": seconds[skipping(share)] / opo for share in (*SHARES[1:], zero_share)
        },
    }
    print(json.dumps(results, indent=2))
    if not options.no_record:
        print(f"written to {write_record('step', results)}")
    missed = [f"{name} is {results[name]:.3f}, at most {limit}" for name, limit in LIMITS.items()
              if results[name] > limit]  # fmt: skip
    for line in missed:
        print(f"NOT MET: {line}")
    return 1 if missed else 0


def against(commit: str, rounds: int, records: bool) -> int:
    """Compare the working tree's step with that of a commit; exit code 1 where it takes another time."""
    with checkout(commit) as old:
        results = {
            "against": commit,
            "rounds": rounds,
            **compare(Path(__file__), {NEW: ROOT, OLD: old}, rounds),
        }
    print(json.dumps(results, indent=2))
    if records:
        print(f"written to {write_record('step_against', results)}")
    return 0 if results["unchanged"] else 1


def work() -> int:
    """A worker of `against`: seconds of a step, whenever it is asked for."""
    config = step_config()
    parallel = initialize(config)
    weights = random_weights(config.policy.model, VOCABULARY, config.run.seed)
    policy = Policy(config, VOCABULARY, parallel, config.optimizer, weights)
    rollouts = samples()
    groups = torch.arange(SAMPLES) // 8
    rewards = (torch.arange(SAMPLES) % 2).double()

    def step() -> float:
        started = time.perf_counter()
        rollouts.advantages = compute_advantages(
            config.algorithm, rewards, rollouts.response_lengths, groups, parallel.device
        )
        schedule = policy.schedule(rollouts.sequence_lengths, rollouts.advantages == 0)
        batch = rollouts.select(schedule.samples_of(0))
        policy.train_step(batch, schedule, PolicyGradient(1000.0, 1.0), 1e-5)
        return time.perf_counter() - started

    serve(step)
    shutdown()
    return 0


def step_config() -> Config:
    overrides = [f"policy.model.{key}={value}" for key, value in MODEL.items()]
    return load_config(RECIPE, ["run.dir=unused", "policy.device=cpu", *overrides])


def zero_advantage_share() -> float:
    """Share of zero-advantage samples in a quickstart, over its steps with a mean reward of about 0.9."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "opo_megatron", "train", str(RECIPE), f"run.dir={folder}/run"]
        command += [f"train.steps={QUICKSTART_STEPS}", "eval.every_steps=0", "eval.problems=16"]
        print("quickstart …", flush=True)
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][1:]
    near = [row["groups/without_signal"] for row in rows if NEAR[0] <= row["reward/mean"] <= NEAR[1]]
    return round(fmean(near), 2)


def skipping(share: float) -> str:
    """Name of the arm with this share of zero-advantage samples."""
    return f"OPO, {share:.0%} without signal" if share else "OPO"


def time_arms(rounds: int, shares: tuple[float, ...]) -> dict[str, float]:
    """Minimum seconds of every arm's step."""
    config = step_config()
    parallel = initialize(config)
    weights = random_weights(config.policy.model, VOCABULARY, config.run.seed)
    policy = Policy(config, VOCABULARY, parallel, config.optimizer, weights)
    arms = grpo_arms(policy, policy.shards_of(weights)) | {
        skipping(share): opo_arm(policy, share) for share in shares
    }
    minimum = dict.fromkeys(arms, float("inf"))
    for number in range(rounds):
        for name, step in arms.items():
            started = time.perf_counter()
            step()
            minimum[name] = min(minimum[name], time.perf_counter() - started)
            print(f"round {number + 1}  {name}: {minimum[name]:.2f} s", flush=True)
    shutdown()
    return minimum


def opo_arm(policy: Policy, share: float) -> Callable[[], object]:
    """OPO's one update, where `share` of the samples have advantage 0."""
    rollouts = samples()
    assert rollouts.advantages is not None
    rollouts.advantages[: round(share * SAMPLES)] = 0
    zero_advantage = rollouts.advantages == 0

    def step() -> None:
        schedule = policy.schedule(rollouts.sequence_lengths, zero_advantage)
        policy.train_step(
            rollouts.select(schedule.samples_of(0)), schedule, PolicyGradient(1000.0, 1.0), 1e-5
        )

    return step


def grpo_arms(policy: Policy, reference: Any) -> dict[str, Callable[[], object]]:
    """The clipped update, with the forward passes that it needs."""
    rollouts = samples()
    schedule = policy.schedule(rollouts.sequence_lengths)
    rollouts = rollouts.select(schedule.samples_of(0))
    rollouts.old_log_prob = policy.log_probs(rollouts, schedule, 1.0)

    from opo_megatron.algorithm.objectives.clipped import Clipped  # a commit of `--against` may have none

    def update(kl_coefficient: float) -> None:
        policy.train_step(rollouts, schedule, Clipped(1000.0, 1.0, 0.2, 0.2, kl_coefficient), 1e-5)

    def one_update() -> None:
        rollouts.old_log_prob = policy.log_probs(rollouts, schedule, 1.0)
        update(0.0)

    def usual() -> None:
        rollouts.old_log_prob = policy.log_probs(rollouts, schedule, 1.0)
        with policy.swap_weights(reference):
            rollouts.reference_log_prob = policy.log_probs(rollouts, schedule, 1.0)
        update(0.1)

    return {
        "usual GRPO": usual,
        "GRPO, one update, no KL": one_update,
        "GRPO, the same, old log-probabilities free": lambda: update(0.0),
    }


def samples() -> Rollouts:
    """Random tokens and lengths; every second sample is rewarded, so that no advantage is 0."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(LONGEST // 2, LONGEST + 1, (SAMPLES,), generator=generator).tolist()
    tokens = [torch.randint(VOCABULARY, (PROMPT + n,), generator=generator).tolist() for n in lengths]
    rollouts = Rollouts.from_demonstrations([t[:PROMPT] for t in tokens], [t[PROMPT:] for t in tokens])
    rollouts.is_demonstration = False
    rollouts.advantages = torch.where(torch.arange(SAMPLES) % 2 == 0, 0.5, -0.5).double()
    return rollouts


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())

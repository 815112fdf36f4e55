"""Checks that the parallel layout does not change a training step.

    python tools/check_layouts.py                  # all layouts, on this machine's CPU, about three minutes
    python tools/check_layouts.py tp2 dp2          # some of them
    python tools/check_layouts.py --device cuda    # on one GPU, in bf16 and FP8, by Transformer Engine

The same weights take 3 optimizer steps on the same rollouts under every layout; loss and gradient norm are
compared with one process, which always pads its micro-batches, even where a layout packs them.  Exit code 1
where one differs by more than `TOLERANCES`.  The cases `moe-replay-…` replay an engine's experts and are
compared with a decoder that has the same ones (`bench/replay_layouts.py`); `overlap-…` add up the gradients
of a batch's parts in random order, and are compared with the same layout without.

On a GPU all ranks share the first card, which NCCL refuses; they communicate through host memory
(`bench/staged_gloo.py`).  `--process-group staged` does the same on a CPU, with gloo's numbers bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from opo_megatron.utils.terminal import prepare_terminal

if TYPE_CHECKING:
    from opo_megatron.batch.rollouts import Rollouts
    from opo_megatron.config import Config
    from opo_megatron.distributed.process_groups import Parallel
    from opo_megatron.policy.policy import Policy

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
STEPS = 3
VOCAB_SIZE = 17

TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (2e-2, 2e-2), "fp8": (5e-2, 5e-2)}
"""Largest |Δ loss| and |Δ grad norm| / grad norm.

FP8 quantizes a layer's inputs in blocks of one token, the same under every layout, so layouts differ where
bf16 differs: a perturbation δ of 2⁻⁸ then rounds to another E4M3 value with probability δ/s, s = 2⁻³ being
its spacing.  Its root mean square grows from δ to √(δ s), by a factor of √32 ≈ 6; of layouts that differ by
up to 8e-3 in bf16, 5e-2 are expected.  Weight gradients have blocks of 128 tokens, which layouts group
differently: errors of about 2⁻⁵ of an element, which average out in the norm.
"""
OVERLAP_TOLERANCES = {"fp32": (5e-7, 1e-6), "bf16": (2e-3, 2e-3), "fp8": (2e-2, 2e-2)}
"""Of a batch in parts, against the same layout with the whole batch."""
REPLAY_TOLERANCES = {"fp32": (2e-5, 1e-6, 5e-6), "bf16": (1e-1, 2e-2, 2e-2)}
"""With replayed experts: |Δ log π| to the decoder, and |Δ grad norm| / grad norm of padded and of packed
micro-batches."""
PRECISIONS = {
    "fp32": ("policy.dtype=fp32",),
    "bf16": ("policy.dtype=bf16",),
    # Nothing is generated, but a recipe whose engine is not in FP8 has to correct them.
    "fp8": ("policy.dtype=bf16", "policy.fp8=blockwise", "on_policy.action=correct"),
}
ON_CPU, ON_GPU = ("fp32", "bf16"), ("bf16", "fp8")
"""Transformer Engine's attention has no fp32 for packed sequences, and no CPU has its FP8."""

SMALL = (
    "policy.model.num_layers=4",
    "policy.model.hidden_size=64",
    "policy.model.ffn_hidden_size=176",
    "policy.model.num_query_groups=2",
    "policy.model.qk_layernorm=true",
    "policy.max_tokens_per_micro_batch=256",
    "policy.head_chunk_tokens=32",
)
WHOLE_BLOCKS = (
    "policy.model.hidden_size=256",
    "policy.model.ffn_hidden_size=512",
    "policy.model.kv_channels=64",
    "policy.max_tokens_per_micro_batch=1024",
)
"""On a GPU in addition to `SMALL`: shards of whole 128×128 blocks, and tokens for the blocks of 4 ranks."""
MOE_BLOCKS = ("policy.model.moe_ffn_hidden_size=256",)
"""The same for experts."""
MOE = ("policy.model.num_moe_experts=4", "policy.model.moe_ffn_hidden_size=96")
TP2, PP2 = "policy.tensor_model_parallel_size=2", "policy.pipeline_model_parallel_size=2"
SP, VPP2 = "policy.sequence_parallel=true", "policy.virtual_pipeline_model_parallel_size=2"
EP2 = "policy.expert_model_parallel_size=2"
ETP1 = "policy.expert_tensor_parallel_size=1"
THD = "policy.packing=thd"
CP2 = "policy.context_parallel_size=2"
PLAIN_OPTIMIZER = "policy.distributed_optimizer=false"
RECOMPUTE = "policy.recompute=full"
RECOMPUTE_MOE = ("policy.megatron.recompute_granularity=selective", "policy.megatron.recompute_modules=[moe]")


Results = dict[str, list[list[float]]]
"""{"layout/untied" or "layout/tied": [[loss, grad norm] per step]}, and the last row of `replayed_steps`."""
TIES = ("untied", "tied")


@dataclass(frozen=True)
class ParallelLayout:
    ranks: int
    overrides: tuple[str, ...] = ()
    moe: bool = False
    replay: bool = False
    """Whether the experts are an engine's."""
    base: str | None = None
    """The layout without `rollout.overlap`, where this one adds up parts of a batch in another order."""


def _replayed(ranks: int, *overrides: str) -> ParallelLayout:
    return ParallelLayout(ranks, overrides, moe=True, replay=True)


LAYOUTS = {
    "tp2": ParallelLayout(2, (TP2,)),
    "tp2+sp": ParallelLayout(2, (TP2, SP)),
    "pp2": ParallelLayout(2, (PP2,)),
    "pp2vpp2": ParallelLayout(2, (PP2, VPP2)),
    "dp2": ParallelLayout(2),
    "dp2-plain-optimizer": ParallelLayout(2, (PLAIN_OPTIMIZER,)),
    "tp2pp2": ParallelLayout(4, (TP2, PP2)),
    "tp2pp2+sp": ParallelLayout(4, (TP2, PP2, SP)),
    "tp2dp2": ParallelLayout(4, (TP2,)),
    "moe-dp2": ParallelLayout(2, moe=True),
    "moe-ep2": ParallelLayout(2, (EP2,), moe=True),
    "moe-tp2sp": ParallelLayout(2, (TP2, SP), moe=True),
    "moe-tp2sp-ep2": ParallelLayout(2, (TP2, SP, EP2, ETP1), moe=True),
    "moe-tp2sp-dp2": ParallelLayout(4, (TP2, SP), moe=True),
    "packed-tp2+sp": ParallelLayout(2, (THD, TP2, SP)),
    "packed-pp2vpp2": ParallelLayout(2, (THD, PP2, VPP2)),
    "packed-dp2": ParallelLayout(2, (THD,)),
    "packed-tp2pp2vpp2+sp": ParallelLayout(4, (THD, TP2, PP2, VPP2, SP)),
    "packed-tp2dp2": ParallelLayout(4, (THD, TP2)),
    "cp2": ParallelLayout(2, (THD, CP2)),
    "cp2-plain-optimizer": ParallelLayout(2, (THD, CP2, PLAIN_OPTIMIZER)),
    "cp4": ParallelLayout(4, (THD, "policy.context_parallel_size=4")),
    "cp2dp2": ParallelLayout(4, (THD, CP2)),
    "tp2cp2+sp": ParallelLayout(4, (THD, TP2, CP2, SP)),
    "cp2pp2vpp2": ParallelLayout(4, (THD, CP2, PP2, VPP2)),
    "packed-moe-tp2sp-ep2": ParallelLayout(2, (THD, TP2, SP, EP2, ETP1), moe=True),
    "moe-cp2": ParallelLayout(2, (THD, CP2), moe=True),
    "moe-cp2-ep2": ParallelLayout(2, (THD, CP2, EP2), moe=True),
    "moe-tp2sp-cp2-ep2": ParallelLayout(4, (THD, TP2, SP, CP2, EP2, ETP1), moe=True),
    "moe-cp2pp2vpp2": ParallelLayout(4, (THD, CP2, PP2, VPP2), moe=True),
    "moe-replay-recompute": _replayed(1, RECOMPUTE),
    "moe-replay-recompute-moe": _replayed(1, *RECOMPUTE_MOE),
    "moe-replay-packed": _replayed(1, THD),
    "moe-replay-dp2": _replayed(2),
    "moe-replay-ep2": _replayed(2, EP2),
    "moe-replay-ep2-recompute": _replayed(2, EP2, RECOMPUTE),
    "moe-replay-tp2sp": _replayed(2, TP2, SP),
    "moe-replay-tp2sp-recompute": _replayed(2, TP2, SP, RECOMPUTE),
    "moe-replay-tp2sp-ep2": _replayed(2, TP2, SP, EP2, ETP1),
    "moe-replay-tp2sp-ep2-recompute": _replayed(2, TP2, SP, EP2, ETP1, RECOMPUTE),
    "moe-replay-pp2": _replayed(2, PP2),
    "moe-replay-pp2-recompute": _replayed(2, PP2, RECOMPUTE),
    "moe-replay-pp2vpp2": _replayed(2, PP2, VPP2),
    "moe-replay-pp2vpp2-recompute": _replayed(2, PP2, VPP2, RECOMPUTE),
    "moe-replay-packed-ep2-recompute": _replayed(2, THD, EP2, RECOMPUTE),
    "moe-replay-packed-tp2sp-ep2": _replayed(2, THD, TP2, SP, EP2, ETP1),
    "moe-replay-packed-pp2vpp2-recompute": _replayed(2, THD, PP2, VPP2, RECOMPUTE),
    "moe-replay-cp2": _replayed(2, THD, CP2),
    "moe-replay-cp2-recompute": _replayed(2, THD, CP2, RECOMPUTE),
    "moe-replay-cp2-ep2": _replayed(2, THD, CP2, EP2),
    "moe-replay-tp2sp-cp2-ep2-recompute": _replayed(4, THD, TP2, SP, CP2, EP2, ETP1, RECOMPUTE),
    "moe-replay-pp2vpp2-ep2-recompute": _replayed(4, PP2, VPP2, EP2, RECOMPUTE),
    "unfused-gradients": ParallelLayout(1, ("policy.megatron.gradient_accumulation_fusion=false",)),
}
OVERLAPPED = (
    "tp2", "tp2+sp", "pp2", "pp2vpp2", "dp2", "tp2pp2", "packed-dp2", "packed-tp2+sp", "packed-pp2vpp2",
    "cp2", "moe-ep2", "packed-moe-tp2sp-ep2",
)  # fmt: skip
LAYOUTS |= {f"overlap-{name}": replace(LAYOUTS[name], base=name) for name in OVERLAPPED}
NO_REPLAY = "moe replay, left out"
REFERENCES = {
    "one process": ParallelLayout(1),
    "moe, one process": ParallelLayout(1, moe=True),
    "moe replay, one process": _replayed(1),
    NO_REPLAY: _replayed(1),
}
"""What layouts are compared with; and the control, whose routers choose for themselves and must differ."""


@dataclass(frozen=True)
class Machine:
    """Where and how a set of cases runs."""

    device: str = "cpu"
    precision: str = "fp32"
    staged: bool = False
    """Whether ranks communicate by `bench/staged_gloo.py` instead of gloo."""
    ties: tuple[str, ...] = TIES

    @property
    def options(self) -> list[str]:
        """The command line that runs it."""
        group = "staged" if self.staged else "gloo"
        options = ["--device", self.device, "--precision", self.precision, "--process-group", group]
        return [*options, *(f"--embeddings={ties}" for ties in self.ties)]

    @property
    def overrides(self) -> tuple[str, ...]:
        sizes = (*SMALL, *WHOLE_BLOCKS) if self.device == "cuda" else SMALL
        return (*sizes, f"policy.device={self.device}", *PRECISIONS[self.precision])

    def runs(self, name: str) -> bool:
        """Whether a layout is possible: the decoder that replays experts has no FP8."""
        return not ((LAYOUTS | REFERENCES)[name].replay and self.precision == "fp8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("layouts", nargs="*", help=f"any of: {', '.join(LAYOUTS)} (default: all)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--precision",
        choices=list(PRECISIONS),
        action="append",
        help="repeatable; default: fp32 on a CPU, bf16 and fp8 on a GPU",
    )
    parser.add_argument(
        "--process-group",
        choices=["gloo", "staged"],
        help="default: gloo on a CPU; ranks that share a GPU are always staged",
    )
    parser.add_argument("--embeddings", choices=TIES, action="append", help="repeatable; default: both")
    parser.add_argument("--ranks-write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.layouts if name not in LAYOUTS | REFERENCES]
    if unknown:
        parser.error(f"unknown layout {unknown[0]!r}; choose from {', '.join(LAYOUTS)}")
    machines = machines_of(parser, arguments)
    if arguments.ranks_write:
        run_cases(arguments.layouts, arguments.ranks_write, machines[0])
        return 0
    return max(compare(arguments.layouts or list(LAYOUTS), machine) for machine in machines)


def machines_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[Machine]:
    """One per precision; ends with a message where the options contradict each other or the machine."""
    on_gpu = arguments.device == "cuda"
    possible = ON_GPU if on_gpu else ON_CPU
    chosen = arguments.precision or (ON_GPU if on_gpu else ["fp32"])
    for precision in chosen:
        if precision not in possible:
            parser.error(
                f"--precision {precision} does not run with --device {arguments.device}; choose from "
                f"{', '.join(possible)}"
            )
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda, but torch sees no GPU; run this on a machine with one")
        if arguments.process_group == "gloo":
            parser.error("--process-group gloo does not run with --device cuda; leave it out")
    staged = on_gpu or arguments.process_group == "staged"
    ties = tuple(arguments.embeddings or TIES)
    return [Machine(arguments.device, precision, staged, ties) for precision in chosen]


def compare(names: list[str], machine: Machine | None = None) -> int:
    """Run the cases and print the table; 1 where one differs from a single process."""
    machine = machine or Machine()
    skipped = [name for name in names if not machine.runs(name)]
    if skipped:
        print(f"not run in {machine.precision}: {', '.join(skipped)} (its reference has no FP8)")
    names = [name for name in names if machine.runs(name)]
    results = measure(names, machine)
    return print_table(names, results, machine)


def measure(names: list[str], machine: Machine) -> Results:
    """Results of the layouts and of their references, by one group of ranks per world size."""
    from opo_megatron.distributed.launch import run_ranks

    cases = {name: LAYOUTS[name] for name in names}
    cases |= {case.base: LAYOUTS[case.base] for case in cases.values() if case.base is not None}
    kinds = {(case.moe, case.replay) for case in cases.values()}
    cases |= {name: case for name, case in REFERENCES.items() if (case.moe, case.replay) in kinds}
    results: Results = {}
    for ranks in sorted({case.ranks for case in cases.values()}):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "results.json"
            group = [name for name, case in cases.items() if case.ranks == ranks]
            print(f"{ranks} rank(s): {', '.join(group)}", flush=True)
            command = [sys.executable, __file__, *group, *machine.options, "--ranks-write", str(output)]
            if ranks == 1:
                run_cases(group, output, machine)
            elif code := run_ranks(command, ranks):
                sys.exit(code)
            results |= json.loads(output.read_text())
    return results


def differences(name: str, ties: str, results: Results) -> tuple[float, float]:
    """Largest |Δ loss|, or with replayed experts |Δ log π|, and |Δ grad norm| / grad norm of a layout."""
    case = (LAYOUTS | REFERENCES)[name]
    reference = (
        case.base or f"moe{', ' if not case.replay else ' replay, '}one process"
        if case.moe
        else "one process"
    )
    pairs = list(zip(results[f"{name}/{ties}"], results[f"{reference}/{ties}"], strict=True))
    first = largest(a[2] if case.replay else abs(a[0] - b[0]) for a, b in pairs)
    return first, largest(abs(a[1] - b[1]) / b[1] for a, b in pairs)


def tolerances(name: str, precision: str) -> tuple[float, float]:
    """The most that `differences` may be."""
    case = (LAYOUTS | REFERENCES)[name]
    if not case.replay:
        return TOLERANCES[precision] if case.base is None else OVERLAP_TOLERANCES[precision]
    log_prob, padded, packed = REPLAY_TOLERANCES[precision]
    return log_prob, packed if THD in case.overrides else padded


def largest(values: Iterable[float]) -> float:
    """The maximum, which is NaN where one value is."""
    return max(values, key=lambda value: (math.isnan(value), value))


def print_table(names: list[str], results: Results, machine: Machine) -> int:
    where = f"{machine.precision} on {machine.device}{', staged' * machine.staged}"
    table = Table(title=f"{STEPS} optimizer steps against one process, {where}")
    for heading in ("layout", "embeddings", "max |Δ loss| or |Δ log π|", "max |Δ grad norm| / grad norm", ""):
        table.add_column(heading)
    failures = 0
    with_replay = [name for name, case in REFERENCES.items() if case.replay]
    for name in [*names, *(name for name in with_replay if f"{name}/{machine.ties[0]}" in results)]:
        most, most_norm = tolerances(name, machine.precision)
        for ties in machine.ties:
            first, norm = differences(name, ties, results)
            is_equal = first <= most and norm <= most_norm
            is_right = is_equal != (name == NO_REPLAY)
            failures += not is_right
            words = ("the same without replay" if is_equal else "DIFFERS") if not is_right else "ok"
            table.add_row(name, ties, f"{first:.1e}", f"{norm:.1e}", words)
    Console().print(table)
    return 1 if failures else 0


def run_cases(names: list[str], output: Path, machine: Machine) -> None:
    """In one rank: every case; rank 0 writes {case: [[loss, grad norm] per step]}."""
    from opo_megatron.distributed.process_groups import destroy_model_parallel, initialize, shutdown

    if machine.staged:
        join_staged()
    results: Results = {}
    for name in names:
        for ties in machine.ties:
            config = case_config(name, ties, machine)
            parallel = initialize(config)
            case = (LAYOUTS | REFERENCES)[name]
            take = replay_steps if case.replay else take_overlapped_steps if case.base else take_steps
            results[f"{name}/{ties}"] = take(config, parallel, name)
            destroy_model_parallel()
    if parallel.rank == 0:
        output.write_text(json.dumps(results))
    shutdown()


def case_config(name: str, ties: str, machine: Machine) -> Config:
    """The recipe of a case."""
    from opo_megatron.config import load_config

    case = (LAYOUTS | REFERENCES)[name]
    overrides = [*machine.overrides, *case.overrides, *(MOE if case.moe else ())]
    overrides += MOE_BLOCKS if case.moe and machine.device == "cuda" else ()
    overrides += ["run.dir=unused", f"policy.model.tie_embeddings={str(ties == 'tied').lower()}"]
    return load_config(RECIPE, overrides, case.ranks)


def join_staged() -> None:
    """Join the default process group, so that `initialize` keeps it, on the first GPU for every rank."""
    import torch.distributed as dist
    from bench.staged_gloo import BACKEND, register

    register()
    if "RANK" in os.environ:
        dist.init_process_group(BACKEND)
    else:
        dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    os.environ["LOCAL_RANK"] = "0"


def replay_steps(config: Config, parallel: Parallel, name: str) -> list[list[float]]:
    """[loss, grad norm, |Δ log π|] of each step with an engine's experts."""
    from bench.replay_layouts import replayed_steps

    batches = [fixed_rollouts(step) for step in range(STEPS)]
    return replayed_steps(config, parallel, VOCAB_SIZE, batches, replays=name != NO_REPLAY)


def random_policy(config: Config, parallel: Parallel) -> Policy:
    """A policy that every layout of a model starts from."""
    from opo_megatron.policy.policy import Policy
    from opo_megatron.weights.random_init import random_weights

    weights = random_weights(config.policy.model, VOCAB_SIZE, config.run.seed)
    return Policy(config, VOCAB_SIZE, parallel, config.optimizer, weights)


def take_steps(config: Config, parallel: Parallel, name: str) -> list[list[float]]:
    """[loss, grad norm] of each step, on the same rollouts for every layout."""
    from opo_megatron.algorithm.objective import PolicyGradient

    policy, results = random_policy(config, parallel), []
    for step in range(STEPS):
        rollouts = fixed_rollouts(step)
        # One process runs every sample backward; with several ranks, zero-advantage samples run forward-only.
        assert rollouts.advantages is not None
        zero_advantage = rollouts.advantages == 0 if parallel.world_size > 1 else None
        schedule = policy.schedule(rollouts.sequence_lengths, zero_advantage)
        own_rollouts = rollouts.select(schedule.samples_of(parallel.dp_rank))
        objective = PolicyGradient(float(rollouts.response_lengths.sum()), temperature=0.8)
        metrics = policy.train_step(own_rollouts, schedule, objective, lr=1e-3)
        results.append([metrics.loss, metrics.grad_norm])
    return results


def take_overlapped_steps(config: Config, parallel: Parallel, name: str) -> list[list[float]]:
    """The steps of `take_steps`, each batch in three parts whose order and samples are random."""
    import torch

    from opo_megatron.algorithm.objective import PolicyGradient

    policy, results = random_policy(config, parallel), []
    for step in range(STEPS):
        rollouts = fixed_rollouts(step)
        sums, lengths = policy.begin_gradients(measures_mismatch=False), []
        for samples in torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(step)).chunk(3):
            part = rollouts.select(samples)
            assert part.advantages is not None
            schedule = policy.schedule(part.sequence_lengths, part.advantages == 0)
            own = part.select(schedule.samples_of(parallel.dp_rank))
            policy.add_gradients(own, schedule, PolicyGradient(1.0, temperature=0.8), sums)
            lengths.append(own.response_lengths)
        normalizer = float(rollouts.response_lengths.sum())
        metrics = policy.finish_streamed_step(sums, normalizer, torch.cat(lengths), lr=1e-3)
        results.append([metrics.loss, metrics.grad_norm])
    return results


def fixed_rollouts(step: int) -> Rollouts:
    """40 ragged samples of random tokens with random advantages, a third of them 0."""
    import torch

    from opo_megatron.batch.rollouts import Rollouts

    rng = random.Random(step)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 12))] for _ in range(40)]
    responses = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))] for _ in range(40)]
    rollouts = Rollouts.from_demonstrations(prompts, responses)
    rollouts.is_demonstration = False
    advantages = [rng.gauss(0, 1) if rng.random() < 0.67 else 0.0 for _ in prompts]
    rollouts.advantages = torch.tensor(advantages, dtype=torch.float64)
    return rollouts


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())

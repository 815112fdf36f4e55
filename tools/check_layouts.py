"""Checks that the parallel layout does not change a training step.

    python tools/check_layouts.py            # all layouts, on this machine's CPU, about three minutes
    python tools/check_layouts.py tp2 dp2    # some of them

The same weights take 3 optimizer steps on the same rollouts under every layout; loss and gradient norm are
compared with one process, which always pads its micro-batches, even where a layout packs them.  Exit code 1
where a loss differs by more than 1e-5, or a gradient norm by more than a relative 1e-4.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from opo_megatron.utils.terminal import prepare_terminal

if TYPE_CHECKING:
    from opo_megatron.batch.rollouts import Rollouts
    from opo_megatron.config import Config
    from opo_megatron.distributed.process_groups import Parallel

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
STEPS = 3
VOCAB_SIZE = 17
LOSS_TOLERANCE = 1e-5
GRAD_NORM_TOLERANCE = 1e-4

SMALL = (
    "policy.model.num_layers=4",
    "policy.model.hidden_size=64",
    "policy.model.ffn_hidden_size=176",
    "policy.model.num_query_groups=2",
    "policy.model.qk_layernorm=true",
    "policy.max_tokens_per_micro_batch=256",
    "policy.head_chunk_tokens=32",
)
MOE = ("policy.model.num_moe_experts=4", "policy.model.moe_ffn_hidden_size=96")
TP2, PP2 = "policy.tensor_model_parallel_size=2", "policy.pipeline_model_parallel_size=2"
SP, VPP2 = "policy.sequence_parallel=true", "policy.virtual_pipeline_model_parallel_size=2"
EP2 = "policy.expert_model_parallel_size=2"
ETP1 = "policy.expert_tensor_parallel_size=1"
THD = "policy.packing=thd"
CP2 = "policy.context_parallel_size=2"
PLAIN_OPTIMIZER = "policy.distributed_optimizer=false"


@dataclass(frozen=True)
class ParallelLayout:
    ranks: int
    overrides: tuple[str, ...] = ()
    moe: bool = False


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
}
REFERENCES = {"one process": ParallelLayout(1), "moe, one process": ParallelLayout(1, moe=True)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("layouts", nargs="*", help=f"any of: {', '.join(LAYOUTS)} (default: all)")
    parser.add_argument("--ranks-write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.layouts if name not in LAYOUTS | REFERENCES]
    if unknown:
        parser.error(f"unknown layout {unknown[0]!r}; choose from {', '.join(LAYOUTS)}")
    if arguments.ranks_write:
        run_cases(arguments.layouts, arguments.ranks_write)
        return 0
    return compare(arguments.layouts or list(LAYOUTS))


def compare(names: list[str]) -> int:
    """Run the cases, one group of ranks per world size, and print the table."""
    from opo_megatron.distributed.launch import run_ranks

    cases = {name: LAYOUTS[name] for name in names}
    cases |= {
        name: case for name, case in REFERENCES.items() if any(case.moe == c.moe for c in cases.values())
    }
    results: dict[str, list[list[float]]] = {}
    for ranks in sorted({case.ranks for case in cases.values()}):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "results.json"
            group = [name for name, case in cases.items() if case.ranks == ranks]
            print(f"{ranks} rank(s): {', '.join(group)}", flush=True)
            if ranks == 1:
                run_cases(group, output)
            elif code := run_ranks([sys.executable, __file__, *group, "--ranks-write", str(output)], ranks):
                return code
            results |= json.loads(output.read_text())
    return print_table(names, results)


def print_table(names: list[str], results: dict[str, list[list[float]]]) -> int:
    table = Table(title=f"{STEPS} optimizer steps against one process, fp32")
    for heading in ("layout", "embeddings", "max |Δ loss|", "max |Δ grad norm| / grad norm", ""):
        table.add_column(heading)
    failures = 0
    for name in names:
        reference_name = "moe, one process" if LAYOUTS[name].moe else "one process"
        for ties in ("untied", "tied"):
            rows, references = results[f"{name}/{ties}"], results[f"{reference_name}/{ties}"]
            pairs = list(zip(rows, references, strict=True))
            loss = max(abs(a[0] - b[0]) for a, b in pairs)
            norm = max(abs(a[1] - b[1]) / b[1] for a, b in pairs)
            is_equal = loss <= LOSS_TOLERANCE and norm <= GRAD_NORM_TOLERANCE
            failures += not is_equal
            table.add_row(name, ties, f"{loss:.1e}", f"{norm:.1e}", "ok" if is_equal else "DIFFERS")
    Console().print(table)
    return 1 if failures else 0


def run_cases(names: list[str], output: Path) -> None:
    """In one rank: every case; rank 0 writes {case: [[loss, grad norm] per step]}."""
    from opo_megatron.config import load_config
    from opo_megatron.distributed.process_groups import destroy_model_parallel, initialize, shutdown

    results: dict[str, list[list[float]]] = {}
    for name in names:
        case = (LAYOUTS | REFERENCES)[name]
        for ties in ("untied", "tied"):
            overrides = [*SMALL, *case.overrides, *(MOE if case.moe else ())]
            overrides += ["run.dir=unused", f"policy.model.tie_embeddings={str(ties == 'tied').lower()}"]
            config = load_config(RECIPE, overrides, case.ranks)
            parallel = initialize(config)
            results[f"{name}/{ties}"] = take_steps(config, parallel)
            destroy_model_parallel()
    if parallel.rank == 0:
        output.write_text(json.dumps(results))
    shutdown()


def take_steps(config: Config, parallel: Parallel) -> list[list[float]]:
    """[loss, grad norm] of each step, on the same rollouts for every layout."""
    from opo_megatron.algorithm.objective import PolicyGradient
    from opo_megatron.policy.policy import Policy
    from opo_megatron.weights.random_init import random_weights

    weights = random_weights(config.policy.model, VOCAB_SIZE, config.run.seed)
    policy = Policy(config, VOCAB_SIZE, parallel, config.optimizer, weights)
    results = []
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

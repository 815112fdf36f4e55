"""The arms of the paper's comparison, scaled down: their commands, and the measures of a finished run.

    DIR/seed_1/warm/           supervised steps only (train.steps=0)
    DIR/seed_1/start/          its weights, as a Hugging Face folder
    DIR/seed_1/ARM/            `opo train` from these weights; eval/ has the `opo eval` of its last weights
    DIR/logs/                  the commands' output

A complete run is not run again; an interrupted one resumes from its newest checkpoint, or starts over.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from opo_megatron.config import Config, load_config
from opo_megatron.config.compare import changed_settings
from opo_megatron.errors import UserError
from opo_megatron.observe.gradient_noise import relative_noise
from opo_megatron.observe.metrics_file import MetricsFile, MetricsRow

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "paper_small"
OPO = (sys.executable, "-m", "opo_megatron")
WEIGHT_FILES = "*.safetensors"

NOISES = ("opo_loo", "energy_loo", "rloo")
"""Leave-one-out estimators of the variance report: baselines weighted by length, by energy, unweighted."""
TAIL = 0.2
"""`training_entropy` is a mean over this last share of the steps."""


@dataclass(frozen=True)
class Arm:
    """A recipe of a folder of recipes, optionally with another learning rate."""

    name: str
    recipe: str
    lr: float | None = None
    cost: float = 1.0
    """Time of a run relative to OPO's; used only to estimate the remaining time."""
    folder: Path = RECIPES

    @property
    def path(self) -> Path:
        return self.folder / f"{self.recipe}.yaml"


ON_POLICY = ("opo", "opo_leave_one_out", "energy", "group_mean", "rloo", "grpo_on_policy")
OFF_POLICY = "grpo_off_policy"
LOWER_RATES = {"grpo_off_policy_lr_1e-4": 1e-4, "grpo_off_policy_lr_3e-5": 3e-5}
"""Further learning rates of off-policy GRPO, which takes four updates per batch; the recipe's 3e-4 is that of
all arms and was not tuned for any of them."""

ARMS = (
    *(Arm(name, OFF_POLICY, lr, cost=2.2) for name, lr in {OFF_POLICY: None, **LOWER_RATES}.items()),
    *(Arm(name, name) for name in ON_POLICY),
)


@dataclass(frozen=True)
class Scale:
    """Size of the comparison."""

    overrides: tuple[str, ...]
    """Of every recipe."""
    seeds: int
    samples: int
    """Responses per held-out problem at the end."""
    problems: int


SCALES = {
    "small": Scale((), seeds=5, samples=16, problems=512),
    "tiny": Scale(
        (
            "warm_start.steps=120", "warm_start.warmup_steps=10", "train.steps=5", "eval.every_steps=2",
            "rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "eval.problems=32",
            "algorithm.variance_every=2",
        ),
        seeds=2, samples=4, problems=64,
    ),
}  # fmt: skip
"""`tiny` only tests that everything works; its numbers mean nothing."""


@dataclass(frozen=True)
class SeedRuns:
    """Folders and commands of one seed's runs."""

    folder: Path
    scale: Scale
    number: int
    base: Path = RECIPES / "opo.yaml"
    """The recipe of the warm start."""

    @property
    def seed_folder(self) -> Path:
        return self.folder / f"seed_{self.number}"

    @property
    def start(self) -> Path:
        return self.seed_folder / "start"

    @property
    def warm(self) -> Path:
        return self.seed_folder / "warm"

    def run(self, arm: Arm) -> Path:
        return self.seed_folder / arm.name

    def evaluation(self, arm: Arm) -> Path:
        return self.run(arm) / "eval" / "end"

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"seed_{self.number}_{name}.log"

    # ------------------------------------------------------------------ commands

    def warm_commands(self) -> list[list[str]]:
        """Commands still to run for the weights that all arms of the seed start from."""
        if (self.start / "config.json").exists():
            return []
        steps = load_config(self.base, self.scale.overrides).warm_start.steps
        export = [sys.executable, str(ROOT / "tools" / "export_megatron_to_hf.py")]
        export += [str(self.warm / "checkpoints" / f"warm_start_{steps:08d}"), str(self.start)]
        settings = [*self.scale.overrides, f"run.seed={self.number}", "train.steps=0", "observe.kl=off"]
        train = [*OPO, "train", str(self.base), f"run.dir={self.warm}", *settings, "resume=auto"]
        return [export] if (self.warm / "summary.json").exists() else [train, export]

    def overrides(self, arm: Arm) -> list[str]:
        rate = [f"optimizer.lr={arm.lr:g}"] if arm.lr is not None else []
        return [
            *self.scale.overrides, *rate, f"run.dir={self.run(arm)}", f"run.seed={self.number}",
            f"policy.init_from={self.start}", "warm_start.steps=0",
        ]  # fmt: skip

    def arm_commands(self, arm: Arm) -> list[list[str]]:
        """Commands still to run for an arm and its evaluation; the initial weights must exist."""
        run, out = self.run(arm), self.evaluation(arm)
        if (out / "eval.json").exists():
            return []
        train = [*OPO, "train", str(arm.path), *self.overrides(arm), "resume=auto"]
        sizes = ["--samples", str(self.scale.samples), "--problems", str(self.scale.problems)]
        evaluate = [*OPO, "eval", str(run), *sizes, "--out", str(out)]
        return [evaluate] if (run / "summary.json").exists() else [train, evaluate]

    def config(self, arm: Arm) -> Config:
        """The arm's resolved recipe; the initial weights must exist."""
        return load_config(arm.path, self.overrides(arm))

    def check_settings(self, arm: Arm) -> None:
        """Raise UserError where the run in the folder has other settings than it would have now."""
        changed = changed_settings(self.config(arm), self.run(arm) / "config.yaml")
        changed = [change for change in changed if change.key != "policy.init_from"]  # DIR may have moved
        if changed:
            raise UserError(
                f"{self.run(arm)} was run with other settings ({changed[0]}); name another --folder"
            )


def rows_of(seed: SeedRuns, arm: Arm) -> list[MetricsRow]:
    """Metrics rows of a finished run, from step 0 on."""
    return MetricsFile(seed.run(arm) / "metrics.jsonl").read()


def read_measures(seed: SeedRuns, arm: Arm) -> dict[str, float | None]:
    """Measures of one finished run.

    pass@k, entropy, self_bleu, rep_4 and length are of the last weights, by `opo eval`; kl is nats per
    held-out token to the initial weights; training_entropy is the mean over the last fifth of the steps;
    noise_* are gradient variances between responses to one prompt, over all reports, relative to the mean
    baseline's, estimated from the same samples and therefore paired.
    """
    result = json.loads((seed.evaluation(arm) / "eval.json").read_text())["tasks"]["held_out"]
    rows = rows_of(seed, arm)
    steps = rows[1:]
    entropies = [row["entropy"] for row in steps[-math.ceil(TAIL * len(steps)) :] if "entropy" in row]
    noise = relative_noise([row for row in steps if "variance/rloo" in row])
    return {
        **{f"pass@{k}": passed["value"] for k, passed in result["pass@k"].items()},
        "entropy": result["entropy"],
        "training_entropy": fmean(entropies) if entropies else None,
        "kl": rows[-1]["eval/kl"],
        "self_bleu": result["self_bleu"],
        "rep_4": result["rep_4"],
        "length": result["length_mean"],
        **{f"noise_{name}": noise.get(name) for name in NOISES},
        "seconds": sum(row["time/step"] for row in steps),
    }


def check_initial_weights(seed: SeedRuns, arm: Arm) -> None:
    """Raise UserError unless a run's initial weights are those of the seed's warm start, byte for byte."""
    folder = seed.run(arm) / "start_weights"
    weights = {path.name: path.read_bytes() for path in folder.glob(WEIGHT_FILES)}
    expected = {path.name: path.read_bytes() for path in seed.start.glob(WEIGHT_FILES)}
    if not weights or weights != expected:
        raise UserError(
            f"{seed.run(arm)} did not start from the weights of {seed.start}; remove the run's folder"
        )


def training_samples(seed: SeedRuns, arm: Arm) -> int:
    """Training samples of a finished run, from its recipe and its number of steps."""
    rollout = seed.config(arm).rollout
    return (len(rows_of(seed, arm)) - 1) * rollout.prompts_per_step * rollout.samples_per_prompt

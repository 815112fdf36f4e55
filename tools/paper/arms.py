"""The arms of the paper's comparison at a small scale: what is run, and what a finished run measured.

    DIR/seed_1/warm/           supervised steps only (train.steps=0)
    DIR/seed_1/start/          its weights, as a Hugging Face folder
    DIR/seed_1/ARM/            `opo train` from there, and in eval/ what `opo eval` found of its last weights
    DIR/logs/                  what the commands printed

A run that is complete is not run again; one that was interrupted goes on from its newest checkpoint, or
begins again.
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
from opo_megatron.observe.metrics_file import MetricsFile, MetricsRow
from opo_megatron.updates.variance_report import relative_noise

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "paper_small"
OPO = (sys.executable, "-m", "opo_megatron")
SAME_WEIGHTS = "*.safetensors"

NOISES = ("opo_loo", "energy_loo", "rloo")
"""Estimators of the variance report: the baseline by length, by energy, and the mean, each of the others."""
TAIL = 0.2
"""Last share of the steps that `training_entropy` is a mean over."""


@dataclass(frozen=True)
class Arm:
    """A recipe of `recipes/paper_small`, with another learning rate where one is given."""

    name: str
    recipe: str
    lr: float | None = None
    cost: float = 1.0
    """Seconds of a run, relative to OPO's: only the time that is left is told by it."""

    @property
    def path(self) -> Path:
        return RECIPES / f"{self.recipe}.yaml"


ON_POLICY = ("opo", "opo_leave_one_out", "energy", "group_mean", "rloo", "grpo_on_policy")
OFF_POLICY = "grpo_off_policy"
SLOWER = {"grpo_off_policy_lr_1e-4": 1e-4, "grpo_off_policy_lr_3e-5": 3e-5}
"""Further learning rates of off-policy GRPO, whose four updates per batch make each step a longer one; the
recipe's own, 3e-4, is that of all other arms, and nobody tuned it for any of them."""

ARMS = (
    *(Arm(name, OFF_POLICY, lr, cost=2.2) for name, lr in {OFF_POLICY: None, **SLOWER}.items()),
    *(Arm(name, name) for name in ON_POLICY),
)


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    overrides: tuple[str, ...]
    """Of all recipes."""
    seeds: int
    samples: int
    """Answers per held-out problem at the end."""
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
"""`tiny` shows that everything works; its numbers say nothing."""


@dataclass(frozen=True)
class Place:
    """Where the runs of a seed are, and what their commands are."""

    folder: Path
    scale: Scale
    seed: int

    @property
    def of_seed(self) -> Path:
        return self.folder / f"seed_{self.seed}"

    @property
    def start(self) -> Path:
        return self.of_seed / "start"

    @property
    def warm(self) -> Path:
        return self.of_seed / "warm"

    def run(self, arm: Arm) -> Path:
        return self.of_seed / arm.name

    def evaluation(self, arm: Arm) -> Path:
        return self.run(arm) / "eval" / "end"

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"seed_{self.seed}_{name}.log"

    # ------------------------------------------------------------------ commands

    def warm_commands(self) -> list[list[str]]:
        """Those that are left to do for the weights that all arms of the seed begin with."""
        if (self.start / "config.json").exists():
            return []
        steps = load_config(RECIPES / "opo.yaml", self.scale.overrides).warm_start.steps
        export = [sys.executable, str(ROOT / "tools" / "export_megatron_to_hf.py")]
        export += [str(self.warm / "checkpoints" / f"warm_start_{steps:08d}"), str(self.start)]
        settings = [*self.scale.overrides, f"run.seed={self.seed}", "train.steps=0", "observe.kl=off"]
        train = [*OPO, "train", str(RECIPES / "opo.yaml"), f"run.dir={self.warm}", *settings, "resume=auto"]
        return [export] if (self.warm / "summary.json").exists() else [train, export]

    def overrides(self, arm: Arm) -> list[str]:
        rate = [f"optimizer.lr={arm.lr:g}"] if arm.lr is not None else []
        return [
            *self.scale.overrides, *rate, f"run.dir={self.run(arm)}", f"run.seed={self.seed}",
            f"policy.init_from={self.start}", "warm_start.steps=0",
        ]  # fmt: skip

    def arm_commands(self, arm: Arm) -> list[list[str]]:
        """Those that are left to do for a run and its evaluation; the start weights must be there."""
        run, out = self.run(arm), self.evaluation(arm)
        if (out / "eval.json").exists():
            return []
        train = [*OPO, "train", str(arm.path), *self.overrides(arm), "resume=auto"]
        sizes = ["--samples", str(self.scale.samples), "--problems", str(self.scale.problems)]
        evaluate = [*OPO, "eval", str(run), *sizes, "--out", str(out)]
        return [evaluate] if (run / "summary.json").exists() else [train, evaluate]

    def config(self, arm: Arm) -> Config:
        """The arm's resolved recipe; the start weights must be there."""
        return load_config(arm.path, self.overrides(arm))

    def check_settings(self, arm: Arm) -> None:
        """Refuse a folder whose runs were made with other settings than they would be now."""
        changed = changed_settings(self.config(arm), self.run(arm) / "config.yaml")
        changed = [change for change in changed if change.key != "policy.init_from"]  # DIR may have moved
        if changed:
            raise UserError(
                f"{self.run(arm)} was run with other settings ({changed[0]}); name another --folder"
            )


def rows_of(place: Place, arm: Arm) -> list[MetricsRow]:
    """Of a finished run's steps, from step 0 on."""
    return MetricsFile(place.run(arm) / "metrics.jsonl").read()


def read_measures(place: Place, arm: Arm) -> dict[str, float | None]:
    """What one finished run measured.

    pass@k, entropy, self_bleu, rep_4 and length are of the last weights, by `opo eval`; kl is nats per
    held-out token to the start weights; training_entropy is the mean over the last fifth of the steps;
    noise_* are variances of the gradient between responses to one prompt, over all reports, relative to
    the mean baseline's, estimated from the same samples and therefore paired.
    """
    found = json.loads((place.evaluation(arm) / "eval.json").read_text())["tasks"]["held_out"]
    rows = rows_of(place, arm)
    steps = rows[1:]
    entropies = [row["entropy"] for row in steps[-math.ceil(TAIL * len(steps)) :] if "entropy" in row]
    noise = relative_noise([row for row in steps if "variance/rloo" in row])
    return {
        **{f"pass@{k}": passed["value"] for k, passed in found["pass@k"].items()},
        "entropy": found["entropy"],
        "training_entropy": fmean(entropies) if entropies else None,
        "kl": rows[-1]["eval/kl"],
        "self_bleu": found["self_bleu"],
        "rep_4": found["rep_4"],
        "length": found["length_mean"],
        **{f"noise_{name}": noise.get(name) for name in NOISES},
        "seconds": sum(row["time/step"] for row in steps),
    }


def check_same_start(place: Place, arm: Arm) -> None:
    """The weights that a run says it began with are, byte for byte, those of the seed's warm start."""
    began = place.run(arm) / "start_weights"
    ours = {path.name: path.read_bytes() for path in began.glob(SAME_WEIGHTS)}
    theirs = {path.name: path.read_bytes() for path in place.start.glob(SAME_WEIGHTS)}
    if not ours or ours != theirs:
        raise UserError(
            f"{place.run(arm)} did not begin with the weights of {place.start}; remove the run's folder"
        )


def samples_drawn(place: Place, arm: Arm) -> int:
    """Training samples of a finished run, as its recipe and its rows say."""
    rollout = place.config(arm).rollout
    return (len(rows_of(place, arm)) - 1) * rollout.prompts_per_step * rollout.samples_per_prompt

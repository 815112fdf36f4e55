"""The sections `algorithm` and `on_policy` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Baseline(str, Enum):
    """Presets of the switches `weight`, `leave_one_out`, `scale` and `scope`."""

    opo = "opo"
    opo_loo = "opo_loo"
    group_mean = "group_mean"
    rloo = "rloo"
    grpo = "grpo"
    batch_length = "batch_length"
    energy = "energy"
    energy_loo = "energy_loo"
    auto = "auto"


class Weight(str, Enum):
    one = "one"
    length = "length"
    length_power = "length_power"
    energy = "energy"
    energy_hidden = "energy_hidden"
    fitted = "fitted"


class Scale(str, Enum):
    none = "none"
    std = "std"


class Scope(str, Enum):
    group = "group"
    batch = "batch"


class LossNormalizer(str, Enum):
    tokens = "tokens"
    sequences = "sequences"
    constant = "constant"


class ObjectiveName(str, Enum):
    policy_gradient = "policy_gradient"
    clipped = "clipped"


class VarianceOf(str, Enum):
    """The gradients that a variance report compares."""

    output_layer = "output_layer"
    all_parameters = "all_parameters"


class MismatchAction(str, Enum):
    refuse = "refuse"
    warn = "warn"
    correct = "correct"


@dataclass
class AlgorithmConfig:
    """Advantages and objective."""

    baseline: Baseline = Baseline.opo
    """Preset of `weight`, `leave_one_out`, `scale` and `scope`. A switch that is set overrides its preset."""
    weight: Weight | None = None
    """w of the baseline b = Σ wᵢrᵢ / Σ wᵢ. `fitted` is the mixture of 1, length and energy that had the least
    gradient variance in earlier steps."""
    leave_one_out: bool | None = None
    """Leave each sample out of its own baseline, which makes the gradient unbiased."""
    scale: Scale | None = None
    """`std` divides advantages by the standard deviation of the rewards."""
    scope: Scope | None = None
    """Samples that share a baseline: a prompt's group, or the whole batch."""
    length_exponent: float = 1.6
    """p of w = lengthᵖ, with `weight=length_power`."""
    loss_normalizer: LossNormalizer = LossNormalizer.tokens
    """N of the loss −(1/N) Σ A log π: the number of response tokens in the batch, of its sequences, or a
    constant."""
    loss_constant: float | None = None
    """N with `loss_normalizer=constant`. Default: prompts × samples × `max_response_tokens`."""
    objective: ObjectiveName = ObjectiveName.policy_gradient
    """`policy_gradient` is OPO's. `clipped` is that of PPO and GRPO, for comparisons; it needs one more
    forward pass, for the old log-probabilities."""
    updates_per_batch: int = 1
    """Optimizer steps per batch of rollouts, each on its own subset of the prompts. OPO takes exactly one."""
    clip_low: float = 0.2
    """clipped: ratios below 1 − this have no gradient where the advantage is negative."""
    clip_high: float = 0.2
    """clipped: ratios above 1 + this have no gradient where the advantage is positive."""
    kl_coefficient: float = 0.0
    """clipped: coefficient of the KL to the reference weights (k3, per token). Above 0 it needs one more
    forward pass."""
    variance_every: int | None = None
    """Steps between variance reports, which compare the gradient's variance under every estimator; 0 is
    never. Default: 10 with `baseline=auto`, which learns from the reports, else 0."""
    variance_prompts: int = 8
    """Number of a step's prompts that a variance report measures."""
    variance_of: VarianceOf = VarianceOf.output_layer
    """`output_layer`: gradients of the output layer, at the cost of one forward pass. `all_parameters`: one
    backward pass per sample, with all gradients in memory; for small models only."""
    off_policy_sampling: bool = False
    """Allow `top_p` and `top_k` in training. The rollouts are then not samples of the policy."""


@dataclass
class OnPolicyConfig:
    """The check of every step that the rollouts come from the current policy."""

    tolerance: float = 1e-3
    """Maximum |Δ log-probability| of a sampled token between engine and policy."""
    action: MismatchAction = MismatchAction.refuse
    """What happens beyond the tolerance: `refuse` ends the run before the optimizer step, `warn` logs it.
    `correct` applies truncated importance weights to the tokens of every step."""
    max_importance_weight: float = 2.0
    """Cap on the importance weights of `correct`."""

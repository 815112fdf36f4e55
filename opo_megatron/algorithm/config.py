"""The sections `algorithm` and `on_policy` of a recipe: what the mathematics may be set to."""

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
    """Whose gradients the variance report compares."""

    output_layer = "output_layer"
    all_parameters = "all_parameters"


class MismatchAction(str, Enum):
    refuse = "refuse"
    warn = "warn"
    correct = "correct"


@dataclass
class AlgorithmConfig:
    baseline: Baseline = Baseline.opo
    """Preset of the four switches below; a switch that is set overrides it."""
    weight: Weight | None = None
    """w of the baseline b = Σ wᵢrᵢ / Σ wᵢ; `fitted` is the mixture of 1, length and energy with which
    earlier steps' gradients had least noise."""
    leave_one_out: bool | None = None
    """Leave each sample out of its own baseline (unbiased)."""
    scale: Scale | None = None
    """Divide advantages by the rewards' standard deviation."""
    scope: Scope | None = None
    """Baseline over a prompt's group, or over the whole batch."""
    length_exponent: float = 1.6
    """p of w = lengthᵖ with weight=length_power."""
    loss_normalizer: LossNormalizer = LossNormalizer.tokens
    """N of the loss −(1/N) Σ A log π: the batch's tokens, its sequences, or a constant."""
    loss_constant: float | None = None
    """N with loss_normalizer=constant; default prompts × samples × max_response_tokens."""
    objective: ObjectiveName = ObjectiveName.policy_gradient
    """`policy_gradient` is OPO's; `clipped` that of PPO and GRPO, for comparisons: it needs a pass for the
    old log-probabilities."""
    updates_per_batch: int = 1
    """Optimizer steps per batch of rollouts, each on its own part of the prompts; OPO takes exactly one."""
    clip_low: float = 0.2
    """clipped: ratios below 1 − this have no gradient where the advantage is negative."""
    clip_high: float = 0.2
    """clipped: ratios above 1 + this have no gradient where the advantage is positive."""
    kl_coefficient: float = 0.0
    """clipped: weight of the KL to the start weights (k3 per token), which needs one more pass."""
    variance_every: int | None = None
    """Steps between reports of the gradient's variance under every estimator; 0 never, default 10 with
    baseline=auto, which learns from them, else 0."""
    variance_prompts: int = 8
    """Prompts of a step that such a report looks at."""
    variance_of: VarianceOf = VarianceOf.output_layer
    """Gradients of the output layer, for one forward pass; or of all parameters, for one backward pass per
    sample and the memory of that many gradients: small models only."""
    off_policy_sampling: bool = False
    """Allow top_p and top_k in training, knowing that the rollouts are not the policy's."""


@dataclass
class OnPolicyConfig:
    tolerance: float = 1e-3
    """Largest |Δ log-probability| of a sampled token between engine and policy."""
    action: MismatchAction = MismatchAction.refuse
    """What happens beyond it: the step is refused, warned of, or (`correct`) its tokens are weighted by
    truncated importance weights, in every step."""
    max_importance_weight: float = 2.0
    """Where `correct` cuts the weights."""

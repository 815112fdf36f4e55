"""The sections `algorithm` and `on_policy` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Baseline(str, Enum):
    """Presets of the switches of the advantage formula."""

    opo = "opo"
    opo_loo = "opo_loo"
    group_mean = "group_mean"
    rloo = "rloo"
    grpo = "grpo"
    batch_length = "batch_length"
    energy = "energy"
    energy_loo = "energy_loo"
    auto = "auto"
    none = "none"
    reinforce_plus_plus = "reinforce_plus_plus"
    reinforce_plus_plus_baseline = "reinforce_plus_plus_baseline"
    asymre = "asymre"
    opmd = "opmd"
    opmd_logmeanexp = "opmd_logmeanexp"
    raft = "raft"
    reinforce_rej = "reinforce_rej"
    remax = "remax"
    maxrl = "maxrl"
    rec = "rec"
    otb = "otb"
    otb_loo = "otb_loo"
    james_stein = "james_stein"


class Weight(str, Enum):
    one = "one"
    length = "length"
    length_power = "length_power"
    energy = "energy"
    energy_hidden = "energy_hidden"
    fitted = "fitted"


class Center(str, Enum):
    """What the baseline is, which is subtracted from the rewards."""

    mean = "mean"
    logmeanexp = "logmeanexp"
    token_mean = "token_mean"
    greedy = "greedy"
    none = "none"


class Scale(str, Enum):
    none = "none"
    std = "std"
    token_std = "token_std"
    mean = "mean"
    one_plus_tau = "one_plus_tau"


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
    pg_is = "pg_is"
    dppo_tv = "dppo_tv"
    dppo_kl = "dppo_kl"
    minirl = "minirl"
    prime_rl = "prime_rl"
    cispo = "cispo"
    topr = "topr"
    sapo = "sapo"
    rec_ring = "rec_ring"
    dro = "dro"
    kimi = "kimi"
    oapl = "oapl"
    brrl = "brrl"
    gspo = "gspo"
    bapo = "bapo"
    m2po = "m2po"


class Proximal(str, Enum):
    """Where the old log-probabilities of rollouts of earlier weights come from."""

    behavior = "behavior"
    current = "current"
    loglinear = "loglinear"


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

    baseline: str = Baseline.opo.value
    """Preset of the switches up to `keep_lone`; one that is set overrides its preset. Or an estimator of your
    own, as `package.module:function`."""
    center: Center | None = None
    """The baseline b. `mean`: of the rewards, weighted by `weight`; `logmeanexp`: τ log mean e^(r/τ);
    `token_mean`: one for each token, over the responses that have this token; `greedy`: the reward of the
    greedy response to the prompt, one more request per prompt; `none`: 0."""
    weight: Weight | None = None
    """w of the baseline b = Σ wᵢrᵢ / Σ wᵢ. `fitted` is the mixture of 1, length and energy that had the least
    gradient variance in earlier steps."""
    leave_one_out: bool | None = None
    """Leave each sample out of its own baseline, which makes the gradient unbiased."""
    shrink: bool | None = None
    """Shrink the leave-one-out mean towards that of the other prompts (James–Stein)."""
    shift: float | None = None
    """Added to the baseline."""
    tau: float = 1.0
    """τ of `center=logmeanexp` and of `scale=one_plus_tau`."""
    scale: Scale | None = None
    """Divisor of the advantages. `std`: the standard deviation of the rewards; `mean`: their mean;
    `token_std`: standard deviation over all tokens of the batch, whose mean is subtracted;
    `one_plus_tau`: 1 + τ."""
    scope: Scope | None = None
    """Samples that share a baseline: a prompt's group, or the whole batch."""
    positive_only: bool | None = None
    """Use max(r, 0) as reward."""
    drop_zero_variance: bool | None = None
    """Advantage 0 where all rewards of a group are equal, also without a baseline."""
    keep_lone: bool | None = None
    """Advantage of a sample without others to compare with: its reward (true), or 0."""
    length_exponent: float = 1.6
    """p of w = lengthᵖ, with `weight=length_power`."""
    loss_normalizer: LossNormalizer = LossNormalizer.tokens
    """N of the loss −(1/N) Σ A log π: the number of response tokens in the batch, of its sequences, or a
    constant."""
    loss_constant: float | None = None
    """N with `loss_normalizer=constant`. Default: prompts × samples × `max_response_tokens`."""
    objective: ObjectiveName = ObjectiveName.policy_gradient
    """`policy_gradient` is OPO's. The others are for comparisons: `clipped` is that of PPO and GRPO,
    docs/objectives.md has all of them with their formulas and forward passes."""
    objective_options: dict[str, Any] = field(default_factory=dict)
    """Options of the objective, such as `{delta_high: 0.2}` of `dppo_tv`; docs/objectives.md lists them with
    their defaults."""
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
    """Allow `top_p`, `top_k`, `rollout.staleness` and `rollout.replay` in training. The rollouts are then not
    samples of the policy."""
    proximal: Proximal = Proximal.behavior
    """rollout.staleness: the policy that ratios compare with. `behavior`: the one that sampled the batch, as
    measured then; `current`: the one that begins it, by one more forward pass; `loglinear`: between the two
    in the logarithm, at the age of the weights one step before."""


def is_own(baseline: str) -> bool:
    """Whether `algorithm.baseline` names a user's function, `package.module:function`."""
    module, _, function = baseline.partition(":")
    return bool(module and function)


def needs_energies(algorithm: AlgorithmConfig) -> bool:
    """Whether the baseline's weights use the sums of energies of each response."""
    of_samples = algorithm.weight in (Weight.energy, Weight.energy_hidden, Weight.fitted)
    return of_samples and not needs_token_energies(algorithm)


def needs_token_energies(algorithm: AlgorithmConfig) -> bool:
    """Whether there is a baseline for each token, which uses the energy of each."""
    return algorithm.center is Center.token_mean


def corrects_token_energies(algorithm: AlgorithmConfig, on_policy: OnPolicyConfig) -> bool:
    """Whether the energies of tokens are multiplied by their squared importance weights, for which the
    policy's forward pass has to measure them."""
    return needs_token_energies(algorithm) and on_policy.action is MismatchAction.correct


def keeps_zero_variance(algorithm: AlgorithmConfig) -> bool:
    """Whether an estimator keeps a gradient where all rewards of a group are equal.

    Then no backward pass is skipped, and nothing is known of a group from its rewards alone.
    """
    if is_own(algorithm.baseline):
        return True
    if algorithm.drop_zero_variance:
        return False
    without_mean = algorithm.center in (Center.none, Center.greedy, Center.token_mean)
    shifted = bool(algorithm.shift) or algorithm.scale is Scale.token_std
    return without_mean or shifted or bool(algorithm.shrink)


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

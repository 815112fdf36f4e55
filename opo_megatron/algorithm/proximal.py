"""The proximal policy of stale rollouts, where its log-probabilities were not kept.

AReaL's approximation (`compute_prox_logp_approximations`, method `loglinear`): with a token's log-probability
μ under the weights that sampled it, ℓ under the current ones, and `age` steps between the two,

    o = μ + α (ℓ − μ),    α = max(0, (age − 1) / age),    and α = 0 at age 0:

the policy of one step before the current one, if log π moves evenly from step to step.
"""

from __future__ import annotations

from torch import Tensor


def loglinear_proximal(behavior: Tensor, current: Tensor, age: Tensor) -> Tensor:
    """o [n], of μ [n], ℓ [n] and the tokens' age in steps [n]."""
    age = age.to(behavior.dtype)
    return behavior + ((age - 1) / age.clamp(min=1)).clamp(min=0) * (current - behavior)

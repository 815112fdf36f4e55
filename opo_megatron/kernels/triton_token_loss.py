"""Loss, coefficient and mismatch of packed tokens in one launch (Triton).

The reference implementations are `algorithm/objective.py::PolicyGradient` and
`algorithm/on_policy.py::MismatchSums.add`.  Per token, with Δ = log π_policy − log π_engine:

    w = e^Δ,   c = −A/N · min(w, cap),   loss = c · log π
    Σ |Δ|,  Σ e^Δ − 1 − Δ,  Σ w,  Σ w²,  count of |Δ| above each edge,  max |Δ|

Every column is read once, loss and coefficient are written once.  Each program writes the partial sums
of `BLOCK` tokens, which torch adds: no atomics, hence deterministic.

To stay memory-bound a token may take about 100 instructions, of which double precision takes two each and
its exponential alone forty.  So the series are float32, and what is added or cancels is float64.  With
n = round(Δ / ln 2), r = Δ − n ln 2 and p = e^r − 1 − r = r² (1/2 + r/6 + …):

    e^Δ = 2ⁿ (1 + r + p),    e^Δ − 1 − Δ = 2ⁿ p + (2ⁿ − 1 + 2ⁿ r − Δ)

The bracket is exactly 0 for n = 0, so small Δ cancel nothing.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's kernels take pointers and scalars; their types are those of the launch.

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from opo_megatron.algorithm.on_policy import HISTOGRAM

if TYPE_CHECKING:
    from opo_megatron.algorithm.objective import PolicyGradient
    from opo_megatron.algorithm.on_policy import MismatchSums

BLOCK = 1024
"""Tokens per program."""
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693115234375)
"""12 bits of ln 2, so that its products with n are exact."""
_LN2_LOW = tl.constexpr(3.194618494530942e-05)
_ROUND = tl.constexpr(12582912.0)
"""1.5 · 2²³: adding it rounds to an integer, which is then in the low bits."""
_LOWEST, _HIGHEST = tl.constexpr(-708.0), tl.constexpr(709.0)
"""Exponents of float64's range."""


@triton.jit
def _weight_and_k3(delta):
    """e^Δ and e^Δ − 1 − Δ in float64 from Δ in float32; relative errors 1e-7 and 3e-7."""
    x = tl.minimum(delta, _HIGHEST, propagate_nan=tl.PropagateNan.ALL)
    x = tl.maximum(x, _LOWEST, propagate_nan=tl.PropagateNan.ALL)
    rounded = x * _LOG2E + _ROUND
    n = rounded - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = r * (1 / 120 + r * (1 / 720 + r * (1 / 5040 + r * (1 / 40320))))
    p = r * r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + p)))
    exponent = (rounded.to(tl.int32, bitcast=True) + 1023) << 20
    power = (exponent.to(tl.int64) << 32).to(tl.float64, bitcast=True)
    r, p = r.to(tl.float64), p.to(tl.float64)
    return power * (1 + r + p), power * p + ((power - 1) + (power * r - delta.to(tl.float64)))


@triton.jit
def _kernel(
    log_prob, advantages, engine_log_prob, edges, loss, coefficient, partial, tokens, inverse_normalizer, cap,
    HAS_LOSS: tl.constexpr, CAPPED: tl.constexpr, MEASURES: tl.constexpr, EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    part, parts = tl.program_id(0), tl.num_programs(0)
    index = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < tokens
    policy = tl.load(log_prob + index, mask=inside, other=0.0)
    if CAPPED or MEASURES:
        delta = policy - tl.load(engine_log_prob + index, mask=inside, other=0.0)
        weight, k3 = _weight_and_k3(delta)
    if HAS_LOSS:
        factor = -tl.load(advantages + index, mask=inside, other=0.0) * inverse_normalizer
        if CAPPED:
            # Unlike a minimum, this propagates NaN.
            capped = weight.to(tl.float32)
            factor *= tl.where(capped > cap, cap, capped)
        tl.store(loss + index, factor * policy, mask=inside)
        tl.store(coefficient + index, factor, mask=inside)
    if MEASURES:
        # Past the last token Δ = 0 and w = 1, exactly.
        padding = tl.maximum((part + 1) * BLOCK - tokens, 0)
        size = tl.abs(delta)
        partial += part
        tl.store(partial, tl.sum(tl.abs(delta.to(tl.float64)), 0))
        tl.store(partial + parts, tl.sum(k3, 0))
        tl.store(partial + 2 * parts, tl.sum(weight, 0) - padding)
        tl.store(partial + 3 * parts, tl.sum(weight * weight, 0) - padding)
        for k in tl.static_range(EDGES):
            # NaN counts as above all edges, as in the reference.
            above = ~(size <= tl.load(edges + k))
            tl.store(partial + (4 + k) * parts, tl.sum(above.to(tl.int32), 0).to(tl.float64))
        # Sizes are ordered as their bits are, with NaN above all.
        highest = tl.max(size.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
        tl.store(partial + (4 + EDGES) * parts, highest.to(tl.float64))


@cache
def _float32_edges(device: torch.device) -> Tensor:
    """Thresholds of |Δ| in float32, rounded down: |Δ| is float32, and none lies between them."""
    edges = torch.tensor(HISTOGRAM, dtype=torch.float64)
    nearest = edges.float()
    below = torch.nextafter(nearest, torch.zeros(()))
    return torch.where(nearest.double() > edges, below, nearest).to(device)


def token_loss(
    log_prob: Tensor,
    objective: PolicyGradient | None,
    advantages: Tensor | None,
    engine_log_prob: Tensor | None,
    mismatch: MismatchSums | None,
) -> tuple[Tensor, Tensor]:
    """(loss, ∂loss/∂log π) [n] float32; adds the tokens' Δ to `mismatch`.

    Args:
        log_prob: [n] float32 log π_policy.
        objective: None: forward only, and both results are empty.
        advantages: [n] float32, with an objective.
        engine_log_prob: [n] float32; None where neither cap nor mismatch needs it.
        mismatch: None: not measured.
    """
    tokens, has_loss = log_prob.numel(), objective is not None
    loss, coefficient = (log_prob.new_empty(tokens if has_loss else 0) for _ in range(2))
    cap = None if objective is None else objective.max_importance_weight
    if tokens and (has_loss or mismatch is not None):
        parts = triton.cdiv(tokens, BLOCK)
        edges = None if mismatch is None else _float32_edges(log_prob.device)
        partial = None if mismatch is None else mismatch.values.new_empty(mismatch.values.numel() + 1, parts)
        _kernel[(parts,)](
            log_prob, advantages, engine_log_prob, edges, loss, coefficient, partial, tokens,
            1.0 if objective is None else 1.0 / objective.normalizer, 0.0 if cap is None else float(cap),
            HAS_LOSS=has_loss, CAPPED=cap is not None, MEASURES=mismatch is not None, EDGES=len(HISTOGRAM),
            BLOCK=BLOCK,
        )  # fmt: skip
        if mismatch is not None and partial is not None:
            mismatch.add_partial(partial)
    return loss, coefficient

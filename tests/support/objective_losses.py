"""The objectives as losses that autograd differentiates: independent of the package, in float64.

Each function has ℓ with a gradient, the batch, and the objective's options; the result is summed over tokens,
not divided by N.  What carries no gradient is detached where the method says so.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from tests.support.objective_batches import ObjectiveBatch

Options = dict[str, float]
Loss = Callable[[Tensor, ObjectiveBatch, Options], Tensor]


def responses(values: Tensor, batch: ObjectiveBatch) -> list[Tensor]:
    return list(values.split(batch.lengths.tolist()))


def rewards_of_prompts(batch: ObjectiveBatch) -> list[list[float]]:
    """Of each response, the rewards of all responses to its prompt."""
    of_prompt: dict[int, list[float]] = defaultdict(list)
    for reward, prompt in zip(batch.rewards.tolist(), batch.groups.tolist(), strict=True):
        of_prompt[prompt].append(reward)
    return [of_prompt[prompt] for prompt in batch.groups.tolist()]


def pg_is(now: Tensor, batch: ObjectiveBatch, o: Options) -> Tensor:
    weight = torch.exp(now - batch.engine).detach().clamp(max=o["cap"])
    return -(batch.advantages * weight * now).sum()


def tv_mask(now: Tensor, batch: ObjectiveBatch, o: Options) -> Tensor:
    moved = (now.exp() - batch.engine.exp()).detach()
    up, down = batch.advantages > 0, batch.advantages <= 0
    return ~((up & (moved > o["delta_high"])) | (down & (moved < -o["delta_low"])))


def dppo_tv(now: Tensor, batch: ObjectiveBatch, o: Options) -> Tensor:
    weight = torch.exp(now - batch.engine).detach().clamp(max=o["cap"])
    return -(batch.advantages * weight * tv_mask(now, batch, o) * now).sum()


def dppo_kl(now: Tensor, batch: ObjectiveBatch, o: Options) -> Tensor:
    weights = []
    for log_p, log_q, a in zip(now.tolist(), batch.engine.tolist(), batch.advantages.tolist(), strict=True):
        p, q = math.exp(log_p), math.exp(log_q)
        kl = q * (log_q - log_p) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
        dropped = (kl > o["delta_high"] and p > q) if a > 0 else (kl > o["delta_low"] and p < q)
        weights.append(0.0 if dropped else min(math.exp(log_p - log_q), o["cap"]))
    return -(batch.advantages * torch.tensor(weights, dtype=torch.float64) * now).sum()


def minirl(now: Tensor, batch: ObjectiveBatch, o: Options) -> Tensor:
    weight = torch.exp(now - batch.engine).detach().clamp(max=o["cap"])
    ratio = torch.exp(now - batch.old).detach()
    above = (batch.advantages > 0) & (ratio > 1 + o["epsilon_high"])
    below = (batch.advantages <= 0) & (ratio < 1 - o["epsilon_low"])
    return -(batch.advantages * weight * now)[~above & ~below].sum()


def prime_rl(now: Tensor, batch: ObjectiveBatch, o: Options) -> Tensor:
    ratio = torch.exp(now - batch.engine)
    gain = o["tau_advantage"] * batch.advantages * ratio * tv_mask(now, batch, o)
    return (o["tau_kl"] * (now - batch.engine) ** 2 - gain).sum()


def cispo(now: Tensor, batch: ObjectiveBatch, o: Options) -> Tensor:
    ratio = torch.exp(now - batch.old).detach()
    return -(batch.advantages * ratio.clamp(1 - o["epsilon_low"], 1 + o["epsilon_high"]) * now).sum()


def topr(now: Tensor, batch: ObjectiveBatch, o: Options) -> Tensor:
    total = now.new_zeros(())
    pieces = zip(responses(now, batch), responses(batch.old, batch), strict=True)
    for i, (mine, old) in enumerate(pieces):
        ratio = torch.exp(mine - old).detach()
        weight = torch.ones_like(ratio) if batch.rewards[i] > 0 else ratio.clamp(0, 1)
        total = total - batch.sample_advantages[i] * (weight * mine).sum()
    return total


def sapo(now: Tensor, batch: ObjectiveBatch, o: Options) -> Tensor:
    ratio = torch.exp(now - batch.old)
    gates = {t: 4 / t / (1 + torch.exp(-t * (ratio - 1))) for t in (o["tau_positive"], o["tau_negative"])}
    gate = torch.where(batch.advantages > 0, gates[o["tau_positive"]], gates[o["tau_negative"]])
    return -(gate * batch.advantages).sum()


def rec_ring(now: Tensor, batch: ObjectiveBatch, o: Options) -> Tensor:
    kept = []
    for ratio, a in zip(torch.exp(now - batch.old).tolist(), batch.advantages.tolist(), strict=True):
        inside = 1 - o["epsilon_low"] <= ratio <= 1 + o["epsilon_high"]
        pulled = (a >= 0 and ratio <= 1 - o["outer_low"]) or (a <= 0 and ratio >= 1 + o["outer_high"])
        kept.append(float(inside or pulled))
    return -(batch.advantages * now * torch.tensor(kept, dtype=torch.float64)).sum()


def penalized(now: Tensor, batch: ObjectiveBatch, coefficient: float) -> Tensor:
    return (-batch.advantages * now + coefficient * 0.5 * (now - batch.old).pow(2)).sum()


def oapl(now: Tensor, batch: ObjectiveBatch, o: Options) -> Tensor:
    total, rewards = now.new_zeros(()), rewards_of_prompts(batch)
    pieces = zip(responses(now, batch), responses(batch.engine, batch), strict=True)
    for i, (mine, engine) in enumerate(pieces):
        powers = [math.exp(r / o["beta_1"]) for r in rewards[i]]
        target = float(batch.rewards[i]) - o["beta_1"] * math.log(statistics.fmean(powers))
        total = total + (o["beta_2"] * (mine - engine).sum() - target) ** 2
    return total


def brrl(now: Tensor, batch: ObjectiveBatch, o: Options) -> Tensor:
    total, rewards = now.new_zeros(()), rewards_of_prompts(batch)
    pieces = zip(responses(now, batch), responses(batch.old, batch), strict=True)
    for i, (mine, old) in enumerate(pieces):
        above = float(batch.rewards[i]) - statistics.median(rewards[i])
        share = 0.5 * (1 + math.tanh(above / o["target_temperature"] / 2))
        target = 1 - o["epsilon_low"] + (o["epsilon_low"] + o["epsilon_high"]) * share
        total = total + abs(float(batch.sample_advantages[i])) * (torch.exp(mine - old) - target).abs().sum()
    return total


def gspo(now: Tensor, batch: ObjectiveBatch, o: Options) -> Tensor:
    total = now.new_zeros(())
    pieces = zip(responses(now, batch), responses(batch.old, batch), strict=True)
    for i, (mine, old) in enumerate(pieces):
        ratio = torch.exp((mine - old).mean().detach() + mine - mine.detach())
        a, clipped = batch.sample_advantages[i], ratio.clamp(1 - o["epsilon_low"], 1 + o["epsilon_high"])
        total = total + torch.maximum(-a * ratio, -a * clipped).sum()
    return total


def bapo(now: Tensor, batch: ObjectiveBatch, o: Options) -> Tensor:
    ratio, a = torch.exp(now - batch.old), batch.advantages
    pairs = list(zip(ratio.tolist(), a.tolist(), strict=True))

    def balance(low: float, high: float) -> float:
        gains = sum(min(r, high) * x for r, x in pairs if x > 0)
        losses = sum(max(r, low) * -x for r, x in pairs if x < 0)
        return gains / (losses + 1e-8) if losses > 0 else math.inf

    low, high = o["low"], o["high"]
    while balance(low, high) < o["target"] and low < o["highest_low"]:
        low = min(low + o["step"], o["highest_low"])
    while balance(low, high) < o["target"] and high < o["highest_high"]:
        high = min(high + o["step"], o["highest_high"])
    clipped = torch.maximum(-a * ratio, -a * ratio.clamp(low, high))
    return torch.where(a < 0, torch.minimum(-a * o["dual_clip"], clipped), clipped).sum()


def m2po(now: Tensor, batch: ObjectiveBatch, o: Options) -> Tensor:
    moved = [float(d) for d in (now - batch.old).detach()]
    trusted = [t for t, d in enumerate(moved) if float(batch.advantages[t]) * d > 0]
    dropped: set[int] = set()
    for t in sorted(trusted, key=lambda t: moved[t] ** 2, reverse=True):
        left = [moved[s] ** 2 for s in trusted if s not in dropped]
        if math.fsum(left) <= o["threshold"] * len(left):
            break
        dropped.add(t)
    kept = torch.tensor([float(t not in dropped) for t in range(len(moved))], dtype=torch.float64)
    return -(batch.advantages * torch.exp(now - batch.old) * kept).sum()


LOSSES: dict[str, Loss] = {
    "pg_is": pg_is,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "minirl": minirl,
    "prime_rl": prime_rl,
    "cispo": cispo,
    "topr": topr,
    "sapo": sapo,
    "rec_ring": rec_ring,
    "dro": lambda now, batch, o: penalized(now, batch, o["beta"]),
    "kimi": lambda now, batch, o: penalized(now, batch, o["tau"]),
    "oapl": oapl,
    "brrl": brrl,
    "gspo": gspo,
    "bapo": bapo,
    "m2po": m2po,
}

"""Correctness and speed of the kernels on a GPU: sections of check_gpu.py, one process each.

Times are medians of `ROUNDS` after two warm-up rounds, by CUDA events.  Every section returns its figures
and, under "not met", those over their limit; without a GPU it returns {"missing": why}, as tests/kernels
runs the kernels in Triton's interpreter there.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.gpu_section import Figures, Section, Setting

ROUNDS = 9
LARGEST_ADVANTAGE_US = 5.0
LARGEST_COPIES = 1.25
LARGEST_HEAD_BYTES = 0.54e9
"""In addition to dW and the head's outputs; without cuBLAS's workspace, which the process shares."""
PACKED_TOKENS = 2**25


@dataclass(frozen=True)
class HeadSize:
    """A size of the head, and its limit."""

    tokens: int
    hidden: int
    rows: int
    most_milliseconds: float

    def __str__(self) -> str:
        return f"{self.tokens:,} × {self.hidden:,} × {self.rows:,}"


HEADS = (
    HeadSize(8192, 4096, 131072, 42.0),
    HeadSize(4096, 2048, 131072, 17.1),
    HeadSize(4096, 2048, 32768, 4.25),
)
"""The limits of the last two were published for an H100 with all logits stored."""


def on_a_gpu(section: Callable[[], Figures]) -> Callable[[Setting], Figures]:
    """The section, or {"missing": why} where it cannot run."""

    @functools.wraps(section)
    def work(setting: Setting) -> Figures:
        import torch

        if not setting.on_gpu or not torch.cuda.is_available():
            return {"missing": "no GPU to run a kernel on"}
        if importlib.util.find_spec("triton") is None:
            return {"missing": "triton is not installed; training on this GPU needs it"}
        return section()

    return work


def milliseconds(work: Callable[[], Any], repeats: int = 1) -> float:
    """Median of one call; short ones are repeated, so that launch latency does not count."""
    import torch

    times = []
    for _ in range(ROUNDS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / repeats)
    return statistics.median(times[2:])


def relative(result: Any, expected: Any) -> float:
    """Maximum error relative to the maximum value."""
    return float((result.double() - expected.double()).abs().max() / expected.double().abs().max())


def with_limits(figures: Figures, limits: dict[str, float]) -> Figures:
    """The figures, and under "not met" those above their limits (NaN is above)."""
    missed = [
        f"{name} is {figures[name]:.4g}, at most {limit:g}"
        for name, limit in limits.items()
        if not figures[name] <= limit
    ]
    return figures | ({"not met": missed} if missed else {})


@on_a_gpu
def group_advantage() -> Figures:
    """4,096 samples in 256 groups, replayed as a CUDA graph: GPU time without launches from Python."""
    import torch

    from opo_megatron.algorithm.advantages import group_advantages as reference
    from opo_megatron.kernels.triton_advantages import group_advantages

    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(4096, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 8192, (4096,), generator=generator).double()
    offsets = torch.arange(0, 4097, 16)
    arguments = (rewards.cuda(), lengths.cuda(), offsets.cuda(), False, None)
    group_advantages(*arguments)  # compiles before graph capture
    graph, repeats = torch.cuda.CUDAGraph(), 100
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            baselines, advantages = group_advantages(*arguments)
    per_call = 1e3 * milliseconds(graph.replay) / repeats
    expected = reference(rewards, lengths, offsets, False, None)
    figures = {
        "microseconds": per_call,
        "largest relative error": max(
            relative(baselines.cpu(), expected[0]), relative(advantages.cpu(), expected[1])
        ),
    }
    return with_limits(figures, {"microseconds": LARGEST_ADVANTAGE_US, "largest relative error": 1e-9})


@on_a_gpu
def token_kernel() -> Figures:
    """Loss, coefficient and mismatch of 33.5 million tokens, against a copy of as many bytes."""
    import torch

    from opo_megatron.algorithm.objective import PolicyGradient
    from opo_megatron.algorithm.on_policy import MismatchSums
    from opo_megatron.kernels.triton_token_loss import token_loss
    from opo_megatron.policy.metric_sums import MetricSums
    from opo_megatron.policy.token_loss import TokenLoss

    device, n = torch.device("cuda"), PACKED_TOKENS
    generator = torch.Generator(device).manual_seed(0)
    log_prob = -5 * torch.rand(n, generator=generator, device=device)
    engine = log_prob + 0.05 * torch.randn(n, generator=generator, device=device)
    columns = {
        "advantages": torch.randn(n, generator=generator, device=device),
        "engine_log_prob": engine,
    }
    objective, step = PolicyGradient(float(n), 1.0, 2.0), MetricSums(device, True)
    work, sums = TokenLoss(objective, columns, step), step.mismatch
    assert sums is not None
    loss, coefficient = work(log_prob, slice(0, n))
    expected, double = MismatchSums(device), {name: values.double() for name, values in columns.items()}
    expected.add(log_prob - engine)
    exact = objective(log_prob.double(), double)
    errors = [relative(loss, exact[0]), relative(coefficient, exact[1])]
    first = sums.values.clone()
    errors.append(float((first / expected.values - 1).abs().max()))
    del exact, double
    columns_moved = 5  # three read, two written
    source = torch.empty(columns_moved * n // 2, device=device)
    target = torch.empty_like(source)
    arguments = (log_prob, objective, columns["advantages"], engine)
    copy = milliseconds(lambda: target.copy_(source), repeats=10)
    ours = milliseconds(lambda: token_loss(*arguments, sums), repeats=10)
    second_sums = MismatchSums(device)
    second = token_loss(*arguments, second_sums)
    figures = {
        "microseconds": 1e3 * ours,
        "microseconds, copy of the same bytes": 1e3 * copy,
        "ours / copy": ours / copy,
        "largest relative error": max(errors),
        "numbers that differ in a second run": sum(
            int((one != other).sum())
            for one, other in zip((loss, coefficient, first), (*second, second_sums.values), strict=True)
        ),
    }
    limits: dict[str, float] = {"ours / copy": LARGEST_COPIES, "largest relative error": 1e-6}
    return with_limits(figures, limits | {"numbers that differ in a second run": 0})


@on_a_gpu
def heads() -> Figures:
    """Log-probabilities and both gradients in bf16, dW added in float32, for every size of `HEADS`."""
    figures: Figures = {str(size): head(size) for size in HEADS}
    missed = [f"{size}: {line}" for size, parts in figures.items() for line in parts.pop("not met", [])]
    return figures | ({"not met": missed} if missed else {})


def head(size: HeadSize) -> Figures:
    import torch

    from opo_megatron.kernels.lm_head import VocabularyShard, chunked_logprobs, default_chunk_tokens

    device, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    hidden, weight = normal(size.tokens, size.hidden), normal(size.rows, size.hidden).mul_(0.03)
    targets = torch.randint(size.rows, (size.tokens,), generator=generator, device=device)
    c = torch.randn(size.tokens, generator=generator, device=device)
    d_weight = torch.zeros(size.rows, size.hidden, device=device)
    chunk = default_chunk_tokens(size.rows, weight.dtype, device)

    def work(learns: bool = True) -> Any:
        coefficient = (lambda log_prob, part: (c[part] * log_prob, c[part])) if learns else None
        return chunked_logprobs(
            hidden, weight, targets, VocabularyShard(0), 1.0, chunk, coefficient, d_weight
        )

    work()  # compiles, and allocates cuBLAS's workspace
    d_weight.zero_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = work()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    results = sum(values.nbytes for values in vars(output).values())
    figures: Figures = {
        "chunk tokens": chunk,
        "extra MB": (peak - results) / 1e6,
        "extra MB with what is returned": peak / 1e6,
        **head_errors(hidden, weight, targets, c, d_weight, output),
    }
    del output
    figures["milliseconds"] = milliseconds(work)
    figures["milliseconds, log-probabilities alone"] = milliseconds(lambda: work(False))
    figures["milliseconds, three matrix products alone"] = milliseconds(
        functools.partial(products, hidden, weight, chunk)
    )
    figures["milliseconds, softmax alone"] = milliseconds(
        functools.partial(softmax, hidden, weight, targets, c, chunk)
    )
    figures |= liger(hidden, weight, targets)
    limits = {"milliseconds": size.most_milliseconds, "extra MB": LARGEST_HEAD_BYTES / 1e6}
    limits |= {"largest error of log π": 0.05, "dH": 0.03, "dW": 0.03, "numbers that are not finite": 0}
    return with_limits(figures, limits)


def head_errors(hidden: Any, weight: Any, targets: Any, c: Any, d_weight: Any, output: Any) -> Figures:
    """Slices against float64: 64 tokens of log π and dH, 64 rows of dW (relative to the maximum value)."""
    import torch

    first_tokens = slice(0, 64)
    w = weight.double()
    log_pi = (hidden[first_tokens].double() @ w.T).log_softmax(1)
    own = log_pi.gather(1, targets[first_tokens].unsqueeze(1))[:, 0]
    dz = -log_pi.exp() * c[first_tokens].double().unsqueeze(1)
    dz.scatter_add_(1, targets[first_tokens].unsqueeze(1), c[first_tokens].double().unsqueeze(1))
    d_hidden = dz @ w
    del w, log_pi, dz
    rows = targets[first_tokens].unique()  # of target tokens, so that both terms of dz count
    h = hidden.double()
    log_total = (h * weight[targets].double()).sum(1) - output.log_prob.double()
    dz = -(h @ weight[rows].double().T - log_total.unsqueeze(1)).exp() + (targets.unsqueeze(1) == rows)
    return {
        "largest error of log π": float((output.log_prob[first_tokens].double() - own).abs().max()),
        "dH": relative(output.d_hidden[first_tokens], d_hidden),
        "dW": relative(d_weight[rows], (dz * c.double().unsqueeze(1)).T @ h),
        "numbers that are not finite": sum(
            int((~torch.isfinite(values)).sum()) for values in (d_weight, output.d_hidden)
        ),
    }


def products(hidden: Any, weight: Any, chunk: int) -> None:
    """z = H Wᵀ, z W and zᵀ H, chunk by chunk, without accumulation: a lower bound for any head."""
    import torch

    for part in hidden.split(chunk):
        logits = torch.mm(part, weight.t())
        torch.mm(logits, weight)
        torch.mm(logits.t(), part)


def softmax(hidden: Any, weight: Any, targets: Any, c: Any, chunk: int) -> None:
    """Both passes over the logits, chunk by chunk, without a product: at least 6 bytes a logit."""
    from opo_megatron.kernels.triton_softmax import gradient_in_place, row_statistics

    logits = weight.new_zeros(min(chunk, len(hidden)), weight.shape[0])
    for part, coefficients in zip(targets.split(chunk), c.split(chunk), strict=True):
        stats = row_statistics(logits[: len(part)], part, 0, 1.0)
        gradient_in_place(logits[: len(part)], part, 0, 1.0, stats.highest, stats.total, coefficients)


def liger(hidden: Any, weight: Any, targets: Any) -> Figures:
    """Liger's fused linear cross entropy on the same inputs, forward and backward, where it is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {"liger": "liger_kernel is not installed; pip install liger-kernel to compare with it"}
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    leaf, matrix = hidden.detach().requires_grad_(), weight.detach().requires_grad_()

    def work() -> None:
        leaf.grad = matrix.grad = None
        loss(matrix, leaf, targets).backward()

    return {"milliseconds, liger": milliseconds(work)}


KERNEL_SECTIONS = [
    Section("kernel: group advantages", 15, group_advantage, alone=True),
    Section("kernel: tokens", 15, token_kernel, alone=True),
    Section("kernel: head", 35, heads, alone=True),
]

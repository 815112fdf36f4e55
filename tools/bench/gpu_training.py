"""The training phase on a GPU: MFU of a policy of 1.35 billion parameters, and where its time goes.

256 sequences of 130 prompt and 381 response tokens, random ids, packed into micro-batches of 16,384 tokens,
through the policy's own training step.  The table of kernels is one micro-batch under PyTorch's profiler.
On a CPU the same with a small model, where MFU and kernels are absent.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_section import Figures, Section, Setting

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
VOCABULARY = 32768
SEQUENCES, PROMPT, RESPONSE = 256, 130, 381
LARGE = {
    "num_layers": 20, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 16,
    "num_query_groups": 4, "kv_channels": 128, "max_sequence_length": 2048,
}  # fmt: skip
SMALL = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 2,
    "num_query_groups": 1, "kv_channels": 32, "max_sequence_length": 1024,
}  # fmt: skip
WARM_UP, TIMED = 2, 3
LEAST_MFU = {"bf16": 0.62, "fp8": 0.75}

KINDS = {
    "attention": r"fmha|flash|attn|attention|cudnn.*sdpa",
    "matrix products": r"gemm|cutlass|cublas|nvjet|matmul|sm90_xmma|wgmma",
    "FP8 quantization": r"quantiz|block_scal|fp8|transpose_cast|cast_transpose",
    "norms": r"norm",
    "LM head and token loss": r"softmax|token_loss|logprob|_sweep",
    "rotary embedding": r"rope|rotary",
    "optimizer": r"adam|multi_tensor|l2norm|clip",
    "copies": r"memcpy|memset|copy|fill|CatArray|cat_",
    "elementwise": r"elementwise|vectorized|swiglu|silu|gelu|add|mul|reduce",
}
"""Kind of kernel → pattern of its name; the first that matches counts."""


def training_bf16(setting: Setting) -> Figures:
    """MFU in bf16."""
    return training(setting, "bf16", ())


def training_fp8(setting: Setting) -> Figures:
    """MFU with FP8 by blocks, against the bf16 peak."""
    if not setting.on_gpu:
        return {"missing": "FP8 needs a GPU and Transformer Engine"}
    return training(setting, "fp8", ("policy.fp8=blockwise", "on_policy.action=correct"))


def training(setting: Setting, precision: str, overrides: Sequence[str]) -> Figures:
    """Median seconds of a training step, MFU, peak memory, and the table of kernels."""
    import torch

    from opo_megatron.algorithm.objective import PolicyGradient
    from opo_megatron.config import load_config
    from opo_megatron.distributed.process_groups import initialize, shutdown
    from opo_megatron.policy.policy import Policy
    from opo_megatron.weights.param_mapping import hf_shapes

    shape, sequences = (LARGE, SEQUENCES) if setting.on_gpu else (SMALL, 8)
    config = load_config(
        RECIPE,
        [
            f"run.dir={setting.folder}", f"policy.device={setting.device}", "policy.dtype=bf16",
            "policy.packing=thd", f"policy.max_tokens_per_micro_batch={16384 if setting.on_gpu else 2048}",
            *(f"policy.model.{key}={value}" for key, value in shape.items()), *overrides,
        ],
    )  # fmt: skip
    parallel = initialize(config)
    device, model = parallel.device, config.policy.model
    generator = torch.Generator(device).manual_seed(1)
    shapes = hf_shapes(model, VOCABULARY)

    def weights(name: str) -> torch.Tensor:
        size = shapes[name]
        if len(size) == 1:
            return torch.ones(size, device=device)
        return torch.randn(size, generator=generator, device=device) / math.sqrt(size[1])

    policy = Policy(config, VOCABULARY, parallel, config.optimizer, weights)
    rollouts = random_rollouts(sequences)
    schedule = policy.schedule(rollouts.sequence_lengths)
    rollouts = rollouts.select(schedule.samples_of(0))
    objective = PolicyGradient(float(sequences * RESPONSE), 1.0)
    seconds = []
    for _ in range(WARM_UP + TIMED):
        started = time.perf_counter()
        policy.train_step(rollouts, schedule, objective, lr=1e-6)
        if setting.on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    figures = step_figures(config, rollouts, statistics.median(seconds[WARM_UP:]), parallel)
    figures |= {
        "parameters": sum(math.prod(size) for size in shapes.values()),
        "micro-batches": schedule.count,
    }
    if setting.on_gpu:
        figures["peak memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
        one = policy.schedule(rollouts.sequence_lengths, only=schedule.assignment[0][0])
        figures["kernels of one micro-batch, ms"] = kernel_table(
            lambda: policy.accumulate_gradients(rollouts.select(one.samples_of(0)), one, objective)
        )
    shutdown()
    card = torch.cuda.get_device_name() if setting.on_gpu else None
    return figures | not_met(figures, LEAST_MFU[precision], card)


def random_rollouts(sequences: int) -> Any:
    """Random tokens with log-probabilities of an engine, and advantages that are nowhere 0."""
    import torch

    from opo_megatron.batch.rollouts import Rollouts

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (sequences, PROMPT + RESPONSE), generator=generator).tolist()
    rollouts = Rollouts.from_demonstrations([t[:PROMPT] for t in tokens], [t[PROMPT:] for t in tokens])
    rollouts.is_demonstration = False
    rollouts.engine_log_prob = torch.full((sequences * RESPONSE,), -math.log(VOCABULARY))
    rollouts.rewards = (torch.arange(sequences) % 2).double()
    rollouts.advantages = rollouts.rewards - 0.5
    return rollouts


def step_figures(config: Any, rollouts: Any, seconds: float, parallel: Any) -> Figures:
    """Tokens per second and MFU, by the same functions as a run's metrics."""
    from opo_megatron.batch.stats import BatchStats
    from opo_megatron.observe.step_metrics import throughput_metrics
    from opo_megatron.observe.utilization import peak_tflops, training_tflop

    stats = BatchStats(
        rollouts.groups, rollouts.prompt_lengths, rollouts.response_lengths, rollouts.finish_reasons,
        rollouts.rewards,
    )  # fmt: skip
    row = {
        "tokens/response": int(rollouts.response_lengths.sum()),
        "tokens/processed": int(rollouts.sequence_lengths.sum()),
        "compute/train_tflop": training_tflop(
            config.policy.model, VOCABULARY, config.algorithm, stats, rollouts.advantages
        ),
        "time/train": seconds,
    }
    return {"seconds per step": seconds} | throughput_metrics(row, peak_tflops(parallel))


def not_met(figures: Figures, least: float, card: str | None) -> Figures:
    """What is missed on this card; nothing on a CPU."""
    mfu = figures.get("throughput/mfu")
    if card is None or (mfu is not None and mfu >= least):
        return {}
    found = f"unknown, because observe/utilization.py has no peak of {card}" if mfu is None else f"{mfu:.3f}"
    return {"not met": [f"throughput/mfu is {found}, at least {least:g}"]}


def kernel_table(work: Callable[[], object]) -> dict[str, float]:
    """Milliseconds on the GPU by kind of kernel, the longest first, then the time that no kernel ran."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    wall = 1e3 * (time.perf_counter() - started)
    kernels = [
        (event.key, event.self_device_time_total / 1e3)
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    table = by_kind(kernels)
    return table | {"no kernel (with the profiler's own time)": wall - sum(table.values())}


def by_kind(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Σ of each kind, the longest first; what matches no pattern is `other: NAME` if longer than 1 %."""
    kernels = list(kernels)
    total = sum(milliseconds for _, milliseconds in kernels)
    sums: dict[str, float] = defaultdict(float)
    for name, milliseconds in kernels:
        kind = next((k for k, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), None)
        if kind is None:
            kind = f"other: {name[:60]}" if milliseconds > 0.01 * total else "other"
        sums[kind] += milliseconds
    return dict(sorted(sums.items(), key=lambda pair: -pair[1]))


TRAINING_SECTIONS = [
    Section("training: 1.35 G parameters, bf16", 40, training_bf16, alone=True),
    Section("training: 1.35 G parameters, FP8", 40, training_fp8, alone=True),
]

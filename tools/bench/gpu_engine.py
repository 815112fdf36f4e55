"""SGLang and FP8 on a GPU: sections of check_gpu.py.

On a CPU each section runs as far as it goes: the transports with a real server and the quickstart's model.
FP8 and SGLang's deterministic inference need a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.gpu_kernels import with_limits
from bench.gpu_runs import RECIPE, metrics_of, overrides_of, train
from bench.gpu_section import Figures, Section, Setting

if TYPE_CHECKING:
    from torch import Tensor

    from opo_megatron.build import Run
    from opo_megatron.config import Config
    from opo_megatron.policy.policy import Policy
    from opo_megatron.rollout.engine import RolloutEngine
    from opo_megatron.rollout.sglang.client import Client
    from opo_megatron.weights.param_mapping import Parameter

BF16_LIMITS = {"on_policy/k3": 2e-3, "on_policy/logprob_diff_mean": 0.05}
"""Of a policy and an engine in bf16; 0.0145 was measured between policy and local engine."""
FP8_LIMITS = {"on_policy/k3": 0.016}
"""Of FP8 on both sides: what was measured where the engine had bf16 weights instead."""
NO_FP8 = "Transformer Engine has no FP8 on a CPU"
SERVER_SECONDS = 150
"""A server starts in about 25 seconds where it is alone, and compiles its kernels for up to 60."""

# ---------------------------------------------------------------------- transports, shared memory


def ipc_and_a_killed_server(setting: Setting) -> Figures:
    """Weights by CUDA IPC, GPU memory in turns; the server is killed in mid-run and restarted."""
    overrides = ["rollout.sglang.transport=tensor", "rollout.sglang.share_memory=true"]
    figures = train(setting, "ipc", overrides, steps=5, act=kill_after_the_first_step)
    missed = [] if figures["run/engine_failures"] else ["the killed server was not noticed"]
    if (
        setting.on_gpu
        and not figures["memory/policy_rollout_gpu_gib"] < figures["memory/policy_train_gpu_gib"]
    ):
        missed.append("the policy holds as much while the engine generates as when it trains")
    return joined(with_limits(figures, BF16_LIMITS), missed)


def kill_after_the_first_step(run_dir: Path) -> None:
    """As the OOM killer does: the server's main process alone."""
    while not any(row["step"] > 0 for row in metrics_of(run_dir)):
        time.sleep(0.2)
    os.kill(int((run_dir / "sglang" / "server_0.pid").read_text()), signal.SIGKILL)


def joined(figures: Figures, missed: Sequence[str]) -> Figures:
    """The figures, with further lines that are not met."""
    lines = [*figures.get("not met", []), *missed]
    return figures | ({"not met": lines} if lines else {})


def broadcast_over_gloo(setting: Setting) -> Figures:
    """Weights by broadcast, over gloo, because NCCL refuses two processes on one GPU."""
    overrides = ["rollout.sglang.transport=distributed", "rollout.sglang.distributed_backend=gloo"]
    return with_limits(train(setting, "gloo", overrides), BF16_LIMITS)


def disk(setting: Setting) -> Figures:
    """Weights by files; its mismatch is that of a policy and an engine in bf16."""
    return with_limits(train(setting, "disk", ["rollout.sglang.transport=disk"]), BF16_LIMITS)


# ---------------------------------------------------------------------- repeatable samples


def deterministic(setting: Setting) -> Figures:
    """The same requests three times: again in another order, and by a server that was restarted; in between,
    it releases its memory and takes it back."""
    if not setting.on_gpu:
        return {"missing": "SGLang has no deterministic attention on a CPU"}
    import torch

    config = config_of(setting, "deterministic", ["rollout.sglang.deterministic=true"])
    with run_of(config) as run:
        first = responses(run)
        memory = memory_in_turns(run.generation.engine, lambda: torch.cuda.mem_get_info()[0])
        run.generation.synchronize()
        reordered = responses(run, step=-1)
        kill_server(run)
        restarted = responses(run)
    figures = {
        "responses": len(first),
        "tokens": sum(len(tokens) for tokens, _ in first),
        "responses that differ in another order": differing(first, reordered, 0),
        "responses that differ after a restart": differing(first, restarted, 0),
        "log-probabilities that differ in another order": differing(first, reordered, 1),
        "log-probabilities that differ after a restart": differing(first, restarted, 1),
    }
    figures = with_limits(figures, {name: 0 for name in figures if "differ" in name})
    return joined(figures | memory, memory_not_released(memory, least_gib(config)))


TURNS = 5
NEARLY = 0.95
"""Other sections may allocate a little at the same moment."""


def memory_in_turns(engine: RolloutEngine, free: Callable[[], int]) -> Figures:
    """GiB that become free when the engine releases a part of its memory, and that it takes back.

    Measured from one moment to the next, as other sections use the same GPU.  The engine's weights are lost.
    """
    changes: dict[str, list[int]] = {"KV cache": [], "all": []}
    for part, values in changes.items():
        for _ in range(TURNS):
            before = free()
            engine.sleep(keeps_weights=part == "KV cache")
            between = free()
            engine.wake()
            values.append(min(between - before, between - free()))
    return {
        f"GiB released and taken back, {part}": statistics.median(v) / 2**30 for part, v in changes.items()
    }


def least_gib(config: Config) -> dict[str, float]:
    """GiB of the server's KV cache, and of that with its weights' largest matrices, in bf16."""
    model, tokens = config.policy.model, config.rollout.sglang.options["max_total_tokens"]
    assert model.num_query_groups is not None and model.kv_channels is not None
    cache = 4 * tokens * model.num_layers * model.num_query_groups * model.kv_channels
    weights = 6 * model.num_layers * model.hidden_size * model.ffn_hidden_size
    return {"KV cache": cache / 2**30, "all": (cache + weights) / 2**30}


def memory_not_released(memory: Figures, least: Mapping[str, float]) -> list[str]:
    """The parts of the engine's memory that are not released and taken back, as lines."""
    released = {part: memory[f"GiB released and taken back, {part}"] for part in least}
    return [
        f"the engine releases and takes back {released[part]:.3g} GiB ({part}), at least {gib:.3g}"
        for part, gib in least.items()
        if not released[part] >= NEARLY * gib
    ]


Response = tuple[list[int], list[float]]
"""Its tokens and their log-probabilities."""


def responses(run: Run, step: int = 1) -> list[Response]:
    """Of the requests of the run's first step, posted in order or backwards."""
    from opo_megatron.rollout.requests import requests_for, training_sampling

    requests = requests_for(run.prompts(1), run.config.rollout.samples_per_prompt, run.parallel)[::step]
    rollouts = run.generation.generate(requests, training_sampling(run.config, run.task, 1), "sampling")
    assert rollouts.engine_log_prob is not None
    log_probs = rollouts.engine_log_prob.split(rollouts.response_lengths.tolist())
    pairs = zip(rollouts.responses(), log_probs, strict=True)
    return [(tokens, values.tolist()) for tokens, values in pairs][::step]


def differing(first: Sequence[Response], other: Sequence[Response], part: int) -> int:
    return sum(one[part] != two[part] for one, two in zip(first, other, strict=True))


def kill_server(run: Run) -> None:
    os.kill(int((Path(run.config.run.dir) / "sglang" / "server_0.pid").read_text()), signal.SIGKILL)


def config_of(setting: Setting, name: str, overrides: Sequence[str]) -> Config:
    from opo_megatron.config import load_config

    every = [f"run.dir={setting.folder / name}", *overrides_of(setting, ["warm_start.steps=0", *overrides])]
    return load_config(RECIPE, every, 1)


@contextlib.contextmanager
def run_of(config: Config) -> Iterator[Run]:
    """A run of this process, whose engine has the policy's weights."""
    from opo_megatron.build import open_run

    with open_run(config, saves=False) as run:
        run.generation.synchronize()
        yield run


# ---------------------------------------------------------------------- FP8 on both sides


def fp8_bytes(setting: Setting) -> Figures:
    """Transformer Engine's operands, what is sent, and what the server holds, byte for byte."""
    if not setting.on_gpu:
        return {"missing": NO_FP8}
    if importlib.util.find_spec("transformer_engine") is None:
        return {"missing": "transformer_engine is not installed"}
    from opo_megatron.config.choices import Scales

    figures: Figures = {}
    for scales in (Scales.fp32, Scales.power_of_two):
        overrides = ["policy.fp8=blockwise", f"policy.fp8_scales={scales.value}"]
        config = config_of(setting, scales.value, overrides)
        counts = with_server(config) if scales is Scales.power_of_two else without_server(config)
        figures |= {f"{scales.value}: {name}": value for name, value in counts.items()}
    return with_limits(figures, {name: 0 for name in figures if "differ" in name})


def without_server(config: Config) -> dict[str, int]:
    """What differs between the trainer's operands and what would be sent."""
    from opo_megatron.build import joined_ranks, start_policy
    from opo_megatron.tasks import make_task

    with joined_ranks(config) as (parallel, _):
        vocab_size = make_task(config.task).vocab_size
        policy = start_policy(config, parallel, vocab_size, config.optimizer, needs_weights=True)
        return differences(policy.param_mapping, operands_of(policy), sent_by(config, policy))


def with_server(config: Config) -> dict[str, int]:
    """The same, and what differs between what was sent and what a server holds."""
    from opo_megatron.rollout.sglang.engine import SglangEngine

    with run_of(config) as run:
        sent = sent_by(config, run.policy)
        figures = differences(run.policy.param_mapping, operands_of(run.policy), sent)
        assert isinstance(run.generation.engine, SglangEngine)
        held = server_differences(run.generation.engine._clients[0], sent)
        return figures | {"bytes of the server that differ from those sent": held}


def sent_by(config: Config, policy: Policy) -> dict[str, Tensor]:
    """The tensors that a sync sends, by name."""
    from opo_megatron.weights.fp8_folder import engine_quantization

    fp8 = engine_quantization(config, policy.vocab_size)
    assert fp8 is not None
    pairs = [pair for bucket in policy.stream_weights() for pair in bucket]
    return {name: tensor for pair in pairs for name, tensor in fp8.tensors(*pair)}


def operands_of(policy: Policy) -> dict[str, tuple[Tensor, Tensor]]:
    """Bytes and scales that Transformer Engine's products take, by the name of Megatron's parameter.

    They are its modules' own: a forward pass runs, and each must have been an operand of a product.
    """
    operands: list[Any] = []
    with recorded_products(operands):
        forward(policy)
    found = {}
    for name, module in policy.chunks[0].named_modules():
        weight = getattr(module, "_fp8_workspaces", {}).get("weight")
        if weight is None:
            continue
        if not any(weight is operand for operand in operands):
            raise RuntimeError(f"no product took the quantized weight of {name}")
        rows, columns = weight._rowwise_data.shape
        scales = weight._rowwise_scale_inv[: -(-rows // 128), : -(-columns // 128)]  # padded for cuBLAS
        found[f"{name}.weight"] = (weight._rowwise_data, scales)
    return found


@contextlib.contextmanager
def recorded_products(operands: list[Any]) -> Iterator[None]:
    """Append the first operand of every product of Transformer Engine's linear layers."""
    from transformer_engine.pytorch.module import layernorm_linear, linear

    product = linear.general_gemm

    def recording(first: Any, *rest: Any, **named: Any) -> Any:
        operands.append(first)
        return product(first, *rest, **named)

    for module in (linear, layernorm_linear):
        module.general_gemm = recording
    try:
        yield
    finally:
        for module in (linear, layernorm_linear):
            module.general_gemm = product


def forward(policy: Policy) -> None:
    """One forward pass over a few tokens."""
    from opo_megatron.batch.rollouts import Rollouts

    tokens = [[i % policy.vocab_size for i in range(1, 33)]] * 8
    rollouts = Rollouts.from_demonstrations(tokens, tokens)
    schedule = policy.schedule(rollouts.sequence_lengths)
    policy.log_probs(rollouts.select(schedule.samples_of(0)), schedule, 1.0)


def differences(
    mapping: Sequence[Parameter],
    operands: Mapping[str, tuple[Tensor, Tensor]],
    sent: Mapping[str, Tensor],
) -> dict[str, int]:
    """The trainer's operands in Hugging Face's layout, against the tensors that are sent.

    Args:
        operands: bytes and scales of every quantized parameter, by Megatron's name.
        sent: tensors by Hugging Face's name, FP8 values with their `_scale_inv`.
    """
    import torch

    matrices = values = bad_values = bad_scales = 0
    unseen = {name for name, tensor in sent.items() if tensor.dtype is torch.float8_e4m3fn}
    for parameter in mapping:
        if parameter.mcore_name not in operands:
            continue
        quantized, scales = operands[parameter.mcore_name]
        wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[tuple(map(slice, quantized.shape))]
        names = [name for name, _ in parameter.tensors[0]]
        for name, own, own_scales in zip(
            names, parameter.sharding.join([quantized]), parameter.sharding.join([wide]), strict=True
        ):
            unseen.discard(name)
            scale = sent[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            matrices, values = matrices + 1, values + own.numel()
            bad_values += int((own != sent[name].view(torch.uint8)).sum())
            bad_scales += int((own_scales != scale).sum())
    return {
        "matrices": matrices,
        "bytes": values,
        "bytes of the trainer that differ from those sent": bad_values,
        "bytes of the trainer whose scale differs": bad_scales,
        "matrices sent in FP8 that differ from all of the trainer's": len(unseen),
    }


FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""Matrices of SGLang that are read back, and the tensors that they are made of."""


def server_differences(client: Client, sent: Mapping[str, Tensor]) -> int:
    """Values and scales of the first layer that the server returns otherwise than they were sent."""
    import torch

    bad = 0
    for fused, parts in FUSED.items():
        for kind in ("weight", "weight_scale_inv"):
            reply = client.post(
                "/get_weights_by_name", name=f"model.layers.0.{fused}.{kind}", truncate_size=2**30
            )
            expected = torch.cat([sent[f"model.layers.0.{part}.{kind}"].float().cpu() for part in parts])
            bad += int((torch.tensor(reply) != expected).sum())
    return bad


# ---------------------------------------------------------------------- four pairs of policy and engine


def fp8_pair(name: str, *overrides: str) -> Any:
    """A section: mismatch of an FP8 policy, against its engine."""

    def work(setting: Setting) -> Figures:
        if not setting.on_gpu:
            return {"missing": NO_FP8}
        figures = train(setting, name, ["policy.fp8=blockwise", *overrides])
        return figures if "rollout.sglang.fp8=false" in overrides else with_limits(figures, FP8_LIMITS)

    return work


ENGINE_SECTIONS: list[Section] = [
    Section("SGLang by CUDA IPC, memory in turns, a killed server", SERVER_SECONDS, ipc_and_a_killed_server),
    Section("SGLang by broadcast over gloo", SERVER_SECONDS, broadcast_over_gloo),
    Section("SGLang by files; pair: bf16 policy, bf16 engine", SERVER_SECONDS, disk),
    Section("SGLang with repeatable samples", SERVER_SECONDS, deterministic),
    Section("FP8: the bytes of trainer and server", SERVER_SECONDS, fp8_bytes),
    Section(
        "pair: FP8 policy, bf16 engine",
        SERVER_SECONDS,
        fp8_pair("fp8_bf16", "rollout.sglang.fp8=false", "on_policy.action=correct"),
    ),
    Section(
        "pair: FP8 policy and engine, float scales",
        SERVER_SECONDS,
        fp8_pair("fp8_fp32", "policy.fp8_scales=fp32"),
    ),
    Section(
        "pair: FP8 policy and engine, power-of-two scales",
        SERVER_SECONDS,
        fp8_pair("fp8_power_of_two", "policy.fp8_scales=power_of_two"),
    ),
]
"""Sections that look for faults: all of them may run side by side."""

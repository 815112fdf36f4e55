"""Sections of check_gpu.py for SGLang and FP8: what they find wrong, and, on a CPU, how far they go."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench import gpu_engine, gpu_runs
from bench.gpu_engine import (
    ENGINE_SECTIONS,
    differences,
    differing,
    forward,
    least_gib,
    memory_in_turns,
    memory_not_released,
    operands_of,
    responses,
    run_of,
    server_differences,
)
from bench.gpu_runs import medians, metrics_of, overrides_of, train
from bench.gpu_section import Setting

from opo_megatron.config import load_config
from opo_megatron.config.choices import Scales
from opo_megatron.distributed.process_groups import Parallel, initialize, shutdown
from opo_megatron.kernels.fp8 import quantize_blocks
from opo_megatron.weights.fp8_folder import BlockFp8
from tests.support.fixtures import VOCAB_SIZE, small_config, small_policy
from tests.support.servers import sglang_python

NEEDS_A_GPU = {"SGLang with repeatable samples", "FP8: the bytes of trainer and server"}
BLOCKS = (
    "policy.dtype=bf16",
    "policy.model.num_layers=2",
    "policy.model.hidden_size=256",
    "policy.model.ffn_hidden_size=256",
    "policy.model.kv_channels=128",
    "policy.model.num_attention_heads=4",
    "policy.model.num_query_groups=2",
)


def setting(folder: Path, device: str = "cpu", python: str = "python") -> Setting:
    return Setting(device, folder, python, ("grammar_backend=none",))


def test_every_section_has_a_name_of_its_own_and_fits_the_budget() -> None:
    names = [section.name for section in ENGINE_SECTIONS]
    assert len(set(names)) == len(names) and all(section.seconds <= 150 for section in ENGINE_SECTIONS)
    assert not any(section.alone for section in ENGINE_SECTIONS)  # no figure of theirs is a limit on time


@pytest.mark.parametrize(
    "section", [one for one in ENGINE_SECTIONS if one.name in NEEDS_A_GPU or "FP8 policy" in one.name],
    ids=lambda one: one.name,
)  # fmt: skip
def test_what_needs_a_gpu_says_so_on_a_cpu(section: Any, tmp_path: Path) -> None:
    (missing,) = section.run(setting(tmp_path)).items()
    assert missing[0] == "missing" and "CPU" in missing[1]


ANYWHERE = (
    ("rollout.sglang.transport=tensor", "rollout.sglang.share_memory=true"),
    ("rollout.sglang.transport=distributed", "rollout.sglang.distributed_backend=gloo"),
    ("rollout.sglang.transport=disk",),
)
ON_A_GPU = (
    ("rollout.sglang.deterministic=true",),
    ("policy.fp8=blockwise", "rollout.sglang.fp8=false", "on_policy.action=correct"),
    ("policy.fp8=blockwise", "policy.fp8_scales=fp32"),
    ("policy.fp8=blockwise", "policy.fp8_scales=power_of_two"),
)


@pytest.mark.parametrize(
    ("device", "overrides"),
    [("cpu", one) for one in ANYWHERE] + [("cuda", one) for one in (*ANYWHERE, *ON_A_GPU)],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_the_runs_of_the_sections_are_recipes_that_load(
    device: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    every = overrides_of(setting(tmp_path, device, "/other/python"), overrides)
    config = load_config(gpu_runs.RECIPE, [f"run.dir={tmp_path}", *every], 1)
    assert config.rollout.sglang.python == "/other/python" and config.policy.device.value == device
    assert config.rollout.sglang.options["grammar_backend"] == "none"
    assert (config.policy.model.num_layers == gpu_runs.SMALL["num_layers"]) is (device == "cuda")


# ---------------------------------------------------------------------- bytes


@pytest.fixture
def parallel() -> Iterator[Parallel]:
    yield initialize(small_config())
    shutdown()


@pytest.fixture(params=Scales, ids=lambda scales: scales.value)
def both_sides(request: Any, parallel: Parallel) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A policy's mapping; its matrices quantized whole, as Transformer Engine does; what a sync sends."""
    policy = small_policy(small_config(*BLOCKS), parallel)
    operands = {}
    for parameter in policy.param_mapping:
        weight = policy.chunks[0].get_parameter(parameter.mcore_name)
        if weight.dim() == 2 and ".layers." in parameter.mcore_name:
            values, scales = quantize_blocks("w", weight.detach(), request.param)
            operands[parameter.mcore_name] = (values.view(torch.uint8), scales)
    model = small_config(*BLOCKS).policy.model
    model.vocab_size = VOCAB_SIZE
    fp8 = BlockFp8(model, request.param)
    pairs = [pair for bucket in policy.stream_weights() for pair in bucket]
    return policy.param_mapping, operands, {n: t.clone() for pair in pairs for n, t in fp8.tensors(*pair)}


def test_equal_bytes_are_found_equal_through_every_layout(both_sides: Any) -> None:
    counts = differences(*both_sides)
    assert counts.pop("matrices") == 2 * 7 and counts.pop("bytes") == sum(
        tensor.numel() for tensor in both_sides[2].values() if tensor.dtype is torch.float8_e4m3fn
    )
    assert set(counts.values()) == {0}


@pytest.mark.parametrize(
    "name",
    [
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ],
)
@pytest.mark.parametrize("what", ["byte", "scale", "missing operand"])
def test_a_single_difference_is_found(name: str, what: str, both_sides: Any) -> None:
    mapping, operands, sent = both_sides
    (full,) = [key for key in sent if key.endswith(f"layers.1.{name}.weight")]
    if what == "byte":
        sent[full].view(torch.uint8)[130, 5] ^= 1
        key, count = "bytes of the trainer that differ from those sent", 1
    elif what == "scale":
        sent[full + "_scale_inv"][1, 0] *= 2
        key, count = "bytes of the trainer whose scale differs", 128 * 128
    else:
        owner = next(p for p in mapping if full in [n for n, _ in p.tensors[0]])
        del operands[owner.mcore_name]
        key, count = "matrices sent in FP8 that differ from all of the trainer's", len(owner.tensors[0])
    counts = differences(mapping, operands, sent)
    assert counts.pop(key) == count
    assert all(value == 0 for other, value in counts.items() if "differ" in other)


@pytest.mark.parametrize("change", [0, 1, 7])
def test_what_a_server_holds_is_compared_with_what_was_sent(change: int, both_sides: Any) -> None:
    _, _, sent = both_sides

    class Client:
        def post(self, path: str, name: str, truncate_size: int) -> list[list[float]]:
            assert path == "/get_weights_by_name"
            layer, kind = name.removeprefix("model.layers.0.").rsplit(".", 1)
            parts = [sent[f"model.layers.0.{part}.{kind}"].float() for part in gpu_engine.FUSED[layer]]
            held = torch.cat(parts)
            if layer == "self_attn.qkv_proj" and kind == "weight":
                held.flatten()[:change] += 1
            values: list[list[float]] = held.tolist()
            return values

    client: Any = Client()
    assert server_differences(client, sent) == change


# ---------------------------------------------------------------------- figures


class FakeEngine:
    """Two gigabytes of KV cache and one of weights, on a GPU where another process allocates now and then."""

    def __init__(self, kept: float = 0.0, other: float = 0.0) -> None:
        self.free, self.kept, self.other, self.asleep, self.turns = 40.0, kept, other, 0.0, 0

    def sleep(self, keeps_weights: bool) -> None:
        self.asleep = (2.0 if keeps_weights else 3.0) - self.kept
        self.turns += 1
        self.free += self.asleep - (self.other if self.turns % 5 == 1 else 0)

    def wake(self) -> None:
        self.free -= self.asleep


@pytest.mark.parametrize(
    ("kept", "other", "missed"),
    [
        (0.0, 0.0, ()),
        (0.0, 7.0, ()),
        (0.5, 0.0, ("KV cache", "all")),
        (2.0, 0.0, ("KV cache", "all")),
        (-1.0, 0.0, ()),
    ],
    ids=[
        "all released",
        "while another section allocates",
        "a part is kept",
        "nothing released",
        "more than needed",
    ],
)
def test_memory_that_an_engine_does_not_release_is_named(
    kept: float, other: float, missed: tuple[str, ...]
) -> None:
    engine: Any = FakeEngine(kept, other)
    memory = memory_in_turns(engine, lambda: int(engine.free * 2**30))
    lines = memory_not_released(memory, {"KV cache": 2.0, "all": 3.0})
    assert len(lines) == len(missed) and all(
        f"({part})" in line for part, line in zip(missed, lines, strict=True)
    )


def test_a_servers_memory_is_at_least_its_cache(tmp_path: Path) -> None:
    config = load_config(gpu_runs.RECIPE, overrides_of(setting(tmp_path, "cuda"), [f"run.dir={tmp_path}"]), 1)
    least = least_gib(config)
    assert (
        least["KV cache"] == 65536 * 14 * 2 * 2 * 128 * 2 / 2**30
    )  # tokens, layers, K and V, heads, d, bytes
    assert least["all"] - least["KV cache"] == 14 * 3 * 1024 * 2816 * 2 / 2**30


def test_responses_are_compared_token_by_token_and_bit_by_bit() -> None:
    first = [([1, 2], [-0.5, -0.25]), ([3], [-1.0])]
    assert differing(first, first, 0) == differing(first, first, 1) == 0
    assert differing(first, [([1, 3], [-0.5, -0.25]), first[1]], 0) == 1
    assert differing(first, [first[0], ([3], [-1.0000001])], 1) == 1


def test_figures_are_medians_of_the_steps_after_the_first(tmp_path: Path) -> None:
    rows = [
        {
            "step": step,
            "time/step": 10.0**-step,
            "run/engine_failures": step,
            "memory/engine_sync_gpu_gib": 9.0,
        }
        for step in range(5)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5')
    assert metrics_of(tmp_path) == rows
    assert medians(rows) == {"time/step": 1e-3, "run/engine_failures": 4, "steps": 3}
    assert medians(rows[:2])["steps"] == 1 and metrics_of(tmp_path / "none") == []


def test_a_run_that_fails_raises_with_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)failing\.log:.*train\.steps is -1.*ended with exit code 2"):
        train(setting(tmp_path, python="/nowhere/python"), "failing", ["train.steps=-1"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "section", [one for one in ENGINE_SECTIONS if one.name.startswith("SGLang by")], ids=lambda one: one.name
)
def test_the_transports_run_on_a_cpu(section: Any, tmp_path: Path) -> None:
    figures = section.run(Setting("cpu", tmp_path, sglang_python()))
    assert "not met" not in figures and figures["steps"] >= 3
    assert figures["run/engine_failures"] == ("killed" in section.name)
    assert 0 < figures["on_policy/logprob_diff_mean"] < 0.05 and figures["on_policy/ess"] > 0.99


# ---------------------------------------------------------------------- parts of the sections for GPUs


class Workspace:
    """A quantized weight of Transformer Engine: bytes, and scales padded to a multiple of 4."""

    def __init__(self, rows: int, columns: int) -> None:
        self._rowwise_data = torch.arange(rows * columns).to(torch.uint8).view(rows, columns)
        self._rowwise_scale_inv = torch.ones(-(-rows // 128), -(-(columns // 128) // 4) * 4)


@pytest.mark.parametrize("is_used", [True, False])
def test_only_operands_of_products_count(is_used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied: list[Any] = []
    linear = SimpleNamespace(general_gemm=lambda weight, x, bias=None: multiplied.append((weight, x, bias)))
    norm_linear = SimpleNamespace(general_gemm=linear.general_gemm)
    module = SimpleNamespace(linear=linear, layernorm_linear=norm_linear)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module", module)
    chunk = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity())
    workspaces = [Workspace(256, 384), Workspace(128, 256)]
    for child, workspace in zip(chunk, workspaces, strict=False):
        child._fp8_workspaces = {"weight": workspace}  # type: ignore[assignment]

    def forward(policy: Any) -> None:
        linear.general_gemm(workspaces[0], 1, bias=2)
        norm_linear.general_gemm(workspaces[1] if is_used else Workspace(128, 256), 3)

    monkeypatch.setattr(gpu_engine, "forward", forward)
    policy: Any = SimpleNamespace(chunks=[chunk])
    original = linear.general_gemm
    if not is_used:
        with pytest.raises(RuntimeError, match="no product took the quantized weight of 1"):
            operands_of(policy)
    else:
        found = operands_of(policy)
        assert set(found) == {"0.weight", "1.weight"}
        assert found["0.weight"][0] is workspaces[0]._rowwise_data and found["0.weight"][1].shape == (2, 3)
    assert linear.general_gemm is norm_linear.general_gemm is original
    assert multiplied[0] == (workspaces[0], 1, 2) and len(multiplied) == 2


def test_a_forward_pass_of_a_policy_runs(parallel: Parallel) -> None:
    policy = small_policy(small_config(*BLOCKS), parallel)
    seen: list[None] = []
    policy.on_micro_batch = lambda: seen.append(None)
    forward(policy)
    assert seen


def test_repeated_requests_are_compared_in_the_order_of_the_first(tmp_path: Path) -> None:
    """With the local engine, whose samples are repeatable in any order."""
    config = small_config(f"run.dir={tmp_path / 'run'}", "observe.tensorboard=false", "warm_start.steps=0")
    with run_of(config) as run:
        first, again, reordered = responses(run), responses(run), responses(run, step=-1)
    assert len(first) == 48 * 8 and first == again
    assert differing(first, reordered, 0) == 0  # in bits, another order rounds otherwise
    assert differing(first, first[::-1], 0) > 0

"""Exact mode: log-probabilities recorded while sampling equal those of the training pass bit for bit."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config import Config
from opo_megatron.config.choices import Dtype
from opo_megatron.distributed.process_groups import Parallel, initialize, shutdown
from opo_megatron.errors import OnPolicyError, UserError
from opo_megatron.kernels import exact
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.exact_check import check_exact, check_exact_device
from opo_megatron.rollout.exact_trace import policy_digests
from opo_megatron.rollout.local import sampler
from opo_megatron.rollout.local.decoder import Decoder
from opo_megatron.rollout.local.engine import LocalEngine
from tests.support.altered_operations import IN_DECODER, NAMED
from tests.support.fixtures import VOCAB_SIZE, small_config
from tests.support.policies import make_exact

EXACT = "rollout.local.exact=true"
MODELS = {
    "grouped-query attention, QK-norm": (),
    "multi-head attention": ("num_query_groups=4", "qk_layernorm=false"),
    "QKV biases": ("add_qkv_bias=true", "qk_layernorm=false"),
    "tied embeddings": ("tie_embeddings=true",),
    "RoPE scaling": (
        "rope_scaling.type=llama3",
        "rope_scaling.factor=4",
        "rope_scaling.original_max_sequence_length=16",
    ),
    "odd sizes": ("hidden_size=36", "ffn_hidden_size=50", "kv_channels=10", "num_query_groups=1"),
}


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    yield initialize(small_config())
    shutdown()


def generate(
    policy: Policy, config: Config, slots: int, temperature: float, count: int = 36, longest_prompt: int = 12
) -> Rollouts:
    """Responses to prompts of various lengths, sampled with the policy's weights."""
    engine = LocalEngine(
        config.policy.model,
        VOCAB_SIZE,
        torch.float32,
        torch.device("cpu"),
        slots,
        config.rollout.local.exact,
    )
    engine.update_weights(policy.stream_weights(), policy.version)
    rng = random.Random(slots)
    prompts = [
        tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, longest_prompt))) for _ in range(count)
    ]
    requests = [GenerationRequest(i, i, 0, prompt) for i, prompt in enumerate(prompts)]
    sampling = Sampling(max_tokens=20, stop_tokens=(0, 1), seed=(1,), temperature=temperature)
    rollouts = engine.generate(requests, sampling)
    rollouts.advantages = (torch.arange(count) % 3).double() - 1
    return rollouts


def difference(policy: Policy, rollouts: Rollouts, budget: int, temperature: float) -> float:
    """max |Δ log π| of a training pass, a third of it forward-only, in micro-batches of `budget` tokens."""
    policy.config.max_tokens_per_micro_batch = budget
    schedule = policy.schedule(rollouts.sequence_lengths, rollouts.advantages == 0)
    batch = rollouts.select(schedule.samples_of(0))
    metrics = policy.checked_gradients(batch, schedule, PolicyGradient(100.0, temperature))
    assert metrics.mismatch is not None
    return metrics.mismatch.max


@pytest.mark.parametrize("model", MODELS)
def test_recorded_log_probs_equal_the_training_pass_bit_for_bit(parallel: Parallel, model: str) -> None:
    config, policy = make_exact(parallel, *MODELS[model])
    for slots, temperature in ((1, 1.0), (3, 0.7), (5, 1.0), (30, 1.3)):
        rollouts = generate(policy, config, slots, temperature)
        assert rollouts.response_lengths.unique().numel() > 5
        for budget in (1, 100, 5000) if slots == 5 else (150,):
            assert difference(policy, rollouts, budget, temperature) == 0.0, (slots, budget)


def test_log_probs_are_exact_beyond_one_block_of_keys(parallel: Parallel) -> None:
    config, policy = make_exact(parallel, "max_sequence_length=400")
    rollouts = generate(policy, config, 3, 1.0, count=8, longest_prompt=380)
    assert rollouts.prompt_lengths.max() > 2 * exact.KEY_BLOCK
    assert difference(policy, rollouts, 1000, 1.0) == difference(policy, rollouts, 4000, 1.0) == 0.0


def test_without_exact_mode_log_probs_differ_by_rounding(parallel: Parallel) -> None:
    config, policy = make_exact(parallel, exact=False)
    assert difference(policy, generate(policy, config, 3, 1.0), 150, 1.0) > 0


def test_exact_mode_generates_the_same_responses(parallel: Parallel) -> None:
    """The same uniforms and, up to rounding, the same probabilities: the same distribution."""
    results = []
    for is_exact in (True, False):
        config, policy = make_exact(parallel, exact=is_exact)
        results.append(generate(policy, config, 16, 1.0, count=200))
    assert results[0].responses() == results[1].responses()
    torch.testing.assert_close(results[0].engine_log_prob, results[1].engine_log_prob, rtol=0, atol=5e-5)


def test_parameters_and_log_probs_are_those_of_the_standard_model(parallel: Parallel) -> None:
    (config, policy), (_, standard) = make_exact(parallel), make_exact(parallel, exact=False)
    shapes = [{n: p.shape for n, p in one.chunks[0].named_parameters()} for one in (policy, standard)]
    assert shapes[0] == shapes[1]
    rollouts = generate(policy, config, 16, 1.0)
    schedule = policy.schedule(rollouts.sequence_lengths)
    batch = rollouts.select(schedule.samples_of(0))
    log_probs = policy.log_probs(batch, schedule, 1.0), standard.log_probs(batch, schedule, 1.0)
    torch.testing.assert_close(*log_probs, rtol=0, atol=5e-5)


# ---------------------------------------------------------------------- the check before a run


def engine_for(config: Config) -> LocalEngine:
    dtype = torch.bfloat16 if config.policy.dtype is Dtype.bf16 else torch.float32
    return LocalEngine(config.policy.model, VOCAB_SIZE, dtype, torch.device("cpu"), 24, exact=True)


def test_the_check_passes_and_leaves_no_gradient(parallel: Parallel) -> None:
    config, policy = make_exact(parallel)
    engine = engine_for(config)
    assert check_exact(config, policy, engine, parallel) > 300
    assert engine.slots == 24 and engine.version == policy.version
    assert not any(parameter.main_grad.any() for parameter in policy.chunks[0].parameters())


def off_by_one_bit(log_softmax: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def perturbed(logits: Tensor, temperature: float) -> Tensor:
        log_probs = log_softmax(logits, temperature)
        if log_probs.shape[0] == 1:  # only where a single response is decoded
            log_probs = torch.nextafter(log_probs, torch.tensor(-torch.inf))
        return log_probs

    return perturbed


@pytest.mark.parametrize("operation", NAMED)
def test_the_check_names_an_operation_that_is_taken_out(
    operation: str, parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if operation == "sampler":
        monkeypatch.setattr(sampler, "log_softmax", off_by_one_bit(exact.log_softmax))
    else:
        IN_DECODER[operation](Decoder, monkeypatch.setattr)
    config, policy = make_exact(parallel)
    with pytest.raises(
        OnPolicyError,
        match=rf"with 1 slots engine and policy differ by .* first in {NAMED[operation]}, so .* set ",
    ):
        check_exact(config, policy, engine_for(config), parallel)


def test_the_check_detects_rows_that_depend_on_their_batch(
    parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "QUERY_ROWS", 1)
    config, policy = make_exact(parallel)
    with pytest.raises(OnPolicyError, match=r"engine and policy differ by .* first in the attention of"):
        check_exact(config, policy, engine_for(config), parallel)


def test_the_check_detects_samples_that_depend_on_their_batch(
    parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    inverse_cdf = sampler.inverse_cdf

    def altered(p: Tensor, uniform: Tensor) -> Tensor:
        return inverse_cdf(p, uniform if len(p) > 1 else 1 - uniform)

    monkeypatch.setattr(sampler, "inverse_cdf", altered)
    config, policy = make_exact(parallel)
    with pytest.raises(OnPolicyError, match=r"with 3 slots the sampler samples other tokens from the same"):
        check_exact(config, policy, engine_for(config), parallel)


SGLANG = ("rollout.engine=sglang", "rollout.sglang.exact=true")


@pytest.mark.parametrize(
    ("switch", "override"),
    [
        *((EXACT, one) for one in ("rollout.engine=sglang", "run.threads_per_rank=2")),
        (EXACT, "policy.model.num_moe_experts=4"),
        *((SGLANG[1], one) for one in ("rollout.engine=local", "run.threads_per_rank=2")),
        (SGLANG[1], "rollout.sglang.fp8=true"),
        (SGLANG[1], "policy.fp8=blockwise"),
    ],
)
def test_settings_that_cannot_be_exact_are_rejected(switch: str, override: str) -> None:
    key = override.split("=")[0]
    before = (SGLANG[0],) if switch == SGLANG[1] else ()
    with pytest.raises(
        UserError, match=rf"{re.escape(switch)} needs {key}=.*, but it is .*; set {key}=.* or "
    ):
        small_config(*before, switch, override)


ON_GPUS = ("policy.device=cuda", "policy.dtype=bf16")


@pytest.mark.parametrize("switch", [(EXACT,), SGLANG], ids=["local", "sglang"])
@pytest.mark.parametrize(
    "setting",
    [
        (),
        ("run.threads_per_rank=2",),
        ("policy.packing=thd",),
        ("policy.exact_sum_parts=2",),
        ("policy.sequence_parallel=false", "rollout.temperature=0.7"),
    ],
    ids=" ".join,
)
def test_a_dense_model_in_bf16_may_be_exact_on_gpus(
    switch: tuple[str, ...], setting: tuple[str, ...]
) -> None:
    assert small_config(*switch, *ON_GPUS, *setting).policy.device.value == "cuda"


@pytest.mark.parametrize("switch", [(EXACT,), SGLANG], ids=["local", "sglang"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.dtype=fp32", "policy.dtype=bf16, but it is fp32"),
        ("policy.fp8=tensorwise", "policy.fp8=null, but it is tensorwise"),
        ("policy.fp8=blockwise", "policy.fp8=null, but it is blockwise"),
        ("policy.model.num_moe_experts=4", "policy.model.num_moe_experts=null, but it is 4"),
        ("policy.exact_sum_parts=0", "policy.exact_sum_parts is 0; it must be at least 1"),
    ],
)
def test_what_stays_refused_on_gpus_is_named(switch: tuple[str, ...], override: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        small_config(*switch, *ON_GPUS, override)


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cpu", "fp32", None),
        ("cpu", "bf16", None),
        ("cuda", "bf16", None),
        ("cuda", "fp32", "needs policy.dtype=bf16, but it is fp32"),
        ("xpu", "bf16", "needs policy.device=cpu, but it is xpu"),
    ],
)
def test_the_device_that_auto_finds_is_checked(device: str, dtype: str, message: str | None) -> None:
    config, parallel = (
        small_config(EXACT, f"policy.dtype={dtype}"),
        SimpleNamespace(device=torch.device(device)),
    )
    if message is None:
        check_exact_device(config, parallel)  # type: ignore[arg-type]
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            check_exact_device(config, parallel)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ranks", "parts", "message"),
    [
        (2, 1, "policy.exact_sum_parts to be a multiple of it, but it is 1; set policy.exact_sum_parts=2"),
        (4, 2, "policy.exact_sum_parts to be a multiple of it, but it is 2; set policy.exact_sum_parts=4"),
        (2, 3, "policy.exact_sum_parts to be a multiple of it, but it is 3; set policy.exact_sum_parts=2"),
        (1, 5, "ffn_hidden_size is 48, which is not divisible by policy.exact_sum_parts=5"),
        (1, 3, "attention heads is 32, which is not divisible by policy.exact_sum_parts=3"),
        (1, 0, "policy.exact_sum_parts is 0; it must be at least 1"),
    ],
)
def test_parts_of_sums_are_split_evenly_over_ranks(ranks: int, parts: int, message: str) -> None:
    layout = (f"policy.tensor_model_parallel_size={ranks}", "policy.model.num_query_groups=4")
    with pytest.raises(UserError, match=re.escape(message)):
        small_config(EXACT, *layout, f"policy.exact_sum_parts={parts}", world_size=ranks)


@pytest.mark.parametrize(
    ("trainers", "servers", "parts", "message"),
    [
        (1, 2, 1, "tensor_parallel_size=2 needs policy.exact_sum_parts to be a multiple of it, but it is 1"),
        (1, 4, 2, "but it is 2; set policy.exact_sum_parts=4"),
        (2, 3, 2, "but it is 2; set policy.exact_sum_parts=6"),
        (4, 2, 2, "policy.tensor_model_parallel_size=4 needs policy.exact_sum_parts to be a multiple of it"),
        (1, 8, 8, "num_query_groups is 4, which is not divisible by rollout.sglang.tensor_parallel_size=8"),
        (2, 4, 4, None),
        (4, 1, 8, None),
    ],
)
def test_parts_of_sums_are_split_evenly_over_a_servers_ranks(
    trainers: int, servers: int, parts: int, message: str | None
) -> None:
    settings = (
        f"policy.tensor_model_parallel_size={trainers}",
        f"rollout.sglang.tensor_parallel_size={servers}",
        f"policy.exact_sum_parts={parts}",
        "policy.model.num_query_groups=4",
    )
    if message is None:
        small_config(*SGLANG, *settings, world_size=8)
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            small_config(*SGLANG, *settings, world_size=8)


def test_parts_of_sums_need_exact_mode() -> None:
    with pytest.raises(UserError, match=r"exact_sum_parts is 2, but only exact mode adds sums in parts"):
        small_config("policy.exact_sum_parts=2")


def test_experts_are_refused_with_sglang_too() -> None:
    with pytest.raises(UserError, match=r"num_moe_experts"):
        small_config(*SGLANG, "policy.model.num_moe_experts=4")


@pytest.mark.parametrize(
    "option",
    [
        "kv_cache_dtype=fp8_e5m2",
        "quantization=fp8",
        "enable_deterministic_inference=true",
        "attention-backend=triton",
        "sampling_backend=flashinfer",
        "rl-on-policy-target=fsdp",
        "enable_torch_compile=true",
        "speculative_algorithm=NGRAM",
        "cuda_graph_backend_prefill=breakable",
        "cuda-graph-backend-decode=tc_piecewise",
        "dtype=bfloat16",
    ],
)
def test_options_of_a_server_that_may_change_an_operation_are_refused(option: str) -> None:
    with pytest.raises(
        UserError, match=r"chooses the server's operations, and rollout\.sglang\.options\..*remove"
    ):
        small_config(*SGLANG, f"rollout.sglang.options.{option}")


def test_options_of_a_server_that_change_no_operation_are_taken() -> None:
    options = ["chunked_prefill_size=64", "enable-mixed-chunk=true", "log_level=info"]
    options += ["cuda_graph_max_bs_decode=64", "cuda-graph-bs-decode=[1,8]", "disable_cuda_graph=true"]
    small_config(*SGLANG, *(f"rollout.sglang.options.{option}" for option in options))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("packing", ["padded", "thd"])
def test_both_types_and_both_forms_of_a_micro_batch_are_exact(
    parallel: Parallel, dtype: str, packing: str
) -> None:
    config, policy = make_exact(parallel, precision=(f"policy.dtype={dtype}", f"policy.packing={packing}"))
    assert check_exact(config, policy, engine_for(config), parallel) > 300


@pytest.mark.parametrize("model", MODELS)
def test_engine_and_policy_have_the_same_digest_of_every_operation(parallel: Parallel, model: str) -> None:
    config, policy = make_exact(parallel, *MODELS[model])
    engine = engine_for(config)
    engine.update_weights(policy.stream_weights(), policy.version)
    prompts = [(3,), (5, 1, 2), tuple(range(17))]
    requests = [GenerationRequest(i, i, 0, prompt) for i, prompt in enumerate(prompts)]
    rollouts, digests = engine.trace(requests, Sampling(max_tokens=5, stop_tokens=(0,), seed=(1,)))
    for i, expected in enumerate(digests):
        assert policy_digests(policy, parallel, rollouts.select([i])) == expected
        assert len(expected) > 9 * config.policy.model.num_layers


# ---------------------------------------------------------------------- operations


@pytest.mark.parametrize("columns", [1, 2, 10, 33])
def test_rows_of_a_linear_layer_do_not_depend_on_their_count(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 31, generator=generator), torch.randn(columns, 31, generator=generator)
    full = exact.linear(x, weight)
    torch.testing.assert_close(full, (x.double() @ weight.double().t()).float())
    for rows in (0, 1, 2, 3, 4, 5, 9, 31, 33, 48, 49, 63, 64, 65, 68, 130):
        assert torch.equal(exact.linear(x[70 - rows // 2 :][:rows], weight), full[70 - rows // 2 :][:rows])


def test_the_gradient_of_a_linear_layer_is_the_standard_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, 20, generator=generator, requires_grad=True)
    weight = torch.randn(12, 20, generator=generator, requires_grad=True)
    actual = torch.autograd.grad(exact.linear(x, weight).square().sum(), (x, weight))
    expected = torch.autograd.grad(F.linear(x, weight).square().sum(), (x, weight))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_the_sum_of_parts_is_the_same_on_any_number_of_ranks(parts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(70, 64, generator=generator), torch.randn(40, 64, generator=generator)
    whole = exact.linear(x, weight, parts)
    torch.testing.assert_close(whole, x @ weight.t(), rtol=1e-5, atol=1e-5)
    for ranks in (2, parts):
        shards = zip(x.chunk(ranks, 1), weight.chunk(ranks, 1), strict=True)
        own = [exact.partial_products(rows, columns, parts // ranks) for rows, columns in shards]
        assert torch.equal(exact.add_in_order(torch.cat(own)), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 24, 48, 176, 352])
def test_silu_of_an_element_depends_on_nothing_else(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, 2 * width, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = exact.silu(x)
    torch.testing.assert_close(whole, F.silu(x), rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)
    for part in (slice(0, width), slice(width, None)):
        assert torch.equal(exact.silu(x[:, part]), whole[:, part])
        assert torch.equal(exact.silu(x[2:3, part]), whole[2:3, part])


@pytest.mark.parametrize("length", [1, 7, 16, 130, 300])
def test_attention_and_its_gradient_equal_the_standard_ones(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(2, length, heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)
    )
    mask = exact.causal_mask(length, torch.device("cpu"))
    actual = exact.attention(query, keys.transpose(1, 2), values.transpose(1, 2), mask)
    expected = F.scaled_dot_product_attention(
        query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(actual, expected)
    inputs = (query, keys, values)
    gradients = [torch.autograd.grad(output.square().sum(), inputs) for output in (actual, expected)]
    torch.testing.assert_close(*gradients)

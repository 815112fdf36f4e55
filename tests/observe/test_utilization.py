"""Model FLOPs of the training phase, against the operations that PyTorch counts while a policy trains."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opo_megatron.algorithm.config import AlgorithmConfig, ObjectiveName
from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.batch.stats import BatchStats
from opo_megatron.config.schema import ModelConfig
from opo_megatron.distributed.process_groups import Parallel
from opo_megatron.observe.step_metrics import throughput_metrics
from opo_megatron.observe.utilization import forward_flops, peak_tflops, training_passes, training_tflop
from tests.support.fixtures import VOCAB_SIZE, ragged_rollouts
from tests.support.policies import make_policy
from tests.support.policies import parallel as parallel

EXPERTS = ("policy.model.num_moe_experts=4", "policy.model.moe_ffn_hidden_size=24")


def masked_half(model: ModelConfig, tokens: int) -> int:
    """Operations of the masked half of both attention products, which Megatron's local layers compute too."""
    assert model.kv_channels is not None
    return 2 * model.num_layers * model.num_attention_heads * model.kv_channels * tokens**2


@pytest.mark.parametrize("sample", [0, 5, 11, 17, 23])
@pytest.mark.parametrize("overrides", [(), EXPERTS], ids=["dense", "experts"])
def test_flops_of_a_sample_are_those_that_pytorch_counts(
    parallel: Parallel, sample: int, overrides: tuple[str, ...]
) -> None:
    policy, config = make_policy(parallel, *overrides)
    one = ragged_rollouts().select([sample])
    one.advantages = torch.ones(1, dtype=torch.float64)
    schedule = policy.schedule(one.sequence_lengths)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, *, out_shape, **kwargs: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        policy.accumulate_gradients(one, schedule, PolicyGradient(1.0, 1.0))
    forward = forward_flops(config.policy.model, VOCAB_SIZE, one.prompt_lengths, one.response_lengths)
    masked = 3 * masked_half(config.policy.model, int(one.sequence_lengths) - 1)
    assert counter.get_total_flops() - masked == pytest.approx(3 * float(forward), rel=1e-9)


def test_passes_of_a_sample_are_those_that_it_runs() -> None:
    advantages = torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64)
    clipped = AlgorithmConfig(objective=ObjectiveName.clipped)
    with_reference = AlgorithmConfig(objective=ObjectiveName.clipped, kl_coefficient=0.1)
    assert training_passes(AlgorithmConfig(), advantages).tolist() == [3, 1, 3]
    assert training_passes(clipped, advantages).tolist() == [4, 4, 4]
    assert training_passes(with_reference, advantages).tolist() == [5, 5, 5]


def test_a_published_size_comes_out_at_6_n_per_token() -> None:
    """Llama-3-70B: 70.55 billion parameters, of which 1.05 are the embedding's."""
    from opo_megatron.plan.models import MODELS

    model = MODELS["Llama-3-70B"]
    short, none = torch.tensor([1]), torch.zeros(1, dtype=torch.int64)
    stats = BatchStats(none, short, short, none, torch.ones(1, dtype=torch.float64))
    tflop = training_tflop(model, 128256, AlgorithmConfig(), stats, torch.ones(1, dtype=torch.float64))
    assert tflop == pytest.approx(6 * (70.5537 - 1.0507) * 1e9 / 1e12, rel=1e-3)


def test_utilization_is_operations_over_time_and_peak() -> None:
    row = {"time/train": 2.0, "tokens/response": 30, "tokens/processed": 50, "compute/train_tflop": 4.0}
    known = throughput_metrics(row, 8.0)
    assert known["throughput/train_tokens_per_second"] == 15
    assert known["throughput/train_tokens_processed_per_second"] == 25
    assert known["throughput/mfu"] == 0.25
    assert "throughput/mfu" not in throughput_metrics(row, None)


def test_a_cpu_has_no_peak(parallel: Parallel) -> None:
    assert peak_tflops(parallel) is None

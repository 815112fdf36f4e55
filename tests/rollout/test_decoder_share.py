"""A decoder in exact mode that several ranks share, as those of an SGLang server do: the bits of one rank."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from opo_megatron.kernels import exact
from opo_megatron.rollout.local.decoder import Decoder, Share
from tests.support.fixtures import small_config

VOCAB, LENGTH = 40, 19
MODELS = {
    "llama": (),
    "tied": ("policy.model.tie_embeddings=true",),
    "biases": ("policy.model.add_qkv_bias=true",),
    "qk norm": ("policy.model.qk_layernorm=true", "policy.model.kv_channels=16"),
    "grouped": ("policy.model.num_attention_heads=8", "policy.model.num_query_groups=4"),
}
Outputs = tuple[Tensor, dict[str, Tensor]]


class Meeting:
    """`gather` of threads that stand for ranks."""

    def __init__(self, ranks: int) -> None:
        self._barrier, self._tensors = threading.Barrier(ranks, timeout=60), [torch.empty(0)] * ranks

    def gather_of(self, rank: int) -> Callable[[Tensor, int], Tensor]:
        def gather(tensor: Tensor, dim: int) -> Tensor:
            self._tensors[rank] = tensor
            self._barrier.wait()
            gathered = torch.cat(self._tensors, dim)
            self._barrier.wait()
            return gathered

        return gather


def outputs_of(overrides: tuple[str, ...], dtype: torch.dtype, parts: int, share: Share | None) -> Outputs:
    """Logits of a sequence, and the output of every operation."""
    model = small_config(*overrides).policy.model
    decoder = Decoder(model, VOCAB, dtype, torch.device("cpu"), exact=True, sum_parts=parts, share=share)
    whole = Decoder(model, VOCAB, dtype, torch.device("cpu"), exact=True)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in whole._slices.items():
        decoder.load(name, torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(dtype) / 4)
    seen: dict[str, Tensor] = {}
    decoder.observe = lambda operation, output: seen.update({operation: output.clone()})

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = exact.causal_mask(LENGTH, query.device)
        return exact.attention(query, key.transpose(1, 2), value.transpose(1, 2), mask)

    tokens = torch.randint(VOCAB, (1, LENGTH), generator=generator)
    with torch.no_grad():
        hidden = decoder.forward(tokens, torch.arange(LENGTH).unsqueeze(0), attend)
        return decoder.logits(hidden[0]), seen


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_compute_the_bits_of_one(model: str, dtype: torch.dtype, parts: int) -> None:
    logits, seen = outputs_of(MODELS[model], dtype, parts, None)
    meeting = Meeting(2)
    shares = [Share(2, rank, meeting.gather_of(rank)) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        found = [*threads.map(lambda share: outputs_of(MODELS[model], dtype, parts, share), shares)]
    for own_logits, own_seen in found:
        assert own_seen.keys() == seen.keys()
        assert [name for name in seen if not torch.equal(own_seen[name], seen[name])] == []
        assert torch.equal(own_logits, logits)


def test_without_parts_two_ranks_would_round_otherwise() -> None:
    logits, _ = outputs_of((), torch.float32, 1, None)
    assert not torch.equal(logits, outputs_of((), torch.float32, 2, None)[0])

"""SGLang's sampler of exact mode: the tokens of the local engine, without waiting for the GPU.

Run by test_slot_attention.py, over stand-ins for what it imports of SGLang.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opo_megatron.kernels import exact, exact_sampling


class Sampler:
    output_logprob_processor = SimpleNamespace(
        compute_logprobs=lambda log_probs, tops, ids, tokens: SimpleNamespace(
            write_output_to=lambda output: vars(output).update(
                found=log_probs.gather(1, tokens[:, None])[:, 0]
            )
        )
    )


def stubbed() -> type:
    for name, members in {
        "sglang.srt.layers.sampler": {"Sampler": Sampler, "register_sampler_backend": lambda *_: None},
        "sglang.srt.sampling.custom_logit_processor": {"CustomLogitProcessor": object},
    }.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        vars(sys.modules[name]).update(members)
    from opo_megatron.rollout.sglang.exact_server.sampler import ExactSampler

    return ExactSampler


ExactSampler = stubbed()
ALL = 1 << 30
"""SGLang's top_k of requests without one."""
ROWS, VOCABULARY = 6, 45


def batch(top_ks: list[int], top_ps: list[float]) -> tuple[Any, Any, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(ROWS, VOCABULARY, generator=generator)
    info = SimpleNamespace(
        temperatures=torch.tensor([1.0, 0.7, 1.0, 1.3, 0.7, 1.0]).unsqueeze(1),
        custom_params=[{"opo_key": 1000 * i + 7} for i in range(ROWS)],
        top_ks=torch.tensor(top_ks),
        top_ps=torch.tensor(top_ps),
        is_all_greedy=all(one <= 1 for one in top_ks),
        need_top_k_sampling=any(one != ALL for one in top_ks),
        need_top_p_sampling=any(one != 1 for one in top_ps),
    )
    return SimpleNamespace(next_token_logits=logits), info, torch.arange(ROWS) * 3


def sample(output: Any, info: Any, positions: Tensor) -> Tensor:
    tokens: Tensor = ExactSampler().forward(output, info, True, [], [], positions)
    return tokens


MIXES = {
    "plain": ([ALL] * ROWS, [1.0] * ROWS),
    "one greedy": ([ALL, ALL, 1, ALL, ALL, ALL], [1.0] * ROWS),
    "all greedy": ([1] * ROWS, [1.0] * ROWS),
    "top_k": ([3, ALL, 3, 5, ALL, 1], [1.0] * ROWS),
    "top_p": ([ALL] * ROWS, [0.6, 1.0, 0.6, 0.9, 1.0, 1.0]),
}


@pytest.mark.parametrize("mix", MIXES)
def test_each_row_is_sampled_as_if_it_were_alone_by_the_local_engine(mix: str) -> None:
    top_ks, top_ps = MIXES[mix]
    output, info, positions = batch(top_ks, top_ps)
    tokens = sample(output, info, positions)
    for i in range(ROWS):
        one = exact.log_softmax(output.next_token_logits[i : i + 1], info.temperatures[i : i + 1])
        uniform = exact_sampling.uniforms(torch.tensor([1000 * i + 7]), positions[i : i + 1] + 1)
        kept = exact_sampling.truncate(exact_sampling.probabilities(one), top_ks[i], top_ps[i])
        expected = one.argmax(-1) if top_ks[i] == 1 else exact_sampling.inverse_cdf(kept, uniform)
        assert tokens[i] == expected and output.found[i] == one[0, expected]


def test_without_truncation_settings_of_requests_are_not_read() -> None:
    output, info, positions = batch(*MIXES["plain"])
    info.top_ks = info.top_ps = None
    assert sample(output, info, positions).shape == (ROWS,)

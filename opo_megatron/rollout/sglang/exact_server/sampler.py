"""SGLang's sampler of exact mode: the local engine's, with the random numbers of the run.

Each request carries the key of its random numbers in `custom_params`.  SGLang passes those on for requests
with a custom logit processor only, so each names `Seeded` as its own, which is never called.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.sampler import Sampler, register_sampler_backend
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from torch import Tensor

from opo_megatron.kernels import exact, exact_sampling

# SGLang sets this name on every CPU, whatever its option --sampling-backend says; on a GPU the trainer does.
NAME = "pytorch"
KEY, TRACE, NO_GRAPH = "opo_key", "opo_trace", "opo_no_graph"
"""What a request carries: its key, whether the digests of its operations are wanted, and whether it is
decoded without a CUDA graph."""


class Seeded(CustomLogitProcessor):  # type: ignore[misc]
    """Leaves logits as they are."""

    def __call__(self, logits: Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> Tensor:
        return logits


def parameters(sampling_info: Any) -> list[dict[str, Any]]:
    """What each request of a batch carries."""
    carried = sampling_info.custom_params or [None] * len(sampling_info)
    return [one or {} for one in carried]


class ExactSampler(Sampler):  # type: ignore[misc]
    """Records log softmax(z / T) and samples from its exponential.

    SGLang samples outside of its CUDA graphs.
    """

    def forward(
        self,
        logits_output: Any,
        sampling_info: Any,
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int]],
        positions: Tensor,
    ) -> Tensor:
        """Next tokens [n]; log-probabilities go to `logits_output`.

        Args:
            positions: [n]: of the token before the sampled one.
        """
        # The temperature of greedy requests is 1.
        log_probs = exact.log_softmax(logits_output.next_token_logits, sampling_info.temperatures)
        carried = parameters(sampling_info)
        keys = torch.tensor(
            [one.get(KEY, 0) for one in carried], dtype=torch.int64, pin_memory=log_probs.is_cuda
        ).to(log_probs.device, non_blocking=True)
        tokens = self._sample(log_probs, exact_sampling.uniforms(keys, positions.long() + 1), sampling_info)
        if return_logprob:
            result = self.output_logprob_processor.compute_logprobs(
                log_probs, top_logprobs_nums, token_ids_logprobs, tokens
            )
            result.write_output_to(logits_output)
        return tokens

    def _sample(self, log_probs: Tensor, uniform: Tensor, sampling_info: Any) -> Tensor:
        tokens = log_probs.argmax(-1)
        if sampling_info.is_all_greedy:
            return tokens
        if not sampling_info.need_top_k_sampling and not sampling_info.need_top_p_sampling:
            # Their settings are not read, which would wait for the GPU.
            return exact_sampling.inverse_cdf(exact_sampling.probabilities(log_probs), uniform)
        truncations: dict[tuple[int, float], list[int]] = {}
        settings = zip(sampling_info.top_ks.tolist(), sampling_info.top_ps.tolist(), strict=True)
        for row, (top_k, top_p) in enumerate(settings):
            if top_k > 1:  # 1 is greedy
                truncations.setdefault((top_k, top_p), []).append(row)
        for (top_k, top_p), rows in truncations.items():
            chances = exact_sampling.probabilities(log_probs[rows])
            tokens[rows] = exact_sampling.inverse_cdf(
                exact_sampling.truncate(chances, top_k, top_p), uniform[rows]
            )
        return tokens


register_sampler_backend(NAME, ExactSampler)

"""SGLang's model classes of exact mode: the local engine's decoder over SGLang's flat batch.

The trainer describes the model in `config.json` by its own `policy.model`, so that neither SGLang nor
transformers has a say in it: SGLang rounds sizes of the MLP on CPUs.  The names of the classes are those of
SGLang's own, which they replace.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_context import get_attn_backend
from torch import Tensor, nn

from opo_megatron.config.choices import RopeType
from opo_megatron.kernels.exact_digest import row_digests
from opo_megatron.rollout.local.decoder import Decoder, Share
from opo_megatron.rollout.sglang.exact_server.sampler import NO_GRAPH, TRACE, parameters
from opo_megatron.rollout.sglang.exact_server.slot_attention import SlotAttention

MODEL = "opo_model"
"""`policy.model` and `policy.exact_sum_parts` in the server's `config.json`."""


class ExactLogits(LogitsProcessor):  # type: ignore[misc]
    """SGLang's choice of rows, the decoder's product: every rank computes the whole vocabulary."""

    def __init__(self, config: Any, decoder: Decoder) -> None:
        super().__init__(config, skip_all_gather=True)
        self._decoder = decoder

    def _compute_lm_head(self, hidden_states: Tensor, lm_head: Any, embedding_bias: Any = None) -> Tensor:
        return self._decoder.logits(hidden_states)


class ExactForCausalLM(nn.Module):
    """A dense model of any supported family."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        model = _model_of(config)
        device = torch.get_default_device()  # that of the server, under which SGLang builds its models
        group = get_tp_group()
        ranks = group.world_size
        with torch.device("cpu"):
            self.decoder = Decoder(
                model,
                config.vocab_size,
                torch.get_default_dtype(),
                device,
                exact=True,
                sum_parts=model.exact_sum_parts,
                share=Share(ranks, group.rank_in_group, group.all_gather) if ranks > 1 else None,
            )
        for name, tensor in self.decoder.tensors().items():  # SGLang looks for a model's memory here
            self.register_parameter(name.replace(".", "_"), nn.Parameter(tensor, requires_grad=False))
        # SGLang keeps buffers where a server releases its weights' memory for a while.
        self.register_buffer("cos", self.decoder.cos, persistent=False)
        self.register_buffer("sin", self.decoder.sin, persistent=False)
        self.attention = nn.ModuleList(
            RadixAttention(
                model.num_attention_heads // ranks,
                model.kv_channels,
                1 / math.sqrt(model.kv_channels),  # as the policy computes it
                model.num_query_groups // ranks,
                layer_id=i,
            )
            for i in range(model.num_layers)
        )
        self.logits_processor = ExactLogits(config, self.decoder)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy in tensors by their Hugging Face names."""
        for name, tensor in weights:
            self.decoder.load(name, tensor)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: Any, *_: Any, **__: Any) -> Any:
        """Logits of the rows [n] that SGLang samples from.

        While a CUDA graph is captured there are no requests.
        """
        if forward_batch.sampling_info is not None and not forward_batch.forward_mode.is_decode():
            _choose_graphs(parameters(forward_batch.sampling_info))
        trace = _Trace(forward_batch)
        self.decoder.observe = trace.add if trace.is_wanted else None

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            flat = (part[0].flatten(1) for part in (query, key, value))
            return self.attention[layer](*flat, forward_batch).view_as(query)  # type: ignore[no-any-return]

        hidden = self.decoder.forward(input_ids.unsqueeze(0), positions.unsqueeze(0), attend)[0]
        output = self.logits_processor(input_ids, hidden, None, forward_batch)
        if trace.is_wanted:
            trace.add_rows("the LM head", output.next_token_logits, [1] * len(trace.requests))
            output.customized_info = {TRACE: trace.requests}
        return output


def _choose_graphs(carried: list[dict[str, Any]]) -> None:
    """Let prefilled requests decode in CUDA graphs, unless one of them is traced or asks for none.

    A replayed graph runs nothing of this file.
    """
    backend = get_attn_backend()
    if isinstance(backend, SlotAttention):
        backend.use_graphs(not any(one.get(TRACE) or one.get(NO_GRAPH) for one in carried))


class _Trace:
    """Digests of a forward pass, per operation and request."""

    def __init__(self, forward_batch: Any) -> None:
        sampling_info = forward_batch.sampling_info
        carried = [] if sampling_info is None else parameters(sampling_info)
        self.is_wanted = any(one.get(TRACE) for one in carried)
        if not self.is_wanted:
            return
        is_decode = forward_batch.forward_mode.is_decode()
        self._rows = [1] * len(carried) if is_decode else forward_batch.extend_seq_lens.tolist()
        self.requests: list[dict[str, int]] = [{} for _ in carried]

    def add(self, operation: str, output: Tensor) -> None:
        """Args:
        output: [1, n, …]
        """
        self.add_rows(operation, output[0], self._rows)

    def add_rows(self, operation: str, output: Tensor, rows: list[int]) -> None:
        for request, digests in zip(self.requests, row_digests(output).split(rows), strict=True):
            request[operation] = int(digests.sum())


def _model_of(config: Any) -> Any:
    """`policy.model`, as the trainer wrote it.

    Raises:
        ValueError: where it did not.
    """
    fields = getattr(config, MODEL, None)
    if fields is None:
        raise ValueError(f"the server's config.json has no {MODEL}; rollout.sglang.exact=true writes it")
    scaling = SimpleNamespace(**fields["rope_scaling"] | {"type": RopeType(fields["rope_scaling"]["type"])})
    return SimpleNamespace(**fields | {"rope_scaling": scaling})


EntryClass = [
    type(name, (ExactForCausalLM,), {})
    for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
]

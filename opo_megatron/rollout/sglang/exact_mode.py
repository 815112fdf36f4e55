"""Exact mode, the trainer's side: how a server is started; what a request carries is in `replies.py`.

`exact_server/` is the other side.  SGLang's own deterministic inference is not used: it makes samples
repeatable, not equal to the policy's bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from opo_megatron.config.rollout import SglangConfig
from opo_megatron.config.schema import Config, PolicyConfig
from opo_megatron.errors import UserError
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.installation import by_their_own_names
from opo_megatron.utils.hashing import MASK, hash_of_text

PACKAGE = "opo_megatron.rollout.sglang.exact_server"
CHUNK = "chunked-prefill-size"
OPTIONS: Mapping[str, object] = {
    "enable-custom-logit-processor": True,  # lets a request's parameters reach the sampler
    CHUNK: 1024,
}
GPU_OPTIONS: Mapping[str, object] = {
    "attention-backend": "triton",  # the name that `exact_server/attention.py` takes on GPUs
    "sampling-backend": "pytorch",  # and the sampler's
    CHUNK: 4096,
    "kv-cache-dtype": "auto",  # that of the model
    # Decoding runs in CUDA graphs.  A graph of a prefill pads its batches, and compiles parts of the model.
    "cuda-graph-backend-prefill": "disabled",
}
"""In addition on GPUs.  The overlap schedule stays on.  torch.compile and speculative decoding are off by
default, and `config/rules/exact.py` refuses every option that is not proven."""
ENVIRONMENT: Mapping[str, str] = {"SGLANG_EXTERNAL_MODEL_PACKAGE": PACKAGE}
MODEL = "opo_model"


def options(config: Config, on_gpu: bool) -> dict[str, object]:
    """Options of a server in exact mode.  Its name tells which recipes it is exact for."""
    device: Mapping[str, object] = GPU_OPTIONS if on_gpu else {}
    return dict(OPTIONS) | dict(device) | {"served-model-name": server_name(config)}


def server_name(config: Config) -> str:
    """The name of a server with the operations of this recipe; the vocabulary comes from the task."""
    policy = replace(config.policy, model=replace(config.policy.model, vocab_size=None))
    described = model_description(policy)
    text = json.dumps([described, config.policy.dtype.value], sort_keys=True)
    return f"opo-exact-{hash_of_text(text) & MASK:016x}"


def check_server(config: Config, client: Client) -> None:
    """Check that a server that runs already was started in exact mode for this recipe's model.

    Raises:
        UserError: where it was not.
    """
    info = client.get("/server_info")
    if info.get("served_model_name") != server_name(config):
        raise UserError(
            f"the SGLang server {client.url} of rollout.sglang.urls does not run the operations of this "
            "recipe's model in exact mode; start it by `opo serve` with this recipe and "
            "rollout.sglang.exact=true, or set rollout.sglang.exact=false"
        )


def model_description(policy: PolicyConfig) -> dict[str, Any]:
    """`policy.model` and how its sums are split as JSON, for the server's `config.json`."""
    fields = asdict(policy.model)
    fields["rope_scaling"]["type"] = policy.model.rope_scaling.type.value
    return {MODEL: fields | {"exact_sum_parts": policy.exact_sum_parts}}


def chunk_tokens(settings: SglangConfig, on_gpu: bool) -> int:
    """Tokens that a server prefills at once; -1: any number."""
    default = (GPU_OPTIONS if on_gpu else OPTIONS)[CHUNK]
    chunk: int = by_their_own_names(settings.options).get(CHUNK, default)
    return chunk


def disables_prefixes(settings: SglangConfig) -> bool:
    """Whether the servers have no prefix cache."""
    return bool(by_their_own_names(settings.options).get("disable-radix-cache"))

"""SGLang's own attention or sampler, or an operation of `altered_operations.py`."""

import importlib.util
import os
from pathlib import Path

from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.sampler import Sampler, register_sampler_backend

from opo_megatron.rollout.local.decoder import Decoder
from opo_megatron.rollout.sglang.exact_server import attention
from opo_megatron.rollout.sglang.exact_server.model import EntryClass as EntryClass

ALTERED = os.environ["ALTERED"]


def usual_attention(runner):
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    return TorchNativeAttnBackend(runner)


def altered_operations():
    path = Path(__file__).parents[1] / "altered_operations.py"
    spec = importlib.util.spec_from_file_location("altered_operations", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if ALTERED == "attention":
    register_attention_backend(attention.NAME)(usual_attention)
elif ALTERED == "sampler":
    register_sampler_backend("pytorch", Sampler)
else:
    altered_operations().IN_DECODER[ALTERED](Decoder, setattr)

"""A Hugging Face folder in block FP8: quantized matrices, their tensor names, and `quantization_config`.

The format is DeepSeek-V3's, which SGLang and transformers load: `X.weight` in float8_e4m3fn with
`X.weight_scale_inv`, and a `quantization_config` that lists the modules not quantized.  The matrices in
the layers are quantized; embedding, LM head, norms, biases and the router keep their type.

Matrices that are not made of whole 128×128 blocks keep their type too, although the quantizer supports
smaller blocks: SGLang refuses them where it fuses (q/k/v, gate/up, experts), and transformers infers the
block from the shape of the scales and would read 200 rows as two blocks of 100.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opo_megatron.config import Config
from opo_megatron.config.choices import FP8_BLOCK, Scales
from opo_megatron.config.schema import ModelConfig
from opo_megatron.errors import UserError
from opo_megatron.kernels.fp8 import blocks, quantize_blocks
from opo_megatron.weights.param_mapping import HEAD, Stages, parameters
from opo_megatron.weights.safetensors_file import TensorInfo


class BlockFp8:
    """The FP8 tensors of one model."""

    def __init__(self, model: ModelConfig, scales: Scales) -> None:
        """
        Args:
            model: resolved, with its vocabulary.

        Raises:
            UserError: where no matrix consists of whole blocks.
        """
        assert model.vocab_size is not None
        self.scales = scales
        self._quantized: set[str] = set()
        untouched, odd = [HEAD.removesuffix(".weight")], []
        for parameter in parameters(model, model.vocab_size, Stages(model.num_layers)):
            for name, shape in parameter.tensors[0]:
                if len(shape) != 2 or not name.startswith("model.layers."):
                    continue
                if parameter.sharding.partition_dim is None:  # the router
                    untouched.append(name.removesuffix(".weight"))
                elif all(size % FP8_BLOCK == 0 for size in shape):
                    self._quantized.add(name)
                else:
                    odd.append((_module(name), shape))
        if not self._quantized:
            raise UserError(
                f"no matrix of this model is made of whole {FP8_BLOCK}×{FP8_BLOCK} blocks ({odd[0][0]} is "
                f"{list(odd[0][1])}), so there is nothing to quantize; choose --quantize fp8, or none"
            )
        self.untouched = [*untouched, *dict.fromkeys(module for module, _ in odd)]
        """Modules that keep their type: `modules_to_not_convert` of config.json."""
        self.notes = []
        if odd:
            self.notes.append(
                f"{len(odd)} matrices keep their type because they are not made of whole "
                f"{FP8_BLOCK}×{FP8_BLOCK} blocks, e.g. {odd[0][0]} of shape {list(odd[0][1])}"
            )

    def quantizes(self, name: str) -> bool:
        """Whether a Hugging Face tensor is written in FP8."""
        return name in self._quantized

    def infos(self, infos: Sequence[TensorInfo]) -> list[TensorInfo]:
        """The tensors to write in place of `infos`, in the same order."""
        return [written for info in infos for written in self._infos(info)]

    def _infos(self, info: TensorInfo) -> list[TensorInfo]:
        if info.name not in self._quantized:
            return [info]
        scales = blocks(info.shape[0]), blocks(info.shape[1])
        return [
            TensorInfo(info.name, info.shape, torch.float8_e4m3fn),
            TensorInfo(_scale(info.name), scales, torch.float32),
        ]

    def tensors(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors to write in place of one: itself, or its FP8 values and scales.

        Raises:
            UserError: for weights that are NaN or infinite.
        """
        if name not in self._quantized:
            yield name, tensor
            return
        quantized, scale = quantize_blocks(name, tensor, self.scales)
        yield name, quantized
        yield _scale(name), scale

    @property
    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json.

        `scale_fmt` makes SGLang use powers of two for activations too.
        """
        config: dict[str, Any] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            "modules_to_not_convert": self.untouched,
        }
        if self.scales is Scales.power_of_two:
            config["scale_fmt"] = "ue8m0"
        return config


SCALE_SUFFIX = "_scale_inv"


def _scale(weight: str) -> str:
    return weight + SCALE_SUFFIX


def _module(weight: str) -> str:
    """The module name that loaders look up: all experts of a layer are one module."""
    module = weight.removesuffix(".weight")
    experts, is_one, _ = module.partition(".experts.")
    return experts + ".experts" if is_one else module


def engine_quantization(config: Config, vocab_size: int) -> BlockFp8 | None:
    """Quantization of the weights sent to SGLang with `rollout.sglang.fp8`, with the scales of the trainer's
    own products, so that both have the same bytes; None without it."""
    if not config.rollout.sglang.fp8:
        return None
    return BlockFp8(replace(config.policy.model, vocab_size=vocab_size), config.policy.fp8_scales)

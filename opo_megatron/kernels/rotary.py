"""Frequencies of the rotary embedding, one function for policy and engine.

    θᵢ = base^(−2i/d),  i = 0 … d/2 − 1,  scaled for models whose context was extended.

Megatron-Core supports Llama 3's scaling with fixed constants only, so the policy model uses these frequencies
too.  The arithmetic is float32, operation by operation as in transformers.

SGLang's process loads this file in exact mode, so it needs nothing but torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opo_megatron.config.choices import RopeType

if TYPE_CHECKING:
    from opo_megatron.config.schema import ModelConfig, RopeScalingConfig


def inverse_frequencies(model: ModelConfig) -> Tensor:
    """θ of each pair of a head's channels: [kv_channels / 2] float32, on the CPU."""
    assert model.kv_channels is not None
    exponents = torch.arange(0, model.kv_channels, 2, dtype=torch.float32, device="cpu") / model.kv_channels
    frequencies = 1.0 / (model.rotary_base**exponents)
    scaling = model.rope_scaling
    if scaling.type is RopeType.linear:
        return frequencies / scaling.factor
    if scaling.type is RopeType.llama3:
        return _llama3(frequencies, scaling)
    return frequencies


def _llama3(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """High frequencies stay, low ones are divided by the factor, those between are interpolated."""
    length, factor = scaling.original_max_sequence_length, scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    smooth = (length / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > length / low, frequencies / factor, frequencies)
    is_between = ~(wavelengths < length / high) & ~(wavelengths > length / low)
    return torch.where(is_between, between, scaled)

"""The enumerations of a recipe's fields."""

from __future__ import annotations

from enum import Enum


class EngineName(str, Enum):
    local = "local"
    sglang = "sglang"


class Schedule(str, Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Fill(str, Enum):
    off = "off"
    groups_with_signal = "groups_with_signal"


class ReplayMethod(str, Enum):
    off = "off"
    repo = "repo"
    spear = "spear"


class ReplayChoice(str, Enum):
    """Which of a prompt's kept responses are replayed."""

    highest = "highest"
    recent = "recent"
    random = "random"
    max_variance = "max_variance"


class OverlapOrder(str, Enum):
    arrival = "arrival"
    prompt = "prompt"


class TaskName(str, Enum):
    lift = "lift"
    text = "text"
    reasoning_gym = "reasoning_gym"


class Dtype(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class Fp8(str, Enum):
    """Transformer Engine's FP8 recipes, by what shares a scale."""

    blockwise = "blockwise"
    tensorwise = "tensorwise"
    delayed = "delayed"
    mxfp8 = "mxfp8"


class Scales(str, Enum):
    """Number format of the scales of FP8 blocks."""

    fp32 = "fp32"
    power_of_two = "power_of_two"


class Recompute(str, Enum):
    none = "none"
    selective = "selective"
    full = "full"


class Packing(str, Enum):
    padded = "padded"
    thd = "thd"


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Kl(str, Enum):
    off = "off"
    eval = "eval"


class RopeType(str, Enum):
    none = "none"
    linear = "linear"
    llama3 = "llama3"


class Transport(str, Enum):
    """How weights are sent to an SGLang server."""

    tensor = "tensor"
    distributed = "distributed"
    disk = "disk"


class WeightLayout(str, Enum):
    """What the ranks of an SGLang server are sent."""

    auto = "auto"
    full = "full"
    slices = "slices"


class GroupBackend(str, Enum):
    """Library of the process group by which `distributed` sends weights."""

    nccl = "nccl"
    gloo = "gloo"


class Better(str, Enum):
    highest = "highest"
    lowest = "lowest"


FP8_BLOCK = 128
"""Side of the weight blocks that share a scale with `policy.fp8=blockwise`."""
FP8_MULTIPLE = 16
"""Transformer Engine's FP8 matrix products need sides that are multiples of this."""

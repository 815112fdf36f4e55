"""What fields of a recipe may hold that take one of a few names."""

from __future__ import annotations

from enum import Enum


class EngineName(str, Enum):
    local = "local"
    sglang = "sglang"


class Baseline(str, Enum):
    """Presets of the switches `weight`, `leave_one_out`, `scale` and `scope`."""

    opo = "opo"
    opo_loo = "opo_loo"
    group_mean = "group_mean"
    rloo = "rloo"
    grpo = "grpo"
    batch_length = "batch_length"
    energy = "energy"
    energy_loo = "energy_loo"
    auto = "auto"


class Weight(str, Enum):
    one = "one"
    length = "length"
    length_power = "length_power"
    energy = "energy"
    energy_hidden = "energy_hidden"
    fitted = "fitted"


class Scale(str, Enum):
    none = "none"
    std = "std"


class Scope(str, Enum):
    group = "group"
    batch = "batch"


class LossNormalizer(str, Enum):
    tokens = "tokens"
    sequences = "sequences"
    constant = "constant"


class ObjectiveName(str, Enum):
    policy_gradient = "policy_gradient"
    clipped = "clipped"


class VarianceOf(str, Enum):
    """Whose gradients the variance report compares."""

    output_layer = "output_layer"
    all_parameters = "all_parameters"


class Schedule(str, Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Dtype(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class Fp8(str, Enum):
    """Transformer Engine's recipes: what shares a scale."""

    blockwise = "blockwise"
    tensorwise = "tensorwise"
    delayed = "delayed"
    mxfp8 = "mxfp8"


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
    """How weights reach an SGLang server."""

    tensor = "tensor"
    distributed = "distributed"
    disk = "disk"


class MismatchAction(str, Enum):
    refuse = "refuse"
    warn = "warn"
    correct = "correct"


class Better(str, Enum):
    highest = "highest"
    lowest = "lowest"

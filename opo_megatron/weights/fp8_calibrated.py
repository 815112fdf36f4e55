"""Export to a Hugging Face folder in FP8 with per-tensor scales of weights and activations, by modelopt.

Activation scales are maxima over calibration prompts, so transformers loads the whole model and runs it
forward.  The output is modelopt's unified format: `weight_scale` and `input_scale` per matrix,
`hf_quant_config.json`, and the same settings in config.json, which SGLang reads as quantization
`modelopt_fp8`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from opo_megatron.errors import UserError
from opo_megatron.kernels.fp8 import not_finite
from opo_megatron.utils.extras import require_extra
from opo_megatron.weights.hf_folder import copy_companions

_OPTION = "--quantize fp8"


def load_modelopt() -> tuple[Any, Any, Any]:
    """The modules transformers, modelopt.torch.quantization and modelopt.torch.export.

    Raises:
        UserError: naming a package that is not installed.
    """
    transformers = require_extra("transformers", _OPTION, "modelopt")
    with _without_warnings():
        quantization = require_extra("modelopt.torch.quantization", _OPTION, "modelopt")
        exporter = require_extra("modelopt.torch.export", _OPTION, "modelopt")
    return transformers, quantization, exporter


def quantize_calibrated(
    source: Path, target: Path, prompts: Sequence[Sequence[int]], shard_bytes: int, log: Callable[[str], None]
) -> None:
    """Quantize the model in `source` into the empty folder `target`.

    Args:
        prompts: token ids; each runs alone, so that no padding affects a maximum.

    Raises:
        UserError: for weights or scales that are NaN or infinite.
    """
    transformers, quantization, exporter = load_modelopt()

    def run(model: Any) -> None:
        for number, prompt in enumerate(prompts, 1):
            model(torch.tensor([prompt]), use_cache=False)
            if number * 10 // len(prompts) > (number - 1) * 10 // len(prompts):
                log(f"calibrated with {number} of {len(prompts)} prompts")

    transformers.utils.logging.disable_progress_bar()
    with _without_warnings(), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True)
        _check_weights(model)
        model = quantization.quantize(model.eval(), quantization.FP8_DEFAULT_CFG, forward_loop=run)
        exporter.export_hf_checkpoint(model, export_dir=target, max_shard_size=shard_bytes)
    copy_companions(target, [source])
    _check_scales(target)


def _check_weights(model: Any) -> None:
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise not_finite(name)


def _check_scales(folder: Path) -> None:
    """Check that every quantized matrix has both scales, positive and finite."""
    matrices, scales = set(), {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # a handle, no dictionary
                if name.endswith(("weight_scale", "input_scale")):
                    scales[name] = float(file.get_tensor(name))
                elif file.get_slice(name).get_dtype() == "F8_E4M3":
                    matrices.add(name.removesuffix(".weight"))
    for module in sorted(matrices):
        for name in (f"{module}.weight_scale", f"{module}.input_scale"):
            if not 0 < scales.get(name, math.nan) < math.inf:
                raise UserError(
                    f"calibration gave {name} the invalid value {scales.get(name, 'nothing')}; "
                    "calibrate with other prompts, or export another step"
                )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress warnings of modelopt and transformers about their own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""The options of `opo export --quantize`, and the calibrated export."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from opo_megatron.cli.calibration import find_prompts, usable
from opo_megatron.config.schema import ModelConfig
from opo_megatron.errors import UserError
from opo_megatron.utils.atomic_dir import new_folder

DEFAULT_PROMPTS = 128
"""Default number of calibration prompts, at most."""


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """The option group `quantization`."""
    group = parser.add_argument_group("quantization")
    group.add_argument(
        "--quantize",
        choices=["fp8_block", "fp8"],
        help="FP8 matrices: fp8_block has a scale per 128×128 block, computed from the weights while they are "
        "written; fp8 has one per tensor, for activations too, calibrated by nvidia-modelopt on prompts, for "
        "which the whole model is loaded",
    )
    group.add_argument(
        "--scales",
        choices=["fp32", "power_of_two"],
        help="for fp8_block: any number, or powers of two, rounded up (default: fp32)",
    )
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument(
        "--calibrate-recipe",
        metavar="RECIPE",
        type=Path,
        help="for fp8: training prompts of this recipe's task (default: of the checkpoint's run)",
    )
    prompts.add_argument(
        "--calibration-data",
        metavar="FILE",
        type=Path,
        help="for fp8: one text per line, or a .jsonl with a field text, prompt or question",
    )
    group.add_argument(
        "--calibration-prompts",
        metavar="N",
        type=int,
        help=f"for fp8: number of prompts (default: {DEFAULT_PROMPTS})",
    )


def check_quantization(options: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    chosen = options.quantize
    if options.verify and chosen is not None:
        raise UserError(
            f"--verify expects equal log-probabilities, which --quantize {chosen} changes; remove one of them"
        )
    for name, belongs_to in (
        ("--scales", "fp8_block"),
        ("--calibrate-recipe", "fp8"),
        ("--calibration-data", "fp8"),
        ("--calibration-prompts", "fp8"),
    ):
        value = getattr(options, name[2:].replace("-", "_"))
        if value is not None and chosen != belongs_to:
            raise UserError(f"{name} belongs to --quantize {belongs_to}; add that, or remove it")
    if options.calibration_prompts is None:
        options.calibration_prompts = DEFAULT_PROMPTS
    if options.calibration_prompts < 1:
        raise UserError(f"--calibration-prompts is {options.calibration_prompts}; it must be at least 1")


def export_calibrated(
    options: argparse.Namespace,
    model: ModelConfig,
    is_first: bool,
    companions: Sequence[Path],
    export_to: Callable[[Path], None],
    log: Callable[[str], None],
) -> None:
    """Export unquantized, a collective of all ranks, then quantize on rank 0.

    Args:
        export_to: writes the unquantized folder, which is deleted at the end.
    """
    from opo_megatron.weights.fp8_calibrated import load_modelopt, quantize_calibrated

    prompts: list[list[int]] = []
    if is_first:
        assert model.vocab_size is not None
        load_modelopt()  # raises before anything is written
        prompts = usable(find_prompts(options, companions), model.vocab_size, model.max_sequence_length)
        log(f"calibrating with {len(prompts)} prompts of {sum(map(len, prompts))} tokens")
    with new_folder(options.target, is_writer=is_first) as partial:
        plain = partial / "unquantized"
        export_to(plain)
        if is_first:
            quantize_calibrated(plain, partial, prompts, int(options.max_shard_size * 2**30), log)
            shutil.rmtree(plain)

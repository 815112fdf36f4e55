"""`opo export`: a Hugging Face folder from a Megatron checkpoint, of a run or of `opo convert`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from opo_megatron.cli.checkpoint_options import (
    CheckpointCommand,
    add_checkpoint_options,
    config_of,
    torch_dtype,
)
from opo_megatron.cli.quantization import add_quantization, check_quantization, export_calibrated
from opo_megatron.config import Config, load_config
from opo_megatron.config.architecture import hf_config, read_architecture
from opo_megatron.config.schema import ModelConfig
from opo_megatron.errors import UserError
from opo_megatron.utils.atomic_dir import check_new

if TYPE_CHECKING:
    from opo_megatron.distributed.process_groups import Parallel

SUMMARY = "export a checkpoint as a Hugging Face folder, also in FP8"
EPILOG = """\
examples:
  opo export runs/mine/checkpoints/step_00000140 models/mine --verify
  opo export checkpoints/llama-70b models/llama-70b --tensor-model-parallel-size 4 --max-shard-size 5
  opo export runs/mine/checkpoints/step_00000140 models/mine-fp8 --quantize fp8_block
  opo export runs/mine/checkpoints/step_00000140 models/mine-fp8 \\
      --quantize fp8 --calibration-data prompts.jsonl --calibration-prompts 256

The architecture comes from the run's config.yaml, config.json and tokenizer from the folder in the run's
policy.init_from; for a policy with random initial weights, a config.json is generated.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `opo export`."""
    parser.add_argument("source", metavar="CHECKPOINT", type=Path, help="folder of one checkpoint")
    parser.add_argument("target", metavar="OUT", type=Path, help="new folder")
    parser.add_argument(
        "--like", metavar="HF_DIR", type=Path, help="copy config.json and tokenizer from this folder"
    )
    parser.add_argument(
        "--max-shard-size", metavar="GIB", type=float, default=4.0, help="largest file (default: %(default)g)"
    )
    add_checkpoint_options(parser)
    add_quantization(parser)


def run(options: argparse.Namespace) -> int:
    """Check everything that needs no tensors, then export as the only rank, or as one of several."""
    if options.max_shard_size <= 0:
        raise UserError(f"--max-shard-size is {options.max_shard_size:g}; it must be above 0")
    check_quantization(options)
    model, companions = describe(options.source)
    if options.like is not None:
        like_model = read_architecture(options.like).model
        if replace(like_model, max_sequence_length=0) != replace(model, max_sequence_length=0):
            raise UserError(f"--like {options.like} has another architecture than {options.source}")
        companions = [options.like, *companions]
    if not any((folder / "config.json").exists() for folder in companions):
        hf_config(model, "float32")  # raises for a model of no family
    config = config_of(model, options)
    check_new(options.target)
    command = CheckpointCommand(config, options)
    if command.needs_ranks:
        return command.run_on_ranks()
    with command.joined() as parallel:
        from opo_megatron.checkpoint.convert import verify

        _write(options, config, parallel, companions, command.log)
        command.log(f"{options.target} is complete")
        if options.verify:
            difference = verify(options.source, options.target, config, parallel)
            command.log(f"verified: log-probabilities differ by at most {difference or 0:.1e}")
    return 0


def _write(
    options: argparse.Namespace,
    config: Config,
    parallel: Parallel,
    companions: list[Path],
    log: Callable[[str], None],
) -> None:
    """Export with these options; a collective of all ranks."""
    from opo_megatron.checkpoint.convert import export
    from opo_megatron.kernels.fp8 import Scales
    from opo_megatron.weights.fp8_folder import BlockFp8

    shard_bytes, dtype = int(options.max_shard_size * 2**30), torch_dtype(options.dtype)
    blocks = None
    if options.quantize == "fp8_block":
        blocks = BlockFp8(config.policy.model, Scales(options.scales or "fp32"))
        for note in blocks.notes:
            log(note)

    def export_to(target: Path) -> None:
        export(options.source, target, config, parallel, dtype, shard_bytes, companions, log, blocks)

    if options.quantize == "fp8":
        export_calibrated(options, config.policy.model, parallel.rank == 0, companions, export_to, log)
    else:
        export_to(options.target)


def describe(checkpoint: Path) -> tuple[ModelConfig, list[Path]]:
    """The model of a checkpoint, and the folders that may have its config.json and tokenizer."""
    if (checkpoint / "opo_weights.json").exists():
        return read_architecture(checkpoint).model, [checkpoint]
    state, recipe = checkpoint / "run_state.json", checkpoint.resolve().parent.parent / "config.yaml"
    if not state.exists():
        raise UserError(f"{checkpoint} is not a checkpoint; name a folder of <run.dir>/checkpoints")
    if not recipe.exists():
        raise UserError(f"{checkpoint} is not in the folder of its run: {recipe} is missing")
    # The recipe is resolved: it has the architecture even if the folder in init_from no longer exists.
    config: Config = load_config(recipe, ["policy.init_from=null", "resume=never"])
    init_from = load_raw(recipe).get("policy", {}).get("init_from")
    model = replace(config.policy.model, vocab_size=vocabulary(state))
    return model, [Path(f) for f in (init_from, config.task.tokenizer) if f and Path(f).is_dir()]


def vocabulary(state: Path) -> int:
    """The vocabulary size recorded in a checkpoint's run_state.json."""
    return int(json.loads(state.read_text())["model"]["vocab_size"])


def load_raw(recipe: Path) -> dict[str, dict[str, str]]:
    content: dict[str, dict[str, str]] = yaml.safe_load(recipe.read_bytes())
    return content

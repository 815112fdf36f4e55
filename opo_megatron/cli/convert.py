"""`opo convert`: a Megatron checkpoint from a Hugging Face folder, for `policy.init_from`."""

from __future__ import annotations

import argparse
from pathlib import Path

from opo_megatron.cli.checkpoint_options import (
    CheckpointCommand,
    add_checkpoint_options,
    config_of,
    torch_dtype,
)
from opo_megatron.config.architecture import read_architecture
from opo_megatron.utils.atomic_dir import check_new

SUMMARY = "convert a Hugging Face folder to a Megatron checkpoint"
EPILOG = """\
examples:
  opo convert models/Qwen3-0.6B checkpoints/qwen3-0.6b --verify
  opo convert models/Llama-3.1-70B checkpoints/llama-70b \\
      --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2

The result has weights, config.json and tokenizer, and is independent of the run's parallel layout.  The sizes
are those of this command, which starts its own ranks.  A run can also start from the Hugging Face folder
itself; converting pays off where many runs or many ranks read it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `opo convert`."""
    parser.add_argument("source", metavar="HF_DIR", type=Path, help="config.json and *.safetensors")
    parser.add_argument("target", metavar="OUT", type=Path, help="new folder")
    add_checkpoint_options(parser)


def run(options: argparse.Namespace) -> int:
    """Check everything that needs no tensors, then convert as the only rank, or as one of several."""
    model = read_architecture(options.source).model
    config = config_of(model, options)
    check_new(options.target)
    command = CheckpointCommand(config, options)
    if command.needs_ranks:
        return command.run_on_ranks()
    with command.joined() as parallel:
        from opo_megatron.checkpoint.convert import convert, verify

        dtype = torch_dtype(options.dtype)
        convert(options.source, options.target, config, parallel, dtype, command.log)
        command.log(f"{options.target} is complete; use it with policy.init_from={options.target}")
        if options.verify:
            difference = verify(options.target, options.source, config, parallel)
            command.log(f"verified: log-probabilities differ by at most {difference or 0:.1e}")
    return 0

"""Makes a Megatron checkpoint of a Hugging Face folder, for `policy.init_from`.

    python tools/convert_hf_to_megatron.py models/Qwen3-0.6B checkpoints/qwen3-0.6b
    python tools/convert_hf_to_megatron.py models/Qwen3-0.6B checkpoints/qwen3-0.6b --verify
    python tools/convert_hf_to_megatron.py models/Llama-3.1-70B checkpoints/llama-70b \\
        --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2

The result holds weights, config.json and tokenizer; a run of any layout reads it.  The sizes say how
many ranks share the work here, which this command starts itself, not what the run will use.  A run can
also start from the Hugging Face folder as it is; converting pays where many runs or many ranks read it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from checkpoint_tool import add_options, config_of, run_tool, torch_dtype

from opo_megatron.cli.main import Parser
from opo_megatron.config.architecture import read_architecture
from opo_megatron.utils.atomic_dir import check_new


def parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("source", metavar="HF_DIR", type=Path, help="config.json and *.safetensors")
    parser.add_argument("target", metavar="OUT", type=Path, help="new folder")
    add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_tool(__file__, parser(), work, argv)


def work(options: argparse.Namespace) -> None:
    """Check everything that needs no tensor, then convert as one rank, or as one of several."""
    model = read_architecture(options.source).model
    config = config_of(model, options)
    check_new(options.target)
    with options.ranks(config) as parallel:
        if parallel is None:
            return
        from opo_megatron.checkpoint.convert import convert, verify

        dtype = torch_dtype(options.dtype)
        convert(options.source, options.target, config, parallel, dtype, options.log)
        options.log(f"{options.target} is complete; use it with policy.init_from={options.target}")
        if options.verify:
            difference = verify(options.target, options.source, config, parallel)
            options.log(f"verified: log-probabilities differ by at most {difference or 0:.1e}")


if __name__ == "__main__":
    sys.exit(main())

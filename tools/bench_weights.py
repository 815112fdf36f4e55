"""Benchmarks conversion: memory over the baseline, and time against a plain copy → records/weights.json

    python tools/bench_weights.py                       # a random model of 2.2 GB, about 9 GB of disk
    python tools/bench_weights.py --layers 2 --repeats 1 --no-record

Each case runs in its own process: `copy` (every file, with fsync), `convert` (Hugging Face → Megatron) and
`export` (back).  Seconds exclude imports and include fsync, with the source in the page cache in all three;
the median of the repeats, after one warm-up round.  Memory is the peak resident set during the work minus
that before it.  The export is compared with the source, file by file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from opo_megatron.cli.checkpoint_options import reuse_memory
from opo_megatron.utils.terminal import prepare_terminal

LARGEST_MEMORY = 0.25
"""Fraction of the model's bytes."""
LARGEST_TIME = 2.5
"""Multiple of a plain copy's time."""

SHAPE: dict[str, Any] = {  # TinyLlama-1.1B's
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--case", nargs=3, metavar=("NAME", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        name, source, target = options.case
        print(json.dumps(run_case(name, Path(source), Path(target))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder), options)


def compare(work: Path, options: argparse.Namespace) -> int:
    """Every case, `repeats` times, interleaved."""
    make_model(work / "hf", options.layers)
    size = sum(path.stat().st_size for path in (work / "hf").glob("*.safetensors"))
    print(f"a model of {size / 1e9:.2f} GB", flush=True)
    cases = {"copy": ("hf", "copied"), "convert": ("hf", "megatron"), "export": ("megatron", "back")}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for i in range(options.repeats + 1):
        for name, (source, target) in cases.items():
            result = in_subprocess(name, work / source, work / target)
            print(f"{name:8} {result}{'' if i else '  (warm-up)'}", flush=True)
            if i:
                runs[name].append(result)
    same = same_files(work / "hf", work / "back")
    seconds = {name: statistics.median(r["seconds"] for r in rows) for name, rows in runs.items()}
    memory = {
        name: max(r["bytes over baseline"] for r in runs[name]) / size for name in ("convert", "export")
    }
    slower = {name: seconds[name] / seconds["copy"] for name in memory}
    results = {
        "model bytes": size,
        "export equals the source": same,
        "peak memory over the baseline, share of the model": memory,
        "median seconds": seconds,
        "times a plain copy": slower,
        "runs": runs,
    }
    claims = {
        f"memory at most {LARGEST_MEMORY:.0%} of the model": max(memory.values()) <= LARGEST_MEMORY,
        f"time at most {LARGEST_TIME:g} plain copies": max(slower.values()) <= LARGEST_TIME,
        "the export equals the source, byte for byte": same,
    }
    print(json.dumps({name: value for name, value in results.items() if name != "runs"}, indent=2))
    if not options.no_record:
        from bench.record import write_record

        print(f"written to {write_record('weights', results)}")
    missed = [claim for claim, holds in claims.items() if not holds]
    for claim in missed:
        print(f"NOT MET: {claim}")
    return 1 if missed else 0


def make_model(folder: Path, layers: int) -> None:
    """Write a random bf16 Llama, tensor by tensor."""
    import torch

    from opo_megatron.config.architecture import read_architecture
    from opo_megatron.weights.hf_folder import HfWriter
    from opo_megatron.weights.param_mapping import hf_shapes
    from opo_megatron.weights.safetensors_file import TensorInfo

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))
    model = read_architecture(folder).model
    shapes = hf_shapes(model, SHAPE["vocab_size"])
    writer = HfWriter(folder, [TensorInfo(n, shape, torch.bfloat16) for n, shape in shapes.items()])
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.write(name, torch.randn(shape, generator=generator).bfloat16())
    writer.finish()


def in_subprocess(name: str, source: Path, target: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", name, str(source), str(target)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_case(name: str, source: Path, target: Path) -> dict[str, float]:
    """One case: imports, read the source into the page cache, then the work.

    The previous repeat's output is removed right before the work in every case: a virtual machine returns
    freed memory to its host within seconds, and getting it back takes longer than writing to it.
    """
    reuse_memory()
    work = {"copy": copy, "convert": convert, "export": export}[name](source, target)
    for path in source.iterdir():
        with path.open("rb") as file:
            while file.read(2**24):
                pass
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    started = time.monotonic()
    work()
    seconds = time.monotonic() - started
    return {"seconds": seconds, "bytes over baseline": resident("VmHWM") - before}


def copy(source: Path, target: Path) -> Any:
    def work() -> None:
        target.mkdir()
        for path in source.iterdir():
            shutil.copyfile(path, target / path.name)
            with (target / path.name).open("rb+") as file:
                os.fsync(file.fileno())

    return work


def convert(source: Path, target: Path) -> Any:
    from opo_megatron.checkpoint.convert import convert
    from opo_megatron.cli.checkpoint_options import config_of
    from opo_megatron.config.architecture import read_architecture
    from opo_megatron.distributed.process_groups import initialize

    config = config_of(read_architecture(source).model, single_rank())
    parallel = initialize(config)
    return lambda: convert(source, target, config, parallel, None, lambda line: None)


def export(source: Path, target: Path) -> Any:
    from opo_megatron.checkpoint.convert import export
    from opo_megatron.cli.checkpoint_options import config_of
    from opo_megatron.config.architecture import read_architecture
    from opo_megatron.distributed.process_groups import initialize
    from opo_megatron.weights.hf_folder import DEFAULT_SHARD_BYTES

    config = config_of(read_architecture(source).model, single_rank())
    parallel = initialize(config)
    return lambda: export(
        source, target, config, parallel, None, DEFAULT_SHARD_BYTES, [source], lambda line: None
    )


def single_rank() -> argparse.Namespace:
    return argparse.Namespace(
        tensor_model_parallel_size=1, pipeline_model_parallel_size=1, expert_model_parallel_size=1
    )


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def same_files(one: Path, other: Path) -> bool:
    """Whether the weight files of both folders are equal, byte for byte."""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    if names != sorted(path.name for path in other.glob("*.safetensors")):
        return False
    for name in names:
        with (one / name).open("rb") as a, (other / name).open("rb") as b:
            while block := a.read(2**24):
                if block != b.read(2**24):
                    return False
            if b.read(1):
                return False
    return True


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())

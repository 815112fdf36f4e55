"""Benchmarks weight sync to a real SGLang server against a bare copy of the same bytes → records/sync.json

    python tools/bench_sync.py                          # 10 and 200 million parameters
    python tools/bench_sync.py --sizes 10M --repeats 2  # a quick run; writes nothing
    python tools/bench_sync.py --layouts                # slices and full tensors → records/sync_layouts.json

Per transport, interleaved: `sync`, everything a training step does (pause, flush, open, send, close, new
version, continue); and `bare`, the same bytes by the same path into another process that does nothing else:
one copy into shared memory and one out of it (tensor), one gloo broadcast into newly allocated memory and
one copy out of it (distributed), one file written and read (disk).  Medians, after one warm-up round.
`broadcast` is the broadcast alone into pages already mapped: a lower bound, because a real receiver must
still copy tensors into a model.  Memory is the trainer's peak during a sync minus that before it, shared
memory included.  `--layouts` has a server of two ranks
(`bench/sync_layouts.py`).  Exit code 1 where a limit is not met.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from bench.record import write_record
from bench.sync_layouts import measure_layouts
from bench_weights import resident

from opo_megatron.utils.terminal import prepare_terminal

ROOT = Path(__file__).parent.parent
TRANSPORTS = ("tensor", "distributed", "disk")
LARGEST_TIME = 2.0
"""Multiple of a bare copy, for `tensor` and `distributed`."""
LARGEST_SLICES = 1.3
"""Multiple of a bare copy of the bytes that a server keeps, for slices of the largest model."""
LARGEST_MEMORY = 2.0
"""In buckets."""

SIZES: dict[str, dict[str, int]] = {  # Llama shapes
    "10M": {
        "num_layers": 8, "hidden_size": 256, "ffn_hidden_size": 896, "num_attention_heads": 8,
        "num_query_groups": 4, "vocab_size": 4096,
    },
    "200M": {
        "num_layers": 14, "hidden_size": 1024, "ffn_hidden_size": 2816, "num_attention_heads": 16,
        "num_query_groups": 4, "vocab_size": 24576,
    },
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="only these sizes; writes nothing")
    parser.add_argument("--layouts", action="store_true", help="slices against full tensors instead")
    parser.add_argument("--no-record", action="store_true", help="write nothing")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--sglang-python", default=str(ROOT / ".venv-sglang" / "bin" / "python"), metavar="PYTHON",
        help="interpreter of SGLang's environment (default: that of `make setup-sglang`)",
    )  # fmt: skip
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        Peer().serve()
        return 0
    if options.layouts:
        return compare_layouts(options)
    results = {}
    for size in options.sizes or SIZES:
        with tempfile.TemporaryDirectory() as folder:
            results[size] = measure(size, Path(folder), options)
    print(json.dumps(results, indent=2))
    if options.sizes is None and not options.no_record:
        print(f"written to {write_record('sync', results)}")
    missed = [
        f"{size}, {transport}: {result['sync / bare']:.2f} bare copies, at most {LARGEST_TIME:g}"
        for size, of_size in results.items()
        for transport, result in of_size["transports"].items()
        if transport != "disk" and result["sync / bare"] > LARGEST_TIME
    ]
    missed += [
        f"{size}, {transport}: {result['peak memory, buckets']:.2f} buckets, at most {LARGEST_MEMORY:g}"
        for size, of_size in results.items()
        for transport, result in of_size["transports"].items()
        if result["peak memory, buckets"] > LARGEST_MEMORY
    ]
    for line in missed:
        print(f"NOT MET: {line}")
    return 1 if missed else 0


def compare_layouts(options: argparse.Namespace) -> int:
    """Measure slices against full tensors; the exit code."""
    results = {}
    for size in options.sizes or SIZES:
        with tempfile.TemporaryDirectory() as folder:
            results[size] = measure_layouts(size, SIZES[size]["vocab_size"], Path(folder), options)
    print(json.dumps(results, indent=2))
    if options.sizes is None and not options.no_record:
        print(f"written to {write_record('sync_layouts', results)}")
    largest = results.get("200M", {}).get("slices / bare", 0.0)
    if largest > LARGEST_SLICES:
        print(f"NOT MET: 200M, slices: {largest:.2f} bare copies, at most {LARGEST_SLICES:g}")
    return 1 if largest > LARGEST_SLICES else 0


def measure(size: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every transport of one model, `repeats` times, interleaved."""
    from opo_megatron.build import start_policy
    from opo_megatron.distributed.process_groups import initialize, shutdown
    from opo_megatron.rollout.sglang.engine import SglangEngine
    from opo_megatron.rollout.sglang.server import Server, write_model_config

    config = config_of(size, folder, options.sglang_python)
    parallel = initialize(config)
    vocab_size = SIZES[size]["vocab_size"]
    policy = start_policy(config, parallel, vocab_size, config.optimizer, needs_weights=True)
    parameters = sum(t.numel() for bucket in policy.stream_weights() for _, t in bucket)
    buckets = [sum(t.nbytes for _, t in bucket) for bucket in policy.stream_weights()]
    print(f"{size}: {parameters / 1e6:.1f} million parameters, {sum(buckets) / 1e6:.1f} MB", flush=True)
    write_model_config(config, vocab_size, folder / "model")
    server = Server(config, folder / "model", folder / "server.log", "server", None)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in TRANSPORTS}
    broadcasts: list[float] = []
    try:
        server.start(lambda line: None)
        engines = {
            name: SglangEngine(
                config_of(size, folder, options.sglang_python, transport=name, url=server.url),
                parallel, folder / "model", print,
            )
            for name in TRANSPORTS
        }  # fmt: skip
        with bare_copies(folder, buckets) as bare:
            for i in range(options.repeats + 1):
                for name, engine in engines.items():
                    policy.version += 1

                    def sync(engine: SglangEngine = engine) -> None:
                        engine.update_weights(policy.stream_weights(), policy.version)

                    seconds, memory = timed(sync)
                    bare_seconds, _ = timed(lambda name=name: bare[name](policy.stream_weights()))  # type: ignore[misc]
                    print(f"  {name:12} {seconds:.3f} s, bare {bare_seconds:.3f} s", flush=True)
                    broadcasts.append(timed(lambda: bare["broadcast"]([]))[0])
                    if i:
                        runs[name].append(
                            {"sync": seconds, "bare": bare_seconds, "bytes over baseline": memory}
                        )
        for engine in engines.values():
            engine.close()
    finally:
        server.stop()
    shutdown()
    largest = max(buckets)
    return {
        "parameters": parameters,
        "bytes": sum(buckets),
        "buckets": len(buckets),
        "bytes of the largest bucket": largest,
        "median seconds of a broadcast alone": statistics.median(broadcasts),
        "transports": {name: summary(rows, sum(buckets), largest) for name, rows in runs.items()},
    }


def summary(rows: list[dict[str, float]], size: int, bucket: int) -> dict[str, Any]:
    sync, bare = (statistics.median(row[name] for row in rows) for name in ("sync", "bare"))
    return {
        "median seconds": {"sync": sync, "bare": bare},
        "bytes per second": {"sync": size / sync, "bare": size / bare},
        "sync / bare": sync / bare,
        "peak memory, buckets": max(row["bytes over baseline"] for row in rows) / bucket,
        "runs": rows,
    }


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and bytes by which the resident set's peak exceeds its size before."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    started = time.perf_counter()
    work()
    return time.perf_counter() - started, resident("VmHWM") - before


def config_of(
    size: str, folder: Path, python: str, *more: str, transport: str = "tensor", url: str | None = None
) -> Any:
    from opo_megatron.config import load_config

    overrides = [f"run.dir={folder}", "run.threads_per_rank=1", f"rollout.sglang.python={python}"]
    overrides += [f"policy.model.{key}={value}" for key, value in SIZES[size].items()]
    overrides += [f"rollout.sglang.api_key_file={folder / 'key'}"]
    overrides += [f"rollout.sglang.transport={transport}", "rollout.sglang.max_running_requests=8"]
    if url is not None:
        overrides.append(f"rollout.sglang.urls=[{url}]")
    return load_config(str(ROOT / "recipes" / "quickstart_sglang.yaml"), [*overrides, *more], 1)


# ---------------------------------------------------------------------- bare copies

Stream = Iterable[list[tuple[str, Any]]]


@contextmanager
def bare_copies(folder: Path, buckets: list[int]) -> Iterator[dict[str, Callable[[Stream], None]]]:
    """The minimum that each transport does, with a peer process that only receives the bytes."""
    import torch

    from opo_megatron.rollout.sglang.server import free_port
    from opo_megatron.rollout.sglang.transfer import pickled

    command = [sys.executable, __file__, "--peer"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdin is not None and peer.stdout is not None
        requests, replies = peer.stdin, peer.stdout

        def send(**message: Any) -> None:
            requests.write(json.dumps(message) + "\n")
            requests.flush()

        def request(**message: Any) -> None:
            send(**message)
            assert json.loads(replies.readline()) == "done"

        request(do="allocate", buckets=buckets)
        port = free_port()
        send(do="join", port=port)
        group = join(port, 0)
        assert json.loads(replies.readline()) == "done"

        def tensor(stream: Stream) -> None:
            for i, bucket in enumerate(stream):
                storage = torch.UntypedStorage._new_shared(buckets[i])
                buffer = torch.empty(0, dtype=torch.uint8).set_(storage)
                pack(bucket, buffer)
                request(do="tensor", bucket=i, named=pickled([("bucket", buffer)]))

        staged = [torch.empty(size, dtype=torch.uint8) for size in buckets]

        def broadcast(what: str) -> None:
            for i, stage in enumerate(staged):
                send(do=what, bucket=i)
                broadcast_in(group, stage)
                assert json.loads(replies.readline()) == "done"

        def disk(stream: Stream) -> None:
            for i, bucket in enumerate(stream):
                path = folder / f"bare-{i}"
                with path.open("wb") as file:
                    for _, one in bucket:
                        file.write(one.contiguous().numpy().reshape(-1).view("uint8").data)
                request(do="disk", bucket=i, path=str(path))
                path.unlink()

        for stage in staged:
            stage.zero_()
        yield {
            "tensor": tensor,
            "distributed": lambda _: broadcast("distributed"),
            "disk": disk,
            "broadcast": lambda _: broadcast("broadcast"),
        }
        requests.close()


def join(port: int, rank: int) -> Any:
    """A gloo group of this process and its peer; rank 0 sends."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    return dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))


def broadcast_in(group: Any, tensor: Any) -> None:
    import torch.distributed as dist

    group.broadcast([tensor], dist.BroadcastOptions()).wait()


def pack(bucket: list[tuple[str, Any]], buffer: Any) -> None:
    import torch

    begin = 0
    for _, one in bucket:
        buffer[begin : begin + one.nbytes].copy_(one.reshape(-1).view(torch.uint8))
        begin += one.nbytes


class Peer:
    """The receiving process of bare copies: it holds memory for the model, and reads one request per line."""

    def serve(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            getattr(self, message.pop("do"))(**message)
            print(json.dumps("done"), flush=True)

    def allocate(self, buckets: list[int]) -> None:
        import torch
        import torch.multiprocessing

        torch.multiprocessing.set_sharing_strategy("file_system")
        self.memory = [torch.zeros(size, dtype=torch.uint8) for size in buckets]

    def join(self, port: int) -> None:
        self.group = join(port, 1)

    def tensor(self, bucket: int, named: str) -> None:
        import base64
        import pickle

        ((_, buffer),) = pickle.loads(base64.b64decode(named))
        self.memory[bucket].copy_(buffer)

    def distributed(self, bucket: int) -> None:
        import torch

        new = torch.empty_like(self.memory[bucket])
        broadcast_in(self.group, new)
        self.memory[bucket].copy_(new)

    def broadcast(self, bucket: int) -> None:
        broadcast_in(self.group, self.memory[bucket])

    def disk(self, bucket: int, path: str) -> None:
        with open(path, "rb", buffering=0) as file:
            file.readinto(self.memory[bucket].numpy().data)


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())

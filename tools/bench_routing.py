"""Measures what the experts of a rollout cost on their way from an SGLang server → records/routing.json

    python tools/bench_routing.py                        # the record
    python tools/bench_routing.py --repeats 1 --tokens 256     # a quick run; writes nothing

The size is Qwen3-30B-A3B's: 48 layers, 8 of 128 experts for a token.  A server that generates nothing, in
SGLang's environment, encodes tables and replies as SGLang does; the trainer's own client receives, parses,
unpacks and checks them.  The forms:

    int32   SGLang's own: little-endian int32 in base64, in the JSON reply
    uint8   one byte per expert in base64, in the JSON reply; would need a change inside the server
    file    one byte per expert in a file of shared memory, named in the JSON reply; likewise, and one machine

A form's seconds are the processor seconds of both processes minus those of replies without experts, medians
of interleaved runs.  Then, by arithmetic, the share of a published step: 2,048 responses of 4,096 tokens on
32 GPUs, 1,102 tokens per second and GPU, 192 s.  Every rank asks for its own share, and one server process
replies to the ranks that share it, at most the 8 of a node.  Nothing is taken to overlap.  Exit code 1 where
SGLang's own form takes more than 10 % of the step.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import base64
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.record import write_record

from opo_megatron.utils.terminal import prepare_terminal

ROOT = Path(__file__).parent.parent
SERVER = Path(__file__).parent / "bench" / "routing_server.py"
LAYERS, TOPK, EXPERTS = 48, 8, 128
PROMPT, RESPONSES = 256, 2
FORMS = ("int32", "uint8", "file")
LARGEST_SHARE = 0.1
STEP: dict[str, float] = {"responses": 2048, "tokens": 4096, "gpus": 32, "seconds": 192}
RANKS_PER_SERVER = (1, 2, 4, 8)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=int, default=4096, help="of a response; another number writes nothing"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--sglang-python", default=str(ROOT / ".venv-sglang" / "bin" / "python"), metavar="PYTHON",
        help="interpreter of SGLang's environment (default: that of `make setup-sglang`)",
    )  # fmt: skip
    options = parser.parse_args()
    results = measure(options.sglang_python, options.tokens, options.repeats)
    print(json.dumps(results, indent=2))
    if options.tokens == parser.get_default("tokens"):
        print(f"written to {write_record('routing', results)}")
    share = max(results["forms"]["int32"]["share of a step, by ranks per server"].values())
    if share > LARGEST_SHARE:
        print(f"NOT MET: int32 takes {share:.1%} of a step, at most {LARGEST_SHARE:.0%}")
    return int(share > LARGEST_SHARE)


def measure(python: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Every form, interleaved with replies without experts."""
    import torch

    torch.set_num_threads(1)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    runs: dict[str, list[tuple[float, float, int]]] = {form: [] for form in ("none", *FORMS)}
    with tempfile.TemporaryDirectory(dir=memory) as folder, serving(python, folder) as client:
        for i in range(repeats + 1):
            for form in runs:
                row = one_post(client, form, tokens)
                if i:  # the first round warms up
                    runs[form].append(row)
    computed = RESPONSES * (PROMPT + tokens - 1)
    server, trainer, _ = (statistics.median(column) for column in zip(*runs["none"], strict=True))
    forms = {}
    for form in FORMS:
        medians = [statistics.median(column) for column in zip(*runs[form], strict=True)]
        of_server, of_trainer = (medians[0] - server) / computed, (medians[1] - trainer) / computed
        forms[form] = {
            "bytes per token": medians[2] / computed,
            "gigabytes of a step": medians[2] / computed * STEP["responses"] * STEP["tokens"] / 1e9,
            "seconds per 1,000 tokens": {
                "server": 1e3 * of_server,
                "trainer": 1e3 * of_trainer,
            },
            "share of a step, by ranks per server": {
                str(ranks): share_of_step(of_server, of_trainer, ranks) for ranks in RANKS_PER_SERVER
            },
        }
    return {
        "layers": LAYERS, "experts per token": TOPK, "experts": EXPERTS,
        "responses per post": RESPONSES, "prompt tokens": PROMPT, "response tokens": tokens,
        "step": STEP, "seconds of a post without experts": {"server": server, "trainer": trainer},
        "forms": forms,
    }  # fmt: skip


def share_of_step(server: float, trainer: float, ranks: int) -> float:
    """Of a step's seconds, where nothing overlaps; both in seconds per token."""
    tokens_of_a_rank = STEP["responses"] * STEP["tokens"] / STEP["gpus"]
    return tokens_of_a_rank * (ranks * server + trainer) / STEP["seconds"]


def one_post(client: Any, form: str, tokens: int) -> tuple[float, float, int]:
    """Processor seconds of server and trainer, and bytes of the experts."""
    from opo_megatron.config.schema import ModelConfig
    from opo_megatron.rollout.engine import GenerationRequest
    from opo_megatron.rollout.sglang.routed_experts import ROUTED_EXPERTS, unpack_experts

    model = ModelConfig(num_layers=LAYERS, num_moe_experts=EXPERTS, moe_router_topk=TOPK)
    requests = [GenerationRequest(i, i, 0, (0,) * PROMPT) for i in range(RESPONSES)]
    before, own = client.post("/cpu"), time.process_time()
    replies = client.post(
        "/generate", form=form, responses=RESPONSES, prompt=PROMPT, tokens=tokens,
        layers=LAYERS, topk=TOPK, experts=EXPERTS,
    )  # fmt: skip
    size = 0
    if form == "int32":
        size = sum(len(reply["meta_info"][ROUTED_EXPERTS]) for reply in replies)
        unpack_experts(requests, replies, model)
    elif form != "none":
        size = sum(unpack_bytes(reply["meta_info"][ROUTED_EXPERTS], form, model) for reply in replies)
    own = time.process_time() - own
    return client.post("/cpu") - before, own, size


def unpack_bytes(packed: str, form: str, model: Any) -> int:
    """What the trainer would do to the forms that it does not have; returns their size in bytes."""
    import numpy as np
    import torch

    from opo_megatron.rollout.sglang.routed_experts import checked

    data = Path(packed).read_bytes() if form == "file" else base64.b64decode(packed, validate=True)
    checked(torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(-1, LAYERS, TOPK), model, 0)
    return len(data) if form == "file" else len(packed)


@contextlib.contextmanager
def serving(python: str, folder: str) -> Iterator[Any]:
    """A client of `routing_server.py`, which ends with this context."""
    from opo_megatron.errors import EngineFailure
    from opo_megatron.rollout.sglang.client import Client
    from opo_megatron.rollout.sglang.server import free_port

    port = free_port()
    process = subprocess.Popen([python, str(SERVER), str(port), folder])
    try:
        client = Client(f"http://127.0.0.1:{port}", 120.0)
        while process.poll() is None:
            with contextlib.suppress(EngineFailure):
                client.post("/cpu")
                break
            time.sleep(0.2)
        yield client
    finally:
        process.terminate()
        process.wait(10)


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())

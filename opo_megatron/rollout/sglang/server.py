"""A managed SGLang server: started by one rank of each group that shares it, stopped by process id.

The server begins with dummy weights: the first transfer brings the policy's, so that no copy of the
model is written to disk.  Its own process group and log file belong to the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from opo_megatron.config.architecture import hf_config
from opo_megatron.config.choices import Dtype
from opo_megatron.config.schema import Config, SglangConfig
from opo_megatron.errors import UserError
from opo_megatron.rollout.sglang.client import Client

SERVE = Path(__file__).parent / "serve.py"
CONTEXT_MARGIN = 8
"""SGLang keeps some positions of the context length for itself."""
STOP_SECONDS = 10.0
PORTS = (20000, 32768)
PORT_ATTEMPTS = 3
PORT_IS_TAKEN = b"address already in use"
"""What the server's log says where it could not have its port."""
_OF_THE_TRAINER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CPU_OPTIONS = {
    "device": "cpu",
    "attention-backend": "torch_native",
    "sampling-backend": "pytorch",
    "grammar-backend": "none",
    "disable-overlap-schedule": True,
    "sleep-on-idle": True,  # an idle server would keep a core busy
    "mem-fraction-static": 0.8,  # may hold weights and cache; what it takes is max-total-tokens
}


def write_model_config(
    config: Config, vocab_size: int, folder: Path, quantization: Mapping[str, object] | None = None
) -> None:
    """The `config.json` that a server builds its model from; it needs nothing else.

    No token ends a response by itself: what stops is said with every request.

    Args:
        quantization: how the weights that the server will get are quantized.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = hf_config(replace(config.policy.model, vocab_size=vocab_size), _dtype(config))
    described |= {"bos_token_id": None, "eos_token_id": None}
    if quantization is not None:
        described["quantization_config"] = dict(quantization)
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def _dtype(config: Config) -> str:
    return "bfloat16" if config.policy.dtype is Dtype.bf16 else "float32"


def interpreter(settings: SglangConfig) -> Path:
    """The Python of SGLang's environment.

    Raises:
        UserError: where there is none.
    """
    python = Path(settings.python).expanduser()
    if not python.exists():
        raise UserError(
            f"rollout.sglang.python={settings.python} does not exist; make that environment with "
            "`make setup-sglang`, or name the interpreter of one that has SGLang"
        )
    return python


class _PortTaken(UserError):
    """Another process took the port that was free when the server began to start."""


class Server:
    """One server process and how to reach it."""

    def __init__(self, config: Config, model_dir: Path, log: Path, name: str, gpus: list[str] | None) -> None:
        """Args:
        model_dir: folder with the model's `config.json`.
        log: file that takes what the server prints, of all its starts.
        gpus: devices it may use; None on a CPU.
        """
        self.config, self.model_dir, self.log, self.name, self.gpus = config, model_dir, log, name, gpus
        self.settings = config.rollout.sglang
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def client(self) -> Client:
        return Client(self.url, self.settings.timeout_seconds, self.settings.api_key)

    def start(self, show_status: Callable[[str], None]) -> None:
        """Start and wait until it answers.

        Raises:
            UserError: where its environment is missing or it ends before it is ready.
        """
        for attempt in range(1, PORT_ATTEMPTS + 1):
            try:
                return self._start_on(free_port(), show_status)
            except _PortTaken:
                self.stop()
                if attempt == PORT_ATTEMPTS:
                    raise

    def _start_on(self, port: int, show_status: Callable[[str], None]) -> None:
        python = interpreter(self.settings)
        self.url = f"http://127.0.0.1:{port}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            begin = log.tell()
            self._process = subprocess.Popen(
                [str(python.absolute()), str(SERVE), *self.arguments(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,  # a group of its own, which `stop` ends as a whole
            )
        # Also that of its process group: what a user may end by hand.
        self.log.with_suffix(".pid").write_text(f"{self._process.pid}\n")
        self._wait_until_ready(show_status, begin)

    def arguments(self, port: int) -> list[str]:
        """Options of `sglang.launch_server`; the recipe's come last and win."""
        rollout, settings = self.config.rollout, self.settings
        samples = rollout.prompts_per_step * rollout.samples_per_prompt
        running = settings.max_running_requests or samples
        longest = self.config.policy.model.max_sequence_length + CONTEXT_MARGIN
        options: dict[str, object] = {
            "model-path": self.model_dir,
            "host": "127.0.0.1",
            "port": port,
            "dtype": _dtype(self.config),
            "load-format": "dummy",
            "skip-tokenizer-init": True,
            "skip-server-warmup": True,
            "context-length": longest,
            "tensor-parallel-size": settings.tensor_parallel_size,
            "max-running-requests": running,
            "random-seed": self.config.run.seed,
            "log-level": "warning",
        }
        if self.gpus is None:
            options |= _CPU_OPTIONS | {"max-total-tokens": max(4096, running * longest)}
        else:
            options |= {"enable-memory-saver": True, "base-gpu-id": 0}
        if settings.api_key is not None:
            options["api-key"] = settings.api_key
        options |= {key.replace("_", "-"): value for key, value in settings.options.items()}
        words: list[str] = []
        for key, value in options.items():
            if value is True:
                words.append(f"--{key}")
            elif value is not False and value is not None:
                words += [f"--{key}", str(value)]
        return words

    def environment(self) -> dict[str, str]:
        """The trainer's, without what describes its ranks and its Python."""
        kept = {name: value for name, value in os.environ.items() if name not in _OF_THE_TRAINER}
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            kept.pop(name, None)
        kept["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"  # for CONTEXT_MARGIN
        # None on a CPU: SGLang asks torch for GPUs, not its own option --device.
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus or ())
        if self.gpus is None:
            # More threads than idle cores make it many times slower, as they do the ranks.
            kept["OMP_NUM_THREADS"] = str(self.config.run.threads_per_rank)
            # The C library would map fresh pages for every bucket, which takes longer than filling them.
            kept |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**30)}
        return kept

    def _wait_until_ready(self, show_status: Callable[[str], None], begin: int) -> None:
        """Args:
        begin: where this start's part of the log begins.
        """
        started, client = time.monotonic(), self.client()
        while True:
            if PORT_IS_TAKEN in self.log.read_bytes()[begin:]:
                # It goes on without serving, and who has the port may answer in its place.
                raise _PortTaken(f"{self.url} was taken before the SGLang server had it; start again")
            if client.is_healthy():
                return
            seconds = time.monotonic() - started
            if self._process is None or self._process.poll() is not None:
                code = None if self._process is None else self._process.returncode
                raise UserError(
                    f"the SGLang server ended while starting (exit code {code}): {self._last_error()}; "
                    f"its log is {self.log}"
                )
            if seconds > self.settings.start_timeout_seconds:
                self.stop()
                raise UserError(
                    f"the SGLang server was not ready after rollout.sglang.start_timeout_seconds="
                    f"{self.settings.start_timeout_seconds:g}; raise that, or look into {self.log}"
                )
            show_status(f"starting SGLang {self.name}  {seconds:.0f} s")
            time.sleep(0.5)

    def _last_error(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "Error" in line] or lines
        return errors[-1].strip() if errors else "it printed nothing"

    def is_alive(self) -> bool:
        """Whether the process runs and answers."""
        return self._process is not None and self._process.poll() is None and self.client().is_healthy()

    def stop(self) -> None:
        """End the server and its workers, by process group; at most some seconds."""
        process, self._process = self._process, None
        if process is None:
            return
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        _signal_group(process.pid, signal.SIGKILL)  # workers that outlive their parent, too
        process.wait()


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def free_port() -> int:
    """A port that is free now, and below those that outgoing connections are given.

    A server binds it only many seconds later.
    """
    while True:
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port

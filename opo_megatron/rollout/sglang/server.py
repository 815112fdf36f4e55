"""A managed SGLang server: started by one rank of the group that shares it, stopped by process id.

The server starts with dummy weights and gets the policy's by the first transfer, so no copy of the model is
written to disk.  It has its own process group, and a log file in the run folder.
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
from opo_megatron.config.rules.api_key import variable_of
from opo_megatron.config.schema import Config
from opo_megatron.errors import UserError
from opo_megatron.rollout.sglang import exact_mode, expert_recording
from opo_megatron.rollout.sglang.api_key import random_key, shared_key
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.compilation import CompileWatch
from opo_megatron.rollout.sglang.installation import (
    PARENT,
    SERVE,
    as_words,
    by_their_own_names,
    interpreter,
    own_environment,
)
from opo_megatron.rollout.sglang.token_channel import VARIABLE as TOKEN_CHANNEL
from opo_megatron.utils.hashing import hash_of, hash_of_text
from opo_megatron.utils.start_folder import start_folder

CONTEXT_MARGIN = 8
"""Positions of the context length that SGLang reserves."""
STOP_SECONDS = 10.0
LOOPBACK = "127.0.0.1"
PORTS = (20000, 32768)
PORT_ATTEMPTS = 3
PORT_IS_TAKEN = b"address already in use"
"""In the server's log where it could not bind its port."""
_CPU_OPTIONS = {
    "device": "cpu",
    "attention-backend": "torch_native",
    "sampling-backend": "pytorch",
    "grammar-backend": "none",
    "disable-overlap-schedule": True,
    "sleep-on-idle": True,  # an idle server would keep a core busy
    "mem-fraction-static": 0.8,  # an upper limit; the KV cache is sized by max-total-tokens
}


def write_model_config(
    config: Config, vocab_size: int, folder: Path, quantization: Mapping[str, object] | None = None
) -> None:
    """Write the `config.json` that a server builds its model from; it needs nothing else.

    It names no EOS token: every request carries its stop tokens.

    Args:
        quantization: `quantization_config` of the weights that the server will receive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    description = hf_config(replace(config.policy.model, vocab_size=vocab_size), _dtype(config))
    description |= {"bos_token_id": None, "eos_token_id": None}
    if quantization is not None:
        description["quantization_config"] = dict(quantization)
    if config.rollout.sglang.exact:
        description |= exact_mode.model_description(config.policy)
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")


def _dtype(config: Config) -> str:
    return "bfloat16" if config.policy.dtype is Dtype.bf16 else "float32"


class _PortTaken(UserError):
    """Another process bound the port, which was free when the server started."""


class Server:
    """One server process and its URL."""

    def __init__(self, config: Config, model_dir: Path, log: Path, name: str, gpus: list[str] | None) -> None:
        """Args:
        model_dir: folder with the model's `config.json`.
        log: file for the server's output, appended to at every start.
        gpus: its CUDA_VISIBLE_DEVICES; None on a CPU.
        """
        self.config, self.model_dir, self.log, self.name, self.gpus = config, model_dir, log, name, gpus
        self.settings = config.rollout.sglang
        self.key = shared_key(self.settings, makes_file=True) or random_key()
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self.watch: CompileWatch | None = None
        """Of the process that was started last."""
        self.url = ""

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def client(self) -> Client:
        return Client(self.url, self.settings.timeout_seconds, self.key)

    def start(self, show_status: Callable[[str], None]) -> None:
        """Start the server and wait until it is healthy.

        Raises:
            UserError: where its environment is missing, or it exits or times out before it is ready.
        """
        for attempt in range(1, PORT_ATTEMPTS + 1):
            try:
                return self._start_on(free_port(), show_status)
            except _PortTaken:
                self.stop()
                if attempt == PORT_ATTEMPTS:
                    raise

    def _start_on(self, port: int, show_status: Callable[[str], None]) -> None:
        self._starts += 1
        python = interpreter(self.settings)
        self.url = f"http://{LOOPBACK}:{port}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            begin = log.tell()
            self._process = subprocess.Popen(
                [str(python), str(SERVE), *self.arguments(port)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment() | {PARENT: str(os.getpid())},
                cwd=start_folder(),  # of paths among its options
                start_new_session=True,  # its own process group, which `stop` signals
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:  # it ended; reported below
            pipe.write(f"{self.key}\n".encode())
        # Also the process group's id, for killing it by hand.
        self.log.with_suffix(".pid").write_text(f"{self._process.pid}\n")
        limit = self.settings.start_timeout_seconds
        self.watch = CompileWatch(self.name, self._process.pid, self.log, limit, begin)
        self._wait_until_ready(self.watch, show_status)

    def arguments(self, port: int, host: str = LOOPBACK) -> list[str]:
        """Options of `sglang.launch_server`; the recipe's come last and override."""
        rollout, settings = self.config.rollout, self.settings
        samples = rollout.prompts_per_step * rollout.samples_per_prompt
        running = settings.max_running_requests or samples
        longest = self.config.policy.model.max_sequence_length + CONTEXT_MARGIN
        options: dict[str, object] = {
            "model-path": self.model_dir,
            "host": host,
            "port": port,
            "dtype": _dtype(self.config),
            "load-format": "dummy",
            "skip-tokenizer-init": True,
            "skip-server-warmup": True,
            "context-length": longest,
            "tensor-parallel-size": settings.tensor_parallel_size,
            "max-running-requests": running,
            "random-seed": self._random_seed(),
            "log-level": "warning",
        }
        if self.gpus is None:
            options |= _CPU_OPTIONS | {"max-total-tokens": max(4096, running * longest)}
        else:
            options |= {"enable-memory-saver": True, "base-gpu-id": 0}
        if settings.deterministic:
            options |= {"enable-deterministic-inference": True, "attention-backend": "triton"}
        if settings.exact:
            options |= exact_mode.options(self.config, on_gpu=self.gpus is not None)
        options |= expert_recording.options(self.config)
        return as_words(options | by_their_own_names(settings.options))

    def _random_seed(self) -> int:
        """Another one for every server and every start of it.

        A server that restarted with the same one would sample with the same random numbers again, and so
        continue responses with those that their beginnings were sampled with.
        """
        return hash_of((self.config.run.seed, hash_of_text(self.name), self._starts)) & (2**31 - 1)

    def environment(self) -> dict[str, str]:
        """The trainer's environment without the key, and the variables of torchrun and of its Python."""
        environment = own_environment()
        if (variable := variable_of(self.settings)) is not None:
            del environment[variable]
        environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"  # for CONTEXT_MARGIN
        # Empty on a CPU: SGLang looks for GPUs by torch, not by its option --device.
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus or ())
        if self.settings.exact:
            environment |= exact_mode.ENVIRONMENT
        if self.settings.continue_responses:
            environment[TOKEN_CHANNEL] = "on"
        if self.gpus is None:
            # More threads than idle cores make it many times slower, as for the ranks.
            environment["OMP_NUM_THREADS"] = str(self.config.run.threads_per_rank)
            # By default glibc maps fresh pages for every bucket, which takes longer than filling them.
            environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**30)}
            if (ranks := self.settings.tensor_parallel_size) > 1:
                environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", _cores_of_ranks(ranks))
        return environment

    def _wait_until_ready(self, watch: CompileWatch, show_status: Callable[[str], None]) -> None:
        started, client = time.monotonic(), self.client()
        while True:
            if PORT_IS_TAKEN in self.log.read_bytes()[watch.begin :]:
                # The server keeps running without serving, and another process may reply on the port.
                raise _PortTaken(f"another process took {self.url} before the SGLang server; start again")
            if client.is_healthy():
                return
            seconds = time.monotonic() - started
            if self._process is None or self._process.poll() is not None:
                code = None if self._process is None else self._process.returncode
                raise UserError(
                    f"the SGLang server exited while starting (exit code {code}): {self._last_error()}; "
                    f"its log is {self.log}"
                )
            if seconds > self.settings.start_timeout_seconds:
                self.stop()
                raise UserError(
                    f"the SGLang server was not ready after rollout.sglang.start_timeout_seconds="
                    f"{self.settings.start_timeout_seconds:g}; raise that, or read {self.log}"
                )
            show_status(watch.activity() or f"starting SGLang {self.name}  {seconds:.0f} s")
            time.sleep(0.5)

    def _last_error(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "Error" in line] or lines
        return errors[-1].strip() if errors else "it printed nothing"

    def is_alive(self) -> bool:
        """Whether the process runs, and is healthy or compiles its kernels."""
        if self._process is None or self._process.poll() is not None or self.watch is None:
            return False
        return self.client().is_healthy() or self.watch.activity() is not None

    def stop(self) -> None:
        """Stop the server and its workers, by process group; takes at most some seconds."""
        process, self._process = self._process, None
        if process is None:
            return
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        _signal_group(process.pid, signal.SIGKILL)  # also kills workers that outlive their parent
        process.wait()


def _cores_of_ranks(ranks: int) -> str:
    """The cores of each rank of a server in SGLang's words; without them it wants a NUMA node per rank."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    return "|".join(
        ",".join(str(cores[(rank * share + i) % len(cores)]) for i in range(share)) for rank in range(ranks)
    )


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def free_port() -> int:
    """A free port below the ephemeral range, because a server binds it only many seconds later."""
    while True:
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port

"""`RolloutEngine` over SGLang servers, shared by groups of ranks.

*Managed*: one server per engine-sized group of a node's ranks (on a CPU one for the whole node); the
group's first rank starts it and sends it weights.  *External* (`rollout.sglang.urls`): servers that
are running already, with weights from rank 0; every rank balances its requests over them.

A weight update is pause → flush → begin → buckets → end → new version → continue.  Flushing matters:
keys and values of old weights that stay in the radix cache would serve the next rollouts.  During an
update the engine holds no version and refuses to generate.

After a failure the caller has every rank generate once more.  Each response is then continued from all of its
received tokens, whether it had ended or not (`continuation.py`, `received.py`).  Where a server does not send
tokens as they are sampled, or experts are recorded, the whole call is generated again: keeping the responses
that had finished would favour short ones.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config.choices import Transport
from opo_megatron.config.schema import Config
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.errors import EngineFailure, Preempted, UserError
from opo_megatron.rollout.conversations import Conversations
from opo_megatron.rollout.engine import (
    WITHOUT_GRAPHS,
    Deliver,
    Digests,
    GenerationRequest,
    Progress,
    Sampling,
    check_lengths,
)
from opo_megatron.rollout.sglang import exact_mode
from opo_megatron.rollout.sglang.api_key import shared_key
from opo_megatron.rollout.sglang.balance import Balance
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.compilation import CompileWatch
from opo_megatron.rollout.sglang.continuation import Continuation
from opo_megatron.rollout.sglang.conversing import converse
from opo_megatron.rollout.sglang.exact_batchings import (
    BATCHINGS,
    CACHED,
    CHUNKED,
    check_size,
    replies_batched,
)
from opo_megatron.rollout.sglang.placement import server_group, servers_per_node, visible_gpus
from opo_megatron.rollout.sglang.replies import digests_of, rollouts_of
from opo_megatron.rollout.sglang.routed_experts import experts_of
from opo_megatron.rollout.sglang.server import Server, free_port
from opo_megatron.rollout.sglang.server_checks import answering, check_external, check_servers_device
from opo_megatron.rollout.sglang.slices import SliceFeed, slice_feed
from opo_megatron.rollout.sglang.transfer import (
    Bucket,
    DiskTransfer,
    DistributedTransfer,
    Sender,
    SliceTransfer,
    TensorTransfer,
    Transfer,
    check_success,
    group_backend,
)
from opo_megatron.utils.start_folder import absolute
from opo_megatron.weights.fp8_folder import BlockFp8
from opo_megatron.weights.slice_stream import WeightStream
from opo_megatron.weights.stream import NamedTensors

POSTS_PER_CALL = 16
"""A rank's requests are split into at most this many posts, so that progress shows as they end."""
SINGLE_POSTS = 256
"""The same where responses are delivered as they end, and only replies tell that: mostly one request each."""
PROGRESS_EVERY_SECONDS = 1.0
"""Interval at which a stop request is noticed during generation."""
DELIVER_EVERY_SECONDS = 0.05
"""The same where responses are delivered as their last token is received."""
ABORT_SECONDS = 10.0
"""How long a server may take to note that its requests are aborted."""
FLUSH_SECONDS = 30
"""How long a flush waits for running requests."""


class SglangEngine:
    """This rank's view of the servers."""

    _slices: SliceFeed | None = None
    """How its weights are cut; None where servers get full tensors."""

    def __init__(
        self,
        config: Config,
        parallel: Parallel,
        model_dir: Path,
        show_status: Callable[[str], None],
        fp8: BlockFp8 | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Find the servers and start the managed ones; a collective of all ranks.

        Args:
            model_dir: folder with the `config.json` that managed servers build their model from.
            show_status: shows one line, which the next one replaces.
            fp8: how weights are quantized before sending; None sends them as they are.
            log: prints one line that stays.
        """
        self._fp8, self._log = fp8, log
        self.config, self.settings, self.parallel = config, config.rollout.sglang, parallel
        self._show_status = show_status
        self.version: int | None = None
        self._folder = absolute(config.run.dir) / "sglang"
        self._server: Server | None = None
        self._owner = 0
        self._transfers: dict[str, Transfer[Any]] = {}
        self._released: set[str] = set()
        self._watch: CompileWatch | None = None
        self._announced: set[int] = set()
        self._continuation = Continuation(self.settings.continue_responses, log)
        check_servers_device(self.settings, parallel.device)
        if not self.settings.urls:
            group = server_group(
                all_gather_objects(parallel, socket.gethostname()),
                parallel.rank,
                servers_per_node(self.settings, parallel.device),
            )
            self._owner = group[0]
            if self.is_sender:
                name = f"server_{parallel.rank}"
                file = self._folder / f"{name}.log"
                self._server = Server(
                    config, model_dir, file, name, visible_gpus(parallel.device, len(group))
                )
        self._slices = slice_feed(config, parallel, self._owner, fp8, log)
        self._clients: list[Client] = []
        self.recover()

    @property
    def is_sender(self) -> bool:
        """Whether this rank sends weights to its servers."""
        return self.parallel.rank == self._owner

    # ------------------------------------------------------------------ lifecycle

    def recover(self) -> None:
        """Start managed servers that do not run, leave out external ones that do not answer; a collective.

        They hold no weights afterwards.  The next call of `generate` continues the last one.

        Raises:
            UserError: where an external server does not answer at the start, or none later.
        """
        is_start = not self._clients
        self.version = None
        self._continuation.keep()
        self._close_transfers()
        if self.settings.urls:
            key = shared_key(self.settings)
            clients = [self._client(url, key) for url in self.settings.urls]
            self._clients = answering(clients, self.parallel, is_start, self._log)
            for client in self._clients:
                check_external(client, self.config, self._slices is not None)
            return
        # Without its KV cache a server cannot be asked whether it is healthy: it would generate a token.
        if self._server is not None and (self._released or not self._server.is_alive()):
            self._released = set()
            self._server.stop()
            self._server.start(self._show_starting)
        url, key, self._watch = all_gather_objects(self.parallel, self._own_address())[self._owner]
        self._clients = [self._client(url, key)]

    def _own_address(self) -> tuple[str, str, CompileWatch] | None:
        """For the ranks that share this rank's server, on the same machine."""
        if self._server is None:
            return None
        assert self._server.watch is not None
        return self._server.url, self._server.key, self._server.watch

    def _client(self, url: str, key: str | None) -> Client:
        return Client(url, self.settings.timeout_seconds, key, self._shows_compiling)

    def _show_starting(self, line: str) -> None:
        assert self._server is not None
        self._announce_compiling(self._server.watch)
        self._show_status(line)

    def _shows_compiling(self) -> bool:
        """Whether the server that does not answer compiles, which is shown then."""
        if (line := self.activity()) is None:
            return False
        self._announce_compiling(self._watch)
        self._show_status(line)
        return True

    def _announce_compiling(self, watch: CompileWatch | None) -> None:
        """Log it once for each server process, for runs without a terminal."""
        if watch is not None and watch.pid not in self._announced and watch.activity() is not None:
            self._announced.add(watch.pid)
            self._log(f"SGLang {watch.name} compiles its kernels, which takes about a minute; the run waits")

    def activity(self) -> str | None:
        """What the server does instead of answering, as far as this machine shows it."""
        return None if self._watch is None else self._watch.activity()

    def close(self) -> None:
        """Stop the servers that this rank started."""
        self._close_transfers()
        if self._server is not None:
            self._server.stop()

    def _close_transfers(self) -> None:
        for transfer in self._transfers.values():
            transfer.close()
        self._transfers = {}

    # ------------------------------------------------------------------ memory

    def sleep(self, keeps_weights: bool = False) -> None:
        """Release the memory of the servers that this rank sends weights to; their weights are lost."""
        parts = {"kv_cache"} if keeps_weights else {"kv_cache", "weights"}
        if not keeps_weights:
            self.version = None
        tags = sorted(parts - self._released)
        if self.is_sender and tags:
            try:
                for client in self._clients:
                    client.post("/release_memory_occupation", tags=tags)
            except EngineFailure:
                if self._server is not None:
                    self._server.stop()  # otherwise it keeps its memory; the next update restarts it
                raise
            self._released |= parts

    def wake(self) -> None:
        """Resume all released memory of the servers."""
        self._resume(set(self._released))

    def _resume(self, parts: set[str]) -> None:
        tags = sorted(parts & self._released)
        if self.is_sender and tags:
            for client in self._clients:
                client.post("/resume_memory_occupation", tags=tags)
            self._released -= parts

    # ------------------------------------------------------------------ weights

    def update_weights(self, buckets: NamedTensors, version: int) -> None:
        """Send the stream to this rank's servers; every rank enters and exhausts it.

        Raises:
            EngineFailure: where a server did not load all of it; it then holds no usable weights.
        """
        self.version = None
        if self._slices is not None:
            assert isinstance(buckets, WeightStream)
            self._slices.check(buckets)
        failure: EngineFailure | UserError | None = None
        senders: list[Sender[Any]] = []
        try:
            self._resume({"weights"})
            if self.is_sender:
                for client in self._clients:
                    self._open_update(client)
                    senders.append(Sender(self._transfer(client)))
        except (EngineFailure, UserError) as error:
            failure, senders = error, []
        failure = self._send(buckets, senders) or failure
        for sender in senders:
            try:
                sender.finish()
            except (EngineFailure, UserError) as error:
                failure = failure or error
        if self._slices is not None:
            self._slices.finish()
        if failure is not None:
            raise failure
        if self.is_sender:
            for client in self._clients:
                self._close_update(client, version)
        self.version = version

    def _send(self, buckets: NamedTensors, senders: Sequence[Sender[Any]]) -> UserError | None:
        """Exhaust the stream, a collective of all ranks, whatever fails; returns the first failure."""
        if self._slices is not None:
            assert isinstance(buckets, WeightStream)
            try:
                self._slices.send(buckets, senders, len(self._clients))
            except UserError as error:
                return error
            return None
        failure: UserError | None = None
        for bucket in buckets:
            if not senders or failure is not None:
                continue
            try:
                quantized = self._quantized(bucket)
            except UserError as error:
                failure = error
            else:
                for sender in senders:
                    sender.send(quantized)
        return failure

    def _quantized(self, bucket: Bucket) -> Bucket:
        """A bucket in the precision of the server's model.

        Raises:
            UserError: for weights that are NaN or infinite, in FP8.
        """
        if self._fp8 is None:
            return bucket
        return [pair for name, tensor in bucket for pair in self._fp8.tensors(name, tensor)]

    def _transfer(self, client: Client) -> Transfer[Any]:
        """The server's transport; created once, because joining a group takes time."""
        if client.url not in self._transfers:
            ranks, kind = self.settings.tensor_parallel_size, self.settings.transport
            if self._slices is not None:
                transfer: Transfer[Any] = SliceTransfer(client)
            elif kind is Transport.tensor:
                transfer = TensorTransfer(client, ranks, self.parallel.device)
            elif kind is Transport.distributed:
                backend = group_backend(self.settings.distributed_backend, self.parallel.device)
                transfer = DistributedTransfer(client, ranks, free_port(), backend)
            else:
                transfer = DiskTransfer(client, self._folder / "weights")
            self._transfers[client.url] = transfer
        return self._transfers[client.url]

    def _open_update(self, client: Client) -> None:
        client.post("/pause_generation", mode="abort")
        client.post(f"/flush_cache?timeout={FLUSH_SECONDS}")
        if self._has_sessions(client):
            reply = client.post("/begin_weight_update")
            if reply.get("success") is False:  # an interrupted update left one open
                client.post("/end_weight_update")
                check_success(client.post("/begin_weight_update"), "the beginning of an update")

    def _close_update(self, client: Client, version: int) -> None:
        if self._has_sessions(client):
            check_success(client.post("/end_weight_update"), "the end of an update")
        reply = client.post("/update_weight_version", new_version=str(version), abort_all_requests=False)
        check_success(reply, f"the version {version}")
        client.post("/continue_generation")

    def _has_sessions(self, client: Client) -> bool:
        """From SGLang 0.5.21 on, updates are enclosed by two calls; a load from disk encloses itself."""
        return self.settings.transport is not Transport.disk and client.offers("/begin_weight_update")

    # ------------------------------------------------------------------ rollouts

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        progress: Progress | None = None,
        deliver: Deliver | None = None,
        *,
        conversations: Conversations | None = None,
    ) -> Rollouts:
        """Generate one response per request.

        Args:
            deliver: called with responses as they end; not with conversations.
            conversations: what answers the turns of each response; after a failure, all are generated again.

        Raises:
            EngineFailure: a server died, hung or closed the connection.
            UserError: a prompt does not fit, or a server stops where the task does not.
            Preempted: from `progress`, after all requests of the servers are aborted.
        """
        if self.version is None:
            raise EngineFailure("the servers hold no complete weights")
        check_lengths(requests, sampling, self.config.policy.model)
        balance = Balance(self._clients, self.config)
        if conversations is not None:
            assert deliver is None, "rollout.overlap is refused with conversations"
            self._continuation.forget()
            with self.abort_on_error():
                merged, given = converse(balance, requests, sampling, conversations, progress)
            return given.entered(self._rollouts_of(requests, merged, sampling), conversations)
        with self._continuation.call(requests, sampling, self.version, self._clients) as call:
            received = call.received
            streams = deliver is not None and received.has_channels
            posts = POSTS_PER_CALL if streams or deliver is None else SINGLE_POSTS
            interval = DELIVER_EVERY_SECONDS if streams else PROGRESS_EVERY_SECONDS
            replies: dict[int, Any] = {}
            tokens = 0

            def enter(new: Mapping[int, Any]) -> None:
                nonlocal tokens
                first = [i for i in new if i not in replies]
                replies.update(new)
                tokens += sum(len(new[i]["output_ids"]) for i in first)
                if deliver is not None and first:
                    deliver(
                        self._rollouts_of([requests[i] for i in first], [new[i] for i in first], sampling)
                    )
                if progress is not None:
                    progress(len(replies), len(requests), tokens)

            pending = received.pending
            size = max(1, -(-len(pending) // posts))
            parts = [pending[i : i + size] for i in range(0, len(pending), size)]
            with ThreadPoolExecutor(posts) as threads, self.abort_on_error():
                if received.ended:
                    enter(received.ended)
                waiting = {threads.submit(balance.post_call, call, part) for part in parts}
                while waiting:
                    ended, waiting = wait(waiting, interval, return_when=FIRST_COMPLETED)
                    if streams:
                        enter(received.take_ended())
                    enter({i: reply for post in ended for i, reply in post.result().items()})
        return self._rollouts_of(requests, [replies[i] for i in range(len(requests))], sampling)

    def kept_tokens(self, sampling: Sampling) -> int | None:
        """Tokens of the last call that the next one, of this sampling, begins with; None without any."""
        kept = self._continuation.kept(sampling, self.version)
        return None if kept is None else kept.new_tokens

    def _rollouts_of(
        self, requests: Sequence[GenerationRequest], replies: Sequence[Any], sampling: Sampling
    ) -> Rollouts:
        rollouts = rollouts_of(requests, replies, sampling)
        if sampling.routed_experts:
            rollouts.routed_experts = experts_of(replies, self.config.policy.model)
        return rollouts

    @contextlib.contextmanager
    def abort_on_error(self) -> Iterator[None]:
        """Abort running requests where a server fails or the run stops; else leaving awaits their end."""
        try:
            yield
        except (EngineFailure, Preempted, KeyboardInterrupt):
            for client in self._clients:
                with contextlib.suppress(EngineFailure):  # a server that is gone generates nothing
                    client.post("/abort_request", timeout=ABORT_SECONDS, abort_all=True)
            raise

    def probe(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> dict[str, Rollouts]:
        """The responses of each server that this rank sends weights to."""
        if not self.is_sender:
            return {}
        replies = {
            f"the SGLang server {client.url}": Balance([client], self.config).post(requests, sampling)
            for client in self._clients
        }
        return {name: self._rollouts_of(requests, reply, sampling) for name, reply in replies.items()}

    # ------------------------------------------------------------------ check of exact mode

    def batchings(self) -> Sequence[str]:
        absent = {CACHED} if exact_mode.disables_prefixes(self.settings) else set()
        absent |= {CHUNKED} if self._chunk_tokens() <= 0 else set()
        absent |= set() if self.parallel.device.type == "cuda" else {WITHOUT_GRAPHS}
        return [batching for batching in BATCHINGS if batching not in absent]

    def check_size(self, batching: str) -> tuple[int, int]:
        return check_size(batching, self._chunk_tokens())

    def _chunk_tokens(self) -> int:
        return exact_mode.chunk_tokens(self.settings, on_gpu=self.parallel.device.type == "cuda")

    def generate_batched(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, batching: str
    ) -> Rollouts | None:
        """The responses of every server that this rank sends weights to, batched as the name says.

        Raises:
            EngineFailure: where a server did not do what the name says.
        """
        if not self.is_sender:
            return None
        rollouts = []
        for client in self._clients:
            no_graph = batching == WITHOUT_GRAPHS
            post = partial(Balance([client], self.config).post, sampling=sampling, no_graph=no_graph)
            replies = replies_batched(client, post, requests, batching)
            rollouts.append(rollouts_of(requests, replies, sampling))
        return Rollouts.concatenate(rollouts)

    def trace(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> tuple[Rollouts, list[Digests]] | None:
        """Responses of the first server, decoded without CUDA graphs, and the digests of its operations."""
        if not self.is_sender:
            return None
        client = self._clients[0]
        client.post(f"/flush_cache?timeout={FLUSH_SECONDS}")  # cached tokens would not be computed
        replies = Balance([client], self.config).post(requests, sampling, trace=True)
        return rollouts_of(requests, replies, sampling), [digests_of(reply) for reply in replies]

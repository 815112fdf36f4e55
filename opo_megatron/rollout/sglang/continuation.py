"""What an engine keeps of its last call, so that after a failure the next one continues it.

Every call opens a channel with each of its servers before its requests are sent.  `keep` is called where any
rank's engine has failed, on all ranks: the next call with the same sampling and weight version begins with
what the last one received (`received.py`), also where that had ended on this rank.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.received import Channel, Received
from opo_megatron.rollout.sglang.token_channel import request_id


class Call:
    """One call of the engine, and what is received of it."""

    def __init__(self, received: Received, version: int) -> None:
        self.received, self.version = received, version
        self._name = uuid.uuid4().hex

    def names(self, indices: Sequence[int]) -> dict[str, list[str]]:
        """What requests carry so that their tokens are sent."""
        if not self.received.has_channels:
            return {}
        return {"rid": [request_id(self._name, i) for i in indices]}

    @contextmanager
    def channels(self, clients: Sequence[Client]) -> Iterator[list[str]]:
        """Receive tokens meanwhile; gives the addresses of servers that have no channel.

        Raises:
            EngineFailure, UserError: as any request.
        """
        with ExitStack() as stack:
            without = []
            for client in clients:
                channel = Channel.open(client, self._name, self.received)
                if channel is None:
                    without.append(client.url)
                else:
                    stack.callback(channel.close)
            yield without


class Continuation:
    """The last call of an engine, and whether the next one continues it."""

    def __init__(self, is_enabled: bool, log: Callable[[str], None]) -> None:
        self._is_enabled, self._log = is_enabled, log
        self._last: Call | None = None
        """None where its tokens were not received."""
        self._is_kept = False
        self._logged: set[str] = set()

    def keep(self) -> None:
        """An engine has failed: the next call continues the last one."""
        self._is_kept = True

    def forget(self) -> None:
        """A call begins that no other continues."""
        self._last, self._is_kept = None, False

    def kept(self, sampling: Sampling, version: int | None) -> Received | None:
        """What the next call begins with, where it has this sampling and weight version."""
        last = self._last
        if not self._is_kept or last is None or (last.received.sampling, last.version) != (sampling, version):
            return None
        return last.received

    @contextmanager
    def call(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        version: int,
        clients: Sequence[Client],
    ) -> Iterator[Call]:
        """A call begins; its tokens are received meanwhile, where all servers send them.

        The experts of a response are not received before it ends, and equal requests cannot be told apart.

        Raises:
            EngineFailure, UserError: as any request.
        """
        kept = self.kept(sampling, version)
        call = Call(Received(requests, sampling, None if kept is None else kept.kept()), version)
        receives = self._is_enabled and not sampling.routed_experts and len({*requests}) == len(requests)
        self._last, self._is_kept = call if receives else None, False
        with call.channels(clients if receives and requests else []) as without:
            if without:
                self._last = None
                self._log_once(without[0])
            call.received.has_channels = self._last is not None
            yield call

    def _log_once(self, url: str) -> None:
        if url not in self._logged:
            self._logged.add(url)
            self._log(
                f"the SGLang server {url} does not send tokens as they are sampled, so that after an engine "
                "failure all responses of a step are generated again; `opo serve` of this version starts one "
                "that does"
            )

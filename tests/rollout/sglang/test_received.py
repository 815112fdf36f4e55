"""What is kept of responses whose server dies, and that it changes no response's probability."""

from __future__ import annotations

import itertools
import random
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from opo_megatron.errors import EngineFailure
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.sglang.received import Received, Record, Tokens, finish_reason
from opo_megatron.rollout.sglang.replies import generate_body, versions_of

STOP, WORDS = 0, (1, 2)
SAMPLING = Sampling(max_tokens=4, stop_tokens=(STOP,), seed=(1,))
REQUESTS = [GenerationRequest(5, 0, 0, (1, 2)), GenerationRequest(6, 1, 0, (2,))]
URL = "http://server"

Kept = Mapping[GenerationRequest, Tokens]
Dies = Callable[[int, Sequence[Sequence[int]]], bool]
"""Whether a server dies after its n-th pass, with these new tokens of its requests."""


def policy() -> dict[tuple[int, ...], list[float]]:
    """Prompt and response so far → probability of each next token."""
    rng, table = random.Random(3), {}
    for request in REQUESTS:
        for length in range(SAMPLING.max_tokens):
            for words in itertools.product(WORDS, repeat=length):
                weights = [rng.uniform(0.2, 1.0) for _ in (STOP, *WORDS)]
                table[(*request.tokens, *words)] = [weight / sum(weights) for weight in weights]
    return table


POLICY = policy()


def has_ended(new: Sequence[int], limit: int) -> bool:
    return STOP in new or len(new) == limit


def served(
    inputs: Sequence[Sequence[int]], limits: Sequence[int], dies: Dies
) -> Iterator[tuple[float, list[list[int]]]]:
    """Every way in which a server samples until it dies or all has ended: probability, new tokens."""

    def passes(
        number: int, probability: float, new: list[list[int]]
    ) -> Iterator[tuple[float, list[list[int]]]]:
        runs = [i for i, tokens in enumerate(new) if not has_ended(tokens, limits[i])]
        if not runs or (number and dies(number, new)):
            yield probability, new
            return
        for tokens in itertools.product((STOP, *WORDS), repeat=len(runs)):
            chance, after = probability, [list(one) for one in new]
            for i, token in zip(runs, tokens, strict=True):
                chance *= POLICY[(*inputs[i], *new[i])][token]
                after[i].append(token)
            yield from passes(number + 1, chance, after)

    yield from passes(0, 1.0, [[] for _ in inputs])


def messages(indices: Sequence[int], new: Sequence[Sequence[int]]) -> Iterator[list[Record]]:
    """One for each pass of the server, with the tokens of all responses that had not ended."""
    for position in range(max(map(len, new), default=0)):
        rows = [(i, tokens) for i, tokens in zip(indices, new, strict=True) if position < len(tokens)]
        yield [(i, position, tokens[position], 3, -0.5) for i, tokens in rows]


def responses(deaths: Sequence[Dies], keep: Callable[[Received], Kept], kept: Kept | None = None) -> Any:
    """Both responses → their probability, where servers die one after the other."""
    received = Received(REQUESTS, SAMPLING, kept)
    pending = received.pending
    asked = [REQUESTS[i] for i in pending]
    body = generate_body(asked, SAMPLING, prefixes=received.prefixes(pending))
    limits = [one["max_new_tokens"] for one in body["sampling_params"]]
    dies = deaths[0] if deaths else lambda number, new: False
    result: defaultdict[Any, float] = defaultdict(float)
    for probability, new in served(body["input_ids"], limits, dies):
        call = Received(REQUESTS, SAMPLING, kept)
        for message in messages(pending, new):
            call.add(message)
        if deaths:
            for outcome, after in responses(deaths[1:], keep, keep(call)).items():
                result[outcome] += probability * after
            continue
        replies = dict(call.ended)
        for i, tokens in zip(pending, new, strict=True):
            replies[i] = call.merged(i, reply(tokens), URL, 0.0)
        result[tuple(tuple(replies[i]["output_ids"]) for i in range(2))] += probability
    return result


def reply(tokens: Sequence[int], log_prob: float = -0.5, **meta_info: Any) -> dict[str, Any]:
    log_probs = [[log_prob, token, None] for token in tokens]
    known = {"output_token_logprobs": log_probs, "weight_version": "3", "finish_reason": {"type": "stop"}}
    return {"output_ids": list(tokens), "meta_info": known | meta_info}


def in_chunks(size: int) -> Callable[[Received], Kept]:
    """What is kept where tokens come in chunks, and the last of an ended response at once."""

    def keep(received: Received) -> Kept:
        def known(tokens: Tokens) -> Tokens:
            ends = finish_reason(tokens.ids, SAMPLING) is not None
            count = len(tokens.ids) if ends else len(tokens.ids) // size * size
            return Tokens(tokens.ids[:count], tokens.versions[:count], tokens.log_probs[:count])

        return {request: known(tokens) for request, tokens in received.kept().items()}

    return keep


def after(passes: int) -> Dies:
    return lambda number, new: number == passes


def when_one_has_ended(number: int, new: Sequence[Sequence[int]]) -> bool:
    return any(STOP in tokens for tokens in new)


def when_a_word_comes(number: int, new: Sequence[Sequence[int]]) -> bool:
    return any(2 in tokens for tokens in new)


DEATHS = {
    "after-1": [after(1)],
    "after-2": [after(2)],
    "after-3": [after(3)],
    "twice": [after(1), after(1)],
    "three-times": [after(2), after(1), after(1)],
    "when-one-has-ended": [when_one_has_ended],
    "when-a-received-word-comes": [when_a_word_comes, after(1)],
}
EXPECTED = responses([], Received.kept)


def largest_error(deaths: Sequence[Dies], keep: Callable[[Received], Kept]) -> float:
    actual = responses(deaths, keep)
    assert abs(sum(actual.values()) - 1) < 1e-12
    return max(abs(actual[one] - EXPECTED[one]) for one in actual.keys() | EXPECTED.keys())


@pytest.mark.parametrize("deaths", DEATHS.values(), ids=DEATHS)
def test_a_death_leaves_every_response_its_probability(deaths: list[Dies]) -> None:
    assert len(EXPECTED) == (1 + 2 + 4 + 8 * 3) ** 2
    assert largest_error(deaths, Received.kept) < 1e-12


@pytest.mark.parametrize("size", [2, 3, 32])
def test_endings_known_before_other_tokens_would_change_probabilities(size: int) -> None:
    """32: responses that have ended are kept, all others start over."""
    assert largest_error([after(1)], in_chunks(size)) > 1e-3


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        ([], None),
        ([1, 2, 1], None),
        ([1, STOP], "stop"),
        ([STOP], "stop"),
        ([1, 2, 1, 1], "length"),
        ([1, 2, 1, STOP], "stop"),  # as SGLang reports it
    ],
)
def test_received_tokens_say_how_a_response_has_ended(ids: list[int], kind: str | None) -> None:
    reason = finish_reason(ids, SAMPLING)
    assert (reason and reason["type"]) == kind


def kept(ids: Sequence[int]) -> Kept:
    tokens = Tokens(array("i", ids), array("i", [2] * len(ids)), array("f", [-0.25] * len(ids)))
    return {REQUESTS[0]: tokens}


@pytest.mark.parametrize("prefix", [[], [1], [1, 2], [2, 2, 1]])
def test_a_merged_reply_is_that_of_the_whole_response(prefix: list[int]) -> None:
    received = Received(REQUESTS, SAMPLING, kept(prefix))
    received.add([(0, 0, STOP, 3, -0.5)])
    merged = received.merged(0, reply([STOP]), URL, 0.0)
    assert merged["output_ids"] == [*prefix, STOP]
    meta_info = merged["meta_info"]
    assert meta_info["output_token_logprobs"] == [[-0.25, one, None] for one in prefix] + [[-0.5, STOP, None]]
    assert versions_of(meta_info, len(prefix) + 1) == [2] * len(prefix) + [3]
    assert received.new_tokens == 1


def test_a_response_that_had_ended_is_not_sampled_again() -> None:
    received = Received(REQUESTS, SAMPLING, kept([1, STOP]))
    assert received.pending == [1] and list(received.ended) == [0]
    assert received.ended[0]["output_ids"] == [1, STOP]
    assert received.ended[0]["meta_info"]["finish_reason"] == {"type": "stop", "matched": STOP}


def test_without_channels_a_kept_beginning_is_continued_all_the_same() -> None:
    received = Received(REQUESTS, SAMPLING, kept([1]))
    received.has_channels = False
    assert received.merged(0, reply([2, STOP]), URL, 0.0)["output_ids"] == [1, 2, STOP]
    unchanged = reply([2])
    assert received.merged(1, unchanged, URL, 0.0) is unchanged


@pytest.mark.parametrize(
    ("sent", "replied", "words"),
    [
        ([1], reply([1, 2]), "did not send the tokens of a response for 0 seconds"),
        ([], reply([1]), "did not send the tokens"),
        ([1, 1], reply([1, 2]), "sent other tokens than the reply to prompt 5 has"),
        ([1, 2, 1], reply([1, 2]), "sent other tokens"),
        ([1, 2], reply([1, 2], log_prob=-0.75), "sent other tokens"),
        ([1, 2], reply([1, 2], output_token_logprobs=[]), "sent other tokens"),
    ],
)
def test_a_reply_that_the_channel_does_not_confirm_is_a_failure(
    sent: list[int], replied: dict[str, Any], words: str
) -> None:
    received = Received(REQUESTS, SAMPLING)
    received.add([(0, i, token, 3, -0.5) for i, token in enumerate(sent)])
    with pytest.raises(EngineFailure, match=words):
        received.merged(0, replied, URL, 0.0)


def test_a_closed_channel_is_not_waited_for() -> None:
    received = Received(REQUESTS, SAMPLING)
    received.fail(URL, "closed the connection")
    with pytest.raises(EngineFailure, match=f"{URL}/opo/tokens closed the connection"):
        received.merged(0, reply([1]), URL, 1000.0)
    received.fail("http://other", "closed the connection")
    received.add([(1, 0, 1, 3, -0.5)])
    assert received.merged(1, reply([1]), URL, 1000.0)["output_ids"] == [1]


@pytest.mark.parametrize("position", [0, 2, 3])
def test_a_token_that_does_not_follow_is_refused(position: int) -> None:
    received = Received(REQUESTS, SAMPLING, kept([2, 2]))
    received.add([(0, 0, 1, 3, -0.5)])
    with pytest.raises(ValueError, match="does not follow those before it"):
        received.add([(0, position, 1, 3, -0.5)])


@pytest.mark.parametrize(
    ("sent", "ended"),
    [
        ([(0, 1)], []),
        ([(0, 1), (0, STOP)], [[0]]),
        ([(1, STOP), (0, 1), (0, STOP)], [[1], [0]]),
        ([(0, 2), (0, 1)], [[0]]),  # with the prefix as many as there may be
        ([(1, 1), (1, 1), (1, 2), (0, 1), (1, STOP), (0, STOP)], [[1], [0]]),
    ],
)
def test_a_response_ends_with_its_last_token_and_once(
    sent: list[tuple[int, int]], ended: list[list[int]]
) -> None:
    """Its reply says the same, which comes when all responses of its post have ended."""
    received = Received(REQUESTS, SAMPLING, kept([2, 2]))
    taken, new = [], defaultdict(list)
    for index, token in sent:
        received.add([(index, len(new[index]), token, 3, -0.5)])
        new[index].append(token)
        replies = received.take_ended()
        taken += [list(replies)] if replies else []
        for i, one in replies.items():
            known = reply(new[i], finish_reason=one["meta_info"]["finish_reason"])
            merged = received.merged(i, known, URL, 0.0)
            assert one["output_ids"] == merged["output_ids"]
            log_probs = [value for value, *_ in one["meta_info"]["output_token_logprobs"]]
            assert log_probs == [value for value, *_ in merged["meta_info"]["output_token_logprobs"]]
            versions = [versions_of(r["meta_info"], len(one["output_ids"])) for r in (one, merged)]
            assert versions[0] == versions[1]
    assert taken == ended and received.take_ended() == {}

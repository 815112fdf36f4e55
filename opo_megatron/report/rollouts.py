"""The rollouts in a page: a given number of groups, as text, with the engine's log-probabilities.

The groups come from the last, the first and the middle saved step of each run, evenly spaced in the batch,
never chosen by reward.  In a conversation what the environment gave stands between the sampled tokens,
without a log-probability.  Each distinct token text is stored once, and tokens are indices into these texts;
log-probabilities are in hundredths of a nat.  A long response keeps its first and last tokens, and the page
shows how many are missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from opo_megatron.errors import UserError
from opo_megatron.report.runs import Run

if TYPE_CHECKING:
    from opo_megatron.batch.rollouts import Rollouts

TOKENS_KEPT = 2000
"""Tokens kept of a prompt or a response; half of them from its start."""
CONTEXT = 4
"""Preceding tokens that are decoded with a token, because its text may depend on them."""
LONGEST_CHARACTER = 4
"""Bytes of a UTF-8 character, and so the most tokens of one."""

Decode = Callable[[list[int]], str]


class Vocabulary:
    """The distinct token texts of a page, with their indices."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def index(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))


def choose_steps(steps: Sequence[int], total: int) -> dict[int, int]:
    """The number of groups from each of the last, the first and the middle step, `total` in sum."""
    if not steps or total == 0:
        return {}
    chosen = list(dict.fromkeys((steps[-1], steps[0], steps[len(steps) // 2])))[:total]
    counts = {step: total // len(chosen) + (i < total % len(chosen)) for i, step in enumerate(chosen)}
    return dict(sorted(counts.items()))


def shares(total: int, runs: int) -> list[int]:
    """The number of groups of each run, `total` in sum, as even as possible."""
    return [total // runs + (i < total % runs) for i in range(runs)]


def embedded_rollouts(runs: Sequence[Run], total: int, show: Callable[[str, float], None]) -> dict[str, Any]:
    """The data of the page's rollout browser: {"runs": names, "texts": […], "groups": […], "notes": […]}.

    Raises:
        UserError: for a rollout file that cannot be read.
    """
    vocabulary, groups, notes = Vocabulary(), [], []
    with_dumps = [index for index, run in enumerate(runs) if run.dumps]
    per_run = dict(zip(with_dumps, shares(total, len(with_dumps)), strict=True)) if with_dumps else {}
    for index, run in enumerate(runs):
        show(f"reading rollouts of {run.name}", index / len(runs))
        if index not in per_run:
            notes.append(f"{run.name} has no rollouts (observe.save_rollouts is off, or no step is finished)")
            continue
        decode, note = decoder_of(run)
        notes += [note] if note else []
        for step, count in choose_steps(list(run.dumps), per_run[index]).items():
            rollouts = _load(run.dumps[step])
            of_step = _groups(rollouts, count, decode, vocabulary)
            groups += [{"run": index, "step": step} | group for group in of_step]
    return {
        "runs": [run.name for run in runs],
        "texts": list(vocabulary.texts),
        "groups": groups,
        "notes": notes,
        "kept": TOKENS_KEPT,
    }


def decoder_of(run: Run) -> tuple[Decode, str | None]:
    """The run's decoder; without its tokenizer, one that shows token ids, and a sentence with the reason."""
    from opo_megatron.tasks import decoder

    name, tokenizer = run.settings.get("task.name"), run.settings.get("task.tokenizer", "bytes")
    try:
        return decoder(str(name), str(tokenizer)), None
    except UserError as error:
        note = f"{run.name}: tokens are shown as ids, because {error}"
        return lambda tokens: "".join(f"‹{token}›" for token in tokens), note


def _load(path: Path) -> Rollouts:
    from opo_megatron.batch.rollouts import Rollouts

    try:
        return Rollouts.load(path)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a complete rollout file ({error}); move it away, or use --rollouts 0"
        ) from None


def _groups(rollouts: Rollouts, count: int, decode: Decode, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """`count` groups, evenly spaced in the batch, with their samples in order."""
    group_ids = rollouts.groups.unique().tolist()
    count = min(count, len(group_ids))
    chosen = [group_ids[(2 * i + 1) * len(group_ids) // (2 * count)] for i in range(count)]
    groups = []
    for group_id in chosen:
        members = (rollouts.groups == group_id).nonzero()[:, 0]
        members = members[rollouts.sample_indices[members].argsort()]
        part = rollouts.select(members)
        prompt = part.prompt_tokens[: int(part.prompt_lengths[0])].tolist()
        groups.append(
            {
                "group": group_id,
                "prompt_id": int(part.prompt_ids[0]),
                "prompt": _shown(prompt, decode, vocabulary),
                "prompt_tokens": len(prompt),
                "samples": _samples(part, decode, vocabulary),
            }
        )
    return groups


def _samples(part: Rollouts, decode: Decode, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    from opo_megatron.batch.rollouts import FINISH_NAMES, is_truncated

    lengths = part.response_lengths.tolist()
    log_probs = None
    if part.engine_log_prob is not None:
        log_probs = [row.tolist() for row in part.engine_log_prob.split(lengths)]
    truncated = is_truncated(part.finish_reasons).tolist()
    samples = []
    for index, segments in enumerate(part.segments()):
        continuation = [token for _, tokens in segments for token in tokens]
        is_sampled = [sampled for sampled, tokens in segments for _ in tokens]
        sample: dict[str, Any] = {
            "response": _shown(continuation, decode, vocabulary),
            "tokens": lengths[index],
            "truncated": truncated[index],
        }
        if part.given_lengths is not None and part.turns is not None:
            sample["given"] = [int(not sampled) for sampled in _ends(is_sampled)]
            sample["given_tokens"] = int(part.given_lengths[index])
            sample["turns"] = int(part.turns[index])
            sample["ended_by"] = FINISH_NAMES[int(part.finish_reasons[index])]
        for name, column in (("reward", part.rewards), ("advantage", part.advantages)):
            if column is not None and math.isfinite(column[index]):
                sample[name] = float(column[index])
        if log_probs is not None:
            of_sampled = iter(log_probs[index])
            of_all = [next(of_sampled) if sampled else None for sampled in is_sampled]
            sample["log_probs"] = [None if v is None else round(100 * v) for v in _ends(of_all)]
            sample["log_prob"] = sum(log_probs[index])
        samples.append(sample)
    return samples


def _shown(tokens: list[int], decode: Decode, vocabulary: Vocabulary) -> list[int]:
    """Indices of the texts of `_ends(tokens)`."""
    half = TOKENS_KEPT // 2
    parts = [tokens] if len(tokens) <= TOKENS_KEPT else [tokens[:half], tokens[-half:]]
    return [vocabulary.index(text) for part in parts for text in token_texts(part, decode)]


def _ends(values: list[Any]) -> list[Any]:
    """At most `TOKENS_KEPT` values, half of them from either end."""
    half = TOKENS_KEPT // 2
    return values if len(values) <= TOKENS_KEPT else values[:half] + values[-half:]


def token_texts(tokens: list[int], decode: Decode) -> list[str]:
    """Text of each token.  The last token of a multi-token character has its text; the others are empty."""
    texts, begin = [], 0
    for end in range(1, len(tokens) + 1):
        context = max(0, begin - CONTEXT)
        before, text = decode(tokens[context:begin]), decode(tokens[context:end])
        # The text of preceding tokens may change with what follows; then the token is decoded alone.
        text = text.removeprefix(before) if text.startswith(before) else decode(tokens[begin:end])
        if text.endswith("\ufffd") and end - begin < LONGEST_CHARACTER and end < len(tokens):
            texts.append("")  # the character is incomplete
            continue
        texts.append(text)
        begin = end
    return texts

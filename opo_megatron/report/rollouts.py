"""The rollouts that a page holds: a stated number of groups, as text, with the engine's log-probabilities.

Of each run the last, the first and the middle dumped step give groups, evenly spaced in the batch,
never chosen by their rewards.  Tokens are stored once as text and then by number; log-probabilities in
hundredths of a nat.  Of a long response the first and the last tokens are kept, and the page says how
many are missing.
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
"""Of a prompt or a response; half of them from its beginning."""
CONTEXT = 4
"""Tokens before one that are decoded with it, because its text may depend on them."""
LONGEST_CHARACTER = 4
"""Bytes of UTF-8, and so tokens that may be needed until a character is whole."""

Decode = Callable[[list[int]], str]


class Vocabulary:
    """Texts of tokens by number, for one page."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))


def choose_steps(steps: Sequence[int], share: int) -> dict[int, int]:
    """How many groups each of the last, the first and the middle step gives, `share` in all."""
    if not steps or share == 0:
        return {}
    chosen = list(dict.fromkeys((steps[-1], steps[0], steps[len(steps) // 2])))[:share]
    counts = {step: share // len(chosen) + (i < share % len(chosen)) for i, step in enumerate(chosen)}
    return dict(sorted(counts.items()))


def shares(total: int, runs: int) -> list[int]:
    """`total` groups, dealt out to the runs as evenly as can be."""
    return [total // runs + (i < total % runs) for i in range(runs)]


def embedded_rollouts(runs: Sequence[Run], total: int, show: Callable[[str, float], None]) -> dict[str, Any]:
    """What the page's browser reads: {"runs": names, "texts": […], "groups": […], "notes": […]}.

    Raises:
        UserError: for a rollout file that cannot be read.
    """
    vocabulary, groups, notes = Vocabulary(), [], []
    with_dumps = [place for place, run in enumerate(runs) if run.dumps]
    dealt = dict(zip(with_dumps, shares(total, len(with_dumps)), strict=True)) if with_dumps else {}
    for place, run in enumerate(runs):
        show(f"reading rollouts of {run.name}", place / len(runs))
        if place not in dealt:
            notes.append(f"{run.name} has no rollouts (observe.save_rollouts, or no step yet)")
            continue
        decode, note = decoder_of(run)
        notes += [note] if note else []
        for step, count in choose_steps(list(run.dumps), dealt[place]).items():
            rollouts = _load(run.dumps[step])
            found = _groups(rollouts, count, decode, vocabulary)
            groups += [{"run": place, "step": step} | group for group in found]
    return {
        "runs": [run.name for run in runs],
        "texts": list(vocabulary.texts),
        "groups": groups,
        "notes": notes,
        "kept": TOKENS_KEPT,
    }


def decoder_of(run: Run) -> tuple[Decode, str | None]:
    """Text of the run's tokens; without its tokenizer numbers, and a sentence that says why."""
    from opo_megatron.tasks import decoder

    name, tokenizer = run.settings.get("task.name"), run.settings.get("task.tokenizer", "bytes")
    try:
        return decoder(str(name), str(tokenizer)), None
    except UserError as error:
        note = f"{run.name}: tokens are shown as numbers, because {error}"
        return lambda tokens: "".join(f"‹{token}›" for token in tokens), note


def _load(path: Path) -> Rollouts:
    from opo_megatron.batch.rollouts import Rollouts

    try:
        return Rollouts.load(path)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a whole file of rollouts ({error}); move it away, or use --rollouts 0"
        ) from None


def _groups(rollouts: Rollouts, count: int, decode: Decode, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """`count` groups, evenly spaced in the batch, samples in order."""
    numbers = rollouts.groups.unique().tolist()
    count = min(count, len(numbers))
    chosen = [numbers[(2 * i + 1) * len(numbers) // (2 * count)] for i in range(count)]
    found = []
    for number in chosen:
        members = (rollouts.groups == number).nonzero()[:, 0]
        members = members[rollouts.sample_indices[members].argsort()]
        part = rollouts.select(members)
        prompt = part.prompt_tokens[: int(part.prompt_lengths[0])].tolist()
        found.append(
            {
                "group": number,
                "prompt_id": int(part.prompt_ids[0]),
                "prompt": _shown(prompt, decode, vocabulary),
                "prompt_tokens": len(prompt),
                "samples": _samples(part, decode, vocabulary),
            }
        )
    return found


def _samples(part: Rollouts, decode: Decode, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    lengths = part.response_lengths.tolist()
    log_probs = None
    if part.engine_log_prob is not None:
        log_probs = [row.tolist() for row in part.engine_log_prob.split(lengths)]
    found = []
    for place, response in enumerate(part.responses()):
        sample: dict[str, Any] = {
            "response": _shown(response, decode, vocabulary),
            "tokens": lengths[place],
            "cut": bool(part.finish_reasons[place]),
        }
        for name, column in (("reward", part.rewards), ("advantage", part.advantages)):
            if column is not None and math.isfinite(column[place]):
                sample[name] = float(column[place])
        if log_probs is not None:
            sample["log_probs"] = [round(100 * value) for value in _ends(log_probs[place])]
            sample["log_prob"] = sum(log_probs[place])
        found.append(sample)
    return found


def _shown(tokens: list[int], decode: Decode, vocabulary: Vocabulary) -> list[int]:
    """Numbers of the texts of `_ends(tokens)`."""
    half = TOKENS_KEPT // 2
    parts = [tokens] if len(tokens) <= TOKENS_KEPT else [tokens[:half], tokens[-half:]]
    return [vocabulary.number(text) for part in parts for text in token_texts(part, decode)]


def _ends(values: list[Any]) -> list[Any]:
    """At most `TOKENS_KEPT`, half of them from either end."""
    half = TOKENS_KEPT // 2
    return values if len(values) <= TOKENS_KEPT else values[:half] + values[-half:]


def token_texts(tokens: list[int], decode: Decode) -> list[str]:
    """Text of each token.  A character of several tokens stands at its last one; the others are empty."""
    texts, begin = [], 0
    for end in range(1, len(tokens) + 1):
        context = max(0, begin - CONTEXT)
        before, text = decode(tokens[context:begin]), decode(tokens[context:end])
        # What stands before may change with what follows; then the token has to speak for itself.
        text = text.removeprefix(before) if text.startswith(before) else decode(tokens[begin:end])
        if text.endswith("\ufffd") and end - begin < LONGEST_CHARACTER and end < len(tokens):
            texts.append("")  # not yet a whole character
            continue
        texts.append(text)
        begin = end
    return texts

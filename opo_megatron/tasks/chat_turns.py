"""What a chat template writes after a turn of the policy: tokens that are given, not sampled.

Rendered once up to the turn and once with what follows it, a conversation differs by what is given:

    given = tokens(render(messages, turn, answers))  without the part up to the turn's end

The turn itself is never rendered from text: a placeholder stands for it, and its tokens stay as they were
sampled.  That needs a template that writes earlier messages as they were when they were the last, which
`check` finds out on conversations of the task before the run starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from opo_megatron.errors import UserError
from opo_megatron.tasks.messages import Messages, message
from opo_megatron.tasks.tokenizers import FolderTokenizer

PLACEHOLDER = "x"
THOUGHTS = "<think>\nIt is 6 times 7.\n</think>\n\n"
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call>'
TURNS = ("The answer is 42.", CALL, THOUGHTS + CALL, THOUGHTS + "The answer is 42.")
"""Turns that a template must not change."""


class ChatTurns:
    """Renders the turns between those of the policy."""

    def __init__(
        self, tokenizer: FolderTokenizer, tools: Sequence[dict[str, Any]] = (), role: str = "tool"
    ) -> None:
        """
        Args:
            role: of the messages that answer the policy.
        """
        self.tokenizer, self.tools, self.role = tokenizer, tools, role

    def given(self, messages: Messages, stop: int | None, answers: Sequence[str]) -> list[int]:
        """The tokens after a turn, up to where the next one begins; `messages` continue with both.

        Args:
            messages: up to the turn.
            stop: the stop token that the turn was sampled with.  It stands where the template closes a turn;
                one that was cut is closed as the template does.
        """
        before = self._render(messages) + PLACEHOLDER
        messages += [message("assistant", PLACEHOLDER), *(message(self.role, text) for text in answers)]
        after = self._render(messages)
        if not after.startswith(before):
            raise ValueError("the chat template changed an earlier part of the conversation")
        tokens = self.tokenizer.encode_rendered(after[len(before) :])
        return tokens if stop is None else tokens[1:]

    def check(self, conversations: Sequence[Messages]) -> None:
        """
        Raises:
            UserError: where the template changes what stands before, quoting the place.
        """
        for start in conversations:
            for turn in TURNS:
                messages = list(start)
                for answer in ("42", "7"):
                    before = self._render(messages) + turn
                    messages += [message("assistant", turn), message(self.role, answer)]
                    self._compare(before, self._render(messages))

    def _compare(self, before: str, after: str) -> None:
        same = next((i for i, pair in enumerate(zip_longest(before, after)) if pair[0] != pair[1]), 0)
        if same < len(before):
            begin = max(0, same - 20)
            raise UserError(
                "the chat template of task.tokenizer changes what stands before the next turn: "
                f"{before[begin : same + 40]!r} becomes {after[begin : same + 40]!r}, so that the policy "
                "would be trained on tokens that it did not sample; use a template that only appends"
            )
        rest = self.tokenizer.encode_rendered(after[same:])
        if not rest or rest[0] not in self.tokenizer.stop_tokens:
            raise UserError(
                "the chat template of task.tokenizer continues a turn, which ends at its stop token, with "
                f"{after[same : same + 40]!r}, which begins with no stop token; use a template that writes "
                "one right after the turn, or name the token in the folder's generation_config.json"
            )

    def _render(self, messages: Messages) -> str:
        return self.tokenizer.render(messages, self.tools)

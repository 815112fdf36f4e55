"""Text ↔ token ids: bytes, or a Hugging Face tokenizer from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from opo_megatron.errors import UserError
from opo_megatron.tasks.messages import Messages
from opo_megatron.tasks.stop_tokens import find_stop_tokens
from opo_megatron.utils.extras import require_extra
from opo_megatron.utils.start_folder import to_open


class Tokenizer(Protocol):
    vocab_size: int
    stop_tokens: tuple[int, ...]
    """A response ends at the first of them."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, which begins as the model's texts do and does not end."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, without stop tokens."""
        ...

    def raw_text(self, tokens: list[int]) -> str:
        """Text of tokens, special tokens included."""
        ...

    def chat(self, messages: Messages, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Messages in the model's chat template, up to where the response begins.

        Args:
            tools: schemas of what the model may call.
        """
        ...


class ByteTokenizer:
    """Every UTF-8 byte is a token; 256 is the stop token.  No files, any language, long sequences."""

    vocab_size = 257
    stop_tokens: tuple[int, ...] = (256,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode(errors="replace")

    def raw_text(self, tokens: list[int]) -> str:
        return b"".join(bytes([t]) if t < 256 else b"<stop>" for t in tokens).decode(errors="replace")

    def chat(self, messages: Messages, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        raise UserError(
            "task.chat=true needs a chat template, and bytes have none; name a tokenizer's folder"
        )


class FolderTokenizer:
    """The tokenizer of a Hugging Face model folder; needs no network."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(
                f"task.tokenizer={folder} is neither 'bytes' nor a folder; name a tokenizer's folder"
            )
        transformers = require_extra("transformers", "task.tokenizer with a folder", "data")
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.vocab_size = len(self._tokenizer)
            ids = max(self._tokenizer.get_vocab().values(), default=-1) + 1  # above the size, with gaps
            self.stop_tokens = find_stop_tokens(
                folder, self._tokenizer.eos_token_id, max(ids, self.vocab_size)
            )
            self._opening = opening_tokens(self._tokenizer)
        except UserError:
            raise
        except Exception as error:  # a damaged file raises whatever its parser raises
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"task.tokenizer={folder} has no tokenizer that loads ({reason}); name the folder of a "
                "Hugging Face model, or bytes"
            ) from error

    def encode(self, text: str) -> list[int]:
        return encode_prompt(self._tokenizer, self._opening, text)

    def decode(self, tokens: list[int]) -> str:
        if tokens and tokens[-1] in self.stop_tokens:  # which the tokenizer may take for a word
            tokens = tokens[:-1]
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def raw_text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def chat(self, messages: Messages, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        return self.encode_rendered(self.render(messages, tools))

    def render(self, messages: Messages, tools: Sequence[dict[str, Any]] = ()) -> str:
        """The text of `chat`."""
        if not self._tokenizer.chat_template:
            raise UserError(
                "task.chat=true, but the tokenizer in task.tokenizer has no chat template; set false"
            )
        own = {"tools": list(tools)} if tools else {}
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **own
                )
            )
        except Exception as error:  # templates are programs, and reject by raising
            raise UserError(
                f"the chat template of task.tokenizer rejects the message ({error}); change "
                "task.system_prompt, or set task.chat=false"
            ) from error

    def encode_rendered(self, text: str) -> list[int]:
        """Tokens of a part of what a template wrote, with the special tokens in it and no others."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def opening_tokens(tokenizer: Any) -> list[int]:
    """What a Hugging Face tokenizer puts before every text: its BOS token, or nothing.

    Whether it does is known only by what it adds: many define a BOS token without ever writing it.
    """
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = list(tokenizer.encode("a"))
    starts = range(len(whole) - len(plain) + 1)
    return next((whole[:i] for i in starts if whole[i : i + len(plain)] == plain), [])


def encode_prompt(tokenizer: Any, opening: list[int], text: str) -> list[int]:
    """Tokens of a text after `opening`, once where the text has it already; no EOS, which would end it."""
    tokens = list(tokenizer.encode(text, add_special_tokens=False))
    return tokens if not tokens or tokens[: len(opening)] == opening else [*opening, *tokens]


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer `bytes`, or that of a folder."""
    return ByteTokenizer() if name == "bytes" else FolderTokenizer(to_open(name))

"""A tiny Hugging Face tokenizer in a folder."""

from __future__ import annotations

from pathlib import Path

from tests.support.requirements import require


def make_tokenizer(folder: Path, **settings: object) -> str:
    tokenizers, transformers = (require(name, "make setup-dev") for name in ("tokenizers", "transformers"))
    vocabulary = ["<unk>", "<eos>", "What", "is", "+", "?", "user", *"0123456789"]
    words = {word: i for i, word in enumerate(vocabulary)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", **settings
    ).save_pretrained(folder)
    return str(folder)

"""Tiny Hugging Face tokenizers in folders."""

from __future__ import annotations

from pathlib import Path

from tests.support.requirements import require

VOCABULARY = ("<unk>", "<eos>", "What", "is", "+", "?", "user", *"0123456789")


def make_tokenizer(
    folder: Path,
    vocabulary: tuple[str, ...] = VOCABULARY,
    surround: str | None = None,
    **settings: object,
) -> str:
    """
    Args:
        surround: what the tokenizer puts around a text, like `<bos> $A <eos>`.
    """
    tokenizers, transformers = (require(name, "make setup-dev") for name in ("tokenizers", "transformers"))
    words = {word: i for i, word in enumerate(vocabulary)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if surround is not None:
        specials = [(word, words[word]) for word in surround.split() if word != "$A"]
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single=surround, special_tokens=specials
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", **settings
    ).save_pretrained(folder)
    return str(folder)


def make_byte_tokenizer(folder: Path, surround: str = "$A", **settings: object) -> str:
    """A byte-level BPE without merges, whose tokens decode to the text they came from; eos 0, bos 1."""
    tokenizers, transformers = (require(name, "make setup-dev") for name in ("tokenizers", "transformers"))
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<eos>", "<bos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([], trainer)
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=surround, special_tokens=[("<eos>", 0), ("<bos>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", **settings
    ).save_pretrained(folder)
    return str(folder)

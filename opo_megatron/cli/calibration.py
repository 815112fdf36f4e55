"""Prompts for calibration: those of a recipe's task, or of a file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from opo_megatron.config import load_config
from opo_megatron.errors import UserError
from opo_megatron.utils.extras import require_extra

MAX_PROMPT_TOKENS = 2048
"""Longer prompts are truncated to this."""
FIELDS = ("text", "prompt", "question")


def find_prompts(options: argparse.Namespace, companions: Sequence[Path]) -> list[list[int]]:
    """The prompts that the options choose; by default those of the run that wrote the checkpoint."""
    count, run_recipe = options.calibration_prompts, options.source.resolve().parent.parent / "config.yaml"
    if options.calibration_data is not None:
        return file_prompts(options.calibration_data, companions, count)
    if options.calibrate_recipe is not None:
        return recipe_prompts(options.calibrate_recipe, [], count)
    if not run_recipe.exists():
        raise UserError(
            "--quantize fp8 needs prompts, and this checkpoint belongs to no run; name a recipe with "
            "--calibrate-recipe, or a file with --calibration-data"
        )
    # The recipe is resolved, and the folder of the initial weights may no longer exist.
    return recipe_prompts(run_recipe, ["policy.init_from=null", "resume=never"], count)


def recipe_prompts(recipe: Path, overrides: list[str], count: int) -> list[list[int]]:
    """The first training prompts of a recipe's task, as the policy sees them."""
    from opo_megatron.tasks import make_task

    config = load_config(recipe, overrides)
    task = make_task(config.task)
    indices = range(min(count, task.size("train")))
    return [list(task.prompt("train", index).tokens) for index in indices]


def file_prompts(path: Path, folders: Sequence[Path], count: int) -> list[list[int]]:
    """The first texts of a file, tokenized by the model's tokenizer."""
    texts = []
    for text in _texts(path):
        texts.append(text)
        if len(texts) == count:
            break
    if not texts:
        raise UserError(f"--calibration-data {path} has no text; put one on each line")
    folder = next((f for f in folders if any(path.is_file() for path in f.glob("tokenizer*"))), None)
    if folder is None:
        raise UserError(
            "--calibration-data needs the model's tokenizer, which is in none of its folders; name one with "
            "--like, or use the prompts of a task with --calibrate-recipe"
        )
    from opo_megatron.tasks.tokenizers import encode_prompt, opening_tokens

    transformers = require_extra("transformers", "--calibration-data", "data")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file raises whatever its parser raises
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the tokenizer in {folder} does not load ({reason}); name one with --like"
        ) from error
    opening = opening_tokens(tokenizer)
    return [encode_prompt(tokenizer, opening, text) for text in texts]


def _texts(path: Path) -> Iterator[str]:
    """One text per line; of JSONL the field `text`, `prompt` or `question`."""
    try:
        with path.open() as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    location = f"line {number} of {path}"
                    yield _text(line, location) if path.suffix == ".jsonl" else line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--calibration-data {path} cannot be read ({error}); name a text or JSONL file"
        ) from None


def _text(line: str, location: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{location} is not JSON ({error}); fix it") from None
    texts = [row[field] for field in FIELDS if isinstance(row, dict) and isinstance(row.get(field), str)]
    if not texts:
        raise UserError(f"{location} has no text in the field {', '.join(FIELDS)}; rename its field")
    return str(texts[0])


def usable(prompts: list[list[int]], vocab_size: int, longest: int) -> list[list[int]]:
    """Prompts truncated to the model's maximum sequence length.

    Raises:
        UserError: without prompts, or for a token outside the model's vocabulary.
    """
    prompts = [prompt[: min(longest, MAX_PROMPT_TOKENS)] for prompt in prompts if prompt]
    if not prompts:
        raise UserError("there are no prompts for the calibration; name others")
    if (largest := max(map(max, prompts))) >= vocab_size:
        raise UserError(
            f"a calibration prompt has token {largest}, but the model's vocabulary has {vocab_size}; use "
            "prompts in the model's tokens"
        )
    return prompts

"""Prompts for calibration: those of a recipe's task, or of a file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from opo_megatron.config import load_config
from opo_megatron.errors import UserError
from opo_megatron.utils.extras import require_extra

LONGEST = 2048
"""Tokens of a prompt that are used."""
FIELDS = ("text", "prompt", "question")


def find_prompts(options: argparse.Namespace, companions: Sequence[Path]) -> list[list[int]]:
    """The prompts that the options ask for; by default those of the run that wrote the checkpoint."""
    count, own_recipe = options.calibration_prompts, options.source.resolve().parent.parent / "config.yaml"
    if options.calibration_data is not None:
        return file_prompts(options.calibration_data, companions, count)
    if options.calibrate_recipe is not None:
        return recipe_prompts(options.calibrate_recipe, [], count)
    if not own_recipe.exists():
        raise UserError(
            "--quantize fp8 needs prompts, and this checkpoint is of no run; name a recipe with "
            "--calibrate-recipe, or a file with --calibration-data"
        )
    # It is resolved, and the folder that the run began with may be gone.
    return recipe_prompts(own_recipe, ["policy.init_from=null", "resume=never"], count)


def recipe_prompts(recipe: Path, overrides: list[str], count: int) -> list[list[int]]:
    """The first training prompts of a recipe's task, as the policy is given them."""
    from opo_megatron.tasks import make_task

    config = load_config(recipe, overrides)
    task = make_task(config.task)
    indices = range(min(count, task.size("train")))
    return [list(task.prompt("train", index).tokens) for index in indices]


def file_prompts(path: Path, folders: Sequence[Path], count: int) -> list[list[int]]:
    """The first texts of a file, by the model's own tokenizer."""
    texts = []
    for text in _texts(path):
        texts.append(text)
        if len(texts) == count:
            break
    if not texts:
        raise UserError(f"--calibration-data {path} holds no text; put one on each line")
    folder = next((f for f in folders if any(path.is_file() for path in f.glob("tokenizer*"))), None)
    if folder is None:
        raise UserError(
            "--calibration-data needs the model's tokenizer, which no folder of it holds; name one with "
            "--like, or take prompts from a task with --calibrate-recipe"
        )
    transformers = require_extra("transformers", "--calibration-data", "data")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file raises whatever its parser does
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the tokenizer in {folder} does not load ({reason}); name one with --like"
        ) from error
    return [list(tokenizer.encode(text)) for text in texts]


def _texts(path: Path) -> Iterator[str]:
    """A text a line; of JSONL the field `text`, `prompt` or `question`."""
    try:
        with path.open() as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    place = f"line {number} of {path}"
                    yield _text(line, place) if path.suffix == ".jsonl" else line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--calibration-data {path} cannot be read ({error}); name a text or JSONL file"
        ) from None


def _text(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is no JSON ({error}); correct it") from None
    found = [row[field] for field in FIELDS if isinstance(row, dict) and isinstance(row.get(field), str)]
    if not found:
        raise UserError(f"{place} has no text under {', '.join(FIELDS)}; name the field so")
    return str(found[0])


def usable(prompts: list[list[int]], vocab_size: int, longest: int) -> list[list[int]]:
    """Prompts cut to what the model takes.

    Raises:
        UserError: where there is none, or a token that the model does not have.
    """
    prompts = [prompt[: min(longest, LONGEST)] for prompt in prompts if prompt]
    if not prompts:
        raise UserError("there is no prompt to calibrate with; name others")
    if (largest := max(map(max, prompts))) >= vocab_size:
        raise UserError(
            f"a calibration prompt has token {largest}, but the model's vocabulary has {vocab_size}; take "
            "prompts in the model's own tokens"
        )
    return prompts

"""`opo eval`: its command line, and which weights it names; what it does with them is in `evaluation/run_eval.py`."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from opo_megatron.errors import UserError

SUMMARY = "how often the answers of some weights are right (pass@k), how long, how diverse they are"
EPILOG = """\
examples:
  opo eval runs/first
      the newest checkpoint of a run on the held-out problems of its recipe
  opo eval runs/first/checkpoints/step_00000100 --samples 16 --problems 200
      one checkpoint, 16 answers to each of 200 problems: pass@1, 2, 4, 8 and 16
  opo eval runs/math --tasks math500,gsm8k,aime24 --data data --samples 16 rollout.max_response_tokens=8192
      problem sets by name: data/math500.jsonl (or data/math500/test.jsonl, data/math500/math500.json), …
  opo eval runs/math --tasks mine=problems.jsonl task.prompt_field=question --out runs/mine
      a file of your own, with the recipe's fields and verifier
  opo eval my.yaml policy.init_from=models/Qwen3-8B --tasks math500 --data data --out runs/start --nproc 2
      the weights that a recipe starts from, on two ranks

What is printed is also in DIR/eval.json, with 95 % intervals (bootstrap over problems); every answer is in
DIR/samples_TASK.jsonl.  DIR is RUN/eval/CHECKPOINT unless --out names another, and holds nothing else.
Problems, seed and sampling are those of the recipe's own evaluations (eval.temperature, eval.top_p,
eval.top_k, rollout.max_response_tokens): `held_out` repeats what a run measured at that step.
"""

OVERRIDES = ("resume=never", "observe.kl=off", "observe.wandb_project=null")
"""Settings of a recipe that concern its training only."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `opo eval` besides overrides and ranks."""
    add = parser.add_argument
    add(
        "source",
        metavar="RUN|CHECKPOINT|RECIPE",
        type=Path,
        help="folder of a run (its newest checkpoint), of one checkpoint, or a YAML file (its first weights)",
    )
    add(
        "--tasks",
        metavar="NAMES",
        default="held_out",
        help="held_out (default), math500, math, gsm8k, aime24, aime25, name=path.jsonl; with commas between",
    )
    add("--data", metavar="DIR", type=Path, help="folder of the named files; default $OPO_TEST_DATA")
    add("--samples", metavar="N", type=_count, help="answers per problem; default eval.samples_per_problem")
    add(
        "--problems",
        metavar="M",
        type=_count,
        help="problems per task; default eval.problems of held_out, all of others",
    )
    add("--out", metavar="DIR", type=Path, help="where results go; default RUN/eval/CHECKPOINT")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, 1 or more")
    return int(text)


@dataclass(frozen=True)
class Source:
    """Where weights come from; neither `run` nor `checkpoint` where they are a recipe's first ones."""

    recipe: Path
    run: Path | None = None
    checkpoint: Path | None = None

    @property
    def overrides(self) -> list[str]:
        """Of what the recipe says."""
        # A checkpoint's recipe is resolved: it holds the architecture even where the first folder is gone.
        return [*OVERRIDES, *(["policy.init_from=null"] if self.run or self.checkpoint else [])]


def find_source(path: Path, out: Path | None) -> Source:
    """What the command's first argument names.

    Raises:
        UserError: where it is none of the three, or a recipe without a place for the results.
    """
    if path.is_dir():
        if (path / "run_state.json").exists():
            return Source(path / "config.yaml", checkpoint=path)
        if not (path / "config.yaml").exists():
            raise UserError(
                f"{path} is neither the folder of a run (config.yaml is missing) nor a checkpoint "
                "(run_state.json is missing); name one of them, or a recipe with policy.init_from"
            )
        if not any((path / "checkpoints").glob("*_*")):
            raise UserError(f"the run {path} has no checkpoint yet; wait for one, or name another run")
        return Source(path / "config.yaml", run=path)
    if out is None and path.is_file():
        raise UserError(f"the recipe {path} has no folder for results; name one with --out DIR")
    return Source(path)


def data_folder(options: argparse.Namespace) -> Path | None:
    """Of known problem sets."""
    if options.data is not None:
        if not options.data.is_dir():
            raise UserError(f"--data {options.data} is not a folder; name the one with the problem sets")
        return Path(options.data)
    named = os.environ.get("OPO_TEST_DATA")
    return Path(named) if named else None


def overrides_of(options: argparse.Namespace, source: Source) -> list[str]:
    """All that is said about the recipe's settings; what the user says comes last."""
    own = [f"run.dir={options.out}"] if options.out is not None else []
    samples = [f"eval.samples_per_problem={options.samples}"] if options.samples is not None else []
    return [*source.overrides, *own, *samples, *options.overrides]


def words_of(options: argparse.Namespace) -> list[str]:
    """The command line again, for ranks; without their number."""
    words = [str(options.source), *options.overrides, "--tasks", options.tasks]
    for name in ("data", "samples", "problems", "out"):
        value = getattr(options, name)
        words += [] if value is None else [f"--{name}", str(value)]
    return words + (["--debug"] if options.debug else [])

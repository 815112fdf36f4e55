"""What `opo eval` writes and prints: eval.json, the responses as JSON lines, the table."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opo_megatron.algorithm.pass_at_k import bootstrap_interval
from opo_megatron.batch.rollouts import FINISH_NAMES, Rollouts
from opo_megatron.config import Config
from opo_megatron.evaluation.metrics import ResponseMetrics
from opo_megatron.tasks import Prompt, Task

COLUMNS_WITH_MEANING = 2
"""Maximum number of tasks for which the table has a column that explains each line."""


def to_json(measures: ResponseMetrics) -> dict[str, Any]:
    """One task's entry in eval.json; what was not measured is null."""
    intervals = {}
    for k, values in measures.pass_at_k().items():
        low, high = bootstrap_interval(values)
        intervals[str(k)] = {"value": float(values.mean()), "low": low, "high": high}
    return {
        "problems": measures.problems,
        "samples": measures.samples,
        "reward_mean": measures.accuracy,
        "pass@k": intervals,
        "length_mean": measures.length_mean,
        "truncation_rate": measures.truncation_rate,
        "self_bleu": measures.self_bleu,
        "rep_4": measures.rep_4,
        "entropy": measures.entropy,
    }


def sampling_settings(config: Config) -> dict[str, Any]:
    """How responses were sampled."""
    settings = config.eval
    return {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "max_response_tokens": config.rollout.max_response_tokens,
        "seed": config.run.seed,
        "engine": config.rollout.engine.value,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def write_samples(path: Path, task: Task, problems: Sequence[Prompt], rollouts: Rollouts) -> None:
    """A line per problem with all its responses, from the rollouts of all ranks."""
    assert rollouts.rewards is not None
    samples: list[list[dict[str, Any]]] = [[] for _ in problems]
    columns = (rollouts.groups, rollouts.rewards, rollouts.response_lengths, rollouts.finish_reasons)
    for response, segments, group, reward, length, reason in zip(
        rollouts.responses(), rollouts.segments(), *(column.tolist() for column in columns), strict=True
    ):
        finish = FINISH_NAMES[reason]
        sample = {"text": task.decode(response), "reward": reward, "length": length, "finish_reason": finish}
        if rollouts.given_lengths is not None:
            sample["turns"] = [
                {"sampled" if is_sampled else "given": task.decode(tokens)} for is_sampled, tokens in segments
            ]
        samples[group].append(sample)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for problem, own in zip(problems, samples, strict=True):
            row = {"problem": problem.text, "answer": problem.answer, "samples": own}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def results_table(
    measured: dict[str, ResponseMetrics], results: dict[str, Any]
) -> tuple[list[tuple[str, ...]], list[str]]:
    """(lines of (what, a value per task, what it means), the tasks' names)."""

    def line(what: str, shape: str, name: str, meaning: str) -> tuple[str, ...]:
        values = [result[name] for result in results.values()]
        return (what, *("" if value is None else shape.format(value) for value in values), meaning)

    def pass_at(k: str) -> tuple[str, ...]:
        intervals = [result["pass@k"][k] for result in results.values()]
        values = [f"{one['value']:.1%} [{one['low']:.1%}, {one['high']:.1%}]" for one in intervals]
        meaning = "a response is correct" if k == "1" else f"one of {k} responses is"
        return (f"pass@{k}", *values, f"probability that {meaning}, with its 95 % interval")

    ks = [str(k) for k in next(iter(measured.values())).pass_at_k()]
    lines = [
        line("problems", "{}", "problems", f"with {next(iter(measured.values())).samples} responses each"),
        *map(pass_at, ks),
        line("length", "{:.1f}", "length_mean", "tokens per response, stop token included"),
        line("truncated", "{:.1%}", "truncation_rate", "responses that a limit cut, of tokens or of turns"),
        line(
            "Self-BLEU", "{:.3f}", "self_bleu", "similarity of the responses to a problem; 1 is all the same"
        ),
        line("Rep-4", "{:.3f}", "rep_4", "share of a response's 4-grams that occurred in it before"),
        line("entropy", "{:.3f}", "entropy", "nats per token, −mean log π of the sampled tokens"),
    ]
    is_narrow = len(results) <= COLUMNS_WITH_MEANING
    return [line if is_narrow else line[:-1] for line in lines], list(results)

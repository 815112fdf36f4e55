"""`opo replay RUN --step K`: repeats a step from the checkpoint before it and compares it with the record.

The run's recipe resumes from the nearest earlier checkpoint, in a separate folder, up to step K.  Under the
run's parallel layout all digests must be equal; under another one, the norms of all weights within 1e-5.
Where the engine would not generate the same responses (another layout, SGLang outside exact mode), or the
step was non-finite, the recorded rollouts replace generation.  In exact mode the local engine generates what
SGLang did; with `--rollouts` a server does it again.  A step that overlapped with generation adds up the same
parts again where they were in prompt order; in order of arrival, its sums are rounded as under another
layout.  The file of the step's rollouts must have the recorded
digests.  The error names what differs: reward, token or weight.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from opo_megatron.algorithm.config import MismatchAction
from opo_megatron.audit.record import (
    ORDER,
    PER_GIVEN_TOKEN,
    PER_SAMPLE,
    PER_TOKEN,
    column_digests,
    in_hex,
    layout_of,
)
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.build import open_run
from opo_megatron.checkpoint.progress import PHASES, RunProgress, checkpoints
from opo_megatron.config import Config
from opo_megatron.config.choices import EngineName, Fill, Kl, OverlapOrder
from opo_megatron.config.rollout import RolloutConfig
from opo_megatron.config.rules.exact import exact_switch
from opo_megatron.config.schema import CheckpointConfig, ObserveConfig
from opo_megatron.distributed.process_groups import all_gather_objects
from opo_megatron.errors import NonFiniteError, ReplayDiffers, UserError
from opo_megatron.observe.metrics_file import MetricsFile, MetricsRow
from opo_megatron.rollout.conversations import Conversations
from opo_megatron.rollout.engine import Deliver, GenerationRequest, Progress, Sampling
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.run import Run
from opo_megatron.tasks.base import STREAM_TRAIN
from opo_megatron.train import opo_step
from opo_megatron.updates.sft import run_sft
from opo_megatron.utils.start_folder import absolute
from opo_megatron.weights.stream import NamedTensors

NORM_TOLERANCE = 1e-5
"""Relative difference of a tensor's norm under another layout."""
ALLOWED = ("rollout.engine", "on_policy.action")
"""Settings fixed in a run that a replay may change."""
NO_ROLLOUTS = in_hex(0)


def replay(config: Config, run_dir: Path, step: int, with_own_engine: bool = False) -> None:
    """Repeat step `step` of the run in `run_dir`.

    Args:
        config: the run's, except for parallel layout and device.
        with_own_engine: generate by the run's engine, which may be SGLang, and never read recorded rollouts.

    Raises:
        ReplayDiffers: naming what differs.
        UserError: where the engine does not generate the same again.
    """
    run_dir = absolute(run_dir)
    regenerates = config.rollout.engine is EngineName.local or exact_switch(config) is not None
    if with_own_engine and not regenerates:
        raise UserError(
            "--rollouts, but with rollout.engine=sglang only a run in exact mode (rollout.sglang.exact=true) "
            "samples the same again; replay without it, which reads the recorded rollouts"
        )
    recorded = {row["step"]: row for row in MetricsFile(run_dir / "audit.jsonl").read()}
    if step < 1 or (step not in recorded and not nonfinite_path(run_dir, step).exists()):
        raise UserError(
            f"--step {step}, but {run_dir / 'audit.jsonl'} has the steps 1 to {max(recorded, default=0)}; "
            "choose one of them (observe.audit=true records them)"
        )
    folder = run_dir / "replays" / f"step_{step:08d}"
    if os.environ.get("RANK", "0") == "0":
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed replay
    with open_run(_for_replay(config, run_dir, folder, step, with_own_engine), ALLOWED, saves=False) as run:
        try:
            layout = layout_of(config, run.parallel)
            later = range(max(run.step, 0) + 1, step + 1)
            rows = [recorded[j] for j in later if j in recorded]
            is_same = all(row["layout"] == layout and _is_repeatable(row) for row in rows)
            if with_own_engine and not is_same:
                raise UserError(_why_not_sampled_again(rows, layout))
            _Replay(run, run_dir, recorded, is_same, regenerates and is_same).run_until(step)
        finally:
            if run.parallel.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # not empty: other replays
                    folder.parent.rmdir()


def _is_repeatable(row: MetricsRow) -> bool:
    """Whether the same layout rounds the sums of the step the same way."""
    return bool(row.get(ORDER) != OverlapOrder.arrival.value)


def _why_not_sampled_again(rows: Sequence[MetricsRow], layout: str) -> str:
    if all(map(_is_repeatable, rows)):
        return (
            f"--rollouts under another layout ({layout}) than the run's, whose weights differ by rounding; "
            "replay with the run's layout, or without --rollouts"
        )
    return (
        "--rollouts, but the run has rollout.overlap_order=arrival, so its weights are not repeatable to the "
        "last bit; replay without --rollouts"
    )


def _for_replay(config: Config, run_dir: Path, folder: Path, step: int, with_own_engine: bool) -> Config:
    """The recipe without evaluations, checkpoints and logs that the step does not need."""

    def is_before(path: Path) -> bool:
        progress = RunProgress.parse(path.name)
        return progress is not None and (PHASES.index(progress.phase), progress.step) < (1, step)

    earlier = [path for path in checkpoints(run_dir) if is_before(path)]
    refuses = config.on_policy.action is MismatchAction.refuse
    return replace(
        config,
        run=replace(config.run, dir=str(folder), max_minutes=0.0),
        resume=str(earlier[-1]) if earlier else "never",
        rollout=config.rollout if with_own_engine else _with_local_engine(config),
        eval=replace(config.eval, every_steps=0, problems=1, greedy=False),
        observe=ObserveConfig(tensorboard=False, kl=Kl.off),
        checkpoint=CheckpointConfig(every_steps=0),
        on_policy=replace(config.on_policy, action=MismatchAction.warn) if refuses else config.on_policy,
    )


def _with_local_engine(config: Config) -> RolloutConfig:
    """Sampling by the local engine, exact where the run's engine is."""
    rollout, is_exact = config.rollout, exact_switch(config) is not None
    return replace(
        rollout,
        engine=EngineName.local,
        local=replace(rollout.local, exact=is_exact),
        sglang=replace(rollout.sglang, exact=False),
    )


def nonfinite_path(run_dir: Path, step: int) -> Path:
    return run_dir / "bad_batches" / f"step_{step:08d}.safetensors"


def rollouts_path(run_dir: Path, step: int) -> Path:
    return run_dir / "rollouts" / f"step_{step:08d}.safetensors"


class _Replay:
    """Repeats steps of `run` and compares them with the recorded ones."""

    def __init__(
        self,
        run: Run,
        run_dir: Path,
        recorded: dict[int, MetricsRow],
        is_same_layout: bool,
        regenerates: bool,
    ) -> None:
        self.run, self.run_dir, self.recorded = run, run_dir, recorded
        self.is_same_layout, self.regenerates = is_same_layout, regenerates

    def run_until(self, last: int) -> None:
        run = self.run
        run_sft(run)
        run.generation.synchronize()
        if run.step < 0:
            run.save_reference_weights()
            run.finish_step({"step": 0})
        while run.step < last:
            step = run.step + 1
            if self._was_nonfinite(step):
                if step == last:
                    return self._nonfinite_step(step)
                run.finish_step({"step": step, "skipped": 1})
            else:
                self._step(step)
            self._compare(step)
        verdict = (
            "every digest equals" if self.is_same_layout else f"all norms are within {NORM_TOLERANCE:g} of"
        )
        source = "generated again" if self.regenerates else "read from file"
        run.display.log(f"step {last}: {verdict} the record (rollouts {source})")

    def _was_nonfinite(self, step: int) -> bool:
        return self.recorded.get(step, {}).get("rollouts", NO_ROLLOUTS) == NO_ROLLOUTS

    def _step(self, step: int) -> None:
        generation = self.run.generation
        engine = generation.engine
        path = (
            nonfinite_path(self.run_dir, step)
            if self._was_nonfinite(step)
            else rollouts_path(self.run_dir, step)
        )
        rollouts = None
        if self._was_nonfinite(step) or not self.regenerates:
            if self.run.config.rollout.fill is not Fill.off:
                raise UserError(
                    f"step {step} of rollout.fill={self.run.config.rollout.fill.value} is not replayed from "
                    "recorded rollouts, which have only the groups that were taken; replay with the run's "
                    f"layout ({self.recorded[step]['layout']}) and rollout.engine=local"
                )
            if self.run.config.rollout.staleness:
                raise UserError(
                    f"step {step} of rollout.staleness={self.run.config.rollout.staleness} is not replayed "
                    "from recorded rollouts, which an earlier step has sampled; replay with the run's layout "
                    f"({self.recorded[step]['layout']}) and rollout.engine=local"
                )
            if not path.exists():
                raise UserError(
                    f"{path} is missing, and only the run's layout ({self.recorded[step]['layout']}) "
                    "generates the same rollouts again; replay with that one"
                )
            rollouts = Rollouts.load(path)
        config = self.run.config.rollout
        if rollouts is not None or (config.overlap and config.engine is EngineName.local):
            generation.engine = _ReplayEngine(engine, rollouts)  # type: ignore[arg-type]
        try:
            opo_step(self.run, step)
        finally:
            generation.engine = engine

    def _nonfinite_step(self, step: int) -> None:
        """Check that a non-finite step is non-finite again.

        Raises:
            ReplayDiffers: if it is finite.
        """
        rollouts = Rollouts.load(nonfinite_path(self.run_dir, step))
        try:
            self._step(step)
        except NonFiniteError as error:
            self.run.display.log(f"step {step} is non-finite again: {error.reason}")
            return
        assert rollouts.rewards is not None
        rows = (~torch.isfinite(rollouts.rewards)).nonzero()[:, 0].tolist()
        what = (
            f": {_sample(rollouts, rows[0])} had the reward {float(rollouts.rewards[rows[0]])}"
            if rows
            else ""
        )
        raise ReplayDiffers(f"step {step} was non-finite in the run and is finite in the replay{what}")

    def _compare(self, step: int) -> None:
        """
        Raises:
            ReplayDiffers: on all ranks.
        """
        difference = None
        if self.run.parallel.rank == 0 and step in self.recorded:
            files = self.run.files
            replayed = next(row for row in files.audit.read() if row["step"] == step)
            difference = self._rollouts_differ(step, replayed) or self._weights_differ(step, replayed)
        difference = all_gather_objects(self.run.parallel, difference)[0]
        if difference is not None:
            raise ReplayDiffers(f"step {step}: {difference}")

    def _rollouts_differ(self, step: int, replayed: MetricsRow) -> str | None:
        columns, path = self.recorded[step]["columns"], rollouts_path(self.run_dir, step)
        replayed_path, changed = rollouts_path(self.run.files.dir, step), []
        in_file = Rollouts.load(path) if path.exists() else None
        if in_file is not None:
            digests = column_digests(in_file)
            changed = [name for name in columns if columns[name] != in_hex(digests.get(name, 0))]
        different = [name for name in columns if columns[name] != replayed["columns"][name]]
        if not changed and not different:
            return None
        where = first_difference(in_file, Rollouts.load(replayed_path)) if in_file is not None else None
        if changed:
            return f"{path} differs from the record ({', '.join(changed)}){f': {where}' if where else ''}"
        return where or f"{', '.join(different)} differ from the record"

    def _weights_differ(self, step: int, replayed: MetricsRow) -> str | None:
        for name, (digest, norm) in self.recorded[step]["tensors"].items():
            new_digest, new_norm = replayed["tensors"][name]
            if self.is_same_layout and digest != new_digest:
                return f"the weight {name} has other bits: its norm was {norm!r} and is {new_norm!r}"
            if abs(new_norm - norm) > NORM_TOLERANCE * abs(norm):
                return f"the weight {name} had the norm {norm!r} and has {new_norm!r}"
        return None


class _ReplayEngine:
    """An engine that returns the recorded rollouts of a step, where there are some, instead of generating
    them, and delivers all of them at once."""

    def __init__(self, engine: LocalEngine, rollouts: Rollouts | None) -> None:
        self._engine, self._rollouts = engine, rollouts
        self.version = engine.version

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        progress: Progress | None = None,
        deliver: Deliver | None = None,
        *,
        conversations: Conversations | None = None,
    ) -> Rollouts:
        if sampling.seed[1:2] != (STREAM_TRAIN,) or self._rollouts is None:
            of_turns = {} if conversations is None else {"conversations": conversations}
            rollouts = self._engine.generate(requests, sampling, progress, **of_turns)
        else:
            rollouts = _recorded(self._rollouts, requests)
        if deliver is not None and requests:
            deliver(rollouts)
        return rollouts

    def update_weights(self, buckets: NamedTensors, version: int) -> None:
        self._engine.update_weights(buckets, version)

    def probe(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> dict[str, Rollouts]:
        return self._engine.probe(requests, sampling)

    def sleep(self, keeps_weights: bool = False) -> None: ...

    def wake(self) -> None: ...

    def activity(self) -> str | None:
        return None

    def recover(self) -> None: ...

    def kept_tokens(self, sampling: Sampling) -> None: ...

    def close(self) -> None: ...


def _recorded(rollouts: Rollouts, requests: Sequence[GenerationRequest]) -> Rollouts:
    """The recorded responses to the requests.

    Raises:
        UserError: where some are not recorded.
    """
    pairs = zip(rollouts.groups.tolist(), rollouts.sample_indices.tolist(), strict=True)
    index = {pair: i for i, pair in enumerate(pairs)}
    wanted = [(one.group, one.sample_index) for one in requests]
    missing = [pair for pair in wanted if pair not in index]
    if missing:
        raise UserError(
            f"the recorded batch lacks {len(missing)} of {len(wanted)} samples, still sampled when another "
            "was not finite (rollout.overlap=true); such a step is not replayed, choose another"
        )
    # What environments answered is not asked again, and rewards come from their conversations.
    rewards = None if rollouts.given_lengths is None else rollouts.rewards
    unjudged = replace(rollouts, rewards=rewards, advantages=None, token_advantages=None)
    return unjudged.select([index[pair] for pair in wanted])


def first_difference(was: Rollouts, now: Rollouts) -> str | None:
    """Description of the first difference between two batches of the same requests."""
    per_token = PER_TOKEN | PER_GIVEN_TOKEN
    for name in (*per_token, *PER_SAMPLE):  # tokens first, since rewards depend on them
        before, after = getattr(was, name), getattr(now, name)
        if before is None or after is None or before.shape != after.shape:
            continue  # the lengths differ too and are reported
        differing = (before != after).nonzero()[:, 0].tolist()
        if not differing:
            continue
        index, lengths_name = differing[0], per_token.get(name)
        values = f"was {before[index].item()} and is {after[index].item()} in the replay"
        if lengths_name is None:
            return f"the {name.removesuffix('s')} of {_sample(was, index)} {values}"
        sample, token = _place(getattr(was, lengths_name), index)
        if name in PER_GIVEN_TOKEN:
            what = "given token {}" if name == "given_tokens" else "the place of given token {}"
            return f"{what.format(token)} of {_sample(was, sample)} {values}"
        return f"token {token} of the {name.split('_')[0]} of {_sample(was, sample)} {values}"
    return _first_other_experts(was, now)


def _first_other_experts(was: Rollouts, now: Rollouts) -> str | None:
    """Description of the first token that took other experts."""
    before, after = was.routed_experts, now.routed_experts
    if before is None or after is None or before.shape != after.shape:
        return None
    differing = (before != after).any(-1).nonzero().tolist()
    if not differing:
        return None
    index, layer = differing[0]
    sample, token = _place(was.input_lengths, index)
    return (
        f"token {token} of {_sample(was, sample)} took the experts {before[index, layer].tolist()} of layer "
        f"{layer + 1} and takes {after[index, layer].tolist()} in the replay"
    )


def _place(lengths: Tensor, index: int) -> tuple[int, int]:
    """(sample, number in it) of a ragged column's element."""
    ends = lengths.cumsum(0)
    sample = int(torch.searchsorted(ends, index, right=True))
    return sample, index - (int(ends[sample - 1]) if sample else 0)


def _sample(rollouts: Rollouts, i: int) -> str:
    return f"prompt {int(rollouts.prompt_ids[i])}, sample {int(rollouts.sample_indices[i])}"

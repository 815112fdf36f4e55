"""`opo replay RUN --step K`: a step done again from the checkpoint before it, and compared with what it was.

The run's own recipe goes on from the nearest checkpoint, in a folder of its own, up to step K.  Under the
layout of the run every digest must be the same; under another one, the norms of all weights within 1e-5.
Where the engine would not draw the same responses again (another layout, SGLang), or the step had bad
numbers, its recorded rollouts take the engine's place.  The file of the step's rollouts must have the
digests that the run wrote of them.  What differs is named: reward, token or weight.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from opo_megatron.algorithm.config import MismatchAction
from opo_megatron.audit.record import PER_SAMPLE, PER_TOKEN, column_digests, in_hex, layout_of
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.build import open_run
from opo_megatron.checkpoint.progress import PHASES, RunProgress, checkpoints
from opo_megatron.config import Config
from opo_megatron.config.choices import EngineName, Kl
from opo_megatron.config.schema import CheckpointConfig, ObserveConfig
from opo_megatron.distributed.process_groups import all_gather_objects
from opo_megatron.errors import NonFiniteError, ReplayDiffers, UserError
from opo_megatron.observe.metrics_file import MetricsFile, MetricsRow
from opo_megatron.rollout.engine import GenerationRequest, Progress, Sampling
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.run import Run
from opo_megatron.tasks.base import STREAM_TRAIN
from opo_megatron.train import opo_step
from opo_megatron.updates.sft import run_sft
from opo_megatron.weights.stream import NamedTensors

NORM_TOLERANCE = 1e-5
"""Relative difference of a tensor's norm under another layout."""
ALLOWED = ("rollout.engine", "on_policy.action")
"""Fixed settings that a replay has otherwise than the run."""
NO_ROLLOUTS = in_hex(0)


def replay(config: Config, run_dir: Path, step: int) -> None:
    """Do step `step` of the run in `run_dir` again.

    Args:
        config: the run's own, but for layout and device.

    Raises:
        ReplayDiffers: naming what is not as it was.
    """
    recorded = {row["step"]: row for row in MetricsFile(run_dir / "audit.jsonl").read()}
    if step < 1 or (step not in recorded and not bad_batch(run_dir, step).exists()):
        raise UserError(
            f"--step {step}, but {run_dir / 'audit.jsonl'} tells of the steps 1 to "
            f"{max(recorded, default=0)}; name one of them (observe.audit=true writes it)"
        )
    folder = run_dir / "replays" / f"step_{step:08d}"
    if os.environ.get("RANK", "0") == "0":
        shutil.rmtree(folder, ignore_errors=True)  # of a replay that was killed
    draws_again = config.rollout.engine is EngineName.local
    with open_run(_for_replay(config, run_dir, folder, step), ALLOWED, saves=False) as run:
        try:
            layout = layout_of(config, run.parallel)
            later = range(max(run.step, 0) + 1, step + 1)
            is_same = all(recorded[j]["layout"] == layout for j in later if j in recorded)
            _Replay(run, run_dir, recorded, is_same, draws_again and is_same).until(step)
        finally:
            if run.parallel.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # other replays are there
                    folder.parent.rmdir()


def _for_replay(config: Config, run_dir: Path, folder: Path, step: int) -> Config:
    """The recipe with nothing saved, drawn or evaluated that the step does not need."""

    def is_before(path: Path) -> bool:
        progress = RunProgress.parse(path.name)
        return progress is not None and (PHASES.index(progress.phase), progress.step) < (1, step)

    earlier = [path for path in checkpoints(run_dir) if is_before(path)]
    refuses = config.on_policy.action is MismatchAction.refuse
    return replace(
        config,
        run=replace(config.run, dir=str(folder), max_minutes=0.0),
        resume=str(earlier[-1]) if earlier else "never",
        rollout=replace(config.rollout, engine=EngineName.local),
        eval=replace(config.eval, every_steps=0, problems=1, greedy=False),
        observe=ObserveConfig(tensorboard=False, kl=Kl.off),
        checkpoint=CheckpointConfig(every_steps=0),
        on_policy=replace(config.on_policy, action=MismatchAction.warn) if refuses else config.on_policy,
    )


def bad_batch(run_dir: Path, step: int) -> Path:
    return run_dir / "bad_batches" / f"step_{step:08d}.safetensors"


def batch(run_dir: Path, step: int) -> Path:
    return run_dir / "rollouts" / f"step_{step:08d}.safetensors"


class _Replay:
    """Steps of `run` beside the recorded ones."""

    def __init__(
        self,
        run: Run,
        run_dir: Path,
        recorded: dict[int, MetricsRow],
        is_same_layout: bool,
        draws_again: bool,
    ) -> None:
        self.run, self.run_dir, self.recorded = run, run_dir, recorded
        self.is_same_layout, self.draws_again = is_same_layout, draws_again

    def until(self, last: int) -> None:
        run = self.run
        run_sft(run)
        run.generation.synchronize()
        if run.step < 0:
            run.save_reference_weights()
            run.finish_step({"step": 0})
        while run.step < last:
            step = run.step + 1
            if self._was_bad(step):
                if step == last:
                    return self._bad_step(step)
                run.finish_step({"step": step, "skipped": 1})
            else:
                self._step(step)
            self._compare(step)
        how = "every digest is" if self.is_same_layout else f"all norms are within {NORM_TOLERANCE:g} of"
        drawn = "drawn again" if self.draws_again else "taken from its file"
        run.display.log(f"step {last}: {how} what the run wrote (rollouts {drawn})")

    def _was_bad(self, step: int) -> bool:
        return self.recorded.get(step, {}).get("rollouts", NO_ROLLOUTS) == NO_ROLLOUTS

    def _step(self, step: int) -> None:
        generation = self.run.generation
        engine = generation.engine
        path = bad_batch(self.run_dir, step) if self._was_bad(step) else batch(self.run_dir, step)
        if self._was_bad(step) or not self.draws_again:
            if not path.exists():
                raise UserError(
                    f"{path} is missing, and only the layout that the run had "
                    f"({self.recorded[step]['layout']}) draws the same rollouts again; replay with that one"
                )
            generation.engine = _RecordedEngine(engine, Rollouts.load(path))  # type: ignore[arg-type]
        try:
            opo_step(self.run, step)
        finally:
            generation.engine = engine

    def _bad_step(self, step: int) -> None:
        """A batch with bad numbers has them again, or the difference is named."""
        kept = Rollouts.load(bad_batch(self.run_dir, step))
        try:
            self._step(step)
        except NonFiniteError as error:
            self.run.display.log(f"step {step} has its bad numbers again: {error.reason}")
            return
        assert kept.rewards is not None
        wrong = (~torch.isfinite(kept.rewards)).nonzero()[:, 0].tolist()
        what = f": {_sample(kept, wrong[0])} had the reward {float(kept.rewards[wrong[0]])}" if wrong else ""
        raise ReplayDiffers(f"step {step} had bad numbers in the run and has none when done again{what}")

    def _compare(self, step: int) -> None:
        """
        Raises:
            ReplayDiffers: on all ranks.
        """
        found = None
        if self.run.parallel.rank == 0 and step in self.recorded:
            files = self.run.files
            again = next(row for row in files.audit.read() if row["step"] == step)
            found = self._rollouts_differ(step, again) or self._weights_differ(step, again)
        found = all_gather_objects(self.run.parallel, found)[0]
        if found is not None:
            raise ReplayDiffers(f"step {step}: {found}")

    def _rollouts_differ(self, step: int, again: MetricsRow) -> str | None:
        columns, path = self.recorded[step]["columns"], batch(self.run_dir, step)
        done_again, changed = batch(self.run.files.dir, step), []
        in_file = Rollouts.load(path) if path.exists() else None
        if in_file is not None:
            sums = column_digests(in_file)
            changed = [name for name in columns if columns[name] != in_hex(sums[name])]
        other = [name for name in columns if columns[name] != again["columns"][name]]
        if not changed and not other:
            return None
        where = first_difference(in_file, Rollouts.load(done_again)) if in_file is not None else None
        if changed:
            return f"{path} is not what the run wrote ({', '.join(changed)}){f': {where}' if where else ''}"
        return where or f"other {', '.join(other)} than the run wrote"

    def _weights_differ(self, step: int, again: MetricsRow) -> str | None:
        for name, (digest, norm) in self.recorded[step]["tensors"].items():
            new_digest, new_norm = again["tensors"][name]
            if self.is_same_layout and digest != new_digest:
                return f"the weight {name} has other bits: its norm was {norm!r} and is {new_norm!r}"
            if abs(new_norm - norm) > NORM_TOLERANCE * abs(norm):
                return f"the weight {name} had the norm {norm!r} and has {new_norm!r}"
        return None


class _RecordedEngine:
    """The recorded rollouts of a step in the place of drawing them; all else is the engine's."""

    def __init__(self, engine: LocalEngine, rollouts: Rollouts) -> None:
        self._engine = engine
        self._rollouts = replace(rollouts, rewards=None, advantages=None)
        pairs = zip(rollouts.groups.tolist(), rollouts.sample_indices.tolist(), strict=True)
        self._place = {pair: i for i, pair in enumerate(pairs)}
        self.version = engine.version

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, progress: Progress | None = None
    ) -> Rollouts:
        if sampling.seed[1:2] != (STREAM_TRAIN,):
            return self._engine.generate(requests, sampling, progress)
        return self._rollouts.select([self._place[one.group, one.sample_index] for one in requests])

    def update_weights(self, buckets: NamedTensors, version: int) -> None:
        self._engine.update_weights(buckets, version)

    def probe(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> dict[str, Rollouts]:
        return self._engine.probe(requests, sampling)

    def sleep(self, keeps_weights: bool = False) -> None: ...

    def wake(self) -> None: ...

    def recover(self) -> None: ...

    def close(self) -> None: ...


def first_difference(was: Rollouts, now: Rollouts) -> str | None:
    """Where two batches of the same requests differ first, in words."""
    for name in (*PER_TOKEN, *PER_SAMPLE):  # a reward follows from the tokens
        before, after = getattr(was, name), getattr(now, name)
        if before.shape != after.shape:
            continue  # their lengths differ, which is named
        places = (before != after).nonzero()[:, 0].tolist()
        if not places:
            continue
        place, lengths_name = places[0], PER_TOKEN.get(name)
        values = f"was {before[place].item()} and is {after[place].item()} when done again"
        if lengths_name is None:
            return f"the {name.removesuffix('s')} of {_sample(was, place)} {values}"
        ends = getattr(was, lengths_name).cumsum(0)
        sample = int(torch.searchsorted(ends, place, right=True))
        token = place - (int(ends[sample - 1]) if sample else 0)
        return f"token {token} of the {name.split('_')[0]} of {_sample(was, sample)} {values}"
    return None


def _sample(rollouts: Rollouts, i: int) -> str:
    return f"prompt {int(rollouts.prompt_ids[i])}, sample {int(rollouts.sample_indices[i])}"

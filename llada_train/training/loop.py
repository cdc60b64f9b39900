"""The training loop. It reads like the paper's Algorithm 1, once noise and layout have been moved out of sight."""

import math
import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from llada_train.checkpoint.manifest import Progress
from llada_train.checkpoint.restore import load_newest
from llada_train.checkpoint.store import remove_newer
from llada_train.checkpoint.writer import CheckpointWriter
from llada_train.config.errors import UserError
from llada_train.config.schema import Config, SamplesConfig
from llada_train.data.loader import GlobalBatch, TrainingLoader, Validation
from llada_train.data.timeline import Timeline
from llada_train.parallel.engine import T_BUCKETS, Engine, Losses, Step
from llada_train.parallel.topology import any_rank, gather
from llada_train.plan.flops import flops_per_token
from llada_train.training.guard import Guard
from llada_train.training.journal import Journal
from llada_train.training.learning_rate import learning_rate
from llada_train.training.metrics import MetricsLog
from llada_train.training.preflight import check_phases
from llada_train.training.run_folder import RunFolder
from llada_train.training.samples import Samples
from llada_train.training.signals import StopRequest
from llada_train.training.watchdog import Watchdog

RECENT_STEPS = 1000  # of which the log tells how evenly they pass


@dataclass
class _Interval:
    """What the applied steps since the last line of the log did."""

    steps: int = 0
    tokens: int = 0  # nominal
    flops: float = 0.0  # of the model, for the tokens that this rank was given
    seconds: float = 0.0  # of the steps alone, without validation and checkpoints between them
    losses: Losses = field(default_factory=Losses.none)
    data_wait: float = 0.0
    own_seconds: float = 0.0  # of this rank alone
    learning_rate: float = 0.0  # of the last step
    gradient_norm: float = 0.0

    def add(self, tokens: int, flops: float, step: Step, rate: float, seconds: float, data_wait: float) -> None:
        self.steps += 1
        self.tokens += tokens
        self.flops += flops
        self.seconds += seconds
        self.losses = self.losses + step.losses
        self.data_wait += data_wait
        self.own_seconds += step.own_seconds
        self.learning_rate, self.gradient_norm = rate, step.gradient_norm


class _Outcome(Enum):
    COMPLETE = auto()
    STOPPED = auto()  # by a signal
    HAS_TO_GO_BACK = auto()  # too many steps in a row could not be applied


class Trainer:
    def __init__(
        self,
        config: Config,
        engine: Engine,
        loader: TrainingLoader,
        timeline: Timeline,
        validation: Validation,
        samples: Samples,
        run: RunFolder,
        writer: CheckpointWriter,
        log: MetricsLog | None,  # on the main process only
        journal: Journal | None,  # likewise
        stop: StopRequest,
        watchdog: Watchdog,
        progress: Progress,
    ) -> None:
        self.config, self.engine, self.loader, self.validation = config, engine, loader, validation
        self.run, self.writer, self.log, self.stop, self.watchdog = run, writer, log, stop, watchdog
        self.journal, self.samples = journal, samples
        self.timeline, self.end_samples, self.progress = timeline, timeline.end_samples, progress
        self.guard = Guard(config.guard, progress.guard)
        self.recent_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self.reasons: list[str] = []  # why the last steps in a row were refused

    def train(self) -> bool:
        """Run to the end, or until a signal: True when the run is complete. A checkpoint is saved either way.

        Raises:
            UserError: the run cannot go on; on all ranks.
        """
        if self._complete():
            return True
        try:
            while (outcome := self._train()) is _Outcome.HAS_TO_GO_BACK:
                self._go_back()
        except UserError:  # on all ranks
            self.writer.settle()
            raise
        self._doing("saving")
        self.writer.save(self.progress)
        if outcome is _Outcome.STOPPED:
            self._look()  # after the save, for which there may be little time
        return outcome is _Outcome.COMPLETE

    def _train(self) -> _Outcome:
        config, interval = self.config, _Interval()
        with closing(self.loader.iterate(self.progress.consumed_samples, self.end_samples)) as global_batches:
            while not self._complete():
                self.watchdog.beat(f"step {self.progress.step + 1}")
                started = time.perf_counter()
                with self.engine.topology.failing_together():
                    batch = next(global_batches)
                data_wait = time.perf_counter() - started
                phase, tokens = self.timeline.phase(batch.first_sample), self.timeline.tokens(batch.first_sample)
                rate = learning_rate(config.optimizer.learning_rate, tokens, phase.tokens_per_step)
                step = self.engine.train_step(batch.batches, rate, self.guard.accepts, self._step_to_check())
                too_many_refused = self._too_many_refused(batch, step)
                if self.journal is not None:
                    self.journal.beat(self.progress, self._tokens())
                if too_many_refused:
                    return _Outcome.HAS_TO_GO_BACK
                if step.applied:
                    seconds = time.perf_counter() - started
                    self.recent_seconds.append(seconds)
                    interval.add(phase.tokens_per_step, self._flops(batch), step, rate, seconds, data_wait)
                device = self.engine.topology.device
                stopping, writing = any_rank(self.stop.received, self.writer.writing, device=device)
                if self.writer.pending and not writing:
                    self.writer.finish()
                if interval.steps and (stopping or self._due(config.logging.interval_steps)):
                    self._report(interval)
                    interval = _Interval()
                if stopping and not self._complete():
                    return _Outcome.STOPPED
                self._look()
                if self._due(config.checkpoint.interval_steps) and not self._complete():
                    self._doing("saving")
                    self.writer.start(self.progress)
        return _Outcome.COMPLETE

    def _flops(self, batch: GlobalBatch) -> float:
        """Of the model, for the tokens of this rank's micro-batches; rows of an SFT run differ in length."""
        shapes = [one.input_ids.shape for one in batch.batches]
        ranks = self.config.parallel.context_parallel
        return sum(B * S * flops_per_token(self.config.model, S * ranks) for B, S in shapes)

    def _doing(self, what: str) -> None:
        """Something other than a step begins, which may take long."""
        self.watchdog.beat(f"{what} after step {self.progress.step}")
        if self.journal is not None:
            self.journal.doing(what, self.progress, self._tokens())

    def _too_many_refused(self, batch: GlobalBatch, step: Step) -> bool:
        """Count the step, applied or not: were the last ones refused, and too many?"""
        number, too_many = self.progress.step + 1, False
        if step.applied:
            self.guard.applied(step.gradient_norm)
            self.reasons.clear()
        else:
            reason = self.guard.objection(step.losses.loss, step.gradient_norm)
            self.reasons.append(f"step {number}: {reason}")
            too_many = self.guard.skipped(batch.first_sample)
            if self.log is not None:
                self.log.skipped(step=number, consumed_samples=batch.end_sample, reason=str(reason))
        self.progress = Progress(
            step=number,
            consumed_samples=batch.end_sample,
            phases=self.timeline.begun(batch.end_sample),
            guard=self.guard.state,
        )
        return too_many

    def _go_back(self) -> None:
        """Load the newest checkpoint from before the refused steps in a row, and pass over their samples.

        Raises:
            UserError: there is none, or the run went back shortly before.
        """
        self.watchdog.beat(f"going back after step {self.progress.step}")
        self.writer.finish()
        bad, number = self.guard.state, self.progress.step
        assert bad.first_skipped_sample is not None
        passed_over = (bad.first_skipped_sample, self.progress.consumed_samples)
        trouble = f"{bad.skips_in_a_row} steps in a row could not be applied ({'; '.join(self.reasons)})"
        advice = "lower the learning rate to come, as LLaDA's authors did, or look at the data, and run again"
        # By the number of steps, not by which checkpoints there are: a signal may have saved one more.
        since = number - bad.skips_in_a_row - (bad.went_back_to or 0)
        if bad.went_back_to is not None and since < self.config.checkpoint.interval_steps:
            raise UserError(
                f"{trouble}, and the run went back to step {bad.went_back_to:,} for such steps already; it stops. Its "
                f"checkpoints are sound: {advice}"
            )
        found = load_newest(self.run.checkpoints, self.engine, before_sample=passed_over[0])
        if found is None:
            raise UserError(f"{trouble}, and there is no checkpoint from before them to go back to; {advice}")
        folder, self.progress = found
        self.timeline = self.timeline.passing_over(*passed_over)
        self.end_samples = self.timeline.end_samples
        check_phases(self.config, self.timeline, self.progress.consumed_samples, self.engine.topology.world_size)
        self.loader = self.loader.at(self.timeline)
        self.guard = Guard(self.config.guard, self.progress.guard)
        self.guard.went_back(self.progress.step, bad.skips_in_a_row)
        with self.engine.topology.failing_together():
            if self.engine.topology.is_main:
                remove_newer(folder)
        if self.log is not None:
            self.log.went_back(step=self.progress.step, from_step=number, passed_over=passed_over, reasons=self.reasons)
        self.reasons.clear()

    def reached(self) -> tuple[Progress, int, bool]:
        """Where the run stands, its nominal tokens so far, and whether that is its end."""
        return self.progress, self._tokens(), self._complete()

    def _complete(self) -> bool:
        return self.timeline.next_step(self.progress.consumed_samples) >= self.end_samples

    def _due(self, interval_steps: int) -> bool:
        """Every so many steps, and at the end of the run."""
        return self.progress.step % interval_steps == 0 or self._complete()

    def _tokens(self) -> int:
        """Nominal tokens so far."""
        return self.timeline.tokens(self.progress.consumed_samples)

    def _step_to_check(self) -> int | None:
        """The number of the step to come, if the ranks are to compare their copies of the parameters in it."""
        interval, step = self.config.training.replica_check_interval_steps, self.progress.step + 1
        return step if interval is not None and step % interval == 0 else None

    def _report(self, interval: _Interval) -> None:
        own = interval.own_seconds / interval.steps, interval.data_wait / interval.steps
        everyones = gather((*own, interval.flops), self.engine.topology.device)
        parallel = self.config.parallel
        copies = parallel.tensor_parallel * parallel.pipeline_parallel  # ranks that are given the same tokens
        if self.log is None:
            return
        if self.journal is not None and (
            slow := self.journal.ranks(self.progress.step, [rank[:2] for rank in everyones])
        ):
            self.log.remark(self.progress.step, slow)
        self.log.train(
            step=self.progress.step,
            consumed_samples=self.progress.consumed_samples,
            tokens=self._tokens(),
            loss=interval.losses.loss / interval.steps,
            learning_rate=interval.learning_rate,
            grad_norm=interval.gradient_norm,
            tokens_per_second=interval.tokens / interval.seconds,
            model_flops_per_second=sum(rank[2] for rank in everyones) / copies / interval.seconds,
            data_wait_seconds=interval.data_wait / interval.steps,
            step_seconds=interval.seconds / interval.steps,
            step_seconds_median=float(np.median(self.recent_seconds)),
            step_seconds_p99=float(np.quantile(self.recent_seconds, 0.99)),
            nelbo_by_t=interval.losses.bound_by_t(),
        )

    def _look(self) -> None:
        """At what the model has learnt, as far as it is due."""
        validation = self.config.validation
        if self._due(validation.interval_steps):
            self._validate()
        if validation.samples is not None and self._due(validation.samples.interval_steps):
            self._write_samples(validation.samples)

    def _write_samples(self, asked: SamplesConfig) -> None:
        self._doing("writing samples")
        texts = self.samples.texts(asked)
        if self.log is not None and texts is not None:
            self.log.samples(step=self.progress.step, tokens=self._tokens(), texts=texts)

    def _validate(self) -> None:
        if not self.validation.batches:
            return
        self._doing("validating")
        bounds = self.engine.evaluate(self.validation.batches, len(self.validation.t)).numpy()
        bound = float(bounds.mean())
        exact_match = self.samples.exact_match()
        if not math.isfinite(bound):
            raise UserError(
                f"step {self.progress.step:,}: the bound on held-out documents is {bound}; the run stops. Its "
                f"checkpoints in {self.run.checkpoints} are from before: go on from one with a lower learning rate"
            )
        if self.log is not None:
            self.log.validation(
                step=self.progress.step,
                tokens=self._tokens(),
                bound=bound,
                bound_by_t=self.validation.by_t(bounds, T_BUCKETS),
                bound_by_corpus=self.validation.by_corpus(bounds),
                exact_match=exact_match,
            )

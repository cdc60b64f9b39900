"""The training loop. It reads like the paper's Algorithm 1, once noise and layout have been moved out of sight."""

import math
import time
from contextlib import closing
from dataclasses import dataclass, field

from llada_train.checkpoint.manifest import Progress
from llada_train.checkpoint.writer import save
from llada_train.config.errors import UserError
from llada_train.config.schema import Config
from llada_train.data.batch import Batch
from llada_train.data.loader import TrainingLoader
from llada_train.data.timeline import Timeline
from llada_train.model.sizes import flops_per_token
from llada_train.parallel.engine import Engine, Losses
from llada_train.training.learning_rate import learning_rate
from llada_train.training.metrics import MetricsLog
from llada_train.training.run_folder import RunFolder
from llada_train.training.signals import StopRequest


@dataclass
class _Interval:
    """What happened since the last line of the log."""

    steps: int = 0
    tokens: int = 0  # nominal
    flops: float = 0.0
    seconds: float = 0.0  # of the steps alone, without validation and checkpoints between them
    losses: Losses = field(default_factory=Losses.none)
    data_wait: float = 0.0

    def add(self, losses: Losses, tokens: int, flops: float, seconds: float, data_wait: float) -> None:
        self.steps += 1
        self.tokens += tokens
        self.flops += flops
        self.seconds += seconds
        self.losses = self.losses + losses
        self.data_wait += data_wait


class Trainer:
    def __init__(
        self,
        config: Config,
        engine: Engine,
        loader: TrainingLoader,
        timeline: Timeline,
        validation: list[Batch],
        run: RunFolder,
        log: MetricsLog | None,  # on the main process only
        stop: StopRequest,
        progress: Progress,
    ) -> None:
        self.config, self.engine, self.loader, self.validation = config, engine, loader, validation
        self.timeline, self.end_samples = timeline, timeline.end_samples
        self.run, self.log, self.stop, self.progress = run, log, stop, progress
        self.saved_step = progress.step if progress.step else None

    def train(self) -> bool:
        """Run to the end, or until a signal: True when the run is complete. A checkpoint is saved either way."""
        config = self.config
        interval = _Interval()
        with closing(self.loader.iterate(self.progress.consumed_samples, self.end_samples)) as global_batches:
            while self.progress.consumed_samples < self.end_samples:
                phase, started = self.timeline.phase(self.progress.consumed_samples), time.perf_counter()
                batches = next(global_batches)
                data_wait = time.perf_counter() - started
                rate = learning_rate(config.optimizer.learning_rate, self._tokens(), phase.tokens_per_step)
                losses, gradient_norm = self.engine.train_step(batches, rate, self._step_to_check())
                self._advance(phase.global_batch_size)
                self._refuse_non_finite(losses.loss, gradient_norm)
                flops = phase.tokens_per_step * flops_per_token(config.model, phase.sequence_length)
                interval.add(losses, phase.tokens_per_step, flops, time.perf_counter() - started, data_wait)
                stopping = self.stop.agreed(self.engine.topology.device)
                if stopping or self._due(config.logging.interval_steps):
                    self._report(interval, rate, gradient_norm)
                    interval = _Interval()
                if self._due(config.validation.interval_steps):
                    self._validate()
                if self._due(config.checkpoint.interval_steps):
                    self._save()
                if stopping:
                    break
        self._save()
        return self.progress.consumed_samples >= self.end_samples

    def _advance(self, samples: int) -> None:
        consumed = self.progress.consumed_samples + samples
        self.progress = Progress(
            step=self.progress.step + 1, consumed_samples=consumed, phases=self.timeline.begun(consumed)
        )

    def _due(self, interval_steps: int) -> bool:
        """Every so many steps, and at the end of the run."""
        return self.progress.step % interval_steps == 0 or self.progress.consumed_samples >= self.end_samples

    def _tokens(self) -> int:
        """Nominal tokens so far: the clock of the learning-rate phases."""
        return self.timeline.tokens(self.progress.consumed_samples)

    def _refuse_non_finite(self, loss: float, gradient_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            return
        raise UserError(
            f"step {self.progress.step}: loss {loss}, gradient norm {gradient_norm}: not finite; the run stops. "
            f"Its checkpoints in {self.run.checkpoints} are sound: LLaDA's authors went on from one with a lower "
            "learning rate"
        )

    def _step_to_check(self) -> int | None:
        """The number of the step to come, if the ranks are to compare their copies of the parameters in it."""
        interval, step = self.config.training.replica_check_interval_steps, self.progress.step + 1
        return step if interval is not None and step % interval == 0 else None

    def _report(self, interval: _Interval, rate: float, gradient_norm: float) -> None:
        if self.log is None:
            return
        self.log.train(
            step=self.progress.step,
            consumed_samples=self.progress.consumed_samples,
            tokens=self._tokens(),
            loss=interval.losses.loss / interval.steps,
            learning_rate=rate,
            grad_norm=gradient_norm,
            tokens_per_second=interval.tokens / interval.seconds,
            model_flops_per_second=interval.flops / interval.seconds,
            data_wait_seconds=interval.data_wait / interval.steps,
            step_seconds=interval.seconds / interval.steps,
            nelbo_by_t=interval.losses.bound_by_t(),
        )

    def _validate(self) -> None:
        if not self.validation:
            return
        losses = self.engine.evaluate(self.validation)
        self._refuse_non_finite(losses.loss, 0.0)
        if self.log is not None:
            self.log.validation(
                step=self.progress.step, tokens=self._tokens(), bound=losses.loss, bound_by_t=losses.bound_by_t()
            )

    def _save(self) -> None:
        if self.saved_step == self.progress.step:
            return
        save(self.run.checkpoints, self.engine, self.config, self.progress, self.config.checkpoint.keep)
        self.saved_step = self.progress.step

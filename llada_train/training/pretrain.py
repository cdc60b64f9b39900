"""`llada-train pretrain`: build what the config names, in this order, and run the loop."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from llada_train.checkpoint.manifest import Progress
from llada_train.checkpoint.reader import Checkpoint
from llada_train.checkpoint.store import checkpoints, is_hf_folder, resolve
from llada_train.checkpoint.writer import load, verify
from llada_train.config.schema import Config
from llada_train.convert.from_hf import HfWeights
from llada_train.convert.names import GlobalWeights
from llada_train.data.loader import TrainingLoader, validation_batches
from llada_train.data.timeline import Timeline
from llada_train.model.weights import InitialWeights
from llada_train.parallel import topology
from llada_train.parallel.engine import Engine
from llada_train.parallel.launch import STOPPED_EXIT_CODE
from llada_train.training.loop import Trainer
from llada_train.training.metrics import MetricsLog, plot_curves
from llada_train.training.preflight import Inputs
from llada_train.training.signals import StopRequest


def pretrain(inputs: Inputs, stop: StopRequest) -> int:
    """Train on this process (one of WORLD_SIZE); returns the exit code: 0 complete, 75 stopped by a signal.

    `stop` was made before anything heavy was imported, so that no signal is missed.

    Raises:
        UserError: run folder, checkpoint or environment are at fault.
    """
    config, data, run = inputs.config, inputs.data, inputs.run
    if topology.rank() == 0:
        run.prepare()
        run.lock()
        run.record_changes()
    here = topology.initialize(config.parallel)
    try:
        engine = Engine(config, here)
        # Rank 0's choice: file systems show a new folder to some nodes before others.
        resume_from = topology.broadcast(run.resume_from)
        progress = _restore(config, engine, resume_from)
        if here.is_main and resume_from is not None:
            print(f"resuming from {resume_from} at step {progress.step:,}")
            for change in run.accepted_changes:
                print(f"accepted: {change}")
        timeline = Timeline(config, progress.phases, progress.consumed_samples)
        end_tokens = timeline.tokens(timeline.end_samples)
        log = MetricsLog(run.path, progress.step, end_tokens) if here.is_main else None
        trainer = Trainer(
            config=config,
            engine=engine,
            loader=TrainingLoader(data.at(timeline), config, here.place),
            timeline=timeline,
            validation=validation_batches(data, config, here.place),
            run=run,
            log=log,
            stop=stop,
            progress=progress,
        )
        complete = trainer.train()
        if log is not None:
            log.close()
            plot_curves(run.path)
            if not complete:
                saved = checkpoints(run.checkpoints)[-1]
                step = trainer.progress.step
                print(f"stopped by a signal after step {step:,}; checkpoint {saved}; run the same command to go on")
        stop.ignore()
    finally:
        topology.shutdown()
    return 0 if complete else STOPPED_EXIT_CODE


def _restore(config: Config, engine: Engine, resume_from: Path | None) -> Progress:
    """The newest checkpoint of this run; else the weights that `init_from` names; else LLaDA's initialisation."""
    if resume_from is not None:
        with Checkpoint(resume_from) as checkpoint:
            return load(checkpoint, engine)
    with _weights(config) as weights:
        engine.set_weights(lambda shard: shard.of(weights.read(shard.name)))
    return Progress(step=0, consumed_samples=0)


def _weights(config: Config) -> AbstractContextManager[GlobalWeights]:
    path = config.init_from
    if path is None:
        return nullcontext(InitialWeights(config.model, config.seed))
    if is_hf_folder(path):
        return HfWeights(path, config.model)
    checkpoint = Checkpoint(resolve(path))
    verify(checkpoint)
    return checkpoint

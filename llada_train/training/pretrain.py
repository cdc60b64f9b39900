"""`llada-train pretrain`: build what the config names, in this order, and run the loop."""

from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

from llada_train.checkpoint.manifest import Progress
from llada_train.checkpoint.restore import load_newest
from llada_train.checkpoint.store import checkpoints
from llada_train.checkpoint.writer import CheckpointWriter
from llada_train.config.errors import UserError
from llada_train.convert.split import read_slices
from llada_train.data.loader import TrainingLoader, validation
from llada_train.data.training_data import TrainingData
from llada_train.model.kernels import kernels
from llada_train.model.weights import InitialWeights
from llada_train.parallel import topology
from llada_train.parallel.engine import Engine
from llada_train.parallel.launch import STOPPED_EXIT_CODE, outlive_launcher
from llada_train.parallel.topology import Topology
from llada_train.training.journal import Journal, StartTimes
from llada_train.training.loop import Trainer
from llada_train.training.metrics import MetricsLog, plan_lines, plot_curves, warn
from llada_train.training.preflight import Inputs, check_content, check_phases
from llada_train.training.run_folder import RunFolder
from llada_train.training.samples import Samples
from llada_train.training.signals import StopRequest
from llada_train.training.watchdog import Watchdog


def pretrain(inputs: Inputs, stop: StopRequest, watchdog: Watchdog, start: StartTimes) -> int:
    """Train on this process (one of WORLD_SIZE); returns the exit code: 0 complete, 75 stopped by a signal.

    `stop` was made before anything heavy was imported, so that no signal is missed.

    Raises:
        UserError: run folder, checkpoint or environment are at fault.
    """
    config, data, run = inputs.config, inputs.data, inputs.run
    if topology.rank() == 0:
        run.prepare()
    if config.training.deterministic:
        topology.make_deterministic()
    start.now("joining")
    watchdog.beat("joining the other processes")
    # Longer than the watchdog waits: of a rank that hangs it tells more than a collective that gives up.
    here = topology.initialize(config.parallel, timedelta(seconds=2 * config.training.hang_timeout_seconds))
    outlive_launcher()
    try:
        watchdog.beat("looking into the corpora")
        with here.failing_together():
            if here.is_main:  # a few reads of each, which thousands of ranks need not do as well
                check_content(inputs)
        _check_the_same(data, here)
        with here.failing_together():
            kernels(config.training.kernels, here.device)
        start.now("model")
        watchdog.beat("building the model")
        engine = Engine(config, here)
        start.now("weights")
        watchdog.beat("reading its weights")
        progress = _restore(run, engine)
        writer = CheckpointWriter(run.checkpoints, engine, data.identities if here.is_main else ())
        timeline = data.timeline_after(progress.phases, progress.consumed_samples)
        end_tokens = timeline.tokens(timeline.end_samples)
        check_phases(config, timeline, progress.consumed_samples, here.world_size)
        log, journal, hosts, ours = None, None, topology.hosts(), data.at(timeline)
        with here.failing_together():
            if here.is_main:
                run.record_changes(progress)
                if progress.step == 0 or run.accepted_changes:
                    print("\n".join([*ours.description, *plan_lines(ours.plan)]), flush=True)
                log = MetricsLog(run.path, progress.step, end_tokens)
                journal = Journal(run.path, start, config.training.hang_timeout_seconds)
                tokens = timeline.tokens(progress.consumed_samples)
                journal.started(progress, tokens, end_tokens, hosts, topology.device_name(here.device))
        trainer = Trainer(
            config=config,
            engine=engine,
            loader=TrainingLoader(ours, config, here.place),
            timeline=timeline,
            validation=validation(data, config, here.place),
            samples=Samples(data, config, engine),
            run=run,
            writer=writer,
            log=log,
            journal=journal,
            stop=stop,
            watchdog=watchdog,
            progress=progress,
        )
        start.now("first_step")
        with journal.telling_the_end(trainer.reached) if journal is not None else nullcontext():
            complete = trainer.train()
        with here.failing_together():  # all wait: a launcher that sees the others end gives this one a minute
            if log is not None:
                log.close()
                _draw_curves(run.path)
                saved, step = checkpoints(run.checkpoints)[-1], f"{trainer.progress.step:,}"
                if complete:
                    print(f"complete at step {step}; checkpoint {saved}")
                else:
                    print(f"stopped by a signal after step {step}; checkpoint {saved}; run the same command to go on")
        stop.ignore()
    finally:
        topology.shutdown()
    return 0 if complete else STOPPED_EXIT_CODE


def _check_the_same(data: TrainingData, here: Topology) -> None:
    """All ranks have to see the same files, or each would read an order of its own; collective.

    Raises:
        UserError: a rank sees others than rank 0 does; on all ranks.
    """
    expected = topology.broadcast(data.files)
    with here.failing_together():
        for corpus, ours, theirs in zip(data.corpora, data.files, expected, strict=True):
            if list(ours.values()) != list(theirs.values()):
                then = sum(tokens for tokens, _ in theirs.values())
                raise UserError(
                    f"{corpus.prefix}: {len(ours)} files with {corpus.num_tokens:,} tokens on rank {here.rank}, "
                    f"{len(theirs)} with {then:,} on rank 0; give every machine the same files"
                )


def _draw_curves(run_dir: Path) -> None:
    """A picture that cannot be written is no reason to call a run failed."""
    try:
        plot_curves(run_dir)
    except OSError as error:
        warn(f"{run_dir}: the loss curves cannot be drawn: {error.strerror or error}")


def _restore(run: RunFolder, engine: Engine) -> Progress:
    """The newest sound checkpoint of this run; else the weights that `init_from` names; else LLaDA's initialisation."""
    if (found := load_newest(run.checkpoints, engine)) is not None:
        folder, progress = found
        if engine.topology.is_main:
            print(f"resuming from {folder} at step {progress.step:,}")
            for change in run.accepted_changes:
                print(f"accepted: {change}")
        return progress
    config = engine.config
    if config.init_from is None:
        initial = InitialWeights(config.model, config.seed)
        engine.set_weights(lambda shard: shard.of(initial.read(shard.name)))
    else:
        with read_slices(config.init_from, config.model, engine.topology) as read:
            engine.set_weights(read)
    return Progress(step=0, consumed_samples=0)

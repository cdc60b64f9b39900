"""What can be found at fault before any process of a run has started. Imports no torch."""

from dataclasses import dataclass

from llada_train.config.errors import UserError
from llada_train.config.rules import check_world_size, cross_section_problems
from llada_train.config.schema import Config
from llada_train.data.chat import prompt_ids
from llada_train.data.opening import open_data
from llada_train.data.timeline import Timeline
from llada_train.data.training_data import TrainingData
from llada_train.training.metrics import read_metrics
from llada_train.training.run_folder import RunFolder


@dataclass(frozen=True)
class Inputs:
    """What a run reads, opened and checked against each other, and the folder that it writes to."""

    config: Config
    data: TrainingData
    run: RunFolder


def open_inputs(config: Config, accept_config_changes: bool = False) -> Inputs:
    """Open everything that the config names; nothing is written but the cache of tokenized data sets of an SFT run.

    That stays if the run is refused: tokenizing them may have taken hours.

    Raises:
        UserError: data, tokenizer or run folder are at fault.
    """
    if config.run_dir.exists() and not config.run_dir.is_dir():
        raise UserError(f"run_dir: {config.run_dir}: is a file; give a folder")
    data = open_data(config)
    inputs = Inputs(data.config, data, RunFolder(data.config, accept_config_changes))
    _check_samples(inputs)
    read_metrics(config.run_dir)
    return inputs


def _check_samples(inputs: Inputs) -> None:
    samples, longest = inputs.config.validation.samples, inputs.config.model.max_sequence_length
    if samples is None:
        return
    template = inputs.config.sft.chat_template if inputs.config.sft else None
    for i, ids in enumerate(prompt_ids(samples.prompts, inputs.data.tokenizer, template)):
        if len(ids) + samples.gen_length > longest:
            raise UserError(
                f"validation.samples.prompts.{i}: {len(ids)} tokens and gen_length {samples.gen_length} are more than "
                f"model.max_sequence_length {longest}; give less"
            )


def check_phases(config: Config, timeline: Timeline, consumed_samples: int, world_size: int) -> None:
    """What holds from `consumed_samples` on has to fit the layout, too, where it is not what the config says now.

    Raises:
        UserError: an earlier batch size or sequence length, still in force, does not fit the processes.
    """
    for phase in timeline.phases[timeline.phases.index(timeline.phase(consumed_samples)) :]:
        training = config.training.model_copy(update={"global_batch_size": phase.global_batch_size})
        data = config.data.model_copy(update={"sequence_length": phase.sequence_length})
        then = config.model_copy(update={"training": training, "data": data, "schedule": []})
        problems = cross_section_problems(then) or check_world_size(then, world_size)
        if problems:
            told = "\n  ".join(f"{key}: {message}" for key, message in problems)
            raise UserError(
                f"{config.run_dir}: from sample {max(consumed_samples, phase.first_sample):,} on the run has batches "
                f"of {phase.global_batch_size} × {phase.sequence_length} tokens, until the next change can begin; the "
                f"layout does not fit them:\n  {told}\ngive another layout until then"
            )


def check_content(inputs: Inputs) -> None:
    """Look into the corpora; some reads of each, so that one rank does it for all.

    Raises:
        UserError: they cannot be trained on, or are not those that the run began with.
    """
    inputs.data.check()
    check_corpora(inputs.run, inputs.data)


def check_corpora(run: RunFolder, data: TrainingData) -> None:
    """A run's order of tokens hangs on its corpora, so they have to be those that it began with.

    Raises:
        UserError: they are not.
    """
    for corpus, then in zip(data.corpora, run.corpora, strict=False):
        now = corpus.identity
        if now == then:
            continue
        differs = f"{data.counted(then)} then, {data.counted(now)} now"
        if (now.documents, now.tokens) == (then.documents, then.tokens):
            differs = "as large as before, but with other tokens"
        raise UserError(
            f"{corpus.prefix}: not the corpus that the run in {run.path} was trained on ({differs}); its order would "
            "repeat tokens of this epoch and leave others out: put the corpus back as it was, add the new one at the "
            "end of data.corpora, or begin a new run (run_dir=…, init_from=…)"
        )

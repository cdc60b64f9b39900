"""What a run that goes on may change of its config, and what it may not. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from llada_train.checkpoint.manifest import Progress
from llada_train.config.load import differences
from llada_train.config.schema import Config
from llada_train.data.timeline import Timeline

# What a run has done so far does not depend on these. The learning rate to come is the user's: LLaDA's authors lowered
# it at a checkpoint when the loss was not finite (paper §2.2).
_FREE = (
    "run_dir",
    "resume",
    "init_from",
    "training.micro_batch_size",
    "training.recompute",
    "training.kernels",
    "training.deterministic",
    "training.hang_timeout_seconds",
    "training.replica_check_interval_steps",
    "data.prefetch",
    "sft.cache",
    "sft.rows",
)
_FREE_SECTIONS = ("optimizer.learning_rate.", "parallel.", "guard.", "checkpoint.", "validation.", "logging.")
_IN_SCHEDULE = ("training.global_batch_size", "data.sequence_length", "data.corpora.")
_COSTS = {
    "data.sequence_length": "the validation rows change with it, as they do not if the schedule changes it",
    "data.tokenizer": "has to be the same in another place; corpora without a manifest do not show whether it is",
}


@dataclass(frozen=True)
class ConfigChanges:
    """Settings that differ and were not announced, as `key: old → new` and, in brackets, what it means."""

    possible: Sequence[str] = ()  # if the user accepts them
    impossible: Sequence[str] = ()
    hint: str = ""  # how the possible ones are made


def config_changes(stored: Config, progress: Progress, given: Config) -> ConfigChanges:
    """Compare the config of a checkpoint with the one that the run is to go on with.

    Free are the layout and what a run writes, the learning rate, changes in the schedule that are still to come, and
    corpora added with weight 0. What never changes is what the checkpoint's tensors or the order of the data hang on.
    """
    now = Timeline(stored, progress.phases, progress.consumed_samples).tokens(progress.consumed_samples)
    possible: list[str] = []
    impossible: list[str] = []
    if stored.block_length != given.block_length and stored.sft is None:
        impossible.append(
            f"data.block_length: {stored.block_length} → {given.block_length} (the data is shuffled in pieces of it, "
            f"fixed when the run began; give data.block_length={stored.block_length})"
        )
    for line in differences(_moved(_until(stored, now), given), _until(given, now)):
        key = line.partition(":")[0]
        if key == "data.block_length" or _free(key, stored, given):
            continue
        reason = _fixed(key, stored, given) or _overruled(key, _until(given, now))
        note = reason or _COSTS.get(key)
        (impossible if reason else possible).append(f"{line} ({note})" if note else line)
    announced = any(line.startswith(_IN_SCHEDULE) for line in possible)
    hint = f"announce changes of batch size, length and weights in `schedule`, from_tokens {now:,} or later; or "
    return ConfigChanges(possible, impossible, hint if announced else "")


def _until(config: Config, tokens: int) -> Config:
    """The config without the changes that are still to come at so many tokens."""
    return config.model_copy(update={"schedule": [c for c in config.schedule if c.from_tokens < tokens]})


def _moved(stored: Config, given: Config) -> Config:
    """With the weights of the schedule named as the given config names the corpora, wherever they are now."""
    names = {old.path: new.path for old, new in zip(stored.data.corpora, given.data.corpora, strict=False)}
    schedule = [
        change.model_copy(update={"weights": {names.get(path, path): w for path, w in change.weights.items()}})
        for change in stored.schedule
    ]
    return stored.model_copy(update={"schedule": schedule})


def _free(key: str, stored: Config, given: Config) -> bool:
    corpus = _corpus(key)
    if corpus is not None and len(stored.data.corpora) <= corpus < len(given.data.corpora):
        return given.data.corpora[corpus].share == 0
    if corpus is not None and key.endswith(".path") and corpus < min(len(stored.data.corpora), len(given.data.corpora)):
        return True  # whether it is the same corpus in another place, its content tells
    return key in _FREE or key.startswith(_FREE_SECTIONS)


def _fixed(key: str, stored: Config, given: Config) -> str | None:
    """Why a setting cannot change in the middle of a run, if so."""
    corpus = _corpus(key)
    if key.startswith("model."):
        return "the checkpoint holds the tensors of that model"
    if stored.sft is not None and (key == "data.sequence_length" or key.startswith("sft")):
        return "which examples there are, and in which order, hangs on it"
    if key == "seed":
        return "the order of the data is drawn from it: tokens of this epoch would come twice or never"
    if corpus is not None and key.endswith(".tokens") and None not in (_tokens(stored, corpus), _tokens(given, corpus)):
        return (
            "tokens are those of the whole run: give weights instead for what is to come, in proportion to what each "
            "corpus is still to give"
        )
    if corpus is not None and corpus < len(stored.data.corpora):
        if corpus >= len(given.data.corpora):
            return (
                "corpora keep their places, since the order of each hangs on its number: add new ones at the end, give "
                "weight 0 to one that is to end"
            )
        if key.endswith(".validation_documents"):
            return "training has read, or left out, those documents: tokens of this epoch would come twice or never"
    return None


def _overruled(key: str, given: Config) -> str | None:
    """Which change of the schedule has set the value since, if so."""
    corpus = _corpus(key)
    name = key.rpartition(".")[2]
    for i, change in enumerate(given.schedule):
        if corpus is not None and name == "weight":
            sets = given.data.corpora[corpus].path in change.weights
        else:
            sets = key in ("training.global_batch_size", "data.sequence_length") and getattr(change, name) is not None
        if sets:
            return f"schedule.{i} has set it since; add a change to `schedule`"
    return None


def _tokens(config: Config, corpus: int) -> int | None:
    corpora = config.data.corpora
    return corpora[corpus].tokens if corpus < len(corpora) else None


def _corpus(key: str) -> int | None:
    """The number of the corpus whose setting `key` is."""
    return int(key.split(".")[2]) if key.startswith("data.corpora.") else None

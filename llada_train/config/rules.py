"""The rules that tie the settings of several sections together, and to the processes that are started.

Each fault is (key, message); the key says where it can be mended.
"""

import math
from functools import cache

from llada_train.config.schema import Config, ModelConfig, ParallelConfig


def cross_section_problems(config: Config) -> list[tuple[str, str]]:
    """Faults that only two sections together show: (key, message)."""
    model, parallel, training = config.model, config.parallel, config.training
    tp, pp, cp = parallel.tensor_parallel, parallel.pipeline_parallel, parallel.context_parallel
    length, found = config.data.sequence_length, layout_problems(model, parallel)

    def check(ok: bool, key: str, message: str) -> None:
        if not ok:
            found.append((key, message))

    check(
        parallel.virtual_pipeline_parallel == 1 or pp > 1,
        "parallel.virtual_pipeline_parallel",
        "interleaves the chunks of several pipeline ranks, but pipeline_parallel is 1; raise it or set this to 1",
    )
    check(
        not parallel.sequence_parallel or tp > 1,
        "parallel.sequence_parallel",
        "splits the sequence over tensor-parallel ranks, but tensor_parallel is 1; raise it or set this to false",
    )
    check(
        parallel.zero_stage == 1 or pp == 1,
        "parallel.zero_stage",
        f"{parallel.zero_stage} splits gradients that pipeline stages still add to; with pipeline_parallel {pp} use "
        "zero_stage 1, or set pipeline_parallel to 1",
    )
    found += _zero_problems(parallel)
    split_evenly = length % cp == 0
    check(
        split_evenly,
        "parallel.context_parallel",
        f"data.sequence_length {length} is not divisible by {cp}; it can be "
        f"{_divisors(math.gcd(*config.lengths.values()))}",
    )
    check(
        not parallel.sequence_parallel or not split_evenly or length // cp % tp == 0,
        "parallel.sequence_parallel",
        f"data.sequence_length {length}{f' ÷ context_parallel {cp}' if cp > 1 else ''} is not divisible by "
        f"tensor_parallel {tp}; make the length a multiple of {cp * tp}, or set this to false",
    )
    held_out = sum(corpus.validation_documents > 0 for corpus in config.data.corpora)
    check(
        config.validation.sequences >= held_out,
        "validation.sequences",
        f"{config.validation.sequences} rows are not one for each of the {held_out} corpora that hold documents out",
    )
    for key, length in config.lengths.items():
        check(
            length <= model.max_sequence_length,
            key,
            f"{length} is more than model.max_sequence_length {model.max_sequence_length}; lower it, or raise that",
        )
    for key, size in config.batch_sizes.items():
        check(
            size % training.micro_batch_size == 0,
            key,
            f"{size} is not divisible by training.micro_batch_size {training.micro_batch_size}; "
            f"it can be {-(-size // training.micro_batch_size) * training.micro_batch_size}",
        )
    return found + _kind_problems(config) + _schedule_problems(config) + _token_count_problems(config)


def layout_problems(model: ModelConfig, parallel: ParallelConfig) -> list[tuple[str, str]]:
    """Sizes of the model that tensor and pipeline parallelism cannot split: (key, message)."""
    tp, pp, found = parallel.tensor_parallel, parallel.pipeline_parallel, []
    cut = ("num_heads", "num_kv_heads", "ffn_hidden_size", "padded_vocab_size")
    sizes = {name: getattr(model, name) for name in cut}
    if uneven := [f"model.{name} {size}" for name, size in sizes.items() if size % tp]:
        are = f"{', '.join(uneven)} {'is' if len(uneven) == 1 else 'are'} not divisible by {tp}"
        found.append(("parallel.tensor_parallel", f"{are}; it can be {_divisors(math.gcd(*sizes.values()))}"))
    if parallel.stages > model.num_layers:
        virtual = parallel.virtual_pipeline_parallel
        product = f"{pp} × virtual_pipeline_parallel {virtual} = " if virtual > 1 else ""
        message = f"{product}{parallel.stages} stages, but the model has {model.num_layers} layers"
        found.append(("parallel.pipeline_parallel", f"{message}; at most that many stages can be"))
    return found


def _kind_problems(config: Config) -> list[tuple[str, str]]:
    """Settings that belong to the other kind of run."""
    corpora, phases = list(enumerate(config.data.corpora)), list(enumerate(config.optimizer.learning_rate))
    if config.sft is None:
        columns = [f"data.corpora.{i}.columns" for i, corpus in corpora if corpus.columns is not None]
        ends = [f"optimizer.learning_rate.{i}" for i, phase in phases if not phase.in_tokens]
        columns += ["validation.answers"] * bool(config.validation.answers)
        return [(key, "is for SFT; add a section `sft`, or leave it out") for key in columns] + [
            (key, "ends at steps or epochs, which SFT alone can count; give until_tokens") for key in ends
        ]
    data, objective = config.data, config.objective
    others = {
        "data.block_length": data.block_length is not None,
        "data.rows": data.rows != type(data).model_fields["rows"].default,
        "schedule": bool(config.schedule),
        "objective.random_length_probability": objective.random_length_probability
        not in (0, type(objective).model_fields["random_length_probability"].default),
    } | {f"data.corpora.{i}.tokens": corpus.tokens is not None for i, corpus in corpora}
    return [(key, "is for pre-training; leave it out of an SFT run") for key, given in others.items() if given]


def _zero_problems(parallel: ParallelConfig) -> list[tuple[str, str]]:
    """Settings that DeepSpeed passes over, or breaks, at this stage of ZeRO."""
    stage, found = parallel.zero_stage, []
    defaults = ParallelConfig()
    all_at_once = "ZeRO 1 reduces all gradients at once, after backward"
    reasons = {
        "overlap_comm": all_at_once,
        "reduce_scatter": all_at_once,
        "reduce_bucket_size": all_at_once,
        "offload_optimizer": "ZeRO 1 keeps a whole fp32 gradient on the GPU, and DeepSpeed offloads nothing with it",
    }
    for name, reason in reasons.items():
        if stage == 1 and getattr(parallel, name) and getattr(parallel, name) != getattr(defaults, name):
            message = f"{reason}; set zero_stage to 2 or 3 (without pipeline stages), or leave this out"
            found.append((f"parallel.{name}", message))
    if stage != 3 and parallel.prefetch_bucket_size != defaults.prefetch_bucket_size:
        message = f"ZeRO {stage} gathers no weights while it computes; set zero_stage to 3, or leave this out"
        found.append(("parallel.prefetch_bucket_size", message))
    if stage == 2 and parallel.overlaps_reduction and parallel.scatters_reduction:
        message = "ZeRO 2 would wait for each message; set overlap_comm to false or zero_stage to 3, or leave this out"
        found.append(("parallel.reduce_scatter", message))
    if stage == 3 and not parallel.scatters_reduction:
        found.append(("parallel.reduce_scatter", "ZeRO 3 always does; leave it out"))
    return found


def _schedule_problems(config: Config) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    parallel, lengths = config.parallel, config.lengths
    multiple = parallel.row_multiple
    for key, length in lengths.items():
        if key.startswith("schedule.") and length % multiple:
            shared = f"context_parallel {parallel.context_parallel}"
            if parallel.sequence_parallel:
                shared += f" × tensor_parallel {parallel.tensor_parallel} (sequence_parallel)"
            found.append((key, f"{length} is not a multiple of {shared} = {multiple}; make it one"))
    uneven = [f"{key} {length}" for key, length in lengths.items() if config.block_length % length]
    if uneven:
        of = "" if config.data.block_length else ", the longest sequence length (none is given),"
        found.append(
            (
                "data.block_length",
                f"{config.block_length}{of} is not a multiple of {', '.join(uneven)}; "
                f"it can be any multiple of {math.lcm(*lengths.values())}",
            )
        )
    weights, before = config.data.weights, 0
    for i, change in enumerate(config.schedule):
        if change.from_tokens <= before:
            message = f"{change.from_tokens:,} does not come after the change before, at {before:,}"
            found.append((f"schedule.{i}.from_tokens", message))
        before = change.from_tokens
        unknown = [path for path in change.weights if path not in weights]
        weights |= {path: weight for path, weight in change.weights.items() if path in weights}
        if unknown:
            message = f"{', '.join(unknown)}: not in data.corpora, which lists {', '.join(weights)}"
            found.append((f"schedule.{i}.weights", message))
        elif not any(weights.values()):
            message = "every weight is 0 from here on; at least one corpus has to be trained on"
            found.append((f"schedule.{i}.weights", message))
    return found


def _token_count_problems(config: Config) -> list[tuple[str, str]]:
    if config.data.corpora[0].tokens is None:
        return []
    found = [
        (
            f"schedule.{i}.weights",
            "the corpora's shares are given as data.corpora.*.tokens of the whole run; give weights",
        )
        for i, change in enumerate(config.schedule)
        if change.weights
    ]
    total = sum(corpus.tokens or 0 for corpus in config.data.corpora)
    length = config.optimizer.learning_rate[-1].until_tokens
    if length is not None and total != length:
        message = f"their tokens add up to {total:,}, but the run is {length:,} long (optimizer.learning_rate)"
        found.append(("data.corpora", f"{message}; make them equal"))
    return found


def check_world_size(config: Config, world_size: int) -> list[tuple[str, str]]:
    """Faults of the layout on `world_size` processes, with the sum done: (key, message)."""
    parallel, training = config.parallel, config.training
    if problem := check_processes(parallel, world_size):
        return [("parallel", problem)]
    together = parallel.processes_per_row
    data_parallel = world_size // together
    rows = training.micro_batch_size * data_parallel * parallel.micro_batch_multiple
    share, rest = divmod(math.gcd(*config.batch_sizes.values()), rows // training.micro_batch_size)
    fits = [m for m in range(1, training.micro_batch_size) if not rest and share % m == 0]
    smaller = f"set micro_batch_size to {fits[-1]}, or raise this: " if fits else ""
    interleaved = (
        f" × pipeline_parallel {parallel.pipeline_parallel} (the interleaved schedule takes that many "
        "micro-batches at a time)"
        if parallel.micro_batch_multiple > 1
        else ""
    )
    return [
        (
            key,
            f"{size} is not a multiple of micro_batch_size {training.micro_batch_size} × "
            f"data-parallel {data_parallel} ({world_size} processes ÷ {together}){interleaved} = {rows}; "
            f"{smaller}the next larger one is {-(-size // rows) * rows}",
        )
        for key, size in config.batch_sizes.items()
        if size % rows
    ]


def check_processes(parallel: ParallelConfig, world_size: int) -> str | None:
    """Why the layout does not fit so many processes, if so."""
    together = parallel.processes_per_row
    if world_size % together == 0:
        return None
    sizes = ("tensor_parallel", "pipeline_parallel", "context_parallel")
    product = " × ".join(f"{name} {getattr(parallel, name)}" for name in sizes if getattr(parallel, name) > 1)
    fitting = world_size // together * together or together
    return (
        f"{product} takes {together} processes for each row, but {world_size} "
        f"{'was' if world_size == 1 else 'were'} started; start a multiple of {together} "
        f"(for example --processes {fitting})"
    )


@cache
def _divisors(number: int) -> str:
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)

"""The config tree: every setting of a run, its type, its default, and the rules that tie settings together.

Sizes are in tokens, sequences or steps as their names say. Times on the learning-rate and mixture clocks are *nominal*
tokens: consumed samples × sequence_length (a cut row counts as a full one).
"""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

Probability = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


def problem(key: str, message: str) -> PydanticCustomError:
    """A cross-field fault that belongs to `key` (relative to the section that raises it)."""
    return PydanticCustomError("rule", "{message}", {"message": message, "key": key})


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ModelConfig(Section):
    """A LLaDA transformer (paper Tab. 5; released config.json): pre-norm, non-causal, no biases, untied head."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    ffn_hidden_size: PositiveInt
    vocab_size: PositiveInt = Field(description="ids that the model can read; padded inside to a multiple of 128")
    max_sequence_length: PositiveInt = 4096
    rope_theta: Annotated[float, Field(gt=0)] = 500_000.0
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head: a multiple of 128, whatever the layout."""
        return -(-self.vocab_size // 128) * 128

    @model_validator(mode="after")
    def _heads(self) -> "ModelConfig":
        if self.hidden_size % self.num_heads:
            raise problem("num_heads", f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise problem(
                "num_kv_heads", f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise problem("num_heads", f"head size {self.head_dim} is odd; rotary embeddings need an even one")
        return self


class CorpusConfig(Section):
    """One tokenized corpus, `path`.bin and `path`.idx, in Megatron's format."""

    path: Path
    weight: Annotated[float, Field(gt=0)] = 1.0
    validation_documents: Annotated[int, Field(ge=0)] = Field(
        default=0, description="the last so many documents are held out: never trained on, read by validation"
    )


class DataConfig(Section):
    tokenizer: Path = Field(description="folder with tokenizer.json, as `llada-data train-tokenizer` writes it")
    sequence_length: PositiveInt
    corpora: Annotated[list[CorpusConfig], Field(min_length=1)]
    prefetch: PositiveInt = Field(default=4, description="steps whose batches are made ahead of the training thread")

    @model_validator(mode="after")
    def _distinct(self) -> "DataConfig":
        paths = [corpus.path for corpus in self.corpora]
        repeated = next((path for path in paths if paths.count(path) > 1), None)
        if repeated is not None:
            raise problem("corpora", f"{repeated} is listed more than once; give it once, with the sum of the weights")
        return self


class ObjectiveConfig(Section):
    """LLaDA's pre-training objective (paper Alg. 1)."""

    epsilon: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=1e-3, description="mask probability p = (1 − ε)·u + ε, u ~ U[0,1) per sequence"
    )
    t_sampling: Literal["uniform", "stratified"] = Field(
        default="uniform", description="stratified: u is spread evenly over the global batch (lower variance, unbiased)"
    )
    random_length_probability: Probability = Field(
        default=0.01, description="share of sequences that are cut to n ~ U{1..sequence_length}"
    )
    loss_normalization: Literal["sequence", "token"] = Field(
        default="sequence", description="sequence: 1/(p·L_b·N), every sequence counts alike; token: ÷ all real tokens"
    )


class LearningRatePhase(Section):
    """Linear from `start` to `end`; `start` left out means the end of the phase before (0 at the beginning)."""

    until_tokens: PositiveInt = Field(description="nominal tokens since the start of the run at which the phase ends")
    end: NonNegativeFloat
    start: NonNegativeFloat | None = None


class OptimizerConfig(Section):
    learning_rate: Annotated[list[LearningRatePhase], Field(min_length=1)] = Field(
        description="phases in order; the last one's until_tokens is the length of the run"
    )
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: NonNegativeFloat = Field(default=0.1, description="on matrices; never on norms")
    gradient_clipping: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _in_order(self) -> "OptimizerConfig":
        ends = [phase.until_tokens for phase in self.learning_rate]
        for i in range(1, len(ends)):
            if ends[i] <= ends[i - 1]:
                raise problem(
                    f"learning_rate.{i}.until_tokens",
                    f"{ends[i]:,} does not come after the phase before, which ends at {ends[i - 1]:,}",
                )
        return self


class TrainingConfig(Section):
    global_batch_size: PositiveInt = Field(description="sequences per optimizer step, over all data-parallel ranks")
    micro_batch_size: PositiveInt = Field(description="sequences in one forward pass of one data-parallel rank")
    precision: Literal["bf16", "fp32"] = Field(
        default="bf16", description="of weights and activations; master weights, gradients and moments are fp32"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="activations computed again in backward instead of kept; selective: what lies between matrix "
        "multiplications (norms, SwiGLU); full: whole layers",
    )
    deterministic: bool = Field(
        default=False,
        description="on GPUs: only kernels that give the same bits every time, slower; CPUs always give the same bits",
    )
    hang_timeout_seconds: Annotated[float, Field(gt=0, le=604_800)] = Field(
        default=1800,
        description="a rank that makes no progress for so long prints its stacks and the run ends; has to cover "
        "start-up, one step, one validation and one save, each by itself",
    )
    replica_check_interval_steps: PositiveInt | None = Field(
        default=None,
        description="steps between checks that parameters of which several ranks hold copies are equal bit for bit; "
        "none: never",
    )


class ParallelConfig(Section):
    tensor_parallel: PositiveInt = 1
    pipeline_parallel: PositiveInt = 1
    virtual_pipeline_parallel: PositiveInt = Field(
        default=1, description="model chunks on each pipeline rank; more than 1: the interleaved schedule"
    )
    context_parallel: PositiveInt = Field(default=1, description="processes that share the columns of each row")
    sequence_parallel: bool = Field(default=False, description="tensor parallelism splits norms along the sequence too")
    zero_stage: Literal[1, 2, 3] = Field(
        default=1,
        description="DeepSpeed ZeRO over data and context parallelism: 1 splits the optimizer state, 2 gradients too, "
        "3 weights too",
    )

    @property
    def processes_per_row(self) -> int:
        """Processes that work on one row together; data parallelism multiplies them."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def stages(self) -> int:
        """Pieces that the layers are split into, one after the other."""
        return self.pipeline_parallel * self.virtual_pipeline_parallel

    @property
    def micro_batch_multiple(self) -> int:
        """A rank's micro-batches are a multiple of this: megatron-core's interleaved schedule takes them in groups."""
        return self.pipeline_parallel if self.virtual_pipeline_parallel > 1 else 1


class GuardConfig(Section):
    """Steps that are not applied. A loss or gradient that is not finite never is."""

    spike_factor: Annotated[float, Field(gt=1)] | None = Field(
        default=None,
        description="a gradient norm of more than so many times the median of the window is a spike, and its step is "
        "not applied; none: any finite norm is fine",
    )
    window_steps: PositiveInt = Field(default=128, description="applied steps whose norms the median is of")
    max_skips: PositiveInt = Field(
        default=5,
        description="after so many refused steps in a row the run goes back to its last checkpoint and passes over "
        "their samples",
    )


class CheckpointConfig(Section):
    interval_steps: PositiveInt = 1000
    keep: PositiveInt = Field(default=3, description="newest checkpoints kept; older ones are removed")
    keep_every_steps: PositiveInt | None = Field(
        default=None, description="checkpoints of steps that are a multiple of this are kept for ever; none: no others"
    )
    max_failures: PositiveInt = Field(
        default=3, description="saves that may fail in a row (disk full) before the run stops; it goes on until then"
    )


class ValidationConfig(Section):
    interval_steps: PositiveInt = 1000
    sequences: PositiveInt = Field(default=256, description="rows of the held-out documents; the same noise every time")


class LoggingConfig(Section):
    interval_steps: PositiveInt = 10


class Config(Section):
    run_dir: Path = Field(description="everything that the run writes: config, logs, checkpoints, TensorBoard")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    resume: Literal["auto", "never"] = Field(
        default="auto", description="auto: go on from the newest checkpoint in run_dir; never: refuse a used run_dir"
    )
    init_from: Path | None = Field(
        default=None, description="initial weights: a checkpoint or a Hugging Face folder; none: LLaDA's initialisation"
    )
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def train_samples(self) -> int:
        """Sequences of the whole run: the learning-rate phases' last end, rounded up to whole steps."""
        per_step = self.data.sequence_length * self.training.global_batch_size
        steps = -(-self.optimizer.learning_rate[-1].until_tokens // per_step)
        return steps * self.training.global_batch_size


def cross_section_problems(config: Config) -> list[tuple[str, str]]:
    """Faults that only two sections together show: (key, message)."""
    model, parallel, training = config.model, config.parallel, config.training
    tp, pp, cp = parallel.tensor_parallel, parallel.pipeline_parallel, parallel.context_parallel
    length, found = config.data.sequence_length, []

    def check(ok: bool, key: str, message: str) -> None:
        if not ok:
            found.append((key, message))

    cut = ("num_heads", "num_kv_heads", "ffn_hidden_size", "padded_vocab_size")
    sizes = {name: getattr(model, name) for name in cut}
    uneven = [f"model.{name} {size}" for name, size in sizes.items() if size % tp]
    check(
        not uneven,
        "parallel.tensor_parallel",
        f"{', '.join(uneven)} {'is' if len(uneven) == 1 else 'are'} not divisible by {tp}; "
        f"it can be {_divisors(math.gcd(*sizes.values()))}",
    )
    check(
        parallel.virtual_pipeline_parallel == 1 or pp > 1,
        "parallel.virtual_pipeline_parallel",
        "interleaves the chunks of several pipeline ranks, but pipeline_parallel is 1; raise it or set this to 1",
    )
    check(
        parallel.stages <= model.num_layers,
        "parallel.pipeline_parallel",
        f"{pp} × virtual_pipeline_parallel {parallel.virtual_pipeline_parallel} = {parallel.stages} stages, but the "
        f"model has {model.num_layers} layers; at most that many stages can be",
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
    split_evenly = length % cp == 0
    check(
        split_evenly,
        "parallel.context_parallel",
        f"data.sequence_length {length} is not divisible by {cp}; it can be {_divisors(length)}",
    )
    check(
        not parallel.sequence_parallel or not split_evenly or length // cp % tp == 0,
        "parallel.sequence_parallel",
        f"data.sequence_length {length}{f' ÷ context_parallel {cp}' if cp > 1 else ''} is not divisible by "
        f"tensor_parallel {tp}; make the length a multiple of {cp * tp}, or set this to false",
    )
    check(
        length <= model.max_sequence_length,
        "data.sequence_length",
        f"{length} is more than model.max_sequence_length {model.max_sequence_length}; lower it, or raise that",
    )
    check(
        training.global_batch_size % training.micro_batch_size == 0,
        "training.global_batch_size",
        f"{training.global_batch_size} is not divisible by training.micro_batch_size {training.micro_batch_size}; "
        f"it can be {-(-training.global_batch_size // training.micro_batch_size) * training.micro_batch_size}",
    )
    return found


def check_world_size(config: Config, world_size: int) -> list[tuple[str, str]]:
    """Faults of the layout on `world_size` processes, with the sum done: (key, message)."""
    parallel, training = config.parallel, config.training
    together = parallel.processes_per_row
    sizes = ("tensor_parallel", "pipeline_parallel", "context_parallel")
    product = " × ".join(f"{name} {getattr(parallel, name)}" for name in sizes if getattr(parallel, name) > 1)
    if world_size % together:
        fitting = world_size // together * together or together
        return [
            (
                "parallel",
                f"{product} takes {together} processes for each row, but {world_size} "
                f"{'was' if world_size == 1 else 'were'} started; start a multiple of {together} "
                f"(for example --processes {fitting})",
            )
        ]
    data_parallel = world_size // together
    rows = training.micro_batch_size * data_parallel * parallel.micro_batch_multiple
    if training.global_batch_size % rows:
        fitting = -(-training.global_batch_size // rows) * rows
        share, rest = divmod(training.global_batch_size, rows // training.micro_batch_size)
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
                "training.global_batch_size",
                f"{training.global_batch_size} is not a multiple of micro_batch_size {training.micro_batch_size} × "
                f"data-parallel {data_parallel} ({world_size} processes ÷ {together}){interleaved} = {rows}; "
                f"{smaller}the next larger one is {fitting}",
            )
        ]
    return []


def _divisors(number: int) -> str:
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)

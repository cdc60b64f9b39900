"""The config tree: every setting of a run, its type, its default, and the rules that tie settings together.

Sizes are in tokens, sequences or steps as their names say. Times on the learning-rate and mixture clocks are *nominal*
tokens: consumed samples × sequence_length (a cut row counts as a full one).
"""

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


class ParallelConfig(Section):
    tensor_parallel: PositiveInt = 1
    pipeline_parallel: PositiveInt = 1
    sequence_parallel: bool = False
    zero_stage: Literal[1, 2] = Field(
        default=1, description="DeepSpeed ZeRO over data parallelism: 1 splits the optimizer state, 2 gradients too"
    )

    @property
    def model_parallel(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor_parallel * self.pipeline_parallel


class CheckpointConfig(Section):
    interval_steps: PositiveInt = 1000
    keep: PositiveInt = Field(default=3, description="newest checkpoints kept; older ones are removed")


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
    model, parallel, found = config.model, config.parallel, []
    tp, pp = parallel.tensor_parallel, parallel.pipeline_parallel

    def check(ok: bool, key: str, message: str) -> None:
        if not ok:
            found.append((key, message))

    for name in ("num_heads", "num_kv_heads", "ffn_hidden_size", "padded_vocab_size"):
        size = getattr(model, name)
        check(size % tp == 0, "parallel.tensor_parallel", f"model.{name} {size} is not divisible by {tp}")
    check(
        model.num_layers % pp == 0,
        "parallel.pipeline_parallel",
        f"model.num_layers {model.num_layers} is not divisible by {pp}",
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
    length = config.data.sequence_length
    check(
        not parallel.sequence_parallel or length % tp == 0,
        "parallel.sequence_parallel",
        f"data.sequence_length {length} is not divisible by tensor_parallel {tp}",
    )
    check(
        length <= model.max_sequence_length,
        "data.sequence_length",
        f"{length} is more than model.max_sequence_length {model.max_sequence_length}",
    )
    check(
        config.training.global_batch_size % config.training.micro_batch_size == 0,
        "training.global_batch_size",
        f"{config.training.global_batch_size} is not divisible by training.micro_batch_size "
        f"{config.training.micro_batch_size}",
    )
    return found


def check_world_size(config: Config, world_size: int) -> list[tuple[str, str]]:
    """Faults of the layout on `world_size` processes, with the sum done: (key, message)."""
    parallel, training = config.parallel, config.training
    tp, pp, per_copy = parallel.tensor_parallel, parallel.pipeline_parallel, parallel.model_parallel
    if world_size % per_copy:
        fitting = world_size // per_copy * per_copy or per_copy
        return [
            (
                "parallel",
                f"tensor_parallel {tp} × pipeline_parallel {pp} = {per_copy} processes per model copy, "
                f"but {world_size} were started; start a multiple of {per_copy} (for example {fitting})",
            )
        ]
    data_parallel = world_size // per_copy
    rows = training.micro_batch_size * data_parallel
    if training.global_batch_size % rows:
        fitting = -(-training.global_batch_size // rows) * rows
        return [
            (
                "training.global_batch_size",
                f"{training.global_batch_size} is not a multiple of micro_batch_size {training.micro_batch_size} × "
                f"data-parallel {data_parallel} ({world_size} processes ÷ {per_copy}) = {rows}; "
                f"the next larger one is {fitting}",
            )
        ]
    return []

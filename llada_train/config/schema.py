"""The config tree: every setting of a run, its type and its default.

Sizes are in tokens, sequences or steps as their names say. Times, of learning-rate phases and of the schedule, are in
*nominal* tokens: each consumed sample counts sequence_length, whether it was cut or not.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

Probability = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, le=1e18)]
# Paths are told apart as they are spelled, but for ./ and //, which a URL needs.
CorpusPath = Annotated[str, Field(min_length=1), AfterValidator(lambda p: p if "://" in p else str(Path(p)))]

Precision = Literal["bf16", "fp32"]
Recompute = Literal["none", "selective", "full"]


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


class ColumnsConfig(Section):
    """Which keys of a data set's records hold what: a prompt and its response, or a list of messages."""

    prompt: str | None = None
    input: str | None = Field(default=None, description="text that goes with the prompt, after an empty line")
    response: str | None = None
    system: str | None = Field(default=None, description="the system's message, before all others")
    messages: str | None = Field(default=None, description="list of {role, content} or of {from, value}")

    @property
    def keys(self) -> set[str]:
        return {key for key in (self.prompt, self.input, self.response, self.system, self.messages) if key is not None}

    @model_validator(mode="after")
    def _one_shape(self) -> "ColumnsConfig":
        pair = (self.prompt, self.response)
        if (self.messages is None) == (pair == (None, None)) or (self.messages is None and None in pair):
            raise problem("messages", "give prompt and response, or messages")
        return self


class CorpusConfig(Section):
    """One tokenized corpus, `path`.bin and `path`.idx, in Megatron's format; for SFT one data set."""

    path: CorpusPath = Field(
        description="prefix of the files, or a pattern (*, ?, [...]) of prefixes whose files are one corpus, in the "
        "order of their names; a path, or a URL that fsspec reads (s3://bucket/prefix). SFT: a file of dialogues "
        "(JSON lines, a JSON list, parquet, arrow), or a folder of such"
    )
    columns: ColumnsConfig | None = Field(
        default=None, description="SFT: which keys of its records hold what; none: the usual shapes are recognised"
    )
    weight: Weight = Field(
        default=1.0, description="share of the tokens, for SFT of the examples; 0: none, until the schedule says"
    )
    tokens: NonNegativeInt | None = Field(
        default=None, description="in place of weight, for all corpora: how many of the run's nominal tokens are its"
    )
    validation_documents: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="the last so many documents (SFT: examples) are held out: never trained on, read by validation",
    )

    @property
    def share(self) -> float:
        """What its share of the tokens is in proportion to, before temperature."""
        return self.weight if self.tokens is None else float(self.tokens)


class DataConfig(Section):
    tokenizer: Path = Field(description="folder with tokenizer.json, as `llada-data train-tokenizer` writes it")
    sequence_length: PositiveInt = Field(description="tokens of a row; for SFT the most that a row has")
    block_length: PositiveInt | None = Field(
        default=None,
        description="tokens that stay together when a corpus is shuffled: a multiple of every sequence length, fixed "
        "for the whole run; none: the longest sequence length, the schedule's included",
    )
    rows: Literal["packed", "document_attention"] = Field(
        default="packed",
        description="packed: a row attends across the documents in it, as LLaDA's do; document_attention: tokens see "
        "only their own document, and positions begin again with each",
    )
    corpora: Annotated[list[CorpusConfig], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0.1)] | None = Field(
        default=None,
        description="shares are weight × (tokens of the corpus, or its examples)^(1/temperature); 1: in proportion to "
        "size; "
        "none: weights alone",
    )
    prefetch: PositiveInt = Field(default=4, description="steps whose batches are made ahead of the training thread")

    @model_validator(mode="after")
    def _distinct(self) -> "DataConfig":
        paths = [corpus.path for corpus in self.corpora]
        repeated = next((path for path in paths if paths.count(path) > 1), None)
        if repeated is not None:
            raise problem("corpora", f"{repeated} is listed more than once; give it once, with the sum of the weights")
        if not any(corpus.share for corpus in self.corpora):
            raise problem("corpora", "every weight is 0; at least one corpus has to be trained on")
        return self

    @model_validator(mode="after")
    def _one_kind_of_mixture(self) -> "DataConfig":
        counted = [corpus.tokens is not None for corpus in self.corpora]
        if any(counted) and not all(counted):
            raise problem(
                f"corpora.{counted.index(False)}.tokens", "missing; give tokens for every corpus, or for none"
            )
        if any(counted) and self.temperature is not None:
            raise problem("temperature", "the corpora's shares are given as tokens already; leave one of them out")
        for i, corpus in enumerate(self.corpora):
            if corpus.tokens is not None and "weight" in corpus.model_fields_set and corpus.weight != 1.0:
                raise problem(f"corpora.{i}.weight", "its share is given as tokens already; leave one of them out")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """What each corpus's share is in proportion to, before temperature, by its path."""
        return {corpus.path: corpus.share for corpus in self.corpora}


class SftConfig(Section):
    """Fine-tuning on dialogues (paper §2.3, Alg. 2): data.corpora are data sets, and only responses are noised."""

    chat_template: Annotated[str, Field(min_length=1)] = Field(
        default="llada",
        description="llada: that of the released models; plain: texts alone; or a file with Jinja, or Jinja itself",
    )
    dialogues: Literal["one_response", "all_responses"] = Field(
        default="one_response",
        description="of a dialogue of several turns, one_response: one that is drawn anew each time, after all that "
        "comes before it, as the paper does; all_responses: all at once",
    )
    eos_pad_group: PositiveInt = Field(
        default=2,
        description="so many consecutive samples of a global batch are padded to the longest of them with EOS that is "
        "learnt; the paper: its micro-batch of 2. 1: every response ends with one EOS",
    )
    rows: Literal["padded", "packed"] = Field(
        default="padded",
        description="padded: an example is a row, as in the paper; packed: examples of a global batch that do not see "
        "each other share rows of data.sequence_length, which trains the same in fewer of them",
    )
    too_long: Literal["truncate_response", "truncate_prompt", "drop"] = Field(
        default="truncate_response",
        description="what does not fit into data.sequence_length: responses lose their end, prompts their beginning, "
        "or the example is left out",
    )
    unusable: Literal["error", "drop"] = Field(
        default="error",
        description="records without a response, of unknown roles, broken: the first one ends the run before it "
        "begins, or they are counted and left out",
    )
    cache: Path | None = Field(
        default=None, description="folder for tokenized data sets, which runs may share; none: run_dir/examples"
    )


class ObjectiveConfig(Section):
    """LLaDA's objective (paper Alg. 1 and 2)."""

    epsilon: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=1e-3, description="mask probability p = (1 − ε)·u + ε, u ~ U[0,1) per sequence"
    )
    t_sampling: Literal["uniform", "stratified"] = Field(
        default="uniform", description="stratified: u is spread evenly over the global batch (lower variance, unbiased)"
    )
    random_length_probability: Probability = Field(
        default=0.01,
        description="share of sequences that are cut to n ~ U{1..sequence_length}; pre-training alone",
    )
    loss_normalization: Literal["sequence", "token"] = Field(
        default="sequence",
        description="sequence: 1/(p·L_b·N), every sequence counts alike; token: ÷ all real tokens. For SFT, L_b and "
        "tokens are those of responses with their EOS padding",
    )


class LearningRatePhase(Section):
    """Linear from `start` to `end`; `start` left out means the end of the phase before (0 at the beginning).

    It ends at nominal tokens since the start of the run. An SFT run may say so in steps or epochs, which become tokens
    once its data sets have been counted.
    """

    until_tokens: PositiveInt | None = Field(default=None, description="nominal tokens since the start of the run")
    until_steps: PositiveInt | None = Field(default=None, description="steps since the start of the run; SFT alone")
    until_epochs: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="passes over the training examples of all data sets together; SFT alone"
    )
    end: NonNegativeFloat
    start: NonNegativeFloat | None = None

    @property
    def until(self) -> int:
        """Nominal tokens; of a run whose data are open."""
        assert self.until_tokens is not None
        return self.until_tokens

    @property
    def in_tokens(self) -> bool:
        return self.until_tokens is not None

    @model_validator(mode="after")
    def _one_end(self) -> "LearningRatePhase":
        if [self.until_tokens, self.until_steps, self.until_epochs].count(None) != 2:
            raise problem("until_tokens", "give one of until_tokens, until_steps and until_epochs")
        return self


class OptimizerConfig(Section):
    learning_rate: Annotated[list[LearningRatePhase], Field(min_length=1)] = Field(
        description="phases in order; the end of the last one is the length of the run"
    )
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: NonNegativeFloat = Field(default=0.1, description="on matrices; never on norms")
    gradient_clipping: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _in_order(self) -> "OptimizerConfig":
        ends = [phase.until_tokens for phase in self.learning_rate]
        for i in range(1, len(ends)):
            now, before = ends[i], ends[i - 1]
            if now is not None and before is not None and now <= before:
                raise problem(
                    f"learning_rate.{i}.until_tokens",
                    f"{now:,} does not come after the phase before, which ends at {before:,}",
                )
        return self


class TrainingConfig(Section):
    global_batch_size: PositiveInt = Field(description="sequences per optimizer step, over all data-parallel ranks")
    micro_batch_size: PositiveInt = Field(
        description="sequences, or packed rows of them, in one forward pass of one data-parallel rank"
    )
    precision: Precision = Field(
        default="bf16", description="of weights and activations; master weights, gradients and moments are fp32"
    )
    recompute: Recompute = Field(
        default="none",
        description="activations computed again in backward instead of kept; selective: what lies between matrix "
        "multiplications (norms, SwiGLU); full: whole layers",
    )
    kernels: Literal["auto", "torch", "compile", "liger"] = Field(
        default="auto",
        description="what fuses RMSNorm, rotary embeddings and SwiGLU; compile: torch.compile, which needs a compiler; "
        "liger: Liger's Triton kernels; auto: compile on GPUs that have what it needs, else torch",
    )
    deterministic: bool = Field(
        default=False,
        description="on GPUs: only kernels that give the same bits every time, slower; CPUs always give the same bits",
    )
    hang_timeout_seconds: Annotated[float, Field(gt=0, le=604_800)] = Field(
        default=1800,
        description="a rank that makes no progress for so long prints its stacks and the run ends; has to cover "
        "start-up, one step, one validation with its answers, one writing of samples and one save, each by itself",
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
    overlap_comm: bool | None = Field(
        default=None, description="reduce gradients while backward goes on; none: with ZeRO 2 and 3, ZeRO 1 cannot"
    )
    reduce_scatter: bool | None = Field(
        default=None,
        description="each rank receives the gradients of its own part alone, half the bytes of an all-reduce; "
        "none: with ZeRO 3, which does nothing else. ZeRO 2 can without overlap_comm, by a message for each rank, so "
        "for few ranks on a slow network",
    )
    reduce_bucket_size: PositiveInt = Field(
        default=50_000_000, description="with ZeRO 2 and 3: gradient elements reduced at once"
    )
    prefetch_bucket_size: NonNegativeInt = Field(
        default=50_000_000, description="with ZeRO 3: weight elements gathered ahead of their use; 0: none"
    )
    offload_optimizer: bool = Field(
        default=False,
        description="with ZeRO 2 and 3: master weights and moments lie in pinned host memory; the CPUs update them",
    )

    @property
    def overlaps_reduction(self) -> bool:
        return self.zero_stage > 1 if self.overlap_comm is None else self.overlap_comm

    @property
    def scatters_reduction(self) -> bool:
        return self.zero_stage == 3 if self.reduce_scatter is None else self.reduce_scatter

    @property
    def processes_per_row(self) -> int:
        """Processes that work on one row together; data parallelism multiplies them."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def row_multiple(self) -> int:
        """A row's tokens are a multiple of this: the processes that share its columns take equally many."""
        return self.context_parallel * (self.tensor_parallel if self.sequence_parallel else 1)

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


class SamplesConfig(Section):
    """Texts that the model writes on the way, for people to read."""

    prompts: Annotated[list[str], Field(min_length=1)] = Field(
        description="texts to go on from, which may be empty; SFT: what a user says"
    )
    interval_steps: PositiveInt = 1000
    gen_length: PositiveInt = Field(default=64, description="tokens after a prompt")
    steps: PositiveInt | None = Field(default=None, description="forward passes; none: one for each token")
    temperature: NonNegativeFloat = Field(default=0.0, description="0 takes the likeliest token")


class ValidationConfig(Section):
    interval_steps: PositiveInt = 1000
    sequences: PositiveInt = Field(default=256, description="rows of the held-out documents; the same noise every time")
    answers: NonNegativeInt = Field(
        default=0, description="SFT: so many of the held-out prompts are answered, too, and exact answers counted"
    )
    samples: SamplesConfig | None = Field(
        default=None, description="texts of the model's own, in TensorBoard and metrics.jsonl; none: it writes none"
    )


class LoggingConfig(Section):
    interval_steps: PositiveInt = 10


class Change(Section):
    """What changes on the way: from the first step at or after `from_tokens` that begins a block."""

    from_tokens: PositiveInt = Field(description="nominal tokens since the start of the run")
    global_batch_size: PositiveInt | None = None
    sequence_length: PositiveInt | None = None
    weights: dict[CorpusPath, Weight] = Field(
        default={}, description="of corpora by their path; those that are not named keep theirs"
    )

    @model_validator(mode="after")
    def _changes_something(self) -> "Change":
        if self.global_batch_size is None and self.sequence_length is None and not self.weights:
            raise problem("from_tokens", "nothing changes; give global_batch_size, sequence_length or weights")
        return self


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
    sft: SftConfig | None = Field(default=None, description="fine-tuning on dialogues; none: pre-training")
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig
    training: TrainingConfig
    schedule: list[Change] = Field(
        default=[], description="changes on the way, in order of from_tokens; a batch ramp is several"
    )
    parallel: ParallelConfig = ParallelConfig()
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def command(self) -> str:
        """Of `llada-train`: what trains a run of this kind."""
        return "pretrain" if self.sft is None else "sft"

    @property
    def lengths(self) -> dict[str, int]:
        """Every sequence length of the run, by its key."""
        return {"data.sequence_length": self.data.sequence_length} | self._scheduled("sequence_length")

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Every global batch size of the run, by its key."""
        return {"training.global_batch_size": self.training.global_batch_size} | self._scheduled("global_batch_size")

    @property
    def block_length(self) -> int:
        """`data.block_length`, or what it is if it is left out."""
        return self.data.block_length or max(self.lengths.values())

    def _scheduled(self, setting: str) -> dict[str, int]:
        values = {f"schedule.{i}.{setting}": getattr(change, setting) for i, change in enumerate(self.schedule)}
        return {key: value for key, value in values.items() if value is not None}

"""A site's own facts: its SLURM, its nodes, its environment. Nothing here changes what a run computes."""

import getpass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from llada_train.config.schema import Section, problem

# They become words of #SBATCH lines.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:@+/&|()\[\]*=-]+$")]
Memory = Annotated[str, Field(pattern=r"^\d+[KMGT]?$")]
TimeLimit = Annotated[str, Field(pattern=r"^(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2})$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
OneLine = Annotated[str, Field(pattern=r"^[^\n\r\x00]*$")]
EARLY_SECONDS = 60  # "the signal may be sent up to 60 seconds earlier than specified": sbatch's manual on --signal


class SlurmConfig(Section):
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    time_limit: TimeLimit = Field(default="1-00:00:00", description="of one job; as sbatch --time takes it")
    checkpoint_seconds: PositiveInt = Field(
        default=300, description="before the time limit the run is told to save and end; has to cover a step and a save"
    )
    max_attempts: PositiveInt = Field(
        default=3, description="starts in a row without a new checkpoint, after which the job is not queued again"
    )

    @model_validator(mode="after")
    def _has_time_to_train(self) -> "SlurmConfig":
        seconds = _seconds(self.time_limit)
        if 0 < seconds <= self.checkpoint_seconds + EARLY_SECONDS:
            raise problem(
                "checkpoint_seconds",
                f"{self.checkpoint_seconds} s before a time limit of {seconds} s, and SLURM may be {EARLY_SECONDS} s "
                "early: no time is left to train; give a longer time_limit",
            )
        return self


def _seconds(time_limit: str) -> int:
    """D-H[:M[:S]], H:M:S, M:S or M; 0 is no limit."""
    days, dash, rest = time_limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class NodeConfig(Section):
    gpus: NonNegativeInt = 8
    gpu_type: Word | None = Field(default=None, description="as SLURM calls it, where a partition has several")
    processes: PositiveInt | None = Field(default=None, description="on each node; none: one for each GPU")
    cpus_per_process: PositiveInt | None = Field(default=None, description="none: what SLURM gives")
    memory: Memory = Field(default="0", description="of each node, as sbatch --mem takes it; 0: all")
    exclusive: bool = True

    @model_validator(mode="after")
    def _has_processes(self) -> "NodeConfig":
        if not self.gpus and self.processes is None:
            raise problem("processes", "is required where nodes have no GPUs")
        if self.gpus and self.processes not in (None, self.gpus):
            raise problem("processes", f"{self.processes}, but a node has {self.gpus} GPUs; leave it out: one for each")
        return self

    @property
    def tasks(self) -> int:
        """Processes on each node."""
        return self.processes or self.gpus


class EnvironmentConfig(Section):
    """Where `python -m llada_train.cli` runs: the same on every node."""

    kind: Literal["venv", "apptainer", "pyxis"] = Field(
        default="venv",
        description="a virtual environment; an apptainer image; an image that srun starts by enroot/pyxis",
    )
    path: Path | None = Field(
        default=None, description="of the environment or image; none: the virtual environment that submits"
    )
    python: OneLine = Field(default="python", description="in an image: its Python, with llada_train installed")
    mounts: list[Path] = Field(
        default=[], description="folders that an image sees under their own names, beyond those that a run names"
    )
    modules: list[Word] = Field(default=[], description="`module load` each of these first")
    stage: bool = Field(
        default=False,
        description="copy it to each node's local_scratch first, once per version: an image as it is, a virtual "
        "environment as the archive PATH.tar (made by `tar -C PATH -cf PATH.tar .`)",
    )

    @model_validator(mode="after")
    def _has_path(self) -> "EnvironmentConfig":
        if self.path is None and (self.kind != "venv" or self.stage):
            raise problem("path", f"is required for kind {self.kind!r}{' with stage' if self.stage else ''}")
        return self


class HealthConfig(Section):
    """Every node is checked before each start; one that is found at fault is left out."""

    timeout_seconds: PositiveInt = Field(default=180, description="a node that has not told by then is at fault")
    links: bool = Field(default=True, description="measure the network between the nodes, too")
    share_of_median: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.85, description="a GPU or link that does less than this share of the median is at fault"
    )
    exclude_hours: PositiveFloat = Field(default=24.0, description="how long a node that was left out is not asked for")
    min_matmul_tflops: PositiveFloat | None = Field(default=None, description="bf16, of each GPU")
    min_memory_gb_per_second: PositiveFloat | None = Field(default=None, description="of each GPU")
    min_disk_mb_per_second: PositiveFloat | None = Field(default=None, description="writing to local_scratch")
    min_free_disk_gb: PositiveFloat = Field(default=1.0, description="on local_scratch")
    max_clock_skew_seconds: PositiveFloat = Field(default=5.0, description="against the shared file system")


class ClusterConfig(Section):
    slurm: SlurmConfig = SlurmConfig()
    node: NodeConfig = NodeConfig()
    spares: NonNegativeInt = Field(default=0, description="nodes to ask for beyond those that train")
    environment: EnvironmentConfig = EnvironmentConfig()
    variables: dict[VariableName, OneLine] = Field(
        default={}, description="set for every process: the site's network (NCCL_IB_HCA, NCCL_SOCKET_IFNAME, …)"
    )
    local_scratch: Path = Field(default=Path("/tmp"), description="a folder on each node's own disk")
    health: HealthConfig = HealthConfig()

    @property
    def scratch(self) -> Path:
        """This user's own folder on a node's disk: compilers' caches, staged environments. What is in it is run."""
        return self.local_scratch / f"llada-train-{getpass.getuser()}"

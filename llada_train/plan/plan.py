"""A run on so many GPUs, by arithmetic alone: does it fit, how long does it take, what does it send."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

from llada_train.config.schema import Config
from llada_train.data.timeline import Timeline
from llada_train.model.sizes import non_embedding_parameter_count, parameter_count
from llada_train.plan.chips import Chip
from llada_train.plan.flops import flops_per_token, hardware_flops_per_token, utilization
from llada_train.plan.layout import Layout
from llada_train.plan.memory import MASTER_AND_MOMENTS, RESERVE, Memory, memory
from llada_train.plan.time import StepTime, step_time
from llada_train.plan.traffic import Collective, group_size, traffic

# A process's imports, process groups and first kernels. An assumption.
START_SECONDS = 60.0


@dataclass(frozen=True)
class Machine:
    chip_name: str
    chip: Chip
    nodes: int
    gpus_per_node: int

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class PhasePlan:
    """A stretch of the run with one sequence length and batch size."""

    from_tokens: int
    steps: int
    layout: Layout
    chip: Chip

    @cached_property
    def step(self) -> StepTime:
        """Estimated."""
        return step_time(self.layout, self.chip)

    @property
    def model_flops(self) -> float:
        layout = self.layout
        return self.steps * layout.tokens_per_step * flops_per_token(layout.config.model, layout.sequence_length)

    @property
    def estimated_mfu(self) -> float:
        rate = self.model_flops / (self.steps * self.step.total)
        return utilization(rate, self.chip.peak_flops, self.layout.gpus)

    @property
    def hardware_flops(self) -> float:
        layout = self.layout
        per_token = hardware_flops_per_token(layout.config, layout.sequence_length).total
        return self.steps * layout.tokens_per_step * per_token


@dataclass(frozen=True)
class Plan:
    """Bytes, FLOPs, seconds. `mfu`: stated; None: the estimate's. `write_rate`: of all nodes together, bytes/s."""

    config: Config
    machine: Machine
    phases: list[PhasePlan]
    mfu: float | None
    write_rate: float

    @cached_property
    def memory(self) -> list[Memory]:
        """Of each pipeline rank, in the phase where the fullest one is fullest."""
        return max((memory(phase.layout) for phase in self.phases), key=lambda ranks: max(one.total for one in ranks))

    @property
    def fullest(self) -> int:
        """The pipeline rank that needs most memory."""
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].total)

    @property
    def spare(self) -> int:
        """Bytes that the fullest GPU has left; negative: it does not fit."""
        return self.machine.chip.memory_bytes - self.memory[self.fullest].total

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def tokens(self) -> int:
        return sum(phase.steps * phase.layout.tokens_per_step for phase in self.phases)

    @property
    def model_flops(self) -> float:
        return sum(phase.model_flops for phase in self.phases)

    @property
    def hardware_flops(self) -> float:
        return sum(phase.hardware_flops for phase in self.phases)

    @property
    def estimated_seconds(self) -> float:
        return sum(phase.steps * phase.step.total for phase in self.phases)

    @property
    def estimated_mfu(self) -> float:
        rate = self.model_flops / self.estimated_seconds
        return utilization(rate, self.machine.chip.peak_flops, self.machine.gpus)

    @property
    def hours(self) -> float:
        """Of training alone, at `mfu`."""
        if self.mfu is None:
            return self.estimated_seconds / 3600
        return self.model_flops / (self.mfu * self.machine.chip.peak_flops * self.machine.gpus) / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.machine.gpus

    @property
    def tokens_per_second_and_gpu(self) -> float:
        return self.tokens / (self.hours * 3600 * self.machine.gpus)

    @property
    def main(self) -> PhasePlan:
        """The phase that most tokens are trained in."""
        return max(self.phases, key=lambda phase: phase.steps * phase.layout.tokens_per_step)

    @property
    def checkpoint_bytes(self) -> int:
        """fp32 master and moments; the manifest is small (llada_train/checkpoint)."""
        return MASTER_AND_MOMENTS * parameter_count(self.config.model)

    @property
    def save_seconds(self) -> float:
        """Beside training, which waits only until its own part is copied."""
        return self.checkpoint_bytes / self.write_rate

    @property
    def start_seconds(self) -> float:
        """Of a start from a checkpoint, read as fast as it is written."""
        return START_SECONDS + self.save_seconds

    @property
    def collectives(self) -> list[Collective]:
        """Of the main phase's fullest rank, a step's."""
        return traffic(self.main.layout, self.fullest)


def make_plan(config: Config, machine: Machine, mfu: float | None = None, write_rate: float = 10e9) -> Plan:
    """`config` has been checked with this many processes (`load_config`)."""
    return plan_stretches(config, stretches(config), machine, mfu, write_rate)


class Stretch(NamedTuple):
    """A part of the run with one sequence length and batch size."""

    from_tokens: int
    steps: int
    sequence_length: int
    global_batch_size: int


def stretches(config: Config) -> list[Stretch]:
    """The run's schedule on its clock; of its mixture nothing is asked. They are the same in every layout."""
    timeline = Timeline(config)
    found: list[Stretch] = []
    ends = [*(phase.first_sample for phase in timeline.phases[1:]), timeline.end_samples]
    for phase, end in zip(timeline.phases, ends, strict=True):
        steps = max(0, min(end, timeline.end_samples) - phase.first_sample) // phase.global_batch_size
        if found and found[-1][2:] == (phase.sequence_length, phase.global_batch_size):
            found[-1] = found[-1]._replace(steps=found[-1].steps + steps)
        elif steps:
            found.append(Stretch(phase.first_token, steps, phase.sequence_length, phase.global_batch_size))
    return found


def plan_stretches(
    config: Config, parts: Sequence[Stretch], machine: Machine, mfu: float | None, write_rate: float
) -> Plan:
    phases = []
    for part in parts:
        layout = Layout(config, machine.gpus, part.sequence_length, part.global_batch_size, machine.gpus_per_node)
        phases.append(PhasePlan(part.from_tokens, part.steps, layout, machine.chip))
    return Plan(config, machine, phases, mfu, write_rate)


def as_json(plan: Plan) -> dict[str, Any]:
    """All of it, as plain numbers: bytes, seconds, FLOPs."""
    layout, model = plan.main.layout, plan.config.model
    return {
        "predicted": "by arithmetic; nothing here was measured",
        "gpu": {"name": plan.machine.chip_name, **asdict(plan.machine.chip)},
        "nodes": plan.machine.nodes,
        "gpus": plan.machine.gpus,
        "parameters": parameter_count(model),
        "parameters_without_embedding_and_head": non_embedding_parameter_count(model),
        "layout": {
            **plan.config.parallel.model_dump(),
            "data_parallel": layout.data_parallel,
            "micro_batch_size": plan.config.training.micro_batch_size,
            "micro_batches": layout.micro_batches,
            "recompute": plan.config.training.recompute,
        },
        "memory": [{**asdict(one), "total": one.total} for one in plan.memory],
        "reserve": RESERVE,
        "fullest_pipeline_rank": plan.fullest,
        "fits": plan.fits,
        "spare": plan.spare,
        "phases": [
            {
                "from_tokens": phase.from_tokens,
                "steps": phase.steps,
                "sequence_length": phase.layout.sequence_length,
                "global_batch_size": phase.layout.global_batch_size,
                "estimated_step_seconds": {**asdict(phase.step), "total": phase.step.total},
                "estimated_mfu": phase.estimated_mfu,
                "pipeline_bubble": phase.layout.bubble,
            }
            for phase in plan.phases
        ],
        "steps": plan.steps,
        "tokens": plan.tokens,
        "learning_rate_ends": [phase.until_tokens for phase in plan.config.optimizer.learning_rate],
        "model_flops": plan.model_flops,
        "hardware_flops": plan.hardware_flops,
        "mfu": plan.mfu,
        "estimated_mfu": plan.estimated_mfu,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "tokens_per_second_and_gpu": plan.tokens_per_second_and_gpu,
        "sent_per_step": [{**asdict(one), "sent": one.sent(group_size(layout, one.group))} for one in plan.collectives],
        "checkpoint_bytes": plan.checkpoint_bytes,
        "save_seconds": plan.save_seconds,
        "start_seconds": plan.start_seconds,
    }

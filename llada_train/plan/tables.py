"""A plan in words and rounded numbers."""

from llada_train.model.sizes import parameter_count
from llada_train.plan.memory import RESERVE
from llada_train.plan.plan import Plan
from llada_train.plan.traffic import group_size, seconds

GB = 1e9
PARALLELISM = {"tensor": "tensor", "context": "context", "pipeline": "pipeline", "copies": "data (ZeRO)"}
SEARCH_COLUMNS = (
    *("TP", "PP", "VPP", "CP", "SP", "ZeRO", "micro-batches", "recompute"),
    *("GB", "s/step", "MFU", "bubble", "exposed s", "GPU-hours"),
)


def layout_name(plan: Plan) -> str:
    """LLaDA's own: 8.02B parameters on 32 × 8 h800: TP 1 · PP 1 · DP 256, ZeRO 2, …"""
    parallel, layout = plan.config.parallel, plan.main.layout
    machine = plan.machine
    sizes = [f"TP {parallel.tensor_parallel}{' with SP' if parallel.sequence_parallel else ''}"]
    chunks = parallel.virtual_pipeline_parallel
    sizes += [f"PP {parallel.pipeline_parallel}{f' in {chunks} chunks' if chunks > 1 else ''}"]
    sizes += [f"CP {parallel.context_parallel}"] if parallel.context_parallel > 1 else []
    sizes += [f"DP {layout.data_parallel}", f"ZeRO {parallel.zero_stage}"]
    rows = f"{layout.micro_batches} micro-batches of {plan.config.training.micro_batch_size} rows"
    return (
        f"{parameter_count(plan.config.model):,} parameters on {machine.nodes} × {machine.gpus_per_node} "
        f"{machine.chip_name}: {', '.join(sizes)}; {rows}, recompute {plan.config.training.recompute}"
    )


def memory_rows(plan: Plan) -> list[tuple[str, str, str]]:
    fullest, layout = plan.memory[plan.fullest], plan.main.layout
    stage = plan.config.parallel.zero_stage
    parts = f"1/{layout.copies}" if layout.copies > 1 else "all"
    in_flight = len(layout.chunks_in_flight(plan.fullest))
    passes = "1 forward pass" if in_flight == 1 else f"{in_flight} forward passes"
    recompute = plan.config.training.recompute
    rows = [
        ("weights", fullest.weights, parts if stage == 3 else "whole"),
        ("gradients", fullest.gradients, f"fp32, {parts if stage > 1 else 'whole'}"),
        ("optimizer", fullest.optimizer, f"fp32 master and two moments, {parts}"),
        ("activations", fullest.activations, f"of {passes}, recompute {recompute}"),
        ("logits", fullest.logits, "every token masked"),
        (
            "workspace",
            fullest.workspace,
            f"buckets, a gradient on its way; {RESERVE / GB:.1f} for CUDA and NCCL, assumed",
        ),
        *([("on the host", fullest.host, "not in the sum: optimizer and its gradients")] if fullest.host else []),
        ("sum", fullest.total, f"of {plan.machine.chip.memory_bytes / GB:.1f}: {_verdict(plan)}"),
    ]
    return [(name, f"{size / GB:.2f}", remark) for name, size, remark in rows]


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return f"fits, {plan.spare / GB:.1f} GB to spare"
    return f"DOES NOT FIT, {-plan.spare / GB:.1f} GB too much; most are {_largest(plan)}"


def _largest(plan: Plan) -> str:
    one = plan.memory[plan.fullest]
    causes = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")
    return max(causes, key=lambda cause: getattr(one, cause))


def run_rows(plan: Plan) -> list[tuple[str, str]]:
    step, main = plan.main.step, plan.main
    source = "stated" if plan.mfu is not None else "estimated"
    mfu = plan.mfu if plan.mfu is not None else plan.estimated_mfu
    return [
        ("run", f"{plan.tokens:,} tokens in {plan.steps:,} steps; {_phases(plan)}"),
        (
            "learning rate",
            ", ".join(_rate(phase.until, phase.end) for phase in plan.config.optimizer.learning_rate),
        ),
        (
            "FLOPs",
            f"{plan.model_flops:.3e} by the model (6·N + 12·L·S·d), {plan.hardware_flops:.3e} by the hardware "
            "(head on masked tokens; recomputation)",
        ),
        (
            "time",
            f"{plan.hours:,.1f} h, {plan.gpu_hours:,.0f} GPU-hours, {plan.tokens_per_second_and_gpu:,.0f} tokens/s and "
            f"GPU at {mfu:.1%} MFU ({source})",
        ),
        (
            "step, estimated",
            f"{step.total:.2f} s: matrix products {step.products:.2f}, attention {step.attention:.2f}, memory-bound "
            f"{step.other:.2f}, bubble {step.bubble:.2f} ({main.layout.bubble:.1%}), exposed communication "
            f"{sum(step.exposed.values()):.2f} (hidden {step.hidden:.2f}), update {step.update:.2f}",
        ),
        (
            "checkpoint",
            f"{plan.checkpoint_bytes / GB:.1f} GB, {plan.save_seconds:.0f} s at {plan.write_rate / GB:g} GB/s, beside "
            "training",
        ),
        ("start", f"{plan.start_seconds:.0f} s from a checkpoint, read at that rate"),
    ]


def _phases(plan: Plan) -> str:
    return ", ".join(
        f"{phase.layout.global_batch_size:,} × {phase.layout.sequence_length:,}"
        + (f" from {phase.from_tokens:,}" if phase.from_tokens else "")
        for phase in plan.phases
    )


def _rate(until: int, end: float) -> str:
    return f"{end:g} at {until:.4g}"


def traffic_rows(plan: Plan) -> list[tuple[str, ...]]:
    layout, chip = plan.main.layout, plan.machine.chip
    behind = {"products": "other products of backward", "nothing": "nothing: adds to the step"}
    return [
        (
            PARALLELISM[one.group],
            one.purpose,
            one.operation,
            f"{one.sent(group_size(layout, one.group)) / GB:.3f}",
            f"{seconds(one, layout, chip):.3f}",
            behind.get(one.behind, one.behind),
        )
        for one in plan.collectives
    ]


def changes(one: Plan, other: Plan) -> str:
    """Overrides that make the one the other."""
    keys = {"parallel": ("tensor_parallel", "pipeline_parallel", "virtual_pipeline_parallel", "context_parallel",
                         "sequence_parallel", "zero_stage"), "training": ("micro_batch_size", "recompute")}  # fmt: skip
    found = []
    for section, names in keys.items():
        a, b = getattr(one.config, section), getattr(other.config, section)
        for name in names:
            if getattr(a, name) != getattr(b, name):
                found.append(f"{section}.{name}={str(getattr(b, name)).lower()}")
    return " ".join(found)


def search_row(plan: Plan) -> tuple[str, ...]:
    parallel, training, step = plan.config.parallel, plan.config.training, plan.main.step
    return (
        str(parallel.tensor_parallel),
        str(parallel.pipeline_parallel),
        str(parallel.virtual_pipeline_parallel),
        str(parallel.context_parallel),
        "yes" if parallel.sequence_parallel else "",
        str(parallel.zero_stage),
        f"{plan.main.layout.micro_batches} × {training.micro_batch_size}",
        training.recompute,
        f"{plan.memory[plan.fullest].total / GB:.1f}",
        f"{step.total:.2f}",
        f"{plan.estimated_mfu:.1%}",
        f"{plan.main.layout.bubble:.1%}",
        f"{sum(step.exposed.values()):.2f}",
        f"{plan.gpu_hours:,.0f}",
    )

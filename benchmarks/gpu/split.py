"""Where the time of a step goes, by torch's profiler: each operation's device time by what asked for it."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.autograd.profiler import record_function

from llada_train.data.batch import Batch
from llada_train.model import head
from llada_train.parallel.engine import Engine

# The first that an operation, or what called it, is named after. The head and the optimizer are labelled by hand.
CAUSES = (
    ("head", r"^head$"),
    ("optimizer", r"^optimizer$"),
    ("data", r"^data$"),
    ("attention", r"scaled_dot_product|flash|attention"),
    ("matrix products", r"^aten::(mm|addmm|bmm|matmul|linear)$"),
    ("gradient sums", r"AccumulateGrad"),
)
OTHER = "norms, elementwise"


@contextmanager
def labelled(engine: Engine) -> Iterator[None]:
    """While it lasts, the head, the optimizer and the copies of batches carry their names in profiles."""
    of_head = head._LogNormaliserAndTarget
    with ExitStack() as stack:
        for name in ("forward", "backward"):
            stack.enter_context(mock.patch.object(of_head, name, staticmethod(_named("head", getattr(of_head, name)))))
        stack.enter_context(mock.patch.object(engine._gate, "apply", _named("optimizer", engine._gate.apply)))
        stack.enter_context(mock.patch.object(Batch, "to", _named("data", Batch.to)))
        yield


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def inner(*arguments: Any, **named: Any) -> Any:
        with record_function(name):
            return function(*arguments, **named)

    return inner


def time_split(engine: Engine, step: Callable[[], object], cuda: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Seconds of one step by cause, gaps included; and the 30 kernels (on a CPU: operations) that took longest."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    with labelled(engine), torch.profiler.profile(activities=activities) as profile:
        with record_function("whole step"):
            step()
        if cuda:
            torch.cuda.synchronize()
    events = profile.events()
    whole = next(event for event in events if event.name == "whole step").time_range
    by_cause: Counter[str] = Counter()
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        own = sum(kernel.duration for kernel in event.kernels) if cuda else event.self_cpu_time_total
        if event.name != "whole step":
            by_cause[_cause(event)] += own / 1e6
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    ranges = [(event.time_range.start, event.time_range.end) for event in on_device]
    length = (max([whole.end, *(end for _, end in ranges)]) - whole.start) / 1e6
    busy = _covered(ranges) / 1e6 if cuda else sum(by_cause.values())
    # What runs at the same time on two streams counts in both causes, and once in what is covered.
    by_cause["not told apart"] = max(0.0, busy - sum(by_cause.values()))
    by_cause["gaps"] = max(0.0, length - busy)
    return dict(by_cause), _longest(on_device if cuda else events, cuda)


def _cause(event: Any) -> str:
    """By the names of the operation and of all that it is a part of; the order of CAUSES decides."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return next((cause for cause, pattern in CAUSES if any(re.search(pattern, name) for name in names)), OTHER)


def _covered(ranges: Iterable[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _longest(events: Iterable[Any], cuda: bool) -> list[dict[str, Any]]:
    took: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in events:
        took[event.name] += event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        count[event.name] += 1
    return [{"name": name, "ms": us / 1e3, "calls": count[name]} for name, us in took.most_common(30)]

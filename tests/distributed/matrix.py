"""What a layout's run is compared with, and how closely it has to agree."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import processes
import pytest
import torch
import training_run
from layouts import Layout
from torch import Tensor

from llada_train.checkpoint.reader import Checkpoint
from llada_train.checkpoint.store import checkpoints
from llada_train.config.load import load_config
from llada_train.model.sizes import FIRST_MOMENT, MASTER
from llada_train.model.weights import InitialWeights

STEPS = 10
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}  # relative, of losses and gradient norms
WEIGHT_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # ‖w − w_ref‖ ÷ ‖w_ref − w_0‖
SUM_TOLERANCE = 1e-5  # of gradients, and their norms, between which only the order of fp32 sums differs
REFERENCE = Layout(micro_batch_size=16)


@dataclass(frozen=True)
class Outcome:
    """A run's ranks together."""

    layout: Layout
    overrides: tuple[str, ...]
    fault: str | None
    runs: list[training_run.Run]
    folder: Path  # of its checkpoint

    @property
    def first(self) -> training_run.Run:
        return self.runs[0]

    @cached_property
    def digests(self) -> dict[tuple[int, int], list[Counter[int]]]:
        """Of each place in a model copy and each step: sample → digest, summed over the slices of its columns."""
        summed: dict[tuple[int, int], list[Counter[int]]] = {}
        for run in self.runs:
            steps = summed.setdefault(run.model_rank, [Counter() for _ in run.digests])
            for step, digests in zip(steps, run.digests, strict=True):
                for sample, digest in digests.items():
                    step[sample] = (step[sample] + digest) % 2**64
        return summed


@dataclass(frozen=True)
class Deviation:
    """Largest relative differences from one process."""

    losses: float
    norms: float
    validation: float
    weights: float


class Matrix:
    """Runs layouts in one precision and compares them with one process."""

    def __init__(self, config: Path, precision: str, folder: Path) -> None:
        self.config, self._precision, self._folder = config, precision, folder
        self.deviations: dict[Layout, Deviation] = {}
        self._reference = cache(self._run_reference)

    def run(self, layout: Layout, *overrides: str, fault: str | None = None, steps: int = STEPS) -> Outcome:
        """Train, from the same initial weights as ever; `overrides` of the config, `fault` of FAULTS."""
        folder = self._folder / "-".join([layout.name, *overrides, str(fault), str(steps)])
        settings = [f"training.precision={self._precision}", *layout.overrides, *overrides]
        runs = processes.run(
            layout.processes,
            training_run.train,
            self.config,
            settings,
            steps,
            folder,
            fault,
        )
        return Outcome(layout, overrides, fault, runs, folder)

    def check(self, outcome: Outcome) -> None:
        """Assert that the run is one process's run."""
        found, expected = outcome.first, self._reference(REFERENCE, outcome.overrides)
        for place, digests in outcome.digests.items():
            assert digests == expected.digests[0, 0], f"noise, targets or weights differ at {place}"
        deviation = Deviation(
            losses=_furthest(found.losses, expected.first.losses),
            norms=_furthest(found.norms, expected.first.norms),
            validation=max(
                _furthest([found.validation], [expected.first.validation]),
                _furthest([p for _, p in found.predicted], [p for _, p in expected.first.predicted]),
            ),
            weights=self._weights(outcome, expected),
        )
        if outcome.fault is None and not outcome.overrides:
            self.deviations[outcome.layout] = deviation
        tolerance = TOLERANCE[self._precision]
        assert max(deviation.losses, deviation.norms, deviation.validation) <= tolerance, f"another run: {deviation}"
        assert deviation.weights <= WEIGHT_TOLERANCE[self._precision], f"other weights: {deviation}"
        assert [id for id, _ in found.predicted] == [id for id, _ in expected.first.predicted]
        for run in outcome.runs:
            assert run.losses == found.losses and run.norms == pytest.approx(found.norms, rel=SUM_TOLERANCE), "by rank"
        for step, bounds in zip(found.bounds_by_t, expected.first.bounds_by_t, strict=True):
            assert no_row_is_0(step) == pytest.approx(no_row_is_0(bounds), rel=5 * tolerance)
        if outcome.layout.kind in ("one process", "DP"):  # the same kernels on the same micro-batches
            same = self._reference(Layout(**outcome.layout.settings["training"]), outcome.overrides, 1)
            one_step = self.run(outcome.layout, *outcome.overrides, fault=outcome.fault, steps=1)
            assert _gradients(one_step, same) <= SUM_TOLERANCE, "gradients are not summed in fp32"

    def _run_reference(self, layout: Layout, overrides: tuple[str, ...], steps: int = STEPS) -> Outcome:
        return self.run(layout, *overrides, steps=steps)

    def _weights(self, found: Outcome, expected: Outcome) -> float:
        """‖w − w_ref‖ ÷ ‖w_ref − w_0‖"""
        config = load_config(self.config)
        initial = InitialWeights(config.model, config.seed)
        moved = ((value, initial.read(name)) for name, _, value in _tensors(found, expected, MASTER))
        return _distance((ours, value) for _, ours, value in _tensors(found, expected, MASTER)) / _distance(moved)


def no_row_is_0(bounds: list[float | None]) -> list[float]:
    return [bound or 0.0 for bound in bounds]


def _gradients(found: Outcome, expected: Outcome) -> float:
    """‖g − g_ref‖ ÷ ‖g_ref‖ of the first step: Adam's first moments are in proportion to its gradients."""
    length = _distance((value, torch.zeros(())) for _, _, value in _tensors(found, expected, FIRST_MOMENT))
    return _distance((ours, value) for _, ours, value in _tensors(found, expected, FIRST_MOMENT)) / length


def _tensors(found: Outcome, expected: Outcome, kind: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, and value in either checkpoint, of every tensor."""
    (ours,), (reference,) = checkpoints(found.folder), checkpoints(expected.folder)
    with Checkpoint(ours) as a, Checkpoint(reference) as b:
        for name, spec in a.specs.items():
            whole = [(0, spec.numel)]
            yield name, *(c.read_runs(name, kind, whole).view(spec.shape) for c in (a, b))


def _distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    return sum(float((a - b).double().square().sum()) for a, b in pairs) ** 0.5


def _furthest(found: list[float], expected: list[float]) -> float:
    return max((abs(a / b - 1) for a, b in zip(found, expected, strict=True)), default=0.0)


def report(matrices: dict[str, Matrix]) -> str:
    """Markdown: the largest relative differences from one process, by kind of parallelism and then of each layout."""
    layouts = list(dict.fromkeys(layout for matrix in matrices.values() for layout in matrix.deviations))
    kinds: dict[str, list[Layout]] = {}
    for layout in layouts:
        kinds.setdefault(layout.kind, []).append(layout)
    tables = [{kind: kinds[kind] for kind in sorted(kinds, key=len)}, {layout.name: [layout] for layout in layouts}]
    return "\n\n".join(_table(groups, matrices) for groups in tables) + "\n"


def _table(groups: dict[str, list[Layout]], matrices: dict[str, Matrix]) -> str:
    quantities = ("losses", "norms", "weights")
    columns = ["layout", "layouts", "processes", *(f"{p} {name}" for p in matrices for name in quantities)]
    rows = [columns, ["---"] * len(columns)]
    for name, layouts in groups.items():
        processes = sorted({layout.processes for layout in layouts})
        cells = [name, str(len(layouts)), ", ".join(map(str, processes))]
        for matrix in matrices.values():
            found = [matrix.deviations[layout] for layout in layouts if layout in matrix.deviations]
            cells += [f"{max(getattr(one, name) for one in found):.0e}" if found else "–" for name in quantities]
        rows.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)

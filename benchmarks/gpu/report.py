"""What was measured, as JSON, as Markdown, and as a picture of each section."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from common import machine_and_versions

from benchmarks.gpu.measure import Ceilings, Plot, Row, Section, Sizes
from llada_train.parallel.topology import device_name
from llada_train.plan.chips import chip_of_device

LIBRARIES = ("torch", "megatron-core", "deepspeed", "transformers", "triton", "flash-attn", "liger-kernel")
LIBRARIES = (*LIBRARIES, "transformer-engine", "numpy")


class Report:
    """Written anew after each section, so that what was measured stays if a later one fails."""

    def __init__(self, folder: Path, name: str, command: str, sizes: Sizes) -> None:
        """`name`.json, `name`.md and `name`_SECTION.png in `folder`."""
        self._folder, self._name, self._command, self._sizes = folder, name, command, sizes
        self._sections: dict[str, Section] = {}
        self._failures: dict[str, str] = {}
        self._seconds: dict[str, float] = {}
        self.ceilings: Ceilings | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, section: Section, seconds: float) -> None:
        self._sections[name], self._seconds[name] = section, seconds
        if section.plot is not None:
            _draw(section, section.plot, self._folder / f"{self._name}_{name}.png")
        self._write()

    def failed(self, name: str, reason: str) -> None:
        self._failures[name] = reason
        self._write()

    def _write(self) -> None:
        self.markdown.write_text(self._text(), encoding="utf-8")
        told = {
            "date": date.today().isoformat(),
            "trial": self._sizes.tiny,
            "device": device_name(self._sizes.device),
            "python": platform.python_version(),
            "versions": {name: found for name in LIBRARIES if (found := _version(name)) is not None},
            "cuda": torch.version.cuda,
            "command": self._command,
            "ceilings": asdict(self.ceilings) if self.ceilings else None,
            "seconds": self._seconds,
            "sections": {name: asdict(section) for name, section in self._sections.items()},
            "failures": self._failures,
        }
        (self._folder / f"{self._name}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    @property
    def markdown(self) -> Path:
        return self._folder / f"{self._name}.md"

    def _text(self) -> str:
        chip = None if self._sizes.tiny else chip_of_device(device_name(self._sizes.device))
        peak = f", peak {chip.peak_flops / 1e12:,.1f} bf16 TFLOP/s by its data sheet" if chip else ""
        title = "A trial of the benchmark on a CPU" if self._sizes.tiny else "One GPU"
        lines = [f"# {title}, {date.today().isoformat()}", ""]
        if self._sizes.tiny:
            lines += ["Made small to see that it runs: these numbers say nothing of any GPU.", ""]
        optional = ", ".join(f"{name} {_version(name) or 'is not installed'}" for name in LIBRARIES[4:-1])
        lines += [f"- {device_name(self._sizes.device)}{peak}; CUDA {torch.version.cuda}", machine_and_versions()]
        lines += [f"- {optional}", f"- `{self._command}`", ""]
        if self.ceilings:
            lines += [
                f"Ceilings measured here: {self.ceilings.flops / 1e12:,.1f} TFLOP/s of a large bf16 product, "
                f'{self.ceilings.copied / 1e9:,.0f} GB/s of copies. "Of a large product" is a share of the former.',
                "",
            ]
        for name, section in self._sections.items():
            lines += [f"## {section.title}", "", section.note, "", table(section.rows), ""]
            lines += [f"**Failed: {problem}**\n" for problem in section.problems]
            for title, rows in section.tables.items():
                lines += [f"{title}:", "", table(rows), ""]
            if section.plot is not None:
                lines += [f"![{section.plot.y} over {section.plot.x}]({self._name}_{name}.png)", ""]
        lines += [f"## {name}: failed\n\n{reason}\n" for name, reason in self._failures.items()]
        took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self._seconds.items())
        return "\n".join([*lines, f"Measuring took: {took}.", ""])


def table(rows: Sequence[Row]) -> str:
    """In Markdown; a column for each key that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(_cell(row.get(key)) for key in columns)} |" for row in rows)])


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if value == int(value) and value < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _draw(section: Section, plot: Plot, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for line in dict.fromkeys(str(row[plot.lines]) for row in section.rows):
        points = sorted(
            (float(x), float(y))
            for row in section.rows
            if str(row[plot.lines]) == line
            and (x := row.get(plot.x)) is not None
            and (y := row.get(plot.y)) is not None
        )
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=line)
    axes.set(xlabel=plot.x, ylabel=plot.y, ylim=(0, None), xscale="log" if plot.log_x else "linear")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format="png")

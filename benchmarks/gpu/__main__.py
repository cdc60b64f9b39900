"""One GPU, in minutes: its ceilings, the head, attention, one layer and whole steps of the 8B, each against others.

python -m benchmarks.gpu                          # benchmarks/results/gpu_DATE.{json,md} and pictures
python -m benchmarks.gpu --section head layer     # some of it
python -m benchmarks.gpu --tiny                   # on a CPU, in seconds: does it run at all?
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from common import ROOT

if TYPE_CHECKING:
    from benchmarks.gpu.measure import Ceilings, Section, Sizes
    from llada_train.parallel.topology import Topology

SECTIONS = ("ceilings", "head", "attention", "layer", "step")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to measure; all")
    parser.add_argument("--tiny", action="store_true", help="small and on the CPU, to see that everything runs")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder to write to")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        print(
            "error: no GPU: torch sees no CUDA device; run this on one, or with --tiny to try it out", file=sys.stderr
        )
        return 2
    if arguments.tiny:  # one process that could do both, does it as a machine without a GPU would
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return run(arguments.section, arguments.tiny, arguments.output)


def run(chosen: list[str], tiny: bool, folder: Path) -> int:
    """The exit code: 1 if a section failed, whose traceback is in the report in its place."""
    from llada_train.config.schema import ParallelConfig
    from llada_train.parallel import cpu, topology

    topology.quiet_engines()
    from contextlib import nullcontext

    from benchmarks.gpu.ceilings import ceilings
    from benchmarks.gpu.measure import Sizes, forget
    from benchmarks.gpu.report import Report

    sizes = Sizes(tiny)
    here = topology.initialize(ParallelConfig())
    command = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])
    whole = len(chosen) == len(SECTIONS)
    name = f"gpu_{'' if whole else '_'.join(chosen) + '_'}{date.today().isoformat()}"
    report = Report(folder, name, command, sizes)
    failed = False
    try:
        with cpu.standing_in() if tiny else nullcontext():
            for section in ["ceilings", *(s for s in SECTIONS if s in chosen and s != "ceilings")]:
                began = time.perf_counter()
                print(f"{section} …", flush=True)
                try:
                    if section == "ceilings":
                        made, report.ceilings = ceilings(sizes)
                    else:
                        assert report.ceilings is not None
                        made = _measure(section, sizes, report.ceilings, here)
                except Exception:  # one that fails takes no other with it: the machine is lent for minutes
                    reason = traceback.format_exc()
                    print(reason, file=sys.stderr)
                    report.failed(section, f"```\n{reason}```")
                    failed = True
                    if section == "ceilings":
                        break
                else:
                    report.add(section, made, time.perf_counter() - began)
                    failed |= made.failed
                forget(sizes)
    finally:
        topology.shutdown()
    print(report.markdown.read_text(encoding="utf-8"))
    return int(failed)


def _measure(section: str, sizes: "Sizes", ceiling: "Ceilings", here: "Topology") -> "Section":
    from benchmarks.gpu.attentions import attentions
    from benchmarks.gpu.heads import heads
    from benchmarks.gpu.layers import layers
    from benchmarks.gpu.steps import steps

    measured: dict[str, Callable[[], Section]] = {
        "head": lambda: heads(sizes, ceiling),
        "attention": lambda: attentions(sizes, ceiling),
        "layer": lambda: layers(sizes, ceiling),
        "step": lambda: steps(sizes, ceiling, here),
    }
    return measured[section]()


if __name__ == "__main__":
    sys.exit(main())

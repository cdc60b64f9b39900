"""What GPUs can do, by their makers' data sheets."""

import re
from dataclasses import dataclass

from llada_train.config.errors import UserError

MIB = 2**20


@dataclass(frozen=True)
class Chip:
    """One GPU in a node of its maker's own design. Bytes per second are in one direction."""

    peak_flops: float  # dense bf16, FLOP/s
    memory_bytes: int  # as nvidia-smi counts them
    memory_rate: float
    link_rate: float  # to the other GPUs of its node: NVLink, else PCIe
    network_rate: float  # to other nodes, of its own adapter

    @classmethod
    def of(cls, tflops: float, memory_mib: int, memory_tb: float, link_gb: float, network_gb: float) -> "Chip":
        return cls(tflops * 1e12, memory_mib * MIB, memory_tb * 1e12, link_gb * 1e9, network_gb * 1e9)


GPUS_PER_NODE = 8  # of DGX and HGX nodes
# SXM modules if not said. Peak, memory rate, NVLink: NVIDIA's data sheets of each (H800, A800: NVLink of 400 GB/s in
# both directions together, for export; DeepSeek-V3, arXiv 2412.19437, §3.1). Network: one 400 Gb/s adapter for each GPU
# in DGX H100, H200 and B200, 200 Gb/s in DGX A100. Keys are words of the name that CUDA gives; the first one holds.
CHIPS = {
    "H100 PCIe": Chip.of(756, 81_559, 2.0, 64, 50),
    "H100 NVL": Chip.of(835, 95_830, 3.9, 64, 50),
    "H100": Chip.of(989.4, 81_559, 3.35, 450, 50),
    "GH200": Chip.of(989.4, 97_871, 4.0, 450, 50),
    "H200": Chip.of(989.4, 143_771, 4.8, 450, 50),
    "H800 PCIe": Chip.of(756, 81_559, 2.0, 64, 50),
    "H800": Chip.of(989.4, 81_559, 3.35, 200, 50),
    "H20": Chip.of(148, 97_871, 4.0, 450, 50),
    "A100-SXM4-40GB": Chip.of(312, 40_960, 1.555, 300, 25),
    "A100": Chip.of(312, 81_920, 2.04, 300, 25),
    "A800": Chip.of(312, 81_920, 2.04, 200, 25),
    "GB200": Chip.of(2500, 189_471, 8.0, 900, 50),
    "B200": Chip.of(2250, 183_359, 8.0, 900, 50),
}


def chip_of_device(device: str) -> Chip | None:
    """By the name that CUDA gives ("NVIDIA H100 80GB HBM3"); None: it is not known."""
    return next((chip for name, chip in CHIPS.items() if re.search(rf"\b{name}\b", device)), None)


def chip_called(name: str) -> Chip:
    """By the name that a user gives: "h800".

    Raises:
        UserError: there is none of that name.
    """
    wanted = name.upper().replace("-", " ")
    found = next((chip for key, chip in CHIPS.items() if key.upper() == wanted), None)
    if found is None:
        raise UserError(f"--gpu {name}: is not known; known are {', '.join(key.lower() for key in CHIPS)}")
    return found

"""What the chip itself can do: the ceilings that every other section is held against."""

import torch

from benchmarks.gpu.measure import Ceilings, Plot, Row, Section, Sizes, seconds


def ceilings(sizes: Sizes) -> tuple[Section, Ceilings]:
    """Square bf16 products of random numbers, and copies from one place of the device's memory to another."""
    products = [_product(n, sizes) for n in ((128, 256) if sizes.tiny else (2048, 4096, 8192, 16384))]
    copies = [_copy(mib, sizes) for mib in ((1, 4) if sizes.tiny else (64, 512, 4096))]
    section = Section(
        "Ceilings of the chip",
        "bf16 matrix products of n × n × n, of normal random numbers: 2·n³ FLOPs. Copies on the device: bytes read and "
        "bytes written, both counted.",
        rows=products,
        plot=Plot(x="n", y="TFLOP/s", lines="what", log_x=True),
        tables={"Copies": copies},
    )
    flops = max(float(row["TFLOP/s"] or 0) for row in products) * 1e12
    return section, Ceilings(flops=flops, copied=max(float(row["GB/s"] or 0) for row in copies) * 1e9)


def _product(n: int, sizes: Sizes) -> Row:
    a, b = (torch.randn(n, n, device=sizes.device, dtype=torch.bfloat16) for _ in range(2))
    took = seconds(lambda: a @ b, sizes)
    return {"what": "bf16 product", "n": n, "ms": took * 1e3, "TFLOP/s": 2 * n**3 / took / 1e12}


def _copy(mib: int, sizes: Sizes) -> Row:
    source = torch.ones(mib * 2**20, device=sizes.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    took = seconds(lambda: target.copy_(source), sizes)
    return {"what": "copy", "MiB": mib, "ms": took * 1e3, "GB/s": 2 * mib * 2**20 / took / 1e9}

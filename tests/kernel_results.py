"""What a set of kernels computes, to be compared with another on any device."""

import torch
from torch import Tensor

from llada_train.model.kernels import TORCH, Kernels

CPU = torch.device("cpu")
S, B, N, G, D, H, F = 6, 3, 4, 2, 8, 32, 48


def results(of: Kernels, dtype: torch.dtype, device: torch.device = CPU) -> list[Tensor]:
    """Outputs and gradients of all three, queries and keys being slices of one tensor as in a layer."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, weight, joint, gate_up = (
        tensor.requires_grad_()
        for tensor in (normal(S, B, H), normal(H), normal(S, B, N + 2 * G, D), normal(S, B, 2 * F))
    )
    angles = torch.rand(S, B, 1, D // 2, generator=generator).repeat(1, 1, 1, 2).to(device) * 100
    query, key, _ = (joint * 1).split([N, G, G], dim=2)
    outputs = [of.rms_norm(x, weight, 1e-5), *of.rotate(query, key, angles.cos(), angles.sin()), of.swiglu(gate_up)]
    return [*outputs, *torch.autograd.grad(outputs, [x, weight, joint, gate_up], [normal(*o.shape) for o in outputs])]


def assert_equal(of: Kernels, dtype: torch.dtype, tolerance: float, device: torch.device = CPU) -> None:
    for ours, exact in zip(results(of, dtype, device), results(TORCH, torch.float32, device), strict=True):
        assert (ours.float() - exact).abs().max() <= tolerance * exact.abs().max()

"""On a GPU only: the kernels that a CPU run never takes, against the ones that it does."""

import pytest
import torch
from torch import Tensor

from llada_train.data.batch import Segments

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

S, B, N, D = 256, 3, 8, 64
CUT = [0, S, S + 100, 2 * S, 3 * S]  # row 1 ends after 100 tokens


def torchs(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """Torch's own attention in fp32: q [S, B, N, D], k and v [S', B, G, D] → [S, B, N, D]."""
    from llada_train.model import attention

    q, k, v = (x.float() for x in (q, k, v))
    if segments is not None:
        return attention._sdpa_by_segment(q, k, v, segments.lengths)
    return attention._sdpa(*(x.permute(1, 2, 0, 3) for x in (q, k, v))).permute(2, 0, 1, 3)


@pytest.mark.parametrize(
    ("columns", "borders"),
    [
        (slice(0, S), None),
        (slice(0, S), (CUT, CUT)),
        # The second half of the columns, as context parallelism has it: no token of row 1, all of them padding.
        (slice(S // 2, S), None),
        (slice(S // 2, S), ([0, S // 2, S // 2, S, 3 * S // 2], CUT)),
    ],
    ids=["whole", "cut", "half", "half-cut"],
)
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_flash_attention_equals_torchs(
    kv_heads: int, columns: slice, borders: tuple[list[int], list[int]] | None
) -> None:
    """Forward, and backward to queries, keys and values; keys that no query reads get gradients of 0."""
    pytest.importorskip("flash_attn")
    from llada_train.model import attention

    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(S, B, heads, D, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (N, kv_heads, kv_heads)
    )
    inputs = [x.detach().requires_grad_() for x in (q[columns], k, v)]
    segments = None
    if borders is not None:
        cu_q, cu_kv = (torch.tensor(b, dtype=torch.int32, device="cuda") for b in borders)
        segments = Segments(cu_q, cu_kv, tuple(zip(cu_q.diff().tolist(), cu_kv.diff().tolist(), strict=True)))
    expected = torchs(*inputs, segments)
    found = attention._flash(*inputs, segments)
    cotangent = torch.randn(expected.shape, generator=generator, device="cuda")
    gradients = torch.autograd.grad(found, inputs, cotangent.to(found.dtype))
    references = torch.autograd.grad(expected, inputs, cotangent)
    for ours, reference in zip((found, *gradients), (expected, *references), strict=True):
        assert (ours.float() - reference.float()).abs().max() <= 2e-2 * reference.abs().max()

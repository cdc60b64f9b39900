"""On a GPU only: the kernels that a CPU run never takes, against the ones that it does."""

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_flash_attention_equals_torchs(kv_heads: int, cut: bool) -> None:
    pytest.importorskip("flash_attn")
    from llada_train.model import attention

    S, B, N, D = 256, 3, 8, 64
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(S, B, heads, D, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (N, kv_heads, kv_heads)
    )
    cu_seqlens = torch.tensor([0, S, S + 100, 2 * S, 3 * S], dtype=torch.int32, device="cuda") if cut else None
    expected = (
        attention._sdpa_by_segment(q.float(), k.float(), v.float(), cu_seqlens)
        if cu_seqlens is not None
        else attention._sdpa(*(x.float().permute(1, 2, 0, 3) for x in (q, k, v))).permute(2, 0, 1, 3)
    )
    torch.testing.assert_close(attention._flash(q, k, v, cu_seqlens).float(), expected, rtol=2e-2, atol=2e-2)

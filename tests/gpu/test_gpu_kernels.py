"""On a GPU only: each set of kernels that is installed there computes what torch's do."""

import pytest
import torch
from kernel_results import assert_equal

from llada_train.config.errors import UserError
from llada_train.model.kernels import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", ["torch", "compile", "liger"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_kernels_compute_the_same(name: str, dtype: torch.dtype, tolerance: float) -> None:
    device = torch.device("cuda")
    try:
        chosen = kernels(name, device)
    except UserError as error:
        pytest.skip(str(error))
    assert_equal(chosen, dtype, tolerance, device)

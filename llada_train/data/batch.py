"""What one forward pass needs: the boundary between the data plane and the compute plane."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Where the stretches of tokens that see each other, and nothing else, begin and end in a batch."""

    cu_seqlens_q: Tensor  # [segments + 1] int32 over the B·S flattened tokens
    cu_seqlens_kv: Tensor  # [segments + 1] int32 over the B·S' flattened tokens of whole rows
    lengths: tuple[tuple[int, int], ...]  # of each segment in either, for code that has to know them on the host


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B rows and S columns with E samples and K masked positions (padding included).

    E = B, but for packed rows, which hold several samples each.

    Under context parallelism S counts the columns of this rank's slice, and attention reads the keys of whole rows, of
    S' = S × ranks columns; without it S' = S. K is at least 1 and a multiple of 256; the padding repeats position 0
    of sample 0 with weight 0. All of it is made on the host, so that the device never has to be asked how many
    positions are masked.
    """

    input_ids: Tensor  # [B, S] int64, noised
    position_ids: Tensor  # [B, S] int64
    segments: Segments | None  # None: every row is one segment
    masked_positions: Tensor  # [K] int64, indexes into the B·S flattened tokens
    targets: Tensor | None  # [K] int64; None: hidden states are asked for, in place of losses
    loss_weight: Tensor  # [K] fp32, already normalised over the global batch
    masked_samples: Tensor  # [K] int64, which of the E samples each position is of
    sample_index: (
        Tensor  # [E] int64, the samples' places in the run's global order; -1: of a row that only fills the batch up
    )
    t: Tensor  # [E] fp32, mask probability p of each sample

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; from pinned memory the copy is asynchronous."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked host memory (needs CUDA)."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: function(v) for name, v in values.items() if isinstance(v, Tensor)}
        if self.segments is not None:
            moved["segments"] = replace(
                self.segments,
                cu_seqlens_q=function(self.segments.cu_seqlens_q),
                cu_seqlens_kv=function(self.segments.cu_seqlens_kv),
            )
        return replace(self, **moved)

"""Are parameters that several ranks hold copies of equal bit for bit? A rank whose memory or GPU is at fault is named.

All ranks of data × context parallelism hold copies of each parameter; of those that tensor parallelism does not cut
(norms), so do all tensor-parallel ranks. ZeRO 3 leaves whole only what DeepSpeed calls persistent: small parameters.

The time for it is after backward and before the update, which writes all weights anew from the fp32 masters, each of
which one rank of data × context parallelism owns: a bit that has flipped in a weight since the last update has spoilt
this step's gradients by then, and after the update it would be gone. A bit that flips in a master reaches all copies
and stays unseen, but where tensor-parallel ranks each have one (of norms).
"""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from llada_train.config.errors import UserError
from llada_train.model.weights import Shard

_CHUNK = 1 << 20  # elements at a time: a few times 8 MiB of extra memory
_NAMED = 5  # parameters in the message
_INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes of an element
_MIX = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64)  # splitmix64's odd constants, as int64 writes them


def check_replicas(shards: Sequence[Shard], step: int) -> None:
    """Compare all copies of this rank's parameters; collective over all ranks.

    Raises:
        UserError: copies differ; on every rank, with the parameters and the ranks that differ from the majority.
    """
    kept = [shard for shard in shards if getattr(shard.parameter, "ds_persist", True)]  # False: ZeRO 3 has split it
    uncut = [i for i, shard in enumerate(kept) if shard.spec.partition_dim is None]
    multipliers = position_multipliers(kept[0].parameter.device)
    digests = [digest(shard.parameter, multipliers) for shard in kept]
    own = torch.stack([torch.full_like(digests[0], dist.get_rank()), *digests])
    copies = _gather(own, parallel_state.get_data_parallel_group(with_context_parallel=True))
    columns = torch.tensor([0, *(1 + i for i in uncut)], device=own.device)
    uncut_copies = _gather(copies[:, columns], parallel_state.get_tensor_model_parallel_group())

    found: list[dict[str, set[int]]] = [{} for _ in range(dist.get_world_size())]
    differing = _differing([shard.name for shard in kept], copies)
    differing |= _differing([kept[i].name for i in uncut], uncut_copies)
    dist.all_gather_object(found, differing)
    merged: dict[str, set[int]] = {}
    for part in found:
        for name, ranks in part.items():
            merged.setdefault(name, set()).update(ranks)
    if merged:
        raise UserError(_message(step, merged))


def position_multipliers(device: torch.device) -> Tensor:
    """[_CHUNK] int64: odd, so that one changed element always changes a sum of products; mixed, so that many do."""
    x = torch.arange(1, _CHUNK + 1, device=device) * _MIX[0]
    return ((x ^ (x >> 29)) * _MIX[1]) | 1


def digest(parameter: Tensor, multipliers: Tensor) -> Tensor:
    """int64 scalar on the parameter's device: Σ bits of element × multiplier of its position, modulo 2⁶⁴.

    Chunks' sums are the coefficients of a polynomial in an odd number. Integers: any order of adding gives the same.
    """
    bits = parameter.detach().view(-1).view(_INTEGERS[parameter.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=parameter.device)
    for chunk in bits.split(_CHUNK):
        total = total * _MIX[0] + (chunk * multipliers[: len(chunk)]).sum()
    return total


def _gather(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's [n] or [m, n] as [ranks or ranks·m, n]; the first column is the global rank."""
    gathered = [torch.empty_like(rows) for _ in range(group.size())]
    dist.all_gather(gathered, rows.contiguous(), group=group)
    return torch.stack(gathered).view(-1, rows.shape[-1])


def _differing(names: list[str], copies: Tensor) -> dict[str, set[int]]:
    """Parameter → the ranks whose digest is not the majority's; without a majority, all that hold a copy."""
    ranks, *columns = copies.T.tolist()
    found = {}
    for name, column in zip(names, columns, strict=True):
        value, count = Counter(column).most_common(1)[0]
        if count < len(column):
            majority = 2 * count > len(column)
            found[name] = {rank for rank, other in zip(ranks, column, strict=True) if other != value or not majority}
    return found


def _message(step: int, differing: dict[str, set[int]]) -> str:
    named = [f"{name} (on {_ranks(ranks)})" for name, ranks in list(differing.items())[:_NAMED]]
    more = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
    return (
        f"step {step}: copies of parameters are not equal bit for bit: {', '.join(named)}{more}; the run stops before "
        f"the update. The machine of {_ranks(set().union(*differing.values()))} is suspect (where no majority agrees, "
        "all that hold a copy are named): check its memory and GPU. Then go on from the last checkpoint that is not "
        "newer than the check before this one (training.replica_check_interval_steps earlier): move newer ones out of "
        "the run's folder and run the same command again"
    )


def _ranks(ranks: set[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"

"""Keys and values kept within a block: an approximation that computes less."""

import torch
from torch import Tensor
from torch.nn import functional as F

from llada_train.model.hf.modeling_llada import LLaDALlamaBlock, rotary_angles, rotate
from llada_train.sampling.denoiser import Query, Read
from llada_train.sampling.options import Cache
from llada_train.sampling.plain import PlainDenoiser


class CachedDenoiser:
    """A plain model that keeps keys and values (Fast-dLLM, 2505.22618); for one batch.

    A row's first query of a block computes all; the others of that block compute the block alone (`dual`), or it and
    all that follows (`prefix`), against the other positions' keys and values as they were then. An approximation, since
    these would have changed with each token. Rows are known by `Query.rows`; each goes its own way.
    """

    def __init__(self, plain: PlainDenoiser, cache: Cache) -> None:
        self._plain = plain
        self._cache = cache
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # of (layer, row): keys, values
        self._blocks: dict[int, Tensor] = {}  # what each row filled in last

    @torch.no_grad()
    def __call__(self, query: Query, read: Read) -> Tensor:
        weight = self._plain.transformer.wte.weight
        query = query.doubled().to(weight.device)
        assert query.rows is not None and query.block is not None
        rows, blocks = query.rows.tolist(), query.block
        fresh = torch.tensor(
            [
                row not in self._blocks or not torch.equal(self._blocks[row], block)
                for row, block in zip(rows, blocks, strict=True)
            ],
            device=blocks.device,
        )
        self._blocks.update(zip(rows, blocks, strict=True))
        h = weight.new_zeros(*query.ids.shape, weight.shape[1])
        for some, is_fresh in ((fresh, True), (~fresh, False)):
            at = some.nonzero()[:, 0]
            if len(at):
                h[at] = self._hidden(query, at, [rows[i] for i in at.tolist()], is_fresh)
        return self._plain.read(h, query, read)

    def _columns(self, block: Tensor) -> Tensor:
        """From the first position of the block to its last, or to the row's end: int64 [b, n], last ones repeated."""
        recomputed = block.cumsum(1) > 0
        if self._cache == "dual":
            recomputed &= block.flip(1).cumsum(1).flip(1) > 0
        columns = torch.arange(block.shape[1], device=block.device).where(recomputed, -1)
        columns = columns.sort(dim=1, descending=True).values[:, : int(recomputed.sum(1).max())]
        return columns.where(columns >= 0, columns[:, :1])

    def _hidden(self, query: Query, at: Tensor, rows: list[int], fresh: bool) -> Tensor:
        """Hidden states [b, L, d_model] of the rows `at`; 0 where they are not recomputed."""
        transformer, ids = self._plain.transformer, query.ids[at]
        b, L = ids.shape
        assert query.block is not None
        columns = torch.arange(L, device=ids.device).expand(b, L) if fresh else self._columns(query.block[at])
        h = transformer.wte(ids.gather(1, columns))
        cos, sin = (table[columns][:, None] for table in rotary_angles(transformer.config, L, ids.device))
        visible = None if query.visible is None else query.visible[at][:, None, None, :]
        block: LLaDALlamaBlock
        for layer, block in enumerate(transformer.blocks):  # type: ignore[assignment]
            x = block.attn_norm(h)
            q, k, v = (
                proj(x).unflatten(-1, (-1, block.head_dim)).transpose(1, 2)
                for proj in (block.q_proj, block.k_proj, block.v_proj)
            )
            q, k = rotate(q, (cos, sin)), rotate(k, (cos, sin))
            if fresh:
                self._kept.update({(layer, row): (k[i], v[i]) for i, row in enumerate(rows)})
            else:
                places = columns[:, None, :, None].expand_as(k)
                kept = zip(*(self._kept[layer, row] for row in rows), strict=True)
                k, v = (torch.stack(old).scatter(2, places, new) for old, new in zip(kept, (k, v), strict=True))
            attention = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=k.shape[1] != q.shape[1])
            h = h + block.attn_out(attention.transpose(1, 2).flatten(-2))
            x = block.ff_norm(h)
            h = h + block.ff_out(F.silu(block.ff_proj(x)) * block.up_proj(x))
        return h.new_zeros(b, L, h.shape[-1]).scatter(1, columns[..., None].expand_as(h), h)

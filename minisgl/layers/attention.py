"""Self-attention over the paged KV cache. Shapes: see `batch.py`.

Knows which tokens decode and which prefill. Does not know how pages are found: the kernels read the page table.
"""

import torch

from minisgl.batch import Batch
from minisgl.kernels.attention_decode import attention_decode_rotary
from minisgl.kernels.rotary import Rotary
from minisgl.kernels.skinny_matmul import Stream
from minisgl.layers import Empty, Target
from minisgl.layers.linear import Linear, SummedLinear
from minisgl.layers.ops import Ops
from minisgl.layers.rms_norm import RMSNorm
from minisgl.models.config import ModelConfig
from minisgl.parallel import ParallelGroup
from minisgl.shards import Shard


class Attention:
    """q, k and v in one matmul; q/k norm, rotary embedding and KV store in its launch, their own or attention's; then
    o. A rank computes its heads, and a part of the sum over all."""

    def __init__(self, empty: Empty, config: ModelConfig, window: int, shard: Shard, group: ParallelGroup, ops: Ops):
        self.ops = ops
        self.num_heads, self.head_dim = shard.q_heads.size, config.head_dim
        self.eps = config.rms_norm_eps
        self.window = window
        self.scale = config.head_dim**-0.5
        q, kv = shard.q_heads.times(self.head_dim), shard.kv_heads.times(self.head_dim)
        qkv_parts = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.qkv = Linear(empty, config.hidden_size, qkv_parts, ops, bias=config.qkv_bias)
        self.o = SummedLinear(empty, q, "o_proj", config.hidden_size, group, ops, bias=config.o_bias)
        self.q_norm = empty(self.head_dim) if config.qk_norm else None
        self.k_norm = empty(self.head_dim) if config.qk_norm else None

    def __call__(
        self,
        x: torch.Tensor,
        batch: Batch,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        cos_sin: torch.Tensor,
        residual: torch.Tensor,
    ) -> torch.Tensor | None:
        """x, residual  # [T, hidden] -> what is to be added to the residual, as from `SummedLinear`. Stores the keys
        and values of the batch in this layer's k_cache, v_cache  # [P, page_size, K, D]; cos_sin  # [max_len, D]
        fp32."""
        q = self.heads(x, batch.positions, batch.slots, k_cache, v_cache, cos_sin)
        out = q.new_empty(q.shape)
        decoding = batch.num_decode
        if decoding:
            self.ops.attention_decode(
                q[:decoding],
                k_cache,
                v_cache,
                batch.page_table,
                batch.rows[:decoding],
                batch.kv_lens[:decoding],
                batch.max_decode_len,
                scale=self.scale,
                window=self.window,
                cascade=batch.cascade,
                out=out[:decoding],
            )
        if not batch.decodes_only:
            self.ops.attention_prefill(
                q,
                k_cache,
                v_cache,
                batch.page_table,
                batch.rows[decoding:],
                batch.cu_seqlens,
                batch.kv_lens[decoding:],
                batch.tiles,
                scale=self.scale,
                window=self.window,
                out=out,
            )
        return self.o(out.flatten(1), residual)

    def heads(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        cos_sin: torch.Tensor,
    ) -> torch.Tensor:
        """Of x  # [T, hidden] the queries  # [T, H, D] that attention reads; keys and values are stored."""
        weight, bias, rotary = self.qkv.weight, self.qkv.bias, self._rotary(cos_sin)
        return self.ops.heads(x, weight, bias, positions, slots, k_cache, v_cache, rotary)

    def decode(
        self,
        stream: Stream,
        batch: Batch,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        cos_sin: torch.Tensor,
        arrivals: torch.Tensor,
        norm_after: RMSNorm,
    ) -> Stream:
        """The same for a small batch of decodes alone, added to the stream that `norm_after` reads. `arrivals` is a
        workspace of attention's kernel."""
        qkv = self.qkv.of_stream(stream)
        out = qkv.new_empty(qkv.shape[0], self.num_heads, self.head_dim)
        attention_decode_rotary(
            qkv,
            k_cache,
            v_cache,
            batch.page_table,
            batch.rows,
            batch.kv_lens,
            batch.max_decode_len,
            self._rotary(cos_sin),
            arrivals,
            scale=self.scale,
            window=self.window,
            out=out,
        )
        return self.o.into_stream(stream, out.flatten(1), norm_after)

    def _rotary(self, cos_sin: torch.Tensor) -> Rotary:
        return Rotary(cos_sin, self.q_norm, self.k_norm, self.eps)

    def targets(self) -> dict[str, Target]:
        found = self.qkv.targets() | self.o.targets()
        if self.q_norm is not None and self.k_norm is not None:
            found |= {"q_norm.weight": Target.uncut(self.q_norm), "k_norm.weight": Target.uncut(self.k_norm)}
        return found

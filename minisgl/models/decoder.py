"""The decoder-only transformer of every family: token ids and cached KV in, logits out. Shapes: see `batch.py`.

Knows the order of layers and the residual stream. Does not know files, scheduling or sampling, and keeps no state
between calls: the KV cache is passed.
"""

from collections.abc import Callable
from copy import copy
from functools import partial

import torch

from minisgl.batch import Batch, KVCache
from minisgl.kernels.attention_decode import num_arrivals
from minisgl.kernels.launch import use_triton
from minisgl.kernels.skinny_matmul import Stream, normed_matmul, row_borders
from minisgl.layers import Empty, Target, join
from minisgl.layers.attention import Attention
from minisgl.layers.embedding import Embedding
from minisgl.layers.mlp import MLP
from minisgl.layers.ops import FASTEST, Ops
from minisgl.layers.rms_norm import RMSNorm, SummedRMSNorm
from minisgl.models.config import ModelConfig
from minisgl.models.rope import cos_sin_table
from minisgl.parallel import ParallelGroup
from minisgl.shards import Shard


class DecoderLayer:
    """Attention and MLP, each behind an RMS norm that first adds its input to the residual."""

    def __init__(
        self,
        empty: Empty,
        new_norm: Callable[[], RMSNorm],
        config: ModelConfig,
        window: int,
        shard: Shard,
        group: ParallelGroup,
        ops: Ops,
    ):
        self.attention_norm = new_norm()
        self.attention = Attention(empty, config, window, shard, group, ops)
        self.mlp_norm = new_norm()
        self.mlp = MLP(empty, config, shard, group, ops)

    def decode(
        self,
        stream: Stream,
        batch: Batch,
        keys: torch.Tensor,
        values: torch.Tensor,
        cos_sin: torch.Tensor,
        arrivals: torch.Tensor,
        norm_after: RMSNorm,
    ) -> Stream:
        """The layer for a small batch of decodes, in up to six launches; `norm_after` reads what it returns."""
        stream = self.attention.decode(stream, batch, keys, values, cos_sin, arrivals, self.mlp_norm)
        return self.mlp.decode(stream, norm_after)

    def targets(self) -> dict[str, Target]:
        return join(
            {
                "input_layernorm": self.attention_norm,
                "self_attn": self.attention,
                "post_attention_layernorm": self.mlp_norm,
                "mlp": self.mlp,
            }
        )


class Decoder:
    """The model. Its parameters are uninitialised until `weights.load_weights` fills them.

    max_len: longest text in tokens, the length of the rotary table.
    group: the ranks that hold the model together; each has a `shard` of it, this one alone when none is given.
    ops: the kernels of matmuls and attention.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_len: int,
        group: ParallelGroup | None = None,
        ops: Ops = FASTEST,
    ):
        group = group or ParallelGroup()
        self.config, self.ops = config, ops
        self.shard = shard = Shard.of(config, group.ranks)
        self.device, self.dtype = device, dtype
        empty = partial(torch.empty, device=device, dtype=dtype)
        new_norm: Callable[[], RMSNorm] = partial(RMSNorm, empty, config.hidden_size, config.rms_norm_eps)
        if group.size > 1:
            new_norm = partial(SummedRMSNorm, empty, config.hidden_size, config.rms_norm_eps, group)
        self.embed = Embedding(empty, shard.vocab, shard.first_id, config.hidden_size, group)
        self.layers = [DecoderLayer(empty, new_norm, config, window, shard, group, ops) for window in config.windows]
        self.norm = new_norm()
        self.norms_after = [*(layer.attention_norm for layer in self.layers[1:]), self.norm]  # what reads each layer
        tied = config.tie_word_embeddings
        self.lm_head = self.embed.weight if tied else empty(shard.vocab.size, config.hidden_size)  # [V, hidden]
        # Borders of the decode batches of `_decode`: a residual times a norm's weight may be too large for float16.
        fused = ops.streams and use_triton(self.lm_head) and dtype != torch.float16 and group.sums_into_streams
        self.stream_borders = row_borders(dtype, device) if fused else [0]
        self.cos_sin = cos_sin_table(config.rope, config.head_dim, max_len, device)  # [max_len, D] fp32
        # Where programs of attention meet: one step at a time may run.
        self.arrivals = torch.zeros(num_arrivals(shard.kv_heads.size), dtype=torch.int32, device=device)

    def forward(self, batch: Batch, kv: KVCache) -> torch.Tensor:
        """Store the batch's keys and values in `kv` and return logits  # [N, V] in the model's dtype."""
        small = batch.decodes_only and batch.num_decode <= self.stream_borders[-1]
        return self._decode(batch, kv) if small and batch.cascade is None else self.logits(self.hidden(batch, kv))

    def hidden(self, batch: Batch, kv: KVCache) -> torch.Tensor:
        """Store the batch's keys and values in `kv` and return the normed hidden states of `batch.sample_index`
        # [N, hidden], which `logits` reads.

        Only these tokens get past the last attention: nothing reads the others' hidden states after it. In a step of
        decodes alone they are all tokens.
        """
        residual = self.embed(batch.input_ids)  # [T, hidden]
        x = self.layers[0].attention_norm(residual)
        for layer, norm_after, keys, values in zip(self.layers, self.norms_after, kv.keys, kv.values, strict=True):
            added = layer.attention(x, batch, keys, values, self.cos_sin, residual)
            if norm_after is self.norm and not batch.decodes_only:
                residual = residual.index_select(0, batch.sample_index)  # [N, hidden]
                if added is not None:  # last: it alone may be written by the kernel before the norm
                    added = added.index_select(-2, batch.sample_index)
            added = layer.mlp(layer.mlp_norm.of_sum(added, residual), residual)
            x = norm_after.of_sum(added, residual)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits  # [N, V] of hidden states  # [N, hidden]."""
        return self.ops.linear(hidden, self.lm_head, None)

    def excerpt(self) -> "Decoder":
        """The same model with the first layer of each window and the last: they launch all kernels that it does."""
        windows, short = self.config.windows, copy(self)
        places = sorted({*map(windows.index, windows), len(windows) - 1})
        short.layers = [self.layers[place] for place in places]
        short.norms_after = [self.norms_after[place] for place in places]
        return short

    def run_matmuls(self, num_rows: int, kv: KVCache) -> None:
        """Run each kind of matmul on rows of zeros, and the norms that may find parts of one, so that their kernels for
        so many rows are compiled. `kv` stays as it is."""
        layer = self.layers[0]
        o, down = layer.attention.o, layer.mlp.down
        x, heads, gated = (
            weight.new_zeros(num_rows, weight.shape[1]) for weight in (self.lm_head, o.weight, down.weight)
        )
        self._run_wide_matmuls(x, kv)
        layer.mlp_norm.of_sum(o(heads, x), x)
        self.norms_after[0].of_sum(down(gated, x), x)
        self.logits(x)

    def run_prefill_matmuls(self, most_rows: int, kv: KVCache) -> None:
        """The same for what has kernels of its own for many rows, up to so many."""
        layer = self.layers[0]
        for num_rows in self.ops.prefill_rows(layer.attention.qkv.weight, layer.mlp.gate_up.weight, most_rows):
            self._run_wide_matmuls(self.lm_head.new_zeros(num_rows, self.lm_head.shape[1]), kv)

    def _run_wide_matmuls(self, x: torch.Tensor, kv: KVCache) -> None:
        """Those that read hidden states x  # [T, hidden]."""
        layer = self.layers[0]
        first = torch.zeros(len(x), dtype=torch.int32, device=self.device)
        layer.attention.heads(x, first, torch.full_like(first, -1), kv.keys[0], kv.values[0], self.cos_sin)
        layer.mlp.gate_up.gated(x)

    def _decode(self, batch: Batch, kv: KVCache) -> torch.Tensor:
        """`forward` for a small batch of decodes: norms, gates and additions are part of the matmuls."""
        stream = self.embed.stream(batch.input_ids, self.layers[0].attention_norm)
        for layer, norm_after, keys, values in zip(self.layers, self.norms_after, kv.keys, kv.values, strict=True):
            stream = layer.decode(stream, batch, keys, values, self.cos_sin, self.arrivals, norm_after)
        return normed_matmul(stream, self.lm_head)

    def targets(self) -> dict[str, Target]:
        """Every checkpoint tensor's name and the parameter rows that it fills on this rank."""
        layers = {f"model.layers.{index}": layer for index, layer in enumerate(self.layers)}
        found = join({"model.embed_tokens": self.embed, **layers, "model.norm": self.norm})
        if not self.config.tie_word_embeddings:
            found["lm_head.weight"] = Target(self.lm_head, self.shard.vocab)
        return found

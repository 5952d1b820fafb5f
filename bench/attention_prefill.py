"""Prefill attention: bf16, pages of 64, beside torch's scaled_dot_product_attention on dense keys and values, and the
portable kernel, which is the same one where the architecture has none of its own."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from minisgl.bench.harness import Case
from minisgl.kernels.attention_prefill import (
    attention_prefill,
    attention_prefill_portable,
    prefill_tiles,
    query_block,
)
from minisgl.kernels.paged import shuffled_page_table

PAGE_SIZE = 64
# batch, new tokens, cached tokens, query heads, KV heads, head dim
SHAPES = [
    (16, 1024, 0, 32, 8, 128),
    (8, 2048, 0, 32, 8, 128),
    (4, 4096, 0, 32, 8, 128),
    (2, 8192, 0, 32, 8, 128),
    (1, 16384, 0, 32, 8, 128),
    (4, 4096, 0, 16, 8, 128),
    (4, 4096, 0, 32, 8, 64),
    (1, 2048, 14336, 32, 8, 128),
    (4, 512, 3584, 32, 8, 128),
    (16, 128, 1920, 32, 8, 128),
]


def cases(device: torch.device) -> Iterator[Case]:
    for shape in SHAPES:
        yield _case(*shape, device)


def _case(batch: int, new: int, cached: int, heads: int, kv_heads: int, head_dim: int, device: torch.device) -> Case:
    dtype, scale, kv_len = torch.bfloat16, head_dim**-0.5, new + cached
    kv_lens = [kv_len] * batch
    page_table = shuffled_page_table(kv_lens, PAGE_SIZE, device)
    q = torch.randn(batch * new, heads + 2 * kv_heads, head_dim, device=device, dtype=dtype)[:, :heads]
    k_cache, v_cache = torch.randn(
        2, page_table.numel(), PAGE_SIZE, kv_heads, head_dim, device=device, dtype=dtype
    ).unbind()
    rows = torch.arange(batch, dtype=torch.int32, device=device)
    cu_seqlens = torch.arange(0, batch * new + 1, new, dtype=torch.int32, device=device)
    lens = torch.tensor(kv_lens, dtype=torch.int32, device=device)
    tiles = torch.from_numpy(
        prefill_tiles(np.full(batch, new), np.array(kv_lens), query_block(head_dim, device, dtype))
    ).to(device)
    out = torch.empty(batch * new, heads, head_dim, device=device, dtype=dtype)

    dense_q = torch.randn(batch, heads, new, head_dim, device=device, dtype=dtype)
    k, v = torch.randn(2, batch, heads, kv_len, head_dim, device=device, dtype=dtype).unbind()  # KV heads repeated
    mask = causal_lower_right(new, kv_len) if cached else None

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(dense_q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)

    arguments = (q, k_cache, v_cache, page_table, rows, cu_seqlens, lens, tiles)

    def run() -> None:
        attention_prefill(*arguments, scale=scale, out=out)

    def portable() -> None:
        attention_prefill_portable(*arguments, scale=scale, out=out)

    visible = batch * (new * cached + new * (new + 1) // 2)  # (query, key) pairs
    name = f"{batch} x {new}" + (f" on {cached}" if cached else "") + f", {heads}/{kv_heads} heads of {head_dim}"
    return Case(
        op="attention_prefill",
        shape=name,
        run=run,
        baselines={"torch sdpa, dense": sdpa, "portable": portable},
        bytes_moved=2 * (2 * batch * new * heads + 2 * batch * kv_len * kv_heads) * head_dim,
        flops=4 * heads * head_dim * visible,
    )

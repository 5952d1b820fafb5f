"""Decode attention: bf16, pages of 64, beside torch's scaled_dot_product_attention on dense keys and values."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from minisgl.bench.harness import Case
from minisgl.kernels.attention_decode import attention_decode
from minisgl.kernels.paged import shuffled_page_table

PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM = 64, 32, 8, 128
# batch, context
SHAPES = [(1, 1024), (1, 32768), (8, 4096), (32, 4096), (64, 2048), (128, 1024), (256, 1024), (16, 16384)]


def cases(device: torch.device) -> Iterator[Case]:
    for batch, context in SHAPES:
        yield _case(batch, context, device)


def _case(batch: int, context: int, device: torch.device) -> Case:
    dtype, scale = torch.bfloat16, HEAD_DIM**-0.5
    page_table = shuffled_page_table([context] * batch, PAGE_SIZE, device)
    q = torch.randn(batch, HEADS + 2 * KV_HEADS, HEAD_DIM, device=device, dtype=dtype)[:, :HEADS]
    k_cache, v_cache = torch.randn(
        2, page_table.numel(), PAGE_SIZE, KV_HEADS, HEAD_DIM, device=device, dtype=dtype
    ).unbind()
    rows = torch.arange(batch, dtype=torch.int32, device=device)
    kv_lens = torch.full((batch,), context, dtype=torch.int32, device=device)
    out = torch.empty(batch, HEADS, HEAD_DIM, device=device, dtype=dtype)

    dense_q = q[:, :, None].contiguous()  # [B, H, 1, D]
    k, v = torch.randn(2, batch, KV_HEADS, context, HEAD_DIM, device=device, dtype=dtype).unbind()

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(dense_q, k, v, scale=scale, enable_gqa=True)

    def run() -> None:
        attention_decode(q, k_cache, v_cache, page_table, rows, kv_lens, context, scale=scale, out=out)

    return Case(
        op="attention_decode",
        shape=f"{batch} x {context}, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}",
        run=run,
        baselines={"torch sdpa, dense": sdpa},
        bytes_moved=2 * (2 * batch * HEADS + 2 * batch * context * KV_HEADS) * HEAD_DIM,
        flops=4 * batch * HEADS * HEAD_DIM * context,
    )

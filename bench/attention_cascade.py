"""Splits that rows of one prefix share, in decode attention: bf16, pages of 64, heads of 128; 128 to 256 keys of each
row's own. It pays where it and decode attention of the rows' own keys take less than that of the whole rows."""

from collections.abc import Iterator

import numpy as np
import torch

from minisgl.bench.harness import Case
from minisgl.kernels.attention_cascade import CascadeTiles, attention_cascade, tile_members
from minisgl.kernels.attention_decode import attention_decode
from minisgl.kernels.decode_splits import split_size
from minisgl.kernels.paged import shuffled_page_table

PAGE_SIZE, HEAD_DIM = 64, 128
# prefixes, rows of each, keys of a prefix, query heads, KV heads
SHAPES = [
    (8, 32, 2048, 16, 8),
    (8, 32, 2048, 32, 8),
    (1, 256, 2048, 32, 8),
    (1, 32, 2048, 32, 8),
    (1, 32, 1024, 32, 8),
    (1, 8, 8192, 32, 8),
    (4, 64, 512, 32, 8),
]


def cases(device: torch.device) -> Iterator[Case]:
    for shape in SHAPES:
        yield _case(*shape, device)


def _case(prefixes: int, rows_each: int, prefix: int, heads: int, kv_heads: int, device: torch.device) -> Case:
    dtype, scale, batch = torch.bfloat16, HEAD_DIM**-0.5, prefixes * rows_each
    own = np.random.default_rng(0).integers(128, 257, batch, dtype=np.int32)
    longest, shared_pages = prefix + int(own.max()), prefix // PAGE_SIZE
    page_table = shuffled_page_table([longest] * batch, PAGE_SIZE, device)
    page_table[:, :shared_pages] = page_table[::rows_each, :shared_pages].repeat_interleave(rows_each, 0)
    own_pages = page_table[:, shared_pages:].contiguous()
    q = torch.randn(batch, heads + 2 * kv_heads, HEAD_DIM, device=device, dtype=dtype)[:, :heads]
    k_cache, v_cache = torch.randn(
        2, batch * page_table.shape[1], PAGE_SIZE, kv_heads, HEAD_DIM, device=device, dtype=dtype
    ).unbind()
    rows = torch.arange(batch, dtype=torch.int32, device=device)
    own_lens = torch.from_numpy(own).to(device)
    kv_lens = own_lens + prefix
    out = torch.empty(batch, heads, HEAD_DIM, device=device, dtype=dtype)

    split = split_size(prefix + 128)  # all rows have the same: no prefix is just short of 2048 keys
    splits, members = prefix // split, rows.view(-1, tile_members(heads, kv_heads, dtype))
    tiles = CascadeTiles(torch.full_like(rows, splits), torch.full_like(members[:, 0], splits), members)
    partial = torch.empty(batch, -(-longest // split), heads, HEAD_DIM, device=device)
    logsumexp = torch.empty(partial.shape[:3], device=device)

    def run() -> None:
        attention_cascade(q, k_cache, v_cache, page_table, rows, kv_lens, tiles, partial, logsumexp, scale=scale)

    def own_keys() -> None:
        attention_decode(q, k_cache, v_cache, own_pages, rows, own_lens, int(own.max()), scale=scale, out=out)

    def whole_rows() -> None:
        attention_decode(q, k_cache, v_cache, page_table, rows, kv_lens, longest, scale=scale, out=out)

    pairs = batch * heads * splits  # of a query head and a split
    return Case(
        op="attention_cascade",
        shape=f"{prefixes} x {rows_each} rows on {prefix}, {heads}/{kv_heads} heads of {HEAD_DIM}",
        run=run,
        baselines={"decode, own keys": own_keys, "decode, whole rows": whole_rows},
        bytes_moved=2 * batch * heads * HEAD_DIM + 4 * prefixes * prefix * kv_heads * HEAD_DIM + 4 * pairs * HEAD_DIM,
        flops=4 * pairs * split * HEAD_DIM,
    )

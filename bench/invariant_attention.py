"""The attention of `--deterministic`, decode and prefill, beside the kernels that it replaces: bf16, pages of 64."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate

import numpy as np
import torch

from minisgl.bench.harness import Case
from minisgl.bench.tuning import Tuning
from minisgl.kernels.attention_decode import attention_decode
from minisgl.kernels.attention_prefill import attention_prefill, attention_prefill_reference, prefill_tiles
from minisgl.kernels.attention_prefill import query_block as replaced_query_block
from minisgl.kernels.invariant_attention import TILES, Tile, query_block
from minisgl.kernels.invariant_decode import invariant_decode
from minisgl.kernels.invariant_prefill import invariant_prefill
from minisgl.kernels.paged import shuffled_page_table

PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM = 64, 32, 8, 128
# sequences, new tokens, cached tokens
DECODES = [(1, 1023), (1, 32767), (8, 4095), (32, 4095), (64, 2047), (256, 511), (256, 1023), (16, 16383)]
PREFILLS = [(16, 1024, 0), (4, 4096, 0), (1, 16384, 0), (1, 2048, 14336), (4, 512, 3584), (16, 128, 1920)]


def cases(device: torch.device) -> Iterator[Case]:
    for batch, cached in DECODES:
        step = _Step([1] * batch, [cached + 1] * batch, HEAD_DIM, device)
        yield Case(
            op="invariant_attention",
            shape=f"decode, {batch} x {cached + 1}",
            run=step.decode(invariant_decode),
            baselines={"attention_decode": step.decode(attention_decode)},
            bytes_moved=2 * (2 * batch * HEADS + 2 * batch * (cached + 1) * KV_HEADS) * HEAD_DIM,
            flops=4 * batch * HEADS * HEAD_DIM * (cached + 1),
        )
    for batch, new, cached in PREFILLS:
        step = _Step([new] * batch, [new + cached] * batch, HEAD_DIM, device)
        visible = batch * (new * cached + new * (new + 1) // 2)  # (query, key) pairs
        block = replaced_query_block(HEAD_DIM, device, torch.bfloat16)
        yield Case(
            op="invariant_attention",
            shape=f"prefill, {batch} x {new}" + (f" on {cached}" if cached else ""),
            run=step.prefill(),
            baselines={"attention_prefill": step.prefill(attention_prefill, block)},
            bytes_moved=2 * batch * (2 * new * HEADS + 2 * (new + cached) * KV_HEADS) * HEAD_DIM,
            flops=4 * HEADS * HEAD_DIM * visible,
        )


class _Step:
    """Random arguments of a launch for sequences of these lengths; `out` is poisoned."""

    def __init__(self, new_lens: list[int], kv_lens: list[int], head_dim: int, device: torch.device) -> None:
        self.lens = np.array(new_lens), np.array(kv_lens)
        tokens, dtype = sum(new_lens), torch.bfloat16
        self.q = torch.randn(tokens, HEADS + 2 * KV_HEADS, head_dim, device=device, dtype=dtype)[:, :HEADS]
        pages = sum(-(-length // PAGE_SIZE) for length in kv_lens)
        self.k_cache, self.v_cache = torch.randn(
            2, pages, PAGE_SIZE, KV_HEADS, head_dim, device=device, dtype=dtype
        ).unbind()
        self.page_table = shuffled_page_table(kv_lens, PAGE_SIZE, device)
        self.rows = torch.arange(len(kv_lens), dtype=torch.int32, device=device)
        self.cu_seqlens = torch.tensor([0, *accumulate(new_lens)], dtype=torch.int32, device=device)
        self.kv_lens = torch.tensor(kv_lens, dtype=torch.int32, device=device)
        self.out = torch.full((tokens, HEADS, head_dim), float("nan"), device=device, dtype=dtype)

    def decode(self, kernel: Callable[..., None] = invariant_decode) -> Callable[[], None]:
        arguments = (
            self.q,
            self.k_cache,
            self.v_cache,
            self.page_table,
            self.rows,
            self.kv_lens,
            int(self.lens[1].max()),
        )
        return lambda: kernel(*arguments, scale=self.q.shape[2] ** -0.5, out=self.out)

    def prefill(self, kernel: Callable[..., None] = invariant_prefill, block: int = 0) -> Callable[[], None]:
        """A launch with tiles of `block` queries; 0: what the table has now."""
        block = block or query_block(self.q.shape[2], self.q.device, self.q.dtype)
        tiles = torch.from_numpy(prefill_tiles(*self.lens, block)).to(self.q.device)
        arguments = (
            self.q,
            self.k_cache,
            self.v_cache,
            self.page_table,
            self.rows,
            self.cu_seqlens,
            self.kv_lens,
            tiles,
        )
        return lambda: kernel(*arguments, scale=self.q.shape[2] ** -0.5, out=self.out)

    def error(self) -> float:
        """The largest error of a prefill, relative to the largest value of the float64 reference; infinite if the last
        tokens have other bits in a decode."""
        index = (self.page_table, self.rows, self.cu_seqlens, self.kv_lens)
        q, k_cache, v_cache = (x.double() for x in (self.q, self.k_cache, self.v_cache))
        expected = attention_prefill_reference(q, k_cache, v_cache, *index, scale=self.q.shape[2] ** -0.5)
        self.out.fill_(float("nan"))
        self.prefill()()
        last = self.cu_seqlens[1:].long() - 1
        decoded = torch.full_like(self.out[last], float("nan"))
        lens = self.kv_lens, int(self.lens[1].max())
        arguments = (self.q[last], self.k_cache, self.v_cache, self.page_table, self.rows, *lens)
        invariant_decode(*arguments, scale=self.q.shape[2] ** -0.5, out=decoded)
        if not torch.equal(decoded, self.out[last]):
            return float("inf")
        return float((self.out.double() - expected).abs().max() / expected.abs().max())


CANDIDATES = [
    *(Tile(64, 64, 4, stages, tma) for stages in (2, 3) for tma in (True, False)),
    Tile(64, 64, 4, 4, tma=True),
    *(Tile(64, 32, 4, stages, tma=True) for stages in (3, 4)),
    *(Tile(128, 64, 8, stages, tma=True) for stages in (2, 3)),
    Tile(128, 128, 8, 2, tma=True),
]
ODD_LENS = [1, 63, 200, 321], [130, 63, 333, 1100]  # new, and with the cached ones


def tunings(device: torch.device) -> Iterator[Tuning]:
    """Tiles by head dim: one for both launches, since their sums have to be the same."""
    for head_dim in (128, 64, 256):

        def step(new: int, cached: int, batch: int, head_dim: int = head_dim) -> _Step:
            return _Step([new] * batch, [new + cached] * batch, head_dim, device)

        decodes = {
            f"{batch} x {cached + 1}": step(1, cached, batch).decode for batch, cached in ((256, 1023), (8, 4095))
        }
        prefills = {
            f"{batch} x {new} on {cached}": step(new, cached, batch).prefill
            for batch, new, cached in ((16, 1024, 0), (4, 512, 3584))
        }
        yield Tuning(
            op="invariant_attention",
            bucket=head_dim,
            table=TILES,
            tiles=CANDIDATES,
            error=partial(_Step(*ODD_LENS, head_dim, device).error),
            trials={**decodes, **prefills},
            in_graph=True,
        )

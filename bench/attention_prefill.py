"""Prefill attention: bf16, pages of 64, beside what attention_baselines.py knows, and the portable kernel, which is
the same one where the architecture has none of its own."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, product

import numpy as np
import torch

from minisgl.bench.attention_baselines import dense_prefill, paged_prefill
from minisgl.bench.harness import Case
from minisgl.bench.tuning import Tuning
from minisgl.kernels.attention_prefill import (
    TILES,
    Tile,
    attention_prefill,
    attention_prefill_portable,
    attention_prefill_reference,
    prefill_tiles,
    query_block,
)
from minisgl.kernels.launch import architecture
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
    kv_len, scale = new + cached, head_dim**-0.5
    step = _Step([new] * batch, [kv_len] * batch, heads, kv_heads, head_dim, device, torch.bfloat16)
    visible = batch * (new * cached + new * (new + 1) // 2)  # (query, key) pairs
    name = f"{batch} x {new}" + (f" on {cached}" if cached else "") + f", {heads}/{kv_heads} heads of {head_dim}"
    paged = paged_prefill(step.q, step.k_cache, step.v_cache, step.page_table, step.cu_seqlens, step.kv_lens, scale)
    return Case(
        op="attention_prefill",
        shape=name,
        run=step.launch(attention_prefill),
        baselines={
            "portable": step.launch(attention_prefill_portable),
            **dense_prefill(batch, new, cached, heads, kv_heads, head_dim, scale, device),
            **paged,
        },
        bytes_moved=2 * (2 * batch * new * heads + 2 * batch * kv_len * kv_heads) * head_dim,
        flops=4 * heads * head_dim * visible,
    )


class _Step:
    """Random arguments of `attention_prefill` for sequences of these lengths; `out` is poisoned."""

    def __init__(
        self,
        new_lens: list[int],
        kv_lens: list[int],
        heads: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.lens = np.array(new_lens), np.array(kv_lens)
        tokens = sum(new_lens)
        self.q = torch.randn(tokens, heads + 2 * kv_heads, head_dim, device=device, dtype=dtype)[:, :heads]
        self.page_table = shuffled_page_table(kv_lens, PAGE_SIZE, device)
        pages = sum(-(-length // PAGE_SIZE) for length in kv_lens)
        self.k_cache, self.v_cache = torch.randn(
            2, pages, PAGE_SIZE, kv_heads, head_dim, device=device, dtype=dtype
        ).unbind()
        self.rows = torch.arange(len(kv_lens), dtype=torch.int32, device=device)
        self.cu_seqlens = torch.tensor([0, *accumulate(new_lens)], dtype=torch.int32, device=device)
        self.kv_lens = torch.tensor(kv_lens, dtype=torch.int32, device=device)
        self.out = torch.full((tokens, heads, head_dim), float("nan"), device=device, dtype=dtype)

    def launch(self, kernel: Callable[..., None]) -> Callable[[], None]:
        """A launch of `kernel` with the tile that the table names now."""
        head_dim = self.q.shape[2]
        tiles = prefill_tiles(*self.lens, query_block(head_dim, self.q.device, self.q.dtype))
        arguments = (self.q, self.k_cache, self.v_cache, self.page_table, self.rows, self.cu_seqlens, self.kv_lens)
        places = torch.from_numpy(tiles).to(self.q.device)
        return lambda: kernel(*arguments, places, scale=head_dim**-0.5, out=self.out)

    def error(self, kernel: Callable[..., None]) -> float:
        """The largest error of a launch, relative to the largest value of the float64 reference."""
        q, k_cache, v_cache = (x.double() for x in (self.q, self.k_cache, self.v_cache))
        index = (self.page_table, self.rows, self.cu_seqlens, self.kv_lens)
        expected = attention_prefill_reference(q, k_cache, v_cache, *index, scale=self.q.shape[2] ** -0.5)
        self.out.fill_(float("nan"))
        self.launch(kernel)()
        return float((self.out.double() - expected).abs().max() / expected.abs().max())


# Sequences that start, end and are cached at odd places: what a wrong mask or a page past the end shows in.
ODD_LENS = [1, 63, 200, 321], [130, 63, 333, 1000]  # new, and with the cached ones
TRIALS = ((16, 1024, 0), (4, 4096, 0), (1, 16384, 0), (4, 512, 3584))  # batch, new, cached


def tunings(
    device: torch.device,
    trials: Sequence[tuple[int, int, int]] = TRIALS,
    kernel: Callable[..., None] = attention_prefill_portable,
) -> Iterator[Tuning]:
    """Tiles of the portable kernel, by head dim. On sm_90 its queries are given up to 128 dims: the kernel of that
    architecture has tiles of 128, and both work through one list."""
    for head_dim in (64, 128, 256):

        def step(new: list[int], kv: list[int], head_dim: int = head_dim) -> _Step:
            return _Step(new, kv, 32, 8, head_dim, device, torch.bfloat16)

        shared_list = architecture(device) == "sm_90" and head_dim <= 128
        sizes = product((128,) if shared_list else (64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
        tiles = [Tile(*size) for size in sizes]
        if torch.version.cuda:  # registers such that two programs fit a multiprocessor
            tiles += [tile._replace(max_registers=128) for tile in tiles if tile.num_warps == 8]
        yield Tuning(
            op="attention_prefill",
            bucket=head_dim,
            table=TILES,
            tiles=tiles,
            error=partial(step(*ODD_LENS).error, kernel),
            trials={
                f"{batch} x {new}" + (f" on {cached}" if cached else ""): partial(
                    step([new] * batch, [new + cached] * batch).launch, kernel
                )
                for batch, new, cached in trials
            },
            in_graph=False,
        )

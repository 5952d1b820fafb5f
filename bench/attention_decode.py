"""Decode attention: bf16, pages of 64, beside torch's scaled_dot_product_attention on dense keys and values, and the
paged kernels of attention_baselines.py."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from minisgl.bench.attention_baselines import paged_decode
from minisgl.bench.harness import Case
from minisgl.bench.tuning import Tuning
from minisgl.kernels.attention_decode import attention_decode, attention_decode_reference
from minisgl.kernels.decode_splits import TILES, Tile
from minisgl.kernels.paged import shuffled_page_table

PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM = 64, 32, 8, 128
# batch, context
SHAPES = [(1, 1024), (1, 32768), (8, 4096), (32, 4096), (64, 2048), (128, 1024), (256, 1024), (16, 16384)]
# batch, shortest and longest context, as evenly spread as requests that decode for a while; no dense batch is like that
MIXED = [(256, 100, 1124), (128, 560, 1584), (48, 860, 1884)]


def cases(device: torch.device) -> Iterator[Case]:
    for batch, context in SHAPES:
        dense_q = torch.randn(batch, HEADS, 1, HEAD_DIM, device=device, dtype=torch.bfloat16)
        k, v = torch.randn(2, batch, KV_HEADS, context, HEAD_DIM, device=device, dtype=torch.bfloat16).unbind()
        sdpa = partial(F.scaled_dot_product_attention, dense_q, k, v, enable_gqa=True)
        yield _case(str(context), [context] * batch, {"torch sdpa, dense": sdpa}, device)
    for batch, shortest, longest in MIXED:
        kv_lens = np.linspace(longest, shortest, batch).astype(int).tolist()
        yield _case(f"{shortest} to {longest}", kv_lens, {}, device)


def _case(name: str, kv_lens: list[int], baselines: dict[str, Callable[[], object]], device: torch.device) -> Case:
    step = _Step(kv_lens, HEAD_DIM, device)
    batch, keys = len(kv_lens), sum(kv_lens)
    paged = paged_decode(step.q, step.k_cache, step.v_cache, step.page_table, step.kv_lens, HEAD_DIM**-0.5)
    return Case(
        op="attention_decode",
        shape=f"{batch} x {name}, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}",
        run=step.launch(),
        baselines={**baselines, **paged},
        bytes_moved=2 * (2 * batch * HEADS + 2 * keys * KV_HEADS) * HEAD_DIM,
        flops=4 * keys * HEADS * HEAD_DIM,
    )


class _Step:
    """Random arguments of `attention_decode` for sequences of these lengths; `out` is poisoned."""

    def __init__(self, kv_lens: list[int], head_dim: int, device: torch.device) -> None:
        batch, dtype = len(kv_lens), torch.bfloat16
        self.longest = max(kv_lens)
        self.q = torch.randn(batch, HEADS + 2 * KV_HEADS, head_dim, device=device, dtype=dtype)[:, :HEADS]
        self.page_table = shuffled_page_table(kv_lens, PAGE_SIZE, device)
        pages = sum(-(-length // PAGE_SIZE) for length in kv_lens)
        self.k_cache, self.v_cache = torch.randn(
            2, pages, PAGE_SIZE, KV_HEADS, head_dim, device=device, dtype=dtype
        ).unbind()
        self.rows = torch.arange(batch, dtype=torch.int32, device=device)
        self.kv_lens = torch.tensor(kv_lens, dtype=torch.int32, device=device)
        self.out = torch.full((batch, HEADS, head_dim), float("nan"), device=device, dtype=dtype)

    def launch(self) -> Callable[[], None]:
        arguments = (self.q, self.k_cache, self.v_cache, self.page_table, self.rows, self.kv_lens, self.longest)
        return lambda: attention_decode(*arguments, scale=self.q.shape[2] ** -0.5, out=self.out)

    def error(self) -> float:
        """The largest error of a launch, relative to the largest value of the float64 reference."""
        q, k_cache, v_cache = (x.double() for x in (self.q, self.k_cache, self.v_cache))
        index = (self.page_table, self.rows, self.kv_lens)
        expected = attention_decode_reference(q, k_cache, v_cache, *index, scale=self.q.shape[2] ** -0.5)
        self.out.fill_(float("nan"))
        self.launch()()
        return float((self.out.double() - expected).abs().max() / expected.abs().max())


ODD_LENS = [1, 63, 257, 1000, 2049, 3001]  # both sizes of splits, and last blocks that are not full
TRIALS = ((1, 4096), (32, 1024), (256, 1024), (16, 16384))  # batch, context


def tunings(device: torch.device, trials: Sequence[tuple[int, int]] = TRIALS) -> Iterator[Tuning]:
    """Tiles by head dim."""
    for head_dim in (64, 128, 256):
        yield Tuning(
            op="attention_decode",
            bucket=head_dim,
            table=TILES,
            tiles=[Tile(*tile) for tile in product((32, 64, 128), (2, 4, 8), (2, 3, 4))],
            error=_Step(ODD_LENS, head_dim, device).error,
            trials={f"{b} x {context}": _Step([context] * b, head_dim, device).launch for b, context in trials},
            in_graph=True,
        )

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch

from minisgl.kernels import attention_prefill as module
from minisgl.kernels import attention_prefill_sm90 as sm90
from minisgl.kernels import launch
from minisgl.kernels.attention_prefill import (
    attention_prefill,
    attention_prefill_portable,
    attention_prefill_reference,
    prefill_tiles,
    query_block,
)
from minisgl.kernels.paged import shuffled_page_table, store_in_pages
from tests.kernels.ordered_dot import ordered_dot  # noqa: F401 (a fixture)

HAS_SM90 = torch.cuda.is_available() and launch.architecture(torch.device("cuda", 0)) == "sm_90"


class Problem(NamedTuple):
    """Arguments of a launch. Slots without a key are NaN, and page-table entries without a page are -1."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    rows: torch.Tensor
    cu_seqlens: torch.Tensor
    kv_lens: torch.Tensor
    dense: list[tuple[torch.Tensor, torch.Tensor]]  # keys, values of each sequence  # [kv_len, K, D]

    def launch(self, window: int = 0, kernel: Callable[..., None] = attention_prefill) -> torch.Tensor:
        out = torch.full(self.q.shape, float("nan"), dtype=self.q.dtype, device=self.q.device)
        head_dim, device = self.q.shape[2], self.q.device
        lens = self.kv_lens.cpu().numpy()
        tiles = prefill_tiles(self.cu_seqlens.cpu().diff().numpy(), lens, query_block(head_dim, device, self.q.dtype))
        unused = np.full((3, 2), 1 << 20, np.int32)  # as in a captured step
        tiles = torch.from_numpy(np.concatenate([tiles, unused])).to(device)
        options = {"window": window} if window else {}
        kernel(*self[:7], tiles, scale=head_dim**-0.5, out=out, **options)
        return out

    def part(self, begin: int, end: int, kv_len: int, sequence: int = 0) -> "Problem":
        """Tokens begin..end-1, of one sequence, alone, when it has so many keys."""
        return self._replace(
            q=self.q[begin:end],
            rows=self.rows[sequence : sequence + 1],
            cu_seqlens=torch.tensor([0, end - begin], dtype=torch.int32, device=self.q.device),
            kv_lens=torch.tensor([kv_len], dtype=torch.int32, device=self.q.device),
        )

    def alone(self) -> Iterator[tuple[slice, "Problem"]]:
        """Each sequence by itself, and where its tokens are."""
        ends, kv_lens = self.cu_seqlens.tolist(), self.kv_lens.tolist()
        for sequence, (begin, end) in enumerate(pairwise(ends)):
            yield slice(begin, end), self.part(begin, end, kv_lens[sequence], sequence)

    def expected(self, window: int = 0) -> torch.Tensor:
        """In float64, from the pages."""
        q, k_cache, v_cache = (x.double() for x in self[:3])
        return attention_prefill_reference(q, k_cache, v_cache, *self[3:7], scale=q.shape[2] ** -0.5, window=window)


def make_problem(
    query_lens: list[int],
    cached_lens: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Problem:
    kv_lens = [new + cached for new, cached in zip(query_lens, cached_lens, strict=True)]
    tokens = sum(query_lens)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, device=device, dtype=dtype)
    dense = [torch.randn(2, kv_len, kv_heads, head_dim, device=device, dtype=dtype) for kv_len in kv_lens]
    table = shuffled_page_table(kv_lens, page_size, device)
    k_cache, v_cache = (store_in_pages([kv[i] for kv in dense], table, page_size) for i in range(2))
    rows = torch.randperm(len(kv_lens) + 3, device=device)[: len(kv_lens)].int()
    page_table = torch.full((len(kv_lens) + 3, table.shape[1] + 1), -1, dtype=torch.int32, device=device)
    page_table[rows, :-1] = table
    return Problem(
        q=qkv[:, :heads],
        k_cache=k_cache,
        v_cache=v_cache,
        page_table=page_table,
        rows=rows,
        cu_seqlens=torch.tensor(np.cumsum([0, *query_lens]), dtype=torch.int32, device=device),
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
        dense=[(kv[0], kv[1]) for kv in dense],
    )


@pytest.mark.parametrize("window", [0, 1, 50])
def test_reference_is_dense_causal_attention(device, window):
    problem = make_problem([5, 1, 70], [0, 33, 20], 6, 2, 16, 16, device, torch.float64)
    out = problem.expected(window)
    for s, (k, v) in enumerate(problem.dense):
        begin, end = problem.cu_seqlens[s], problem.cu_seqlens[s + 1]
        for t in range(begin, end):
            place = len(k) - int(end) + t
            seen = slice(max(place - window + 1, 0) if window else 0, place + 1)
            for head in range(6):
                weights = (k[seen, head // 3] @ problem.q[t, head] * 16**-0.5).softmax(0)
                torch.testing.assert_close(out[t, head], weights @ v[seen, head // 3])


@pytest.mark.parametrize(
    "query_lens, cached_lens, heads, kv_heads, head_dim, page_size",
    [
        ([1, 63, 64, 65, 2], [0, 0, 0, 0, 0], 4, 2, 64, 16),
        ([1, 40, 33, 7], [100, 0, 31, 250], 3, 1, 80, 64),
        ([65, 1, 31], [63, 64, 129], 5, 1, 96, 32),
        ([96, 32, 1], [0, 64, 255], 2, 2, 128, 256),
        ([33, 20], [17, 150], 7, 1, 256, 128),
        ([90], [5], 12, 1, 16, 16),
        ([1000], [0], 1, 1, 64, 64),
    ],
)
def test_matches_float64(device, dtype, assert_close, query_lens, cached_lens, heads, kv_heads, head_dim, page_size):
    problem = make_problem(query_lens, cached_lens, heads, kv_heads, head_dim, page_size, device, dtype)
    assert_close(problem.launch(), problem.expected())


@pytest.mark.parametrize("window", [1, 7, 32, 33, 100, 5000])
@pytest.mark.parametrize("page_size", [16, 64])
def test_sliding_window(device, dtype, assert_close, window, page_size):
    problem = make_problem([130, 1, 40], [0, 300, 111], 2, 1, 64, page_size, device, dtype)
    out = problem.launch(window)
    assert_close(out, problem.expected(window))
    if window <= 100:  # the window is seen to matter
        assert not torch.allclose(out.double(), problem.expected(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("page_size", [16, 64])
def test_keys_before_the_window_are_never_read(device, dtype, assert_close, page_size):
    """Their pages may have been given away: the ids are garbage, and so is what lies there."""
    problem = make_problem([40], [300], 2, 1, 64, page_size, device, dtype)
    expected = problem.expected(window=20)
    first_seen = 300 - 20 + 1
    row = int(problem.rows[0])
    for key in range(first_seen):
        page = int(problem.page_table[row, key // page_size])
        problem.k_cache[page, key % page_size] = float("nan")
        problem.v_cache[page, key % page_size] = float("nan")
    problem.page_table[row, : first_seen // page_size] = -(2**30)
    assert_close(problem.launch(window=20), expected)


@pytest.mark.usefixtures("ordered_dot")
def test_a_prompt_in_chunks_is_the_whole_prompt(device, dtype):
    """Bit for bit, with the portable kernel: a prompt's chunks depend on what else is in the steps that compute them.
    `test_chunks_do_not_change_a_bit` has both kernels."""
    problem = make_problem([150], [0], 2, 1, 64, 16, device, dtype)
    whole = problem.launch(kernel=attention_prefill_portable)
    for begin, end in ((0, 37), (37, 101), (101, 150)):
        chunk = problem.part(begin, end, kv_len=end)
        assert torch.equal(chunk.launch(kernel=attention_prefill_portable), whole[begin:end])


def test_a_sequence_does_not_depend_on_its_neighbours(device, dtype):
    query_lens = [70, 1, 33, 64]
    problem = make_problem(query_lens, [0, 90, 45, 7], 2, 1, 64, 16, device, dtype)
    together = problem.launch()
    for tokens, alone in problem.alone():
        assert torch.equal(alone.launch(), together[tokens])


def test_tokens_of_no_sequence_are_not_written(device, dtype, assert_close):
    problem = make_problem([40, 9], [0, 30], 2, 1, 64, 16, device, dtype)
    padded = problem._replace(q=torch.cat([problem.q, torch.full_like(problem.q[:5], float("nan"))]))
    out = padded.launch()
    assert_close(out[:49], problem.expected())
    assert out[49:].isnan().all()


def test_cpu_tensors_run_the_reference(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", False)
    problem = make_problem([40, 9], [0, 30], 6, 2, 64, 16, torch.device("cpu"), torch.float32)
    expected = attention_prefill_reference(*problem[:7], scale=64**-0.5, window=8)
    assert torch.equal(problem.launch(window=8), expected)


def test_tiles_cover_each_query_once_heaviest_first():
    rng = np.random.default_rng(0)
    for block in (32, 128):
        query_lens = rng.integers(0, 400, size=20)
        kv_lens = query_lens + rng.integers(0, 400, size=20)
        header, *tiles = prefill_tiles(query_lens, kv_lens, block)
        assert tiles[0].dtype == np.int32 and header.tolist() == [len(tiles), 0]
        assert sorted((s, i) for s, i in tiles) == [
            (s, i) for s, query_len in enumerate(query_lens) for i in range(-(-query_len // block))
        ]
        ends = [kv_lens[s] - query_lens[s] + min((i + 1) * block, query_lens[s]) for s, i in tiles]
        assert ends == sorted(ends, reverse=True)
    assert prefill_tiles([], [], 32).tolist() == [[0, 0]]


@pytest.mark.parametrize("arch", module.TILES)
def test_every_architecture_has_a_tile_of_each_size(arch, monkeypatch):
    monkeypatch.setattr(module, "architecture", lambda device: arch)
    for head_dim in (16, 64, 80, 96, 128, 256):
        assert query_block(head_dim, torch.device("cpu"), torch.bfloat16) in (32, 64, 128)


def test_both_kernels_of_hopper_have_the_same_tiles(monkeypatch):
    monkeypatch.setattr(module, "architecture", lambda device: "sm_90")
    for head_dim in sm90.STAGES:
        for element in (torch.bfloat16, torch.float16):
            assert query_block(head_dim, torch.device("cpu"), element) == sm90.BLOCK_M.value


def test_what_the_kernel_of_hopper_takes():
    def fits(dtype=torch.bfloat16, head_dim=128, page_size=64, window=0, skip=0):
        qkv = torch.empty(5 * 12 * head_dim + skip, dtype=dtype)[skip:].view(5, 12, head_dim)
        cache = torch.empty(3, page_size, 2, head_dim, dtype=dtype)
        return sm90.fits(qkv[1:, :8], cache, cache, window)

    assert all(fits(page_size=page_size) for page_size in (16, 32, 64, 128, 256))
    assert fits(dtype=torch.float16, head_dim=64)
    assert not fits(dtype=torch.float32)
    assert not any(fits(head_dim=head_dim) for head_dim in (16, 80, 96, 256))
    assert not fits(page_size=8)
    assert not fits(window=100)
    assert not fits(skip=1)  # TMA needs 16 bytes


@pytest.mark.parametrize(
    "name, change",
    [
        ("q", lambda a: a.update(q=a["q"][0])),
        ("q", lambda a: a.update(q=a["q"].transpose(0, 1))),
        ("q", lambda a: a.update(q=a["q"][:, :, :20])),
        ("k_cache", lambda a: a.update(k_cache=a["k_cache"].half())),
        ("k_cache", lambda a: a.update(k_cache=a["k_cache"][:, :12])),
        ("k_cache", lambda a: a.update(k_cache=a["k_cache"].transpose(1, 2).contiguous().transpose(1, 2))),
        ("k_cache", lambda a: a.update(k_cache=a["k_cache"].repeat(1, 1, 2, 1)[:, :, :3])),
        ("v_cache", lambda a: a.update(v_cache=a["v_cache"][:-1])),
        ("page_table", lambda a: a.update(page_table=a["page_table"].long())),
        ("page_table", lambda a: a.update(page_table=a["page_table"][:, ::2])),
        ("rows", lambda a: a.update(rows=a["rows"][None])),
        ("cu_seqlens", lambda a: a.update(cu_seqlens=a["cu_seqlens"][:-1])),
        ("kv_lens", lambda a: a.update(kv_lens=a["kv_lens"][:-1])),
        ("tiles", lambda a: a.update(tiles=a["tiles"].flatten())),
        ("scale", lambda a: a.update(scale=0.0)),
        ("window", lambda a: a.update(window=-1)),
        ("out", lambda a: a.update(out=a["out"][:-1])),
        ("out", lambda a: a.update(out=a["out"].double())),
    ],
)
def test_refuses_bad_arguments(device, name, change):
    problem = make_problem([40, 9], [0, 30], 4, 2, 64, 16, device, torch.float32)
    arguments = problem._asdict()
    del arguments["dense"]
    block = query_block(64, device, torch.float32)
    arguments.update(
        tiles=torch.from_numpy(prefill_tiles([40, 9], [40, 39], block)).to(device),
        scale=0.125,
        window=0,
        out=torch.empty(problem.q.shape, device=device),
    )
    attention_prefill(**arguments)
    change(arguments)
    with pytest.raises(ValueError, match=f"^{name}:"):
        attention_prefill(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("window", [0, 1000])
def test_every_tile_on_long_contexts(device, dtype, assert_close, page_size, head_dim, window):
    """Random data at scale finds wrong matmul fragments that short runs through the interpreter cannot."""
    problem = make_problem([700, 129, 1], [20_000, 3000, 5000], 8, 2, head_dim, page_size, device, dtype)
    out = problem.launch(window)
    assert_close(out, problem.expected(window))
    assert torch.equal(out, problem.launch(window))


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device, assert_close):
    problem = make_problem([300], [500], 8, 8, 128, 64, device, torch.bfloat16)
    expected = problem.expected()
    first_page = 2**31 // (64 * 8 * 128)
    far = [torch.empty(first_page + len(c), *c.shape[1:], device=device, dtype=c.dtype) for c in problem[1:3]]
    for cache, near in zip(far, problem[1:3], strict=True):
        cache[first_page:] = near
    page_table = torch.where(problem.page_table >= 0, problem.page_table + first_page, -1)
    assert_close(problem._replace(k_cache=far[0], v_cache=far[1], page_table=page_table).launch(), expected)


@pytest.mark.gpu
def test_index_alignment_does_not_recompile(device, kernel, jit_function):
    problem = make_problem([40, 9, 3], [0, 30, 3], 2, 1, 64, 16, device, torch.float16)
    problem.launch(kernel=kernel)
    cache = jit_function.device_caches[torch.cuda.current_device()][0]
    before = len(cache)
    assert before
    tail = problem._replace(
        q=problem.q[40:],
        rows=problem.rows[1:],
        cu_seqlens=problem.cu_seqlens[1:] - 40,
        kv_lens=problem.kv_lens[1:],
        page_table=problem.page_table[:, :-1].contiguous(),
    )
    tail.launch(kernel=kernel)
    assert len(cache) == before


# Hopper's kernel and the portable one, each called by name: the dispatch is not trusted to reach both.


@pytest.fixture(params=["portable", "sm_90"])
def kernel(request: pytest.FixtureRequest) -> Callable[..., None]:
    if request.param == "portable":
        return attention_prefill_portable
    if not HAS_SM90:
        pytest.skip("needs an sm_90 GPU")
    return sm90.attention_prefill_sm90


@pytest.fixture
def jit_function(kernel):
    portable = kernel is attention_prefill_portable
    return module._attention_prefill_kernel if portable else sm90._attention_prefill_sm90


def assert_each_row_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    """By token and head: the rows of long contexts are small, and a norm over all would not see them."""
    error = (out.double() - expected).norm(dim=2) / expected.norm(dim=2)
    # About 4 times what bf16 and fp16 weights and outputs leave on average.
    limit = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[out.dtype]
    assert error.max() <= limit, f"relative error {error.max():.2e} at {divmod(int(error.argmax()), out.shape[1])}"


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("element", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (5, 5), (7, 1)])
def test_ragged_ends(device, kernel, element, head_dim, page_size, heads, kv_heads):
    """Ends of queries and of keys before, on and behind those of a tile, a block and a page; unused slots are NaN."""
    ends = [(1, 0), (127, 0), (128, 0), (129, 0), (257, 0), (1, 1), (1, 126), (1, 127), (1, 128), (1, 255), (1, 256)]
    ends += [
        (2, 126),
        (128, 64),
        (128, 127),
        (130, 1),
        (255, 1),
        (64, 1000),
        (257, 17),
        (300, 511),
        (31, 513),
        (16, 15),
    ]
    query_lens, cached_lens = zip(*ends, strict=True)
    problem = make_problem([*query_lens], [*cached_lens], heads, kv_heads, head_dim, page_size, device, element)
    out = problem.launch(kernel=kernel)
    assert_each_row_close(out, problem.expected())
    assert torch.equal(out, problem.launch(kernel=kernel))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("max_query_len, max_cached_len", [(3, 100), (600, 0), (200, 1500)])
def test_many_tiles_for_each_program(device, kernel, head_dim, page_size, max_query_len, max_cached_len):
    """Turns of one block and of many, in every order: the barriers' phases go on from tile to tile."""
    rng = np.random.default_rng(0)
    query_lens = rng.integers(1, max_query_len + 1, size=200).tolist()
    cached_lens = rng.integers(0, max_cached_len + 1, size=200).tolist()
    problem = make_problem(query_lens, cached_lens, 8, 2, head_dim, page_size, device, torch.bfloat16)
    out = problem.launch(kernel=kernel)
    assert_each_row_close(out, problem.expected())
    for _ in range(20):
        assert torch.equal(out, problem.launch(kernel=kernel))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_neighbours_do_not_change_a_bit(device, kernel, head_dim, page_size):
    rng = np.random.default_rng(1)
    query_lens = rng.integers(1, 400, size=40).tolist()
    cached_lens = rng.integers(0, 700, size=40).tolist()
    problem = make_problem(query_lens, cached_lens, 8, 4, head_dim, page_size, device, torch.bfloat16)
    together = problem.launch(kernel=kernel)
    for tokens, alone in problem.alone():
        assert torch.equal(alone.launch(kernel=kernel), together[tokens])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_chunks_do_not_change_a_bit(device, kernel, head_dim, page_size):
    """Chunks that end before, on and behind the ends of tiles, blocks and pages; maxima grow on the way."""
    ends = [1, 37, 128, 200, 256, 383, 384, 385, 700, 1000]
    problem = make_problem([ends[-1]], [0], 8, 4, head_dim, page_size, device, torch.bfloat16)
    problem = problem._replace(q=problem.q * 8)
    whole = problem.launch(kernel=kernel)
    for begin, end in zip([0, *ends], ends, strict=False):
        chunk = problem.part(begin, end, kv_len=end)
        assert torch.equal(chunk.launch(kernel=kernel), whole[begin:end])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("element", [torch.bfloat16, torch.float16], ids=str)
def test_maxima_that_grow(device, kernel, head_dim, element):
    """Scores that lie ever farther apart: a row's maximum grows in some blocks, by little or by much, not in others."""
    problem = make_problem([300, 1, 128], [1700, 2000, 0], 8, 2, head_dim, 64, device, element)
    spread = torch.logspace(-1, 1.5, len(problem.q), device=device)[:, None, None]
    problem = problem._replace(q=(problem.q * spread).to(element))
    assert_each_row_close(problem.launch(kernel=kernel), problem.expected())


@pytest.mark.gpu
@pytest.mark.parametrize("decoding", [1, 3, 127])
def test_queries_behind_those_that_decode(device, kernel, decoding):
    """In a mixed step chunks come behind the tokens that decode; those, and the padding, stay as they are."""
    query_lens = [130, 1, 77]
    problem = make_problem([decoding, *query_lens, 5], [0, 0, 40, 200, 0], 8, 2, 128, 64, device, torch.bfloat16)
    mine = problem._replace(rows=problem.rows[1:4], cu_seqlens=problem.cu_seqlens[1:5], kv_lens=problem.kv_lens[1:4])
    out = mine.launch(kernel=kernel)
    end = decoding + sum(query_lens)
    assert_each_row_close(out[decoding:end], problem.expected()[decoding:end])
    assert out[:decoding].isnan().all() and out[end:].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_SM90, reason="needs an sm_90 GPU")
def test_hopper_runs_its_own_kernel(device, monkeypatch):
    problem = make_problem([40, 200], [0, 30], 4, 2, 128, 64, device, torch.bfloat16)
    own = problem.launch(kernel=sm90.attention_prefill_sm90)
    monkeypatch.setattr(module, "attention_prefill_portable", None)
    assert torch.equal(problem.launch(), own)

from typing import NamedTuple

import pytest
import torch

from minisgl.kernels import attention_decode as module
from minisgl.kernels import decode_splits as splits
from minisgl.kernels import launch
from minisgl.kernels.attention_decode import attention_decode, attention_decode_reference, attention_decode_rotary
from minisgl.kernels.attention_prefill import attention_prefill_reference
from minisgl.kernels.paged import shuffled_page_table, store_in_pages
from minisgl.kernels.rotary import Rotary, rotary_store


class Problem(NamedTuple):
    """Arguments of a launch. Slots without a key are NaN, and page-table entries without a page are -1."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    rows: torch.Tensor
    kv_lens: torch.Tensor

    def launch(self, window: int = 0, max_kv_len: int | None = None) -> torch.Tensor:
        out = torch.full(self.q.shape, float("nan"), dtype=self.q.dtype, device=self.q.device)
        bound = int(self.kv_lens.max()) if max_kv_len is None else max_kv_len
        attention_decode(*self, bound, scale=self.q.shape[2] ** -0.5, window=window, out=out)
        return out

    def expected(self, window: int = 0) -> torch.Tensor:
        """In float64, from the pages."""
        q, k_cache, v_cache = (x.double() for x in self[:3])
        return attention_decode_reference(q, k_cache, v_cache, *self[3:], scale=q.shape[2] ** -0.5, window=window)


def make_problem(
    kv_lens: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Problem:
    qkv = torch.randn(len(kv_lens), heads + 2 * kv_heads, head_dim, device=device, dtype=dtype)
    table = shuffled_page_table(kv_lens, page_size, device)
    k_cache, v_cache = (
        store_in_pages(
            [torch.randn(kv_len, kv_heads, head_dim, device=device, dtype=dtype) for kv_len in kv_lens],
            table,
            page_size,
        )
        for _ in range(2)
    )
    rows = torch.randperm(len(kv_lens) + 3, device=device)[: len(kv_lens)].int()
    page_table = torch.full((len(kv_lens) + 3, table.shape[1] + 1), -1, dtype=torch.int32, device=device)
    page_table[rows, :-1] = table
    return Problem(
        q=qkv[:, :heads],
        k_cache=k_cache,
        v_cache=v_cache,
        page_table=page_table,
        rows=rows,
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
    )


@pytest.mark.parametrize("window", [0, 1, 50])
def test_reference_is_prefill_of_one_token(device, window):
    problem = make_problem([5, 1, 70, 64], 6, 2, 16, 16, device, torch.float64)
    cu_seqlens = torch.arange(5, dtype=torch.int32, device=device)
    expected = attention_prefill_reference(*problem[:5], cu_seqlens, problem.kv_lens, scale=16**-0.5, window=window)
    torch.testing.assert_close(problem.expected(window), expected)


@pytest.mark.parametrize(
    "kv_lens, heads, kv_heads, head_dim, page_size",
    [
        ([1, 63, 64, 65, 2], 4, 2, 64, 16),
        ([1, 300, 33], 3, 1, 80, 64),
        ([65, 511, 31], 5, 1, 96, 32),
        ([256, 1, 257, 512], 12, 2, 128, 256),
        ([33, 300], 7, 1, 256, 128),
        ([90, 270], 6, 6, 16, 16),
        ([100, 400], 20, 1, 32, 16),
        ([1000], 2, 2, 64, 64),
    ],
)
def test_matches_float64(device, dtype, assert_close, kv_lens, heads, kv_heads, head_dim, page_size):
    problem = make_problem(kv_lens, heads, kv_heads, head_dim, page_size, device, dtype)
    assert_close(problem.launch(), problem.expected())


def test_both_split_sizes(device, dtype, assert_close):
    problem = make_problem([2048, 2049, 1], 2, 1, 64, 64, device, dtype)
    assert_close(problem.launch(), problem.expected())


def test_more_splits_than_one_combine_block(device, dtype, assert_close, monkeypatch):
    for block in (splits.COMBINE, splits.COMBINE_INTERPRETED):
        monkeypatch.setitem(block, "BLOCK_S", 2)
    problem = make_problem([5 * splits.LEAST_SPLIT.value - 1, 100], 1, 1, 16, 64, device, dtype)
    assert_close(problem.launch(), problem.expected())


@pytest.mark.parametrize("window", [1, 7, 32, 100, 300, 5000])
@pytest.mark.parametrize("page_size", [16, 64])
def test_sliding_window(device, dtype, assert_close, window, page_size):
    problem = make_problem([1, 40, 130, 333, 800], 2, 1, 64, page_size, device, dtype)
    out = problem.launch(window)
    assert_close(out, problem.expected(window))
    if window <= 300:  # the window is seen to matter
        assert not torch.allclose(out.double(), problem.expected(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("page_size", [16, 64])
def test_keys_before_the_window_are_never_read(device, dtype, assert_close, page_size):
    """Their pages may have been given away: the ids are garbage, and so is what lies there."""
    problem = make_problem([700], 2, 1, 64, page_size, device, dtype)
    expected = problem.expected(window=300)
    row = int(problem.rows[0])
    for key in range(400):
        page = int(problem.page_table[row, key // page_size])
        problem.k_cache[page, key % page_size] = float("nan")
        problem.v_cache[page, key % page_size] = float("nan")
    problem.page_table[row, : 400 // page_size] = -(2**30)
    assert_close(problem.launch(window=300), expected)


@pytest.mark.parametrize("window", [0, 50])
def test_padded_rows_are_zero(device, dtype, assert_close, window):
    """A captured graph runs more rows than there are: those have no keys, and nothing of theirs is read."""
    problem = make_problem([300, 20, 400], 2, 1, 64, 16, device, dtype)
    problem.kv_lens[1] = 0
    problem.rows[1] = -(2**30)
    out = problem.launch(window)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert_close(out, problem.expected(window))
    problem.kv_lens.zero_()
    assert torch.equal(problem.launch(window), torch.zeros_like(out))


def test_a_sequence_does_not_depend_on_its_neighbours(device, dtype):
    problem = make_problem([300, 1, 64, 600], 2, 1, 64, 16, device, dtype)
    together = problem.launch()
    for s in range(4):
        alone = problem._replace(
            q=problem.q[s : s + 1], rows=problem.rows[s : s + 1], kv_lens=problem.kv_lens[s : s + 1]
        )
        assert torch.equal(alone.launch(), together[s : s + 1])


@pytest.mark.parametrize("window", [0, 100])
def test_the_bound_does_not_change_the_result(device, dtype, window):
    problem = make_problem([300, 1, 64], 4, 2, 64, 16, device, dtype)
    assert torch.equal(problem.launch(window), problem.launch(window, max_kv_len=5000))


@pytest.mark.parametrize("many", [False, True])
def test_max_parts_bounds_every_length(many):
    for window in (0, 1, 100, 3000):
        for block_n in (32, 64):
            for max_kv_len in (0, 1, 255, 256, 257, 2048, 2049, 4500, 9000):
                bound = splits.max_parts_of(max_kv_len, window, block_n, many)
                for kv_len in range(max_kv_len + 1):
                    begin = max(kv_len - window, 0) // block_n * block_n if window else 0
                    visible = kv_len - begin
                    size = splits.split_size(visible)
                    if many and visible <= splits.SHORT_CONTEXT.value:
                        size = splits.SHORT_CONTEXT.value
                    assert -(-visible // size) <= bound


def few_and_many(problem: Problem, monkeypatch: pytest.MonkeyPatch, window: int = 0) -> list[torch.Tensor]:
    """What a program for each split makes, and one for each short context."""
    results = []
    for many in (1 << 60, 1):
        monkeypatch.setattr(module, "MANY", many)
        results.append(problem.launch(window))
    assert not results[1].isnan().any()
    return results


@pytest.mark.parametrize(
    "kv_lens, heads, kv_heads, head_dim, page_size, window",
    [
        ([4, 63, 64, 65, 2], 4, 2, 64, 16, 0),
        ([1, 700, 33, 0, 129, 0], 3, 1, 80, 64, 0),
        ([600, 1, 257, 512, 513], 4, 2, 32, 256, 0),
        ([2100, 2048, 1025], 2, 1, 16, 64, 0),
        ([0, 40, 130, 0, 333, 800], 2, 1, 16, 16, 100),
        ([1900], 2, 1, 16, 16, 1000),
        ([0, 0, 0], 2, 2, 16, 64, 0),
    ],
)
def test_many_have_the_bits_of_few(device, dtype, monkeypatch, kv_lens, heads, kv_heads, head_dim, page_size, window):
    problem = make_problem([max(length, 1) for length in kv_lens], heads, kv_heads, head_dim, page_size, device, dtype)
    problem.kv_lens.copy_(torch.tensor(kv_lens))
    problem.rows[problem.kv_lens == 0] = -(2**30)
    found, expected = few_and_many(problem, monkeypatch, window)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, page_size", [(4, 2, 64, 16), (3, 1, 80, 64), (16, 8, 128, 64), (7, 1, 256, 128)]
)
def test_with_rotary_equals_rotary_store_first(device, dtype, window, with_norm, heads, kv_heads, head_dim, page_size):
    """Bit for bit: a step of decodes alone may take the one and a mixed step the other."""
    kv_lens = [1, 300, 64, 257]
    problem = make_problem(kv_lens, heads, kv_heads, head_dim, page_size, device, dtype)
    qkv = torch.randn(len(kv_lens), (heads + 2 * kv_heads) * head_dim, device=device, dtype=dtype)
    norms = [torch.randn(head_dim, device=device, dtype=dtype) if with_norm else None for _ in "qk"]
    rotary = Rotary(torch.randn(400, head_dim, device=device), *norms, 1e-6)
    positions = problem.kv_lens - 1
    pages = problem.page_table[problem.rows.long(), (positions // page_size).long()]
    slots = pages * page_size + positions % page_size
    for cache in (problem.k_cache, problem.v_cache):  # the new token's place is empty
        cache.flatten(0, 1)[slots.long()] = float("nan")

    caches = [problem.k_cache.clone(), problem.v_cache.clone()]
    q = rotary_store(qkv.clone(), positions, slots, *caches, rotary)
    expected = problem._replace(q=q, k_cache=caches[0], v_cache=caches[1]).launch(window)
    out = torch.full_like(expected, float("nan"))
    before = qkv.clone()
    arrivals = torch.zeros(module.num_arrivals(kv_heads), dtype=torch.int32, device=device)
    arguments = (*problem[1:], max(kv_lens), rotary, arrivals)
    attention_decode_rotary(qkv, *arguments, scale=head_dim**-0.5, window=window, out=out)

    assert torch.equal(qkv, before) and not arrivals.any()
    assert torch.equal(out, expected)
    for cache, stored in zip((problem.k_cache, problem.v_cache), caches, strict=True):
        assert torch.equal(cache.nan_to_num(), stored.nan_to_num())

    problem.kv_lens[1] = 0  # padding: nothing is stored for it
    problem.rows[1] = -1
    for cache in (problem.k_cache, problem.v_cache):
        cache.flatten(0, 1)[slots.long()] = float("nan")
    attention_decode_rotary(qkv, *arguments, scale=head_dim**-0.5, window=window, out=out)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(out[2:], expected[2:])
    assert problem.k_cache.flatten(0, 1)[int(slots[1])].isnan().all() and not arrivals.any()


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
def test_whoever_combines_the_splits_the_bits_are_the_same(device, dtype, count):
    """The last program to finish, or a second launch: of one sequence, of more than it pays for, of many splits."""
    lengths = [700, 129, 2100, 64, 128, 1, 90, 200, 300][-count:]
    problem = make_problem(lengths, 3, 1, 64, 64, device, dtype)
    rotary = Rotary(torch.randn(2200, 64, device=device), None, None, 1e-6)
    qkv = torch.randn(count, 5 * 64, device=device, dtype=dtype)
    arrivals = torch.zeros(module.num_arrivals(1), dtype=torch.int32, device=device)
    out = {bound: torch.empty(count, 3, 64, device=device, dtype=dtype) for bound in (max(lengths), 9000)}
    for _ in range(2):
        for bound, found in out.items():
            attention_decode_rotary(
                qkv, *problem[1:], bound, rotary, arrivals, scale=1.0, out=found.fill_(float("nan"))
            )
            assert not arrivals.any()
    merged, apart = out.values()
    assert torch.equal(merged, apart) and not merged.isnan().any()


def test_arrivals_that_are_too_few(device, dtype):
    problem = make_problem([5], 2, 1, 64, 16, device, dtype)
    qkv, rotary = problem.q.new_zeros(1, 4 * 64), Rotary(torch.zeros(9, 64, device=device), None, None, 1e-6)
    for size in (module.num_arrivals(1) - 1, 0):
        arrivals = torch.zeros(size, dtype=torch.int32, device=device)
        with pytest.raises(ValueError, match="arrivals: expected"):
            attention_decode_rotary(qkv, *problem[1:], 5, rotary, arrivals, scale=1.0, out=torch.empty_like(problem.q))


class Recorder:
    """Stands in for a kernel and notes which ones are launched: what they are compiled for."""

    def __init__(self, *names: str) -> None:
        self.names, self.launched = names, set()

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched.add(tuple(options[name] for name in self.names))


@pytest.mark.parametrize("window", [0, 9, 1000])
@pytest.mark.parametrize("kv_heads", [1, 8, 20])
def test_the_kinds_of_batches_launch_every_kernel(monkeypatch, kv_heads, window):
    monkeypatch.setattr(module, "use_triton", lambda x: True)
    monkeypatch.setattr(module, "num_multiprocessors", lambda device: 132)
    monkeypatch.setattr(module, "dependent_launch", lambda device: {"PDL": True, "launch_pdl": True})
    cache, table = torch.empty(1, 64, kv_heads, 16), torch.zeros(1, 200, dtype=torch.int32)
    rotary = Rotary(torch.empty(9000, 16), None, None, 1e-6)
    arrivals = torch.zeros(module.num_arrivals(kv_heads), dtype=torch.int32)

    def kernels_of(batches: set[tuple[int, int]], most_rotated: int) -> list[set]:
        kernels = Recorder("ROTARY", "IS_MANY", "MERGES", "PREFETCH"), Recorder("IS_MANY")
        monkeypatch.setattr(module, "_attention_decode_kernel", kernels[0])
        monkeypatch.setattr(module, "_combine_kernel", kernels[1])
        for size, bound in batches:
            qkv, index = torch.empty(size, 3 * kv_heads * 16), torch.zeros(size, dtype=torch.int32)
            q = qkv[:, : kv_heads * 16].unflatten(1, (-1, 16))
            options = {"scale": 1.0, "window": window, "out": torch.empty(size, kv_heads, 16)}
            if size <= most_rotated:
                attention_decode_rotary(qkv, cache, cache, table, index, index, bound, rotary, arrivals, **options)
            else:
                attention_decode(q, cache, cache, table, index, index, bound, **options)
        return [kernel.launched for kernel in kernels]

    for most in (1, 2, 3, 4, 8, 9, 16, 32, 80, 600):
        rotated = min(most, 16)
        for max_len in (40, 100, 500, 1000, 1500, 2048, 9000):
            kinds = module.kinds_of_batches(kv_heads, rotated, max_len) | {(rotated + 1, max_len)}
            found = kernels_of({(size, bound) for size, bound in kinds if size <= most}, rotated)
            bounds = {min(bound, max_len) for bound in (1, 64, 65, 128, 129, 512, 1024, 1025, 2048, 2049, 9000)}
            sizes = {*range(1, rotated + 1), *(size for size in (17, 20, 32, 64, 80, 600) if size <= most)}
            expected = kernels_of({(size, bound) for size in sizes for bound in bounds}, rotated)
            assert found == expected, (most, max_len)


def test_no_sequences(device, dtype):
    problem = make_problem([5], 2, 1, 64, 16, device, dtype)
    empty = problem._replace(q=problem.q[:0], rows=problem.rows[:0], kv_lens=problem.kv_lens[:0])
    assert empty.launch(max_kv_len=0).shape == (0, 2, 64)


def test_cpu_tensors_run_the_reference(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", False)
    problem = make_problem([40, 9], 6, 2, 64, 16, torch.device("cpu"), torch.float32)
    assert torch.equal(problem.launch(window=8), attention_decode_reference(*problem, scale=64**-0.5, window=8))


@pytest.mark.parametrize("arch", splits.TILES)
def test_every_architecture_has_a_tile_of_each_size(arch, monkeypatch):
    monkeypatch.setattr(splits, "architecture", lambda device: arch)
    for head_dim in (16, 64, 80, 96, 128, 256):
        block_n = splits.decode_tile(head_dim, torch.device("cpu"), torch.bfloat16).block_n
        assert splits.LEAST_SPLIT.value % block_n == 0 and splits.LONG_SPLIT.value % block_n == 0


@pytest.mark.parametrize(
    "name, change",
    [
        ("q", lambda a: a.update(q=a["q"][0])),
        ("q", lambda a: a.update(q=a["q"].transpose(0, 1))),
        ("k_cache", lambda a: a.update(k_cache=a["k_cache"].half())),
        ("k_cache", lambda a: a.update(k_cache=a["k_cache"][:, :12])),
        ("v_cache", lambda a: a.update(v_cache=a["v_cache"][:-1])),
        ("page_table", lambda a: a.update(page_table=a["page_table"].long())),
        ("rows", lambda a: a.update(rows=a["rows"][:1], kv_lens=a["kv_lens"][:1])),
        ("kv_lens", lambda a: a.update(kv_lens=a["kv_lens"][:-1])),
        ("max_kv_len", lambda a: a.update(max_kv_len=-1)),
        ("scale", lambda a: a.update(scale=-1.0)),
        ("window", lambda a: a.update(window=-1)),
        ("out", lambda a: a.update(out=a["out"].transpose(0, 1))),
    ],
)
def test_refuses_bad_arguments(device, name, change):
    problem = make_problem([40, 9], 2, 1, 64, 16, device, torch.float32)
    arguments = problem._asdict()
    arguments.update(max_kv_len=40, scale=0.125, window=0, out=torch.empty(2, 2, 64, device=device))
    attention_decode(**arguments)
    change(arguments)
    with pytest.raises(ValueError, match=f"^{name}:"):
        attention_decode(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("window", [0, 3000])
def test_every_tile_on_long_contexts(device, dtype, assert_close, page_size, head_dim, window):
    """Random data at scale finds wrong matmul fragments that short runs through the interpreter cannot."""
    lengths = [30_000, 4096, 1, 100, 257, 1000, 2048, 2049]
    problem = make_problem(lengths, 8, 2, head_dim, page_size, device, dtype)
    out = problem.launch(window)
    assert_close(out, problem.expected(window))
    assert torch.equal(out, problem.launch(window))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("window", [0, 3000])
def test_every_tile_of_many(device, dtype, monkeypatch, page_size, head_dim, window):
    lengths = [4096, 1, 100, 257, 0, 1000, 2048, 2049, *range(3, 2100, 17), 9000]
    problem = make_problem([max(length, 1) for length in lengths], 8, 2, head_dim, page_size, device, dtype)
    problem.kv_lens.copy_(torch.tensor(lengths))
    found, expected = few_and_many(problem, monkeypatch, window)
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 3, 5, 6, 7, 12, 16, 24, 64])
def test_groups(device, dtype, assert_close, monkeypatch, group):
    problem = make_problem([1, 700, 3000], 2 * group, 2, 128, 64, device, dtype)
    assert_close(problem.launch(), problem.expected())
    found, expected = few_and_many(problem, monkeypatch)
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device, assert_close):
    problem = make_problem([500, 3000], 8, 8, 128, 64, device, torch.bfloat16)
    expected = problem.expected()
    first_page = 2**31 // (64 * 8 * 128)
    far = [torch.empty(first_page + len(c), *c.shape[1:], device=device, dtype=c.dtype) for c in problem[1:3]]
    for cache, near in zip(far, problem[1:3], strict=True):
        cache[first_page:] = near
    page_table = torch.where(problem.page_table >= 0, problem.page_table + first_page, -1)
    assert_close(problem._replace(k_cache=far[0], v_cache=far[1], page_table=page_table).launch(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("many", [1, 1 << 60])
def test_index_alignment_and_lengths_do_not_recompile(device, monkeypatch, many):
    monkeypatch.setattr(module, "MANY", many)
    problem = make_problem([400, 9, 300], 2, 1, 64, 16, device, torch.float16)
    problem.launch(max_kv_len=16 * 1024)  # enough for a combine
    kernels = (module._attention_decode_kernel, module._combine_kernel)
    caches = [kernel.device_caches[torch.cuda.current_device()][0] for kernel in kernels]
    before = [len(cache) for cache in caches]
    tail = problem._replace(
        q=problem.q[1:],
        rows=problem.rows[1:],
        kv_lens=problem.kv_lens[1:],
        page_table=problem.page_table[:, :-1].contiguous(),
    )
    tail.launch()
    tail.launch(max_kv_len=16 * 1024)
    assert [len(cache) for cache in caches] == before

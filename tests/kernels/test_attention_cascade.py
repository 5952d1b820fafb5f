from typing import NamedTuple

import pytest
import torch

from minisgl.kernels import attention_cascade as module
from minisgl.kernels import attention_decode as decode
from minisgl.kernels import decode_splits as splits
from minisgl.kernels import launch
from minisgl.kernels.attention_cascade import CascadeTiles, attention_cascade, attention_cascade_reference
from minisgl.kernels.dependent_launch import dependent_launch
from minisgl.kernels.paged import LOG2_E, shuffled_page_table, store_in_pages


class Problem(NamedTuple):
    """Arguments of a launch. Slots without a key are NaN, and page-table entries without a page are -1."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    rows: torch.Tensor
    kv_lens: torch.Tensor
    tiles: CascadeTiles

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5

    def workspace(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Poisoned partial and logsumexp, for one split more than the longest sequence has."""
        batch, heads, head_dim = self.q.shape
        max_splits = splits.max_parts_of(int(self.kv_lens.max()), 0, 32, many=False) + 1
        shape = (batch, max_splits, heads, head_dim)
        partial = torch.full(shape, float("nan"), dtype=dtype, device=self.q.device)
        return partial, torch.full_like(partial[..., 0], float("nan"))

    def launch(self) -> tuple[torch.Tensor, torch.Tensor]:
        workspace = self.workspace()
        attention_cascade(*self, *workspace, scale=self.scale)
        return workspace

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """In float64; NaN where nothing is to be written."""
        workspace = self.workspace(torch.float64)
        attention_cascade_reference(*self, *workspace, scale=self.scale)
        return workspace

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What decode attention leaves in the workspace, each sequence for itself."""
        workspace = self.workspace()
        batch, heads, head_dim = self.q.shape
        _, page_size, kv_heads, _ = self.k_cache.shape
        tile = splits.decode_tile(head_dim, self.q.device, self.q.dtype)
        max_splits = workspace[0].shape[1]
        decode._attention_decode_kernel[(max_splits * kv_heads, batch)](
            *self[:6], *workspace, torch.empty_like(self.q),
            self.scale * LOG2_E, self.q.stride(0), self.page_table.stride(0), max_splits,
            None, None, None, 0.0, None, None,
            HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, PAGE_SIZE=page_size, WINDOW=0,
            BLOCK_G=module._block_rows(heads, kv_heads), BLOCK_N=tile.block_n,
            BLOCK_D=max(16, 1 << (head_dim - 1).bit_length()), ROTARY=False, HAS_Q_NORM=False, HAS_K_NORM=False,
            HAS_SHARED=False, IS_MANY=False, MERGES=False, PREFETCH=0, PREFETCHING=0, BLOCK_S=1,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **dependent_launch(self.q.device),
        )  # fmt: skip
        return workspace


def make_problem(
    kv_lens: list[int],
    groups: list[tuple[int, list[int]]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    device: torch.device,
    dtype: torch.dtype,
    blocks: int = 2,
) -> Problem:
    """Each group is (splits, members): the members get the first one's pages for these splits, and a tile."""
    batch = len(kv_lens)
    qkv = torch.randn(batch, heads + 2 * kv_heads, head_dim, device=device, dtype=dtype)
    table = shuffled_page_table(kv_lens, page_size, device)
    k_cache, v_cache = (
        store_in_pages(
            [torch.randn(kv_len, kv_heads, head_dim, device=device, dtype=dtype) for kv_len in kv_lens],
            table,
            page_size,
        )
        for _ in range(2)
    )
    num_tiles = len(groups) + 1  # one is unused, and its members are garbage
    shared_splits = torch.zeros(batch, dtype=torch.int32)
    tile_splits = torch.zeros(num_tiles, dtype=torch.int32)
    members = torch.full((num_tiles, blocks * module._block_members(heads, kv_heads)), -1, dtype=torch.int32)
    members[-1] = 2**30
    for tile, (num_splits, group) in enumerate(groups):
        pages = num_splits * module.split_size(kv_lens[group[0]]) // page_size
        table[group, :pages] = table[group[0], :pages]
        shared_splits[group] = num_splits
        tile_splits[tile] = num_splits
        members[tile, : len(group)] = torch.tensor(group)
    rows = torch.randperm(batch + 3, device=device)[:batch].int()
    page_table = torch.full((batch + 3, table.shape[1] + 1), -1, dtype=torch.int32, device=device)
    page_table[rows, :-1] = table
    tiles = CascadeTiles(shared_splits.to(device), tile_splits.to(device), members.to(device))
    lens = torch.tensor(kv_lens, dtype=torch.int32, device=device)
    return Problem(qkv[:, :heads], k_cache, v_cache, page_table, rows, lens, tiles)


def shared_part(problem: Problem, workspace: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The workspace with NaN where no tile writes."""
    splits = torch.arange(workspace[0].shape[1], device=problem.q.device)
    shared = splits < problem.tiles.shared_splits[:, None]
    partial, logsumexp = workspace
    nan = float("nan")
    return partial.masked_fill(~shared[..., None, None], nan), logsumexp.masked_fill(~shared[..., None], nan)


def same_bits(problem: Problem) -> None:
    """Cascade writes what decode attention writes, bit for bit, and nothing else."""
    expected = shared_part(problem, problem.decoded())
    for out, truth in zip(problem.launch(), expected, strict=True):
        torch.testing.assert_close(out, truth, rtol=0, atol=0, equal_nan=True)


def close_to_float64(problem: Problem, dtype: torch.dtype, assert_close) -> None:
    for out, truth in zip(problem.launch(), problem.expected(), strict=True):
        assert torch.equal(out.isnan(), truth.isnan()), "written where no tile is, or not written where one is"
        assert_close(out.nan_to_num().to(dtype), truth.nan_to_num())


SHAPES = [  # kv_lens, groups, heads, KV heads, head dim, page size
    ([257, 300, 500, 40, 412], [(3, [0, 2, 1, 4])], 4, 2, 64, 16),
    ([700, 1, 520, 800, 777, 513], [(2, [5, 2]), (1, [0, 4, 3])], 3, 1, 80, 64),
    ([300] * 12, [(1, [0, 1, 2]), (1, [11, 3, 4, 5, 6, 7, 8, 9, 10])], 6, 2, 96, 32),
    ([600, 700], [(2, [1, 0])], 20, 1, 32, 256),
    ([300, 400], [(2, [0, 1])], 2, 2, 256, 128),
]


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[2]}-{shape[3]}-{shape[4]}-{shape[5]}")
def test_matches_float64(device, dtype, assert_close, shape, blocks):
    if any(len(group) > blocks * module._block_members(*shape[2:4]) for _, group in shape[1]):
        pytest.skip("too many members for so few blocks")
    close_to_float64(make_problem(*shape, device, dtype, blocks), dtype, assert_close)


def test_both_split_sizes(device, dtype, assert_close):
    lengths, groups = [2048, 2049, 2000, 3000, 5000, 1793], [(7, [5, 0, 2]), (2, [1, 3, 4])]
    close_to_float64(make_problem(lengths, groups, 2, 1, 16, 64, device, dtype), dtype, assert_close)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]], ids=["two splits", "twelve"])
def test_decode_attention_gives_the_same_with_tiles(device, dtype, assert_close, shape):
    problem = make_problem(*shape, device, dtype)
    arguments = (*problem[:6], int(problem.kv_lens.max()))
    alone, together = (torch.full_like(problem.q.contiguous(), float("nan")) for _ in range(2))
    decode.attention_decode(*arguments, scale=problem.scale, out=alone)
    decode.attention_decode(*arguments, scale=problem.scale, cascade=problem.tiles, out=together)
    if device.type == "cuda":
        assert torch.equal(together, alone)
    else:
        assert_close(together, alone)


def test_padded_sequences_are_left_alone(device, dtype, assert_close):
    """A captured graph runs more rows and tiles than there are."""
    problem = make_problem([300, 1, 400], [(1, [0, 2])], 2, 1, 64, 16, device, dtype)
    problem.kv_lens[1] = 0
    problem.rows[1] = -(2**30)
    close_to_float64(problem, dtype, assert_close)
    problem.tiles.tile_splits.zero_()
    assert all(bool(x.isnan().all()) for x in problem.launch())


def test_no_tiles_and_no_splits(device, dtype):
    problem = make_problem([40, 9], [], 2, 1, 64, 16, device, dtype)
    problem.launch()
    no_tiles = problem.tiles._replace(tile_splits=problem.tiles.tile_splits[:0], members=problem.tiles.members[:0])
    assert all(bool(x.isnan().all()) for x in problem._replace(tiles=no_tiles).launch())


def test_tiles_are_views_of_one_tensor():
    for batch, tile_members in [(1, 2), (9, 2), (9, 3), (33, 8), (512, 32)]:
        num_tiles = module.max_tiles(batch, tile_members)
        packed = torch.arange(batch + num_tiles * (1 + tile_members), dtype=torch.int32)
        tiles = CascadeTiles.unpack(packed, batch, tile_members)
        assert [x.shape for x in tiles] == [(batch,), (num_tiles,), (num_tiles, tile_members)]
        assert torch.equal(torch.cat([x.flatten() for x in tiles]), packed)
        packed.zero_()  # in place, as before a replay of a graph
        assert not any(x.any() for x in tiles)


def test_tile_members_fill_the_matmul():
    assert module.tile_members(32, 8, torch.bfloat16) == 8
    assert module.tile_members(16, 8, torch.float16) == 16
    assert module.tile_members(14, 2, torch.bfloat16) == 4
    assert module.tile_members(32, 8, torch.float32) == 4
    assert module.tile_members(24, 1, torch.float32) == 1


def test_cpu_tensors_run_the_reference(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", False)
    problem = make_problem([300, 290], [(1, [0, 1])], 6, 2, 64, 16, torch.device("cpu"), torch.float32)
    for out, truth in zip(problem.launch(), problem.expected(), strict=True):
        torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5, equal_nan=True)
    on_cpu = problem.launch()
    monkeypatch.undo()
    for out, truth in zip(on_cpu, problem.launch(), strict=True):
        torch.testing.assert_close(out, truth, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    "name, change",
    [
        ("q", lambda a: a.update(q=a["q"][0])),
        ("v_cache", lambda a: a.update(v_cache=a["v_cache"][:-1])),
        ("rows", lambda a: a.update(rows=a["rows"][:1], kv_lens=a["kv_lens"][:1])),
        ("scale", lambda a: a.update(scale=0.0)),
        ("shared_splits", lambda a: a.update(tiles=a["tiles"]._replace(shared_splits=a["kv_lens"][:1]))),
        ("tile_splits", lambda a: a.update(tiles=a["tiles"]._replace(tile_splits=a["kv_lens"][:1]))),
        ("members", lambda a: a.update(tiles=a["tiles"]._replace(members=a["tiles"].members[:, :-1].contiguous()))),
        ("members", lambda a: a.update(tiles=a["tiles"]._replace(members=a["tiles"].members.long()))),
        ("partial", lambda a: a.update(partial=a["partial"].half())),
        ("partial", lambda a: a.update(partial=a["partial"][0])),
        ("partial", lambda a: a.update(partial=a["partial"].transpose(2, 3).contiguous().transpose(2, 3))),
        ("logsumexp", lambda a: a.update(logsumexp=a["logsumexp"][:, :-1].contiguous())),
    ],
)
def test_refuses_bad_arguments(device, name, change):
    problem = make_problem([300, 290], [(1, [0, 1])], 2, 1, 64, 16, device, torch.float32)
    partial, logsumexp = problem.workspace()
    arguments = {**problem._asdict(), "partial": partial, "logsumexp": logsumexp, "scale": 0.125}
    attention_cascade(**arguments)
    change(arguments)
    with pytest.raises(ValueError, match=f"^{name}:"):
        attention_cascade(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (2, 2), (12, 4), (14, 2), (32, 1), (64, 1)])
def test_bits_are_those_of_decode_attention(device, dtype, assert_close, heads, kv_heads, head_dim, page_size):
    """The results of a sequence must not depend on whether others share its prefix."""
    together = module.tile_members(heads, kv_heads, dtype)
    if together < 2:
        pytest.skip("no two sequences fit in a tile")
    long, short = list(range(together)), list(range(together, 2 * together - 1))
    lengths = [3100 + 97 * i for i in long] + [2048 - 3 * i for i in short] + [2049, 100]
    groups = [(3, long), *([(6, short)] if short else [])]
    blocks = together // module._block_members(heads, kv_heads)
    problem = make_problem(lengths, groups, heads, kv_heads, head_dim, page_size, device, dtype, blocks)
    same_bits(problem)
    close_to_float64(problem, dtype, assert_close)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_bits_do_not_depend_on_the_blocks_of_a_tile(device, dtype, blocks):
    same_bits(make_problem([3000] * 6, [(2, [0, 1, 2, 3])], 8, 2, 128, 64, device, dtype, blocks))


@pytest.mark.gpu
def test_index_alignment_and_lengths_do_not_recompile(device):
    problem = make_problem([400, 300, 290, 700], [(1, [1, 2])], 2, 1, 64, 16, device, torch.float16)
    problem.launch()
    compiled = module._attention_cascade_kernel.device_caches[torch.cuda.current_device()][0]
    before = len(compiled)
    tiles = CascadeTiles(problem.tiles.shared_splits[1:], problem.tiles.tile_splits[1:], problem.tiles.members[1:])
    tail = problem._replace(
        q=problem.q[1:],
        rows=problem.rows[1:],
        kv_lens=problem.kv_lens[1:],
        page_table=problem.page_table[:, :-1].contiguous(),
        tiles=tiles,
    )
    tail.launch()
    assert len(compiled) == before

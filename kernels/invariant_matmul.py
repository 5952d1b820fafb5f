"""A matmul whose rows do not depend on how many there are: y = x W^T + b, bit for bit, for any M.

Legend: M rows (tokens), N outputs, K inputs, S splits. x  # [M, K]; weight  # [N, K]; bias  # [N]; y  # [M, N].
Bound by memory up to about 200 rows, 2 N K bytes in bf16, and by 2 M N K flops above. Sums are fp32.

    split s of y[m, n] = ((0 + x[m] . w[n] of the split's first 16 inputs) + of the next 16) + ...
    y[m, n]            = ((0 + split 0) + split 1) + ... + bias[n], rounded once

The order is a function of (N, K, dtype, architecture): S follows from N and K. Everything that M may choose leaves it:
- How many rows a program takes. The weight's rows are those of the tensor-core instruction and x's rows its columns, so
  that one row and ten thousand use the same family: wgmma m64nXk16 on sm_90, whose X alone changes.
- Whether the splits of an output are computed at once by programs of their own and added by a second launch, which few
  rows need to fill the GPU, or one after another in one program, which many rows prefer.
- How blocks are loaded and how long they are along K: their instructions continue the sum. In which order programs run.
By construction: the sequence of instructions over K, the splits and the order of their sum; zeros past K add nothing.
Resting on the hardware: an instruction gives an element the same bits for every X and in every column, whatever the
other columns hold (NaN too). An architecture without a table of its own has tiles of one shape, and relies on columns
alone; exact fp32 is a chain of fused multiply-adds an element. The GPU tests compare rows alone and among many others.
Across GPU types, versions of Triton, and shards of N or K over ranks, the bits may differ.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from minisgl.kernels.dependent_launch import dependent_launch, wait_for_previous_kernel
from minisgl.kernels.launch import architecture, cdiv, check, check_same, num_multiprocessors, use_triton

ANY = 1 << 31  # no bound
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# How K is split: only where outputs are so few that their blocks of 64 do not fill half a large GPU.
SPLIT_BLOCKS = 64
SPLIT_OUTPUTS = 64
MIN_SPLIT = 512  # inputs
SPLIT_STEP = 256  # every block_k divides it

FEW_ROWS = 64  # see `beats_torch`
GROUP_T = 8  # blocks of rows that share weights while those are in L2
SUM_BLOCK = 1024  # outputs of a program of the second launch


class Tile(NamedTuple):
    """A program's block, and how it comes by it."""

    block_n: int  # rows of the weight
    block_t: int  # rows of x
    block_k: int  # inputs at a time
    num_warps: int
    num_stages: int  # blocks in flight
    parallel: bool  # a program for each split, and a launch that adds them; else one program does all splits
    persistent: bool = False  # one program for each multiprocessor takes tile after tile
    tma: bool = False  # load by descriptor, where addresses and strides are multiples of 16 bytes


# By architecture, and the most rows of x and of the weight; for 2-byte types.
Tiles = dict[tuple[int, int], Tile]
TILES: dict[str, Tiles] = {
    "sm_90": {
        (16, ANY): Tile(64, 16, 256, 4, 5, parallel=True, tma=True),
        (32, ANY): Tile(64, 32, 256, 4, 4, parallel=True, tma=True),
        (64, 8192): Tile(64, 64, 128, 4, 7, parallel=True, tma=True),
        (64, ANY): Tile(64, 64, 64, 4, 4, parallel=True, tma=True),
        (96, 5120): Tile(64, 64, 128, 4, 7, parallel=True, tma=True),
        (96, 65536): Tile(128, 64, 64, 8, 5, parallel=True, tma=True),
        (128, 5120): Tile(64, 64, 128, 4, 7, parallel=True, tma=True),
        (128, 8192): Tile(64, 128, 64, 4, 8, parallel=True, tma=True),
        (128, ANY): Tile(128, 128, 64, 8, 3, parallel=True, tma=True),
        (256, 2048): Tile(64, 128, 128, 4, 4, parallel=True, tma=True),
        (256, 5120): Tile(64, 128, 128, 4, 4, parallel=False, tma=True),
        (512, ANY): Tile(128, 128, 64, 8, 7, parallel=False, tma=True),
        (1024, 5120): Tile(128, 256, 64, 8, 4, parallel=False, tma=True),
        (1024, 8192): Tile(128, 128, 64, 8, 7, parallel=False, tma=True),
        (1024, ANY): Tile(128, 256, 64, 8, 4, parallel=False, tma=True),
        (ANY, ANY): Tile(128, 256, 64, 8, 4, parallel=False, persistent=True, tma=True),
    },
    # One block_k: the interpreter adds a block's products up before it adds them to the sum.
    "cpu": {
        (16, ANY): Tile(16, 16, 32, 4, 1, parallel=True),
        (ANY, ANY): Tile(32, 32, 32, 4, 1, parallel=False, tma=True),
    },
}
SAFE_TILES: Tiles = {
    (256, ANY): Tile(64, 64, 64, 4, 2, parallel=True),
    (ANY, ANY): Tile(64, 64, 64, 4, 2, parallel=False),
}
# Exact fp32 has no tensor cores.
FP32_TILES: Tiles = {
    (16, ANY): Tile(32, 16, 32, 4, 2, parallel=True),
    (ANY, ANY): Tile(32, 32, 32, 4, 2, parallel=False),
}


def invariant_matmul_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same in torch, a row at a time, so that rows do not depend on others here either; shapes as below."""
    # Copied: libraries choose their code by alignment too.
    return torch.cat([torch.nn.functional.linear(row.clone(), weight, bias) for row in x.split(1)])


def split_inputs(outputs: int, inputs: int) -> int:
    """Inputs of a split of a matmul with so many outputs and inputs; the last split may have fewer."""
    blocks = -(-outputs // SPLIT_OUTPUTS)
    splits = max(1, min(SPLIT_BLOCKS // blocks, inputs // MIN_SPLIT))
    return -(-inputs // (splits * SPLIT_STEP)) * SPLIT_STEP


@triton.jit
def _load_rows(
    source, first_row, start, num_rows, K, stride, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr
):
    """Inputs start..start + BLOCK_K of ROWS rows of a matrix, or of its descriptor; zeros past K."""
    if TMA:
        return source.load([first_row, start])
    else:
        # Past the end the last row again: what comes of it is not stored, and only K needs a mask.
        rows = tl.minimum(first_row + tl.arange(0, ROWS), num_rows - 1)
        cols = start + tl.arange(0, BLOCK_K)
        pointers = source + rows.to(tl.int64)[:, None] * stride + cols[None, :]
        return tl.load(pointers, mask=(cols < K)[None, :], other=0.0)


@triton.jit
def _sum_split(
    x,
    weight,
    first_output,
    first_token,
    begin,
    end,
    M,
    N,
    K,
    x_stride,
    weight_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """The sum over inputs begin..end-1 of a tile  # [BLOCK_N, BLOCK_T] fp32; begin is a multiple of BLOCK_K."""
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in range(begin, end, BLOCK_K):
        weights = _load_rows(weight, first_output, start, N, K, weight_stride, BLOCK_N, BLOCK_K, TMA)
        tokens = _load_rows(x, first_token, start, M, K, x_stride, BLOCK_T, BLOCK_K, TMA)
        acc = tl.dot(weights, tl.trans(tokens), acc, input_precision="ieee")
    return acc


# N, K and strides are specialised, since as multiples of 16 they keep loads and stores 16 bytes wide.
@triton.jit(do_not_specialize=["M"])
def _invariant_matmul_kernel(
    x,  # pointers, or descriptors with TMA
    weight,
    bias_ptr,
    y_ptr,
    partial_ptr,
    M,
    N,
    K,
    x_stride,
    weight_stride,
    split_k,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    PARALLEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
    FLATTEN: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_t = tl.cdiv(M, BLOCK_T)
    SHARES: tl.constexpr = SPLITS if PARALLEL else 1
    num_items = blocks_n * blocks_t * SHARES
    for item in tl.range(tl.program_id(0), num_items, tl.num_programs(0), flatten=FLATTEN):
        split = item % SHARES
        tile = item // SHARES
        group = tile // (GROUP_T * blocks_n)
        in_group = tile % (GROUP_T * blocks_n)
        group_t = tl.minimum(blocks_t - group * GROUP_T, GROUP_T)
        first_token = (group * GROUP_T + in_group % group_t) * BLOCK_T
        # The last block is whole too, and has rows of the one before it once more, for the same bits: rows past the end
        # are slow to load by descriptor (12288 -> 4096 on an H200: 160 rows took 102 us, and take 43, as 256 do).
        first_token = tl.minimum(first_token, tl.maximum(M - BLOCK_T, 0))
        first_output = in_group // group_t * BLOCK_N
        if PARALLEL or SPLITS == 1:
            begin = split * split_k
            total = _sum_split(
                x, weight, first_output, first_token, begin, tl.minimum(begin + split_k, K),
                M, N, K, x_stride, weight_stride, BLOCK_N, BLOCK_T, BLOCK_K, TMA,
            )  # fmt: skip
        else:
            total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            for begin in range(0, K, split_k):
                total += _sum_split(
                    x, weight, first_output, first_token, begin, tl.minimum(begin + split_k, K),
                    M, N, K, x_stride, weight_stride, BLOCK_N, BLOCK_T, BLOCK_K, TMA,
                )  # fmt: skip
        outputs = first_output + tl.arange(0, BLOCK_N)
        tokens = first_token + tl.arange(0, BLOCK_T)
        mask = (tokens < M)[:, None] & (outputs < N)[None, :]
        places = tokens.to(tl.int64)[:, None] * N + outputs[None, :]
        if PARALLEL:
            tl.store(partial_ptr + split.to(tl.int64) * M * N + places, tl.trans(total), mask=mask)
        else:
            if HAS_BIAS:
                total += tl.load(bias_ptr + outputs, mask=outputs < N, other=0.0).to(tl.float32)[:, None]
            tl.store(y_ptr + places, tl.trans(total.to(y_ptr.dtype.element_ty)), mask=mask)


@triton.jit(do_not_specialize=["num_outputs"])
def _sum_splits_kernel(
    partial_ptr,
    bias_ptr,
    y_ptr,
    num_outputs,  # M * N
    N,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < num_outputs
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + split * num_outputs.to(tl.int64) + places, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + places % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + places, total.to(y_ptr.dtype.element_ty), mask=mask)


def _tiles(dtype: torch.dtype, device: torch.device) -> Tiles:
    return FP32_TILES if dtype.itemsize > 2 else TILES.get(architecture(device), SAFE_TILES)


def bucket_of(rows: int, outputs: int, buckets: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The bucket of a tile table that a matmul of so many rows and outputs falls in."""
    return min(bucket for bucket in buckets if rows <= bucket[0] and outputs <= bucket[1])


def _tile(rows: int, outputs: int, dtype: torch.dtype, device: torch.device) -> Tile:
    tiles = _tiles(dtype, device)
    return tiles[bucket_of(rows, outputs, tiles)]


def row_borders(dtype: torch.dtype, device: torch.device) -> list[int]:
    """Numbers of rows above which `invariant_matmul` runs another kernel, for the same bits, ascending; 0 is first."""
    return [0, *sorted({max_rows for max_rows, _ in _tiles(dtype, device)})[:-1]]


def beats_torch(rows: int, weight: torch.Tensor) -> bool:
    """Whether this is faster than torch's matmul where the order does not matter: so on an H200 for up to FEW_ROWS
    rows at the shapes of Qwen3-8B, by 3 to 13%."""
    large = weight.dtype.itemsize == 2 and weight.numel() >= 1 << 24
    return rows <= FEW_ROWS and large and architecture(weight.device) == "sm_90"


def _has_descriptor(x: torch.Tensor) -> bool:
    """Whether the memory of x  # [rows, K] is laid out as TMA wants it."""
    return x.data_ptr() % 16 == 0 and x.stride(0) > 0 and x.stride(0) * x.itemsize % 16 == 0


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    check(x.dim() == 2, f"x: expected [M, K], got {list(x.shape)}")
    check(x.shape[1] > 0, "x: expected at least one input, got none")
    check(x.stride(1) == 1, "x: last dimension must be contiguous")
    check(x.dtype in DTYPES, f"x: has dtype {x.dtype}, expected one of {DTYPES}")
    expected = f"weight: expected [N, {x.shape[1]}], got {list(weight.shape)}"
    check(weight.dim() == 2 and weight.shape[1] == x.shape[1], expected)
    check(weight.stride(1) == 1, "weight: last dimension must be contiguous")
    check_same("weight", weight, device=x.device, dtype=x.dtype)
    if bias is not None:
        check(bias.shape == weight.shape[:1], f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
        check(bias.stride(0) == 1, "bias: must be contiguous")
        check_same("bias", bias, device=x.device, dtype=x.dtype)


def invariant_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply x  # [M, K] with weight  # [N, K] and add bias  # [N]: a row of y has the same bits in any company.

    The rows of x and weight may be strided. Takes S * M * N * 4 bytes meanwhile, where M is small and S is not 1.
    Returns y  # [M, N] in x's dtype, contiguous. Raises ValueError for a wrong shape, stride, dtype or device.
    """
    _check(x, weight, bias)
    if not use_triton(x):
        return invariant_matmul_reference(x, weight, bias)
    (rows, inputs), outputs = x.shape, weight.shape[0]
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    tile = _tile(rows, outputs, x.dtype, x.device)
    split_k = split_inputs(outputs, inputs)
    splits = cdiv(inputs, split_k)
    parallel = tile.parallel and splits > 1
    partial = torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device) if parallel else None
    items = cdiv(outputs, tile.block_n) * cdiv(rows, tile.block_t) * (splits if parallel else 1)
    tma = tile.tma and _has_descriptor(x) and _has_descriptor(weight)
    launch = dependent_launch(x.device)
    _invariant_matmul_kernel[(min(items, num_multiprocessors(x.device)) if tile.persistent else items,)](
        TensorDescriptor.from_tensor(x, [tile.block_t, tile.block_k]) if tma else x,
        TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]) if tma else weight,
        bias,
        y,
        partial,
        rows,
        outputs,
        inputs,
        x.stride(0),
        weight.stride(0),
        split_k,
        HAS_BIAS=bias is not None,
        SPLITS=splits,
        PARALLEL=parallel,
        BLOCK_N=tile.block_n,
        BLOCK_T=tile.block_t,
        BLOCK_K=tile.block_k,
        GROUP_T=GROUP_T,
        FLATTEN=tile.persistent and (splits == 1 or parallel),
        TMA=tma,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch,
    )
    if partial is not None:
        _sum_splits_kernel[(cdiv(y.numel(), SUM_BLOCK),)](
            partial,
            bias,
            y,
            y.numel(),
            outputs,
            HAS_BIAS=bias is not None,
            SPLITS=splits,
            BLOCK=SUM_BLOCK,
            num_warps=4,
            **launch,
        )
    return y

"""Matmuls of many rows on Hopper (sm_90), in Gluon, with what follows them in the same launch.

    gated_matmul    y = silu(g) * u, g and u the halves of x W^T + b                    (as `silu_mul` behind a matmul)
    heads_matmul    q, k, v = x W^T + b; q and k normed and rotated, k and v stored     (as `rotary_store` behind one)

Legend: M rows (tokens), K inputs, N outputs, H query heads, G KV heads, D head dim. x  # [M, K]; weight  # [2N, K] or
[(H + 2G) * D, K]; bias  # of its rows. Bound by matmul: 2 M K flops for each row of the weight. What follows a matmul
reads and writes all that it wrote, which here is gone: on an H200 at 8,448 rows, gate and up of Qwen3-0.6B take 172 us
in a graph and qkv 139; torch's matmuls with the kernels behind them 202 and 156, without them 164 and 108. So it takes
prompts 7% faster; Qwen3-8B only 0.4%, though its launches timed alone gain 3%.

A tile is 128 rows of x and 256 of the weight. One program for each multiprocessor takes tile after tile. A producer,
one warp, copies blocks of 64 inputs to a ring in shared memory by TMA; two consumer groups of four warps have 64 rows
of x each, multiply them with the tile's weights (wgmma), and finish what follows in registers. Meanwhile the ring fills
for the next tile, and the other group's matmuls go on where it is behind. Other choices, with what they were measured
to give on an H200:
- Tiles of 256 rows of x and 128 of the weight: level to 3% slower.
- Tiles in swaths of 4, 8, 16 or 32 over the rows of x, of which L2 keeps what neighbours read: level within 1%.
- What rotation reads of a token, its place, slot, cosines and sines, is asked for before the tile's matmuls: behind
  them, the launch takes up to 10% longer (qkv of Qwen3-0.6B).
- A tile's outputs go through shared memory, so that stores are whole lines.

The last tile is moved back to where it is full: rows past the end are slow to load. What two programs write so has the
same bits.
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minisgl.kernels.heads_matmul_sm90 import (
    PART,
    ROWS,
    Y_LAYOUT,
    Heads,
    finish_heads,
    has_fitting_heads,
    load_tokens,
    shared_arguments,
)
from minisgl.kernels.hopper import async_load, async_store, barrier
from minisgl.kernels.hopper_matmul import (
    BLOCK_K,
    LAYOUT,
    PAIR,
    check_matmul,
    gate_up,
    is_loadable,
    load_weights,
    multiply,
    new_ring,
    split_pairs,
    weight_descriptor,
)
from minisgl.kernels.launch import cdiv, num_multiprocessors
from minisgl.kernels.matmul_sm90 import MAX_ROWS
from minisgl.kernels.rotary import Rotary

GROUPS = gl.constexpr(2)  # of consumers
BLOCK_M = gl.constexpr(128)
BLOCK_N = gl.constexpr(256)  # rows of the weight: the most that one wgmma takes
STAGES = gl.constexpr(4)  # blocks in the ring, 48 KB each; with 32 KB for outputs, 224 KB of 227
SWATH = gl.constexpr(8)  # tiles over the rows of x that are taken before the next ones over the weight
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24  # of a thread
# Of the outputs that all multiprocessors make in as many turns, so many must be wanted: below, torch is faster.
MIN_FILL = 0.9


class Tiles(NamedTuple):
    """The launch's tiles: over M rows of x and N outputs, each with blocks of inputs."""

    M: gl.tensor
    N: gl.tensor
    over_rows: gl.tensor
    over_outputs: gl.tensor
    num_blocks: gl.tensor


@gluon.jit
def _place(tile, tiles, WIDTH: gl.constexpr):
    """The tile's first row of x and first output."""
    per_swath = SWATH * tiles.over_outputs
    first = tile // per_swath * SWATH
    size = gl.minimum(tiles.over_rows - first, SWATH)
    within = tile % per_swath
    row = (first + within % size) * BLOCK_M
    output = within // size * WIDTH
    return gl.minimum(row, tiles.M - BLOCK_M), gl.minimum(output, tiles.N - WIDTH)


@gluon.jit
def _produce(x_desc, weight_desc, ring, tiles, IS_GATED: gl.constexpr):
    """The producer: one warp that copies all that both consumer groups multiply."""
    WIDTH: gl.constexpr = BLOCK_N // 2 if IS_GATED else BLOCK_N
    turn = 0
    # Consumers write nothing before they have read x, which is asked for after this.
    gdc_wait()
    gdc_launch_dependents()
    for tile in range(gl.program_id(0), tiles.over_rows * tiles.over_outputs, gl.num_programs(0)):
        row, output = _place(tile, tiles, WIDTH)
        for block in range(tiles.num_blocks):
            stage = turn % STAGES
            full = ring.full.index(stage)
            # a fresh barrier counts as one whose phase 1 is over: the first use does not wait
            mbarrier.wait(ring.empty.index(stage), ((turn // STAGES) & 1) ^ 1)
            mbarrier.expect(full, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            load_weights(weight_desc, ring.weight, stage, full, output, block * BLOCK_K, IS_GATED)
            for group in gl.static_range(GROUPS):
                target = ring.x.index(stage * GROUPS + group)
                async_load(x_desc, [row + group * ROWS, block * BLOCK_K], full, target)
            turn += 1


@gluon.jit
def _consume_gated(GROUP: gl.constexpr, y_desc, bias_ptr, ring, buffers, tiles, HAS_BIAS: gl.constexpr):
    """One consumer group of `gated_matmul`."""
    dtype: gl.constexpr = ring.x.dtype
    buffer = buffers.index(GROUP)
    turn = 0
    for tile in range(gl.program_id(0), tiles.over_rows * tiles.over_outputs, gl.num_programs(0)):
        row, output = _place(tile, tiles, PART)
        acc, _ = multiply(GROUP, ring, turn, tiles.num_blocks, False)
        turn += tiles.num_blocks
        mbarrier.arrive(ring.empty.index((turn - 1) % STAGES))
        gate, up = split_pairs(acc)
        if HAS_BIAS:
            columns = output + gl.arange(0, PART, layout=gl.SliceLayout(0, gate.type.layout))
            gate += gl.load(bias_ptr + columns).to(gl.float32)[None, :]
            up += gl.load(bias_ptr + tiles.N + columns).to(gl.float32)[None, :]
        y = gl.convert_layout(gate_up(gate, up, dtype), Y_LAYOUT)
        tma.store_wait(0)  # the tile before has left the buffer
        barrier()
        buffer.store(y)
        fence_async_shared()
        barrier()
        async_store(y_desc, [row + GROUP * ROWS, output], buffer)
    tma.store_wait(0)


@gluon.jit
def _consume_heads(
    GROUP: gl.constexpr,
    heads,
    bias_ptr,
    ring,
    buffers,
    tiles,
    Q_WIDTH: gl.constexpr,
    KV_WIDTH: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_NORM: gl.constexpr,
):
    """One consumer group of `heads_matmul`."""
    dtype: gl.constexpr = ring.x.dtype
    buffer = buffers.index(GROUP)
    turn = 0
    for tile in range(gl.program_id(0), tiles.over_rows * tiles.over_outputs, gl.num_programs(0)):
        row, output = _place(tile, tiles, BLOCK_N)
        tokens = load_tokens(heads, row + GROUP * ROWS, output < Q_WIDTH + KV_WIDTH, tiles.M, ROWS, HEAD_DIM)
        acc, _ = multiply(GROUP, ring, turn, tiles.num_blocks, False)
        turn += tiles.num_blocks
        mbarrier.arrive(ring.empty.index((turn - 1) % STAGES))
        if HAS_BIAS:
            columns = output + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, acc.type.layout))
            acc += gl.load(bias_ptr + columns).to(gl.float32)[None, :]
        parts = acc.to(dtype).reshape([ROWS, 2, PART]).permute((0, 2, 1)).split()
        for part in gl.static_range(2):
            y = gl.convert_layout(parts[part], Y_LAYOUT)
            finish_heads(y, heads, tokens, buffer, output + part * PART, Q_WIDTH, KV_WIDTH, HEAD_DIM, HAS_NORM)


@gluon.jit
def _tiles(M, N, num_blocks, WIDTH: gl.constexpr):
    return Tiles(M, N, (M + BLOCK_M - 1) // BLOCK_M, (N + WIDTH - 1) // WIDTH, num_blocks)


@gluon.jit(do_not_specialize=["M"])
def _gated_matmul(
    x_desc, weight_desc, y_desc, bias_ptr, M, N, num_blocks,
    HAS_BIAS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = x_desc.dtype
    ring = new_ring(dtype, STAGES, GROUPS, ROWS, BLOCK_N, 0)
    buffers = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, PART], LAYOUT)
    tiles = _tiles(M, N, num_blocks, PART)
    gl.warp_specialize(
        [
            (_consume_gated, (0, y_desc, bias_ptr, ring, buffers, tiles, HAS_BIAS)),
            (_consume_gated, (1, y_desc, bias_ptr, ring, buffers, tiles, HAS_BIAS)),
            (_produce, (x_desc, weight_desc, ring, tiles, True)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


# The index tensors are slices of one upload: their alignment changes from step to step and must not recompile.
@gluon.jit(do_not_specialize=["M", "positions_ptr", "slots_ptr"])
def _heads_matmul(
    x_desc,
    weight_desc,
    bias_ptr,
    q_ptr,
    positions_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    cos_sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    M,
    N,
    num_blocks,
    Q_WIDTH: gl.constexpr,
    KV_WIDTH: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_NORM: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    ring = new_ring(dtype, STAGES, GROUPS, ROWS, BLOCK_N, 0)
    buffers = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, PART], LAYOUT)
    tiles = _tiles(M, N, num_blocks, BLOCK_N)
    heads = Heads(q_ptr, positions_ptr, slots_ptr, k_cache_ptr, v_cache_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr, eps)
    gl.warp_specialize(
        [
            (
                _consume_heads,
                (0, heads, bias_ptr, ring, buffers, tiles, Q_WIDTH, KV_WIDTH, HEAD_DIM, HAS_BIAS, HAS_NORM),
            ),
            (
                _consume_heads,
                (1, heads, bias_ptr, ring, buffers, tiles, Q_WIDTH, KV_WIDTH, HEAD_DIM, HAS_BIAS, HAS_NORM),
            ),
            (_produce, (x_desc, weight_desc, ring, tiles, False)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def fits_gated(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `gated_matmul` takes these, valid for torch's, and is faster than torch's matmul and the gate."""
    outputs = weight.shape[0] // 2
    return _fits(x, weight) and outputs % PAIR.value == 0 and _fills(x.shape[0], outputs, PART.value, x.device)


def fits_heads(x: torch.Tensor, weight: torch.Tensor, k_cache: torch.Tensor) -> bool:
    """Whether `heads_matmul` takes these, valid for torch's, and is faster than torch's matmul and `rotary_store`."""
    return (
        _fits(x, weight)
        and has_fitting_heads(weight, k_cache)
        and _fills(x.shape[0], weight.shape[0], BLOCK_N.value, x.device)
    )


def fewest_rows(qkv: torch.Tensor, gate_up: torch.Tensor, most: int) -> set[int]:
    """Numbers of rows, up to `most`, with which each kernel here runs that may with these weights; shapes are those
    of `weight` in `heads_matmul` and `gated_matmul`."""
    first = MAX_ROWS + BLOCK_M.value
    found = set()
    for outputs, width in ((qkv.shape[0], BLOCK_N.value), (gate_up.shape[0] // 2, PART.value)):
        for rows in (*range(first, most, BLOCK_M.value), most):  # so many fill their tiles best
            if rows > MAX_ROWS and _fills(rows, outputs, width, qkv.device):
                found.add(rows)
                break
    return found


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.shape[0] > MAX_ROWS and is_loadable(x, weight)


def _num_tiles(rows: int, outputs: int, width: int) -> int:
    return cdiv(rows, BLOCK_M.value) * cdiv(outputs, width)


def _fills(rows: int, outputs: int, width: int, device: torch.device) -> bool:
    """Whether tiles of `width` outputs keep the multiprocessors busy."""
    processors = num_multiprocessors(device)
    turns = cdiv(_num_tiles(rows, outputs, width), processors)
    return outputs >= width and rows * outputs >= MIN_FILL * turns * processors * BLOCK_M.value * width


def _rows_descriptor(x: torch.Tensor, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [ROWS.value, columns], LAYOUT.value)


def _programs(x: torch.Tensor, outputs: int, width: int) -> tuple[int]:
    return (min(_num_tiles(x.shape[0], outputs, width), num_multiprocessors(x.device)),)


def gated_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """silu(first half of y) * second half, of y = x  # [M, K] times weight  # [2N, K] plus bias  # [2N].

    Returns [M, N] in x's dtype, contiguous. For what `fits_gated` takes; any M from 128 on is right. Raises ValueError
    for a wrong shape, dtype or device.
    """
    check_matmul(x, weight, bias, BLOCK_M.value)
    (rows, inputs), outputs = x.shape, weight.shape[0] // 2
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    _gated_matmul[_programs(x, outputs, PART.value)](
        _rows_descriptor(x, BLOCK_K.value),
        weight_descriptor(weight, BLOCK_N.value, gated=True),
        _rows_descriptor(y, PART.value),
        bias,
        rows,
        outputs,
        cdiv(inputs, BLOCK_K.value),
        HAS_BIAS=bias is not None,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4,
        launch_pdl=True,
    )
    return y


def heads_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rotary: Rotary,
) -> torch.Tensor:
    """The same as `heads_matmul_sm90.heads_matmul`, for what `fits_heads` takes here; any M from 128 on is right."""
    arguments = shared_arguments(x, weight, bias, positions, slots, k_cache, v_cache, rotary, BLOCK_M.value)
    _heads_matmul[_programs(x, weight.shape[0], BLOCK_N.value)](
        _rows_descriptor(x, BLOCK_K.value),
        weight_descriptor(weight, BLOCK_N.value, gated=False),
        **arguments,
        N=weight.shape[0],
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4,
        launch_pdl=True,
    )
    q: torch.Tensor = arguments["q_ptr"]
    return q

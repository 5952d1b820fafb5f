"""A matmul with few rows, as decode runs it: y = x W^T + b, alone or with the RMS norm, gate or addition around it.

    skinny_matmul         y = x W^T + b
    normed_matmul         y = rms_norm(residual) W^T + b, gated: silu(first half of y) * second half
    matmul_into           residual += x W^T + b, and what the next norm needs of it

Legend: M rows (tokens), N outputs, K inputs. x  # [M, K]; weight  # [N, K], [2N, K] when gated; bias  # of its rows.
Bound by memory: the weight is read once, 2 N K bytes in bf16. Products and sums are fp32; y is rounded at the end.

A decode layer is four matmuls, two norms, a gate and attention. An RMS norm divides a row by one number, so it can
divide after the next matmul as well: `matmul_into` leaves the residual times the norm's weight, and sums of squares of
parts of each row (a `Stream`); `normed_matmul` adds those up and divides at its end. With the gate likewise at the end
of its matmul, a layer is four launches and those of attention. Against `rms_norm` and `silu_mul` one rounding is left
out, that of the divided row. A float16 residual times a weight may overflow: there the separate kernels are right.

Where M changes the algorithm, and with it the order of the sum and the rounding:
- M = 1: CUDA cores. A program multiplies a few rows of the weight with x, elementwise, and sums over K at its end.
- M = 2..16: tensor cores. A program multiplies x, padded to 16 rows, with a few rows of the weight. Each of its warps
  has a share of every block of inputs, and at the end their sums are added: so few rows of a narrow weight, which give
  every multiprocessor a program, still have warps enough to keep memory busy.
- M = 17 and more, where there is a rule: the same in larger blocks.
Between these borders a row of y is the same bit for bit whatever M is and whatever the other rows are: K is not split
over programs, and a tile is chosen by N and K. Batch invariance ends at the borders.

Launches are dependent (see dependent_launch.py): the first weights are asked for before the wait, x is read and y is
written after it. The next kernel may start at once, and read ahead no more than weights and what a step prepared.
**weight and bias are constants: no kernel that may still run may write them.**
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from minisgl.kernels.dependent_launch import dependent_launch, start_next_kernel, wait_for_previous_kernel
from minisgl.kernels.launch import architecture, cdiv, check, check_same, use_triton
from minisgl.kernels.silu_mul import silu_mul_reference

ANY = 1 << 62  # no bound
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Tile(NamedTuple):
    """How a program goes over its part of the weight."""

    block_n: int  # rows of the weight
    block_k: int  # inputs at a time; of M > 1 each warp multiplies its share of them
    num_warps: int
    num_stages: int  # blocks in flight; not for M = 1
    preload: int  # blocks of inputs whose weights are loaded to registers before the wait
    block_m: int = 16  # rows of x; not for M = 1


class Rule(NamedTuple):
    """The tile for M up to `max_m`, rows of the weight up to `max_n` and K up to `max_k`."""

    max_m: int  # where M changes the algorithm
    max_n: int
    max_k: int
    tile: Tile


# By architecture; the first rule that holds counts. For 2-byte types; in the interpreter, where a program takes long
# whatever it does, for all.
RULES: dict[str, tuple[Rule, ...]] = {
    "sm_90": (
        Rule(1, 32768, 1024, Tile(4, 512, 1, 1, 3)),
        Rule(1, 2048, ANY, Tile(4, 2048, 4, 1, 2)),
        Rule(1, 5120, 5120, Tile(8, 1024, 4, 1, 2)),
        Rule(1, 5120, 8192, Tile(4, 512, 1, 1, 3)),
        Rule(1, 5120, 16384, Tile(8, 1024, 4, 1, 2)),
        Rule(1, 5120, ANY, Tile(4, 1024, 4, 1, 3)),
        Rule(1, 40960, 4096, Tile(4, 2048, 4, 1, 2)),
        Rule(1, 8192, ANY, Tile(8, 1024, 4, 1, 2)),
        Rule(1, 16384, 8192, Tile(4, 1024, 4, 1, 3)),
        Rule(1, 65536, ANY, Tile(2, 1024, 1, 1, 3)),
        Rule(1, ANY, ANY, Tile(4, 1024, 2, 1, 3)),
        Rule(16, 2048, ANY, Tile(8, 1024, 4, 1, 3)),
        Rule(16, 6144, 1024, Tile(16, 512, 4, 1, 2)),
        Rule(16, 4096, ANY, Tile(16, 512, 4, 3, 2)),
        Rule(16, 6144, ANY, Tile(16, 512, 4, 3, 1)),
        Rule(16, 8192, ANY, Tile(32, 128, 1, 5, 0)),
        Rule(16, 65536, ANY, Tile(64, 128, 2, 4, 0)),
        Rule(16, ANY, ANY, Tile(32, 128, 1, 5, 0)),
    ),
    "cpu": (Rule(1, ANY, ANY, Tile(32, 512, 4, 1, 2)), Rule(16, ANY, ANY, Tile(32, 128, 4, 1, 0))),
}
# An architecture without rules.
SAFE_RULES = (Rule(1, ANY, ANY, Tile(4, 1024, 4, 1, 1)), Rule(16, ANY, ANY, Tile(16, 128, 4, 2, 0)))
FP32_RULES = (Rule(1, ANY, ANY, Tile(4, 512, 4, 1, 1)), Rule(16, ANY, ANY, Tile(16, 64, 4, 2, 0)))


class Stream(NamedTuple):
    """The residual stream between two matmuls, and what the RMS norm between them needs."""

    residual: torch.Tensor  # [M, D]
    scaled: torch.Tensor  # [M, D], residual * weight of the next norm
    squares: torch.Tensor  # [M, parts] fp32, sums of squares of parts of each row of the residual
    eps: float  # of the norms


def skinny_matmul_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same in torch; x  # [M, K], weight  # [N, K], bias  # [N]; returns [M, N]."""
    return torch.nn.functional.linear(x, weight, bias)


def normed_matmul_reference(
    stream: Stream, weight: torch.Tensor, bias: torch.Tensor | None = None, *, gated: bool = False
) -> torch.Tensor:
    """The same in torch; shapes as in `normed_matmul`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    mean = stream.squares.sum(1, keepdim=True, dtype=wide) / stream.residual.shape[1]
    y = stream.scaled.to(wide) @ weight.to(wide).t() * torch.rsqrt(mean + stream.eps)
    y = (y if bias is None else y + bias.to(wide)).to(weight.dtype)
    return silu_mul_reference(y) if gated else y


def matmul_into_reference(
    stream: Stream, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm_weight: torch.Tensor
) -> Stream:
    """The same in torch; shapes as in `matmul_into`. Updates the residual in place."""
    return stream_reference(stream.residual.add_(torch.nn.functional.linear(x, weight, bias)), norm_weight, stream.eps)


def stream_reference(residual: torch.Tensor, norm_weight: torch.Tensor, eps: float) -> Stream:
    """The stream of a residual  # [M, D] before the norm with norm_weight  # [D], in torch."""
    wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
    return Stream(residual, (wide * norm_weight).to(residual.dtype), wide.square().sum(1, keepdim=True), eps)


@triton.jit
def _row_pointers(weight_ptr, outputs, N, weight_stride):
    """Pointers to the weight's rows, [BLOCK_N]; past N to the last row again, so that loads need no mask for it."""
    return weight_ptr + tl.minimum(outputs, N - 1).to(tl.int64) * weight_stride


@triton.jit
def _load_weight(row_ptr, start, K, BLOCK_K: tl.constexpr):
    """Inputs start..start + BLOCK_K of the rows at row_ptr  # [BLOCK_N]; zeros past K."""
    cols = start + tl.arange(0, BLOCK_K)
    # Read once: it should not push x, and what the step still needs, out of the cache.
    return tl.load(row_ptr[:, None] + cols[None, :], mask=(cols < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_squares(squares_ptr, rows, row_mask, PARTS: tl.constexpr):
    """The sums of squares of PARTS parts of rows  # [BLOCK_M, parts], zeros past the last part."""
    parts = tl.arange(0, triton.next_power_of_2(PARTS))
    mask = row_mask[:, None] & (parts < PARTS)[None, :]
    return tl.load(squares_ptr + rows[:, None] * PARTS + parts[None, :], mask=mask, other=0.0)


@triton.jit
def _finish(
    y,
    up,
    squares,
    rows,
    row_mask,
    N,
    K,
    eps,
    bias_ptr,
    y_ptr,
    norm_ptr,
    residual_ptr,
    squares_ptr,
    HAS_BIAS: tl.constexpr,
    NORMED: tl.constexpr,
    GATED: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What is left to do with a block of sums y (and up, if GATED)  # [BLOCK_M, BLOCK_N] fp32; squares of NORMED."""
    block = tl.program_id(0)
    outputs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = outputs < N
    mask = row_mask[:, None] & is_output[None, :]
    dtype = y_ptr.dtype.element_ty
    if NORMED:
        scale = tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
        y *= scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    y = y.to(dtype)
    if GATED:
        if NORMED:
            up *= scale
        if HAS_BIAS:
            up += tl.load(bias_ptr + N + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
        gate = y.to(tl.float32)
        y = ((gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)).to(dtype)
    places = rows.to(tl.int64)[:, None] * N + outputs[None, :]
    if ADDS:
        residual = tl.load(residual_ptr + places, mask=mask, other=0.0).to(tl.float32) + y.to(tl.float32)
        residual = residual.to(dtype)
        tl.store(residual_ptr + places, residual, mask=mask)
        wide = residual.to(tl.float32)
        norm = tl.load(norm_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)
        y = (wide * norm[None, :]).to(dtype)
        sums = tl.sum(tl.where(mask, wide * wide, 0.0), 1)
        tl.store(squares_ptr + rows * tl.num_programs(0) + block, sums, mask=row_mask)
    tl.store(y_ptr + places, y, mask=mask)


# Sizes and strides are specialised, since as multiples of 16 they keep loads and stores 16 bytes wide.
@triton.jit
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    norm_ptr,
    residual_ptr,
    squares_in_ptr,
    squares_out_ptr,
    N,
    K,
    weight_stride,
    eps,
    HAS_BIAS: tl.constexpr,
    NORMED: tl.constexpr,
    GATED: tl.constexpr,
    ADDS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRELOAD: tl.constexpr,
    PDL: tl.constexpr,
):
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ptr = _row_pointers(weight_ptr, outputs, N, weight_stride)
    up_ptr = row_ptr + tl.full([], N, tl.int64) * weight_stride
    preloaded = ()
    preloaded_up = ()
    for block in tl.static_range(PRELOAD):
        preloaded += (_load_weight(row_ptr, block * BLOCK_K, K, BLOCK_K),)  # type: ignore[assignment]
        if GATED:
            preloaded_up += (_load_weight(up_ptr, block * BLOCK_K, K, BLOCK_K),)  # type: ignore[assignment]
    start_next_kernel(PDL)
    wait_for_previous_kernel(PDL)

    row = tl.arange(0, 1)
    squares = tl.zeros([1, 1], tl.float32)
    if NORMED:
        squares = _load_squares(squares_in_ptr, row, row == 0, PARTS)
    products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for block in tl.static_range(PRELOAD):
        cols = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :]
        products += preloaded[block].to(tl.float32) * x
        if GATED:
            up_products += preloaded_up[block].to(tl.float32) * x
    for start in range(PRELOAD * BLOCK_K, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :]
        products += _load_weight(row_ptr, start, K, BLOCK_K).to(tl.float32) * x
        if GATED:
            up_products += _load_weight(up_ptr, start, K, BLOCK_K).to(tl.float32) * x
    _finish(
        tl.sum(products, 1)[None, :], tl.sum(up_products, 1)[None, :], squares, row, row == 0, N, K, eps,
        bias_ptr, y_ptr, norm_ptr, residual_ptr, squares_out_ptr, HAS_BIAS, NORMED, GATED, ADDS, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _split_inputs(start, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """Inputs start..start + BLOCK_K as [SPLIT, 1, BLOCK_K / SPLIT]."""
    PART: tl.constexpr = BLOCK_K // SPLIT
    return start + tl.arange(0, SPLIT)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]


@triton.jit
def _split_weight(row_ptr, start, K, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """`_load_weight` as [SPLIT, BLOCK_N, BLOCK_K / SPLIT]."""
    cols = _split_inputs(start, BLOCK_K, SPLIT)
    return tl.load(row_ptr[None, :, None] + cols, mask=cols < K, other=0.0, eviction_policy="evict_first")


@triton.jit
def _split_rows(row_ptr, row_mask, start, K, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """The same inputs of the rows of x at row_ptr  # [BLOCK_M], as [SPLIT, BLOCK_M, BLOCK_K / SPLIT]; zeros past K and
    M."""
    cols = _split_inputs(start, BLOCK_K, SPLIT)
    return tl.load(row_ptr[None, :, None] + cols, mask=row_mask[None, :, None] & (cols < K), other=0.0)


@triton.jit
def _add_product(acc, x, weight):
    """acc  # [SPLIT, BLOCK_M, BLOCK_N] plus what each warp has of x times the weight."""
    return tl.dot(x, tl.permute(weight, (0, 2, 1)), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["M"])
def _mma_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    norm_ptr,
    residual_ptr,
    squares_in_ptr,
    squares_out_ptr,
    M,
    N,
    K,
    x_stride,
    weight_stride,
    eps,
    HAS_BIAS: tl.constexpr,
    NORMED: tl.constexpr,
    GATED: tl.constexpr,
    ADDS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRELOAD: tl.constexpr,
    PDL: tl.constexpr,
):
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    row_ptr = _row_pointers(weight_ptr, outputs, N, weight_stride)
    up_ptr = row_ptr + tl.full([], N, tl.int64) * weight_stride
    preloaded = ()
    preloaded_up = ()
    for block in tl.static_range(PRELOAD):
        preloaded += (_split_weight(row_ptr, block * BLOCK_K, K, BLOCK_K, SPLIT),)  # type: ignore[assignment]
        if GATED:
            preloaded_up += (_split_weight(up_ptr, block * BLOCK_K, K, BLOCK_K, SPLIT),)  # type: ignore[assignment]
    start_next_kernel(PDL)
    wait_for_previous_kernel(PDL)

    x_row_ptr = x_ptr + rows.to(tl.int64) * x_stride
    acc = tl.zeros([SPLIT, BLOCK_M, BLOCK_N], tl.float32)
    up_acc = tl.zeros([SPLIT, BLOCK_M, BLOCK_N], tl.float32)
    for block in tl.static_range(PRELOAD):
        x = _split_rows(x_row_ptr, row_mask, block * BLOCK_K, K, BLOCK_K, SPLIT)
        acc = _add_product(acc, x, preloaded[block])
        if GATED:
            up_acc = _add_product(up_acc, x, preloaded_up[block])
    for start in range(PRELOAD * BLOCK_K, K, BLOCK_K):
        x = _split_rows(x_row_ptr, row_mask, start, K, BLOCK_K, SPLIT)
        acc = _add_product(acc, x, _split_weight(row_ptr, start, K, BLOCK_K, SPLIT))
        if GATED:
            up_acc = _add_product(up_acc, x, _split_weight(up_ptr, start, K, BLOCK_K, SPLIT))
    squares = tl.zeros([BLOCK_M, 1], tl.float32)
    if NORMED:  # here and not before the loop, whose loads should be sent for first
        squares = _load_squares(squares_in_ptr, rows, row_mask, PARTS)
    _finish(
        tl.sum(acc, 0), tl.sum(up_acc, 0), squares, rows, row_mask, N, K, eps,
        bias_ptr, y_ptr, norm_ptr, residual_ptr, squares_out_ptr, HAS_BIAS, NORMED, GATED, ADDS, BLOCK_N,
    )  # fmt: skip


def _rules(dtype: torch.dtype, device: torch.device) -> tuple[Rule, ...]:
    name = architecture(device)
    return FP32_RULES if dtype.itemsize > 2 and name != "cpu" else RULES.get(name, SAFE_RULES)


def _rule(rows: int, weight: torch.Tensor) -> Rule:
    """The rule for x of `rows` rows, up to the last of `row_borders`."""
    outputs, inputs = weight.shape
    rules = _rules(weight.dtype, weight.device)
    return next(rule for rule in rules if rows <= rule.max_m and outputs <= rule.max_n and inputs <= rule.max_k)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    stream_in: Stream | None = None,
    gated: bool = False,
    stream_out: Stream | None = None,
    norm_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch the kernel for x's number of rows; the arguments are checked. Returns y, and the squares of stream_out."""
    (rows, inputs), outputs = x.shape, weight.shape[0] // (1 + gated)
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y, None
    tile = _rule(rows, weight).tile
    block_n = tile.block_n // (1 + gated)
    blocks = cdiv(outputs, block_n)
    squares = None
    if stream_out is not None:
        squares = torch.empty(rows, blocks, dtype=torch.float32, device=x.device)
    options = {
        "HAS_BIAS": bias is not None,
        "NORMED": stream_in is not None,
        "GATED": gated,
        "ADDS": stream_out is not None,
        "PARTS": stream_in.squares.shape[1] if stream_in is not None else 1,
        "BLOCK_N": block_n,
        "BLOCK_K": tile.block_k,
        "PRELOAD": min(tile.preload, cdiv(inputs, tile.block_k)),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **dependent_launch(x.device),
    }
    pointers = (
        x, weight, bias, y, norm_weight,
        stream_out.residual if stream_out is not None else None,
        stream_in.squares if stream_in is not None else None,
        squares,
    )  # fmt: skip
    eps = stream_in.eps if stream_in is not None else 0.0
    if rows == 1:
        _gemv_kernel[(blocks,)](*pointers, outputs, inputs, weight.stride(0), eps, **options)
    else:
        options |= {"BLOCK_M": tile.block_m, "SPLIT": tile.num_warps}
        sizes = rows, outputs, inputs, x.stride(0), weight.stride(0), eps
        _mma_kernel[(blocks, cdiv(rows, tile.block_m))](*pointers, *sizes, **options)
    return y, squares


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    check(x.dim() == 2, f"x: expected [M, K], got {list(x.shape)}")
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
    most = row_borders(x.dtype, x.device)[-1]
    check(x.shape[0] <= most, f"x: expected up to {most} rows on this device, got {x.shape[0]}")


def row_borders(dtype: torch.dtype, device: torch.device) -> list[int]:
    """The numbers of rows after which the algorithm changes, ascending; the launchers take no more than the last."""
    return sorted({rule.max_m for rule in _rules(dtype, device)})


def skinny_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply x  # [M, K] with weight  # [N, K] and add bias  # [N]; M up to the last of `row_borders`.

    The rows of x and weight may be strided.
    Returns y  # [M, N] in x's dtype, contiguous. Raises ValueError for a wrong shape, stride, dtype or device.
    """
    _check(x, weight, bias)
    if not use_triton(x):
        return skinny_matmul_reference(x, weight, bias)
    return _launch(x, weight, bias)[0]


def normed_matmul(
    stream: Stream, weight: torch.Tensor, bias: torch.Tensor | None = None, *, gated: bool = False
) -> torch.Tensor:
    """The stream's residual, RMS-normed, times weight  # [N, K], plus bias  # [N]; M up to the last of `row_borders`.

    gated: weight is [2N, K], bias [2N], and y is silu(first half) * second half. Returns y  # [M, N]. Raises
    ValueError for a wrong shape, stride, dtype or device.
    """
    _check(stream.scaled, weight, bias)
    check(not gated or weight.shape[0] % 2 == 0, f"weight: expected an even number of rows, got {weight.shape[0]}")
    check_stream(stream)
    if not use_triton(weight):
        return normed_matmul_reference(stream, weight, bias, gated=gated)
    return _launch(stream.scaled, weight, bias, stream_in=stream, gated=gated)[0]


def matmul_into(
    stream: Stream, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm_weight: torch.Tensor
) -> Stream:
    """Add x W^T + b to the residual in place; x  # [M, K], weight  # [D, K], bias  # [D]; M up to the last border.

    norm_weight  # [D], of the norm that reads the residual next. Returns the stream with the same residual and the
    rest made anew. Raises ValueError for a wrong shape, stride, dtype or device.
    """
    _check(x, weight, bias)
    check_stream(stream)
    expected = [x.shape[0], weight.shape[0]]
    check(list(stream.residual.shape) == expected, f"stream: expected {expected}, got {list(stream.residual.shape)}")
    check_same("stream", stream.residual, device=x.device, dtype=x.dtype)
    check(
        norm_weight.shape == weight.shape[:1], f"norm_weight: expected [{expected[1]}], got {list(norm_weight.shape)}"
    )
    check_same("norm_weight", norm_weight, device=x.device, dtype=x.dtype)
    if not use_triton(x):
        return matmul_into_reference(stream, x, weight, bias, norm_weight)
    scaled, squares = _launch(x, weight, bias, stream_out=stream, norm_weight=norm_weight)
    return Stream(stream.residual, scaled, stream.squares if squares is None else squares, stream.eps)


def check_stream(stream: Stream) -> None:
    """Raise ValueError unless the tensors of a stream fit together."""
    residual, scaled, squares, _ = stream
    check(residual.dim() == 2 and scaled.shape == residual.shape, "stream: residual and scaled must be [M, D] both")
    check(squares.dim() == 2 and len(squares) == len(residual), "stream: squares must be [M, parts]")
    check(all(x.is_contiguous() for x in stream[:3]), "stream: must be contiguous")
    check_same("stream.scaled", scaled, device=residual.device, dtype=residual.dtype)
    check(squares.device == residual.device, f"stream.squares: is on {squares.device}, expected {residual.device}")

"""A matmul with few rows, as decode runs it: y = x W^T + b for x of 1 to 16 rows; and the choice between it and torch.

    y[m, n] = sum_k x[m, k] weight[n, k] + bias[n]

Legend: M rows (tokens), N outputs, K inputs. x  # [M, K]; weight  # [N, K]; bias  # [N]; y  # [M, N].
Bound by memory: the weight is read once, 2 N K bytes in bf16. Products and sums are fp32; one rounding, at the end.

Where M changes the algorithm, and with it the order of the sum and the rounding:
- M = 1: CUDA cores. A program multiplies a few rows of the weight with x, elementwise, and sums over K at its end.
- M = 2..16: tensor cores. A program multiplies x, padded to 16 rows, with a few rows of the weight.
- M > 16, and wherever torch is as fast: torch, so cuBLAS, which has borders of its own.
Within the first two a row of y is the same bit for bit whatever M is and whatever the other rows are: K is not split
over programs, and a tile is chosen by N and K. Batch invariance ends at the borders.

A decode step is a chain of such matmuls, each of a few microseconds, of which a launch takes one. With programmatic
dependent launch (`Tile.pdl`) a kernel starts while the one before it on the stream still runs, sends for its first
weights, and only then waits for that kernel's end; every program waits, so that a kernel's end implies the end of all
before it. x is read and y is written after the wait. **weight and bias are constants: the kernel just before on the
stream must not be the one that writes them.** 112 dependent matmuls of a 0.6B model, M = 1, on an H200: 341 us so,
421 with plain launches, 851 with torch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from minisgl.kernels.launch import architecture, check, check_same, use_triton

MAX_M = 16  # rows of x: the rows of one tensor core instruction
BLOCK_M = tl.constexpr(MAX_M)
ANY = 1 << 62  # no bound
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Tile(NamedTuple):
    """How a program goes over its part of the weight."""

    block_n: int  # rows of the weight
    block_k: int  # inputs at a time
    num_warps: int
    num_stages: int  # blocks in flight, M = 2..16 alone
    preload: int  # blocks of inputs whose weights are loaded before the wait: M = 1 to registers, else to L2
    pdl: bool = False  # programmatic dependent launch: sm_90 and later


class Rule(NamedTuple):
    """The tile for M up to `max_m`, N up to `max_n` and K up to `max_k`."""

    max_m: int  # 1 or MAX_M: where M changes the algorithm
    max_n: int
    max_k: int
    tile: Tile
    wins: bool = False  # faster than torch: `matmul` takes it


# By architecture; the first rule that holds counts. For 2-byte types.
RULES: dict[str, tuple[Rule, ...]] = {
    "sm_90": (
        Rule(1, 2048, ANY, Tile(2, 2048, 2, 1, 3, pdl=True), wins=True),
        Rule(1, ANY, ANY, Tile(4, 1024, 2, 1, 3, pdl=True), wins=True),
        Rule(MAX_M, 2048, ANY, Tile(8, 256, 1, 5, 16, pdl=True), wins=True),
        Rule(MAX_M, 4096, ANY, Tile(16, 512, 2, 4, 0, pdl=True), wins=True),
        Rule(MAX_M, 32768, ANY, Tile(16, 256, 2, 5, 0, pdl=True)),  # torch is level
        Rule(MAX_M, ANY, ANY, Tile(64, 128, 4, 4, 0, pdl=True), wins=True),  # LM heads: 72.6 us against 77.6
    ),
    "cpu": (Rule(1, ANY, ANY, Tile(8, 512, 4, 1, 2)), Rule(MAX_M, ANY, ANY, Tile(32, 128, 4, 1, 0))),
}
# An architecture without rules: nothing is measured, so `matmul` leaves it to torch.
SAFE_RULES = (Rule(1, ANY, ANY, Tile(4, 1024, 4, 1, 1)), Rule(MAX_M, ANY, ANY, Tile(16, 128, 4, 2, 0)))
FP32_RULES = (Rule(1, ANY, ANY, Tile(4, 512, 4, 1, 1)), Rule(MAX_M, ANY, ANY, Tile(16, 64, 4, 2, 0)))


def skinny_matmul_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same in torch; x  # [M, K], weight  # [N, K], bias  # [N]; returns [M, N]."""
    return torch.nn.functional.linear(x, weight, bias)


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
def _wait_for_previous_kernel(PDL: tl.constexpr):
    """Before this nothing may be read that a kernel made, and nothing written. The next kernel may start here."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


# K and the strides are specialised, since as multiples of 16 they keep the loads 16 bytes wide.
@triton.jit(do_not_specialize=["N"])
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    N,
    K,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRELOAD: tl.constexpr,
    PDL: tl.constexpr,
):
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ptr = _row_pointers(weight_ptr, outputs, N, weight_stride)
    preloaded = ()
    for block in tl.static_range(PRELOAD):
        preloaded += (_load_weight(row_ptr, block * BLOCK_K, K, BLOCK_K),)  # type: ignore[assignment]
    _wait_for_previous_kernel(PDL)

    products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for block in tl.static_range(PRELOAD):
        cols = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + cols, mask=cols < K, other=0.0)
        products += preloaded[block].to(tl.float32) * x.to(tl.float32)[None, :]
    for start in range(PRELOAD * BLOCK_K, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + cols, mask=cols < K, other=0.0)
        products += _load_weight(row_ptr, start, K, BLOCK_K).to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(products, 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + outputs, mask=outputs < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + outputs, y.to(y_ptr.dtype.element_ty), mask=outputs < N)


@triton.jit
def _prefetch(row_ptr, inputs, BLOCK_K: tl.constexpr):
    """Ask for the first `inputs` inputs of the rows at row_ptr  # [BLOCK_N] to be brought to the L2 cache."""
    LINE: tl.constexpr = 128 * 8 // row_ptr.dtype.element_ty.primitive_bitwidth  # elements of a cache line
    lines = tl.arange(0, BLOCK_K // LINE) * LINE
    for start in range(0, inputs, BLOCK_K):
        cols = tl.minimum(start + lines, inputs - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",  # inline assembly must have a result
            "=r,l",
            [(row_ptr[:, None] + cols[None, :]).to(tl.int64, bitcast=True)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["M", "N"])
def _skinny_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    x_stride,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRELOAD: tl.constexpr,
    PDL: tl.constexpr,
):
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    row_ptr = _row_pointers(weight_ptr, outputs, N, weight_stride)
    if PDL:
        _prefetch(row_ptr, tl.minimum(PRELOAD * BLOCK_K, K), BLOCK_K)
    _wait_for_previous_kernel(PDL)

    x_row_ptr = x_ptr + rows.to(tl.int64) * x_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        mask = (rows < M)[:, None] & (cols < K)[None, :]
        x = tl.load(x_row_ptr[:, None] + cols[None, :], mask=mask, other=0.0)
        weight = _load_weight(row_ptr, start, K, BLOCK_K)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + rows.to(tl.int64)[:, None] * N + outputs[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (outputs < N)[None, :])


def _rule(rows: int, weight: torch.Tensor) -> Rule:
    """The rule for x of `rows` rows, 1 to MAX_M."""
    rules = FP32_RULES if weight.dtype.itemsize > 2 else RULES.get(architecture(weight.device), SAFE_RULES)
    outputs, inputs = weight.shape
    return next(rule for rule in rules if rows <= rule.max_m and outputs <= rule.max_n and inputs <= rule.max_k)


def _launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, tile: Tile) -> None:
    """Launch the kernel for x's number of rows; the arguments are checked and y is not empty."""
    rows, inputs = x.shape
    outputs = weight.shape[0]
    grid = (triton.cdiv(outputs, tile.block_n),)
    options = {
        "HAS_BIAS": bias is not None,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "PRELOAD": min(tile.preload, triton.cdiv(inputs, tile.block_k)) if rows == 1 else tile.preload,
        "PDL": tile.pdl,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    if tile.pdl:
        options["launch_pdl"] = True  # AMD's backend does not know the option
    if rows == 1:
        _gemv_kernel[grid](x, weight, bias, y, outputs, inputs, weight.stride(0), **options)
    else:
        strides = x.stride(0), weight.stride(0)
        _skinny_kernel[grid](x, weight, bias, y, rows, outputs, inputs, *strides, **options)


def skinny_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply x  # [M, K], M of 0 to 16, with weight  # [N, K] and add bias  # [N]; rows may be strided.

    The kernel just before this one on the stream must not be the one that writes weight or bias: see the module.
    Returns y  # [M, N] in x's dtype, contiguous. Raises ValueError for a wrong shape, stride, dtype or device.
    """
    check(x.dim() == 2 and x.shape[0] <= MAX_M, f"x: expected [M, K] of up to {MAX_M} rows, got {list(x.shape)}")
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
    if not use_triton(x):
        return skinny_matmul_reference(x, weight, bias)

    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        _launch(x, weight, bias, y, _rule(x.shape[0], weight).tile)
    return y


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b by `skinny_matmul` where it is known to be faster than torch, else by torch; shapes as there, any M."""
    rows, inputs = x.shape
    whole_loads = weight.dtype.itemsize == 2 and inputs % 16 == 0  # others are slow: no load is 16 bytes wide
    if 1 <= rows <= MAX_M and x.is_cuda and whole_loads and _rule(rows, weight).wins:
        return skinny_matmul(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)

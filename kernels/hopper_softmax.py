"""The online softmax of Hopper's attention, in Gluon: what a consumer group of four warps does with the scores of a
block, in registers, as wgmma leaves them there.

A thread has scores of two rows. What saves it instructions:
- The threads of a row add up their sums once a tile, not once a block.
- A row's maximum is replaced, and its sums rescaled, only where weights would grow by more than 2^8.
- Two of these are in assembly: the mask, and the branch around the rescaling, which Gluon cannot say of a warp.
Knows nothing of memory, pages and tiles.
Source of the rule for rescaling: Zadouri et al., "FlashAttention-4", 2026.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MAX_GROWTH = gl.constexpr(8.0)  # of weights, as a power of 2
SUMS = gl.constexpr(32)  # of a thread that are rescaled together


@gluon.jit
def thread_sums(x):
    """The sums of each thread's columns of a row of scores  # [rows, 4]; no thread waits for another."""
    return gl.sum(gl.sum(x.reshape([x.shape[0], x.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _hide_later(scores, keys, places):
    """Scores of queries at `places` with `keys`, and -inf where the key is later. Of `gl.where` the compiler packs the
    conditions into bits and unpacks them, which takes as many instructions again as the rest of the softmax."""
    keys, places = gl.broadcast(keys[None, :], places[:, None])
    return gl.inline_asm_elementwise(
        "{ .reg .pred sees; setp.le.s32 sees, $2, $3; selp.f32 $0, $1, 0fFF800000, sees; }",
        "=f,f,r,r",
        [scores, keys, places],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def softmax_block(scores, row_max, row_sum, scale_log2, places, keys, MASKED: gl.constexpr):
    """One block of the online softmax: its weights, the new maximum, or an old one that is not far below it, the new
    sum, and what the sums so far shrink by."""
    if MASKED:
        scores = _hide_later(scores, keys, places)
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
    new_max = gl.where(new_max > row_max + MAX_GROWTH, new_max, row_max)
    shift = new_max
    if MASKED:  # a query may have seen no key yet: -inf - -inf is NaN
        shift = gl.where(new_max == -float("inf"), 0.0, new_max)
    weights = gl.exp2(scores * scale_log2 - shift[:, None])
    factors = gl.exp2(row_max - shift)
    row_sum = row_sum * gl.convert_layout(factors, gl.SliceLayout(1, row_sum.type.layout))[:, None]
    return weights, new_max, row_sum + thread_sums(weights), factors


def _rescale_asm() -> str:
    """PTX that multiplies sums $0.. by the factors behind them, unless those are 1 in the whole warp. A thread has sums
    of two rows, two of each in turn: the first and the third factor are all there are."""
    sums = SUMS.value
    return "\n".join(
        [
            "{ .reg .pred grew, any;",
            f"setp.ne.f32 grew, ${2 * sums}, 0f3F800000;",
            f"setp.ne.or.f32 grew, ${2 * sums + 2}, 0f3F800000, grew;",
            "vote.sync.any.pred any, grew, 0xffffffff;",
            "@!any bra DONE;",
            *(f"mul.f32 ${i}, ${i}, ${2 * sums + i};" for i in range(sums)),
            "DONE: }",
        ]
    )


RESCALE_ASM = gl.constexpr(_rescale_asm())
# Results, the sums in the same registers, factors.
RESCALE_OPERANDS = gl.constexpr(
    ",".join(["=f"] * SUMS.value + [str(i) for i in range(SUMS.value)] + ["f"] * SUMS.value)
)


@gluon.jit
def rescale(acc, factors):
    """acc  # [rows, D] times factors  # [rows], which are 1 more often than not."""
    factors = gl.convert_layout(factors, gl.SliceLayout(1, acc.type.layout))[:, None]
    acc, factors = gl.broadcast(acc, factors)
    return gl.inline_asm_elementwise(
        RESCALE_ASM, RESCALE_OPERANDS, [acc, factors], dtype=gl.float32, is_pure=True, pack=SUMS
    )

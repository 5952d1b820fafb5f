"""Gumbel noise that depends on nothing but (seed, position, stream, number): what `sampling` adds to log-weights.

Random bits are the first word of Philox4x32-10 with the seed as key and (number, position, stream, 0) as counter. In
stream TOKENS a number is a token id, in stream BLOCKS the number of a block of token ids.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

import torch
import triton
import triton.language as tl

TOKENS, BLOCKS = tl.constexpr(0), tl.constexpr(1)  # streams


def random_bits_reference(
    seed: torch.Tensor, positions: torch.Tensor, numbers: torch.Tensor, stream: tl.constexpr
) -> torch.Tensor:
    """32 random bits in int64  # [N, C]; seed, positions  # [N] integers; numbers  # [N, C] or [C] integers."""
    low32 = 0xFFFFFFFF
    key_0, key_1 = (seed & low32)[:, None], (seed >> 32 & low32)[:, None]
    c0 = numbers.long().expand(len(seed), -1)
    c1 = (positions.long() & low32)[:, None].expand_as(c0)
    c2, c3 = torch.full_like(c0, stream.value), torch.zeros_like(c0)
    for _ in range(10):  # int64 products wrap around; all their 64 bits are right
        product_0, product_2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (product_2 >> 32 & low32) ^ c1 ^ key_0, product_2 & low32
        c2, c3 = (product_0 >> 32 & low32) ^ c3 ^ key_1, product_0 & low32
        key_0, key_1 = key_0 + 0x9E3779B9 & low32, key_1 + 0xBB67AE85 & low32
    return c0


def gumbel_reference(
    seed: torch.Tensor, positions: torch.Tensor, numbers: torch.Tensor, stream: tl.constexpr
) -> torch.Tensor:
    """The noise of `random_bits_reference`'s bits  # [N, C] fp32, all finite.

    The bits equal the kernel's; the logarithms may differ from its in the last place.
    """
    bits = random_bits_reference(seed, positions, numbers, stream)
    uniform = (bits.float() * 2.0**-32 + 2.0**-33).clamp_max(1 - 2.0**-24)  # never 0 or 1
    return -torch.log(-torch.log1p(-uniform))


@triton.jit
def gumbel(seed, position, numbers, STREAM: tl.constexpr):
    """The noise of int32 `numbers`, of any shape: -log(e) with e = -log(1 - u) exponential.

    Large noise comes from small u, where floats are dense, but 1 - u would lose their digits: there the series of the
    logarithm is used, cut below fp32's precision.
    """
    zeros = tl.zeros_like(numbers)
    bits, _, _, _ = tl.philox(seed, numbers, zeros + position, zeros + STREAM, zeros)
    u = tl.minimum(bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.99999994039535522)
    series = u * (1.0 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6))))))
    return -tl.log(tl.where(u < 0.0625, series, -tl.log(1.0 - u)))

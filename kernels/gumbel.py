"""Gumbel noise that depends on nothing but (seed, position, token): what `sampling` adds to the logits.

Random bits are Philox4x32-10 with the seed as key and (counter, position, stream, 0) as counter. In stream 0 each
aligned block of 4096 token ids has 1024 counters; output j of counter i of block b belongs to token b * 4096 + j * 1024
+ i. So one call serves four tokens, and no tile size can change the noise. In stream 1, output 0 of counter b belongs
to block b.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

import torch
import triton
import triton.language as tl

NOISE_BLOCK = tl.constexpr(4096)  # token ids that share 1024 counters


def philox_reference(
    seed: torch.Tensor, positions: torch.Tensor, counters: int, stream: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The four outputs of counters 0, 1, ...; seed, positions  # [N]; each output [N, counters], 32 bits in int64."""
    low32 = 0xFFFFFFFF
    key_0, key_1 = (seed & low32)[:, None], (seed >> 32 & low32)[:, None]
    c0 = torch.arange(counters, device=seed.device).expand(len(seed), -1)
    c1 = (positions.long() & low32)[:, None].expand_as(c0)
    c2, c3 = torch.full_like(c0, stream), torch.zeros_like(c0)
    for _ in range(10):  # int64 products wrap around; all their 64 bits are right
        product_0, product_2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (product_2 >> 32 & low32) ^ c1 ^ key_0, product_2 & low32
        c2, c3 = (product_0 >> 32 & low32) ^ c3 ^ key_1, product_0 & low32
        key_0, key_1 = key_0 + 0x9E3779B9 & low32, key_1 + 0xBB67AE85 & low32
    return c0, c1, c2, c3


def random_bits_reference(seed: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """32 random bits for every token of N samples; seed, positions  # [N]; returns [N, V] int64."""
    blocks = triton.cdiv(vocab, NOISE_BLOCK.value)
    counters = blocks * 1024 if blocks > 1 else min(vocab, 1024)
    outputs = philox_reference(seed, positions, counters, stream=0)
    return torch.stack([c.reshape(len(seed), blocks, -1) for c in outputs], dim=2).flatten(1)[:, :vocab]


def gumbel_reference(seed: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """The noise of every token of N samples; seed, positions  # [N]; returns [N, V] fp32, all finite.

    The bits equal the kernel's; the logarithms may differ from its in the last place.
    """
    return _gumbel_of_bits(random_bits_reference(seed, positions, vocab))


def block_gumbel_reference(seed: torch.Tensor, positions: torch.Tensor, blocks: int) -> torch.Tensor:
    """The noise of every block of N samples  # [N, blocks] fp32."""
    return _gumbel_of_bits(philox_reference(seed, positions, blocks, stream=1)[0])


def _gumbel_of_bits(bits: torch.Tensor) -> torch.Tensor:
    uniform = (bits.float() * 2.0**-32 + 2.0**-33).clamp_max(1 - 2.0**-24)  # never 0 or 1
    return -torch.log(-torch.log1p(-uniform))


@triton.jit
def random_bits(seed, position, counters):
    """Four blocks of uint32 for int32 counters  # [C], which number the tokens as said above."""
    zeros = tl.zeros_like(counters)
    return tl.philox(seed, counters, zeros + position, zeros, zeros)


@triton.jit
def block_gumbel(seed, position, block):
    """The noise of one block, a scalar."""
    counter = tl.zeros((1,), tl.int32) + block
    zero = tl.zeros_like(counter)
    bits, _, _, _ = tl.philox(seed, counter, zero + position, zero + 1, zero)
    return tl.max(gumbel(bits), 0)


@triton.jit
def gumbel(bits):
    """-log(e) with e = -log(1 - u) exponential. Large noise comes from small u, where floats are dense, but 1 - u would
    lose their digits: there the series of the logarithm is used, cut below fp32's precision."""
    u = tl.minimum(bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.99999994039535522)
    series = u * (1.0 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6))))))
    return -tl.log(tl.where(u < 0.0625, series, -tl.log(1.0 - u)))

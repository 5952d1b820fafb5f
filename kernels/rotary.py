"""Rotary position embedding of q and k, fused with the per-head RMS norm before it and the KV store after it.

    normed = weight * x / sqrt(mean(x^2) + eps)                        (when norm weights are given; q and k, per head)
    out    = [first * cos - second * sin, second * cos + first * sin]  (first, second: the halves of a head)

q is written back in place; rotated k and untouched v go to the KV cache. The k and v columns of qkv stay as they were:
attention reads the cache.

Legend: T tokens, H query heads, K KV heads, D head dim, P pages of the KV cache.
Bound by memory: reads [T, (H + 2K) * D] and writes the same number of elements; a table row is shared by all heads.
One program takes a few query heads of one token, or a few KV heads and their v. Arithmetic is fp32; the normed value is
rounded to the dtype before its weight multiplies it (as in rms_norm), the rotated value once, at the end.
Sources: Su et al., "RoFormer", 2021 (the half-split order is that of GPT-NeoX); qk-norm as in Qwen3.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from minisgl.kernels.dependent_launch import dependent_launch, wait_for_previous_kernel
from minisgl.kernels.launch import cdiv, check_same, next_power_of_2, use_triton


class Rotary(NamedTuple):
    """What a layer does to q and k."""

    # [max_len, D] fp32: cosines of a place's D/2 angles, then sines; attention scaling is already in them
    cos_sin: torch.Tensor
    q_norm: torch.Tensor | None = None  # [D], weights of the RMS norm of each head
    k_norm: torch.Tensor | None = None  # [D]
    eps: float = 0.0  # of both norms


def rotary_store_reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rotary: Rotary,
) -> torch.Tensor:
    """The same in torch. Updates the q columns of `qkv` and the caches in place; returns q  # [T, H, D], a view."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    heads: torch.Tensor = qkv.unflatten(-1, (-1, head_dim))  # [T, H + 2K, D]
    q, k, v = heads[:, : -2 * num_kv_heads], heads[:, -2 * num_kv_heads : -num_kv_heads], heads[:, -num_kv_heads:]
    cos, sin = rotary.cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D/2] each

    def rotate(x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if norm is not None:
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + rotary.eps)
            wide = norm.to(wide.dtype) * normed.to(x.dtype).to(wide.dtype)
        first, second = wide.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    q.copy_(rotate(q, rotary.q_norm))
    stored = slots >= 0
    into = slots[stored].long()
    k_cache.view(-1, num_kv_heads, head_dim)[into] = rotate(k, rotary.k_norm)[stored]
    v_cache.view(-1, num_kv_heads, head_dim)[into] = v[stored]
    return q


@triton.jit
def load_heads(
    heads_ptr, head_mask, table_row, norm_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_NORM: tl.constexpr
):
    """What `rotate_heads` reads of heads that start at heads_ptr  # [BLOCK_HEADS]. Apart from it, so that the loads of
    several tensors can be sent for together.

    table_row: where the position's cosines start, before its sines. Each value is loaded twice, the second time as its
    partner in the other half, so that no value needs to cross from one thread to another."""
    HALF: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, BLOCK_D)
    in_first_half = dims < HALF
    partners = tl.where(in_first_half, dims + HALF, dims - HALF)
    angles = tl.where(in_first_half, dims, dims - HALF)
    if HALF % 8 == 0:  # 16-byte loads, which the compiler cannot see through `where`
        partners = tl.max_contiguous(tl.multiple_of(partners, 8), 8)
        angles = tl.max_contiguous(tl.multiple_of(angles, 8), 8)
    in_head = dims < HEAD_DIM
    mask = head_mask[:, None] & in_head[None, :]
    value = tl.load(heads_ptr[:, None] + dims[None, :], mask=mask, other=0.0)
    partner = tl.load(heads_ptr[:, None] + partners[None, :], mask=mask, other=0.0)
    cos = tl.load(table_row + angles, mask=in_head, other=0.0)
    sin = tl.load(table_row + HALF + angles, mask=in_head, other=0.0)
    weight = cos
    partner_weight = cos
    if HAS_NORM:
        weight = tl.load(norm_ptr + dims, mask=in_head, other=0.0).to(tl.float32)
        partner_weight = tl.load(norm_ptr + partners, mask=in_head, other=0.0).to(tl.float32)
    return value, partner, weight, partner_weight, cos, sin


@triton.jit
def rotate_heads(heads, eps, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_NORM: tl.constexpr):
    """Norm and rotate what `load_heads` loaded; returns fp32  # [BLOCK_HEADS, BLOCK_D]."""
    narrow, narrow_partner, weight, partner_weight, cos, sin = heads
    value = narrow.to(tl.float32)
    partner = narrow_partner.to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(value * value, 1) / HEAD_DIM + eps)[:, None]
        value = weight[None, :] * (value * scale).to(narrow.dtype).to(tl.float32)
        partner = partner_weight[None, :] * (partner * scale).to(narrow.dtype).to(tl.float32)
    in_first_half = tl.arange(0, BLOCK_D) < HEAD_DIM // 2
    return value * cos + tl.where(in_first_half[None, :], -partner, partner) * sin


@triton.jit
def store_kv(
    k_ptr,
    head_mask,
    head_slots,
    table_row,
    k_cache_ptr,
    v_cache_ptr,
    k_norm_ptr,
    eps,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Store a token's keys, which start at k_ptr  # [BLOCK_HEADS] and are normed and rotated first, and its values,
    NUM_KV_HEADS heads after them, at head_slots  # [BLOCK_HEADS]: slot * NUM_KV_HEADS + head."""
    dims = tl.arange(0, BLOCK_D)
    mask = head_mask[:, None] & (dims < HEAD_DIM)[None, :]
    heads = load_heads(k_ptr, head_mask, table_row, k_norm_ptr, HEAD_DIM, BLOCK_D, HAS_NORM)
    v = tl.load(k_ptr[:, None] + NUM_KV_HEADS * HEAD_DIM + dims[None, :], mask=mask)
    k = rotate_heads(heads, eps, HEAD_DIM, BLOCK_D, HAS_NORM)
    places = head_slots.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(k_cache_ptr + places, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
    tl.store(v_cache_ptr + places, v, mask=mask)


# positions and slots may be slices of any alignment: they must not compile a kernel each.
@triton.jit(do_not_specialize=["positions_ptr", "slots_ptr"])
def _rotary_store_kernel(
    qkv_ptr,
    positions_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    cos_sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    qkv_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    Q_PROGRAMS: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    heads = tl.arange(0, BLOCK_HEADS)
    dims = tl.arange(0, BLOCK_D)
    in_head = (dims < HEAD_DIM)[None, :]
    # The kernel before this one wrote qkv, but neither positions nor slots: see dependent_launch.py.
    table_row = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * HEAD_DIM
    slot = tl.load(slots_ptr + token).to(tl.int64)
    wait_for_previous_kernel(PDL)
    qkv_row = qkv_ptr + token * qkv_stride

    if tl.program_id(1) < Q_PROGRAMS:
        heads += tl.program_id(1) * BLOCK_HEADS
        is_head = heads < NUM_HEADS
        q_ptr = qkv_row + heads * HEAD_DIM
        loaded = load_heads(q_ptr, is_head, table_row, q_norm_ptr, HEAD_DIM, BLOCK_D, HAS_Q_NORM)
        q = rotate_heads(loaded, eps, HEAD_DIM, BLOCK_D, HAS_Q_NORM)
        tl.debug_barrier()  # q is rotated in place: all threads have their partners before one writes
        tl.store(q_ptr[:, None] + dims[None, :], q.to(qkv_ptr.dtype.element_ty), mask=is_head[:, None] & in_head)
    else:
        if slot >= 0:
            heads += (tl.program_id(1) - Q_PROGRAMS) * BLOCK_HEADS
            is_head = heads < NUM_KV_HEADS
            store_kv(
                qkv_row + (NUM_HEADS + heads) * HEAD_DIM, is_head, slot * NUM_KV_HEADS + heads, table_row,
                k_cache_ptr, v_cache_ptr, k_norm_ptr, eps, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, HAS_K_NORM,
            )  # fmt: skip


def check_rotary(qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, rotary: Rotary) -> int:
    """The number of query heads. Raises ValueError, naming the argument, unless these fit; shapes: `rotary_store`."""
    if qkv.dim() != 2:
        raise ValueError(f"qkv: expected [T, (H + 2K) * D], got {list(qkv.shape)}")
    if qkv.stride(1) != 1:
        raise ValueError("qkv: last dimension must be contiguous")
    return check_heads("qkv", qkv.shape[1], qkv, k_cache, v_cache, rotary)


def check_heads(
    name: str, width: int, like: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, rotary: Rotary
) -> int:
    """The number of query heads of q, k and v side by side, `width` elements as `name` has them. Raises ValueError,
    naming the argument, unless the others fit, and are on the device of `like` in its dtype; shapes: `rotary_store`."""
    cos_sin, device, dtype = rotary.cos_sin, like.device, like.dtype
    if cos_sin.dim() != 2:
        raise ValueError(f"cos_sin: expected [max_len, D], got {list(cos_sin.shape)}")
    head_dim = cos_sin.shape[1]
    if head_dim % 2:
        raise ValueError(f"cos_sin: head dim must be even, got {head_dim}")
    if not cos_sin.is_contiguous():
        raise ValueError("cos_sin: must be contiguous")
    check_same("cos_sin", cos_sin, device=device, dtype=torch.float32)
    for cache_name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4 or cache.shape[3] != head_dim:
            raise ValueError(f"{cache_name}: expected [P, page_size, K, {head_dim}], got {list(cache.shape)}")
        if not cache.is_contiguous():
            raise ValueError(f"{cache_name}: must be contiguous")
        check_same(cache_name, cache, device=device, dtype=dtype)
    if v_cache.shape != k_cache.shape:
        raise ValueError(f"v_cache: expected {list(k_cache.shape)}, got {list(v_cache.shape)}")
    for norm_name, norm in (("q_norm", rotary.q_norm), ("k_norm", rotary.k_norm)):
        if norm is not None:
            if norm.shape != (head_dim,):
                raise ValueError(f"{norm_name}: expected [{head_dim}], got {list(norm.shape)}")
            if not norm.is_contiguous():
                raise ValueError(f"{norm_name}: must be contiguous")
            check_same(norm_name, norm, device=device, dtype=dtype)
    num_kv_heads = k_cache.shape[2]
    kv_width = 2 * num_kv_heads * head_dim
    if width <= kv_width or width % head_dim:
        raise ValueError(f"{name}: expected (H + 2K) * D elements with K, D = {num_kv_heads}, {head_dim}, got {width}")
    return (width - kv_width) // head_dim


def check_tokens(tokens: int, device: torch.device, positions: torch.Tensor, slots: torch.Tensor) -> None:
    """Raises ValueError, naming the argument, unless both are such as `rotary_store` has of so many tokens."""
    for name, index in (("positions", positions), ("slots", slots)):
        if index.shape != (tokens,):
            raise ValueError(f"{name}: expected [{tokens}], got {list(index.shape)}")
        if not index.is_contiguous():
            raise ValueError(f"{name}: must be contiguous")
        check_same(name, index, device=device, dtype=torch.int32)


def rotary_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rotary: Rotary,
) -> torch.Tensor:
    """Norm (optional), rotate q in place, and store rotated k and raw v in the KV cache.

    qkv        # [T, (H + 2K) * D] fused projection output; rows may be strided
    positions  # [T] int32, place of each token in its text; must be below max_len (not checked: it would synchronise)
    slots      # [T] int32, page * page_size + place in the page; -1: the KV is already stored, nothing is written
    k_cache, v_cache  # [P, page_size, K, D], contiguous, of qkv's dtype

    The kernel just before may write qkv, but not positions and slots, which are read ahead (see dependent_launch.py).
    Returns q  # [T, H, D], a view of qkv. Raises ValueError for a wrong shape, stride, dtype or device.
    """
    num_heads = check_rotary(qkv, k_cache, v_cache, rotary)
    tokens, (num_kv_heads, head_dim) = qkv.shape[0], k_cache.shape[2:]
    check_tokens(tokens, qkv.device, positions, slots)
    if not use_triton(qkv):
        return rotary_store_reference(qkv, positions, slots, k_cache, v_cache, rotary)

    q: torch.Tensor = qkv[:, : num_heads * head_dim].unflatten(-1, (num_heads, head_dim))
    if tokens == 0:
        return q
    block_d = next_power_of_2(head_dim)
    # 1024 values a program, 8 a thread: one 16-byte load of bf16. With 16 a thread, 8,448 tokens take 9% longer.
    block_heads = max(1024 // block_d, 1)
    programs = cdiv(num_heads, block_heads) + cdiv(num_kv_heads, block_heads)
    _rotary_store_kernel[(tokens, programs)](
        qkv,
        positions,
        slots,
        k_cache,
        v_cache,
        *rotary,
        qkv.stride(0),  # fixed by the model, so specialised: a multiple of 16 keeps the loads 16 bytes wide
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_HEADS=block_heads,
        HAS_Q_NORM=rotary.q_norm is not None,
        HAS_K_NORM=rotary.k_norm is not None,
        num_warps=4,
        **dependent_launch(qkv.device),
    )
    return q

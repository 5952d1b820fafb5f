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

import torch
import triton
import triton.language as tl

from minisgl.kernels.launch import check, check_same, use_triton


def rotary_store_reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """The same in torch. Updates the q columns of `qkv` and the caches in place; returns q  # [T, H, D], a view."""
    head_dim = cos_sin.shape[1]
    heads: torch.Tensor = qkv.unflatten(-1, (-1, head_dim))  # [T, H + 2K, D]
    q, k, v = heads[:, :num_heads], heads[:, num_heads:-num_kv_heads], heads[:, -num_kv_heads:]
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D/2] each

    def rotate(x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if norm is not None:
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            wide = norm.to(wide.dtype) * normed.to(x.dtype).to(wide.dtype)
        first, second = wide.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    q.copy_(rotate(q, q_norm))
    stored = slots >= 0
    into = slots[stored].long()
    k_cache.view(-1, num_kv_heads, head_dim)[into] = rotate(k, k_norm)[stored]
    v_cache.view(-1, num_kv_heads, head_dim)[into] = v[stored]
    return q


@triton.jit
def _normed(first, second, norm_ptr, cols, mask, eps, HEAD_DIM: tl.constexpr):
    """RMS norm of heads given as halves [BLOCK_HEADS, BLOCK_HALF] in their own dtype; returns fp32 halves."""
    dtype = first.dtype
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / HEAD_DIM + eps)[:, None]
    first_weight = tl.load(norm_ptr + cols, mask=mask, other=0.0).to(tl.float32)[None, :]
    second_weight = tl.load(norm_ptr + HEAD_DIM // 2 + cols, mask=mask, other=0.0).to(tl.float32)[None, :]
    first = first_weight * (first * scale).to(dtype).to(tl.float32)
    second = second_weight * (second * scale).to(dtype).to(tl.float32)
    return first, second


# positions and slots may be slices of any alignment: they must not compile a kernel each.
@triton.jit(do_not_specialize=["positions_ptr", "slots_ptr"])
def _rotary_store_kernel(
    qkv_ptr,
    positions_ptr,
    slots_ptr,
    cos_sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    q_norm_ptr,
    k_norm_ptr,
    qkv_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = HEAD_DIM // 2
    Q_PROGRAMS: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    cols = tl.arange(0, BLOCK_HALF)
    heads = tl.arange(0, BLOCK_HEADS)
    col_mask = cols < HALF
    table_row = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * HEAD_DIM + cols
    qkv_row = qkv_ptr + token * qkv_stride

    if tl.program_id(1) < Q_PROGRAMS:
        heads += tl.program_id(1) * BLOCK_HEADS
        mask = (heads < NUM_HEADS)[:, None] & col_mask[None, :]
        q_tile = qkv_row + heads[:, None] * HEAD_DIM + cols[None, :]
        cos = tl.load(table_row, mask=col_mask, other=0.0)[None, :]
        sin = tl.load(table_row + HALF, mask=col_mask, other=0.0)[None, :]
        first = tl.load(q_tile, mask=mask, other=0.0)
        second = tl.load(q_tile + HALF, mask=mask, other=0.0)
        if HAS_Q_NORM:
            first, second = _normed(first, second, q_norm_ptr, cols, col_mask, eps, HEAD_DIM)
        first = first.to(tl.float32)
        second = second.to(tl.float32)
        tl.store(q_tile, (first * cos - second * sin).to(qkv_ptr.dtype.element_ty), mask=mask)
        tl.store(q_tile + HALF, (second * cos + first * sin).to(qkv_ptr.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if slot >= 0:
            heads += (tl.program_id(1) - Q_PROGRAMS) * BLOCK_HEADS
            mask = (heads < NUM_KV_HEADS)[:, None] & col_mask[None, :]
            head_tile = heads[:, None] * HEAD_DIM + cols[None, :]
            k_tile = qkv_row + NUM_HEADS * HEAD_DIM + head_tile
            v_tile = k_tile + NUM_KV_HEADS * HEAD_DIM
            stored = slot * (NUM_KV_HEADS * HEAD_DIM) + head_tile
            cos = tl.load(table_row, mask=col_mask, other=0.0)[None, :]
            sin = tl.load(table_row + HALF, mask=col_mask, other=0.0)[None, :]
            first = tl.load(k_tile, mask=mask, other=0.0)
            second = tl.load(k_tile + HALF, mask=mask, other=0.0)
            v_first = tl.load(v_tile, mask=mask)
            v_second = tl.load(v_tile + HALF, mask=mask)
            if HAS_K_NORM:
                first, second = _normed(first, second, k_norm_ptr, cols, col_mask, eps, HEAD_DIM)
            first = first.to(tl.float32)
            second = second.to(tl.float32)
            tl.store(k_cache_ptr + stored, (first * cos - second * sin).to(k_cache_ptr.dtype.element_ty), mask=mask)
            tl.store(
                k_cache_ptr + stored + HALF, (second * cos + first * sin).to(k_cache_ptr.dtype.element_ty), mask=mask
            )
            tl.store(v_cache_ptr + stored, v_first, mask=mask)
            tl.store(v_cache_ptr + stored + HALF, v_second, mask=mask)


def rotary_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Norm (optional), rotate q in place, and store rotated k and raw v in the KV cache.

    qkv        # [T, (H + 2K) * D] fused projection output; rows may be strided
    positions  # [T] int32, place of each token in its text; must be below max_len (not checked: it would synchronise)
    slots      # [T] int32, page * page_size + place in the page; -1: the KV is already stored, nothing is written
    cos_sin    # [max_len, D] fp32: cosines of the D/2 angles, then sines; attention scaling is already in them
    k_cache, v_cache  # [P, page_size, K, D], contiguous, of qkv's dtype
    q_norm, k_norm    # [D], per-head RMS norm weights with `eps`

    Returns q  # [T, H, D], a view of qkv. Raises ValueError for a wrong shape, stride, dtype or device.
    """
    check(qkv.dim() == 2, f"qkv: expected [T, (H + 2K) * D], got {list(qkv.shape)}")
    check(qkv.stride(-1) == 1, "qkv: last dimension must be contiguous")
    check(cos_sin.dim() == 2, f"cos_sin: expected [max_len, D], got {list(cos_sin.shape)}")
    tokens, (_, head_dim) = qkv.shape[0], cos_sin.shape
    check(head_dim % 2 == 0, f"cos_sin: head dim must be even, got {head_dim}")
    check(cos_sin.is_contiguous(), "cos_sin: must be contiguous")
    check_same("cos_sin", cos_sin, device=qkv.device, dtype=torch.float32)
    columns = (num_heads + 2 * num_kv_heads) * head_dim
    check(qkv.shape[1] == columns, f"qkv: expected {columns} columns, got {qkv.shape[1]}")
    for name, index in (("positions", positions), ("slots", slots)):
        check(index.shape == (tokens,), f"{name}: expected [{tokens}], got {list(index.shape)}")
        check(index.is_contiguous(), f"{name}: must be contiguous")
        check_same(name, index, device=qkv.device, dtype=torch.int32)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check(
            cache.dim() == 4 and cache.shape[2:] == (num_kv_heads, head_dim),
            f"{name}: expected [P, page_size, {num_kv_heads}, {head_dim}], got {list(cache.shape)}",
        )
        check(cache.is_contiguous(), f"{name}: must be contiguous")
        check_same(name, cache, device=qkv.device, dtype=qkv.dtype)
    check(v_cache.shape == k_cache.shape, f"v_cache: expected {list(k_cache.shape)}, got {list(v_cache.shape)}")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check(norm.shape == (head_dim,), f"{name}: expected [{head_dim}], got {list(norm.shape)}")
            check(norm.is_contiguous(), f"{name}: must be contiguous")
            check_same(name, norm, device=qkv.device, dtype=qkv.dtype)
    if not use_triton(qkv):
        return rotary_store_reference(
            qkv,
            positions,
            slots,
            cos_sin,
            k_cache,
            v_cache,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
        )

    q: torch.Tensor = qkv[:, : num_heads * head_dim].unflatten(-1, (num_heads, head_dim))
    if tokens == 0:
        return q
    block_half = triton.next_power_of_2(head_dim // 2)
    # 512 pairs a program: 8 a thread at 2 warps, one 16-byte load of bf16 from each half.
    block_heads = max(512 // block_half, 1)
    programs = triton.cdiv(num_heads, block_heads) + triton.cdiv(num_kv_heads, block_heads)
    _rotary_store_kernel[(tokens, programs)](
        qkv,
        positions,
        slots,
        cos_sin,
        k_cache,
        v_cache,
        q_norm,
        k_norm,
        qkv.stride(0),  # fixed by the model, so specialised: a multiple of 16 keeps the loads 16 bytes wide
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_HALF=block_half,
        BLOCK_HEADS=block_heads,
        HAS_Q_NORM=q_norm is not None,
        HAS_K_NORM=k_norm is not None,
        num_warps=2,
    )
    return q

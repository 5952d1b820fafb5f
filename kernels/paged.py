"""What the two attention kernels share: reading keys and values from pages, the online softmax, argument checks, and
paged caches of given content for tests and benches.

Legend: P pages, K KV heads, D head dim, R rows of the page table, M pages a row may have, S sequences.
A layer's cache is [P, page_size, K, D], contiguous. Key j of a row lies in slot j % page_size of page
page_table[row, j // page_size]. Slots at and past a row's length, and table entries past its last page, may hold
anything (NaN too): no result depends on it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from minisgl.kernels.launch import check_same

LOG2_E = 1.4426950408889634  # the kernels use exp2: exp(x) = exp2(x * LOG2_E)

# Minus infinity and no large finite number: scores * scale - max is one fused multiply-add on a GPU, whose product is
# not rounded while the maximum is, and at 1e30 the difference of the two is itself huge.
MASKED_SCORE = tl.constexpr(float("-inf"))

# Bytes of shared memory one program may have. Every tile of the attention tables fits: the ahead-of-time cases check.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}


def write_chunks(out: torch.Tensor, result: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """Copy the tokens of `result` that belong to a chunk to `out`, both  # [T, H, D]; the others stay as they are."""
    tokens = slice(int(cu_seqlens[0]), int(cu_seqlens[-1]))
    out[tokens].copy_(result[tokens])


@triton.jit
def load_page_ids(table_row, start, end, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pages of keys start..start+BLOCK_N-1: one id if a page holds them all, else [BLOCK_N]; 0 for keys past `end`."""
    if PAGE_SIZE >= BLOCK_N:
        return tl.load(table_row + start // PAGE_SIZE, mask=start < end, other=0)
    else:
        keys = start + tl.arange(0, BLOCK_N)
        return tl.load(table_row + keys // PAGE_SIZE, mask=keys < end, other=0)


@triton.jit
def load_block(
    cache_ptr,  # at the KV head's first element
    page,
    start,
    first_key,
    end_key,
    SLOT_STRIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK_KEYS: tl.constexpr,
):
    """Keys or values start..start+BLOCK_N-1  # [BLOCK_N, BLOCK_D]; MASK_KEYS: zeros outside first_key..end_key-1."""
    cols = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    # int64 before the stride: the slots of a large cache pass 2^31 elements
    if PAGE_SIZE >= BLOCK_N:
        page_start = cache_ptr + (page.to(tl.int64) * PAGE_SIZE + start % PAGE_SIZE) * SLOT_STRIDE
        pointers = page_start + cols[:, None] * SLOT_STRIDE + dims[None, :]
    else:
        slots = page.to(tl.int64) * PAGE_SIZE + cols % PAGE_SIZE
        pointers = cache_ptr + slots[:, None] * SLOT_STRIDE + dims[None, :]
    if MASK_KEYS:
        keys = start + cols
        mask = ((keys >= first_key) & (keys < end_key))[:, None] & (dims < HEAD_DIM)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    elif BLOCK_D > HEAD_DIM:
        return tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def online_softmax(scores, values, acc, row_max, row_sum, scale_log2):
    """Add a block's scores  # [rows, BLOCK_N], -inf where masked, and values  # [BLOCK_N, BLOCK_D] to the softmax."""
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a query that has seen no key yet: -inf - -inf is NaN
    weights = tl.exp2(scores * scale_log2 - shift[:, None])
    rescale = tl.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    # ieee: exact fp32 products for fp32 caches; 2-byte types ignore it
    acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, row_sum


def check_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int,
    out: torch.Tensor | None,
) -> None:
    """Raise ValueError, naming the argument, unless these fit together; see the launchers for the shapes. out: None
    where a workspace takes the result."""
    if q.dim() != 3:
        raise ValueError(f"q: expected [T, H, D], got {list(q.shape)}")
    _, heads, head_dim = q.shape
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise ValueError(f"q: head dim {head_dim} is not a multiple of 8 between 8 and 256")
    if q.stride(2) != 1 or (heads > 1 and q.stride(1) != head_dim):
        raise ValueError(f"q: heads must be contiguous in a token, got strides {q.stride()}")
    if k_cache.dim() != 4 or k_cache.shape[3] != head_dim:
        raise ValueError(f"k_cache: expected [P, page_size, K, {head_dim}], got {list(k_cache.shape)}")
    page_size, kv_heads = k_cache.shape[1:3]
    if page_size & (page_size - 1):
        raise ValueError(f"k_cache: page size {page_size} is not a power of two")
    if heads % kv_heads:
        raise ValueError(f"k_cache: {kv_heads} KV heads do not divide {heads} query heads")
    if v_cache.shape != k_cache.shape:
        raise ValueError(f"v_cache: expected {list(k_cache.shape)}, got {list(v_cache.shape)}")
    same = {"k_cache": k_cache, "v_cache": v_cache}
    if out is not None:
        same["out"] = out
        if out.shape != q.shape:
            raise ValueError(f"out: expected {list(q.shape)}, got {list(out.shape)}")
    for name, x in same.items():
        check_same(name, x, device=q.device, dtype=q.dtype)
        if not x.is_contiguous():
            raise ValueError(f"{name}: must be contiguous, got strides {x.stride()}")
    check_index("page_table", page_table, q.device, (None, None))
    check_index("rows", rows, q.device, (None,))
    check_index("kv_lens", kv_lens, q.device, (rows.shape[0],))
    if not scale > 0:  # the running maximum is taken of scaled scores
        raise ValueError(f"scale: expected a positive number, got {scale}")
    if window < 0:
        raise ValueError(f"window: expected 0 (none) or a positive number of tokens, got {window}")


def check_decode(q: torch.Tensor, rows: torch.Tensor, max_kv_len: int) -> None:
    """The same of what decode attention has beside them."""
    if rows.shape[0] != q.shape[0]:
        raise ValueError(f"rows: expected [{q.shape[0]}], got {list(rows.shape)}")
    if max_kv_len < 0:
        raise ValueError(f"max_kv_len: expected 0 or more, got {max_kv_len}")


def _is_size(size: int, wanted: int | None) -> bool:
    return wanted is None or size == wanted


def check_index(name: str, x: torch.Tensor, device: torch.device, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `x` is contiguous int32 on `device`, with this shape (None: any size)."""
    check_same(name, x, device=device, dtype=torch.int32)
    if x.dim() != len(shape) or not all(map(_is_size, x.shape, shape)):
        raise ValueError(f"{name}: expected {['any' if size is None else size for size in shape]}, got {list(x.shape)}")
    if not x.is_contiguous():
        raise ValueError(f"{name}: must be contiguous, got strides {x.stride()}")


def shuffled_page_table(kv_lens: Sequence[int], page_size: int, device: torch.device) -> torch.Tensor:
    """A page table  # [S, M] int32 for these lengths: pages 0..P-1 in random order, -1 past a row's last page."""
    num_pages = torch.tensor([-(-kv_len // page_size) for kv_len in kv_lens])
    used = torch.arange(max(int(num_pages.max()), 1)) < num_pages[:, None]
    table = torch.full(used.shape, -1, dtype=torch.int32)
    table[used] = torch.randperm(int(num_pages.sum())).int()
    return table.to(device)


def store_in_pages(sequences: Sequence[torch.Tensor], page_table: torch.Tensor, page_size: int) -> torch.Tensor:
    """A cache  # [P, page_size, K, D] with each sequence  # [length, K, D] in its row's pages, NaN in other slots."""
    first = sequences[0]
    num_pages = int(page_table.max()) + 1
    cache = first.new_full((num_pages * page_size, *first.shape[1:]), float("nan"))
    for table_row, sequence in zip(page_table.long(), sequences, strict=True):
        key = torch.arange(len(sequence), device=cache.device)
        cache[table_row[key // page_size] * page_size + key % page_size] = sequence
    return cache.view(num_pages, page_size, *first.shape[1:])

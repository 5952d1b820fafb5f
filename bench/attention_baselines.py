"""What attention is compared with: torch on dense keys and values, and paged kernels of others where installed.

    torch sdpa, cuDNN, FlexAttention   dense [B, H, L, D]: no pages to look up, so less work than ours
    vLLM FA3 (FA2 below sm_90), FlashInfer   our own pages

A baseline sets itself up in its first launch, so that one that fails there is left out, and no other.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from minisgl.kernels.launch import architecture

Launch = Callable[[], object]
WORKSPACE_BYTES = 256 << 20  # FlashInfer's: its examples use half of it


def lazily(build: Callable[[], Launch]) -> Launch:
    """A launch whose set-up happens at its first call."""
    built = cache(build)
    return lambda: built()()


def dense_prefill(
    batch: int, new: int, cached: int, heads: int, kv_heads: int, head_dim: int, scale: float, device: torch.device
) -> dict[str, Launch]:
    """Causal attention of the last `new` of `cached + new` tokens."""
    kv_len = new + cached
    q = torch.randn(batch, heads, new, head_dim, device=device, dtype=torch.bfloat16)
    k, v = torch.randn(2, batch, kv_heads, kv_len, head_dim, device=device, dtype=torch.bfloat16).unbind()
    mask = causal_lower_right(new, kv_len) if cached else None

    def build_sdpa() -> Launch:
        # KV heads repeated: with enable_gqa torch may leave its flash kernel.
        wide_k, wide_v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        return lambda: F.scaled_dot_product_attention(
            q, wide_k, wide_v, attn_mask=mask, is_causal=mask is None, scale=scale
        )

    def cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    def build_flex() -> Launch:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return query + cached >= key

        torch.compiler.reset()  # or the ninth shape passes the limit of recompilations, and runs eagerly
        blocks = create_block_mask(visible, None, None, new, kv_len, device=str(device))
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(q, k, v, block_mask=blocks, scale=scale, enable_gqa=True)

    baselines = {"torch sdpa, dense": lazily(build_sdpa), "FlexAttention, dense": lazily(build_flex)}
    if not cached:  # its causal mask is that of a square
        baselines["cuDNN, dense"] = cudnn
    return baselines


def paged_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
) -> dict[str, Launch]:
    """Kernels of installed packages, on arguments of `attention_prefill` whose rows are 0, 1, 2, ..."""
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())

    def build_vllm() -> Launch:
        attention = import_module("vllm.vllm_flash_attn").flash_attn_varlen_func
        options = dict(max_seqlen_q=longest, cu_seqlens_q=cu_seqlens, max_seqlen_k=int(kv_lens.max()))
        options |= dict(seqused_k=kv_lens, softmax_scale=scale, causal=True, block_table=page_table.contiguous())
        version = 3 if architecture(q.device) == "sm_90" else 2
        return lambda: attention(q, k_cache, v_cache, fa_version=version, **options)

    def build_flashinfer() -> Launch:
        _, heads, head_dim = q.shape
        _, page_size, kv_heads, _ = k_cache.shape
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        wrapper = import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        index = _page_index(page_table, kv_lens, page_size)
        wrapper.plan(
            cu_seqlens, *index, heads, kv_heads, head_dim, page_size, causal=True, sm_scale=scale, q_data_type=q.dtype
        )
        queries = q.contiguous()
        return lambda: wrapper.run(queries, (k_cache, v_cache))

    return _installed(build_vllm, build_flashinfer, q.device)


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
) -> dict[str, Launch]:
    """The same for `attention_decode`: vLLM runs it as prefill of one token each."""
    cu_seqlens = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    baselines = paged_prefill(q, k_cache, v_cache, page_table, cu_seqlens, kv_lens, scale)

    def build_flashinfer() -> Launch:
        _, heads, head_dim = q.shape
        _, page_size, kv_heads, _ = k_cache.shape
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        wrapper = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )
        index = _page_index(page_table, kv_lens, page_size)
        types = dict(q_data_type=q.dtype, kv_data_type=k_cache.dtype)
        wrapper.plan(*index, heads, kv_heads, head_dim, page_size, sm_scale=scale, **types)
        queries = q.contiguous()
        return lambda: wrapper.run(queries, (k_cache, v_cache))

    if "FlashInfer" in baselines:
        baselines["FlashInfer"] = lazily(build_flashinfer)
    return baselines


def _installed(vllm: Callable[[], Launch], flashinfer: Callable[[], Launch], device: torch.device) -> dict[str, Launch]:
    name = "vLLM FA3" if architecture(device) == "sm_90" else "vLLM FA2"
    builds = {"vllm": (name, vllm), "flashinfer": ("FlashInfer", flashinfer)}
    return {name: lazily(build) for package, (name, build) in builds.items() if find_spec(package)}


def _page_index(
    page_table: torch.Tensor, kv_lens: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(offsets of each sequence's pages, its page ids, tokens in its last page), as FlashInfer wants them."""
    pages = (kv_lens + page_size - 1) // page_size
    offsets = F.pad(pages.cumsum(0), (1, 0)).int()
    ids = torch.cat([row[:count] for row, count in zip(page_table, pages.tolist(), strict=True)])
    return offsets, ids.int(), ((kv_lens - 1) % page_size + 1).int()

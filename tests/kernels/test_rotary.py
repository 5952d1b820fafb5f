"""rotary_store against float64, against transformers' rotate_half, and slot by slot."""

import pytest
import torch

from minisgl.kernels.rotary import Rotary, rotary_store, rotary_store_reference

PAGE_SIZE = 8
EPS = 1e-6


def angles(max_len: int, head_dim: int, device: torch.device) -> torch.Tensor:
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angle = torch.arange(max_len, device=device)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def make(tokens, heads, kv_heads, head_dim, device, dtype, norm=False, pad=0):
    """Arguments at random, with caches full of NaN and distinct slots, some of them -1."""
    columns = (heads + 2 * kv_heads) * head_dim
    qkv = torch.randn(tokens, columns + pad, device=device, dtype=dtype)[:, :columns]
    pages = tokens // PAGE_SIZE + 2
    slots = torch.randperm(pages * PAGE_SIZE, device=device)[:tokens].int()
    slots[::5] = -1
    caches = [torch.full((pages, PAGE_SIZE, kv_heads, head_dim), torch.nan, device=device, dtype=dtype) for _ in "kv"]
    positions = torch.randint(0, 500, (tokens,), device=device, dtype=torch.int32)
    norms = [torch.randn(head_dim, device=device, dtype=dtype) if norm else None for _ in "qk"]
    return qkv, positions, slots, *caches, Rotary(angles(500, head_dim, device), *norms, EPS)


def in_float64(args):
    qkv, positions, slots, k_cache, v_cache, rotary = args
    rotary = Rotary(*(x.double() if isinstance(x, torch.Tensor) else x for x in rotary))
    return qkv.double(), positions, slots, k_cache.double(), v_cache.double(), rotary


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize(
    "tokens, heads, kv_heads, head_dim",
    [(1, 1, 1, 64), (7, 14, 2, 64), (5, 3, 3, 80), (3, 4, 1, 96), (9, 16, 8, 128), (2, 4, 2, 256), (3, 5, 5, 6)],
)
def test_matches_float64(device, dtype, assert_close, tokens, heads, kv_heads, head_dim, norm):
    args = make(tokens, heads, kv_heads, head_dim, device, dtype, norm)
    qkv, _, slots, k_cache, v_cache, _ = args
    args64 = in_float64(args)
    before = qkv.clone()

    q = rotary_store(*args)
    q64 = rotary_store_reference(*args64)

    assert q.data_ptr() == qkv.data_ptr() and q.shape == (tokens, heads, head_dim)
    assert_close(q, q64)
    assert torch.equal(qkv[:, heads * head_dim :], before[:, heads * head_dim :])  # k and v stay
    for cache, cache64 in ((k_cache, args64[3]), (v_cache, args64[4])):
        written = torch.zeros(cache.shape[0] * PAGE_SIZE, dtype=torch.bool, device=device)
        written[slots[slots >= 0].long()] = True
        flat, flat64 = cache.flatten(0, 1), cache64.flatten(0, 1)
        if written.any():
            assert_close(flat[written], flat64[written])
        assert flat[~written].isnan().all()


def test_matches_transformers(device):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    args = make(6, 4, 2, 64, device, torch.float32)
    qkv, positions, slots, k_cache, _, rotary = args
    slots.copy_(torch.arange(6))
    q, k, _ = qkv.clone().view(6, 8, 64).split([4, 2, 2], dim=1)
    cos, sin = rotary.cos_sin[positions.long()].chunk(2, dim=-1)
    q, k = apply_rotary_pos_emb(q[None], k[None], cos.repeat(1, 2)[None], sin.repeat(1, 2)[None], unsqueeze_dim=2)

    out = rotary_store(*args)

    torch.testing.assert_close(out, q[0])
    torch.testing.assert_close(k_cache.flatten(0, 1)[:6], k[0])


def test_norm_of_q_alone(device, dtype, assert_close):
    args = make(4, 2, 2, 32, device, dtype, norm=True)
    args = (*args[:5], args[5]._replace(k_norm=None))
    args64 = in_float64(args)
    assert_close(rotary_store(*args), rotary_store_reference(*args64))
    stored = args[2][args[2] >= 0].long()
    assert_close(args[3].flatten(0, 1)[stored], args64[3].flatten(0, 1)[stored])


def test_rows_may_be_strided(device, dtype):
    args = make(5, 4, 2, 64, device, dtype, pad=24)
    qkv, k_cache = args[0], args[3]
    dense, other_cache = qkv.contiguous(), k_cache.clone()
    q = rotary_store(*args)
    assert torch.equal(q, rotary_store(dense, *args[1:3], other_cache, *args[4:]))
    assert torch.equal(k_cache.nan_to_num(), other_cache.nan_to_num())


def test_a_token_does_not_depend_on_its_neighbours(device, dtype):
    args = make(17, 4, 2, 64, device, dtype, norm=True)
    qkv, positions, slots, k_cache, v_cache, rotary = args
    alone, alone_cache = qkv.clone(), k_cache.clone()
    together = rotary_store(*args)
    for token in range(0, 17, 4):
        one = slice(token, token + 1)
        q = rotary_store(alone[one], positions[one], slots[one], alone_cache, v_cache, rotary)
        assert torch.equal(q, together[one])
        if slots[token] >= 0:
            slot = int(slots[token])
            assert torch.equal(alone_cache.flatten(0, 1)[slot], k_cache.flatten(0, 1)[slot])


def test_no_tokens(device, dtype):
    args = make(0, 2, 1, 32, device, dtype)
    assert rotary_store(*args).shape == (0, 2, 32)


@pytest.mark.parametrize(
    "place, change, name",
    [
        (0, lambda x: x[:, :-1], "qkv"),
        (0, lambda x: x.t().contiguous().t(), "qkv"),
        (1, lambda x: x.long(), "positions"),
        (2, lambda x: x[:-1], "slots"),
        (3, lambda x: x.transpose(0, 1), "k_cache"),
        (4, lambda x: x[:1], "v_cache"),
        (5, lambda x: x._replace(cos_sin=x.cos_sin.half()), "cos_sin"),
        (5, lambda x: x._replace(k_norm=x.k_norm.half()), "k_norm"),
    ],
)
def test_refuses_bad_arguments(device, place, change, name):
    args = list(make(4, 2, 1, 32, device, torch.float32, norm=True))
    args[place] = change(args[place])
    with pytest.raises(ValueError, match=f"^{name}:"):
        rotary_store(*args)

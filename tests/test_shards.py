"""Every head, column and id is on a rank, query heads beside their KV head, and all ranks have the same shapes."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisgl.models.config import ModelConfig
from minisgl.shards import Cut, Piece, Ranks, Shard

LLAMA = ModelConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 100,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)


def shards(size, **changes):
    config = dataclasses.replace(LLAMA, **changes)
    return [Shard.of(config, Ranks(rank, size)) for rank in range(size)]


def held(cut):
    """Index on the rank -> index in the whole."""
    return {piece.at + n: piece.start + n for piece in cut.pieces for n in range(piece.length)}


@given(kv_heads=st.integers(1, 12), group=st.integers(1, 9), size=st.integers(1, 16))
def test_heads(kv_heads, group, size):
    all_ranks = shards(size, num_heads=kv_heads * group, num_kv_heads=kv_heads)
    q_held = [q for shard in all_ranks for q in held(shard.q_heads).values()]
    assert sorted(q_held) == list(range(kv_heads * group))  # each once: outputs are summed
    assert len({(shard.q_heads.size, shard.kv_heads.size) for shard in all_ranks}) == 1
    for shard in all_ranks:
        each, left = divmod(shard.q_heads.size, shard.kv_heads.size)
        assert left == 0
        kv = held(shard.kv_heads)
        for at, q in held(shard.q_heads).items():
            assert kv[at // each] == q // group
        assert len(kv) <= shard.kv_heads.size == max(1, -(-kv_heads * max(1, size // kv_heads) // size))


@given(whole=st.integers(1, 5000), size=st.integers(1, 16), multiple=st.sampled_from([1, 16, 64]))
def test_slices(whole, size, multiple):
    cuts = [Cut.slices(whole, Ranks(rank, size), multiple) for rank in range(size)]
    assert [index for cut in cuts for index in held(cut).values()] == list(range(whole))
    assert len({cut.size for cut in cuts}) == 1
    assert size == 1 or cuts[0].size % multiple == 0
    assert cuts[0].is_whole == (size == 1 or cuts[0].size == whole)


def test_one_rank_holds_what_the_checkpoint_does():
    (shard,) = shards(1)
    assert all(cut.is_whole for cut in (shard.q_heads, shard.kv_heads, shard.mlp, shard.vocab))
    assert shard.first_id == 0


@pytest.mark.parametrize(
    "size, q_heads, kv_heads, mlp, vocab",
    [(2, (Piece(0, 2, 2),), (Piece(0, 1, 1),), Piece(0, 64, 36), Piece(0, 192, 72))],
)
def test_the_last_of_two(size, q_heads, kv_heads, mlp, vocab):
    shard = shards(size)[-1]
    assert (shard.q_heads.pieces, shard.kv_heads.pieces) == (q_heads, kv_heads)
    assert (shard.mlp.pieces, shard.vocab.pieces, shard.first_id) == ((mlp,), (vocab,), 192)
    assert shard.q_heads.times(16) == Cut(64, 32, (Piece(0, 32, 32),))

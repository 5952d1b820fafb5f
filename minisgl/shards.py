"""Which part of a model each rank holds: heads, KV heads, feed-forward width and vocabulary, in numbers.

- KV heads are dealt out in order. Where there are fewer than ranks, each is copied to as many ranks as it can have, and
  these share its query heads.
- The width of the feed-forward block and the vocabulary are cut in equal slices, rounded up to what kernels like.
- What does not divide is padded: with heads, columns and ids whose weights are zeros, which add nothing to any sum.

So every rank has the same shapes, and any number of ranks works. Knows no tensors and no processes.
"""

from dataclasses import dataclass
from typing import NamedTuple

from minisgl.kernels.vocab_blocks import BLOCK
from minisgl.models.config import ModelConfig

WIDTH_MULTIPLE = 16  # of the feed-forward width: rows of 2-byte weights stay aligned to 32 bytes


class Ranks(NamedTuple):
    """A rank's place among those that share one model."""

    rank: int = 0
    size: int = 1


class Piece(NamedTuple):
    """Consecutive indices that a rank holds."""

    at: int  # the first one's index on the rank
    start: int  # and in the whole
    length: int


@dataclass(frozen=True)
class Cut:
    """What a rank holds of one dimension. Indices on the rank that no piece names are padding."""

    whole: int  # indices in the checkpoint
    size: int  # on the rank, padding included
    pieces: tuple[Piece, ...]

    @classmethod
    def none(cls, whole: int) -> "Cut":
        """Every rank holds all of it."""
        return cls(whole, whole, (Piece(0, 0, whole),))

    @classmethod
    def slices(cls, whole: int, ranks: Ranks, multiple: int) -> "Cut":
        """Equal slices of a multiple of `multiple`; the last ranks may hold less, or nothing."""
        if ranks.size == 1:
            return cls.none(whole)
        size = -(-whole // (ranks.size * multiple)) * multiple
        start = ranks.rank * size
        count = min(size, whole - start)
        return cls(whole, size, (Piece(0, start, count),) if count > 0 else ())

    @property
    def is_whole(self) -> bool:
        return self.pieces == (Piece(0, 0, self.size),) and self.size == self.whole

    @property
    def num_real(self) -> int:
        """Indices on the rank that are no padding."""
        return sum(piece.length for piece in self.pieces)

    def times(self, width: int) -> "Cut":
        """The same where each index stands for `width` of them, as a head does for its dimensions."""
        pieces = tuple(Piece(*(width * number for number in piece)) for piece in self.pieces)
        return Cut(width * self.whole, width * self.size, pieces)


@dataclass(frozen=True)
class Shard:
    """A rank's part of a model."""

    ranks: Ranks
    q_heads: Cut
    kv_heads: Cut
    mlp: Cut
    vocab: Cut  # whole blocks of 64 ids; one slice

    @classmethod
    def of(cls, config: ModelConfig, ranks: Ranks) -> "Shard":
        """The part of one of `ranks`."""
        q_heads, kv_heads = _heads(config.num_heads, config.num_kv_heads, ranks)
        mlp = Cut.slices(config.intermediate_size, ranks, WIDTH_MULTIPLE)
        return cls(ranks, q_heads, kv_heads, mlp, Cut.slices(config.vocab_size, ranks, BLOCK))

    @property
    def first_id(self) -> int:
        """The token id of this rank's first row of the embedding."""
        return self.ranks.rank * self.vocab.size


def _heads(num_heads: int, num_kv_heads: int, ranks: Ranks) -> tuple[Cut, Cut]:
    """Query heads and KV heads of a rank, which has as many query heads for each of its KV heads."""
    group = num_heads // num_kv_heads
    copies = max(1, ranks.size // num_kv_heads)  # of a KV head
    each = -(-group // copies)  # query heads of a copy
    slots = -(-num_kv_heads * copies // ranks.size)  # copies on a rank
    q_pieces: list[Piece] = []
    kv_pieces: list[Piece] = []
    for slot in range(slots):
        kv_head, copy = divmod(ranks.rank * slots + slot, copies)
        count = min(each, group - copy * each)
        if kv_head < num_kv_heads and count > 0:
            _append(q_pieces, Piece(slot * each, kv_head * group + copy * each, count))
            _append(kv_pieces, Piece(slot, kv_head, 1))
    return Cut(num_heads, slots * each, tuple(q_pieces)), Cut(num_kv_heads, slots, tuple(kv_pieces))


def _append(pieces: list[Piece], piece: Piece) -> None:
    """Add a piece; one that goes on where the last one ends makes that longer."""
    if pieces:
        at, start, length = pieces[-1]
        if (at + length, start + length) == piece[:2]:
            pieces[-1] = Piece(at, start, length + piece.length)
            return
    pieces.append(piece)
